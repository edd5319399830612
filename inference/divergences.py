"""Distances between prior and proposal, estimated by a critic or in closed form.

A critic's number is evidence only when calibrated: under weight clipping at 0.01 it reports
about 0.01 for a true distance of 1. ``wasserstein2`` is exact, and bounds the W1 of every
one-step view from above.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from inference.densities import StepDensities
from inference.protocols import at_least, of_kind


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


class Divergence(NamedTuple):
    """Losses as functions of prior and posterior scores, (N,) each, of observed steps only."""

    critic_loss: Callable[[Tensor, Tensor], Tensor]  # what the critic minimises
    penalty: Callable[[Tensor, Tensor], Tensor]  # what prior and guide minimise
    constraint: Constraint


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


def wasserstein(constraint: Constraint | None = None) -> Divergence:
    """Wasserstein-1 distance, by a critic that is high on the prior (eq. 12 of AVRNN).

    Args:
        constraint: ``gradient_penalty()`` by default, ``spectral()`` or ``clip()``.
    """
    if constraint is not None:
        expected = "gradient_penalty(), spectral() or clip()"
        of_kind(Constraint, expected, constraint=constraint)
    return Divergence(
        critic_loss=lambda prior, posterior: posterior.mean() - prior.mean(),
        penalty=lambda prior, posterior: prior.mean() - posterior.mean(),
        constraint=gradient_penalty() if constraint is None else constraint,
    )


def logistic() -> Divergence:
    """Logistic regression: scores estimate log q / p, the distance is :func:`_nwj` of them."""
    return Divergence(
        critic_loss=lambda prior, posterior: (
            F.softplus(-posterior).mean() + F.softplus(prior).mean()
        ),
        penalty=_nwj,
        constraint=_FREE,
    )


def kl_bound() -> Divergence:
    """The bound of an f-GAN on KL(q || p), maximised in scores that estimate log q / p."""
    return Divergence(lambda prior, posterior: -_nwj(prior, posterior), _nwj, _FREE)


def pearson() -> Divergence:
    """The bound of an f-GAN on Pearson's chi-squared of q and p; scores estimate log q / p.

    Also known as least-squares importance fitting.
    """
    return Divergence(
        critic_loss=lambda prior, posterior: (
            (2 * prior).exp().mean() - 2 * posterior.exp().mean() + 1
        ),
        penalty=_nwj,
        constraint=_FREE,
    )


def least_squares() -> Divergence:
    """Squared error of the probability of the proposal; scores estimate log q / p."""
    return Divergence(
        critic_loss=lambda prior, posterior: (
            posterior.neg().sigmoid().square().mean() + prior.sigmoid().square().mean()
        ),
        penalty=_nwj,
        constraint=_FREE,
    )


def _nwj(prior: Tensor, posterior: Tensor) -> Tensor:
    """A lower bound of KL(q || p), for any scores of draws of p and q.

    Source: Nguyen, Wainwright and Jordan (2010), https://arxiv.org/abs/0809.0853, eq. 8.
    """
    return 1.0 + posterior.mean() - prior.exp().mean()


_FREE = Constraint("none")
#: losses of a critic that estimates log q / p, by name
RATIO_LOSSES: dict[str, Callable[[], Divergence]] = {
    "logistic": logistic,
    "kl": kl_bound,
    "pearson": pearson,
    "least_squares": least_squares,
}


def wasserstein2(densities: StepDensities, *, standardise: bool = False) -> Tensor:
    """W2 between diagonal normal proposal and prior at every step, ``(T, K, B)``, 0 where padded.

    Its square is ||mu_q - mu_p||^2 + ||sigma_q - sigma_p||^2. With ``standardise`` each dimension
    is in units of the prior's deviation.

    Raises:
        NotImplementedError: other families.
    """
    q, p = normal_parameters(densities.proposal), normal_parameters(densities.prior)
    unit = p[1] if standardise else torch.ones_like(p[1])
    square = torch.stack([((a - b) / unit).square() for a, b in zip(q, p, strict=True)])
    return square.sum(dim=(0, -1)).sqrt().where(densities.mask, 0.0)


def normal_parameters(distribution: Distribution | None) -> tuple[Tensor, Tensor]:
    """Mean and scale ``(*batch, D)`` of a diagonal normal.

    Raises:
        NotImplementedError: another family.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, Normal):
        raise NotImplementedError(
            f"a closed form needs diagonal normals, got {type(distribution).__name__}"
        )
    return distribution.loc, distribution.scale
