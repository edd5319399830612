"""Padded sequences and shuffled batches of them.

Data is ``(N, T, X)`` with a prefix mask ``(N, T)``, True = observed; padding is zero.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.densities import check_mask
from inference.protocols import counts, given, of_kind

_GROUP = 8  # batches sorted by length together: enough to save padding, few to stay random


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
        lengths = self.lengths.tolist()
        x, mask = _cut(self, [(i, 0, lengths[i]) for i in chosen])
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


def _cut(data: Sequences, pieces: "Sequence[Piece]") -> tuple[Tensor, Tensor]:
    """Pieces of x and mask, shapes (B, T, X) and (B, T), T their longest."""
    longest = max(stop - start for _, start, stop in pieces)
    x = data.x.new_zeros(len(pieces), longest, data.x_dim)
    mask = data.mask.new_zeros(len(pieces), longest)
    for row, (i, start, stop) in enumerate(pieces):
        x[row, : stop - start] = data.x[i, start:stop]
        mask[row, : stop - start] = True
    return x, mask


Piece = tuple[int, int, int]  # a sequence, its first step, the step after its last
Augment = Callable[[Tensor, torch.Generator], Tensor]  #: a piece (T, X) -> another of that shape


class Batches:
    """Shuffled batches of sequences, or of windows of them; each ``iter()`` is one epoch.

    Every frame is in exactly one batch of an epoch. The order depends on ``seed`` and the number
    of the epoch alone: the same two numbers give the same batches. Global generators are never
    touched.

    Args:
        data: the sequences.
        batch_size: B at most.
        seed: 0 or larger.
        bucket: sort by length, in groups of 8 batches, before batches are cut and shuffled. It
            saves padding where lengths differ much; but batches of a kind follow each other, and
            a training can lose by it.
        window: longer sequences are cut into windows of at most about so many steps, anew in
            each epoch, so that no state learns to start at fixed places: a sequence has
            ceil(T / window) windows of equal length, and all cuts are shifted together by up to
            half of it. None cuts none.
        even: batches differ by at most one sequence. False makes full ones, and a smaller one of
            the rest, whose gradient weighs as much as theirs.
        augment: changes every piece ``(T, X)``, given a generator to draw from, as
            ``data.augment`` of a music reader does.

    Attributes:
        epoch: number of the epoch that the next ``iter()`` starts; set it to resume a run.

    Example:
        >>> batches = Batches(Sequences.from_list([[[0.0]] * t for t in (1, 2, 3)]), batch_size=2)
        >>> sorted(len(x) for x, mask in batches)
        [1, 2]
    """

    def __init__(
        self,
        data: Sequences,
        batch_size: int,
        seed: int = 0,
        bucket: bool = False,
        *,
        window: int | None = None,
        even: bool = True,
        augment: Augment | None = None,
    ) -> None:
        of_kind(Callable, "a function of a piece and a generator", **given(augment=augment))
        of_kind(Sequences, "Sequences, such as data.train", data=data)
        counts(1, batch_size=batch_size, **given(window=window))
        counts(0, seed=seed)
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.bucket, self.window, self.even, self.augment = bucket, window, even, augment
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in the next epoch."""
        return math.ceil(len(self._pieces(self._generator())) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of ``(x, mask)``, shapes (B, T, X) and (B, T), T the longest of the batch."""
        generator = self._generator()
        self.epoch += 1
        pieces = self._pieces(generator)
        order = torch.randperm(len(pieces), generator=generator)
        if self.bucket:
            lengths = torch.tensor([stop - start for _, start, stop in pieces])
            groups = order.split(_GROUP * self.batch_size)
            order = torch.cat([g[lengths[g].argsort(stable=True)] for g in groups])
        count = math.ceil(len(pieces) / self.batch_size)
        batches = order.tensor_split(count) if self.even else order.split(self.batch_size)
        turns = torch.randperm(len(batches), generator=generator).tolist()
        return (
            self._batch([pieces[i] for i in batches[turn].tolist()], generator) for turn in turns
        )

    def _batch(self, pieces: list[Piece], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, mask = _cut(self.data, pieces)
        if self.augment is not None:
            for i, length in enumerate(mask.sum(dim=-1).tolist()):
                x[i, :length] = self.augment(x[i, :length], generator)
        return x, mask

    def _generator(self) -> torch.Generator:
        # SeedSequence keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart; a sum would not
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))

    def _pieces(self, generator: torch.Generator) -> list[Piece]:
        """What an epoch consists of."""
        pieces: list[Piece] = []
        for i, length in enumerate(self.data.lengths.tolist()):
            parts = 1 if self.window is None else -(-length // self.window)
            shift = float(torch.rand((), generator=generator)) - 0.5 if parts > 1 else 0.0
            inner = (math.floor((k + shift) * length / parts) for k in range(1, parts))
            cuts = [0, *inner, length]
            pieces += [(i, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]
        return pieces
