"""Spoken digits as log-mel frames: the Free Spoken Digit Dataset (FSDD).

Six speakers say 0 to 9 fifty times each: 3,000 recordings
``recordings/{digit}_{speaker}_{take}.wav``, 8 kHz, one channel, 16 bit, read from a folder or
from a ``.zip`` in place. Takes 0 to 4 are the official test set; that takes 5 to 9 are for
validation is our choice. The splits share speakers and digits, not recordings.

A frame is ``log(mel power + 1e-8)``, the natural logarithm, of samples in [-1, 1]. The floor is
some forty times the mel power that rounding to 16 bit leaves in silence: it bounds the logarithm
where a recording is digitally silent, and lies above 1 % of the values of this set.

Origin: https://github.com/Jakobovski/free-spoken-digit-dataset. Licence: CC BY-SA 4.0.
"""

from __future__ import annotations

import io
import re
import warnings
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pyro_avrnn.data._files import members, naming, unreadable
from pyro_avrnn.data.sequences import Dataset, Sequences, standardise

_EXPECTED = "a folder or .zip with files recordings/DIGIT_SPEAKER_TAKE.wav"
_NAME = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]{1,4})")
_FILE = re.compile(rf"(?:.*/)?({_NAME.pattern})\.wav", re.IGNORECASE)
_RATE = 8_000
_MAX_BYTES = 2**20  # a minute of audio: no digit is that long, a member of a hostile zip may be
_FLOOR = 1e-8


def spoken_digits(
    path: str | Path, *, n_mels: int = 40, window: int = 256, hop: int = 128
) -> Dataset:
    """Read FSDD; X = ``n_mels`` log-mel values, each standardised by the training frames.

    Training is takes 10 to 49, validation 5 to 9, test 0 to 4 of each digit and speaker. Names
    are "DIGIT_SPEAKER_TAKE"; :func:`labels` reads them.

    Args:
        path: a folder or a ``.zip`` with the recordings.
        n_mels: mel bands from 0 to 4 kHz.
        window: samples under one frame; 256 are 32 ms.
        hop: samples from one frame to the next; 128 are 16 ms.

    Returns:
        ``mean`` and ``std`` are (X,); ``x * std + mean`` is what :func:`log_mel` gave.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, a recording is there twice, or a
            file is damaged or not 16-bit audio of one channel at 8 kHz.
        ImportError: if librosa is not installed.
    """
    bank = _bank(_RATE, window, hop, n_mels)
    path = Path(path)
    series: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for name, where, content in sorted(_recordings(path)):
        if name in seen:
            raise ValueError(f"{path} holds the recording {name!r} twice; keep one copy")
        seen.add(name)
        take = int(name.split("_")[2])
        split = "test" if take < 5 else "valid" if take < 10 else "train"
        series[split].append(_log_mel(_decode(where, content), bank, window, hop))
        names[split].append(name)
    if not seen:
        raise ValueError(f"{path} holds no spoken digits; expected {_EXPECTED}")
    for split, pieces in series.items():
        if not pieces:
            raise ValueError(
                f"{path} has no recordings for the {split} split ({len(seen)} in all); expected "
                "takes 0 to 4 for test, 5 to 9 for validation and others for training"
            )
    with naming(path):
        splits = standardise(
            *(Sequences.from_list(series[k], names[k], dtype=torch.float64) for k in series)
        )
    return Dataset(
        "digits",
        *splits,
        kind="real",
        frame_seconds=hop / _RATE,
        sample_rate=None,
        origin=f"{path.name}: Free Spoken Digit Dataset, "
        "https://github.com/Jakobovski/free-spoken-digit-dataset. Licence: CC BY-SA 4.0",
    )


def holds_digits(path: str | Path) -> bool:
    """Whether a folder or ``.zip`` has recordings named as this data set's are; never raises."""
    path = Path(path)
    try:
        if path.is_dir():
            return any(_FILE.fullmatch(file.name) for file in path.rglob("*.wav"))
        with zipfile.ZipFile(path) as archive:
            return any(_FILE.fullmatch(name) for name in archive.namelist())
    except Exception:  # of a damaged archive: its reader says so
        return False


