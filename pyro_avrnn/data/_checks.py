"""Checks of arguments, shared by readers, writers and pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

Numbers = ArrayLike | Tensor


def numbers(argument: str, value: Numbers, letters: str) -> np.ndarray:
    """Convert a tensor or an array to finite real numbers, one dimension for each letter.

    Args:
        argument: name of the argument, for the error.
        value: the numbers; none of its dimensions may be 0.
        letters: of the shape: "TK" for (T, K).

    Raises:
        TypeError: numbers that are not real, or no numbers.
        ValueError: another shape, or a value that is not finite.
    """
    array = plain(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold real numbers, got an array of {array.dtype}")
    if array.ndim != len(letters) or 0 in array.shape:
        expected = ", ".join(letters) + ("," if len(letters) == 1 else "")
        raise ValueError(f"{argument} must have shape ({expected}), not empty, got {array.shape}")
    if not np.isfinite(array).all():
        first = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ValueError(
            f"{argument} must be finite, got a NaN or an infinity at index "
            f"{first[0] if len(first) == 1 else first}; leave that part out"
        )
    return array


def plain(value: Numbers) -> np.ndarray:
    """Convert a tensor on any device, or whatever numpy takes, to an array."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def at_least(least: int, **arguments: float | None) -> None:
    """Refuse arguments below ``least``; None is not given and passes."""
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
