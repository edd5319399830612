"""Runs a captured step for any number of steps."""

import subprocess
import warnings
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.batched import all_steps
from pyro_avrnn.engine.c_operations import Unsupported
from pyro_avrnn.engine.capture import drop_values, traced, value
from pyro_avrnn.engine.front import Graph, first_line
from pyro_avrnn.engine.loops import Loop
from pyro_avrnn.engine.native import Native
from pyro_avrnn.engine.parts import Part, Parts

#: (t from 0, *what the step shows of it) -> the particles that go on, or None for all as they are
Choose = Callable[..., Tensor | None]

_CACHED = 4 * 2**20  # bytes that stay near a processor from one step to the next
_REPEATED = 4096  # numbers of which gradients may be summed up step by step


class _Run(torch.autograd.Function):
    """The loop as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, loop: Loop, driver: Any, choose: Choose | None, length: int, *inputs: Tensor
    ) -> Any:
        ordered = loop.order(inputs)
        watch: list[Any] = [] if choose is None else [choose, []]
        states, wanted, saved = driver.forward(length, *watch, *ordered)
        ctx.loop, ctx.driver, ctx.length, ctx.parents = loop, driver, length, watch[1:]
        ctx.set_materialize_grads(False)  # what was not used is to have no gradient, not zero
        # saved views of what is returned would be views made without gradients
        ctx.save_for_backward(*loop.slim(ordered), *states, *(s.data for s in saved))
        return (*states, *wanted)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the recurrence has no second derivatives (create_graph=True) on the fast path; "
                "compute it inside `with pyro_avrnn.engine.switched_off():`"
            )
        loop, kept, count = ctx.loop, list(ctx.saved_tensors), len(ctx.loop.before)
        start = len(loop.fixed) + len(loop.rows)
        kept[start : start + count] = [s[:-1] for s in kept[start : start + count]]
        late = loop.laid(cotangents, kept[start : start + count], ctx.length)
        found = ctx.driver.backward(ctx.length, *ctx.parents, *kept, *late)
        unused = {i for i, g in enumerate(cotangents) if g is None and i >= count}
        return None, None, None, None, *loop.finish(kept, late, found, unused)


@cache
def warn(reason: str) -> None:
    """Warn that nothing is compiled, once for each reason."""
    warnings.warn(
        f"compile=True has no effect here ({reason[:200]}): it needs a C compiler, and operations "
        "that engine/c_operations.py knows; the recurrence runs uncompiled, with the same results",
        stacklevel=2,
    )


class Recurrence:
    """A captured step as a function of all steps.

    Args:
        graph: of the step.
        read: tensors that the step reads besides state and inputs.
        state: before the first step, leaves.
        inputs: of all steps, leaves.
        shown: how many of the last outputs say which particles go on; None if nobody says so.

    Raises:
        Uncapturable: a step that is no fixed graph of tensor operations.
    """

    def __init__(
        self,
        graph: Graph,
        read: Sequence[Tensor],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        shown: int | None,
    ) -> None:
        self.shown, self.learns = shown, torch.is_grad_enabled()
        every = [*read, *state, *(x[0] for x in inputs)]
        module, count = graph.module, len(read)
        others = iter(range(count))  # what is read comes first, then the blanks
        order = [next(others) if p is None else count + p for p in graph.places]

        def run(*flat: Tensor) -> list[Tensor]:
            made = module(*(flat[i] for i in order))
            return [made[i] if computed else flat[i] for computed, i in graph.outputs]

        examples = [e.detach().clone() for e in every]
        with torch.random.fork_rng([e.device for e in examples[:1] if e.is_cuda]):
            whole = traced(run, examples, marks=True)
            self.parts = Parts(whole, count, len(state), shown)
            known = self._ahead(read, state, [x[:1] for x in inputs])
            moves = {self.parts.state[i] for i in range(len(state))} - set(known)
            self.learning = {n for n, t in known.items() if t.requires_grad} | moves
            self.loop = self._loop(self.parts.loop, self.parts.recurring)
        pieces = [p.module.graph.nodes for p in (*self.parts.stages, self.parts.after)]
        drop_values(node for nodes in (whole.graph.nodes, *pieces) for node in nodes)

    def __call__(
        self,
        read: Sequence[Tensor],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        choose: Choose | None = None,
        compile: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States ``(T + 1, ...)``, the last after all steps, and outputs ``(T, ...)``.

        Args:
            read, state, inputs: of the shapes this was made with, but for the number of steps.
            choose: says which particles go on.
            compile: run the loop in C.
        """
        native = self.native if compile else None
        if native is not None and native.loop is not self.loop:
            return self._in_c(native, read, state, inputs, choose)
        parts, length = self.parts, len(inputs[0])
        known = self._ahead(read, state, inputs)
        known |= {parts.state[i]: state[i] for i in parts.recurring}
        made = self._recur(known, length, choose, native)
        recurring = dict(zip(parts.recurring, made, strict=False))
        kept = parts.loop.outputs[len(recurring) :]
        known |= dict(zip(kept, made[len(recurring) :], strict=False))
        paths: list[Tensor] = []
        for i, first in enumerate(state):
            if i in parts.constant:
                path = first.expand(length + 1, *first.shape)
            elif i in recurring:
                path = recurring[i]
                known.setdefault(parts.next[i], path[1:])
            else:
                after = self._rows(known, parts.next[i], length).expand(length, *first.shape)
                path = torch.cat([first.unsqueeze(0), after])
            paths.append(path)
            known[parts.state[i]] = path[:-1]
        if parts.after.outputs:
            known |= all_steps(parts.after, known, set(parts.static.outputs), length)
        return paths, [self._rows(known, node, length) for node in parts.outputs]

    def _recur(
        self,
        known: dict[fx.Node, Tensor],
        length: int,
        choose: Choose | None,
        native: Native | None,
    ) -> tuple[Tensor, ...]:
        """Run the loop, and return the results of all steps."""
        loop = self.loop
        if loop is None:
            return ()
        if choose is not None:
            choose = self._drawing(choose, known, length)
        return self._run(loop, native or loop, self.parts.loop, known, length, choose)

    def _run(
        self,
        loop: Loop,
        driver: Any,
        part: Part,
        known: dict[fx.Node, Tensor],
        length: int,
        choose: Choose | None,
    ) -> tuple[Tensor, ...]:
        fixed = self._same()
        inputs = [known[n] if n in fixed else known[n].contiguous() for n in part.inputs]
        if self.learns:
            found: tuple[Tensor, ...] = _Run.apply(loop, driver, choose, length, *inputs)
            return found
        watch: list[Any] = [] if choose is None else [choose, []]
        states, wanted, _ = driver.forward(length, *watch, *loop.order(inputs))
        return (*states, *wanted)

    @cached_property
    def native(self) -> Native | None:
        """The loop in C, or None with a warning where that is impossible.

        The whole step is in it, unless that would repeat at every step what all steps share, or
        the matrices that every step would read anew are large, or it has operations that only
        what recurs has not.
        """
        parts = self.parts
        moving = [i for i in range(len(parts.state)) if i not in parts.constant]
        shared = sum(value(n).numel() * value(n).element_size() for n in parts.static.outputs)
        small = shared <= _CACHED
        ways: list[tuple[Part | None, Sequence[int]]] = [(parts.loop, parts.recurring)]
        if small:
            each = [parts.moving(whole=True), parts.moving(whole=False)]
            ways = [(part, moving) for part in each] + ways
        reason: Exception = Unsupported("nothing recurs")
        for i, (part, states) in enumerate(ways):
            if part is None:
                continue
            try:
                with torch.random.fork_rng([]):
                    loop = self.loop if part is parts.loop else self._loop(part, states)
                again = 0 if loop is None else sum(value(n).numel() for n in loop.sums)
                if loop is not None and (i + 1 == len(ways) or again <= _REPEATED):
                    return Native(loop)
            except (Unsupported, OSError, subprocess.SubprocessError) as error:
                reason = error
        if self.loop is not None:
            told = getattr(reason, "stderr", "") or first_line(reason)
            warn(told.strip().splitlines()[0])
        return None

    def _in_c(
        self,
        native: Native,
        read: Sequence[Tensor],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        choose: Choose | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run all steps by :attr:`native`."""
        parts, length, part = self.parts, len(inputs[0]), native.loop.part
        known = dict(zip(parts.read, read, strict=True)) | dict(
            zip(parts.state, state, strict=True)
        )
        if not set(part.inputs) <= {*known, *parts.inputs, *parts.noise}:
            known |= self._static(read, state)
        known |= dict(zip(parts.inputs, inputs, strict=True)) | self._noise(length)
        if choose is not None:
            choose = self._drawing(choose, known, length)
        made = self._run(native.loop, native, part, known, length, choose)
        moving = [i for i in range(len(state)) if i not in parts.constant]
        paths = dict(zip(moving, made, strict=False))
        known |= dict(zip(part.outputs[len(moving) :], made[len(moving) :], strict=False))
        whole = [
            paths[i] if i in paths else first.expand(length + 1, *first.shape)
            for i, first in enumerate(state)
        ]
        return whole, [self._rows(known, node, length) for node in parts.outputs]

    def _loop(self, part: Part, moving: Sequence[int]) -> Loop | None:
        if not part.outputs:
            return None
        states = [self.parts.state[i] for i in moving]
        fixed = set(part.inputs) & self._same()
        learning = self.learning & set(part.inputs) | set(states) if self.learns else None
        return Loop(part, states, fixed, learning, self.shown)

    def _same(self) -> set[fx.Node]:
        """Nodes with the same value at every step."""
        return {*self.parts.static.inputs, *self.parts.static.outputs}

    def _static(self, read: Sequence[Tensor], state: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
        """Values that are the same at every step, under autograd."""
        parts = self.parts
        known = dict(zip(parts.read, read, strict=True))
        known |= {parts.state[i]: state[i] for i in parts.constant}
        made = parts.static.module(*(known[n] for n in parts.static.inputs))
        return known | dict(zip(parts.static.outputs, made, strict=True))

    def _ahead(
        self, read: Sequence[Tensor], state: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> dict[fx.Node, Tensor]:
        """Values that are known before the loop, under autograd."""
        parts, length = self.parts, len(inputs[0])
        known = self._static(read, state)
        fixed = set(known)
        known |= dict(zip(parts.inputs, inputs, strict=True))
        known |= self._noise(length)
        waiting = list(parts.shifted)
        for part in parts.stages:
            for i in [i for i in waiting if parts.state[i] in part.inputs]:
                known[parts.state[i]] = self._shift(state[i], known, i, length)
                waiting.remove(i)
            if part.outputs:
                known |= all_steps(part, known, fixed, length)
        for i in waiting:
            known[parts.state[i]] = self._shift(state[i], known, i, length)
        return known

    def _rows(self, known: dict[fx.Node, Tensor], node: fx.Node, length: int) -> Tensor:
        """The values of all steps of a node, also of one that is the same at every step."""
        found = known[node]
        same = node in self.parts.static.outputs or node in self.parts.read
        return found.expand(length, *found.shape) if same else found

    def _shift(self, first: Tensor, known: dict[fx.Node, Tensor], i: int, length: int) -> Tensor:
        """A state before each step, of which those after are known."""
        after = self._rows(known, self.parts.next[i], length)[: length - 1]
        return torch.cat([first.unsqueeze(0), after.expand(-1, *first.shape)])

    def _noise(self, length: int) -> dict[fx.Node, Tensor]:
        """Noise for all steps, drawn in the order of the loop; of chosen ones for the first."""
        draws = self.parts.draws
        if self.parts.flows and self.shown is None:
            with torch.no_grad():
                return {node: noise.of(length) for node, noise in draws.items()}
        rows = {n: noise.like.new_empty((length, *noise.like.shape)) for n, noise in draws.items()}
        for t in range(length if self.shown is None else 1):
            self._draw(rows, t)
        return rows

    @torch.no_grad()
    def _draw(self, rows: dict[fx.Node, Tensor], t: int) -> None:
        for node, noise in self.parts.draws.items():
            rows[node][t] = noise()

    def _drawing(self, choose: Choose, known: dict[fx.Node, Tensor], length: int) -> Choose:
        """Draw the noise of a step after the choice of particles that reach it."""

        def choose_and_draw(t: int, *shown: Tensor) -> Tensor | None:
            parents = choose(t, *shown)
            if t + 1 < length:
                self._draw({n: known[n] for n in self.parts.draws}, t + 1)
            return parents

        return choose_and_draw
