"""Chunks of a recurrence, compiled once by TorchInductor.

A chunk is some steps of the loop's graph one after the other, so that everything between its
matrix products becomes a few kernels and nothing is called from Python. Steps that do not fill a
chunk are run without compiling. What TorchInductor has compiled it keeps on disk.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_avrnn.engine.capture import extract
from pyro_avrnn.engine.loops import Loop

#: steps of a chunk: more make calls rarer and compiling longer
STEPS = 10

Function = Callable[..., list[Tensor]]


class Chunks:
    """Forward and backward of a loop in chunks; called as the loop's own functions are.

    Args:
        loop: gives the graphs.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        inputs = [*loop.fixed, *loop.rows, *loop.before]
        self.step = extract(loop.graph, inputs, [*loop.outputs, *loop.saved])
        if loop.learns:
            self.kept = [*inputs, *loop.saved]
            carried = [loop.gradients[n] for n in [*loop.through, *loop.sums]]
            self.unstep = extract(
                loop.graph, [*self.kept, *loop.cotangents], [*carried, *loop.stacked]
            )
        self.compiled: dict[str, Function] = {}

    def forward(self, length: int, *inputs: Tensor) -> Any:
        """States ``(T + 1, ...)``, results, and what is kept for the backward pass."""
        loop, count = self.loop, len(self.loop.before)
        split = len(inputs) - count
        fixed, rows = inputs[: len(loop.fixed)], inputs[len(loop.fixed) : split]
        now, pieces = list(inputs[split:]), []
        first = [s.unsqueeze(0) for s in now]
        for a in range(0, length, STEPS):
            given = [*fixed, *(r[a : a + STEPS] for r in rows), *now]
            pieces.append(self._call("forward", self._forward, min(STEPS, length - a), given))
            now = [s[-1] for s in pieces[-1][:count]]
        columns = list(zip(*pieces, strict=True))
        states = [torch.cat([f, *c]) for f, c in zip(first, columns, strict=False)]
        rest = [torch.cat(column) for column in columns[count:]]
        wanted = len(loop.outputs) - count
        return states, rest[:wanted], rest[wanted:]

    def _forward(self, size: int, *inputs: Tensor) -> list[Tensor]:
        loop, split = self.loop, len(inputs) - len(self.loop.before)
        fixed, rows = inputs[: len(loop.fixed)], inputs[len(loop.fixed) : split]
        now, made = inputs[split:], []
        for i in range(size):
            made.append(self.step(*fixed, *(r[i] for r in rows), *now))
            now = made[-1][: len(now)]
        return [torch.stack(column) for column in zip(*made, strict=True)]

    def backward(self, length: int, *inputs: Tensor) -> Any:
        """Gradients of the states, sums over all steps, and ``loop.stacked``."""
        loop, count = self.loop, len(self.loop.before)
        fixed, rows = inputs[: len(loop.fixed)], inputs[len(loop.fixed) : len(inputs) - count]
        after = [g[1:] for g in inputs[len(inputs) - count :]]
        carry = [torch.zeros_like(g[0]) for g in after]
        sums: list[Tensor] = []
        pieces: list[list[Tensor]] = []
        for a in reversed(range(0, length, STEPS)):
            given = [*fixed, *(r[a : a + STEPS] for r in (*rows, *after)), *carry]
            made = self._call("backward", self._backward, min(STEPS, length - a), given)
            carry, own = made[:count], made[count : count + len(loop.sums)]
            sums = [x + y for x, y in zip(sums, own, strict=True)] if sums else own
            pieces.insert(0, made[count + len(own) :])
        return carry, sums, [torch.cat(column) for column in zip(*pieces, strict=True)]

    def _backward(self, size: int, *inputs: Tensor) -> list[Tensor]:
        loop, count = self.loop, len(self.loop.before)
        fixed, rest = inputs[: len(loop.fixed)], inputs[len(loop.fixed) :]
        ends = len(rest) - 2 * count, len(rest) - count
        rows, after = rest[: ends[0]], rest[ends[0] : ends[1]]
        carry: Sequence[Tensor] = rest[ends[1] :]
        kept = len(self.kept) - len(fixed)
        sums: list[Tensor] = []
        stacked: list[Sequence[Tensor]] = []
        for i in reversed(range(size)):
            states = [c + g[i] for c, g in zip(carry, after, strict=True)]
            late = [states[j] for j in loop.live if j < count] + [r[i] for r in rows[kept:]]
            out = self.unstep(*fixed, *(r[i] for r in rows[:kept]), *late)
            through = dict(zip(loop.through, out, strict=False))
            carry = [
                through[n] if n in through else torch.zeros_like(c)
                for n, c in zip(loop.before, carry, strict=True)
            ]
            own = out[len(through) : len(through) + len(loop.sums)]
            sums = [x + y for x, y in zip(sums, own, strict=True)] if sums else list(own)
            stacked.append(out[len(through) + len(own) :])
        columns = zip(*reversed(stacked), strict=True)
        return [*carry, *sums, *map(torch.stack, columns)]

    def _call(self, name: str, chunk: Callable[..., Any], size: int, given: list[Tensor]) -> Any:
        return chunk(size, *given) if size < STEPS else list(self.compiled[name](*given))

    def compile(self) -> None:
        """Compile both directions, which takes half a minute if TorchInductor never has before."""
        loop = self.loop
        fixed = [_blank(n) for n in loop.fixed]
        rows = [_blank(n, STEPS) for n in loop.rows]
        states = [_blank(n) for n in loop.before]
        given = {"forward": [*fixed, *rows, *states]}
        if loop.learns:
            count = len(states)
            late = [n for n, i in zip(loop.cotangents, loop.live, strict=True) if i >= count]
            kept = [_blank(n, STEPS) for n in [*loop.before, *loop.saved, *late]]
            after = [_blank(n, STEPS) for n in loop.before]
            given["backward"] = [*fixed, *rows, *kept, *after, *states]
        for name, examples in given.items():
            chunk = partial(self._forward if name == "forward" else self._backward, STEPS)
            self.compiled[name] = compiled(chunk, examples)


def _blank(node: fx.Node, *lead: int) -> Tensor:
    """Zeros as a node's value is, or as those of some steps are."""
    made = node.meta["value"]
    device = node.meta["device"]
    if lead:
        return torch.zeros((*lead, *made.shape), dtype=made.dtype, device=device)
    stride = node.meta["stride"]
    return torch.empty_strided(made.shape, stride, dtype=made.dtype, device=device).zero_()


def compiled(function: Function, examples: Sequence[Tensor]) -> Function:
    """A function of tensors of these shapes, compiled and tried."""
    from torch import _inductor

    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
        cuda = any(e.is_cuda for e in examples)
        options = {"triton.cudagraphs": True} if cuda else {"cpp_wrapper": True}
        made = _inductor.compile(graph, list(examples), options=options)
        made(*examples)
    return made


@cache
def warn(reason: str) -> None:
    """Say why nothing is compiled, once for each reason."""
    warnings.warn(
        f"compile=True has no effect here: TorchInductor failed ({reason[:200]}); install a C++ "
        "compiler. The recurrence runs uncompiled, with the same results",
        stacklevel=2,
    )
