"""Weights that change over a run, and the counter that drives them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from inference.protocols import at_least, counts, given, of_kind

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
