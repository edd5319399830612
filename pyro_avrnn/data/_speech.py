"""Corpora of read speech as frames of raw waveform: what their readers share."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from inference.protocols import counts, given, one_of
from pyro_avrnn.data import companding
from pyro_avrnn.data._audio import recordings
from pyro_avrnn.data._checks import optional
from pyro_avrnn.data.dataset import SPLITS, Dataset, Piece, by_split, standardise
from pyro_avrnn.data.mel import MelWarp, log_mel

_WINDOWS, _HOPS = 40, 100  # a second, of log-mel frames: 25 ms, every 10 ms


class Corpus(NamedTuple):
    """What a reader knows of its corpus."""

    name: str
    parse: Callable[[str], tuple[str, str] | None]  # split and name of an utterance by its path
    speaker: re.Pattern[str] | None  # whose first group is the speaker in a name; None: shared
    expected: str  # what would fill every split, in words
    origin: str
    rate: int = 16_000  # hertz
    most: int = 64 * 2**20  # bytes of a file: half an hour; a hostile zip may hold more


@dataclass(frozen=True)
class Framing:
    """How utterances become sequences; the arguments that :func:`timit` documents."""

    frame: int = 200
    segment: int | None = 100
    whole: bool = False
    mu_law: int | None = None
    pcm: int | None = None
    n_mels: int | None = None
    warp: float | None = None

    def __post_init__(self) -> None:
        counts(1, frame=self.frame, **given(segment=self.segment, n_mels=self.n_mels))
        others = (self.mu_law, self.pcm, None if self.frame == 200 else self.frame)
        if self.n_mels is not None and others != (None, None, None):
            raise ValueError(
                "n_mels makes log-mel frames, of which frame, mu_law and pcm say nothing; leave "
                "them out"
            )
        if self.warp is not None and self.n_mels is None:
            raise ValueError("warp is for log-mel frames, not for waveforms; give n_mels")
        for name, bits in given(mu_law=self.mu_law, pcm=self.pcm).items():
            companding.check_bits(name, bits)
        if self.mu_law is not None and self.pcm is not None:
            raise ValueError("mu_law and pcm are two ways to code a sample; give one of them")

    def read(self, corpus: Path, of: Corpus) -> Dataset:
        """Read the utterances of a folder or archive."""
        if self.n_mels is not None:
            return self._log_mel(corpus, of, self.n_mels)
        pieces = list(self._segments(corpus, of))
        mean, std = (0.0, 1.0) if self.mu_law is not None else _statistics(pieces)
        if self.pcm is not None:
            mean = 0.0  # levels are symmetric

        def coded(samples: np.ndarray) -> np.ndarray:
            if self.mu_law is not None:
                return companding.mu_law(samples, self.mu_law)
            if self.pcm is not None:
                return (companding.pcm(samples, self.pcm) / np.float64(std)).astype(np.float32)
            return (samples - np.float32(mean)) / np.float32(std)

        found = ((split, name, coded(samples)) for split, name, samples in pieces)
        return Dataset(
            of.name,
            *by_split(found, of.expected),
            mean=mean,
            std=std,
            kind="mu-law"
            if self.mu_law is not None
            else "pcm"
            if self.pcm is not None
            else "real",
            frame_seconds=self.frame / of.rate,
            sample_rate=of.rate,
            origin=f"{corpus.name}: {of.origin}",
            bits=self.pcm if self.mu_law is None else self.mu_law,
        )

    def _log_mel(self, corpus: Path, of: Corpus, n_mels: int) -> Dataset:
        """Log-mel frames, standardised band by band."""
        pieces = self._segments(corpus, of)
        train, valid, test, mean, std = standardise(*by_split(pieces, of.expected, torch.float64))
        return Dataset(
            of.name,
            train,
            valid,
            test,
            mean=mean,
            std=std,
            frame_seconds=of.rate // _HOPS / of.rate,
            augment=None if self.warp is None else MelWarp(self.warp, mean, std),
            origin=f"{corpus.name}: {of.origin}",
        )

    def _frames(self, name: str, samples: np.ndarray, rate: int) -> np.ndarray:
        """Frames (T, X) of an utterance: int16, or log-mel values."""
        if self.n_mels is not None:
            sizes = {"window": 2 * (rate // _WINDOWS // 2), "hop": rate // _HOPS}
            return log_mel(samples / 32768.0, sample_rate=rate, n_mels=self.n_mels, **sizes)
        if len(samples) < self.frame:
            raise ValueError(
                f"{name} has {len(samples)} samples, fewer than one frame of {self.frame}; "
                "remove the file or take shorter frames"
            )
        return samples[: len(samples) // self.frame * self.frame].reshape(-1, self.frame)

    def _segments(self, corpus: Path, of: Corpus) -> Iterator[Piece]:
        """Split, name and frames (T, X) of each segment, in the order of the files."""
        split_of: dict[str, str] = {}
        for split, name, samples in recordings(corpus, of.parse, of.expected, of.rate, of.most):
            match = of.speaker and of.speaker.match(name)
            if match is not None and split_of.setdefault(match[1], split) != split:
                raise ValueError(
                    f"the speaker {match[1]!r} is in both {split_of[match[1]]} and {split}; the "
                    "splits must share no speaker"
                )
            frames = self._frames(name, samples, of.rate)
            uncut = self.segment is None or (self.whole and split == "train")
            step = len(frames) if uncut or self.segment is None else self.segment
            for start in range(0, len(frames), step):
                piece = frames[start : start + step]
                cut = f"[{start}:{start + len(piece)}]" if len(piece) < len(frames) else ""
                yield split, name + cut, piece


def flac_bits(data: Dataset, split: str = "test") -> float:
    """Bits a sample that FLAC, a codec without loss, needs for the waveforms of a split.

    Each recording is one file, whose header of some 8,000 bits counts, as users pay for it, too.

    Args:
        data: levels of samples, ``bits=16``; mu-law levels stand for the nearest sample.
        split: "train", "valid" or "test".

    Raises:
        ValueError: other data.
        ImportError: if soundfile is not installed.
    """
    one_of(SPLITS, split=split)
    if data.bits != 16 or data.sample_rate is None:
        raise ValueError("data must be speech as levels of 16 bits; read it with pcm=16")
    sequences = getattr(data, split)
    files: dict[str, list[np.ndarray]] = {}
    for i, name in enumerate(sequences.names):  # segments are in the order of the recording
        samples = data.samples(sequences.sequence(i)).reshape(-1)
        files.setdefault(name.split("[")[0], []).append(samples)
    soundfile = optional("soundfile", "audio")
    size = count = 0
    for parts in files.values():
        file, whole = io.BytesIO(), np.concatenate(parts)
        soundfile.write(file, whole, data.sample_rate, format="FLAC", subtype="PCM_16")
        size, count = size + len(file.getvalue()), count + len(whole)
    return 8 * size / count


def _statistics(pieces: list[Piece]) -> tuple[float, float]:
    """Mean and deviation of the training samples, from exact integer sums; 1 for silence."""
    train = [samples for split, _, samples in pieces if split == "train"]
    count = sum(samples.size for samples in train) or 1  # an empty split is refused later
    total = sum(int(samples.sum(dtype=np.int64)) for samples in train)
    squares = sum(int((samples.astype(np.int64) ** 2).sum()) for samples in train)
    return total / count, ((squares * count - total**2) ** 0.5 / count) or 1.0
