"""Resampling: when to resample particles, which of them go on, and a record of both."""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Size, Tensor

from inference.bounds import stretches, temper
from inference.protocols import of_kind, said
from inference.weights import normalise

#: normalised log-weights ``(K, B)`` -> bool ``(B,)``: whether to resample
Criterion = Callable[[Tensor], Tensor]
#: normalised log-weights ``(K, B)`` -> indices ``(K, B)`` of the particles that go on
Resampler = Callable[[Tensor], Tensor]


def never(log_weight: Tensor) -> Tensor:
    """Never resample: the filter is importance sampling, and consumes no further randomness."""
    return log_weight.new_zeros(log_weight.shape[1:], dtype=torch.bool)


def always(log_weight: Tensor) -> Tensor:
    """Resample after every step."""
    return log_weight.new_ones(log_weight.shape[1:], dtype=torch.bool)


def ess_below(fraction: float = 0.5) -> Criterion:
    """Resample where the effective sample size is below ``fraction`` of the particles.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    of_kind(Real, "a number", fraction=fraction)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")

    def criterion(log_weight: Tensor) -> Tensor:
        # of normalised weights the effective sample size is 1 / sum w^2
        return (2 * log_weight).logsumexp(dim=0).neg().exp() < fraction * log_weight.shape[0]

    return criterion


def multinomial(log_weight: Tensor) -> Tensor:
    """Draw each particle independently."""
    return _invert(log_weight, torch.rand_like(log_weight))


def stratified(log_weight: Tensor) -> Tensor:
    """Take one draw in each of K equal parts of the unit interval."""
    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight)))


def systematic(log_weight: Tensor) -> Tensor:
    """Take one draw, and K points at equal distances from it."""
    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight[:1])))


def residual(log_weight: Tensor) -> Tensor:
    """Copy each particle as often as K times its weight, rounded down; draw the rest.

    The rest is drawn independently, in proportion to what rounding has left.
    """
    expected = len(log_weight) * log_weight.detach().exp()
    copies = expected.floor()
    ends = copies.cumsum(dim=0)  # (K, B), where the copies of each particle end
    place = identity(log_weight)
    sure = torch.searchsorted(ends.t().contiguous(), place.t().to(ends).contiguous(), right=True)
    rest = expected - copies
    rest = torch.where(rest.sum(dim=0) > 0, rest, expected)  # if nothing is left, none is drawn
    drawn = multinomial(rest.log())
    return torch.where(place < ends[-1], sure.t().clamp(max=len(log_weight) - 1), drawn)


CRITERIA: dict[str, Criterion] = {"never": never, "always": always, "ess": ess_below(0.5)}
RESAMPLERS: dict[str, Resampler] = {
    f.__name__: f for f in (multinomial, stratified, systematic, residual)
}


def identity(log_weight: Tensor) -> Tensor:
    """Indices ``(K, B)`` that keep every particle."""
    particles = torch.arange(len(log_weight), device=log_weight.device)
    return particles.unsqueeze(1).expand(log_weight.shape)


def _grid(log_weight: Tensor, uniform: Tensor) -> Tensor:
    return (identity(log_weight) + uniform) / len(log_weight)


def _invert(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Particles at these points of the cumulative weights, never one of weight zero."""
    cumulative = log_weight.detach().exp().cumsum(dim=0).t().contiguous()
    cumulative = cumulative / cumulative[:, -1:]
    points = uniform.clamp(max=1.0 - torch.finfo(uniform.dtype).eps).t().contiguous()
    return torch.searchsorted(cumulative, points, right=True).t()


Choice = TypeVar("Choice", bound=Callable[..., Any])


