"""Distances between prior and proposal: what a critic estimates, and closed forms beside it.

A critic's number is evidence only when calibrated: under weight clipping at 0.01 it reports
about 0.01 for a true distance of 1. ``wasserstein2`` and the KL of normals are exact; the
former bounds the W1 of every one-step view from above.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.protocols import StepDensities


class Codes(NamedTuple):
    """What one side shows a critic: ``critic(*codes)`` gives scores ``(T, K, B)``."""

    z: Tensor  # (T, K, B, Z)
    context: Tensor | None = None  # (T, K, B, C)
    path: Tensor | None = None  # (T, K, B, Z); codes before t are seen at step t


class Constraint(NamedTuple):
    """How a critic is kept Lipschitz."""

    name: str
    check: Callable[[nn.Module], None]  # raises for a critic it does not fit
    cost: Callable[[nn.Module, Codes, Codes, Tensor], Tensor | float]  # added to its loss
    project: Callable[[nn.Module], None]  # after each of its steps


class Divergence(NamedTuple):
    """Losses of (prior scores, posterior scores), each of shape (N,), observed steps only."""

    critic_loss: Callable[[Tensor, Tensor], Tensor]  # what the critic minimises
    penalty: Callable[[Tensor, Tensor], Tensor]  # what prior and guide minimise
    constraint: Constraint


def _nothing(*_: Any) -> None:
    return None


def _free(*_: Any) -> float:
    return 0.0


def clip(bound: float = 0.01) -> Constraint:
    """Weight clipping to [-bound, bound]. Source: Arjovsky et al. (2017), algorithm 1.

    The resulting number has no unit: the Lipschitz constant is whatever the architecture makes
    of the bound.
    """
    if bound <= 0:
        raise ValueError(f"bound must be positive, got {bound}")

    @torch.no_grad()
    def project(critic: nn.Module) -> None:
        for parameter in critic.parameters():
            parameter.clamp_(-bound, bound)

    return Constraint("clip", _nothing, _free, project)


def gradient_penalty(weight: float = 10.0, on: str = "z") -> Constraint:
    """Two-sided penalty ``weight * (slope - 1)^2`` between paired codes.

    Its optimum has slope 1 + W / (2 weight), so it reads a little high, more so for a large
    distance or a small weight. Source: Gulrajani et al. (2017), eq. 3.

    Args:
        weight: of the penalty.
        on: "z" constrains the slope in z alone, for each context; "all" in context and z.
    """
    if on not in ("z", "all"):
        raise ValueError(f"on must be 'z' or 'all', got {on!r}")

    def cost(critic: nn.Module, prior: Codes, posterior: Codes, mask: Tensor) -> Tensor:
        mix = torch.rand_like(prior.z[..., :1])

        def between(a: Tensor, b: Tensor) -> Tensor:
            return (mix * a + (1 - mix) * b).detach()

        inputs = [between(prior.z, posterior.z).requires_grad_()]
        context, path = prior.context, prior.path
        if context is not None:
            context = context.detach()
            if on == "all":
                inputs.append(context.requires_grad_())
        if path is not None and posterior.path is not None:
            path = between(path, posterior.path)
        with torch.enable_grad():
            scores = critic(inputs[0], context, path)
            # z enters the score of its own step alone (the path is another tensor), so the
            # gradient of the sum holds each step's own slope
            slopes = torch.autograd.grad(scores.sum(), inputs, create_graph=True)
            square = torch.cat(slopes, dim=-1).square().sum(dim=-1)
        slope = (square + 1e-12).sqrt()[mask.expand_as(square)]
        return weight * (slope - 1).square().mean()

    return Constraint("gradient_penalty", _nothing, cost, _nothing)


def spectral() -> Constraint:
    """The critic's own spectral normalisation. Source: Miyato et al. (2018)."""

    def check(critic: nn.Module) -> None:
        if getattr(critic, "lipschitz", None) is None:
            raise ValueError(
                "divergence wasserstein(spectral()) needs a critic that is spectrally "
                "normalised: build it with lipschitz='z' or 'all' (feed-forward critics only)"
            )

    return Constraint("spectral", check, _free, _nothing)


def wasserstein(constraint: Constraint | None = None) -> Divergence:
    """Wasserstein-1 distance, by a critic that is high on the prior (eq. 12 of AVRNN).

    Args:
        constraint: ``gradient_penalty()`` by default, ``spectral()`` or ``clip()``.
    """
    return Divergence(
        critic_loss=lambda prior, posterior: posterior.mean() - prior.mean(),
        penalty=lambda prior, posterior: prior.mean() - posterior.mean(),
        constraint=gradient_penalty() if constraint is None else constraint,
    )


def wasserstein2(densities: StepDensities) -> Tensor:
    """W2 between proposal and prior of every step in closed form, ``(T, K, B)``, 0 if padded.

    The square is ||mu_q - mu_p||^2 + ||sigma_q - sigma_p||^2 for diagonal normals.

    Raises:
        NotImplementedError: other families.
    """
    q, p = normal_parameters(densities.proposal), normal_parameters(densities.prior)
    square = sum(((a - b).square().sum(dim=-1) for a, b in zip(q, p, strict=True)))
    return torch.as_tensor(square).sqrt().where(densities.mask, 0.0)


def normal_parameters(distribution: Any) -> tuple[Tensor, Tensor]:
    """Mean and scale ``(*batch, D)`` of a diagonal normal.

    Raises:
        NotImplementedError: another family.
    """
    base = getattr(distribution, "base_dist", distribution)
    if not isinstance(base, torch.distributions.Normal):
        raise NotImplementedError(
            f"a closed form needs diagonal normals, got {type(base).__name__}"
        )
    return base.loc, base.scale
