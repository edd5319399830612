"""Checkpoints of ``fit``: all that a run is made of, in one file, so that it goes on bit for bit.

On a CPU, a run that was interrupted and resumed gives the numbers of one that was not.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from inference.files import atomically, load_plain
from inference.schedules import Clock

_FORMAT = "fit checkpoint 1"
_KEYS = {
    *("format", "run", "history", "batches", "random"),
    *("parameters", "gradients", "optimisers", "clock", "states"),
}
_PLAIN = {Tensor, nn.Parameter, bool, int, float, str, type(None)}  # what is read unpickled


@runtime_checkable
class Stateful(Protocol):
    """What changes over a run and can be put back: modules, optimisers, a critic with both."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, nested in dicts, lists and tuples."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Take what ``state_dict`` gave."""
        ...


class Cycle:
    """Batches over and over, and where in them a run is.

    :meth:`seek` finds the same batches again where a pass is the same every time, or drawn by
    torch's global generator as it begins (a shuffling ``DataLoader``), by a generator of the
    batches' own, or from their integer ``epoch``, the number of the next pass.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
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
        self.batch = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        return self.batch

    def state(self) -> dict[str, Any]:
        """What :meth:`seek` takes."""
        names = ("passes", "position", "epoch", "random")
        return {name: getattr(self, name) for name in names}

    def seek(self, state: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Go where another was; gives the first batch of the pass, which that one had too.

        Raises:
            ValueError: a pass is shorter than that.
        """
        if state["epoch"] is not None and self._epoch() is not None:
            self.batches.epoch, self.passes = state["epoch"], state["passes"] - 1
        while self.passes < state["passes"] - 1:  # a generator of their own moves with each pass
            self._begin()
            for _ in self._rest:
                pass
        set_random_state(state["random"])
        self._rest = iter(())
        first = next(self)
        while self.passes == state["passes"] and self.position < state["position"]:
            next(self)
        if self.passes != state["passes"]:
            raise ValueError(
                f"batches must be those of the interrupted run, which had {state['position']} "
                "in a pass, and here are fewer; give the same data and batch size"
            )
        return first

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
        length: steps of a window, the last of a batch may have fewer; None does not cut.
        model: says what is wrong with a whole batch, and what its states are made of.

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
        """What :meth:`seek` takes."""
        if self.length is None:
            return self.cycle.state()
        start = None if self.start is None else list(self.start)
        return self.cycle.state() | {"given": self._given, "start": start}

    def seek(self, state: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Go where another was, as :meth:`Cycle.seek`; gives the first window of the pass."""
        first = self.cycle.seek(state)
        if self.length is None:
            return first
        self._open(self.cycle.batch)
        self._given = state["given"]
        if state["start"] is not None:
            kind, device = type(self.model.init(torch.Size((1,)))), first[0].device
            self.start = kind(*(tensor.to(device) for tensor in state["start"]))
        return _window(first, 0, self.length)

    def _open(self, batch: tuple[Tensor, ...]) -> None:
        x, mask = (*batch, None)[:2]
        if callable(check := getattr(self.model, "check", None)):
            x, mask = check(x, mask)  # windows would not show a mask with a hole
        assert isinstance(x, Tensor)
        self._steps = x.shape[1] if mask is None else int(mask.any(dim=0).sum())
        self._given, self.start = 0, None


def _window(batch: tuple[Any, ...], begin: int, end: int) -> tuple[Any, ...]:
    return tuple(part if part is None else part[:, begin:end] for part in batch)


class Checkpoint:
    """The file of a run, and what goes into it.

    Args:
        path: the file.
        svi: model and guide, optimiser and loss.
        windows: the batches.
        history: of the run; its attributes are plain values.
        run: plain values that name the run; only a checkpoint with the same is resumed.
        states: further things with a state, under the names that errors give them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        svi: SVI,
        windows: Windows,
        history: Any,
        *,
        run: dict[str, Any],
        states: Mapping[str, Any],
    ) -> None:
        self.path, self.svi, self.windows, self.history = Path(path), svi, windows, history
        self.run = run | {"optimiser": _kind(svi.optim)}
        parts = {"model": svi.model, "guide": svi.guide, "loss": svi.loss, **states}
        self.states = {
            name: owner for name, part in parts.items() if (owner := _stateful(part)) is not None
        }
        clock = getattr(svi.loss, "clock", None)
        self.clock = clock if isinstance(clock, Clock) else Clock()
        self._optimisers: dict[str, Any] = {}  # read, and perhaps not asked for since

    def write(self) -> None:
        """Write the run as it is now, atomically.

        Raises:
            TypeError: a state that could be read by unpickling alone.
        """
        now = self.svi.optim.get_state()
        self._optimisers |= {name: state for name, state in now.items() if name is not None}
        stored = dict(pyro.get_param_store().named_parameters())
        rows = [
            {name: x.item() if hasattr(x, "item") else x for name, x in row.items()}
            for row in self.history.rows
        ]
        content = {
            "format": _FORMAT,
            "run": self.run,
            "history": vars(self.history) | {"rows": rows},
            "batches": self.windows.state(),
            "random": random_state(),
            # what this run trains: the store may hold others', which a new process will not
            "parameters": {name: stored[name].detach() for name in self._optimisers},
            # zeros as a rule; but where it is absent, the next step moves nothing
            "gradients": {name: stored[name].grad for name in self._optimisers},
            "optimisers": self._optimisers,
            "clock": self.clock.calls,
            "states": {name: part.state_dict() for name, part in self.states.items()},
        }
        _check_plain(content, "the checkpoint")
        atomically(self.path, lambda temporary: torch.save(content, temporary))

    def read(self) -> None:
        """Put everything back as the file has it.

        Raises:
            ValueError: a damaged file, one of another kind, or one of another run.
        """
        content = self._content()
        there = content["run"] | {"parts with a state": [*content["states"]]}
        for name, here in (self.run | {"parts with a state": [*self.states]}).items():
            if there.get(name) != here:
                raise self._of_another_run(f"{name} {there.get(name)!r}, here {here!r}")
        stored = self._register(self.windows.seek(content["batches"]))
        self._compare(content["parameters"], stored)
        for name, part in self.states.items():
            try:
                part.load_state_dict(content["states"][name])
            except Exception as error:
                what = f"another {name} ({type(error).__name__})"
                raise self._of_another_run(what) from error
        with torch.no_grad():
            for name, p in stored.items():
                p.copy_(content["parameters"][name])
                gradient = content["gradients"][name]
                p.grad = None if gradient is None else gradient.to(p.device)
        self._optimisers = content["optimisers"]
        self.svi.optim.optim_objs.clear()  # made anew, from the state, where they are needed
        self.svi.optim.set_state(self._optimisers)
        self.clock.calls = content["clock"]
        vars(self.history).update(content["history"])
        set_random_state(content["random"])  # last: batches and programs have drawn above

    def _content(self) -> dict[str, Any]:
        try:
            content = load_plain(self.path)
            if content["format"] != _FORMAT or content.keys() != _KEYS:
                raise ValueError("another format")
        except Exception as error:
            raise ValueError(
                f"checkpoint {self.path} is damaged, or no checkpoint of this version of fit "
                f"({type(error).__name__}); give another file, or resume=False to start anew"
            ) from error
        return content

    def _register(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The run's parameters by name, all in the store, which a new process has empty.

        The loss is evaluated once: only the programs know the constraints of their
        ``pyro.param``, and an autoguide sets itself up. All that this draws or moves is
        overwritten afterwards.
        """
        with (
            suppress(ArithmeticError),  # of weights, when all parameters have been asked for
            poutine.trace(param_only=True) as capture,
        ):
            self.svi.evaluate_loss(*batch)
        stored = dict(pyro.get_param_store().named_parameters())
        return {name: stored[name] for name in capture.trace.nodes if name in stored}

    def _compare(self, there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
        for name in there | here:
            a, b = (
                f"{tuple(p[name].shape)} {p[name].dtype}" if name in p else "absent"
                for p in (there, here)
            )
            if a != b:
                raise self._of_another_run(f"other parameters: {name} is {a}, here {b}")

    def _of_another_run(self, difference: str) -> ValueError:
        return ValueError(
            f"checkpoint {self.path} is of a run with {difference}; continue that run, give "
            "another file, or resume=False to start anew"
        )


def random_state() -> dict[str, Any]:
    """Of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Back to a state of torch's global generators; of those on devices that are here."""
    torch.set_rng_state(state["cpu"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)


def _stateful(part: Any) -> Any:
    """What has the state of a module, hook or loss: itself, or the object it is a method of."""
    while isinstance(part, partial):
        part = part.func
    owners = (part, getattr(part, "__self__", None))
    return next((owner for owner in owners if isinstance(owner, Stateful)), None)


def _kind(optim: Any) -> str:
    """Whose states these are; one optimiser's mean nothing to another."""
    makers = (getattr(optim, f"pt_{part}_constructor", None) for part in ("scheduler", "optim"))
    return " of ".join(getattr(m, "__name__", type(m).__name__) for m in makers if m is not None)


def _check_plain(value: Any, where: str) -> None:
    """Refuse on writing what could not be read again."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict, Counter):
        for name, item in value.items():
            _check_plain(item, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        raise TypeError(
            f"{where} must be a tensor or a plain value, which are read without unpickling, got "
            f"{type(value).__name__}; have state_dict give such values"
        )
