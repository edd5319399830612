"""Raising what a latent of the whole sequence knows: I(x; f), without a critic.

A decoder that can do without f leaves it unused. Three remedies:

* ``ELBO(kl_f_weight=0.1)``: the KL of f, which is I(x; f) + KL(q(f), p(f)), weighs less. A price
  on the second part goes with it, :class:`GlobalMatching`.
* ``GlobalInformation("infonce")``: a bonus for a lower bound of I(x; f), at most log B. It needs
  no critic, as the density of the guide itself is the best one.
* ``GlobalInformation("free_bits", free_bits=8.0)``: so many nats of the KL of f, averaged over
  the batch, cost nothing.

Raising I(x; f) says nothing of what f knows: it may be what z knows already. A critic of role
"information" lowers I(f; z). An image of a model without f, a PixelCNN-VAE's, has its latent of
one step in place of f.

Sources: Zhao et al. (2017), https://arxiv.org/abs/1706.02262 (InfoVAE), for a smaller weight
with a match of the aggregate; Poole et al. (2019), https://arxiv.org/abs/1905.06922, eq. 13, for
InfoNCE where the conditional density is known; Kingma et al. (2016),
https://arxiv.org/abs/1606.04934, eq. 15, for free bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from inference.densities import StepDensities
from inference.matching import Distance
from inference.mutual_information import infonce, scores_of_pairs
from inference.protocols import at_least, given, of_kind, one_of
from inference.schedules import Schedule
from inference.schedules import weight as check_weight


class GlobalLatent(NamedTuple):
    """The latent of whole sequences, with its densities ``(K, B)``."""

    draws: Tensor  # (K, B, F)
    log_prior: Tensor
    log_proposal: Tensor
    prior: Distribution
    proposal: Distribution


def global_latent(densities: StepDensities) -> GlobalLatent:
    """f, or the latent of a sequence of one step.

    Raises:
        NotImplementedError: densities of neither.
    """
    f, p, q = densities.f, densities.prior_f, densities.proposal_f
    if f is not None and p is not None and q is not None:
        return GlobalLatent(f, p.log_prob(f), q.log_prob(f), p, q)
    p, q = densities.prior, densities.proposal
    if len(densities.z) != 1 or p is None or q is None:
        raise NotImplementedError(
            "information of a global latent needs a model with a latent f that all steps share, "
            "such as a DSAE, or images as sequences of one step, and whole sequences (no truncate)"
        )
    return GlobalLatent(densities.z[0], densities.log_prior[0], densities.log_proposal[0], p, q)


def per_frame(nats: Tensor, densities: StepDensities) -> Tensor:
    """Nats of a sequence as a price a frame, as objectives multiply it by the frames."""
    return nats * densities.mask.shape[-1] / densities.mask.sum()


class GlobalInformation:
    """A bonus for I(x; f), as a penalty below 0.

    Args:
        by: "infonce" or "free_bits", see the module.
        weight: alpha, a number or a schedule: nats of the bound that a nat of it is worth.
        free_bits: nats a sequence that cost nothing, by "free_bits" alone.
        name: prefix of its metrics.

    Raises:
        ValueError: an unknown estimate, a weight below 0, or free bits without their name.
    """

    def __init__(
        self,
        by: str = "infonce",
        *,
        weight: float | Schedule = 1.0,
        free_bits: float | None = None,
        name: str = "global_information",
    ) -> None:
        one_of(BONUSES, by=by)
        check_weight(weight, "weight")
        at_least(0.0, " nats a sequence", **given(free_bits=free_bits))
        if (by == "free_bits") != (free_bits is not None):
            raise ValueError(
                f"free_bits goes with by='free_bits' and with nothing else, got by={by!r} and "
                f"free_bits={free_bits}"
            )
        self.by, self.weight, self.free_bits, self.name = by, weight, free_bits or 0.0, name

    def information(self, densities: StepDensities) -> Tensor:
        """The bonus, nats a sequence.

        Raises:
            NotImplementedError: a model without a latent of whole sequences.
            ValueError: by "infonce", a batch of one sequence.
        """
        return BONUSES[self.by](self, global_latent(densities))

    def penalty(self, densities: StepDensities) -> Tensor:
        """Minus the bonus, a frame."""
        return -per_frame(self.information(densities), densities)

    def _free(self, latent: GlobalLatent) -> Tensor:
        kl = (latent.log_proposal - latent.log_prior).mean()
        return (kl - self.free_bits).clamp(max=0.0)  # KL - max(KL, free_bits)

    def _infonce(self, latent: GlobalLatent) -> Tensor:
        scores = densities_of_pairs(latent.draws, latent.proposal)
        kept = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
        return infonce().penalty(*scores_of_pairs(scores, kept))


#: nats a sequence, by name
BONUSES: dict[str, Callable[[GlobalInformation, GlobalLatent], Tensor]] = {
    "infonce": GlobalInformation._infonce,
    "free_bits": GlobalInformation._free,
}


def densities_of_pairs(draws: Tensor, proposal: Distribution) -> Tensor:
    """log q(f_i given x_j), ``(K, B, B)``, f of the row and x of the column.

    Args:
        draws: ``(K, B, F)``.
        proposal: of batch shape ``(B,)`` or ``(1, K, B)``.
    """
    if len(proposal.batch_shape) == 1:
        found: Tensor = proposal.log_prob(draws.unsqueeze(-2))
        return found
    rows = draws.movedim(1, 0)[:, None, :, None]  # (B, 1, K, 1, F)
    found = proposal.log_prob(rows)  # (B, 1, K, B)
    return found[:, 0].movedim(0, 1)


class GlobalMatching:
    """A price on the distance between the aggregate q(f) and the prior p(f), by draws.

    Args:
        distance: ``mmd()``, ``sliced_wasserstein()`` or a function like those.
        weight: price of a unit of distance, nats a sequence, a number or a schedule.
        name: prefix of its metrics.
    """

    def __init__(
        self,
        distance: Distance,
        *,
        weight: float | Schedule = 1.0,
        name: str = "global_matching",
    ) -> None:
        of_kind(Callable, "mmd(), sliced_wasserstein() or a function", distance=distance)
        check_weight(weight, "weight")
        self.distance, self.weight, self.name = distance, weight, name

    def penalty(self, densities: StepDensities) -> Tensor:
        """The distance between the batch's draws and as many of the prior, a frame."""
        latent = global_latent(densities)
        prior = latent.prior.rsample(latent.draws.shape[:1])
        prior = prior.reshape(-1, latent.draws.shape[-1])[: latent.draws.shape[:-1].numel()]
        return per_frame(self.distance(prior, latent.draws.flatten(0, 1)), densities)
