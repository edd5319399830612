"""What a critic is shown, and ways to keep it Lipschitz in that."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.protocols import at_least


class Codes(NamedTuple):
    """Codes of one side, prior or posterior: ``critic(*codes)`` gives scores ``(T, K, B)``."""

    z: Tensor  # (T, K, B, Z)
    context: Tensor | None = None  # (T, K, B, C)
    path: Tensor | None = None  # (T, K, B, Z); codes before t are seen at step t


class Constraint(NamedTuple):
    """A way to keep a critic Lipschitz."""

    name: str
    #: raises for a critic that it does not fit
    check: Callable[[nn.Module], None] = lambda critic: None
    #: term of the critic's loss, of (critic, prior codes, posterior codes, mask)
    cost: Callable[[nn.Module, Codes, Codes, Tensor], Tensor | float] = lambda *codes: 0.0
    #: called after each step of the critic
    project: Callable[[nn.Module], None] = lambda critic: None


def _own_paths(prior: Codes, posterior: Codes) -> bool:
    """Whether the sides differ in their paths, which must then be constrained as well."""
    return prior.path is not None and prior.path is not posterior.path


def clip(bound: float = 0.01) -> Constraint:
    """Weight clipping to [-bound, bound]. Source: Arjovsky et al. (2017), algorithm 1.

    The critic's number then has no unit: its Lipschitz constant depends on the architecture as
    well as on the bound.

    Raises:
        ValueError: a bound that is not positive.
    """
    at_least(0.0, bound=bound)
    if not bound:
        raise ValueError("bound must be positive, got 0")

    @torch.no_grad()
    def project(critic: nn.Module) -> None:
        for parameter in critic.parameters():
            parameter.clamp_(-bound, bound)

    return Constraint("clip", project=project)


def gradient_penalty(
    weight: float = 10.0, on: str = "z", *, two_sided: bool = False
) -> Constraint:
    """Penalty ``weight * max(slope - 1, 0)^2`` on the critic's slope between paired codes.

    Its optimum has slope 1 + W / (2 weight), so the critic's number is a little high, more so
    for a large distance or a small weight. Where the two sides have paths of their own, the
    slope is that of the summed scores in each code of the path.

    Args:
        weight: weight of the penalty.
        on: "z" constrains the slope in z alone, for each context; "all" in context and z.
        two_sided: penalise ``(slope - 1)^2``, as published. It has the same optimum, but fixes
            the slopes at one before the data have decided on their sign: a critic that must rise
            in z for one context and fall for another is often trapped at a distance near 0.

    Raises:
        ValueError: an unknown ``on``.

    Sources: Gulrajani et al. (2017), eq. 3, two-sided; Petzka et al. (2018),
    https://arxiv.org/abs/1709.08894, one-sided.
    """
    if on not in ("z", "all"):
        raise ValueError(f"on must be 'z' or 'all', got {on!r}")
    at_least(0.0, weight=weight)

    def cost(critic: nn.Module, prior: Codes, posterior: Codes, mask: Tensor) -> Tensor:
        mix = torch.rand_like(prior.z[..., :1])

        def between(a: Tensor, b: Tensor) -> Tensor:
            return (mix * a + (1 - mix) * b).detach().requires_grad_()

        z, context, path = between(prior.z, posterior.z), prior.context, prior.path
        inputs, own_paths = [z], _own_paths(prior, posterior)
        if own_paths:
            assert prior.path is not None and posterior.path is not None
            path = between(prior.path, posterior.path)
            inputs.append(path)
        if context is not None:
            context = context.detach()
            if on == "all":
                inputs.append(context.requires_grad_())
        with torch.enable_grad():
            scores = critic(z, context, path)
            # z enters the score of its own step alone (a path is another tensor), so the
            # gradient of the sum holds each step's own slope
            observed = scores.where(mask.expand_as(scores), 0.0).sum()
            slopes = list(torch.autograd.grad(observed, inputs, create_graph=True))
            if own_paths:  # z and path are the same codes, once scored and once as the past
                slopes[:2] = [slopes[0] + slopes[1]]
            square = torch.cat(slopes, dim=-1).square().sum(dim=-1)
        slope = (square + 1e-12).sqrt()[mask.expand_as(square)]
        excess = slope - 1 if two_sided else (slope - 1).clamp(min=0)
        return weight * excess.square().mean()

    return Constraint("gradient_penalty", cost=cost)


def spectral() -> Constraint:
    """Spectral normalisation, which must be built into the critic (``lipschitz=``).

    Sides that differ in their paths need ``lipschitz="all"``. Source: Miyato et al. (2018),
    https://arxiv.org/abs/1802.05957.
    """

    def check(critic: nn.Module) -> None:
        if getattr(critic, "lipschitz", None) is None:
            raise ValueError(
                "divergence wasserstein(spectral()) needs a critic that is spectrally "
                "normalised: build it with lipschitz='z' or 'all' (feed-forward critics only)"
            )

    def cost(critic: nn.Module, prior: Codes, posterior: Codes, mask: Tensor) -> float:
        if _own_paths(prior, posterior) and getattr(critic, "lipschitz", None) != "all":
            raise ValueError(
                "a view whose sides differ in their paths (trajectory_redrawn) needs a critic "
                "that is normalised in the path too, else its distance has no bound: build it "
                "with lipschitz='all', or use gradient_penalty()"
            )
        return 0.0

    return Constraint("spectral", check, cost)
