"""What the readers share: paths that must exist, and errors that name the file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
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


def members(
    path: Path, wanted: Callable[[str], bool], expected: str, most: int, not_so: str
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted files of a folder or ``.zip``, in the order of their names.

    An archive is read in memory: a member's path is matched, never written to.

    Args:
        path: the folder or archive.
        wanted: whether a name, with its folders, is one of them.
        expected: what ``path`` should be, in words.
        most: bytes of a file, against hostile archives.
        not_so: what to say of a larger one, such as "an utterance has fewer; this is not TIMIT".
    """

    def check(name: str, size: int) -> None:
        if size > most:
            raise ValueError(f"{path}: {name} has {size} bytes, more than {most}: {not_so}")

    if path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path.parent).as_posix()
            if wanted(name) and file.is_file():
                check(name, file.stat().st_size)
                yield name, file.read_bytes()
        return
    existing(path, expected)
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # on damaged files: errors of zipfile and struct
        raise unreadable(path, "a .zip archive", error) from error
    with archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if not wanted(info.filename):
                continue
            check(info.filename, info.file_size)
            try:
                content = archive.read(info)
            except Exception as error:  # also of zlib, or for a password
                where = f"{path}: {info.filename}"
                raise unreadable(where, "a member of a .zip archive", error) from error
            yield info.filename, content
