"""TIMIT speech as frames of raw waveform.

Read from a folder, or from a ``.zip`` in place, in either of two layouts: the sample that NLTK
distributes (``timit/dr1-fvmh0/sa1.wav``, 16 speakers) and the full corpus of the LDC
(``TRAIN/DR1/FVMH0/SA1.WAV``; upper or lower case). The frames of 200 samples and the global
standardisation follow Chung et al. (2015), https://arxiv.org/abs/1506.02216; segments are ours.
As mu-law levels instead, the samples follow Havtorn et al. (2022),
https://arxiv.org/abs/2202.12707.

The splits share no speaker. In the first layout dialect regions 1 to 6 are for training, 7 for
validation, 8 for test; in the LDC's, TEST is for test, region 8 of TRAIN for validation, the rest
of TRAIN for training. Every speaker reads the sentences ``sa1`` and ``sa2``: all splits have them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from pyro_avrnn.data import companding
from pyro_avrnn.data._files import members, naming
from pyro_avrnn.data.sequences import Dataset, Sequences

_EXPECTED = (
    "a folder or .zip with files dr1-SPEAKER/SENTENCE.wav or TRAIN/DR1/SPEAKER/SENTENCE.WAV"
)
_FLAT = re.compile(r"(?:.*/)?dr([1-8])-([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)
_LDC = re.compile(r"(?:.*/)?(train|test)/dr([1-8])/([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)
_RATE = 16_000
_MAX_BYTES = 64 * 2**20  # half an hour of audio: no utterance is that long, a hostile zip may be


class _Utterance(NamedTuple):
    split: str
    speaker: str
    name: str
    samples: np.ndarray  # int16, shape (S,)


def timit(
    path: str | Path,
    *,
    frame: int = 200,
    segment: int | None = 100,
    mu_law: int | None = None,
) -> Dataset:
    """Read TIMIT; X = ``frame`` samples of waveform, standardised by one mean and deviation.

    Args:
        path: a folder or a ``.zip`` in one of the two layouts above.
        frame: samples in a frame; the remainder of an utterance is dropped.
        segment: utterances are cut into segments of at most so many frames (the last one is
            shorter); None keeps them whole.
        mu_law: bits, from 1 to 16: samples become the levels of :func:`~.companding.mu_law`, not
            standardised, and the data are of kind "mu-law"; None keeps real numbers.

    Returns:
        ``mean`` and ``std`` are numbers in int16 units, over all training frames; 0 and 1 for
        levels.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, two splits share a speaker, or a
            file is damaged or not 16-bit mono audio at 16 kHz.
        ImportError: if soundfile is not installed.
    """
    for argument, value in (("frame", frame), ("segment", segment)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if mu_law is not None:
        companding.check_bits("mu_law", mu_law)
    path = Path(path)
    series: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for split, speaker, name, samples in _utterances(path):
        if name in seen:
            raise ValueError(f"{path} holds the utterance {name!r} twice; keep one copy")
        if split_of.setdefault(speaker, split) != split:
            raise ValueError(
                f"{path} has the speaker {speaker!r} in both {split_of[speaker]} and {split}; "
                "the splits must share no speaker"
            )
        seen.add(name)
        if len(samples) < frame:
            raise ValueError(
                f"{path}: {name} has {len(samples)} samples, fewer than one frame of {frame}; "
                "remove the file or take shorter frames"
            )
        frames = samples[: len(samples) // frame * frame].reshape(-1, frame)  # (T, X)
        step = segment or len(frames)
        for start in range(0, len(frames), step):
            piece = frames[start : start + step]
            series[split].append(piece)
            whole = len(piece) == len(frames)
            names[split].append(name if whole else f"{name}[{start}:{start + len(piece)}]")
    if not seen:
        raise ValueError(f"{path} holds no TIMIT audio; expected {_EXPECTED}")
    for split, pieces in series.items():
        if not pieces:
            raise ValueError(
                f"{path} has no utterances for the {split} split ({len(seen)} in all); expected "
                f"{_EXPECTED}, with all dialect regions"
            )
    mean, std = (0.0, 1.0) if mu_law is not None else _statistics(series["train"])

    def scaled(samples: np.ndarray) -> np.ndarray:
        if mu_law is not None:
            return companding.mu_law(samples, mu_law)
        standardised: np.ndarray = (samples - np.float32(mean)) / np.float32(std)
        return standardised

    with naming(path):
        train, valid, test = (
            Sequences.from_list(map(scaled, series[k]), names[k]) for k in series
        )
    return Dataset(
        "timit",
        train,
        valid,
        test,
        mean=mean,
        std=std,
        kind="real" if mu_law is None else "mu-law",
        frame_seconds=frame / _RATE,
        sample_rate=_RATE,
        origin=f"{path.name}: TIMIT acoustic-phonetic corpus, (c) 1993 Linguistic Data Consortium",
        bits=mu_law,
    )


def _statistics(pieces: list[np.ndarray]) -> tuple[float, float]:
    """Mean and deviation of int16 samples, from exact integer sums; deviation 1 for silence."""
    count = sum(p.size for p in pieces)
    total = sum(int(p.sum(dtype=np.int64)) for p in pieces)
    squares = sum(int((p.astype(np.int64) ** 2).sum()) for p in pieces)
    return total / count, ((squares * count - total**2) ** 0.5 / count) or 1.0


def _utterances(path: Path) -> Iterator[_Utterance]:
    """All utterances in the order of their names."""
    soundfile = _soundfile(path)
    not_so = "no utterance is that long; this is not TIMIT"
    for member, content in members(path, _is_audio, _EXPECTED, _MAX_BYTES, not_so):
        yield _Utterance(*_parse(member), _decode(soundfile, f"{path}: {member}", content))


def _soundfile(path: Path) -> ModuleType:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs soundfile: pip install pyro-avrnn[audio]"
        ) from error
    module: ModuleType = soundfile
    return module


def _is_audio(member: str) -> bool:
    return bool(_FLAT.fullmatch(member) or _LDC.fullmatch(member))


def _parse(member: str) -> tuple[str, str, str]:
    """Split, speaker and name of a member for which ``_is_audio`` holds."""
    if match := _LDC.fullmatch(member):
        part, region, speaker, sentence = (group.lower() for group in match.groups())
        split = "test" if part == "test" else "valid" if region == "8" else "train"
    else:
        match = _FLAT.fullmatch(member)
        assert match is not None
        region, speaker, sentence = (group.lower() for group in match.groups())
        split = {"7": "valid", "8": "test"}.get(region, "train")
    return split, speaker, f"dr{region}-{speaker}/{sentence}"


def _decode(soundfile: ModuleType, where: str, content: bytes) -> np.ndarray:
    """Samples of a RIFF or NIST SPHERE file, int16, shape (S,)."""
    expected = "16-bit mono audio at 16 kHz, WAV or NIST SPHERE"
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as audio:
            found = (audio.samplerate, audio.channels, audio.subtype)
            samples: np.ndarray = audio.read(dtype="int16")
    except Exception as error:  # libsndfile's, whose text names a buffer and not the file
        raise ValueError(
            f"{where} is not audio that libsndfile can read; expected {expected}, so get the file "
            "again"
        ) from error
    if found != (_RATE, 1, "PCM_16"):
        raise ValueError(
            f"{where} has {found[0]} Hz, {found[1]} channel(s) and samples {found[2]}; expected "
            f"{expected}, so convert it first"
        )
    if len(content) < _declared_bytes(content):  # libsndfile would return what there is
        raise ValueError(
            f"{where} is cut short: {len(content)} bytes where its header declares "
            f"{_declared_bytes(content)}; get the file again"
        )
    return samples


def _declared_bytes(content: bytes) -> int:
    """Size of the file by its own header; 0 where the header does not say."""
    if content[:4] == b"RIFF":
        return 8 + int.from_bytes(content[4:8], "little")
    count = re.search(rb"sample_count -i (\d+)", content[:1024])
    return 1024 + 2 * int(count[1]) if content[:4] == b"NIST" and count else 0
