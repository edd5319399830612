"""Log-weights of particles: averages, effective sample size, and the shape of their tail."""

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor


class DegenerateWeightsError(ArithmeticError):
    """Weights of a step that are all zero, infinite or NaN, so that no particle can go on.

    Args:
        step: t, from 1.
        sequence: counted from 0.
        total: log of the summed weights, which is not finite.
    """

    def __init__(self, step: int, sequence: int, total: float) -> None:
        weights = "not numbers (NaN)" if math.isnan(total) else "infinite"
        if total == -math.inf:
            weights = "all zero"
        super().__init__(
            f"the particles' weights at step {step} of sequence {sequence} (counted from 0) are "
            f"{weights}; give the guide or the emission a larger scale (min_scale), or check the "
            "data there"
        )
        self.step, self.sequence, self.total = step, sequence, total


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """Log of the mean of exp(values) along ``dim``, stable."""
    return values.logsumexp(dim=dim) - math.log(values.shape[dim])


def wide(values: Tensor) -> Tensor:
    """In float32 at least: sums over a set are too large for half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def effective_sample_size(log_weight: Tensor, dim: int = 0) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 along ``dim``, in [1, K]."""
    return (2 * log_weight.logsumexp(dim=dim) - (2 * log_weight).logsumexp(dim=dim)).exp()


def normalise(log_weight: Tensor, step: int) -> Tensor:
    """Scale the weights of step ``step``, counted from 1, to sum to one; logs, ``(K, B)``.

    Raises:
        DegenerateWeightsError: the weights of a sequence have no finite, positive sum.
    """
    total = log_weight.logsumexp(dim=0)
    require_usable(total.unsqueeze(0), first_step=step)
    return log_weight - total


def require_usable(total: Tensor, first_step: int = 1) -> None:
    """Refuse weights whose sum is zero, infinite or NaN at some step.

    Args:
        total: ``(T, B)``, log of the summed weights up to each step.
        first_step: number of the first of these steps.

    Raises:
        DegenerateWeightsError: for the first such step, and its first such sequence.
    """
    faults = ~total.isfinite()
    if bool(faults.any()):
        t, b = faults.nonzero()[0].tolist()
        raise DegenerateWeightsError(first_step + t, b, float(total[t, b].detach()))


def pareto_k(log_weight: Tensor) -> Tensor:
    """Pareto k-hat of the largest importance weights of each sequence.

    Below 0.5 importance sampling from the guide is reliable, above 0.7 it is not. k-hat cannot
    detect a guide that is too wide, whose weights are bounded. The tail holds
    min(K / 5, 3 sqrt(K)) weights.

    Args:
        log_weight: ``(K, B)``, summed over steps, K at least 25.

    Returns:
        ``(B,)``. NaN where all weights are equal, or most are and the others differ by less than
        a tenth: the guide is exact. Infinity where a few exceed the others by more than floating
        point can represent.

    Raises:
        ValueError: fewer than 25 particles.

    Source: Vehtari et al. (2024), https://arxiv.org/abs/1507.02646.
    """
    num_particles = log_weight.shape[0]
    tail = int(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    if tail < 5:
        raise ValueError(f"k-hat needs num_particles of at least 25, got {num_particles}")
    ordered = log_weight.double().sort(dim=0, descending=True).values
    # weights that differ by round-off alone have no tail
    same = 1e-9 + 8 * torch.finfo(log_weight.dtype).eps * log_weight.abs().amax(dim=0)
    values = []
    for column, round_off in zip((ordered - ordered[0]).unbind(dim=1), same.tolist(), strict=True):
        if float(column[0] - column[-1]) < round_off:
            values.append(math.nan)
            continue
        excess = (column[:tail].exp() - column[tail].exp()).flip(0)
        excess = excess[excess > 0.0]  # without ties at the threshold
        if len(excess) >= 5 and float(excess[int(len(excess) / 4 - 0.5)]) > 1e-30:
            values.append(fit_generalized_pareto(excess)[0])
        else:  # a few weights dominate, or all but a few are equal: no tail to fit
            values.append(math.inf if float(column[0] - column[-1]) > 0.1 else math.nan)
    return torch.tensor(values, device=log_weight.device)
