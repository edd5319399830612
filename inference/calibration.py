"""Simulation-based calibration: are a guide's draws those of the exact posterior, on average?

Draw (z*, x) from the model, then K latents from the guide given x. If the guide is the exact
posterior, z* is one more draw like these K, so the rank of any quantity of z* among theirs is
uniform on 0, 1, ..., K. A guide that is too narrow puts z* outside too often (ranks pile up at
both ends), one that is too wide in the middle, and a biased one at one end.

Ranks of latents alone cannot tell the posterior from the prior, nor see all correlations; the
joint density log p(x, z), a quantity that depends on the data, is therefore always ranked too.
All this is about data that the model draws, and about averages over them: a guide can be
calibrated and still waste what x says, or fail on data unlike the model's.

Sources: Talts et al. (2018), https://arxiv.org/abs/1804.06788, theorem 1 and algorithm 1; Modrák
et al. (2023), https://arxiv.org/abs/2211.02383, for quantities that depend on the data.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from inference.densities import check_mask
from inference.modes import evaluating
from inference.protocols import require_counts
from inference.random import seeded
from inference.traces import sample_sites, step_densities, time_index

#: (z ``(T, K, B, Z)``, x ``(B, T, X)``, mask ``(B, T)``) -> named numbers ``(K, B)``
Quantities = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]

_LEAST = 5  # expected count of a bin from which the chi-square distribution is a fair one


class Calibration(NamedTuple):
    """Ranks of N simulations in Q quantities, and what a chi-square test says of them.

    The test counts ranks in equal bins; of an exact guide its p-values are uniform on (0, 1).
    """

    ranks: Tensor  # (N, Q) int64, in 0..K
    names: tuple[str, ...]  # Q
    num_draws: int  # K
    num_bins: int  # divides K + 1

    def pit(self) -> Tensor:
        """Ranks as numbers in (0, 1), ``(N, Q)`` float64: the middles of K + 1 equal parts."""
        return (self.ranks.double() + 0.5) / (self.num_draws + 1)

    def histogram(self) -> Tensor:
        """How many ranks fell into each bin, ``(Q, num_bins)`` int64."""
        _check_bins(len(self.ranks), self.num_draws, self.num_bins)
        bins = self.ranks * self.num_bins // (self.num_draws + 1)
        counts = bins.new_zeros(bins.shape[1], self.num_bins)
        return counts.scatter_add(1, bins.t(), torch.ones_like(bins.t()))

    @property
    def p_values(self) -> Tensor:
        """Of each quantity, by Pearson's chi-square test of uniform ranks, ``(Q,)`` float64."""
        counts = self.histogram().double()
        expected = len(self.ranks) / self.num_bins
        statistic = ((counts - expected).square() / expected).sum(dim=1)
        half = torch.full_like(statistic, 0.5 * (self.num_bins - 1))
        return torch.special.gammaincc(half, 0.5 * statistic)

    def uniform(self, level: float = 0.05) -> bool:
        """Whether no quantity speaks against uniform ranks.

        An exact guide is turned down with a probability of at most ``level``, however many
        quantities there are and however they depend on each other: each is tested at level / Q
        (Bonferroni).

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be in (0, 1), got {level}")
        return bool((self.p_values >= level / len(self.names)).all())


def latent_summaries(z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Every latent dimension at the first and the last observed step, and averaged over them.

    Args:
        z: ``(T, K, B, Z)``.
        x: ``(B, T, X)``, not read.
        mask: ``(B, T)`` bool, at least one step of each sequence observed.

    Returns:
        ``(K, B)`` each; the first step alone where T is 1.
    """
    observed = mask.t()  # (T, B)
    steps = torch.arange(len(z), device=z.device).unsqueeze(1)
    first = torch.where(observed, steps, len(z)).amin(dim=0)
    last = torch.where(observed, steps, -1).amax(dim=0)

    def at(step: Tensor) -> Tensor:
        return z.gather(0, step.view(1, 1, -1, 1).expand(1, *z.shape[1:]))[0]

    parts = {"first": at(first)}
    if len(z) > 1:
        total = torch.where(observed[:, None, :, None], z, 0.0).sum(dim=0)
        parts |= {"last": at(last), "mean": total / observed.sum(dim=0)[:, None]}
    return {f"z[{i}] {name}": v[..., i] for i in range(z.shape[-1]) for name, v in parts.items()}


