r"""``scan``: a step, run over all steps of a sequence as one function.

It knows tensors, and no model. A step is a function of what it reads, the state and the inputs of
one step; state, inputs and outputs are tensors, nested as you like:

    >>> import torch
    >>> from pyro_avrnn.engine import captures, scan
    >>> def step(layer, state, inputs):
    ...     state = torch.tanh(layer(torch.cat([inputs, state], dim=-1)))
    ...     return state, {"twice": 2 * state}
    >>> layer, inputs = torch.nn.Linear(3 + 4, 4), torch.randn(20, 5, 3)
    >>> path = scan(step, (layer,), torch.zeros(5, 4), inputs)
    >>> path.states.shape, path.outputs["twice"].shape
    (torch.Size([21, 5, 4]), torch.Size([20, 5, 4]))

How this step becomes a loop, and who does it:

1. :mod:`~pyro_avrnn.engine.front` asks TorchDynamo for the graph of the step: ``cat``, ``linear``,
   ``tanh``, ``mul``; next time, which of the graphs it has is the step still.
2. :mod:`~pyro_avrnn.engine.capture` writes it in torch's smallest operations, ``addmm`` and the
   like.
3. :mod:`~pyro_avrnn.engine.parts` splits the product, ``[inputs, state] W = inputs W_1 + state
   W_2``, and sorts: ``W_1`` and ``W_2`` are *static*, ``inputs W_1 + b`` is computed *ahead*, for
   all steps at once (:mod:`~pyro_avrnn.engine.batched`), ``2 * state`` *after*; what recurs is
   ``tanh(a_t + state W_2)``.
4. :mod:`~pyro_avrnn.engine.loops` differentiates that and :mod:`~pyro_avrnn.engine.writer` writes
   two functions, forward and backward:

    >>> (recurrence,) = captures(layer)
    >>> for function in (recurrence.loop.forward, recurrence.loop.backward):
    ...     print(function.source[function.source.index(":\n        ") + 2 :])
            op_addmm(r_given_0, r_before_0, same_0, out=m_addmm)
            op_tanh(m_addmm, out=r_m_tanh)
        return [S_0], [], [m_tanh]
            torch.add(c_0, r_after_0, out=m_gradient_0)
            op_tanh_backward(m_gradient_0, r_tanh, grad_input=r_m_tanh_backward)
            op_mm(r_m_tanh_backward, n_t, out=m_mm)
            c_0 = m_mm
        return [c_0], [], [m_tanh_backward]

5. :mod:`~pyro_avrnn.engine.recurrence` runs all of it, under autograd.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from pyro_avrnn.engine.front import TRACING, Front, Selected, Uncapturable, first_line
from pyro_avrnn.engine.recurrence import Choose, Recurrence

_log = logging.getLogger(__name__)
#: a capture costs as much as a hundred steps or so; shorter sequences are not worth one
LEAST_STEPS = 16
_FRONTS: WeakKeyDictionary[Any, dict[Any, Front]] = WeakKeyDictionary()
#: the environment may ask for the plain loop: for debuggers, and for short tests
_ON = ContextVar("on", default=os.environ.get("PYRO_AVRNN_PLAIN_LOOP", "0") in ("", "0"))


class Path(NamedTuple):
    """States and outputs of all steps."""

    states: Any  # before each step and after the last, leaves (T + 1, ...)
    outputs: Any  # leaves (T, ...)


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Whether scans in here run as one function, if they can."""
    before = _ON.set(on)
    try:
        yield
    finally:
        _ON.reset(before)


def switched_off() -> AbstractContextManager[None]:
    """Rollouts run step by step in here: for second derivatives, or to see each step."""
    return switched(False)


def scan(
    step: Callable[..., Any],
    of: Sequence[Any],
    state: Any,
    inputs: Any,
    *,
    choose: Choose | None = None,
    compile: bool = False,
) -> Path | None:
    """Run all steps, or return None where only a plain loop can; the log says why.

    Args:
        step: ``step(*of, state, inputs) -> (next state, outputs)``; with ``choose`` there is a
            third part, a sequence of what it is shown, constants for autograd.
        of: what the step reads: modules and whatever else. What is kept of the step is kept for
            as long as the first module lives.
        state: before the first step.
        inputs: of all steps, ``(T, ...)``.
        choose: is called after each step, ``(t from 0, *shown)``; of each tensor of the next
            state it takes rows ``(K, B)`` of the first dimension, or all for None.
        compile: run the loop in C.
    """
    now, rows = pytree.tree_leaves(state), pytree.tree_leaves(inputs)
    if len(rows[0]) < LEAST_STEPS or not _ON.get() or _watched():
        return None
    owner = next((thing for thing in of if isinstance(thing, nn.Module)), step)
    fronts = _FRONTS.setdefault(owner, {})
    try:
        front = fronts.get(step) or fronts.setdefault(step, Front())
        selected = front.select(step, of, state, inputs)
    except Uncapturable as reason:
        _tell(of, reason)
        return None
    if selected is None:
        return None
    graph, read = selected.graph, [torch.as_tensor(thing) for thing in selected.read]
    key = choose is not None
    if key not in graph.made:
        graph.made[key] = _capture(step, of, selected, state, inputs, key)
    if graph.made[key] is None:
        return None
    states, outputs = graph.made[key](read, now, rows, choose=choose, compile=compile)
    spec = graph.spec.children()
    return Path(spec[0].unflatten(states), spec[1].unflatten(outputs))