def labels(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Who says what, from the names.

    Args:
        sequences: a split of :func:`spoken_digits`, or some of it.

    Returns:
        The digits, integers (N,), and the speakers, strings (N,).

    Raises:
        ValueError: if a name is not "DIGIT_SPEAKER_TAKE".

    Example:
        >>> data = Sequences.from_list([[[0.0]], [[1.0]]], ["7_theo_0", "3_lucas_12"])
        >>> digits, speakers = labels(data)
        >>> digits.tolist(), speakers.tolist()
        ([7, 3], ['theo', 'lucas'])
    """
    parts = []
    for name in sequences.names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"sequences must have names DIGIT_SPEAKER_TAKE, as spoken_digits gives them, got "
                f"{name!r}"
            )
        parts.append(match.groups())
    return np.array([int(digit) for digit, _, _ in parts]), np.array([who for _, who, _ in parts])


def log_mel(
    samples: Any, *, sample_rate: int = _RATE, n_mels: int = 40, window: int = 256, hop: int = 128
) -> np.ndarray:
    """Log-mel frames of a waveform, ``log(mel power + 1e-8)``.

    Frame t is centred on sample ``hop * t`` (Hann window; silence before and after the
    recording), so that S samples give ``1 + S // hop`` frames, also where S is less than a window.
    The bands are those of Slaney's Auditory Toolbox, of unit area in hertz, from 0 to half the
    sample rate.

    Args:
        samples: shape (S,), in [-1, 1], S at least 1.
        sample_rate: in hertz.
        n_mels: M, the number of bands.
        window: samples under one frame; even.
        hop: samples from one frame to the next.

    Returns:
        Shape (1 + S // hop, M), float64.

    Raises:
        ValueError: if the samples are not (S,) finite numbers, or the sizes do not fit together.
        ImportError: if librosa is not installed.
    """
    bank = _bank(sample_rate, window, hop, n_mels)
    return _log_mel(_numbers("samples", samples, ("S",)), bank, window, hop)


def mel_to_waveform(
    frames: Any,
    *,
    sample_rate: int = _RATE,
    window: int = 256,
    hop: int = 128,
    iterations: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """A waveform whose log-mel frames are nearly ``frames``, to be listened to.

    The power at each frequency is the non-negative least-squares fit to the bands; the phases,
    which the bands do not hold, are found by Griffin and Lim's iterations. Frames of a data set
    are brought back to log-mel units first: ``mel_to_waveform(x * data.std + data.mean)``.

    Args:
        frames: shape (T, M), as :func:`log_mel` gives them, T at least 2. Values above what a
            sine of amplitude 1 can reach are lowered to it, as a model may draw any number.
        sample_rate: in hertz.
        window: samples under one frame.
        hop: samples from one frame to the next; at most half a window, else samples are lost.
        iterations: of the search for phases.
        seed: of the phases it starts from.

    Returns:
        ``hop * (T - 1)`` samples, float32; they may leave [-1, 1] a little.

    Raises:
        ValueError: if the frames are not (T, M) finite numbers, or the sizes do not fit together.
        ImportError: if librosa is not installed.

    Source: Griffin and Lim (1984), https://doi.org/10.1109/TASSP.1984.1164317.
    """
    frames = _numbers("frames", frames, ("T", "M"))
    if len(frames) < 2:
        raise ValueError(f"frames must hold at least 2 frames of shape (T, M), got {frames.shape}")
    if hop > window // 2:
        raise ValueError(f"hop must be at most half the window of {window} samples, got {hop}")
    for argument, value, least in (("iterations", iterations, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    bank = _bank(sample_rate, window, hop, frames.shape[1])
    librosa = _librosa()
    loudest = (window / 2) ** 2 * bank.sum(axis=1)  # the Hann window sums to half its length
    power = np.maximum(np.minimum(np.exp(np.minimum(frames, 100.0)), loudest) - _FLOOR, 0.0)
    spectrum = np.sqrt(librosa.util.nnls(bank, power.T))  # (F, T)
    waveform: np.ndarray = librosa.griffinlim(
        spectrum,
        n_iter=iterations,
        hop_length=hop,
        win_length=window,
        n_fft=window,
        length=hop * (len(frames) - 1),
        random_state=seed,
    )
    return waveform.astype(np.float32)


def _librosa() -> ModuleType:
    try:
        import librosa
    except ImportError as error:
        raise ImportError("log-mel frames need librosa: pip install pyro-avrnn[audio]") from error
    module: ModuleType = librosa
    return module


def _bank(sample_rate: int, window: int, hop: int, n_mels: int) -> np.ndarray:
    """The mel bands, one row each, shape (M, 1 + window // 2), float64."""
    for argument, value, least in (
        ("sample_rate", sample_rate, 1),
        ("n_mels", n_mels, 1),
        ("window", window, 2),
        ("hop", hop, 1),
    ):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    if window % 2:
        raise ValueError(f"window must be an even number of samples, got {window}")
    librosa = _librosa()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on empty bands: the sentence below says it
        bank: np.ndarray = librosa.filters.mel(
            sr=sample_rate, n_fft=window, n_mels=n_mels, dtype=np.float64
        )
    empty = (bank == 0).all(axis=1)
    if empty.any():
        raise ValueError(
            f"n_mels must leave each band a frequency, got {n_mels} bands, of which "
            f"{int(empty.sum())} are empty with a window of {window} samples at {sample_rate} Hz; "
            "take fewer bands or a longer window"
        )
    return bank


def _log_mel(samples: np.ndarray, bank: np.ndarray, window: int, hop: int) -> np.ndarray:
    """Frames (T, M) of samples (S,); the bank comes from outside since thousands share it."""
    padded = np.pad(samples, window // 2)  # here, as librosa warns where S is less than a window
    spectrum = _librosa().stft(padded, n_fft=window, hop_length=hop, center=False)  # (F, T)
    frames: np.ndarray = np.log(bank @ np.abs(spectrum) ** 2 + _FLOOR).T
    return frames


def _numbers(argument: str, value: Any, letters: tuple[str, ...]) -> np.ndarray:
    """A tensor or an array as finite float64, with one dimension for each of ``letters``."""
    array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold real numbers, got an array of {array.dtype}")
    if array.ndim != len(letters) or 0 in array.shape:
        expected = ", ".join(letters) + ("," if len(letters) == 1 else "")
        raise ValueError(f"{argument} must have shape ({expected}), not empty, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{argument} must be finite, got a NaN or an infinity; repair it first")
    return array.astype(np.float64)


def _recordings(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Name, where it lies, and content of each recording."""
    not_so = "no spoken digit is that long; this is not the Free Spoken Digit Dataset"
    wanted = _FILE.fullmatch
    for member, content in members(path, lambda m: bool(wanted(m)), _EXPECTED, _MAX_BYTES, not_so):
        match = wanted(member)
        assert match is not None
        yield match[1].lower(), f"{path}: {member}", content


def _decode(where: str, content: bytes) -> np.ndarray:
    """Samples in [-1, 1), float64, shape (S,)."""
    expected = "16-bit audio of one channel at 8000 Hz in a WAV file"
    try:
        with wave.open(io.BytesIO(content)) as audio:
            channels, width, rate, declared = audio.getparams()[:4]
            data = audio.readframes(declared)
    except Exception as error:  # of wave, struct, or an end of file without a word
        raise unreadable(where, expected, error) from error
    if (channels, width, rate) != (1, 2, _RATE):
        raise ValueError(
            f"{where} has {rate} Hz, {channels} channel(s) and {8 * width} bit; expected "
            f"{expected}, so convert it first"
        )
    if len(data) != 2 * declared:  # wave returns what there is
        raise ValueError(
            f"{where} is cut short: {len(data) // 2} samples where its header declares {declared};"
            " get the file again"
        )
    if not data:
        raise ValueError(f"{where} holds no samples; remove the file")
    return np.frombuffer(data, "<i2") / 32768.0
