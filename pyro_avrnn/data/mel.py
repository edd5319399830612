"""Log-mel frames of a waveform, and a waveform of log-mel frames.

A frame is ``log(mel power + 1e-8)``, the natural logarithm, of samples in [-1, 1]. The floor is
about forty times the mel power that rounding to 16 bits leaves in silence. It bounds the
logarithm where a recording is digitally silent.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np

from pyro_avrnn.data._checks import Numbers, at_least, numbers
from pyro_avrnn.data._files import optional

_FLOOR = 1e-8


def log_mel(
    samples: Numbers,
    *,
    sample_rate: int = 8_000,
    n_mels: int = 40,
    window: int = 256,
    hop: int = 128,
) -> np.ndarray:
    """Log-mel frames of a waveform, ``log(mel power + 1e-8)``.

    Frame t is centred on sample ``hop * t`` (Hann window; silence before and after the
    recording), so S samples give ``1 + S // hop`` frames, even where S is less than a window.
    The bands are those of Slaney's Auditory Toolbox, of unit area in hertz, from 0 to half the
    sample rate.

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
    bank = _bands(sample_rate, window, hop, n_mels)
    # padded here, since librosa warns where S is less than a window
    padded = np.pad(numbers("samples", samples, "S").astype(np.float64), window // 2)
    librosa = optional("librosa", "audio")
    spectrum = librosa.stft(padded, n_fft=window, hop_length=hop, center=False)  # (F, T)
    frames: np.ndarray = np.log(bank @ np.abs(spectrum) ** 2 + _FLOOR).T
    return frames


def mel_to_waveform(
    frames: Numbers,
    *,
    sample_rate: int = 8_000,
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
    if hop > window // 2:
        raise ValueError(f"hop must be at most half the window of {window} samples, got {hop}")
    at_least(1, iterations=iterations)
    at_least(0, seed=seed)
    bank = _bands(sample_rate, window, hop, frames.shape[1])
    librosa = optional("librosa", "audio")
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


@lru_cache(maxsize=8)
def _bands(sample_rate: int, window: int, hop: int, n_mels: int) -> np.ndarray:
    """Weights of the mel bands, shape (M, 1 + window // 2), float64."""
    at_least(1, sample_rate=sample_rate, n_mels=n_mels, hop=hop)
    at_least(2, window=window)
    if window % 2:
        raise ValueError(f"window must be an even number of samples, got {window}")
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
