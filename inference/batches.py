"""Batches of a run: repeated, cut into windows along T, found again after a restart."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.random import random_state, set_random_state
from inference.weights import DegenerateWeightsError


class Cycle:
    """Batches, repeated without end, and the position of a run in them.

    :meth:`seek` finds the same batches again where a pass is the same every time, or drawn by
    torch's global generator as it begins (a shuffling ``DataLoader``), by a generator of the
    batches' own, or from their integer ``epoch``, the number of the next pass.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        one = isinstance(batches, tuple) and any(isinstance(part, Tensor) for part in batches)
        if one or isinstance(batches, Tensor | str) or not isinstance(batches, Iterable):
            raise TypeError(
                "batches must be an iterable of batches, such as [(x, mask)] or a DataLoader, got "
                f"{'one batch' if one else type(batches).__name__}"
            )
        self.batches: Any = batches
        self.passes = self.position = 0  # begun, and batches given of the last of them
        self.epoch: int | None = None  # before that pass; so is the random state
        self.random: dict[str, Any] = {}
        self.batch: tuple[Tensor, ...] = ()  # given last
        self._rest: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        batch = next(self._rest, None)
        if batch is None:
            self._begin()
            batch = next(self._rest, None)
        if batch is None:
            raise ValueError("batches must hold at least one batch, and be iterable again")
        self.position += 1
        self.batch = _as_tuple(batch)
        return self.batch

    def state(self) -> dict[str, Any]:
        """Position that :meth:`seek` finds again."""
        names = ("passes", "position", "epoch", "random")
        return {name: getattr(self, name) for name in names}

    def seek(self, state: Mapping[str, Any], visit: Callable[[tuple[Tensor, ...]], None]) -> None:
        """Go to the position of another, and show every batch on the way.

        Raises:
            ValueError: a pass is shorter than that.
        """
        known = state["epoch"] is not None and self._epoch() is not None
        if known:  # with the pass before, which shows all batches there are
            before = int(state["passes"] > 1 and state["epoch"] > 0)
            self.batches.epoch = state["epoch"] - before
            self.passes = state["passes"] - 1 - before
        while self.passes < state["passes"] - 1:  # a generator of their own moves with each pass
            visit(next(self))
            for batch in self._rest:
                visit(_as_tuple(batch))
            self._rest = iter(())
        if known:
            self.batches.epoch = state["epoch"]
        set_random_state(state["random"])
        while self.passes < state["passes"] or (
            self.passes == state["passes"] and self.position < state["position"]
        ):
            visit(next(self))
        if self.passes != state["passes"]:
            raise ValueError(
                f"batches must be those of the interrupted run, which had {state['position']} "
                "in a pass, and here are fewer; give the same data and batch size"
            )

    def _begin(self) -> None:
        self.epoch, self.random = self._epoch(), random_state()
        self._rest = iter(self.batches)
        self.passes, self.position = self.passes + 1, 0

    def _epoch(self) -> int | None:
        epoch = getattr(self.batches, "epoch", None)
        return epoch if isinstance(epoch, int) else None


class Windows:
    """The batches of a cycle cut along T, and the state that is carried from cut to cut.

    Args:
        cycle: the batches, ``(x, mask)``.
        length: steps of a window, of which the last may have fewer; None does not cut.
        model: checks whole batches, and knows the type of its states.

    Attributes:
        start: the state before the window that was given last, and to be set before the next is
            taken; None at the beginning of a batch.
    """

    def __init__(self, cycle: Cycle, length: int | None, model: Any) -> None:
        self.cycle, self.length, self.model = cycle, length, model
        self.start: Any = None
        self._given = self._steps = 0  # of the batch

    def __next__(self) -> tuple[Tensor, ...]:
        if self.length is None:
            return next(self.cycle)
        if not self.more:
            self._open(next(self.cycle))
        begin, self._given = self._given, self._given + self.length
        return _window(self.cycle.batch, begin, self._given)

    @property
    def more(self) -> bool:
        """Whether a sequence of the batch has a step left."""
        return self._given < self._steps

    def state(self) -> dict[str, Any]:
        """Position that :meth:`seek` finds again."""
        if self.length is None:
            return self.cycle.state()
        start = None if self.start is None else list(self.start)
        return self.cycle.state() | {"given": self._given, "start": start}

    def seek(self, state: Mapping[str, Any], visit: Callable[[tuple[Tensor, ...]], None]) -> None:
        """Go to the position of another, and show the first window of every batch on the way."""
        length = self.length
        if length is None:
            return self.cycle.seek(state, visit)
        self.cycle.seek(state, lambda batch: visit(_window(batch, 0, length)))
        self._open(self.cycle.batch)
        self._given = state["given"]
        if state["start"] is not None:
            kind, device = type(self.model.init(torch.Size((1,)))), self.cycle.batch[0].device
            self.start = kind(*(tensor.to(device) for tensor in state["start"]))

    def _open(self, batch: tuple[Tensor, ...]) -> None:
        x, mask = (*batch, None)[:2]
        if callable(check := getattr(self.model, "check", None)):
            x, mask = check(x, mask)  # windows would not show a mask with a hole
        assert isinstance(x, Tensor)
        self._steps = x.shape[1] if mask is None else int(mask.any(dim=0).sum())
        self._given, self.start = 0, None


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _window(batch: tuple[Any, ...], begin: int, end: int) -> tuple[Any, ...]:
    return tuple(part if part is None else part[:, begin:end] for part in batch)


def by_portions(
    score: Callable[[Tensor, Tensor], dict[str, Tensor]], x: Tensor, mask: Tensor, size: int
) -> dict[str, Tensor]:
    """Call ``score(x, mask)`` for ``size`` sequences at a time; join its columns ``(B, ...)``.

    Steps that no sequence of a portion has are cut off, all but the first.

    Raises:
        DegenerateWeightsError: as ``score`` does, with sequences counted from the first of all.
    """
    pieces = []
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        longest = max(int(mask[part].sum(dim=1).max()), 1)
        try:
            pieces.append(score(x[part, :longest], mask[part, :longest]))
        except DegenerateWeightsError as error:
            raise DegenerateWeightsError(error.step, error.sequence + first, error.total) from None
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
