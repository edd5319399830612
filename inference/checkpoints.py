"""Checkpoints of ``fit``: all that a run is made of, in one file, so that it goes on bit for bit.

On a CPU, a run that was interrupted and resumed gives the numbers of one that was not.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from inference.batches import Windows
from inference.files import check_plain, file_path, load_plain, save_plain
from inference.protocols import counts
from inference.random import random_state, set_random_state
from inference.schedules import Clock

_FORMAT = "fit checkpoint 3"
_KEYS = {
    *("format", "run", "history", "batches", "random"),
    *("parameters", "gradients", "optimisers", "clock", "states"),
}


@runtime_checkable
class Stateful(Protocol):
    """An object whose state changes over a run: a module, an optimiser, a critic with both."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, nested in dicts, lists and tuples."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore what ``state_dict`` returned."""
        ...


@dataclass(frozen=True)
class Checkpointing:
    """A file that holds a whole run of ``fit``, so that an interrupted one can go on.

    With the same arguments, on a CPU, a resumed run ends as if never interrupted, bit for bit; a
    finished one returns at once. Of hooks and loss the checkpoint knows the ``state_dict`` of them
    or of the object whose method they are, and torch's generators; modules with buffers that a
    plain function uses belong in ``keep``.

    Args:
        path: the file, written atomically.
        every: SVI steps between writing it; it is written at the end, too. What an interrupted
            run did since then is done again.
        resume: go on from the file where it exists, and start anew where it does not.

    Raises:
        ValueError: ``every`` below 1.
    """

    path: str | os.PathLike[str]
    every: int = 50
    resume: bool = False

    def __post_init__(self) -> None:
        file_path(self.path)
        counts(1, every=self.every)


class Checkpoint:
    """The file of a run, and what goes into it.

    Args:
        where: the file, and how often it is written.
        svi: model and guide, optimiser and loss.
        windows: the batches.
        history: of the run; its attributes are plain values.
        run: plain values that name the run; only a checkpoint with the same is resumed.
        states: further things with a state, under the names that errors give them.
    """

    def __init__(
        self,
        where: Checkpointing,
        svi: SVI,
        windows: Windows,
        history: Any,
        *,
        run: dict[str, Any],
        states: Mapping[str, Any],
    ) -> None:
        self.path, self.every, self.resume = Path(where.path), where.every, where.resume
        self.svi, self.windows, self.history = svi, windows, history
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
            "history": vars(self.history) | {"rows": rows, "carried": None},  # as batches have it
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
        check_plain(content, "the checkpoint")
        save_plain(self.path, content)

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
        stored: dict[str, Tensor] = {}

        def visit(batch: tuple[Tensor, ...]) -> None:  # until all have been asked for
            if not stored or content["parameters"].keys() - stored:
                stored.update(self._register(batch))

        self.windows.seek(content["batches"], visit)
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
        """Parameters that a batch asks for, now in the store, which a new process has empty.

        The loss is evaluated: only the programs know the constraints of their ``pyro.param``, and
        an autoguide sets itself up. All that this draws or moves is overwritten afterwards.
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


class Best:
    """The best parameters so far: those of the store, and what programs and modules hold.

    Args:
        modules: kept whole.
        programs: model and guide, whose buffers are kept if they are modules; their parameters
            are in the store.
    """

    def __init__(self, modules: Sequence[nn.Module], programs: Sequence[Any] = ()) -> None:
        self.modules = modules
        self.programs = [program for program in programs if isinstance(program, nn.Module)]
        self.parameters: dict[str, Tensor] = {}
        self.buffers: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Tensor]] = []

    def take(self) -> None:
        """Keep what is there now."""
        self.parameters = _copied(dict(pyro.get_param_store().named_parameters()))
        self.buffers = [_copied(dict(program.named_buffers())) for program in self.programs]
        self.states = [_copied(module.state_dict()) for module in self.modules]

    @torch.no_grad()
    def restore(self) -> None:
        """Put what was kept back in place."""
        for name, p in pyro.get_param_store().named_parameters():
            if name in self.parameters:
                p.copy_(self.parameters[name])
        for program, buffers in zip(self.programs, self.buffers, strict=False):
            for name, buffer in program.named_buffers():
                if name in buffers:  # it may be new
                    buffer.copy_(buffers[name])
        for module, state in zip(self.modules, self.states, strict=False):
            module.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"parameters": self.parameters, "buffers": self.buffers, "modules": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.parameters, self.states = state["parameters"], state["modules"]
        self.buffers = state["buffers"]

    def all_finite(self) -> bool:
        """Whether the parameters there now are numbers."""
        stored = [p for _, p in pyro.get_param_store().named_parameters()]
        further = [p for module in self.modules for p in module.parameters()]
        return all(bool(p.isfinite().all()) for p in [*stored, *further])


def _stateful(part: Any) -> Any:
    """The owner of a hook's or loss's state: itself, or the object it is a method of."""
    while isinstance(part, partial):
        part = part.func
    owners = (part, getattr(part, "__self__", None))
    return next((owner for owner in owners if isinstance(owner, Stateful)), None)


def _kind(optim: Any) -> str:
    """Whose states these are; one optimiser's mean nothing to another."""
    makers = (getattr(optim, f"pt_{part}_constructor", None) for part in ("scheduler", "optim"))
    return " of ".join(getattr(m, "__name__", type(m).__name__) for m in makers if m is not None)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
