"""Speech corpora: folders or ``.zip`` archives of 16-bit audio files of one channel."""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pyro_avrnn.data._checks import decoding, naming, optional


def recordings(
    path: Path, parse: Callable[[str], tuple[str, str] | None], expected: str, rate: int, most: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Read split, name and samples, int16, shape (S,), of all recordings, in the order of paths.

    Args:
        path: the folder or archive.
        parse: gives split and name of a recording by its path, None for any other file.
        expected: what ``path`` should be, in words.
        rate: the sample rate they should have, in hertz.
        most: bytes of a file; a member of a hostile archive may be larger.
    """
    seen = set()
    for file, size, read in entries(path):
        if (parsed := parse(file)) is None:
            continue
        split, name = parsed
        if name in seen:
            raise ValueError(f"the recording {name!r} is there twice; keep one copy")
        if size > most:
            raise ValueError(f"{file} has {size} bytes, more than {most}: too long a recording")
        seen.add(name)
        with naming(file):
            with decoding("a file of a folder or .zip archive"):
                content = read()
            yield split, name, _decode(content, rate)
    if not seen:
        raise ValueError(f"there are no recordings; expected {expected}")


def entries(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """List the files of a folder or ``.zip``: path, size, and a call that reads it in memory."""
    if path.is_dir():
        for file in filter(Path.is_file, sorted(path.rglob("*"))):
            yield file.relative_to(path.parent).as_posix(), file.stat().st_size, file.read_bytes
        return
    with decoding("a .zip archive"):
        archive = zipfile.ZipFile(path)
    with archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            yield info.filename, info.file_size, partial(archive.read, info)


def _decode(content: bytes, rate: int) -> np.ndarray:
    """Samples of a RIFF, FLAC or NIST SPHERE file, int16, shape (S,)."""
    soundfile = optional("soundfile", "audio")
    expected = f"16-bit mono audio at {rate} Hz, WAV, FLAC or NIST SPHERE"
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as audio:
            found = (audio.samplerate, audio.channels, audio.subtype)
            samples: np.ndarray = audio.read(dtype="int16")
    except Exception as error:  # libsndfile's, whose text names a buffer and not the file
        raise ValueError(
            f"it is not audio that libsndfile can read; expected {expected}; get the file again"
        ) from error
    if found != (rate, 1, "PCM_16"):
        raise ValueError(
            f"it has {found[0]} Hz, {found[1]} channel(s) and samples {found[2]}; expected "
            f"{expected}; convert it first"
        )
    if len(content) < (declared := _declared_bytes(content)):  # libsndfile returns what there is
        raise ValueError(
            f"it is cut short: {len(content)} bytes where its header declares {declared}; get "
            "the file again"
        )
    if not len(samples):
        raise ValueError("it holds no samples; remove the file")
    return samples


def _declared_bytes(content: bytes) -> int:
    """Size of the file by its own header; 0 where the header does not say."""
    if content[:4] == b"RIFF":
        return 8 + int.from_bytes(content[4:8], "little")
    count = re.search(rb"sample_count -i (\d+)", content[:1024])
    return 1024 + 2 * int(count[1]) if content[:4] == b"NIST" and count else 0
