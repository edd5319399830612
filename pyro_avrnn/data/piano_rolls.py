"""Piano rolls in MATLAB files: JSB_Chorales.mat, Nottingham.mat, Piano_midi.mat, MuseData.mat.

A file holds three 1 x N cell arrays ``traindata``, ``validdata`` and ``testdata``. Each cell is a
matrix (T, 88) of 0 and 1, the keys sounding at each step (column 0 is MIDI note 21). The split is
that of Boulanger-Lewandowski, Bengio and Vincent (2012), https://arxiv.org/abs/1206.6392.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.protocols import counts, given
from pyro_avrnn.data._checks import decoding, naming, reading
from pyro_avrnn.data.dataset import SPLITS, Dataset
from pyro_avrnn.data.sequences import Sequences

_EXPECTED = "a MATLAB 5 file with the cell arrays traindata, validdata and testdata"


@dataclass(frozen=True)
class Transpose:
    """Moves a piano roll by a random number of semitones, alike in all its steps.

    Source: Walder (2016), https://arxiv.org/abs/1606.01368, who takes training pieces through all
    keys.

    Args:
        most: semitones up or down, at most; fewer where a note would leave the keyboard.
    """

    most: int

    def __post_init__(self) -> None:
        counts(1, most=self.most)

    def __call__(self, roll: Tensor, generator: torch.Generator) -> Tensor:
        """Another roll ``(T, K)``."""
        drawn = torch.randint(-self.most, self.most + 1, (), generator=generator)
        keys = roll.any(dim=0).nonzero()
        if not len(keys):
            return roll
        lowest, highest = int(keys[0]), int(keys[-1])
        shift = min(max(int(drawn), -lowest), roll.shape[1] - 1 - highest)
        return roll.roll(shift, dims=1)


def piano_rolls(
    path: str | Path, *, segment: int | None = None, transpose: int | None = None
) -> Dataset:
    """Read a ``.mat`` file of piano rolls; ``kind`` is "binary", the values stay 0 and 1.

    Args:
        path: the file; one step is a quarter note in JSB_Chorales, an eighth in the others.
        segment: training pieces are cut into segments of at most so many steps; validation and
            test pieces stay whole, so that their numbers compare with published ones. None cuts
            none.
        transpose: training pieces are to be moved by up to so many semitones, anew in each epoch,
            by ``Batches(data.train, augment=data.augment)``; None moves none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or a roll is empty, ragged or not of 0 and 1.
    """
    from scipy.io import loadmat

    counts(1, **given(segment=segment, transpose=transpose))
    with reading(path, _EXPECTED) as file:
        with decoding(_EXPECTED), file.open("rb") as opened:
            content = loadmat(opened)
        train, valid, test = (_part(content, split) for split in SPLITS)
        return Dataset(
            file.stem,
            train if segment is None else _cut(train, segment),
            valid,
            test,
            kind="binary",
            augment=None if transpose is None else Transpose(transpose),
            origin=f"{file.name}: piano rolls in the split of Boulanger-Lewandowski et al. (2012)",
        )


def _cut(data: Sequences, segment: int) -> Sequences:
    pieces, names = [], []
    for i, name in enumerate(data.names):
        for j, piece in enumerate(data.sequence(i).split(segment)):
            pieces.append(piece)
            names.append(f"{name}.{j}")
    return Sequences.from_list(pieces, names)


def _part(content: dict[str, Any], split: str) -> Sequences:
    key = f"{split}data"
    cells = content.get(key)
    if cells is None:
        found = ", ".join(sorted(k for k in content if not k.startswith("__"))) or "nothing"
        raise ValueError(f"there is no variable {key!r}; expected {_EXPECTED}, found {found}")
    with naming(key):
        if not isinstance(cells, np.ndarray) or cells.dtype != object:
            kind = getattr(cells, "dtype", type(cells).__name__)
            raise ValueError(f"expected a cell array of matrices (T, 88), got {kind}")
        data = Sequences.from_list(cells.ravel(), (f"{split}-{i}" for i in range(cells.size)))
        other = ((data.x != 0) & (data.x != 1)).any(dim=-1).any(dim=-1)
        if other.any():
            i = int(other.nonzero()[0])
            raise ValueError(
                f"sequence {i} ({data.names[i]!r}) must hold only 0 and 1, got values from "
                f"{data.x[i].min():g} to {data.x[i].max():g}; binarise the rolls"
            )
    return data
