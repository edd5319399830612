"""Bounds on log p(x_{1:T}), in nats, and the losses for ``pyro.infer.SVI`` made of them.

The functions take log-weights of shape ``(T, K, B)`` and return one bound a sequence. The
classes are callables ``(model, guide, x, mask) -> loss``: the negative objective, summed over
the batch as Pyro's own losses are. What the last call was made of is in ``terms``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.distributions import kl_divergence

from inference.protocols import StepDensities
from inference.schedules import Clock, Schedule
from inference.traces import step_densities
from inference.weights import log_mean_exp


def elbo(log_weight: Tensor) -> Tensor:
    """Evidence lower bound, shape (B,)."""
    return log_weight.sum(dim=0).mean(dim=0)


def iwae(log_weight: Tensor) -> Tensor:
    """Importance-weighted bound, shape (B,). Source: Burda et al. (2016), eq. 8."""
    return log_mean_exp(log_weight.sum(dim=0), dim=0)


def reconstruction(densities: StepDensities) -> Tensor:
    """E_q log p(x | z), shape (B,)."""
    return densities.log_emission.sum(dim=0).mean(dim=0)


def rate(densities: StepDensities, *, analytic: bool = False) -> Tensor:
    """KL(q || p) along the guide's path, shape (B,): sampled, or each step's in closed form.

    Raises:
        NotImplementedError: ``analytic`` for families whose KL has no closed form.
    """
    if not analytic:
        return (densities.log_proposal - densities.log_prior).sum(dim=0).mean(dim=0)
    return analytic_kl(densities).sum(dim=0).mean(dim=0)


def analytic_kl(densities: StepDensities) -> Tensor:
    """KL(q(z_t | ...) || p(z_t | ...)) in closed form, ``(T, K, B)``, 0 where padded.

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
    return kl.where(densities.mask, 0.0)


class Regulariser(Protocol):
    """What an objective adds: a penalty a frame, with a weight. See ``inference.adversarial``."""

    name: str
    weight: float | Schedule

    def penalty(self, densities: StepDensities) -> Tensor:
        """Scalar, averaged over observed frames."""
        ...


@dataclass(kw_only=True)
class ELBO:
    """Negative evidence lower bound summed over the batch: a ``loss`` for ``pyro.infer.SVI``.

    With ``kl_weight`` other than 1 the value is that of the weighted objective,
    ``reconstruction - kl_weight * KL``, and no bound (beta-VAE; KL annealing).

    Args:
        num_particles: K draws a sequence, averaged.
        kl_weight: a number, or a schedule over the run such as ``Ramp(0, 1, over=0.5)``.
        analytic_kl: the closed-form KL of each step instead of the sampled one.
        clock: counts calls with gradients; give its ``total`` if ``fit`` does not train.
    """

    num_particles: int = 1
    kl_weight: float | Schedule = 1.0
    analytic_kl: bool = False
    clock: Clock = field(default_factory=Clock)
    terms: dict[str, Tensor | float] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> Tensor:
        """The loss, nats summed over the batch."""
        densities = step_densities(model, guide, *args, num_particles=self.num_particles)
        loss = self.loss(densities)
        if loss.requires_grad:
            self.clock.calls += 1
        return loss

    def loss(self, densities: StepDensities) -> Tensor:
        """The loss of given densities; leaves its terms, nats a frame, in ``terms``."""
        weight = self.clock.weight(self.kl_weight)
        fit = reconstruction(densities)
        kl = rate(densities, analytic=self.analytic_kl)
        objective = fit - weight * kl if weight else fit  # 0 times an infinite KL is no number
        frames = densities.mask.sum()
        self.terms = {
            "reconstruction": fit.detach().sum() / frames,
            "kl": kl.detach().sum() / frames,
            "elbo": (fit - kl).detach().sum() / frames,
            "kl_weight": weight,
        }
        return -objective.sum()


@dataclass
class RegularisedELBO(ELBO):
    """``reconstruction - kl_weight * KL - sum_i weight_i * penalty_i``, negative, as a loss.

    A penalty is an average over observed frames; it is multiplied by their number, so that a
    weight of 1 prices a unit of distance in a frame at one nat.

    Args:
        regularisers: penalties with their weights, such as ``Adversarial``.
    """

    regularisers: Sequence[Regulariser] = ()

    def loss(self, densities: StepDensities) -> Tensor:
        """The loss of given densities; leaves its terms, nats a frame, in ``terms``."""
        loss = super().loss(densities)
        frames = densities.mask.sum()
        for regulariser in self.regularisers:
            weight = self.clock.weight(regulariser.weight)
            penalty = regulariser.penalty(densities)
            self.terms[f"{regulariser.name}_penalty"] = penalty.detach()
            self.terms[f"{regulariser.name}_weight"] = weight
            loss = loss + weight * frames * penalty
        return loss
