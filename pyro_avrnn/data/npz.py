"""Your own data in a ``.npz`` file.

``x`` is (N, T, X), with ``lengths`` (N,) if it is padded, or (frames, X), the sequences one after
the other, with ``lengths`` (N,). An optional ``split`` (N,) holds "train", "valid" or "test" (or
0, 1, 2) for each sequence. Arrays of other names are refused. Nothing is ever unpickled.
"""

from pathlib import Path

import numpy as np
import torch

from pyro_avrnn.data._checks import decoding, reading
from pyro_avrnn.data.dataset import SPLITS, Dataset, by_split, standardise

_EXPECTED = "a .npz archive with an array x of shape (N, T, X), or (frames, X) with lengths (N,)"


def npz(path: str | Path) -> Dataset:
    """Read ``x``, ``lengths`` and ``split`` from a ``.npz`` file.

    Without ``split``, a fixed permutation gives a tenth (at least one) to validation, as many to
    test, the rest to training. If every value is 0 or 1 the data are "binary" and stay as they
    are; otherwise each dimension is standardised by the training frames.

    Args:
        path: the file, as ``numpy.savez(path, x=..., lengths=..., split=...)`` writes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file; the sentence says what was expected and what came.
    """
    with reading(path, _EXPECTED) as file:
        arrays = _read(file)
        series = _series(arrays["x"], arrays.get("lengths"))
        names = _splits(len(series), arrays.get("split"))
        pieces = ((name, f"x[{i}]", series[i]) for i, name in enumerate(names))
        binary = all(((x == 0) | (x == 1)).all() for x in series)
        if not binary and arrays["x"].dtype.kind in "iu":
            raise ValueError(
                f"x must be 0 and 1, or floating point numbers, got other integers "
                f"({arrays['x'].dtype}); counts would be scored by the density of real numbers: "
                "if that is what you want, save x.astype(float)"
            )
        expected = "an array split that has all three"
        splits = by_split(pieces, expected, torch.float32 if binary else torch.float64)
        origin = f"{file.name}, a file of the user"
        if binary:
            return Dataset(file.stem, *splits, kind="binary", origin=origin)
        resolution = float(np.finfo(arrays["x"].dtype).eps)
        return Dataset(file.stem, *standardise(*splits, resolution), origin=origin)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays ``x``, ``lengths`` and ``split``, the last two if they are there."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError(f"it is not an archive; expected {_EXPECTED}, as by numpy.savez")
        file.seek(0)
        try:
            with decoding(_EXPECTED), np.load(file, allow_pickle=False) as stored:
                found = stored.files
                arrays = {k: stored[k] for k in ("x", "lengths", "split") if k in found}
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ValueError(
                "it holds an object array, which is refused because it could run code; save x as "
                "one array of numbers (frames, X) with lengths (N,)"
            ) from None
    if "x" not in arrays:
        raise ValueError(f"there is no array 'x'; found {', '.join(found) or 'nothing'}")
    if unknown := [name for name in found if name not in arrays]:
        raise ValueError(
            f"arrays must be named x, lengths and split, got {unknown[0]!r}, which would be "
            "ignored; rename it or leave it out"
        )
    return arrays


def _series(x: np.ndarray, lengths: np.ndarray | None) -> list[np.ndarray]:
    """The sequences without padding, each (T_i, X)."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"x must hold real numbers, got an array of {x.dtype}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x must have shape (N, T, X) or (frames, X), got {x.shape}")
    if lengths is None:
        if x.ndim == 2:
            raise ValueError(
                f"x of shape {x.shape} needs an array lengths (N,) that says where sequences end; "
                "for a single feature save x as (N, T, 1)"
            )
        return list(x)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"lengths must be integers of shape (N,), got {lengths.dtype} {lengths.shape}"
        )
    if (lengths < 1).any():
        i = int(np.flatnonzero(lengths < 1)[0])
        raise ValueError(f"lengths must be at least 1, got {lengths[i]} for sequence {i}")
    if x.ndim == 2:
        if sum(lengths.tolist()) != len(x):
            raise ValueError(
                f"lengths must sum to the {len(x)} frames of x, got {sum(lengths.tolist())}"
            )
        return np.split(x, np.cumsum(lengths)[:-1]) if len(lengths) else []
    if len(lengths) != len(x) or (lengths > x.shape[1]).any():
        raise ValueError(
            f"lengths must be {len(x)} numbers of at most {x.shape[1]}, as x has shape {x.shape}; "
            f"got {len(lengths)} numbers, the largest {lengths.max(initial=0)}"
        )
    return [row[:length] for row, length in zip(x, lengths, strict=True)]


def _splits(count: int, split: np.ndarray | None) -> list[str]:
    """The split of each of ``count`` sequences."""
    if split is None:
        if count < 3:
            raise ValueError(
                f"x must hold at least 3 sequences to be split into train, valid and test, got "
                f"{count}; cut long recordings into several sequences"
            )
        names, held = ["train"] * count, max(1, count // 10)
        order = np.random.RandomState(0).permutation(count)  # a frozen stream, not the global one
        for i, name in zip(order, ["valid"] * held + ["test"] * held, strict=False):
            names[i] = name
        return names
    if split.shape != (count,) or split.dtype.kind not in "iuSU":
        raise ValueError(
            f"split must be strings or integers of shape ({count},), one for each sequence, got "
            f"{split.dtype} {split.shape}"
        )
    known = dict(zip("012", SPLITS, strict=True)) | {name: name for name in SPLITS}
    texts = split.astype(str).tolist()
    for i, text in enumerate(texts):
        if text not in known:
            raise ValueError(
                "split must say 'train', 'valid' or 'test' (or 0, 1, 2), got "
                f"{split[i].item()!r} for sequence {i}"
            )
    return [known[text] for text in texts]
