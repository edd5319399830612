"""Data sets split in three, the standardisation of real data, and the baseline to beat.

Real data are held standardised, ``(raw - mean) / std`` with training statistics, and every
density of a model of them is in those units. Binary data and mu-law levels are held as they are,
linear levels in units of their deviation.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from inference.protocols import of_kind, one_of
from pyro_avrnn.data._checks import Numbers, plain
from pyro_avrnn.data.companding import level_of, mu_law_decode, pcm_decode
from pyro_avrnn.data.sequences import Augment, Sequences

SPLITS = ("train", "valid", "test")
_FLOAT32 = torch.finfo(torch.float32).eps
Piece = tuple[str, str, np.ndarray]  # split, name and frames (T, X) of a sequence


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test sequences, and what relates them to the raw numbers.

    Args:
        name: short, for tables.
        train, valid, test: real data are already ``(raw - mean) / std``, others as they are.
        mean, std: training statistics, shape (X,) or one number; 0 and 1 unless data are real.
        kind: "real", "binary" (every value 0 or 1), "mu-law" (centres of 2^bits equal cells of
            (-1, 1); padding is 0, which is no centre) or "pcm" (the same, of the range of 16-bit
            samples, divided by ``std``).
        frame_seconds: time from one frame to the next; None if it is unknown or not constant.
        sample_rate: in hertz, where a frame is a piece of waveform, else None.
        origin: who made the data, from where, under which licence, as far as known.
        bits: from 1 to 16 for mu-law and pcm data, else None.
        augment: of training pieces, for ``Batches(augment=data.augment)``; None for none.

    Raises:
        ValueError: an unknown kind, bits that do not go with it, or splits of unequal X.
    """

    name: str
    train: Sequences
    valid: Sequences
    test: Sequences
    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0
    kind: Literal["real", "binary", "mu-law", "pcm"] = "real"
    frame_seconds: float | None = None
    sample_rate: int | None = None
    origin: str = ""
    bits: int | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        one_of(("real", "binary", "mu-law", "pcm"), kind=self.kind)
        bits = self.bits if type(self.bits) is int else 0 if self.bits is not None else None
        if bits not in (range(1, 17) if self.in_levels else (None,)):
            raise ValueError(
                "bits must be from 1 to 16 for levels ('mu-law', 'pcm') and None for others, got "
                f"{self.bits} for kind {self.kind!r}"
            )
        for split in SPLITS:
            of_kind(Sequences, "Sequences", **{split: getattr(self, split)})
            x = getattr(self, split).x
            if self.kind == "binary" and bool(((x != 0) & (x != 1)).any()):
                raise ValueError(f"{split} must hold 0 and 1 only, as kind is 'binary'")
        sizes = {split: getattr(self, split).x_dim for split in SPLITS}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the splits must have the same number of features, got {sizes}")

    @property
    def x_dim(self) -> int:
        """X, the number of features."""
        return self.train.x_dim

    @property
    def in_levels(self) -> bool:
        """Whether the data are levels of samples, so that they are scored in bits."""
        return self.kind in ("mu-law", "pcm")

    @property
    def unit(self) -> float:
        """What the centres of cells of (-1, 1) are divided by."""
        return float(self.std) / 2**15 if self.kind == "pcm" else 1.0

    def samples(self, x: Numbers) -> np.ndarray:
        """Samples of 16 bits, int16, that levels ``x`` stand for, the same shape.

        Raises:
            ValueError: data that are no levels.
        """
        if self.bits is None:
            raise ValueError(f"only levels stand for samples, got data of kind {self.kind!r}")
        if self.kind == "mu-law":
            return mu_law_decode(x, self.bits)
        return pcm_decode(plain(x) * np.float64(self.std), self.bits)

    @property
    def emission(self) -> dict[str, Any]:
        """Options of a recipe that fit such data: ``emission``, and ``emission_options``.

        Example:
            >>> from pyro_avrnn.data import vowels
            >>> vowels().emission
            {'emission': 'normal'}
        """
        options: dict[str, Any] = {"bits": self.bits}
        if self.kind == "pcm":
            # a scale of a seventh of a cell puts 0.95 of the mass into one; no floor is above 0
            floor = math.log(2 ** (1 - self.bits) / self.unit) - 2.0  # type: ignore[operator]
            options |= {"unit": self.unit, "min_log_scale": min(round(floor, 3), 0.0)}
        if self.in_levels:
            return {"emission": "logistic", "emission_options": options}
        return {"emission": "bernoulli" if self.kind == "binary" else "normal"}


