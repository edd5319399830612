"""TIMIT speech as frames of raw waveform.

The corpus has one of two layouts: the sample that NLTK distributes (``timit/dr1-fvmh0/sa1.wav``,
16 speakers) or the full corpus of the LDC (``TRAIN/DR1/FVMH0/SA1.WAV``; upper or lower case).
Frames of 200 samples and the global standardisation follow Chung et al. (2015),
https://arxiv.org/abs/1506.02216; segments are ours. Mu-law levels follow Havtorn et al. (2022),
https://arxiv.org/abs/2202.12707.

The splits share no speaker. In the first layout dialect regions 1 to 6 are for training, 7 for
validation, 8 for test. In the LDC's, TEST is for test, region 8 of TRAIN for validation, the rest
of TRAIN for training. Every speaker reads the sentences ``sa1`` and ``sa2``: all splits have them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from inference.protocols import counts, given
from pyro_avrnn.data import companding
from pyro_avrnn.data._audio import recordings
from pyro_avrnn.data._checks import reading
from pyro_avrnn.data.dataset import Dataset, Piece, by_split

_EXPECTED = (
    "a folder or .zip with files dr1-SPEAKER/SENTENCE.wav or TRAIN/DR1/SPEAKER/SENTENCE.WAV"
)
_FLAT = re.compile(r"(?:.*/)?dr([1-8])-([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)
_LDC = re.compile(r"(?:.*/)?(train|test)/dr([1-8])/([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)
_RATE = 16_000
_MAX_BYTES = 64 * 2**20  # half an hour of audio: no utterance is that long, a hostile zip may be


def timit(
    path: str | Path, *, frame: int = 200, segment: int | None = 100, mu_law: int | None = None
) -> Dataset:
    """Read TIMIT; X = ``frame`` samples of waveform, standardised by one mean and deviation.

    Args:
        path: a folder, or a ``.zip`` that is read in place.
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
    counts(1, frame=frame, **given(segment=segment))
    if mu_law is not None:
        companding.check_bits("mu_law", mu_law)
    with reading(path, _EXPECTED, folder=True) as corpus:
        pieces = list(_segments(corpus, frame, segment))
        mean, std = (0.0, 1.0) if mu_law is not None else _statistics(pieces)

        def scaled(samples: np.ndarray) -> np.ndarray:
            if mu_law is not None:
                return companding.mu_law(samples, mu_law)
            return (samples - np.float32(mean)) / np.float32(std)

        found = ((split, name, scaled(samples)) for split, name, samples in pieces)
        splits = by_split(found, f"{_EXPECTED}, all dialect regions")
    return Dataset(
        "timit",
        *splits,
        mean=mean,
        std=std,
        kind="real" if mu_law is None else "mu-law",
        frame_seconds=frame / _RATE,
        sample_rate=_RATE,
        origin=f"{corpus.name}: TIMIT acoustic-phonetic corpus, "
        "(c) 1993 Linguistic Data Consortium",
        bits=mu_law,
    )


def _segments(corpus: Path, frame: int, segment: int | None) -> Iterator[Piece]:
    """Split, name and frames (T, X), int16, of each segment, in the order of the files."""
    split_of: dict[str, str] = {}
    for split, name, samples in recordings(corpus, _parse, _EXPECTED, _RATE, _MAX_BYTES):
        speaker = name.split("-")[1].split("/")[0]
        if split_of.setdefault(speaker, split) != split:
            raise ValueError(
                f"the speaker {speaker!r} is in both {split_of[speaker]} and {split}; the splits "
                "must share no speaker"
            )
        if len(samples) < frame:
            raise ValueError(
                f"{name} has {len(samples)} samples, fewer than one frame of {frame}; remove the "
                "file or take shorter frames"
            )
        frames = samples[: len(samples) // frame * frame].reshape(-1, frame)  # (T, X)
        step = segment or len(frames)
        for start in range(0, len(frames), step):
            piece = frames[start : start + step]
            whole = len(piece) == len(frames)
            yield split, name if whole else f"{name}[{start}:{start + len(piece)}]", piece


def _statistics(pieces: list[Piece]) -> tuple[float, float]:
    """Mean and deviation of the training samples, from exact integer sums; 1 for silence."""
    train = [samples for split, _, samples in pieces if split == "train"]
    count = sum(samples.size for samples in train) or 1  # an empty split is refused later
    total = sum(int(samples.sum(dtype=np.int64)) for samples in train)
    squares = sum(int((samples.astype(np.int64) ** 2).sum()) for samples in train)
    return total / count, ((squares * count - total**2) ** 0.5 / count) or 1.0


def _parse(file: str) -> tuple[str, str] | None:
    """Split and name of an utterance, by its path."""
    if match := _LDC.fullmatch(file):
        part, region, speaker, sentence = (group.lower() for group in match.groups())
        split = "test" if part == "test" else "valid" if region == "8" else "train"
    elif match := _FLAT.fullmatch(file):
        region, speaker, sentence = (group.lower() for group in match.groups())
        split = {"7": "valid", "8": "test"}.get(region, "train")
    else:
        return None
    return split, f"dr{region}-{speaker}/{sentence}"