def captures(owner: Any) -> list[Recurrence | None]:
    """Captures of a module's steps; None stands for a step that cannot be captured."""
    graphs = [graph for front in _FRONTS.get(owner, {}).values() for graph in front.graphs]
    return [recurrence for graph in graphs for recurrence in graph.made.values()]


def _capture(
    step: Callable[..., Any],
    of: Sequence[Any],
    selected: Selected,
    state: Any,
    inputs: Any,
    chosen: bool,
) -> Recurrence | None:
    """Capture this step; None if that is impossible, with the reason in the log."""
    few = pytree.tree_map(lambda x: _leaf(x[:2]), inputs)
    first, read = pytree.tree_map(_leaf, state), [torch.as_tensor(r) for r in selected.read]
    shown = selected.graph.spec.children()[2].num_leaves if chosen else None
    try:
        with TRACING, saved_tensors_hooks(_same, _same):  # checkpointing is to see nothing of it
            leaves = pytree.tree_leaves(first), pytree.tree_leaves(few)
            found = Recurrence(selected.graph, read, *leaves, shown)
            check(found, step, of, read, first, few)
    except Exception as reason:  # noqa: BLE001 - whatever tracing cannot do, the loop can
        _tell(of, reason)
        return None
    return found


def check(
    recurrence: Recurrence,
    step: Callable[..., Any],
    of: Sequence[Any],
    read: Sequence[Tensor],
    state: Any,
    inputs: Any,
) -> None:
    """Compare values and gradients of a recurrence with those of the step itself, on examples.

    Raises:
        Uncapturable: they differ, as for a step that computes something else every time.
    """
    now, rows = pytree.tree_leaves(state), pytree.tree_leaves(inputs)
    nested = pytree.tree_structure(inputs)
    shown: list[Sequence[Tensor]] = []

    def looped() -> list[Tensor]:
        before, made = state, []
        for t in range(len(rows[0])):
            before, outputs, *rest = step(*of, before, nested.unflatten([x[t] for x in rows]))
            made.append(pytree.tree_leaves((before, outputs)))
            shown.extend(rest)
        return [torch.stack(column) for column in zip(*made, strict=True)]

    def rolled() -> list[Tensor]:
        def choose(t: int, *mine: Tensor) -> None:
            for one, other in zip(shown[t], mine, strict=True):
                _require_close(one, other)

        watch = None if recurrence.shown is None else choose
        states, outputs = recurrence(read, now, rows, choose=watch)
        return [*(s[1:] for s in states), *outputs]

    wanted = [t for t in (*read, *now, *rows) if t.requires_grad]
    found: list[list[Tensor]] = []
    for way in (looped, rolled):
        with torch.random.fork_rng([rows[0].device] if rows[0].is_cuda else []):
            torch.manual_seed(0)
            made = way()
            weights = [torch.randn_like(m) for m in made]
        total = sum((m * w).sum() for m, w in zip(made, weights, strict=True))
        if isinstance(total, Tensor) and total.requires_grad:
            grads = torch.autograd.grad(total, wanted, allow_unused=True)
            pairs = zip(wanted, grads, strict=True)
            made += [torch.zeros_like(t) if g is None else g for t, g in pairs]
        found.append([m.detach() for m in made])
    if len(found[0]) != len(found[1]):
        raise Uncapturable("its results differ in number")
    for one, other in zip(*found, strict=True):
        _require_close(one, other)


def _require_close(one: Tensor, other: Tensor) -> None:
    scale = one.abs().max() if one.numel() else one.new_zeros(())
    close = torch.finfo(one.dtype).eps ** 0.5 * scale
    if one.shape != other.shape or bool((one - other).abs().gt(close).any()):
        raise Uncapturable("as a graph it gives other values or gradients")


def _tell(of: Sequence[Any], reason: Exception) -> None:
    names = [type(thing).__name__ for thing in of if isinstance(thing, nn.Module)]
    _log.info("%s run step by step: %s", " with ".join(names) or "steps", first_line(reason))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)


def _watched() -> bool:
    """Whether hooks, autocast or function transforms are active."""
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return autocast or any(_OF_ALL) or torch._C._functorch.peek_interpreter_stack() is not None


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_OF_ALL = [getattr(nn.modules.module, f"_global_{name}") for name in _HOOKS]
