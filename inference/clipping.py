"""Gradient clipping, by a fixed bound or by one that follows the norms of recent steps."""

import math
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from inference.protocols import at_least, counts, given

_STEPS = 100  # over which the share of clipped steps is counted
_FIRST = 10  # norms that a median must be of


@dataclass(frozen=True)
class AdaptiveClip:
    """A bound on the norm of the gradient that follows the norms of the steps before.

    It is a multiple of their running median, so that it needs no knowledge of the data's units,
    and cuts the spikes alone. A step that was cut counts with the norm it was cut to: a spike
    moves the bound no further than any other large step. The first ten steps are not cut.

    A gradient that is not finite is the largest of spikes: float32 overflows on the way back
    through a steep density. That step is not taken, and training ends only if it happens to
    ``patience`` steps in a row, or where the loss itself is not finite.

    Source: after AutoClip, Seetharaman et al. (2020), https://arxiv.org/abs/2007.14469, which
    takes a percentile of all norms so far.

    Args:
        multiple: of the median.
        window: steps that the median is of.
        patience: steps in a row that may have a gradient that is not finite; 0 allows none.
    """

    multiple: float = 10.0
    window: int = 100
    patience: int = 3

    def __post_init__(self) -> None:
        at_least(1.0, multiple=self.multiple)
        counts(_FIRST, window=self.window)
        counts(0, patience=self.patience)


class Clipper:
    """Says by which factor a gradient is shortened, and remembers how often it was.

    Args:
        clip: a fixed bound, one that adapts, or None for no clipping.

    Raises:
        ValueError: a bound that is not above 0.
    """

    def __init__(self, clip: float | AdaptiveClip | None) -> None:
        if not isinstance(clip, AdaptiveClip):
            at_least(1e-12, **given(clip_norm=clip))
        self.clip = clip
        window = clip.window if isinstance(clip, AdaptiveClip) else 0
        self.norms: deque[float] = deque(maxlen=window)  # as they were applied
        self.factors: deque[float] = deque(maxlen=_STEPS)
        self._warned = False
        self.skipped, self._in_a_row = 0, 0  # steps whose gradient was not finite

    @property
    def bound(self) -> float:
        """Of the next step."""
        if not isinstance(self.clip, AdaptiveClip):
            return math.inf if self.clip is None else self.clip
        if len(self.norms) < _FIRST:
            return math.inf
        return self.clip.multiple * median(self.norms)

    @property
    def share(self) -> float:
        """Of the last hundred steps that were cut."""
        return sum(factor < 1.0 for factor in self.factors) / max(len(self.factors), 1)

    def clip_in_place(self, norm: float, gradients: Iterable[Tensor]) -> None:
        """Shorten the gradients of a step, whose norm together is ``norm``, where it is due."""
        if (factor := self.factor(norm)) < 1.0:
            for gradient in gradients:
                gradient.mul_(factor)

    def skips(self, norm: float) -> bool:
        """Whether a step is to be left out, as its gradient is not finite."""
        if math.isfinite(norm):
            self._in_a_row = 0
            return False
        patience = self.clip.patience if isinstance(self.clip, AdaptiveClip) else 0
        if self._in_a_row >= patience:
            return False
        if not self.skipped:
            warnings.warn(
                f"the gradient of a step is {norm}, so that the step was not taken; metrics count "
                f"such steps as skipped, and {patience + 1} in a row end the training",
                stacklevel=2,
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        self.factors.append(0.0)
        return True

    def factor(self, norm: float) -> float:
        """What the gradient of a step is multiplied by, at most 1."""
        bound = self.bound
        factor = bound / norm if norm > bound else 1.0
        self.norms.append(norm * factor)
        self.factors.append(factor)
        self._warn(norm)
        return factor

    def _warn(self, norm: float) -> None:
        if self._warned or len(self.factors) < _STEPS or self.share <= 0.5:
            return
        self._warned = True
        middle = median(self.factors)
        warnings.warn(
            f"clip_norm={self.clip} cut {self.share:.0%} of the last {_STEPS} steps, to "
            f"{middle:.2g} of their gradient in the middle, so that it is no longer a guard but "
            "the size of the step; use clip_norm=AdaptiveClip(), a larger number, or None",
            stacklevel=2,
        )

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "norms": list(self.norms),
            "factors": list(self.factors),
            "warned": self._warned,
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.norms = deque(state["norms"], maxlen=self.norms.maxlen)
        self.factors = deque(state["factors"], maxlen=_STEPS)
        self._warned = state["warned"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
