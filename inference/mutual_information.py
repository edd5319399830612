"""Mutual information of two codes of a sequence, from a critic's scores of pairs of a batch.

A critic scores every pair of an f and a z_{1:T} of a batch. The B pairs of the same sequence are
draws of the joint density q(f, z); the B (B - 1) others are draws of q(f) q(z), and none of them
is a pair of the joint by chance. Each estimator is a :class:`~inference.divergences.Divergence`
of scores ``(N, B - 1)`` of the others and ``(N,)`` of the pairs, one row for each pair. Its
``penalty`` is the estimate, in nats.

| name | the critic learns | estimate for the best scores | with other scores |
|---|---|---|---|
| density_ratio | logistic regression: log q(f, z) / q(f) q(z) | I | too high or too low |
| nwj | the bound itself | I | too low |
| infonce | to find the f of z among B | at most I, and at most log B | too low |
| club | log q(f given z), a density (``critic.conditional``) | at least I | too high or too low |
| reversal | the same | I less the entropy of f | too low |

Where a critic is poor all but club report too little: an estimate of 0 in training proves
nothing. Ask a fresh critic that has seen other data (:func:`inference.audit.audit`).

Sources: Sugiyama, Suzuki and Kanamori (2012), chapter 11, for density ratios, in latent-variable
models Kim and Mnih (2018), https://arxiv.org/abs/1802.05983, eq. 3; Nguyen, Wainwright and Jordan
(2010), eq. 8; van den Oord et al. (2018), https://arxiv.org/abs/1807.03748, eq. 4 and 5; Cheng et
al. (2020), https://arxiv.org/abs/2006.12013, eq. 7; Ganin et al. (2016),
https://arxiv.org/abs/1505.07818, for reversed gradients.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inference.constraints import Constraint
from inference.divergences import Divergence, kl, log_ratio


def density_ratio() -> Divergence:
    """The average log-ratio of pairs, by scores that learn by logistic regression."""
    return log_ratio()._replace(penalty=lambda others, pairs: pairs.mean())


def nwj() -> Divergence:
    """The bound of Nguyen, Wainwright and Jordan; its variance grows with exp(I)."""
    return kl()


def infonce() -> Divergence:
    """InfoNCE: log B, less the surprise at which of B codes f belongs to z."""

    def value(others: Tensor, pairs: Tensor) -> Tensor:
        among = torch.cat([others, pairs.unsqueeze(-1)], dim=-1)
        return (pairs - among.logsumexp(dim=-1)).mean() + math.log(among.shape[-1])

    return Divergence(lambda others, pairs: -value(others, pairs), value, Constraint("none"))


def club() -> Divergence:
    """CLUB: how much better a density of f given z predicts the f of z than the f of another.

    An upper bound of I where the density is close enough to the true one.
    """
    return _likelihood(lambda others, pairs: pairs.mean() - others.mean())


def reversal() -> Divergence:
    """The log-density of f given z, a regression whose gradient is reversed on its way to z.

    It lacks the entropy of f, so it has no zero; f should not move for it (information_of_z).
    """
    return _likelihood(lambda others, pairs: pairs.mean())


#: by name; for ``Adversarial(critic, role="information", divergence=ESTIMATORS["infonce"]())``
ESTIMATORS: dict[str, Callable[[], Divergence]] = {
    made.__name__: made for made in (density_ratio, nwj, infonce, club, reversal)
}


def scores_of_pairs(scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix of scores into those of other sequences' codes, and of the sequence's own.

    Args:
        scores: ``(*batch, B, B)``, of z of sequence i (row) and f of sequence j (column).
        kept: ``(*batch, B)`` bool, rows to keep.

    Returns:
        ``(N, B - 1)`` and ``(N,)``, for the N rows that are kept.

    Raises:
        ValueError: a batch of one sequence.
    """
    count = scores.shape[-1]
    if count < 2:
        raise ValueError(
            "a batch must hold at least 2 sequences for pairs to be shuffled, got 1; use a larger "
            "batch_size"
        )
    own = torch.eye(count, dtype=torch.bool, device=scores.device).expand(scores.shape)
    rows, own = scores[kept], own[kept]
    return rows[~own].view(len(rows), count - 1), rows[own]


def _likelihood(value: Callable[[Tensor, Tensor], Tensor]) -> Divergence:
    """By a critic that is a density of f given z, and learns by its likelihood."""

    def check(critic: nn.Module) -> None:
        if not getattr(critic, "conditional", False):
            raise ValueError(
                "estimators club and reversal need a critic that is a density of f given z, such "
                f"as ConditionalPairCritic, got a {type(critic).__name__}"
            )

    loss = Constraint("none", check=check)
    return Divergence(lambda others, pairs: -pairs.mean(), value, loss)
