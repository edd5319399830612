"""The recurrence of a captured step: T steps without autograd, and their gradients.

``Loop`` differentiates the loop's graph once and writes two plain functions for it, forward and
backward, in which every operation writes into memory reserved for all steps. A gradient of a
weight, a sum over steps of products, is formed after the loop by one product: the inputs and the
output gradients of all steps lie side by side by then.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, changes, drop_values, example, nodes_for, traced, value
from pyro_avrnn.engine.choices import gather, give_back
from pyro_avrnn.engine.front import Uncapturable
from pyro_avrnn.engine.parts import Part
from pyro_avrnn.engine.sums import leaves, seen, sum_over_steps, total
from pyro_avrnn.engine.views import VIEWS
from pyro_avrnn.engine.writer import INTO, Place, Writer, base


class Loop:
    """The part of a step that recurs, for T steps.

    Args:
        part: inputs and outputs of one step; the first outputs are the next states.
        states: which inputs are states, in the order of the outputs.
        fixed: inputs that are the same at every step; the others are stacked over time.
        learns: inputs that want a gradient, or None for a loop without.
        shown: how many of the last outputs are shown, after every step, to a function that says
            which particles go on from it; None if there is none.
    """

    def __init__(
        self,
        part: Part,
        states: Sequence[fx.Node],
        fixed: Iterable[fx.Node],
        learns: Iterable[fx.Node] | None,
        shown: int | None = None,
    ) -> None:
        self.shown = shown
        self.part, self.inputs, constant = part, part.inputs, set(fixed)
        examples = [example(node) for node in part.inputs]
        self.saved: list[fx.Node] = []
        self.sums: list[fx.Node] = []  # constants whose gradients are summed up in the loop
        if learns is None:
            self.graph = traced(part.module, examples)
            self.outputs = list(self.graph.graph.output_node().args[0])
        else:
            flags = [node in set(learns) for node in part.inputs]
            self._differentiate(part.module, examples, flags)
        holders = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        self.local = dict(zip(part.inputs, holders, strict=False))
        self.fixed = [self.local[n] for n in part.inputs if n in constant]
        self.before = [self.local[n] for n in states]
        known = {*self.fixed, *self.before}
        self.rows = [self.local[n] for n in part.inputs if self.local[n] not in known]
        for name, nodes in (("same", self.fixed), ("given", self.rows), ("state", self.before)):
            for i, node in enumerate(nodes):
                node._rename(f"{name}_{i}")
        self.learns = learns is not None
        if self.learns:
            self._divide(list(self.graph.graph.nodes))
        self.forward = self._write_forward()
        if self.learns:
            self.backward = self._write_backward()
        drop_values(self.graph.graph.nodes)

    def order(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs as forward takes them: constants, rows, states."""
        given = dict(zip(map(self.local.__getitem__, self.inputs), inputs, strict=True))
        return [given[n] for n in [*self.fixed, *self.rows, *self.before]]

    # forward

    def _write_forward(self) -> Callable[..., Any]:
        needed = nodes_for([*self.outputs, *self.saved], self.local.values())
        nodes = [n for n in self.graph.graph.nodes if n in needed]
        count = len(self.before)
        ahead, wanted, shown = self.outputs[:count], self.outputs[count:], []
        if self.shown is not None:
            split = len(wanted) - self.shown
            wanted, shown = wanted[:split], wanted[split:]
        writer = Writer(nodes, [*wanted, *self.saved])
        for node in self.fixed:
            writer.places[node] = Place("constant", node.name)
        for node in self.rows:
            writer.places[node] = Place("row", node.name, _two(value(node)))
        copies = []
        for i, (node, after) in enumerate(zip(self.before, ahead, strict=True)):
            writer.before += [
                f"S_{i} = {writer.blank(value(node), 'T + 1, ')}",
                f"S_{i}[0].copy_({node.name})",
                f"before_{i}, after_{i} = S_{i}[:-1], S_{i}[1:]",
            ]
            writer.places[node] = Place("row", f"before_{i}", _two(value(node)))
            source = after
            while source.target in (aten.view.default, aten._unsafe_view.default):
                source = source.args[0]
            mine = source in needed and source.target in INTO and source not in writer.memory
            if mine and self.shown is None:
                shape = ", ".join(map(str, value(source).shape))
                writer.reserve(source, f"after_{i}.view(T, {shape})", rows=True)
            else:
                copies.append((f"after_{i}", after))
        writer.write()
        end = [f"{writer.row(name)}.copy_({writer.ref(node)})" for name, node in copies]
        if self.shown is not None:
            take = writer.constant(gather)
            end = [f"parents.append(choose(step, {', '.join(map(writer.ref, shown))}))"]
            end += [
                f"{take}({writer.ref(node)}, parents[-1], {writer.row(name)})"
                for name, node in copies
            ]
        states = ", ".join(f"S_{i}" for i in range(count))
        rest = ", ".join(writer.all_steps(node) for node in wanted)
        kept = ", ".join(writer.all_steps(node) for node in self.saved)
        names = [node.name for node in [*self.fixed, *self.rows, *self.before]]
        names = names if self.shown is None else ["choose", "parents", *names]
        return writer.function("forward", names, end, f"[{states}], [{rest}], [{kept}]")

    # backward

    def _differentiate(
        self, step: fx.GraphModule, examples: list[Tensor], flags: list[bool]
    ) -> None:
        """The graph of a step and its gradients."""

        def outputs(given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            with torch.enable_grad():
                own = [g.detach().requires_grad_(f) for g, f in zip(given, flags, strict=True)]
                return own, list(step(*own))

        outs = outputs(examples)[1]
        self.live = [i for i, out in enumerate(outs) if out.requires_grad]
        assert not any(out.requires_grad for out in outs[len(outs) - (self.shown or 0) :])
        cotangents = [torch.randn_like(outs[i]) for i in self.live]
        present: list[bool] = []

        def joint(*flat: Tensor) -> list[Tensor]:
            own, made = outputs(flat[: len(flags)])
            wanted = [x for x, flag in zip(own, flags, strict=True) if flag]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if self.live:
                live = [made[i] for i in self.live]
                found = torch.autograd.grad(live, wanted, flat[len(flags) :], allow_unused=True)
            present[:] = [g is not None for g in found]
            return [*made, *(g for g in found if g is not None)]

        self.graph = traced(joint, [*examples, *cotangents])
        nodes = list(self.graph.graph.nodes)
        if any(map(changes, nodes)):
            raise Uncapturable("the gradient changes a tensor in place")
        holders = [n for n in nodes if n.op == "placeholder"]
        self.cotangents = holders[len(flags) :]
        for i, node in zip(self.live, self.cotangents, strict=True):
            node._rename(f"gradient_{i}")
        results = list(self.graph.graph.output_node().args[0])
        self.outputs, found = results[: len(outs)], iter(results[len(outs) :])
        wanted = [n for n, flag in zip(holders, flags, strict=False) if flag]
        self.gradients = {
            n: next(found) if here else None for n, here in zip(wanted, present, strict=True)
        }
        index = dict(zip(self.cotangents, self.live, strict=True))
        #: indices of the states and results that depend on an input within its step
        self.read_by = {
            n: {index[c] for c in nodes_for([gradient], ()) if c in index}
            for n, gradient in self.gradients.items()
            if gradient is not None
        }

    def _divide(self, nodes: list[fx.Node]) -> None:
        """What the backward loop computes, what it is given, and what is left for after it."""
        late = set(self.cotangents)
        for node in nodes:
            if node.op == "call_function" and any(n in late for n in node.all_input_nodes):
                late.add(node)
        early, fixed = nodes_for(self.outputs, ()), set(self.fixed)
        # of operations that give several tensors these are kept, one by one
        early |= {u for n in early for u in n.users if u.target is operator.getitem}
        states = set(self.before)
        self.deferred: dict[fx.Node, Any] = {}
        self.through = [n for n in self.before if self.gradients.get(n) is not None]
        self.of_rows = []
        wanted = []  # of all steps
        for node, gradient in self.gradients.items():
            if gradient is None or node in states:
                continue
            formula = sum_over_steps(gradient, late) if node in fixed else None
            if formula is not None:
                self.deferred[node] = formula
                wanted += leaves(formula)
            elif node in fixed:
                self.sums.append(node)
            else:
                self.of_rows.append(node)
                wanted.append(gradient)
        stack = [*wanted, *(self.gradients[n] for n in [*self.through, *self.sums])]
        needed: set[fx.Node] = set()
        saved: dict[fx.Node, None] = {}
        while stack:
            node = stack.pop()
            if node in needed or node.op == "placeholder":
                continue
            again = node.target in VIEWS or node not in early or node.op == "get_attr"
            if node in late or again or _all_in(node, fixed):
                needed.add(node)
                stack += node.all_input_nodes
            else:
                saved[node] = None
        self.saved = list(saved)
        self.late = [n for n in nodes if n in needed]
        #: inputs that the backward pass looks at; of others it needs no more than the shape
        self.looked_at = {n for node in self.late for n in node.all_input_nodes}
        self.looked_at |= set(map(base, wanted))
        # views of them are taken of all steps, afterwards
        given = {*self.fixed, *self.rows, *self.before, *self.saved, *self.cotangents}
        given -= {self.cotangents[j] for j, i in enumerate(self.live) if i < len(self.before)}
        self.stacked = [n for n in dict.fromkeys(map(base, wanted)) if n not in given]

    def _write_backward(self) -> Callable[..., Any]:
        writer = Writer(self.late, self.stacked)
        names = []
        results = [i for i in self.live if i >= len(self.before)]
        for kind, nodes in (
            ("constant", self.fixed),
            ("row", [*self.rows, *self.before, *self.saved]),
            ("row", [self.cotangents[self.live.index(i)] for i in results]),
        ):
            for node in nodes:
                names.append(node.name)
                sample = _two(value(node)) if kind == "row" else None
                writer.places[node] = Place(kind, node.name, sample)
        end = []
        for i in range(len(self.before)):
            names.append(f"G_{i}")
            writer.before.append(f"after_{i} = G_{i}[1:]")
            writer.before.append(f"c_{i} = torch.zeros_like(G_{i}[0])")
            if i in self.live:
                cotangent = self.cotangents[self.live.index(i)]
                writer.reserve(cotangent)
                writer.places[cotangent] = writer.memory[cotangent]
                target = writer.ref(cotangent)
                writer.body.append(f"torch.add(c_{i}, {writer.row(f'after_{i}')}, out={target})")
                if self.shown is not None:
                    back = writer.constant(give_back)
                    writer.body.append(f"{back}({target}, parents[step])")
        writer.write()
        for i, node in enumerate(self.before):
            gradient = self.gradients.get(node)
            if gradient is not None:
                end.append(f"c_{i} = {writer.ref(gradient)}")
            elif i in self.live:  # no step before this one has a part in it
                end.append(f"c_{i} = torch.zeros_like(c_{i})")
        for node in self.sums:
            writer.before.append(f"a_{node.name} = torch.zeros_like({node.name})")
            end.append(f"a_{node.name}.add_({writer.ref(self.gradients[node])})")
        carry = ", ".join(f"c_{i}" for i in range(len(self.before)))
        sums = ", ".join(f"a_{node.name}" for node in self.sums)
        stacked = ", ".join(writer.all_steps(n, backwards=True) for n in self.stacked)
        names = names if self.shown is None else ["parents", *names]
        result = f"[{carry}], [{sums}], [{stacked}]"
        return writer.function("backward", names, end, result, "[::-1]")

    def slim(self, ordered: Sequence[Tensor]) -> list[Tensor]:
        """Constants and rows as they are, or of their shapes alone where that is enough."""
        nodes = [*self.fixed, *self.rows]
        return [
            t if n in self.looked_at else t.new_empty(()).expand(t.shape)
            for n, t in zip(nodes, ordered, strict=False)
        ]

    def laid(
        self, cotangents: Sequence[Tensor | None], states: Sequence[Tensor], length: int
    ) -> list[Tensor]:
        """Cotangents in the order of a backward loop: results, then states ``(T + 1, ...)``.

        Args:
            cotangents: of states and results; None for unused ones.
            states: before each step.
            length: T.
        """
        count = len(self.before)
        made = []
        for i, node in zip(self.live, self.cotangents, strict=True):
            if i >= count:
                shape = (length, *value(node).shape)
                g = cotangents[i]
                made.append(self._zeros(node, shape) if g is None else g.contiguous())
        for g, state in zip(cotangents, states, strict=False):
            blank = state.new_zeros((length + 1, *state.shape[1:])) if g is None else g
            made.append(blank.contiguous())
        return made

    @staticmethod
    def _zeros(node: fx.Node, shape: tuple[int, ...]) -> Tensor:
        made = value(node)
        return torch.zeros(shape, dtype=made.dtype, device=node.meta.get("device", made.device))

    def finish(
        self,
        kept: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        found: Sequence[Sequence[Tensor]],
        unused: set[int],
    ) -> list[Tensor | None]:
        """Compute the gradients of all inputs from the results of a backward loop.

        Args:
            kept: constants, rows, states and saved values, of all steps.
            cotangents: of the results, then of the states ``(T + 1, ...)``.
            unused: indices of unused results; inputs of these alone have no gradient.
            found: of the states, of constants that are summed in the loop, and ``stacked``; from
                C those of ``deferred``, too.
        """
        carry, sums, stacked, *totals = found
        known = dict(zip([*self.fixed, *self.rows, *self.before, *self.saved], kept, strict=True))
        late = [
            c for c, i in zip(self.cotangents, self.live, strict=True) if i >= len(self.before)
        ]
        known |= dict(zip(late, cotangents, strict=False))
        known |= dict(zip(self.stacked, stacked, strict=True))
        made: dict[fx.Node, Tensor] = dict(zip(self.sums, sums, strict=True))
        made |= {n: seen(self.gradients[n], known) for n in self.of_rows}
        if totals:
            made |= dict(zip(self.deferred, totals[0], strict=True))
        else:
            made |= {n: total(formula, known) for n, formula in self.deferred.items()}
        first = cotangents[len(late) :]
        made |= {n: c + g[0] for n, c, g in zip(self.before, carry, first, strict=True)}
        idle = {n for n, results in self.read_by.items() if results <= unused}
        nodes = [self.local[n] for n in self.inputs]
        return [None if n in idle else made.get(n) for n in nodes]


def _all_in(node: fx.Node, inputs: set[fx.Node]) -> bool:
    """Whether a node depends on these inputs alone."""
    return all(n.op != "placeholder" for n in nodes_for([node], inputs))


def _two(example: Tensor) -> Tensor:
    return example.new_empty(2, *example.shape)
