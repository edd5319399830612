"""Checks, and errors that name the file: shared by readers, writers and pictures."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from inference.files import file_path

Numbers = ArrayLike | Tensor


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Put the name of a file, or of a part of it, before a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def reading(path: str | Path, expected: str, *, folder: bool = False) -> Iterator[Path]:
    """Check that a file, or perhaps a folder, can be read; name it in errors raised inside."""
    path = file_path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {expected}")
    if not path.is_file() and not folder:
        raise ValueError(f"{path} is not a file; expected {expected}")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file; expected {expected}, so get the file again")
    with naming(path):
        yield path


@contextmanager
def decoding(expected: str) -> Iterator[None]:
    """Turn any error of a library that decodes a file, of which there are many, into one."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        raise ValueError(
            f"it cannot be read as {expected} ({type(error).__name__}: {reason}); the file is "
            "damaged, cut short or of another format, so get it again"
        ) from error


def writable(path: str | os.PathLike[str]) -> Path:
    """Check that a file can be put at a path: its folder exists, and it is not a folder itself."""
    path = file_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: its folder does not exist; make it")
    if path.is_dir():
        raise ValueError(f"path must be the file to write, got the folder {path}")
    return path


def optional(library: str, extra: str) -> ModuleType:
    """Import a library that only an extra of this package installs."""
    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(
            f"{library} is needed here and cannot be imported: pip install pyro-avrnn[{extra}]"
        ) from error


def plain(value: Numbers) -> np.ndarray:
    """Convert a tensor on any device, or whatever numpy takes, to an array."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def waveform(samples: Numbers) -> np.ndarray:
    """Finite floating samples ``(S,)``; the scale of integers would be a guess."""
    found = numbers("samples", samples, "S")
    if found.dtype.kind != "f":
        raise TypeError(
            f"samples must be floating numbers in [-1, 1], got {found.dtype}; divide 16-bit "
            "samples by 32768"
        )
    return found.astype(np.float64)


def numbers(argument: str, value: Numbers, letters: str) -> np.ndarray:
    """Convert to finite real numbers, with a dimension for each letter: "TK" for (T, K)."""
    array = plain(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold real numbers, got an array of {array.dtype}")
    if array.ndim != len(letters) or 0 in array.shape:
        expected = ", ".join(letters) + ("," if len(letters) == 1 else "")
        raise ValueError(f"{argument} must have shape ({expected}), not empty, got {array.shape}")
    if not np.isfinite(array).all():
        first = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ValueError(
            f"{argument} must be finite, got a NaN or an infinity at {first}; leave that part out"
        )
    return array
