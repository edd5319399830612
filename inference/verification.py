"""Scores of codes against what is known of the sequences: speaker verification, and DCI.

Sources: equal error rate as of Li and Mandt (2018), https://arxiv.org/abs/1803.02991, section 4.2
(static codes should verify the speaker, dynamic ones should not); Eastwood and Williams (2018),
https://openreview.net/forum?id=By-7dz-AZ, for DCI.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from inference.probes import Values, labels_of, numbers_of


class EqualErrorRate(NamedTuple):
    """Of a decision by a threshold on the cosine of two codes."""

    rate: float  # where as many pairs of one speaker are refused as others are accepted
    threshold: float
    same: int  # pairs of one speaker
    different: int


def equal_error_rate(codes: Values, speakers: Values) -> EqualErrorRate:
    """Verify speakers by the cosine of codes, over all pairs.

    Args:
        codes: ``(N, D)``; an average of all codes is subtracted first.
        speakers: ``(N,)``.

    Raises:
        ValueError: fewer than two speakers, no speaker with two codes, or codes that are not
            finite numbers (N, D).
    """
    rows = numbers_of(codes)
    names = labels_of(speakers, (len(rows),))
    rows = rows - rows.mean(axis=0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    first, second = np.triu_indices(len(rows), 1)
    alike = names[first] == names[second]
    if alike.all() or not alike.any():
        raise ValueError(
            "speakers must be two at least, one of them with two codes, to be verified, got "
            f"{len(np.unique(names))} speakers of {len(rows)} codes"
        )
    cosines = (rows[first] * rows[second]).sum(axis=1)
    return _equal_error_rate(cosines, alike)


def _equal_error_rate(scores: np.ndarray, alike: np.ndarray) -> EqualErrorRate:
    order = np.argsort(scores, kind="stable")
    scores, alike = scores[order], alike[order]
    ends = np.flatnonzero(np.append(np.diff(scores) > 0, True))  # equal scores fall together
    refused = np.cumsum(alike)[ends] / alike.sum()  # of the same, scores up to here
    accepted = 1.0 - np.cumsum(~alike)[ends] / (~alike).sum()
    # before the first score nothing is refused and all is accepted
    refused, accepted = np.append(0.0, refused), np.append(1.0, accepted)
    limits = np.append(scores[0], scores[ends])
    i = int(np.argmax(refused >= accepted))  # the two curves cross between i - 1 and i
    gap = refused - accepted
    share = gap[i - 1] / (gap[i - 1] - gap[i]) if i and gap[i] > gap[i - 1] else 1.0
    rate = refused[i - 1] + share * (refused[i] - refused[i - 1]) if i else refused[0]
    return EqualErrorRate(float(rate), float(limits[i]), int(alike.sum()), int((~alike).sum()))


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness, each at most 1."""

    disentanglement: float  # does a dimension of the code tell of one factor alone?
    completeness: float  # is a factor told by one dimension alone?
    informativeness: float  # accuracy on held-out codes, an average over factors
    importances: np.ndarray  # (D, factors), columns sum to 1


def dci(
    train: tuple[Values, dict[str, ArrayLike]],
    heldout: tuple[Values, dict[str, ArrayLike]],
    *,
    trees: int = 100,
    seed: int = 0,
) -> DCI:
    """Score codes by the importances of random forests that predict each factor.

    Args:
        train: codes ``(N, D)`` and factors by name, ``(N,)`` labels each.
        heldout: the same of other sequences.
        trees: of a forest.
        seed: of the forests.

    Raises:
        ValueError: shapes that do not fit, factors that differ, or a factor of one class.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise ImportError("DCI needs scikit-learn: pip install pyro-avrnn[examples]") from error
    (codes, known), (others, asked) = train, heldout
    rows, tested = numbers_of(codes), numbers_of(others)
    if known.keys() != asked.keys() or not known:
        raise ValueError(
            f"heldout must have the factors of train, got {[*asked]} and {[*known]}, one at least"
        )
    columns, found = [], []
    for name in known:
        names = labels_of(np.asarray(known[name]), (len(rows),))
        truth = labels_of(np.asarray(asked[name]), (len(tested),))
        if len(np.unique(names)) < 2:
            raise ValueError(f"factor {name!r} must be of two classes at least")
        forest = RandomForestClassifier(  # all dimensions are candidates of each split
            trees, max_features=None, min_samples_leaf=2, random_state=seed
        )
        forest.fit(rows, names)
        columns.append(forest.feature_importances_)
        found.append(float((forest.predict(tested) == truth).mean()))
    table = np.stack(columns, axis=1)
    total = table.sum()
    by_code = table.sum(axis=1) / total if total else np.zeros(len(table))
    return DCI(
        disentanglement=float((by_code * _purity(table)).sum()),
        completeness=float(_purity(table.T).mean()),
        informativeness=float(np.mean(found)),
        importances=table,
    )


def _purity(table: np.ndarray) -> np.ndarray:
    """1 less the entropy of each row, in units of its largest; 1 for a single column."""
    if table.shape[1] < 2:
        return np.ones(len(table))
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    logs = np.log(np.maximum(shares, 1e-300))
    entropy: np.ndarray = -(shares * logs).sum(axis=1) / np.log(table.shape[1])
    return 1.0 - entropy
