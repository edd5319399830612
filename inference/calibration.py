"""Simulation-based calibration: does a guide draw from the exact posterior, on average over data?

Draw (z*, x) from the model, then K latents from the guide given x. If the guide is the exact
posterior, z* is one more draw like these K, so the rank of any quantity of z* among theirs is
uniform on 0, 1, ..., K. Ranks pile up at both ends if the guide is too narrow, in the middle if
it is too wide, and at one end if it is biased.

Ranks of latents alone cannot tell the posterior from the prior, nor detect every correlation, so
the joint density log p(x, z) is always ranked too. The test averages over data that the model
draws: a calibrated guide can still ignore part of x, or fail on data unlike the model's.

Sources: Talts et al. (2018), https://arxiv.org/abs/1804.06788, theorem 1 and algorithm 1; Modrák
et al. (2023), https://arxiv.org/abs/2211.02383, for quantities such as log p(x, z).
"""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from inference.densities import check_mask, require_steps
from inference.modes import evaluating
from inference.protocols import (
    Program,
    counts,
    given,
    of_kind,
    require_finite,
    require_programs,
)
from inference.random import seeded
from inference.traces import Columns, sample_sites, step_densities, unscale

#: (z ``(T, K, B, Z)``, x ``(B, T, X)``, mask ``(B, T)``) -> named numbers ``(K, B)``
Quantities = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]

_LEAST = 5  # smallest expected count of a bin for which the chi-square approximation is good


class Calibration(NamedTuple):
    """Ranks of N simulations in Q quantities, with a chi-square test of their uniformity.

    The test counts ranks in equal bins; under an exact guide its p-values are uniform on (0, 1).
    """

    ranks: Tensor  # (N, Q) int64, in 0..K
    names: tuple[str, ...]  # Q
    num_draws: int  # K
    num_bins: int  # divides K + 1

    def pit(self) -> Tensor:
        """Ranks as numbers in (0, 1), ``(N, Q)`` float64: the middles of K + 1 equal parts."""
        return (self.ranks.double() + 0.5) / (self.num_draws + 1)

    def histogram(self) -> Tensor:
        """Counts of the ranks in each bin, ``(Q, num_bins)`` int64."""
        _check_bins(len(self.ranks), self.num_draws, self.num_bins)
        bins = self.ranks * self.num_bins // (self.num_draws + 1)
        counts = bins.new_zeros(bins.shape[1], self.num_bins)
        return counts.scatter_add(1, bins.t(), torch.ones_like(bins.t()))

    @property
    def p_values(self) -> Tensor:
        """p-value of each quantity by Pearson's chi-square test, ``(Q,)`` float64."""
        counts = self.histogram().double()
        expected = len(self.ranks) / self.num_bins
        statistic = ((counts - expected).square() / expected).sum(dim=1)
        half = torch.full_like(statistic, 0.5 * (self.num_bins - 1))
        return torch.special.gammaincc(half, 0.5 * statistic)

    def uniform(self, level: float = 0.05) -> bool:
        """Test all quantities together; True if their ranks are consistent with uniform ones.

        An exact guide fails with a probability of at most ``level``, however the quantities
        depend on each other: each is tested at level / Q (Bonferroni).

        Raises:
            ValueError: a level outside (0, 1).
        """
        of_kind(Real, "a number", level=level)
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level}")
        return bool((self.p_values >= level / len(self.names)).all())


