"""Padded sequences and shuffled batches of them.

Data is ``(N, T, X)`` with a prefix mask ``(N, T)``, True = observed; padding is zero.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.densities import check_mask
from inference.protocols import counts, of_kind

_WINDOW = 8  # batches sorted by length together: enough to save padding, few enough to stay random


@dataclass(frozen=True, eq=False)
class Sequences:
    """A set of N sequences of unequal length.

    Args:
        x: observations, shape (N, T, X), floating, zero where ``mask`` is False.
        mask: shape (N, T), bool, True on the first T_i >= 1 steps of sequence i.
        names: one name for each sequence.

    Raises:
        ValueError: if the three do not fit together.
        TypeError: if ``mask`` is not bool.

    Example:
        >>> data = Sequences.from_list([[[1.0], [2.0]], [[3.0]]])
        >>> data.lengths.tolist(), data.num_frames, data.x_dim
        ([2, 1], 3, 1)
    """

    x: Tensor
    mask: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        of_kind(Tensor, "a tensor", x=self.x, mask=self.mask)
        of_kind(list | tuple, "a list of names", names=self.names)
        if self.x.ndim != 3 or 0 in self.x.shape or not self.x.is_floating_point():
            raise ValueError(
                "x must be a floating tensor of shape (N, T, X), each at least 1, got "
                f"{self.x.dtype} {tuple(self.x.shape)}; Sequences.from_list builds one"
            )
        if not check_mask(self.mask, self.x.shape[:2])[:, 0].all():
            raise ValueError("mask must be True on the first step of each sequence, got a False")
        if not self.x.isfinite().all():
            raise ValueError("x must be finite, got a NaN or an infinity; from_list says where")
        if self.x.count_nonzero(dim=-1)[~self.mask].any():
            raise ValueError("x must be 0 where mask is False, got other values; zero the padding")
        if len(self.names) != len(self.x):
            raise ValueError(f"names must hold {len(self.x)} names, got {len(self.names)}")

    @classmethod
    def from_list(
        cls,
        sequences: Iterable[Any],
        names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "Sequences":
        """Check and pad a list of arrays or tensors of shape (T_i, X).

        Args:
            sequences: the sequences, numbers only, all with the same X.
            names: one for each sequence; "0", "1", ... if None.
            dtype: of the padded ``x``.

        Raises:
            ValueError: if the set is empty, or a sequence is empty, has another rank or feature
                size, or holds a value that is not finite; the sentence names the sequence.
        """
        items = list(sequences)
        labels = tuple(map(str, range(len(items)) if names is None else names))
        if not items:
            raise ValueError("sequences must hold at least one array of shape (T, X), got none")
        if len(labels) != len(items):
            raise ValueError(f"names must hold {len(items)} names, got {len(labels)}")
        tensors: list[Tensor] = []
        for i, (item, label) in enumerate(zip(items, labels, strict=True)):
            tensors.append(_frames(item, f"sequence {i} ({label!r})", dtype))
            if tensors[i].shape[1] != tensors[0].shape[1]:
                raise ValueError(
                    f"sequence {i} ({label!r}) has {tensors[i].shape[1]} features, but sequence 0 "
                    f"({labels[0]!r}) has {tensors[0].shape[1]}; all must have the same"
                )
        lengths = torch.tensor([len(t) for t in tensors], device=tensors[0].device)
        x = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        steps = torch.arange(x.shape[1], device=x.device)
        return cls(x, steps < lengths[:, None], labels)

    def __len__(self) -> int:
        """N, the number of sequences."""
        return len(self.x)

    @property
    def lengths(self) -> Tensor:
        """Observed steps of each sequence, shape (N,)."""
        return self.mask.sum(dim=-1)

    @property
    def num_frames(self) -> int:
        """Observed steps of all sequences together."""
        return int(self.mask.sum())

    @property
    def x_dim(self) -> int:
        """X, the number of features."""
        return self.x.shape[-1]

    def sequence(self, i: int) -> Tensor:
        """Sequence ``i`` without its padding, shape (T_i, X)."""
        if type(i) is not int or not -len(self) <= i < len(self):
            raise ValueError(f"i must be an index from 0 to {len(self) - 1}, got {i!r}")
        return self.x[i, : int(self.mask[i].sum())]

    def select(self, indices: Sequence[int] | Tensor) -> "Sequences":
        """The sequences at ``indices``, in that order, cut to the longest of them."""
        chosen = torch.as_tensor(indices).tolist()
        if not isinstance(chosen, list) or any(type(i) is not int for i in chosen):
            raise TypeError(
                "indices must be a list of integers or an integer tensor of shape (K,)"
            )
        if not chosen or min(chosen) < 0 or max(chosen) >= len(self):
            raise ValueError(
                f"indices must be at least one number from 0 to {len(self) - 1}, got {chosen}"
            )
        x, mask = _cut(self, chosen)
        return Sequences(x, mask, tuple(self.names[i] for i in chosen))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Sequences":
        """The same sequences on another device, or with ``x`` in another floating type."""
        return Sequences(self.x.to(device, dtype), self.mask.to(device), self.names)


def _frames(item: Any, label: str, dtype: torch.dtype) -> Tensor:
    """One checked sequence, shape (T, X); ``label`` opens the error sentences."""
    if not isinstance(item, Tensor):
        try:
            array = np.asarray(item)
        except ValueError:
            raise ValueError(f"{label} must have shape (T, X), got rows of unequal size") from None
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{label} must hold real numbers, got an array of {array.dtype}")
        item = torch.tensor(array.astype(np.float64))
    if item.is_complex():
        raise ValueError(f"{label} must hold real numbers, got a tensor of {item.dtype}")
    if item.ndim != 2 or item.shape[1] == 0:
        raise ValueError(f"{label} must have shape (T, X), got {tuple(item.shape)}")
    if len(item) == 0:
        raise ValueError(f"{label} has length 0; leave it out, a sequence has at least one frame")
    frames: Tensor = item.detach().to(dtype)
    finite = frames.isfinite().all(dim=-1)
    if not finite.all():
        raise ValueError(
            f"{label} has a NaN or an infinity in frame {int((~finite).nonzero()[0])} (counted "
            "from 0); repair that frame or cut the sequence there"
        )
    return frames


def _cut(data: Sequences, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Rows ``indices`` of x and mask, shapes (B, T, X) and (B, T), T their longest."""
    mask = data.mask[indices]
    longest = int(mask.sum(dim=-1).max())
    return data.x[:, :longest][indices], mask[:, :longest]


