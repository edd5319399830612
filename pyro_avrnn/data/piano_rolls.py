"""Piano rolls in MATLAB files: JSB_Chorales.mat, Nottingham.mat, Piano_midi.mat, MuseData.mat.

Three 1 x N cell arrays ``traindata``, ``validdata`` and ``testdata``; each cell is a matrix
(T, 88) of 0 and 1, the keys sounding at each step (column 0 is MIDI note 21). The split is that of
Boulanger-Lewandowski, Bengio and Vincent (2012), https://arxiv.org/abs/1206.6392.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyro_avrnn.data._files import existing, naming, unreadable
from pyro_avrnn.data.sequences import Dataset, Sequences

_EXPECTED = "a MATLAB 5 file with the cell arrays traindata, validdata and testdata"


def piano_rolls(path: str | Path, *, segment: int | None = None) -> Dataset:
    """Read a ``.mat`` file of piano rolls; ``kind`` is "binary", the values stay 0 and 1.

    Args:
        path: the file; one step is a quarter note in JSB_Chorales, an eighth in the others.
        segment: training pieces are cut into segments of at most so many steps; validation and
            test pieces stay whole, so that their numbers compare with others'. None cuts none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or a roll is empty, ragged or not of 0 and 1.
    """
    if segment is not None and segment < 1:
        raise ValueError(f"segment must be at least 1 step, got {segment}")
    path = existing(path, _EXPECTED)
    content = _loadmat(path)
    train, valid, test = (_part(path, content, key) for key in ("train", "valid", "test"))
    if segment is not None:
        train = _cut(train, segment)
    with naming(path):
        return Dataset(
            path.stem,
            train,
            valid,
            test,
            mean=0.0,
            std=1.0,
            kind="binary",
            frame_seconds=None,
            sample_rate=None,
            origin=f"{path.name}: piano rolls in the split of Boulanger-Lewandowski et al. (2012)",
        )


def _cut(data: Sequences, segment: int) -> Sequences:
    pieces, names = [], []
    for i, name in enumerate(data.names):
        for j, piece in enumerate(data.sequence(i).split(segment)):
            pieces.append(piece)
            names.append(f"{name}.{j}")
    return Sequences.from_list(pieces, names)


def _loadmat(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"reading {path} needs scipy: pip install scipy") from error
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = loadmat(file)
    except Exception as error:  # scipy raises seven kinds of error on damaged files
        raise unreadable(path, _EXPECTED, error) from error
    return content


def _part(path: Path, content: dict[str, Any], split: str) -> Sequences:
    key = f"{split}data"
    cells = content.get(key)
    if cells is None:
        found = ", ".join(sorted(k for k in content if not k.startswith("__"))) or "nothing"
        raise ValueError(f"{path} has no variable {key!r}; expected {_EXPECTED}, found {found}")
    if not isinstance(cells, np.ndarray) or cells.dtype != object:
        kind = getattr(cells, "dtype", type(cells).__name__)
        raise ValueError(f"{path}: {key} must be a cell array of matrices (T, 88), got {kind}")
    with naming(f"{path}: {key}"):
        data = Sequences.from_list(cells.ravel(), (f"{split}-{i}" for i in range(cells.size)))
        other = ((data.x != 0) & (data.x != 1)).any(dim=-1).any(dim=-1)
        if other.any():
            i = int(other.nonzero()[0])
            raise ValueError(
                f"sequence {i} ({data.names[i]!r}) must hold only 0 and 1, got values from "
                f"{data.x[i].min():g} to {data.x[i].max():g}; binarise the rolls"
            )
    return data
