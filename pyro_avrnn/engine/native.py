"""Runs the loop in C, with one call forward and one backward.

The graph of a step is written as C with all sizes known: products by the ``gemm`` of
:mod:`~pyro_avrnn.engine.c_code`, and what lies between two products fused into one loop over
elements. What all steps share is computed before the first of them, and its gradients, one product
of the rows of all steps each, after the last. The machine's C compiler needs half a second for it,
once.
"""

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.c_code import built, prelude
from pyro_avrnn.engine.c_operations import Unsupported
from pyro_avrnn.engine.c_places import Place, nest
from pyro_avrnn.engine.c_sums import Summing
from pyro_avrnn.engine.c_writer import Writer
from pyro_avrnn.engine.capture import nodes_for, value
from pyro_avrnn.engine.choices import gather, give_back
from pyro_avrnn.engine.loops import Loop


class Native:
    """A loop in C, called as :class:`~pyro_avrnn.engine.loops.Loop` is.

    Args:
        loop: gives the graphs.

    Raises:
        Unsupported: an operation that is not known here.
        OSError, subprocess.CalledProcessError: no C compiler.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        values = [value(n) for n in (*loop.fixed, *loop.rows, *loop.before)]
        kinds = {
            (v.dtype, n.meta["device"].type) for v, n in zip(values, self._inputs(), strict=True)
        }
        if not kinds <= {(torch.float32, "cpu"), (torch.float64, "cpu")} or len(kinds) != 1:
            raise Unsupported("numbers of this kind, or of several kinds")
        self.dtype = kinds.pop()[0]
        ahead, back = self._forward(), self._backward() if loop.learns else None
        source = prelude(self.dtype == torch.float64) + ahead.source(False)
        source += back.source(True) if back else ""
        library = built(source)
        self.room = max(ahead.scratch, back.scratch if back else 0)
        self.local = threading.local()  # memory that one thread works in
        self.calls = library.forward, library.backward if back else None

    def _inputs(self) -> list[fx.Node]:
        return [*self.loop.fixed, *self.loop.rows, *self.loop.before]

    def _forward(self) -> Writer:
        loop, count = self.loop, len(self.loop.before)
        wanted = [*loop.outputs, *loop.saved]
        needed = nodes_for(wanted, self._inputs())
        writer = Writer("forward", [n for n in loop.graph.graph.nodes if n in needed])
        for node in loop.fixed:
            writer.same(node)
        for node in loop.rows:
            writer.places[node] = writer.row(value(node).shape)
        ends: list[tuple[fx.Node, Place]] = []
        for node, after in zip(loop.before, loop.outputs, strict=False):
            place = writer.row(value(node).shape)  # before this step, and after it
            writer.places[node] = place
            size = math.prod(place.shape)
            ends.append((after, place._replace(pointer=f"({place.pointer} + {size})")))
        ends += [(n, writer.row(value(n).shape)) for n in wanted[count:]]
        writer.finish(ends)
        return writer

    def _backward(self) -> Writer:
        loop, count = self.loop, len(self.loop.before)
        writer = Summing("backward", loop.late)
        for node in loop.fixed:
            writer.same(node)
        results = [n for i, n in zip(loop.live, loop.cotangents, strict=True) if i >= count]
        for node in (*loop.rows, *loop.before, *loop.saved, *results):
            writer.places[node] = writer.row(value(node).shape)
        known = dict(writer.places)
        ends: list[tuple[fx.Node, Place]] = []
        for i, node in enumerate(loop.before):
            after = writer.row(value(node).shape, "t + 1")
            carry = writer.whole(node)
            gradient = loop.gradients.get(node)
            if i in loop.live:
                cotangent = loop.cotangents[loop.live.index(i)]
                writer.places[cotangent] = made = writer.memory(after.shape)
                loads = [(carry, "x"), *([(after, "y")] if loop.shown is None else [])]
                given = " + ".join(name for _, name in loads)
                writer.body += nest(after.shape, loads, [], [(made, given)])
            if gradient is not None:
                ends.append((gradient, carry))
            elif i in loop.live:
                writer.body += nest(after.shape, [], [], [(carry, "0")])
        sums = [(loop.gradients[n], writer.memory(value(n).shape)) for n in loop.sums]
        totals = [writer.whole(n) for n in loop.sums]
        stacked = [(n, writer.row(value(n).shape)) for n in loop.stacked]
        writer.finish([*ends, *stacked, *sums])
        for (_, step), place in zip(sums, totals, strict=True):
            writer.body += nest(place.shape, [(step, "x")], [], [(place, "x")], "{0} += {1};")
        writer.places = known | dict(stacked)
        writer.sums([(loop.gradients[n], writer.whole(n)) for n in loop.deferred])
        return writer

    @contextmanager
    def _calling(self, which: int, length: int, tensors: Sequence[Tensor]) -> Iterator[Any]:
        """Yield a function ``(begin, end)`` that runs these steps."""
        scratch = self.local.__dict__.pop("scratch", None)  # of one run at a time
        scratch = torch.zeros(self.room, dtype=self.dtype) if scratch is None else scratch
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        call: Any = self.calls[which]
        given = ctypes.c_long(length), pointers, ctypes.c_void_p(scratch.data_ptr())
        yield lambda begin, end: call(ctypes.c_long(begin), ctypes.c_long(end), *given)
        self.local.scratch = scratch

    def _blank(self, node: fx.Node, *lead: int) -> Tensor:
        return torch.empty((*lead, *value(node).shape), dtype=self.dtype)

    def forward(self, length: int, *given: Any) -> Any:
        """States ``(T + 1, ...)``, results, and what is kept for the backward pass."""
        loop, count = self.loop, len(self.loop.before)
        watch, inputs = given[: -len(self._inputs())], given[-len(self._inputs()) :]
        split = len(inputs) - count
        states = []
        for node, first in zip(loop.before, inputs[split:], strict=True):
            states.append(self._blank(node, length + 1))
            states[-1][0] = first
        rest = [self._blank(n, length) for n in (*loop.outputs[count:], *loop.saved)]
        end = len(loop.outputs) - count
        wanted = end - (loop.shown or 0)
        with self._calling(0, length, [*self._laid(inputs[:split]), *states, *rest]) as run:
            if watch:
                choose, parents = watch
                for t in range(length):
                    run(t, t + 1)
                    parents.append(choose(t, *(shown[t] for shown in rest[wanted:end])))
                    if parents[-1] is not None:
                        for state in states:
                            gather(state[t + 1], parents[-1], state[t + 1])
            else:
                run(0, length)
        return states, rest[:wanted], rest[end:]

    def backward(self, length: int, *given: Any) -> Any:
        """Gradients of the states, sums over all steps, ``loop.stacked`` and ``loop.deferred``."""
        loop, count = self.loop, len(self.loop.before)
        parents: Any = given[0] if loop.shown is not None else None
        inputs = given if parents is None else given[1:]
        split = len(inputs) - count
        after = inputs[split:]
        carry = [torch.zeros_like(g[0]) for g in after]
        sums = [torch.zeros_like(self._blank(n)) for n in loop.sums]
        stacked = [self._blank(n, length) for n in loop.stacked]
        totals = [self._blank(n) for n in loop.deferred]
        pairs = [t for pair in zip(after, carry, strict=True) for t in pair]
        tensors = [*self._laid(inputs[:split]), *pairs, *sums, *stacked, *totals]
        with self._calling(1, length, tensors) as run:
            if parents is None:
                run(0, length)
            for t in reversed(range(0 if parents is None else length)):
                for i in (i for i in loop.live if i < count):
                    give_back(carry[i].add_(after[i][t + 1]), parents[t])
                run(t, t + 1)
        return carry, sums, stacked, totals

    def _laid(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs in the layout that the code expects: constants strided, rows contiguous."""
        made = []
        for i, given in enumerate(inputs):
            if i >= len(self.loop.fixed):
                made.append(given.contiguous())
                continue
            strides = tuple(self.loop.fixed[i].meta["stride"])
            if given.stride() != strides and given.numel() > 1:
                given = torch.empty_strided(given.shape, strides, dtype=given.dtype).copy_(given)
            made.append(given)
        return made
