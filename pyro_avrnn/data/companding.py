"""16-bit samples as levels and back: linear ones, and mu-law's, dense where speech is quiet.

Mu-law: samples divided by 32,768 are bent by ``F(y) = sign(y) ln(1 + mu |y|) / ln(1 + mu)`` with
``mu = 2^bits - 1``, and (-1, 1) is cut into 2^bits equal cells. Data are the centres of cells.

Source: Havtorn et al. (2022), https://arxiv.org/abs/2202.12707 ("16-bit mu-law"). Their grid has
2^bits points from -1 to 1, both ends included. Ours has the centres of cells, so no cell is
halved.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_avrnn.data._checks import Numbers, plain

_LEAST, _MOST = -(2**15), 2**15 - 1


def mu_law(samples: ArrayLike, bits: int = 16) -> np.ndarray:
    """Convert samples to levels.

    At 16 bits the 65,536 values of a sample use 20,127 of the 65,536 cells. Each value within
    3,019 of 0 has its own cell, and most cells around 0 are empty (1 is 3,245 cells from 0).
    Values farther out share cells, 11 or 12 to a cell at the ends.

    Args:
        samples: integers from -32,768 to 32,767, any shape; whole floating numbers will do.
        bits: from 1 to 16.

    Returns:
        Centres of cells, ``(2k + 1) / 2^bits - 1``, float32, the same shape; all are exact.

    Raises:
        ValueError: samples that are not such integers, or bits out of range.

    Example:
        >>> mu_law([-32768, 0, 32767], bits=8).tolist()
        [-0.99609375, 0.00390625, 0.99609375]
    """
    check_bits("bits", bits)
    return _centres(bits)[_integers(samples) - _LEAST]


def pcm(samples: ArrayLike, bits: int = 16) -> np.ndarray:
    """Convert samples to linear levels, all of which occur in recordings.

    Args:
        samples: integers from -32,768 to 32,767, any shape; whole floating numbers will do.
        bits: from 1 to 16; fewer than 16 drop the last bits of a sample.

    Returns:
        Middles of cells of 2^(16 - bits) samples, in units of a sample, float64, the same shape:
        the sample and a half at 16 bits.

    Raises:
        ValueError: samples that are not such integers, or bits out of range.

    Example:
        >>> pcm([-32768, 0, 32767]).tolist()
        [-32767.5, 0.5, 32767.5]
    """
    check_bits("bits", bits)
    size = 2 ** (16 - bits)
    return (_integers(samples) // size + 0.5) * size


def pcm_decode(x: Numbers, bits: int = 16) -> np.ndarray:
    """Convert linear levels to samples: the inverse of :func:`pcm`, to the middle of a cell.

    Args:
        x: numbers, any shape, an array or a tensor, in units of a sample.
        bits: as given to :func:`pcm`.

    Returns:
        int16, the same shape; what is outside of 16 bits becomes the nearest sample.

    Raises:
        ValueError: x that is not a number, or bits out of range.

    Example:
        >>> pcm_decode(pcm([-32768, 0, 1234]))
        array([-32768,      0,   1234], dtype=int16)
    """
    check_bits("bits", bits)
    size, array = 2 ** (16 - bits), plain(x).astype(np.float64)
    if np.isnan(array).any():
        raise ValueError("x must hold numbers, got nan")
    middle = np.floor(array / size) * size + size // 2
    return middle.clip(_LEAST, _MOST).astype(np.int16)


def _integers(samples: ArrayLike) -> np.ndarray:
    """Checked samples, int64."""
    array = np.asarray(samples)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"samples must be an array of integers, got one of {array.dtype}")
    with np.errstate(invalid="ignore"):  # an infinity is not whole either
        bad = ~((array >= _LEAST) & (array <= _MOST) & (array % 1 == 0))
    if bad.any():
        raise ValueError(
            f"samples must be integers from {_LEAST} to {_MOST}, got {array[bad].flat[0]}; scale "
            "and round them first"
        )
    return array.astype(np.int64)


def mu_law_decode(x: Numbers, bits: int = 16) -> np.ndarray:
    """Convert levels to samples: the inverse of F, rounded to the nearest sample.

    The error is less than the width of the cell: at 16 bits none within 3,019 of 0, and at most 6.

    Args:
        x: numbers in [-1, 1], any shape, an array or a tensor; centres of cells or others.
        bits: as given to :func:`mu_law`; they set mu.

    Returns:
        int16, the same shape.

    Raises:
        ValueError: x outside [-1, 1] or not a number, or bits out of range.

    Example:
        >>> mu_law_decode(mu_law([-32768, -5, 0, 1234]))
        array([-32762,     -5,      0,   1234], dtype=int16)
    """
    check_bits("bits", bits)
    array = plain(x).astype(np.float64)
    bad = ~(np.abs(array) <= 1)
    if bad.any():
        raise ValueError(f"x must hold levels in [-1, 1], got {array[bad].flat[0]}")
    mu = 2**bits - 1
    bent = np.expm1(np.abs(array) * np.log1p(mu)) / mu
    return np.rint(np.copysign(bent, array) * 2**15).clip(_LEAST, _MOST).astype(np.int16)


def level_of(x: Tensor, bits: int) -> Tensor:
    """Number k of the cell whose centre is x, from 0 to 2^bits - 1; int64, same shape."""
    return (x * 2 ** (bits - 1) - 0.5).round().long() + 2 ** (bits - 1)


def check_bits(name: str, bits: int) -> None:
    """Refuse bits outside 1 to 16, naming the argument."""
    if type(bits) is not int or bits not in range(1, 17):
        raise ValueError(f"{name} must be from 1 to 16 bits, got {bits}")


@lru_cache(maxsize=16)
def _centres(bits: int) -> np.ndarray:
    """Level of every sample from -32,768 on, float32, shape (65536,), read-only."""
    y = np.arange(_LEAST, _MOST + 1) / 2**15
    mu, half = 2**bits - 1, 2 ** (bits - 1)
    bent = np.copysign(np.log1p(mu * np.abs(y)) / np.log1p(mu), y)
    cell = np.floor(bent * half).clip(-half, half - 1)  # a cell holds its lower border
    centres = ((cell + 0.5) / half).astype(np.float32)
    centres.setflags(write=False)
    return centres
