"""Paths, optional libraries, and errors that name the file: for readers, writers and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Put the name of a file, or of a part of it, before a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def reading(path: str | Path, expected: str, *, folder: bool = False) -> Iterator[Path]:
    """Check that there is something to read, and name the path in every ValueError raised inside.

    Args:
        path: a file that is not empty.
        expected: what it should be, in words.
        folder: whether it may also be a folder.
    """
    path = Path(path)
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
    """Turn any error raised inside, where a library decodes a file, into a ValueError.

    A damaged file makes libraries fail in many ways: with errors of zlib, struct, zipfile.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
        raise ValueError(
            f"cannot be read as {expected} ({type(error).__name__}: {reason}); the file is "
            "damaged, cut short or of another format, so get it again"
        ) from error


def writable(path: str | Path) -> Path:
    """Check that a file can be put at a path: its folder exists, and it is not a folder itself."""
    path = Path(path)
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
