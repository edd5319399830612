"""Penalties without a critic: distances between draws of prior and proposal themselves.

| distance | estimates | bias | 0 means |
|---|---|---|---|
| mmd | the squared maximum mean discrepancy of a kernel | none; may be below 0 | p = q, for the Gaussian kernel and for inverse multiquadrics |
| sliced_wasserstein | W2 squared, averaged over directions | too high, by some (deviation)^2 / N a direction | p = q |

Both see only differences that are large against their kernel, or along random directions: in many
dimensions they need many draws where a critic needs training. Where a view shows h, prior and
proposal draw given the same h, so that rows of the same frame are left out of the sums.

Sources: Gretton et al. (2012), https://jmlr.org/papers/v13/gretton12a.html, eq. 3, the estimate
without bias, and section 8 for the median; Bonneel et al. (2015),
https://doi.org/10.1007/s10851-014-0506-3, for slices.
"""  # noqa: E501 - table

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.densities import StepDensities
from inference.free_runs import free_run, require_free_runs
from inference.protocols import at_least, counts, given, of_kind, one_of
from inference.roles import VIEWS, View, shown, shown_free
from inference.schedules import Schedule
from inference.schedules import weight as check_weight

#: (codes of the prior, codes of the proposal), rows (N, D) of the same frames -> scalar
Distance = Callable[[Tensor, Tensor], Tensor]


def mmd(kernel: str = "gaussian", bandwidth: float | None = None) -> Distance:
    """Squared maximum mean discrepancy.

    Args:
        kernel: "gaussian", exp(-d^2 / 2 b^2), or "multiquadric", 1 / (1 + d^2 / 2 b^2), whose
            tails reach further.
        bandwidth: b; None for the median distance between rows of both sides, a constant for
            gradients.

    Raises:
        ValueError: an unknown kernel, or a bandwidth that is not positive.
    """
    one_of(KERNELS, kernel=kernel)
    at_least(0.0, **given(bandwidth=bandwidth))
    if bandwidth == 0.0:
        raise ValueError("bandwidth must be positive, got 0")
    shape = KERNELS[kernel]

    def distance(prior: Tensor, proposal: Tensor) -> Tensor:
        _require_rows(prior)
        pp, qq, pq = (
            torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
            for a, b in ((prior, prior), (proposal, proposal), (prior, proposal))
        )
        count = len(prior)
        if bandwidth is None:
            others = ~torch.eye(count, dtype=torch.bool, device=prior.device)
            square = torch.stack([pp, qq, pq])[:, others].detach().median()
            square = square.clamp(min=torch.finfo(pp.dtype).tiny)
        else:
            square = pp.new_tensor(bandwidth**2)
        sums = [
            k.sum() - k.diagonal().sum() for k in (shape(d / (2 * square)) for d in (pp, qq, pq))
        ]
        return (sums[0] + sums[1] - 2 * sums[2]) / (count * (count - 1))

    return distance


def sliced_wasserstein(directions: int = 64) -> Distance:
    """Squared W2 between projections on random directions, averaged.

    Args:
        directions: drawn anew at each call.

    Raises:
        ValueError: fewer than 1.
    """
    counts(1, directions=directions)

    def distance(prior: Tensor, proposal: Tensor) -> Tensor:
        _require_rows(prior)
        drawn = torch.randn(prior.shape[-1], directions, dtype=prior.dtype, device=prior.device)
        unit = drawn / drawn.norm(dim=0)
        p, q = ((rows @ unit).sort(dim=0).values for rows in (prior, proposal))
        return (p - q).square().mean()

    return distance


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda half_square: half_square.neg().exp(),
    "multiquadric": lambda half_square: 1 / (1 + half_square),
}
DISTANCES: dict[str, Callable[..., Distance]] = {
    made.__name__: made for made in (mmd, sliced_wasserstein)
}


class Matching:
    """A penalty of draws alone: it has nothing to train, so no hook goes with it.

    Args:
        distance: ``mmd()``, ``sliced_wasserstein()`` or a function like those.
        view: what is compared, "marginal", "conditional" or "joint", or a function like those of
            :mod:`inference.roles`. Columns of h and x are scaled to a deviation of 1 together,
            so that they weigh as much as one column of z.
        weight: price of a unit of distance in a frame, as for ``Adversarial``.
        standardise: measure codes in units of the prior's deviation.
        free_runs_of: the model, to compare its free runs, as for ``Adversarial``.
        most: frames that are compared, a random choice where there are more; cost and memory of
            ``mmd`` grow with the square.
        name: prefix of its metrics.

    Raises:
        ValueError: a view of paths, or fewer than 2 frames.
    """

    def __init__(
        self,
        distance: Distance,
        *,
        view: str | View = "marginal",
        weight: float | Schedule = 1.0,
        standardise: bool = False,
        free_runs_of: Any = None,
        most: int = 1000,
        name: str = "matching",
    ) -> None:
        of_kind(Callable, "mmd(), sliced_wasserstein() or a function", distance=distance)
        if not callable(view):
            one_of(("marginal", "conditional", "joint"), view=view)
        counts(2, most=most)
        self.view: View = view if callable(view) else VIEWS[view]
        self.distance, self.weight, self.standardise = distance, weight, standardise
        self.most, self.name, self.free_runs_of = most, name, free_runs_of
        if free_runs_of is not None:
            require_free_runs(free_runs_of)
        check_weight(weight, "weight")

    def penalty(self, densities: StepDensities, posterior: Tensor | None = None) -> Tensor:
        """Scalar, differentiable in prior and guide.

        Args:
            densities: of one rollout.
            posterior: the posterior's codes ``(T, K, B, Z)``; the rollout's own z if None.
        """
        proposal = densities.z if posterior is None else posterior
        if self.free_runs_of is None:
            sides = shown(densities, proposal, self.view, self.standardise)
        else:
            run = free_run(self.free_runs_of, densities.mask, proposal.shape[1])
            sides = shown_free(run, densities, proposal, self.view, self.standardise)
        if sides[0].path is not None:
            raise NotImplementedError(
                "a distance of draws compares the codes of one step; use the view marginal, "
                "conditional or joint"
            )
        keep = densities.mask.expand_as(proposal[..., 0])
        rows = [side.z[keep] for side in sides]
        contexts = [
            s.context.expand(*keep.shape, -1)[keep] for s in sides if s.context is not None
        ]
        if contexts:
            scale = contexts[1].std(dim=0).clamp(min=1e-6) * contexts[1].shape[-1] ** 0.5
            both = zip(rows, contexts, strict=True)
            rows = [torch.cat([z, context / scale], dim=-1) for z, context in both]
        if len(rows[0]) > self.most:
            index = torch.randperm(len(rows[0]), device=rows[0].device)[: self.most]
            rows = [z[index] for z in rows]
        return self.distance(*rows)


def _require_rows(rows: Tensor) -> None:
    if len(rows) < 2:
        raise ValueError(
            f"a batch must observe at least 2 frames whose codes can be compared, got {len(rows)}"
        )