def pick(argument: str, value: str | Choice, known: Mapping[str, Choice]) -> Choice:
    """Look up a function by its name, or return the function given.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if callable(value):
        return value
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{argument} must be one of {', '.join(known)}, or a function, got {value!r}"
        )
    return known[value]


class Selection:
    """A rollout's ``select``: decides after each step which particles go on, and records it.

    Args:
        resampler: a name of ``RESAMPLERS`` or a function like those.
        criterion: a name of ``CRITERIA`` or a function like those.
        mask: ``(B, T)`` bool, or None if every step is observed. A sequence that has ended is
            not resampled any more.
        kl_weight: exponent of p(z_t) / q(z_t) in the weights that decide.

    Attributes:
        resampled: for every step but the last, where particles were resampled after it, ``(B,)``.
        parents: for every such step indices ``(K, B)``, or None where no sequence resampled.
    """

    def __init__(
        self,
        resampler: str | Resampler,
        criterion: str | Criterion,
        mask: Tensor | None = None,
        kl_weight: float = 1.0,
    ) -> None:
        self.resampler = pick("resampler", resampler, RESAMPLERS)
        self.criterion = pick("criterion", criterion, CRITERIA)
        self.mask, self.kl_weight = mask, kl_weight
        self.resampled: list[Tensor] = []
        self.parents: list[Tensor | None] = []
        self._log_weight: Tensor | float = 0.0

    def __call__(
        self, t: int, log_prior: Tensor, log_emission: Tensor, log_proposal: Tensor
    ) -> Tensor | None:
        """Return the particles that go on from step t, counted from 0; None for all."""
        log_weight = temper(log_prior, log_emission, log_proposal, self.kl_weight)
        log_weight = self._log_weight + log_weight
        normal = normalise(log_weight, t + 1)
        due, parents = self.decide(normal, t)
        if parents is not None:
            fresh = fresh_weights(self.resampler, normal, parents)
            log_weight = torch.where(due, fresh, log_weight)
        self._log_weight = log_weight
        self.resampled.append(due)
        self.parents.append(parents)
        return parents

    def events(self, log_weight: Tensor) -> Tensor:
        """Times of resampling, ``(T - 1, B)`` bool, for log-weights (T, K, B)."""
        if self.resampled:
            return torch.stack(self.resampled)
        return log_weight.new_zeros(0, log_weight.shape[-1], dtype=torch.bool)

    def weighed(self, log_weight: Tensor) -> Tensor:
        """Log-weights ``(T, K, B)``, where particles enter a stretch with those they were given.

        A resampler may give weights that are not 1, or have a gradient: see
        :mod:`inference.differentiable`.
        """
        if not hasattr(self.resampler, "fresh"):
            return log_weight
        rows, since = [log_weight[0]], log_weight[0]
        for t, (due, parents) in enumerate(zip(self.resampled, self.parents, strict=True)):
            row = log_weight[t + 1]
            if parents is not None:
                fresh = fresh_weights(self.resampler, normalise(since, t + 1), parents)
                row = row + torch.where(due, fresh, 0.0)
            since = torch.where(due, 0.0, since) + row
            rows.append(row)
        return torch.stack(rows)

    def last_stretch(self, log_weight: Tensor) -> Tensor:
        """Normalised log-weights ``(K, B)`` since each sequence's last resampling.

        Raises:
            DegenerateWeightsError: all of a sequence are zero, or one is not a number.
        """
        resampled = self.events(log_weight)
        sums, last = stretches(log_weight, resampled), resampled.sum(dim=0)
        columns = torch.arange(len(last), device=last.device)
        return normalise(sums[last, :, columns].t(), len(log_weight))

    def due(self, log_weight: Tensor, t: int) -> Tensor:
        """Where to resample after step t, ``(B,)`` bool, by normalised log-weights."""
        due = self.criterion(log_weight)
        _require(due, torch.bool, log_weight.shape[1:], "criterion", "bool (B,)")
        return due if self.mask is None else due & self.mask[:, t + 1]

    def decide(self, log_weight: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """Decide where to resample, ``(B,)``, by normalised log-weights; give parents if any."""
        due = self.due(log_weight, t)
        if not bool(due.any()):
            return due, None
        drawn = self.resampler(log_weight)
        _require(drawn, torch.int64, log_weight.shape, "resampler", "indices (K, B), int64")
        if bool(((drawn < 0) | (drawn >= len(log_weight))).any()):
            raise ValueError(
                f"resampler must give indices from 0 to {len(log_weight) - 1}, got others"
            )
        return due, torch.where(due, drawn, identity(log_weight))


def fresh_weights(resampler: Any, log_weight: Tensor, parents: Tensor) -> Tensor:
    """Log-weights ``(K, B)`` of resampled particles, given those they were chosen by."""
    if not hasattr(resampler, "fresh"):
        return torch.zeros_like(log_weight)
    found: Tensor = resampler.fresh(log_weight, parents)
    _require(found, log_weight.dtype, log_weight.shape, "resampler.fresh", "log-weights (K, B)")
    return found


def _require(found: Any, dtype: torch.dtype, shape: Size, what: str, expected: str) -> None:
    """Refuse the result of a user's criterion or resampler if it has another type or shape."""
    tensor = isinstance(found, Tensor)
    if not tensor or found.dtype != dtype or found.shape != shape:
        got = f"{found.dtype} {tuple(found.shape)}" if tensor else said(found)
        raise TypeError(f"{what} must give {expected}, here of shape {tuple(shape)}, got {got}")
