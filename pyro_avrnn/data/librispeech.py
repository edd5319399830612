"""LibriSpeech, read English at 16 kHz, as frames of raw waveform.

The corpus has the layout of OpenSLR (``LibriSpeech/train-clean-100/READER/CHAPTER/
READER-CHAPTER-UTTERANCE.flac`` with ``SPEAKERS.TXT``), or it is a part of it in any folders with
the same names of files.

The splits share no reader. Where the folders say train, dev and test, they are the splits.
Otherwise readers are ordered by number, women and men apart where ``SPEAKERS.TXT`` is there: the
last fifth of each is for test, the fifth before for validation, the rest for training.

Origin: Panayotov et al. (2015), https://www.openslr.org/12. Licence: CC BY 4.0.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pyro_avrnn.data._audio import entries
from pyro_avrnn.data._checks import reading
from pyro_avrnn.data._speech import Corpus, Framing
from pyro_avrnn.data.dataset import Dataset

_EXPECTED = "a folder or .zip with files READER-CHAPTER-UTTERANCE.flac"
_FILE = re.compile(r"(?:.*/)?((\d+)-\d+-\d+)\.flac", re.IGNORECASE)
_FOLDER = re.compile(r"(?:^|.*/)(train|dev|test)-[a-z0-9-]+/", re.IGNORECASE)
_SPEAKER = re.compile(r"(\d+)-")
_SPLITS = {"train": "train", "dev": "valid", "test": "test"}


def librispeech(path: str | Path, **framing: Any) -> Dataset:
    """Read LibriSpeech or a part of it; X = ``frame`` samples of waveform.

    Args:
        path: a folder, or a ``.zip`` that is read in place.
        framing: as for :func:`timit`.

    Returns:
        As :func:`timit`.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, or a file is damaged or not
            16-bit mono audio at 16 kHz.
        ImportError: if soundfile is not installed.
    """
    framed = Framing(**framing)
    with reading(path, _EXPECTED, folder=True) as corpus:
        parse = partial(_parse, split_of=_splits(corpus))
        expected = (
            f"{_EXPECTED} of at least five readers of a sex, or the folders train-, dev- and test-"
        )
        origin = "LibriSpeech (c) 2014 by Vassil Panayotov, CC BY 4.0"
        return framed.read(corpus, Corpus("librispeech", parse, _SPEAKER, expected, origin))


def holds_librispeech(path: str | Path) -> bool:
    """Whether a folder or ``.zip`` has recordings named as in this corpus; never raises."""
    try:
        return any(_FILE.fullmatch(file) for file, *_ in entries(Path(path)))
    except Exception:  # a damaged archive: its reader raises the right error
        return False


def _parse(file: str, split_of: Callable[[str, str], str]) -> tuple[str, str] | None:
    """Split and name of an utterance, by its path."""
    match = _FILE.fullmatch(file)
    return None if match is None else (split_of(file, match[2]), match[1])


def _splits(corpus: Path) -> Callable[[str, str], str]:
    """The split of a file, given its path and reader."""
    readers, folders, sex = set(), set(), dict[str, str]()
    for file, _, read in entries(corpus):
        if match := _FILE.fullmatch(file):
            readers.add(match[2])
            folder = _FOLDER.match(file)
            folders.add(folder and folder[1].lower())
        elif file.upper().endswith("SPEAKERS.TXT"):
            lines = read().decode("utf-8", "replace").splitlines()
            fields = [line.split("|") for line in lines if not line.startswith(";")]
            sex = {f[0].strip(): f[1].strip() for f in fields if len(f) > 1}
    if folders == set(_SPLITS):
        return lambda file, reader: _SPLITS[str(_FOLDER.match(file)[1]).lower()]  # type: ignore[index]
    groups = defaultdict[str, list[str]](list)
    for reader in sorted(readers, key=int):
        groups[sex.get(reader, "")].append(reader)
    split_of: dict[str, str] = {}
    for group in groups.values():
        fifth = len(group) // 5
        test, valid = len(group) - fifth, len(group) - 2 * fifth
        for i, reader in enumerate(group):
            split_of[reader] = "test" if i >= test else "valid" if i >= valid else "train"
    return lambda file, reader: split_of[reader]
