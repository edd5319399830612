"""Estimates of log p(x_{1:T}), in nats, as functions of step densities and log-weights.

Log-weights are ``(T, K, B)``, 0 where padded; an estimate is ``(B,)``, one number per sequence.
In expectation ELBO <= IWAE-K <= log p(x) and FIVO-K <= log p(x). On long series FIVO-K, which
resamples, usually lies above IWAE-K.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from inference.densities import StepDensities
from inference.protocols import said
from inference.weights import log_mean_exp


def per_sequence(values: Tensor) -> Tensor:
    """Sum values ``(T, K, B)`` over steps and average them over particles, ``(B,)``."""
    return values.sum(dim=0).mean(dim=0)


def elbo(log_weight: Tensor) -> Tensor:
    """Evidence lower bound, ``(B,)``."""
    _require_stacked(log_weight)
    return per_sequence(log_weight)


def iwae(log_weight: Tensor) -> Tensor:
    """Importance-weighted bound, ``(B,)``. Source: Burda et al. (2016), eq. 8."""
    _require_stacked(log_weight)
    return log_mean_exp(log_weight.sum(dim=0), dim=0)


def fivo(log_weight: Tensor, resampled: Tensor) -> Tensor:
    """Log-evidence estimate of a particle filter, ``(B,)``.

    Args:
        log_weight: ``(T, K, B)``, each step's own weights, before resampling.
        resampled: ``(T - 1, B)`` bool, whether particles were resampled after a step.

    Source: Maddison et al. (2017), eq. 4 and algorithm 1.
    """
    _require_stacked(log_weight)
    steps, _, size = log_weight.shape
    if not isinstance(resampled, Tensor) or resampled.dtype != torch.bool:
        raise TypeError(f"resampled must be a tensor of dtype bool, got {said(resampled)}")
    if resampled.shape != (steps - 1, size):
        raise ValueError(
            f"resampled must have shape (T - 1, B) = {(steps - 1, size)}, got "
            f"{tuple(resampled.shape)}"
        )
    return log_mean_exp(stretches(log_weight, resampled), dim=1).sum(dim=0)


def evidence_path(log_weight: Tensor, resampled: Tensor) -> Tensor:
    """Log-evidence estimates of the steps up to each one, ``(T, B)``; arguments as for `fivo`."""
    done, summed, rows = log_weight.new_zeros(log_weight.shape[-1]), log_weight[0], []
    for t in range(len(log_weight)):
        rows.append(done + log_mean_exp(summed, dim=0))
        if t + 1 < len(log_weight):
            done = torch.where(resampled[t], rows[-1], done)
            summed = torch.where(resampled[t], 0.0, summed) + log_weight[t + 1]
    return torch.stack(rows)


def _require_stacked(log_weight: Any) -> None:
    if not isinstance(log_weight, Tensor) or log_weight.ndim != 3 or 0 in log_weight.shape:
        shape = tuple(getattr(log_weight, "shape", ())) or type(log_weight).__name__
        raise ValueError(f"log_weight must be a tensor (T, K, B), none of them 0, got {shape}")


def stretches(log_weight: Tensor, resampled: Tensor) -> Tensor:
    """Log-weights summed between resamplings, ``(S, K, B)``; arguments as for :func:`fivo`.

    S is the largest number of stretches of a sequence; where one has fewer, the rest is 0.
    """
    count = torch.nn.functional.pad(resampled.long().cumsum(dim=0), (0, 0, 1, 0))  # (T, B)
    sums = log_weight.new_zeros(int(count.max()) + 1, *log_weight.shape[1:])
    return sums.scatter_add(0, count.unsqueeze(1).expand_as(log_weight), log_weight)


def temper(
    log_prior: Tensor, log_emission: Tensor, log_proposal: Tensor, kl_weight: float
) -> Tensor:
    """Log-weight log p(x | z) + kl_weight * (log p(z) - log q(z)) of given densities."""
    if kl_weight == 1.0:
        return log_prior + log_emission - log_proposal
    if kl_weight == 0.0:  # 0 times an infinite ratio is NaN
        return log_emission
    return log_emission + kl_weight * (log_prior - log_proposal)


def tempered(densities: StepDensities, kl_weight: float) -> Tensor:
    """Log-weights of :func:`temper`, ``(T, K, B)``."""
    terms = densities.log_prior, densities.log_emission, densities.log_proposal
    return temper(*terms, kl_weight) + densities.log_twist


def reconstruction(densities: StepDensities) -> Tensor:
    """E_q log p(x | z), ``(B,)``."""
    return per_sequence(densities.log_emission)


def rate(densities: StepDensities, *, analytic: bool = False) -> Tensor:
    """KL(q || p) along the guide's path, ``(B,)``: sampled, or by :func:`analytic_kl`."""
    if analytic:
        return per_sequence(analytic_kl(densities))
    return per_sequence(densities.log_proposal - densities.log_prior)


def analytic_kl(densities: StepDensities) -> Tensor:
    """KL(q(z_t | ...) || p(z_t | ...)) in closed form, ``(T, K, B)``, 0 where padded.

    The KL of a latent that all steps share is counted with step 1.

    Raises:
        NotImplementedError: families whose KL has no closed form.
    """
    if densities.proposal is None or densities.prior is None:
        raise NotImplementedError(
            "analytic_kl needs a proposal and a prior that are diagonal normals at every step; "
            "use the sampled KL, analytic_kl=False"
        )
    try:
        kl = kl_divergence(densities.proposal, densities.prior)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; use the sampled KL, analytic_kl=False") from error
    if densities.prior_f is not None and densities.proposal_f is not None:
        of_f = kl_divergence(densities.proposal_f, densities.prior_f)
        kl = torch.cat([(kl[0] + of_f).unsqueeze(0), kl[1:]])
    return kl.where(densities.mask, 0.0)