def by_split(
    pieces: Iterable[Piece], expected: str, dtype: torch.dtype = torch.float32
) -> tuple[Sequences, Sequences, Sequences]:
    """Group sequences into training, validation and test, each in the order given.

    ``expected`` says in words what would fill every split, for the error if one is empty.
    """
    found: dict[str, tuple[list, list]] = {split: ([], []) for split in SPLITS}
    for split, name, frames in pieces:
        found[split][0].append(frames)
        found[split][1].append(name)
    counts = {split: len(names) for split, (_, names) in found.items()}
    if 0 in counts.values():
        raise ValueError(f"each split needs sequences, got {counts}; expected {expected}")
    train, valid, test = (Sequences.from_list(*part, dtype=dtype) for part in found.values())
    return train, valid, test


def groups_of_names(
    sequences: Sequences, pattern: re.Pattern[str], expected: str
) -> list[tuple[str, ...]]:
    """Groups of a pattern in the name of each sequence; ``expected`` says what matches."""
    matches = [pattern.fullmatch(name) for name in sequences.names]
    if None in matches:
        name = sequences.names[matches.index(None)]
        raise ValueError(f"sequences must have names {expected}, got {name!r}")
    return [match.groups() for match in matches if match]


def standardise(
    train: Sequences, valid: Sequences, test: Sequences, resolution: float = _FLOAT32
) -> tuple[Sequences, Sequences, Sequences, Tensor, Tensor]:
    """Standardise each dimension by mean and deviation of the training frames.

    A dimension that is constant in training, to round-off, is centred and not scaled (deviation
    1): its own deviation would blow up what differs from it in the other splits.

    Args:
        train, valid, test: raw.
        resolution: of the raw numbers, relative to their size.

    Returns:
        The three splits, the mean and the deviation, both (X,); all in float32.
    """
    frames = train.x[train.mask].double()
    mean, std = frames.mean(dim=0), frames.std(dim=0, correction=0)
    rounding = 4 * resolution * frames.abs().amax(dim=0)
    constant = frames.amax(dim=0) - frames.amin(dim=0) <= rounding
    mean, std = torch.where(constant, frames[0], mean), torch.where(constant, 1.0, std)

    tiny, large = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, value in (("mean", mean.abs()), ("deviation", std)):
        if bool((value > large).any()) or (name == "deviation" and bool((value < tiny).any())):
            raise ValueError(
                f"data must fit into float32, but have a {name} of {float(value.max()):.3g} to "
                f"{float(value.min()):.3g}; give them in another unit"
            )

    def apply(data: Sequences) -> Sequences:
        centred = data.x - mean
        centred = torch.where(constant & (centred.abs() <= rounding), 0.0, centred)
        x = (centred / std).masked_fill(~data.mask[..., None], 0.0)
        return Sequences(x.float(), data.mask, data.names)

    return apply(train), apply(valid), apply(test), mean.float(), std.float()


def independent_baseline(data: Dataset) -> float:
    """Test log-density of a model without time or structure, in nats per frame.

    Each dimension is independent: a normal with the mean and deviation of the training frames
    (``kind`` "real", in the standardised units), a Bernoulli with add-one smoothing ("binary"), or
    one histogram of the 2^bits levels, shared by all dimensions, add-one smoothed (levels).

    Returns:
        The sum over the whole test set divided by its number of frames.

    Raises:
        ValueError: if a real dimension is constant in training (its normal has no density).
    """
    train = data.train.x[data.train.mask].double()  # (frames, X)
    test = data.test.x[data.test.mask].double()
    if data.kind == "binary":
        p = (train.sum(dim=0) + 1) / (len(train) + 2)
        log_density = test * p.log() + (1 - test) * (-p).log1p()
    elif data.bits is not None:
        levels, found = (level_of(x * data.unit, data.bits) for x in (train, test))
        counts = torch.bincount(levels.flatten(), minlength=2**data.bits)
        p = (counts.double() + 1) / (train.numel() + 2**data.bits)
        log_density = p.log()[found]
    else:
        mean, var = train.mean(dim=0), train.var(dim=0, correction=0)
        constant = train.amax(dim=0) == train.amin(dim=0)
        if constant.any():
            raise ValueError(
                f"data {data.name!r} has dimension {int(constant.nonzero()[0])} (counted from 0) "
                "constant over the training frames, so its normal has no density; drop it"
            )
        log_density = -0.5 * ((test - mean) ** 2 / var + var.log() + math.log(2 * math.pi))
    return float(log_density.sum() / len(test))