@torch.no_grad()
def calibrate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
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

    Both run in evaluation mode, without gradients.

    Args:
        model: a Pyro program that draws x ``(B, T, X)`` and returns it when called as
            ``model(None, mask)``, and scores it as ``model(x, mask)``.
        guide: its guide; latents are drawn as :func:`~inference.traces.step_densities` does.
        mask: ``(B, T)`` bool, the lengths of the simulated sequences: simulation i has those of
            row i modulo B, so one row will do where all are of one length.
        num_simulations: N, at least 5 for each bin. An error of a tenth in a posterior's
            deviation takes several thousand to be seen, one of a third a few hundred.
        num_draws: K, ranks being in 0..K; K + 1 must be divisible by ``num_bins``.
        quantities: what is ranked beside log p(x, z); see :data:`Quantities`. Default:
            :func:`latent_summaries`. Equal values, as those of a discrete quantity, are
            ranked in random order.
        num_bins: of the histogram that is tested.
        batch_size: simulations at a time, each with K draws; it changes the draws.
        seed: of all draws; None leaves torch's global state in charge.
        progress: whether to show a bar.

    Raises:
        ValueError: a mask of another shape or with an empty sequence, numbers of simulations,
            draws and bins that do not fit each other, a model without latents, or a quantity
            of another shape or that is not a number.
        TypeError: a mask that is not bool, or a model that does not return x.
        NotImplementedError: programs that ``step_densities`` cannot run.

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
    empty = ~check_mask(mask).any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            "mask must observe a step of every sequence, but sequence "
            f"{int(empty.nonzero()[0])} (counted from 0) has none; leave it out"
        )
    _check_bins(num_simulations, num_draws, num_bins)
    require_counts(batch_size=batch_size)
    quantities = latent_summaries if quantities is None else quantities
    rows = torch.arange(num_simulations, device=mask.device) % len(mask)
    store = pyro.get_param_store()
    bar = tqdm(total=num_simulations, desc="calibrate", leave=False, disable=not progress)
    found: list[dict[str, Tensor]] = []
    if getattr(model, "f_dim", 0):
        raise NotImplementedError(
            f"calibrate ranks the latents of steps; a latent that all steps share (f_dim "
            f"{model.f_dim}) is not among them, so use a model without one"  # type: ignore[attr-defined]
        )
    # what the programs register here is not to stay
    with evaluating(model, guide), seeded(seed), store.scope(store.get_state()), bar:
        for chosen in rows.split(batch_size):
            found.append(_ranks(model, guide, mask[chosen], num_draws, quantities))
            bar.update(len(chosen))
    names = tuple(found[0])
    ranks = torch.stack([torch.cat([batch[name] for batch in found]) for name in names], dim=1)
    return Calibration(ranks, names, num_draws, num_bins)


def _ranks(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    mask: Tensor,
    num_draws: int,
    quantities: Quantities,
) -> dict[str, Tensor]:
    """Ranks (B,) of every quantity, for one batch of simulations."""
    x, truth, truth_joint = _simulate(model, mask)
    d = step_densities(model, guide, x, mask, num_particles=num_draws)
    if d.z.shape != (len(truth), num_draws, *truth.shape[2:]):
        raise ValueError(
            f"guide must draw latents of shape (T, K, B, Z) = "
            f"{(len(truth), num_draws, *truth.shape[2:])} as the model does, got "
            f"{tuple(d.z.shape)}"
        )
    drawn = dict(quantities(d.z, x, mask))
    true = dict(quantities(truth, x, mask))
    drawn["log p(x, z)"] = (d.log_prior + d.log_emission).sum(dim=0)
    true["log p(x, z)"] = truth_joint
    return {name: _rank(name, true[name], drawn[name], num_draws) for name in drawn}


def _simulate(model: Callable[..., Any], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x ``(B, T, X)``, z ``(T, 1, B, Z)`` and log p(x, z) ``(1, B)``, drawn from the model."""
    size = len(mask)
    trace = poutine.trace(model).get_trace(None, mask)
    x = trace.nodes["_RETURN"]["value"]
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise TypeError(f"model must return the x (B, T, X) it draws without data, got {kind}")
    if x.ndim != 3 or x.shape[:2] != mask.shape:
        shape = f"({size}, {mask.shape[1]}, X)"
        raise ValueError(
            f"model must return x of shape (B, T, X) = {shape} when called with None and the "
            f"mask, got {tuple(x.shape)}"
        )
    trace.compute_log_prob()
    scored = poutine.trace(model).get_trace(x, mask)  # tells latents from observations
    columns: dict[int, list[Tensor]] = {}
    joint = x.new_zeros(1, size)
    for name, site in sample_sites(trace).items():
        if site["log_prob"].ndim > 1:
            raise NotImplementedError(
                f"site {name!r} has log-density of shape {tuple(site['log_prob'].shape)}; "
                "calibration needs one plate over the sequences at dimension -1"
            )
        joint = joint + site["log_prob"]
        step = columns.setdefault(time_index(name), [])
        if not scored.nodes[name]["is_observed"]:
            value = site["value"].expand(size, *site["fn"].event_shape)
            step.append(value.reshape(size, -1))
    steps = [
        torch.cat(columns[t], dim=-1) if columns[t] else x.new_zeros(size, 0)
        for t in sorted(columns)
    ]
    widest = max(step.shape[-1] for step in steps)
    if not widest:
        raise ValueError("model must have latents to be ranked, but it has no z sites")
    padded = [torch.nn.functional.pad(s, (0, widest - s.shape[-1])) for s in steps]
    return x, torch.stack(padded).unsqueeze(1), joint


def _rank(name: str, truth: Tensor, drawn: Tensor, num_draws: int) -> Tensor:
    """How many draws are below the truth, ``(B,)``, equal ones in random order."""
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
    """That every bin holds as many ranks as the next, and enough simulations."""
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
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
