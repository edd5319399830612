"""Spoken digits as log-mel frames or waveforms: the Free Spoken Digit Dataset (FSDD).

Six speakers say 0 to 9 fifty times each: 3,000 recordings
``recordings/{digit}_{speaker}_{take}.wav``, 8 kHz, one channel, 16 bits.

Origin: https://github.com/Jakobovski/free-spoken-digit-dataset. Licence: CC BY-SA 4.0.
"""

import re
import warnings
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from inference.protocols import counts
from pyro_avrnn.data._audio import entries, recordings
from pyro_avrnn.data._checks import Numbers, numbers, optional, reading, waveform
from pyro_avrnn.data._speech import Corpus, Framing
from pyro_avrnn.data.dataset import Dataset, by_split, groups_of_names, standardise
from pyro_avrnn.data.sequences import Sequences

_EXPECTED = "a folder or .zip with files recordings/DIGIT_SPEAKER_TAKE.wav"
_NAME = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]{1,4})")
_FILE = re.compile(rf"(?:.*/)?({_NAME.pattern})\.wav", re.IGNORECASE)
_RATE = 8_000
_FLOOR = 1e-8  # above 1 % of the values of this set
_MAX_BYTES = 2**20  # a minute of audio: no digit is that long, a member of a hostile zip may be


def spoken_digits(
    path: str | Path,
    *,
    n_mels: int = 40,
    window: int = 256,
    hop: int = 128,
    frame: int | None = None,
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

    Returns:
        ``mean`` and ``std`` are (X,); ``x * std + mean`` is what :func:`log_mel` returns. For
        waveforms they are numbers, in int16 units.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, a recording is there twice, or a
            file is damaged or not 16-bit audio of one channel at 8 kHz.
        ImportError: if librosa or soundfile is not installed.
    """
    if frame is not None:
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
    origin = f"{corpus.name}: {_ORIGIN}"
    return Dataset("digits", *standardised, frame_seconds=hop / _RATE, origin=origin)


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


def labels(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Read digit and speaker of each sequence from its name.

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
    parts = groups_of_names(sequences, _NAME, "DIGIT_SPEAKER_TAKE, as spoken_digits gives them")
    return np.array([int(digit) for digit, _, _ in parts]), np.array([who for _, who, _ in parts])


def log_mel(
    samples: Numbers,
    *,
    sample_rate: int = _RATE,
    n_mels: int = 40,
    window: int = 256,
    hop: int = 128,
) -> np.ndarray:
    """Compute log-mel frames of a waveform, ``log(mel power + 1e-8)``, the natural logarithm.

    The floor of 1e-8, about forty times the mel power that rounding to 16 bits leaves in silence,
    bounds the logarithm where a recording is digitally silent. Frame t is centred on sample
    ``hop * t`` (Hann window; silence before and after the recording), so S samples give
    ``1 + S // hop`` frames, even where S is less than a window. The bands are those of Slaney's
    Auditory Toolbox, of unit area in hertz, from 0 to half the sample rate.

    Args:
        samples: shape (S,), in [-1, 1], S at least 1.
        sample_rate: in hertz.
        n_mels: M, the number of bands.
        window: samples in a frame; even.
        hop: samples from one frame to the next.

    Returns:
        Shape (1 + S // hop, M), float64.

    Raises:
        ValueError: if the samples are not (S,) finite numbers, or the sizes do not fit together.
        ImportError: if librosa is not installed.
    """
    _check_sizes(sample_rate, window, hop, n_mels)
    bank = _bands(sample_rate, window, hop, n_mels)
    # padded here, since librosa warns where S is less than a window
    padded = np.pad(waveform(samples), window // 2)
    librosa = optional("librosa", "audio")
    spectrum = librosa.stft(padded, n_fft=window, hop_length=hop, center=False)  # (F, T)
    return np.log(bank @ np.abs(spectrum) ** 2 + _FLOOR).T


def mel_to_waveform(
    frames: Numbers,
    *,
    sample_rate: int = _RATE,
    window: int = 256,
    hop: int = 128,
    iterations: int = 32,
    seed: int = 0,
) -> np.ndarray:
    """Find a waveform to listen to whose log-mel frames are nearly ``frames``.

    The power at each frequency is the non-negative least-squares fit to the bands. The bands do
    not hold phases; Griffin and Lim's iterations find some. Bring frames of a data set back to
    log-mel units first: ``mel_to_waveform(x * data.std + data.mean)``.

    Args:
        frames: shape (T, M), as :func:`log_mel` returns, T at least 2. Values above what a sine
            of amplitude 1 can reach are lowered to it, since a model may draw any number.
        sample_rate: in hertz.
        window: samples in a frame.
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
    frames = numbers("frames", frames, "TM").astype(np.float64)
    if len(frames) < 2:
        raise ValueError(f"frames must hold at least 2 frames of shape (T, M), got {frames.shape}")
    _check_sizes(sample_rate, window, hop, frames.shape[1])
    if hop > window // 2:
        raise ValueError(f"hop must be at most half the window of {window} samples, got {hop}")
    counts(1, iterations=iterations)
    counts(0, seed=seed)
    bank = _bands(sample_rate, window, hop, frames.shape[1])
    librosa = optional("librosa", "audio")
    loudest = (window / 2) ** 2 * bank.sum(axis=1)  # the Hann window sums to half its length
    power = np.maximum(np.minimum(np.exp(np.minimum(frames, 100.0)), loudest) - _FLOOR, 0.0)
    spectrum = np.sqrt(librosa.util.nnls(bank, power.T))  # (F, T)
    found: np.ndarray = librosa.griffinlim(
        spectrum,
        n_iter=iterations,
        hop_length=hop,
        win_length=window,
        n_fft=window,
        length=hop * (len(frames) - 1),
        random_state=seed,
    )
    return found.astype(np.float32)


def _check_sizes(sample_rate: int, window: int, hop: int, n_mels: int) -> None:
    counts(1, sample_rate=sample_rate, n_mels=n_mels, hop=hop)
    counts(2, window=window)
    if window % 2:
        raise ValueError(f"window must be an even number of samples, got {window}")


@lru_cache(maxsize=8)
def _bands(sample_rate: int, window: int, hop: int, n_mels: int) -> np.ndarray:
    """Weights of the mel bands, shape (M, 1 + window // 2), float64."""
    librosa = optional("librosa", "audio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on empty bands, which are refused below
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
