"""What a latent holds, read by a linear probe: codes of whole sequences, logistic regression.

A label is held by a code if a linear classifier finds it there on sequences it was not fitted on.
The classifier is weak on purpose: it says what lies open, not what could be dug out.

Two traps. Means are read without the guide's noise and in units of their own deviation, so a
label may be read from means that differ by far less than the guide is uncertain: probes on draws
stand beside them. And an average over steps keeps no order: what it does not hold, such as which
digit was said, may well be in the path.

Source: Akuzawa et al. (2021), https://doi.org/10.1007/s10994-021-06032-4.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.batches import portions
from inference.modes import evaluating
from inference.protocols import require_counts
from inference.random import seeded
from inference.traces import step_densities


class Codes(NamedTuple):
    """Of every sequence; f is None for a model without a latent that all steps share."""

    f: Tensor | None  # (B, F), the mean of q(f | x)
    z: Tensor  # (B, Z), the mean of q(z_t | x), averaged over the steps a sequence has
    f_draw: Tensor | None  # (B, F), one draw of it
    z_draw: Tensor  # (B, Z), one draw of the path, averaged likewise


class Accuracy(NamedTuple):
    """Share of labels a probe finds, and what it is to be measured by."""

    accuracy: float
    standard_error: float  # binomial, over the labels judged
    chance: float  # one over the number of classes
    largest_class: float  # share of the commonest label, what always naming it would find


@torch.no_grad()
def sequence_codes(
    model: Any,
    guide: Any,
    x: Tensor,
    mask: Tensor,
    *,
    num_particles: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> Codes:
    """One code for each sequence, from the guide, in evaluation mode and bounded memory.

    Where the proposal of z_t depends on the path before t, the posterior mean is an average of
    the proposal's means over ``num_particles`` paths; it is exact where it does not.

    Args:
        model, guide: Pyro programs, best with a rollout.
        x: ``(B, T, X)``.
        mask: ``(B, T)`` bool, a prefix.
        num_particles: K paths; for a proposal that does not know its mean, as many draws.
        batch_size: sequences at once.
        seed: of all draws, which depend on ``batch_size``, too.

    Raises:
        ValueError: a number below 1, or a sequence without steps.
    """
    require_counts(num_particles=num_particles, batch_size=batch_size)
    empty = ~mask.any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            "mask must observe a step of every sequence, got none of sequence "
            f"{int(empty.nonzero()[0])} (counted from 0); leave it out"
        )
    parts: dict[str, list[Tensor]] = {}
    with seeded(seed), evaluating(model, guide):
        for xs, masks, _ in portions(x, mask, batch_size):
            d = step_densities(model, guide, xs, masks, num_particles=num_particles)
            share = masks.to(xs)  # of a step in the average over a sequence's own
            share = (share / share.sum(dim=1, keepdim=True)).t()[:, None, :, None]  # (T, 1, B, 1)
            means = _means(d.proposal)
            averages = (share * (d.z if means is None else means)).sum(dim=0)  # (K, B, Z)
            pieces = {"z": averages.mean(dim=0), "z_draw": (share * d.z[:, :1]).sum(dim=0)[0]}
            f: Tensor | None = getattr(d, "f", None)
            if f is not None:
                means = _means(getattr(d, "proposal_f", None))
                pieces |= {"f": f.mean(dim=0) if means is None else means, "f_draw": f[0]}
            for name, piece in pieces.items():
                parts.setdefault(name, []).append(piece)
    columns = {name: torch.cat(values) for name, values in parts.items()}
    return Codes(columns.get("f"), columns["z"], columns.get("f_draw"), columns["z_draw"])


class LinearProbe:
    """A logistic regression on codes, each dimension standardised, with scikit-learn's penalty.

    Args:
        codes: ``(N, D)``, of the sequences it is fitted on.
        labels: (N,), integers or strings, of two classes at least.
        max_iter: of the solver.

    Raises:
        ValueError: codes that are not (N, D) finite numbers, other labels than N, or one class.
        ImportError: scikit-learn is not installed.

    Example:
        >>> codes = [[0.0, 3.0], [0.1, -1.0], [0.9, 2.0], [1.0, 0.0]]
        >>> probe = LinearProbe(codes, ["low", "low", "high", "high"])
        >>> probe.score([[0.2, 5.0], [0.8, -5.0]], ["low", "high"]).largest_class
        0.5
    """

    def __init__(self, codes: Any, labels: Any, *, max_iter: int = 10_000) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError(
                "a linear probe needs scikit-learn: pip install pyro-avrnn[examples]"
            ) from error
        numbers, names = _numbers(codes), _labels(labels, len(codes))
        self.classes = np.unique(names)
        if len(self.classes) < 2:
            raise ValueError(
                f"labels must be of two classes at least, got {self.classes.tolist()}"
            )
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter))
        self.classifier.fit(numbers, names)

    def predict(self, codes: Any) -> np.ndarray:
        """The label found for each code, (M,), of codes ``(M, D)``."""
        found: np.ndarray = self.classifier.predict(_numbers(codes))
        return found

    def score(self, codes: Any, labels: Any) -> Accuracy:
        """How many of these labels it finds.

        Args:
            codes: ``(M, D)``.
            labels: (M,), of the classes it was fitted on.

        Raises:
            ValueError: shapes that do not fit, or a label it has never seen.
        """
        names = _labels(labels, len(codes))
        new = names[~np.isin(names, self.classes)]
        if len(new):
            raise ValueError(
                f"labels must be of the classes fitted on, {self.classes.tolist()}, got "
                f"{new[0].item()!r}"
            )
        share = float((self.predict(codes) == names).mean())
        return Accuracy(
            share,
            (share * (1.0 - share) / len(names)) ** 0.5,
            1.0 / len(self.classes),
            float(np.unique(names, return_counts=True)[1].max() / len(names)),
        )


def _means(proposal: Any) -> Tensor | None:
    """Of a distribution that knows them, and is there."""
    try:
        return None if proposal is None else proposal.mean
    except NotImplementedError:
        return None


def _numbers(codes: Any) -> np.ndarray:
    array = np.asarray(codes.detach().cpu() if isinstance(codes, Tensor) else codes)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"codes must be numbers of shape (N, D), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            "codes must be finite, got a NaN or an infinity for sequence "
            f"{int(np.argwhere(~np.isfinite(array))[0, 0])} (counted from 0); leave it out"
        )
    return array.astype(np.float64)


def _labels(labels: Any, count: int) -> np.ndarray:
    array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if array.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one a code, got {array.shape}")
    return array
