"""Divergences between prior p and proposal q, estimated by a critic; W2 in closed form.

Scores s of a Wasserstein critic are high for the prior. Those of all others estimate
log q(z) / p(z), and are high for the proposal. With exact scores each value is that of its
divergence, and so is its gradient with respect to draws of both sides; with other scores it is a
lower bound, which a held-out sample shows without bias.

| name | value for exact scores | is a bound by | 0 means | fails |
|---|---|---|---|---|
| wasserstein | W1 | Kantorovich and Rubinstein, if the critic is Lipschitz | p = q | says nothing of precision |
| log_ratio | KL(q, p) | as kl, but scores learn by logistic regression | p = q | where p has no draws near q |
| kl | KL(q, p) | E_q s - E_p exp s + 1 | p = q | weights exp s explode from some 5 nats on |
| reverse_kl | KL(p, q) | 1 - E_p s - E_q exp(-s) | p = q | likewise |
| pearson | chi-squared of q to p | 2 E_q exp s - E_p exp 2s - 1 | p = q | earlier still; infinite for wide q |
| hellinger | squared Hellinger distance, at most 2 | 2 - E_q exp(-s/2) - E_p exp(s/2) | p = q | flat where p and q are far apart |
| jensen_shannon | Jensen-Shannon divergence, at most log 2 | logistic regression | p = q | flat likewise, unless not saturating |
| least_squares | triangular discrimination / 4, at most 1/2 | squared error of the classifier | p = q | flat likewise |

A critic's number is evidence only when calibrated: under weight clipping at 0.01 it reports
about 0.01 for a true distance of 1. ``wasserstein2`` is exact, and bounds the W1 of every
one-step view from above.

Sources: Nowozin et al. (2016), https://arxiv.org/abs/1606.00709, table 2, for all of one kind;
Nguyen, Wainwright and Jordan (2010), https://arxiv.org/abs/0809.0853, eq. 8, for kl; Mao et al.
(2017), https://arxiv.org/abs/1611.04076, for least_squares.
"""  # noqa: E501 - table

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from inference.constraints import Constraint, gradient_penalty
from inference.densities import StepDensities
from inference.protocols import of_kind

_LARGEST = 40.0  # of an exponent: weights above are infinite in single precision when squared


class Divergence(NamedTuple):
    """Losses as functions of prior and posterior scores, (N,) each, of observed steps only."""

    critic_loss: Callable[[Tensor, Tensor], Tensor]  # what the critic minimises
    penalty: Callable[[Tensor, Tensor], Tensor]  # what prior and guide minimise
    constraint: Constraint


def wasserstein(constraint: Constraint | None = None) -> Divergence:
    """Wasserstein-1 distance, by a critic that is high on the prior (eq. 12 of AVRNN).

    Args:
        constraint: ``gradient_penalty()`` by default, ``spectral()`` or ``clip()``.
    """
    return Divergence(
        critic_loss=lambda prior, posterior: posterior.mean() - prior.mean(),
        penalty=lambda prior, posterior: prior.mean() - posterior.mean(),
        constraint=_constraint(constraint) if constraint is not None else gradient_penalty(),
    )


def log_ratio(constraint: Constraint | None = None) -> Divergence:
    """KL(q, p) by scores that learn by logistic regression, whose loss has no exponentials.

    Args:
        constraint: of the critic; None for none, as for all that follow.
    """
    return Divergence(_logistic, ratio_bound, _constraint(constraint))


def kl(constraint: Constraint | None = None) -> Divergence:
    """KL(q, p), its bound maximised by the critic."""
    return _maximised(ratio_bound, constraint)


def reverse_kl(constraint: Constraint | None = None) -> Divergence:
    """KL(p, q)."""
    return _maximised(lambda prior, posterior: ratio_bound(-posterior, -prior), constraint)


def pearson(constraint: Constraint | None = None) -> Divergence:
    """Pearson's chi-squared divergence, the variance of q / p under p.

    Its critic does least-squares importance fitting.
    """
    return _maximised(
        lambda prior, posterior: 2 * _exp(posterior).mean() - _exp(2 * prior).mean() - 1.0,
        constraint,
    )


def hellinger(constraint: Constraint | None = None) -> Divergence:
    """Squared Hellinger distance, the integral of the squared difference of square roots."""
    return _maximised(
        lambda prior, posterior: 2.0 - _exp(-0.5 * posterior).mean() - _exp(0.5 * prior).mean(),
        constraint,
    )


def jensen_shannon(constraint: Constraint | None = None, *, saturating: bool = True) -> Divergence:
    """Jensen-Shannon divergence, the distance of the AAE and of the original GAN.

    Args:
        constraint: of the critic.
        saturating: let prior and proposal minimise the divergence, whose gradient vanishes where
            the critic tells them apart; else each side maximises the log of the probability to
            be taken for the other, a loss of log 2 at p = q that is no divergence.
    """

    def divergence(prior: Tensor, posterior: Tensor) -> Tensor:
        return math.log(2.0) - 0.5 * _logistic(prior, posterior)

    def fooled(prior: Tensor, posterior: Tensor) -> Tensor:
        return 0.5 * (F.softplus(posterior).mean() + F.softplus(-prior).mean())

    return Divergence(_logistic, divergence if saturating else fooled, _constraint(constraint))


def least_squares(constraint: Constraint | None = None) -> Divergence:
    """1/2 less the mean squared error of the probability that a code is the proposal's."""
    return _maximised(
        lambda prior, posterior: (
            0.5 - posterior.neg().sigmoid().square().mean() - prior.sigmoid().square().mean()
        ),
        constraint,
    )


def ratio_bound(prior: Tensor, posterior: Tensor) -> Tensor:
    """A lower bound of KL(q, p) by any scores of draws of p and q: what a ratio certifies."""
    return 1.0 + posterior.mean() - _exp(prior).mean()


def _maximised(
    value: Callable[[Tensor, Tensor], Tensor], constraint: Constraint | None
) -> Divergence:
    """What the critic maximises and the two sides minimise."""

    def loss(prior: Tensor, posterior: Tensor) -> Tensor:
        return -value(prior, posterior)

    return Divergence(loss, value, _constraint(constraint))


def _logistic(prior: Tensor, posterior: Tensor) -> Tensor:
    return F.softplus(-posterior).mean() + F.softplus(prior).mean()


def _exp(score: Tensor) -> Tensor:
    return score.clamp(max=_LARGEST).exp()


def _constraint(constraint: Constraint | None) -> Constraint:
    if constraint is None:
        return Constraint("none")
    of_kind(Constraint, "gradient_penalty(), spectral() or clip()", constraint=constraint)
    return constraint


#: by name; the scores of all but the first estimate log q / p
DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    made.__name__: made
    for made in (
        wasserstein,
        log_ratio,
        kl,
        reverse_kl,
        pearson,
        hellinger,
        jensen_shannon,
        least_squares,
    )
}
RATIO_LOSSES = {name: made for name, made in DIVERGENCES.items() if made is not wasserstein}


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
