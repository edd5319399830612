"""Spoken digits as log-mel frames or waveforms: the Free Spoken Digit Dataset (FSDD).

Six speakers say 0 to 9 fifty times each: 3,000 recordings
``recordings/{digit}_{speaker}_{take}.wav``, 8 kHz, one channel, 16 bits.

Origin: https://github.com/Jakobovski/free-spoken-digit-dataset. Licence: CC BY-SA 4.0.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyro_avrnn.data._audio import entries, recordings
from pyro_avrnn.data._checks import reading
from pyro_avrnn.data._speech import Corpus, Framing
from pyro_avrnn.data.dataset import Dataset, by_split, standardise
from pyro_avrnn.data.mel import MelWarp, log_mel
from pyro_avrnn.data.strings import NAME, digit_strings, numbers_between

_EXPECTED = "a folder or .zip with files recordings/DIGIT_SPEAKER_TAKE.wav"
_FILE = re.compile(rf"(?:.*/)?({NAME.pattern})\.wav", re.IGNORECASE)
_RATE = 8_000
_MAX_BYTES = 2**20  # a minute of audio: no digit is that long, a member of a hostile zip may be


def spoken_digits(
    path: str | Path,
    *,
    n_mels: int = 40,
    window: int = 256,
    hop: int = 128,
    frame: int | None = None,
    warp: float | None = None,
    strings: str | None = None,
) -> Dataset:
    """Read FSDD; X = ``n_mels`` log-mel values, each standardised by the training frames.

    With ``frame`` X is that many samples of waveform, standardised by one mean and deviation.

    Training is takes 10 to 49, validation 5 to 9 (our choice), test 0 to 4 (the official set) of
    each digit and speaker: the splits share speakers and digits, not recordings. Names are
    "DIGIT_SPEAKER_TAKE"; :func:`labels` reads them.

    Args:
        path: a folder, or a ``.zip`` that is read in place.
        n_mels: mel bands from 0 to 4 kHz.
        window: samples in a frame; 256 are 32 ms.
        hop: samples from one frame to the next; 128 are 16 ms.
        frame: samples in a frame of waveform, which the three before say nothing of; the
            remainder of a recording is dropped.
        warp: limit of a :class:`~.mel.MelWarp` of log-mel frames, for ``augment`` of batches.
        strings: join recordings of a speaker to strings, of "3-5" digits for instance, as
            :func:`~.strings.digit_strings` does; each recording is in two of them.

    Returns:
        ``mean`` and ``std`` are (X,); ``x * std + mean`` is what :func:`log_mel` returns. For
        waveforms they are numbers, in int16 units.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, a recording is there twice, or a
            file is damaged or not 16-bit audio of one channel at 8 kHz.
        ImportError: if librosa or soundfile is not installed.
    """
    if strings is not None:
        single = spoken_digits(path, n_mels=n_mels, window=window, hop=hop, frame=frame, warp=warp)
        return digit_strings(single, *numbers_between(strings), repeats=2)
    if frame is not None:
        if warp is not None:
            raise ValueError("warp is for log-mel frames, not for waveforms; leave out frame")
        with reading(path, _EXPECTED, folder=True) as corpus:
            return Framing(frame, segment=None).read(corpus, _WAVES)
    frames_of = partial(log_mel, sample_rate=_RATE, n_mels=n_mels, window=window, hop=hop)
    with reading(path, _EXPECTED, folder=True) as corpus:
        found = recordings(corpus, _parse, _EXPECTED, _RATE, _MAX_BYTES)
        pieces = (
            (split, name, frames_of(samples / 32768.0))
            for split, name, samples in sorted(found, key=lambda recording: recording[1])
        )
        standardised = standardise(*by_split(pieces, _TAKES, torch.float64))
    augment = None if warp is None else MelWarp(warp, *standardised[3:])
    about: dict[str, Any] = {"frame_seconds": hop / _RATE, "origin": f"{corpus.name}: {_ORIGIN}"}
    return Dataset("digits", *standardised, augment=augment, **about)


def _parse(file: str) -> tuple[str, str] | None:
    """Split and name of a recording, by its path."""
    match = _FILE.fullmatch(file)
    if match is None:
        return None
    take = int(match[4])
    return "test" if take < 5 else "valid" if take < 10 else "train", match[1].lower()


_TAKES = "takes 0 to 4 for test, 5 to 9 for validation and others for training"
_ORIGIN = (
    "Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset. "
    "Licence: CC BY-SA 4.0"
)
_WAVES = Corpus("digits", _parse, None, _TAKES, _ORIGIN, _RATE, _MAX_BYTES)


def holds_digits(path: str | Path) -> bool:
    """Whether a folder or ``.zip`` has recordings named as in this data set; never raises."""
    try:
        return any(_parse(file) for file, *_ in entries(Path(path)))
    except Exception:  # a damaged archive: its reader raises the right error
        return False
