"""Names of spoken digits, and strings of them: recordings of one speaker, joined.

In a single recording the digit is as global as the speaker: both are the same in all frames. In
a string of several digits the speaker alone is.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.protocols import counts, of_kind
from pyro_avrnn.data.dataset import SPLITS, Dataset, groups_of_names
from pyro_avrnn.data.sequences import Sequences

NAME = re.compile(r"([0-9])_([A-Za-z0-9-]+)_([0-9]{1,4})")
_PART = re.compile(rf"{NAME.pattern}:([0-9]+)")


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
    parts = groups_of_names(sequences, NAME, "DIGIT_SPEAKER_TAKE, as spoken_digits gives them")
    return np.array([int(digit) for digit, _, _ in parts]), np.array([who for _, who, _ in parts])


def numbers_between(text: str) -> tuple[int, int]:
    """Two numbers written as "3-5".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"([0-9]{1,3})-([0-9]{1,3})", text)
    if match is None:
        raise ValueError(f"strings must be two numbers such as 3-5, got {text!r}")
    return int(match[1]), int(match[2])


def digit_strings(
    digits: Dataset, least: int = 3, most: int = 5, *, repeats: int = 1, seed: int = 0
) -> Dataset:
    """Join recordings of one speaker to strings of digits, split by split.

    A speaker's recordings are shuffled and dealt to strings of random size, each to one string; a
    rest of fewer than ``least`` is left out. All that is repeated with another shuffle.

    Args:
        digits: as :func:`~.digits.spoken_digits` gives them, frames or waveforms.
        least, most: digits of a string.
        repeats: strings that hold a recording.
        seed: of the shuffles; the splits are the recordings' own.

    Returns:
        The same data in other pieces. A string's name lists its recordings and their frames,
        "3_theo_12:31+0_theo_4:28"; :func:`string_labels` reads it.

    Raises:
        ValueError: a number below 1, ``most`` below ``least``, other sequences than digits, or a
            split in which no speaker has ``least`` recordings.

    Example:
        >>> x = Sequences.from_list([[[0.0]]] * 6, [f"{i}_theo_{i}" for i in range(6)])
        >>> joined = digit_strings(Dataset("digits", x, x, x)).train
        >>> [len(digits) for digits in string_labels(joined).digits]
        [3, 3]
    """
    of_kind(Dataset, "a Dataset", digits=digits)
    counts(1, least=least, most=most, repeats=repeats)
    counts(0, seed=seed)
    if most < least:
        raise ValueError(f"most must be at least as large as least, got {most} and {least}")
    random = np.random.default_rng(seed)
    joined = []
    for split in SPLITS:
        part = getattr(digits, split)
        strings = [
            string
            for _ in range(repeats)
            for string in _deal(labels(part)[1], least, most, random)
        ]
        if not strings:
            raise ValueError(
                f"{split} must have a speaker with {least} recordings, to join them; take a "
                "smaller least"
            )
        frames = [torch.cat([part.sequence(i) for i in string]) for string in strings]
        lengths = part.lengths.tolist()
        names = ["+".join(f"{part.names[i]}:{lengths[i]}" for i in string) for string in strings]
        joined.append(Sequences.from_list(frames, names, dtype=part.x.dtype))
    train, valid, test = joined
    name = f"{digits.name}-strings"
    return replace(digits, name=name, train=train, valid=valid, test=test)


def _deal(
    speakers: np.ndarray, least: int, most: int, random: np.random.Generator
) -> list[list[int]]:
    """Strings of indices of recordings."""
    strings: list[list[int]] = []
    for speaker in np.unique(speakers):
        rest = random.permutation(np.flatnonzero(speakers == speaker)).tolist()
        while len(rest) >= least:
            size = min(int(random.integers(least, most + 1)), len(rest))
            strings.append(rest[:size])
            rest = rest[size:]
    return strings


class StringLabels(NamedTuple):
    """What is said in N strings, and by whom."""

    speakers: np.ndarray  # (N,), strings
    digits: list[list[int]]
    ends: list[list[int]]  # the frame after the last of each digit

    def of_frames(self, mask: Tensor) -> Tensor:
        """The digit of every frame, ``(N, T)``, -1 where ``mask`` ``(N, T)`` is False."""
        found = torch.full(mask.shape, -1, device=mask.device)
        for row, digits, ends in zip(found, self.digits, self.ends, strict=True):
            for digit, start, end in zip(digits, [0, *ends], ends, strict=False):
                row[start:end] = digit
        return found


def string_labels(sequences: Sequences) -> StringLabels:
    """Read speaker, digits and their ends from the names of :func:`digit_strings`.

    Raises:
        ValueError: another name.
    """
    speakers, digits, ends = [], [], []
    for name in sequences.names:
        matches = [_PART.fullmatch(part) for part in name.split("+")]
        if None in matches or len({match[2] for match in matches if match}) != 1:
            raise ValueError(
                "sequences must have names such as '3_theo_12:31+0_theo_4:28', of one speaker, as "
                f"digit_strings gives them, got {name!r}"
            )
        found = [match.groups() for match in matches if match]
        speakers.append(found[0][1])
        digits.append([int(part[0]) for part in found])
        ends.append(np.cumsum([int(part[3]) for part in found]).tolist())
    return StringLabels(np.array(speakers), digits, ends)