def latent_summaries(z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Latent dimensions at the first and last step and averaged over steps, ``(K, B)`` each.

    Args:
        z: ``(T, K, B, Z)``; if T is 1, the first step is all there is.
        x: ``(B, T, X)``, not read.
        mask: ``(B, T)`` bool, a prefix, at least one step of each sequence observed.
    """
    parts = {"first": z[0]}
    if len(z) > 1:
        length = mask.sum(dim=1)
        last = (length - 1).view(1, 1, -1, 1).expand(1, *z.shape[1:])
        total = torch.where(mask.t()[:, None, :, None], z, 0.0).sum(dim=0)
        parts |= {"last": z.gather(0, last)[0], "mean": total / length[:, None]}
    return {f"z[{i}] {name}": v[..., i] for i in range(z.shape[-1]) for name, v in parts.items()}


@torch.no_grad()
def calibrate(
    model: Program,
    guide: Program,
    mask: Tensor,
    *,
    num_simulations: int = 1000,
    num_draws: int = 99,
    quantities: Quantities | None = None,
    num_bins: int = 20,
    batch_size: int = 100,
    seed: int | None = 0,
    progress: bool = False,
) -> Calibration:
    """Rank latents that the model draws among latents that the guide draws, given the same x.

    Args:
        model: a Pyro program that draws and returns x ``(B, T, X)`` as ``model(None, mask)``, and
            scores it as ``model(x, mask)``; runs in evaluation mode, as the guide does.
        guide: its guide, as :func:`~inference.traces.step_densities` takes it.
        mask: ``(B, T)`` bool, lengths of the simulated sequences: simulation i takes row i mod B.
        num_simulations: N, at least 5 for each bin. A few hundred detect an error of a third in
            a posterior's deviation; an error of a tenth takes several thousand.
        num_draws: K; K + 1 must be divisible by ``num_bins``.
        quantities: what to rank in addition to log p(x, z), by default :func:`latent_summaries`;
            equal values, such as those of a discrete quantity, are ranked in random order.
        num_bins: bins of the histogram that is tested.
        batch_size: simulations at a time; it changes the draws.
        seed: seed of all draws; None leaves torch's global state in charge.
        progress: whether to show a bar.

    Raises:
        ValueError: a mask of another shape or with an empty sequence, numbers that do not fit
            each other, a model without latents, or a quantity of another shape or with NaN.
        TypeError: a mask that is not bool, or a model that does not return x.
        NotImplementedError: programs that ``step_densities`` cannot run, or a latent that all
            steps share.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x, mask):
        ...     with pyro.plate("sequences", len(mask)):
        ...         z = pyro.sample("z_1", dist.Normal(0.0, 1.0))
        ...         obs = None if x is None else x[:, 0, 0]
        ...         return pyro.sample("x_1", dist.Normal(z, 1.0), obs=obs)[:, None, None]
        >>> def guide(x, mask):
        ...     with pyro.plate("sequences", len(mask)):
        ...         pyro.sample("z_1", dist.Normal(x[:, 0, 0] / 2, 0.5**0.5))
        >>> result = calibrate(model, guide, torch.ones(1, 1, dtype=torch.bool))
        >>> result.names, result.uniform()
        (('z[0] first', 'log p(x, z)'), True)
    """
    require_programs(model, guide)
    require_finite(model=model, guide=guide)
    require_steps(check_mask(mask))
    of_kind(Callable, "a function of z, x and mask", **given(quantities=quantities))
    _check_bins(num_simulations, num_draws, num_bins)
    counts(1, batch_size=batch_size)
    quantities = quantities or latent_summaries
    if f_dim := getattr(model, "f_dim", 0):
        raise NotImplementedError(
            f"calibrate ranks the latents of steps; a latent that all steps share (f_dim {f_dim}) "
            "is not among them, so use a model without one"
        )
    rows = torch.arange(num_simulations, device=mask.device) % len(mask)
    store = pyro.get_param_store()
    bar = tqdm(total=num_simulations, desc="calibrate", leave=False, disable=not progress)
    found: list[dict[str, Tensor]] = []
    # the scope discards what the programs register
    with evaluating(model, guide), seeded(seed), store.scope(store.get_state()), bar:
        for chosen in rows.split(batch_size):
            found.append(_ranks(model, guide, mask[chosen], num_draws, quantities))
            bar.update(len(chosen))
    names = tuple(found[0])
    ranks = torch.stack([torch.cat([batch[name] for batch in found]) for name in names], dim=1)
    return Calibration(ranks, names, num_draws, num_bins)


def _ranks(
    model: Program, guide: Program, mask: Tensor, num_draws: int, quantities: Quantities
) -> dict[str, Tensor]:
    """Ranks (B,) of every quantity, for one batch of simulations."""
    x, truth, truth_joint = _simulate(model, mask)
    d = step_densities(model, guide, x, mask, num_particles=num_draws)
    shape = (len(truth), num_draws, *truth.shape[2:])
    if d.z.shape != shape:
        raise ValueError(
            f"guide must draw latents of shape (T, K, B, Z) = {shape} as the model does, got "
            f"{tuple(d.z.shape)}"
        )
    joint = "log p(x, z)"
    own = quantities(d.z, x, mask)
    of_kind(Mapping, "a dict of tensors (K, B)", **{"what quantities gives": own})
    if joint in own:
        raise ValueError(f"quantities must not be named {joint!r}, which is ranked anyway")
    drawn = {**own, joint: (d.log_prior + d.log_emission).sum(dim=0)}
    true = {**quantities(truth, x, mask), joint: truth_joint}
    return {name: _rank(name, true[name], drawn[name], num_draws) for name in drawn}


def _simulate(model: Program, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x ``(B, T, X)``, z ``(T, 1, B, Z)`` and log p(x, z) ``(1, B)``, drawn from the model."""
    trace = poutine.trace(model).get_trace(None, mask)
    x = trace.nodes["_RETURN"]["value"]
    if not isinstance(x, Tensor):
        raise TypeError(
            f"model must return the x (B, T, X) it draws without data, got {type(x).__name__}"
        )
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ValueError(
            f"model must return x of shape (B, T, X) = ({len(mask)}, {mask.shape[1]}, X) when "
            f"called with None and the mask, got {tuple(x.shape)}"
        )
    trace.compute_log_prob()
    sites = sample_sites(trace)
    unscale(sites)
    scored = poutine.trace(model).get_trace(x, mask).nodes  # tells latents from observations
    latents = [name for name in sites if not scored[name]["is_observed"]]
    zeros = x.new_zeros(len(mask))
    z = Columns(sites, latents, zeros).values()
    if not z.shape[-1]:
        raise ValueError("model must have latents to be ranked, but it has no z sites")
    return x, z.unsqueeze(1), Columns(sites, sites, zeros).joint_log_prob().unsqueeze(0)


