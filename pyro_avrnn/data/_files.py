"""What the readers share: paths that must exist, and errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def existing(path: str | Path, expected: str) -> Path:
    """``path`` as a Path to a file that exists and is not empty."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected {expected}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected {expected}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is an empty file; expected {expected}, so get the file again")
    return path


def unreadable(path: str | Path, expected: str, error: Exception) -> ValueError:
    """The error for a file on whose content a library has failed, in whichever way."""
    reason = " ".join(str(error).split()).rstrip(".") or "no reason given"
    return ValueError(
        f"{path} cannot be read as {expected} ({type(error).__name__}: {reason}); the file is "
        "damaged, cut short or of another format, so get it again"
    )


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Put the name of the file (or of a part of it) before a ValueError from inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
