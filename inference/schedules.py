"""Weights that change over a run, and the counter that drives them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from inference.protocols import at_least, counts, given, of_kind, one_of

Schedule = Callable[[float], float]  #: fraction of the run in [0, 1] -> weight


@dataclass(frozen=True)
class Ramp:
    """Linear from ``start`` to ``stop`` over the first ``over`` of the run, then constant.

    Raises:
        ValueError: ``over`` is not a fraction in (0, 1].

    Example:
        >>> Ramp(0.0, 1.0, over=0.5)(0.25)
        0.5
    """

    start: float
    stop: float
    over: float = 1.0

    def __post_init__(self) -> None:
        at_least(0.0, start=self.start, stop=self.stop)
        of_kind(Real, "a number", over=self.over)
        if not 0.0 < self.over <= 1.0:
            raise ValueError(f"over must be a fraction of the run in (0, 1], got {self.over}")

    def __call__(self, progress: float) -> float:
        """Return the weight at ``progress`` in [0, 1]."""
        return self.start + (self.stop - self.start) * min(max(progress / self.over, 0.0), 1.0)


_DECAYS: dict[str, Schedule] = {
    "constant": lambda at: 1.0,
    "linear": lambda at: 1.0 - at,
    "cosine": lambda at: 0.5 * (1.0 + math.cos(math.pi * at)),
}


@dataclass(frozen=True)
class LearningRate:
    """Factor on a learning rate: a linear warm-up from 0, then a decay from 1 to ``end``.

    Args:
        decay: "constant", "linear" or "cosine".
        warmup: fraction of the run that the warm-up takes.
        end: factor at the end of the run; not reached by a constant one.

    Raises:
        ValueError: an unknown decay, or a fraction outside [0, 1].

    Example:
        >>> rate = LearningRate("linear", warmup=0.2, end=0.1)
        >>> [round(rate(at), 2) for at in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """

    decay: str = "constant"
    warmup: float = 0.0
    end: float = 0.01

    def __post_init__(self) -> None:
        one_of(_DECAYS, decay=self.decay)
        for name in ("warmup", "end"):
            of_kind(Real, "a number", **{name: getattr(self, name)})
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"{name} must be a fraction in [0, 1], got {value}")

    def __call__(self, progress: float) -> float:
        """Return the factor at ``progress`` in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        rest = (progress - self.warmup) / (1.0 - self.warmup) if self.warmup < 1.0 else 1.0
        return self.end + (1.0 - self.end) * _DECAYS[self.decay](rest)


@dataclass
class Clock:
    """A counter of the calls of an objective with gradients enabled.

    Args:
        total: length of the run in calls; ``fit`` sets it where it is not given.
        calls: calls so far.
    """

    total: int | None = None
    calls: int = 0
    _set_by_run: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts(1, **given(total=self.total))
        counts(0, calls=self.calls)

    def start(self, total: int) -> None:
        """Begin a run of so many calls; a length that the user gave stays, and so do its calls."""
        if self.total is None or self._set_by_run:
            self.total, self.calls, self._set_by_run = total, 0, True

    def weight(self, value: float | Schedule) -> float:
        """Return a number unchanged, and a schedule's weight at this point of the run.

        Raises:
            ValueError: the value is a schedule, and the length of the run is not known.
        """
        if not callable(value):
            return float(value)
        if not self.total:
            raise ValueError(
                "a scheduled weight is a fraction of the run, whose length is not known; train "
                "with fit(steps=...), or give the objective clock=Clock(total=...)"
            )
        found = value(min(self.calls / self.total, 1.0))
        at_least(0.0, **{"the weight of a schedule": found})
        return found


def weight(value: Any, name: str) -> None:
    """Check a weight: a number, at least 0, or a schedule.

    Raises:
        TypeError: neither.
        ValueError: a number below 0, infinite or NaN.
    """
    if isinstance(value, type) or not callable(value):
        at_least(0.0, **{name: value})