def _rank(name: str, truth: Tensor, drawn: Tensor, num_draws: int) -> Tensor:
    """Number of draws below the truth, ``(B,)``, equal ones in random order."""
    for values, count in ((truth, 1), (drawn, num_draws)):
        if values.shape != (count, truth.shape[-1]):
            raise ValueError(
                f"quantities must give {name!r} with shape (K, B) = {(count, truth.shape[-1])}, "
                f"got {tuple(values.shape)}"
            )
        if bool(torch.isnan(values).any()):
            raise ValueError(f"quantities must be numbers, but {name!r} holds NaN")
    equal = (drawn == truth).sum(dim=0)
    shuffled = torch.rand(equal.shape, device=equal.device) * (equal + 1)
    return (drawn < truth).sum(dim=0) + shuffled.long().minimum(equal)


def _check_bins(num_simulations: int, num_draws: int, num_bins: int) -> None:
    """Refuse bins of unequal size, or with too few simulations for the test."""
    counts(2, num_bins=num_bins)
    counts(0, num_draws=num_draws, num_simulations=num_simulations)
    if num_draws < 1 or (num_draws + 1) % num_bins:
        fitting = num_bins * max(1, round((num_draws + 1) / num_bins)) - 1
        raise ValueError(
            f"num_draws must be a multiple of num_bins = {num_bins}, less 1, so that all bins "
            f"are equal, got {num_draws}; use num_draws={fitting}, or other bins"
        )
    if num_simulations < _LEAST * num_bins:
        raise ValueError(
            f"num_simulations must be at least {_LEAST * num_bins} for {num_bins} bins, "
            f"{_LEAST} each, got {num_simulations}; use more simulations, or fewer bins"
        )