class Batches:
    """Shuffled batches of sequences of similar length; each ``iter()`` is one epoch.

    The order depends on ``seed`` and the number of the epoch alone: the same two numbers give the
    same batches. Global generators are never touched. Sequences are shuffled, sorted by length in
    windows of 8 batches, and cut into batches; then the batches are shuffled.

    Args:
        data: the sequences; each is in exactly one batch of every epoch.
        batch_size: B; one batch of an epoch holds the remainder.
        seed: 0 or larger.
        bucket: sort by length inside the windows; False keeps the plain shuffle.

    Attributes:
        epoch: number of the epoch that the next ``iter()`` starts; set it to resume a run.

    Example:
        >>> batches = Batches(Sequences.from_list([[[0.0]] * t for t in (1, 2, 3)]), batch_size=2)
        >>> sorted(len(x) for x, mask in batches)
        [1, 2]
    """

    def __init__(
        self, data: Sequences, batch_size: int, seed: int = 0, bucket: bool = True
    ) -> None:
        of_kind(Sequences, "Sequences, such as data.train", data=data)
        counts(1, batch_size=batch_size)
        counts(0, seed=seed)
        self.data, self.batch_size, self.seed, self.bucket = data, batch_size, seed, bucket
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of ``(x, mask)``, shapes (B, T, X) and (B, T), T the longest of the batch."""
        # SeedSequence keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart; a sum would not
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed >> np.uint64(1)))
        self.epoch += 1
        order = torch.randperm(len(self.data), generator=generator)
        if self.bucket:
            lengths = self.data.lengths.cpu()
            windows = order.split(_WINDOW * self.batch_size)
            order = torch.cat([w[lengths[w].argsort(stable=True)] for w in windows])
        batches = order.split(self.batch_size)
        turns = torch.randperm(len(batches), generator=generator).tolist()
        return (_cut(self.data, batches[i].tolist()) for i in turns)
