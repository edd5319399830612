"""Linear probes: which labels can be read from the latents of whole sequences.

A code holds a label if a linear classifier predicts it on sequences it was not fitted on. The
classifier is weak on purpose: it shows what lies open, not what could be dug out.

Two traps. A probe of means sees them without the guide's noise and in units of their own
deviation, so it may read a label from means that differ by far less than the guide's uncertainty:
report probes of draws as well. And an average over steps has no order: what it does not hold, such
as which digit was said, may well be in the path.

Source: Akuzawa et al. (2021), https://doi.org/10.1007/s10994-021-06032-4.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution

from inference.batches import by_portions
from inference.densities import check_batch, require_steps
from inference.modes import evaluating
from inference.protocols import Program, counts, require_programs
from inference.random import seeded
from inference.traces import step_densities

Values = Tensor | ArrayLike  #: codes or labels, as a tensor or anything numpy takes


class Codes(NamedTuple):
    """Codes of B sequences; f is None for a model without a latent that all steps share."""

    f: Tensor | None  # (B, F), the mean of q(f | x)
    z: Tensor  # (B, Z), the mean of q(z_t | x), averaged over the steps a sequence has
    f_draw: Tensor | None  # (B, F), one draw of it
    z_draw: Tensor  # (B, Z), one draw of the path, averaged likewise


class Accuracy(NamedTuple):
    """Share of labels that a probe predicts, with two baselines."""

    accuracy: float
    standard_error: float  # binomial, over the labels judged
    chance: float  # one over the number of classes
    largest_class: float  # share of the commonest label, the accuracy of always naming it


@torch.no_grad()
def sequence_codes(
    model: Program,
    guide: Program,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    num_particles: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> Codes:
    """Compute one code for each sequence from the guide, in evaluation mode and bounded memory.

    Where the proposal of z_t depends on the path before t, the posterior mean is an average of
    the proposal's means over ``num_particles`` paths; otherwise it is exact.

    Args:
        model, guide: Pyro programs, best with a rollout.
        x, mask: ``(B, T, X)``, and ``(B, T)`` bool, a prefix, or None.
        num_particles: K paths, or K draws where the proposal does not know its mean.
        batch_size: sequences at once; it changes the draws.
        seed: seed of all draws.

    Raises:
        ValueError: a number below 1, or a sequence without steps.
    """
    counts(1, num_particles=num_particles, batch_size=batch_size)
    require_programs(model, guide)
    x, mask = check_batch(model, x, mask)
    require_steps(mask)

    def codes(x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        d = step_densities(model, guide, x, mask, num_particles=num_particles)
        share = mask.to(x)  # of a step in the average over a sequence's own
        share = (share / share.sum(dim=1, keepdim=True)).t()[:, None, :, None]  # (T, 1, B, 1)
        averages = (share * _means(d.proposal, d.z)).sum(dim=0)  # (K, B, Z)
        found = {"z": averages.mean(dim=0), "z_draw": (share * d.z[:, :1]).sum(dim=0)[0]}
        if d.f is not None:
            found |= {"f": _means(d.proposal_f, d.f.mean(dim=0)), "f_draw": d.f[0]}
        return found

    with seeded(seed), evaluating(model, guide):
        columns = by_portions(codes, x, mask, batch_size)
    return Codes(columns.get("f"), columns["z"], columns.get("f_draw"), columns["z_draw"])


class LinearProbe:
    """A logistic regression on codes, each dimension standardised, with scikit-learn's penalty.

    Args:
        codes: ``(N, D)``, of the sequences it is fitted on.
        labels: ``(N,)``, integers or strings, of two classes at least.
        max_iter: largest number of iterations of the solver.

    Raises:
        ValueError: codes that are not (N, D) finite numbers, other labels than N, or one class.
        ImportError: scikit-learn is not installed.

    Example:
        >>> codes = [[0.0, 3.0], [0.1, -1.0], [0.9, 2.0], [1.0, 0.0]]
        >>> probe = LinearProbe(codes, ["low", "low", "high", "high"])
        >>> probe.score([[0.2, 5.0], [0.8, -5.0]], ["low", "high"]).largest_class
        0.5
    """

    def __init__(self, codes: Values, labels: Values, *, max_iter: int = 10_000) -> None:
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError(
                "a linear probe needs scikit-learn: pip install pyro-avrnn[examples]"
            ) from error
        numbers = numbers_of(codes)
        names = labels_of(labels, (len(numbers),))
        self.classes = np.unique(names)
        if len(self.classes) < 2:
            raise ValueError(
                f"labels must be of two classes at least, got {self.classes.tolist()}"
            )
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=max_iter))
        self.classifier.fit(numbers, names)

    def predict(self, codes: Values) -> np.ndarray:
        """Predict the labels, (M,), of codes ``(M, D)``."""
        found: np.ndarray = self.classifier.predict(numbers_of(codes))
        return found

    def score(self, codes: Values, labels: Values) -> Accuracy:
        """Measure how many of the labels (M,) of codes ``(M, D)`` the probe predicts.

        Raises:
            ValueError: shapes that do not fit, or a label that it was not fitted on.
        """
        found = self.predict(codes)
        return accuracy_of(found, labels_of(labels, found.shape), self.classes)


def accuracy_of(found: np.ndarray, names: np.ndarray, classes: np.ndarray) -> Accuracy:
    """Share of labels found (N,) that are the true ones.

    Raises:
        ValueError: a label that is none of the classes.
    """
    new = names[~np.isin(names, classes)]
    if len(new):
        raise ValueError(
            f"labels must be of the classes fitted on, {classes.tolist()}, got {new[0].item()!r}"
        )
    share = float((found == names).mean())
    return Accuracy(
        accuracy=share,
        standard_error=(share * (1.0 - share) / len(names)) ** 0.5,
        chance=1.0 / len(classes),
        largest_class=float(np.unique(names, return_counts=True)[1].max() / len(names)),
    )


def _means(proposal: Distribution | None, otherwise: Tensor) -> Tensor:
    """Means of a distribution if it knows them."""
    try:
        return otherwise if proposal is None else proposal.mean
    except NotImplementedError:
        return otherwise


def _array(values: Values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def numbers_of(codes: Values) -> np.ndarray:
    """Codes as an array (N, D) of finite numbers.

    Raises:
        ValueError: anything else.
    """
    array = _array(codes)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"codes must be numbers of shape (N, D), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            "codes must be finite, got a NaN or an infinity for sequence "
            f"{int(np.argwhere(~np.isfinite(array))[0, 0])} (counted from 0); leave it out"
        )
    return array.astype(np.float64)


def labels_of(labels: Values, shape: tuple[int, ...]) -> np.ndarray:
    """Labels as an array.

    Raises:
        ValueError: another shape.
    """
    array = _array(labels)
    if array.shape != shape:
        raise ValueError(f"labels must have shape {shape}, one a code, got {array.shape}")
    return array
