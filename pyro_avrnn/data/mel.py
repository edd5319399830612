"""Log-mel frames of a waveform, a waveform to listen to from such frames, and their warp."""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from inference.protocols import at_least, counts
from pyro_avrnn.data._checks import Numbers, numbers, optional, waveform

_FLOOR = 1e-8  # above 1 % of the values of spoken digits


def log_mel(
    samples: Numbers,
    *,
    sample_rate: int = 8_000,
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


@dataclass(frozen=True, eq=False)
class MelWarp:
    """A warp of the mel axis, another for each piece, as ``augment`` of training batches.

    The spectrum moves as a shorter or longer vocal tract would move it: the voice changes, what is
    said does not. Band m of a piece becomes what lay at m times a factor, ``exp(u)`` with u
    uniform in (-limit, limit), between two bands by linear interpolation.

    Args:
        limit: of the logarithm of the factor; 0.18 is 20 %.
        mean, std: of the data set, (M,): pieces are standardised.

    Source: Jaitly and Hinton (2013), vocal tract length perturbation.

    Raises:
        ValueError: a limit below 0.
    """

    limit: float
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        at_least(0.0, limit=self.limit)

    def __call__(self, piece: Tensor, generator: torch.Generator) -> Tensor:
        """A piece ``(T, M)``, warped."""
        u = (2.0 * torch.rand((), generator=generator, dtype=torch.float64) - 1.0) * self.limit
        bands = piece.shape[-1]
        at = (torch.arange(bands, dtype=torch.float64) * u.exp()).clamp(max=bands - 1.0)
        low = at.long().clamp(max=bands - 2)
        share = (at - low).to(piece)
        raw = piece * self.std + self.mean
        warped = (1.0 - share) * raw[:, low] + share * raw[:, low + 1]
        return (warped - self.mean) / self.std


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
