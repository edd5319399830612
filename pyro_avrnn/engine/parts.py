"""Splits a step into parts by what its operations depend on.

| part | depends on | is run |
|---|---|---|
| static | what all steps share, such as parameters | once a call |
| stages | inputs and noise, but not the recurrence | once a call, all steps together |
| loop | the state | T times |
| after | the state, but no later state depends on it | once a call, all steps together |

A product with a matrix that all steps share, of two kinds of inputs, ``[c_t, h_t] W``, is split
first, so that only the product with the state stays in the loop.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, changes, extract, nodes_for, value
from pyro_avrnn.engine.front import Uncapturable
from pyro_avrnn.engine.noise import take_noise

_STATIC, _LOOP = -1, 10_000  # stages are between them
_FLAT = {aten.view.default, aten._unsafe_view.default}


@dataclass
class Part:
    """A piece of the graph, with the nodes of the whole that go in and come out."""

    module: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]


class Parts:
    """The parts of a step ``(read, state, inputs) -> [*next state, *outputs, *shown]``.

    Args:
        graph: of the step; it is changed.
        read, states: how many of its inputs are the same at every step, and how many are states.
        shown: how many of its results are wanted while the loop runs, to say which particles go
            on; None if nobody says so.

    Attributes:
        read, state, inputs, noise: nodes that are given; ``draws`` says how noise is drawn, and
            ``flows`` whether that of all steps can be drawn at once.
        next: nodes of the next state.
        outputs: nodes of what else is wanted of every step; not those shown.
        constant, shifted, recurring: which states never change, which are known before the loop,
            one step late, and which recur.
        static, stages, loop, after: the parts. The loop gives first the states that recur, at last
            what is shown.

    Raises:
        Uncapturable: operations that cannot be run for all steps at once, or not again.
    """

    def __init__(self, graph: fx.GraphModule, read: int, states: int, shown: int | None) -> None:
        self.graph, self.shown = graph, shown
        holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.read, self.state = holders[:read], holders[read : read + states]
        self.inputs = holders[read + states :]
        _check(graph)
        self.draws = take_noise(graph)
        self.noise = list(self.draws)
        self.flows = len(self.draws) == 1 and all(n.flows() for n in self.draws.values())
        _drop_empty(graph)
        # particles that may change places: all states recur, and nothing is drawn before it is
        # known which of them go on
        watched = shown is not None
        self.within = self.noise if watched else []
        ahead = self._ends()[:states]
        self.constant = [i for i in range(states) if ahead[i] is self.state[i] and not watched]
        self.shifted: list[int] = []
        self._split_products()
        while late := self._late():
            self.shifted += late
            self._split_products()
        self.recurring = [i for i in range(states) if i not in (*self.constant, *self.shifted)]
        ends = self._ends()
        count = len(ends) - (shown or 0)
        self.next, self.outputs, self.to_show = ends[:states], ends[states:count], ends[count:]
        self._cut()

    def _ends(self) -> list[fx.Node]:
        return list(self.graph.graph.output_node().args[0])

    def _late(self) -> list[int]:
        """States that depend only on values known before the loop."""
        if self.shown is not None:
            return []
        stage, ahead = self._stages(), self._ends()
        known = (*self.constant, *self.shifted)
        count = len(self.state)
        return [i for i in range(count) if i not in known and stage[ahead[i]] < _LOOP]

    def _stages(self) -> dict[fx.Node, int]:
        """When each node can be computed: static, a stage before the loop, or in it."""
        stage: dict[fx.Node, int] = {}
        first = {self.state[i] for i in self.constant} | set(self.read)
        ahead = self._ends()
        late = {self.state[i]: ahead[i] for i in self.shifted}

        def of(node: fx.Node) -> int:
            if node in first or node.op == "get_attr":
                return _STATIC
            if node in late:
                source = before.get(late[node], 0)
                return min(source + 1, _LOOP) if source >= 0 else 0
            if node in self.state or node in self.within:
                return _LOOP
            if node.op == "placeholder":
                return 0
            return max((stage[n] for n in node.all_input_nodes), default=_STATIC)

        for _ in range(len(self.shifted) + 1):
            before, stage = stage, {}
            for node in self.graph.graph.nodes:
                stage[node] = of(node)
        return stage

    # products

    def _split_products(self) -> None:
        """``[a, h] W`` becomes ``a W_a + h W_h`` where a is known before the loop and h is not."""
        stage = self._stages()
        for node in list(self.graph.graph.nodes):
            if node.target not in (aten.addmm.default, aten.mm.default) or stage[node] != _LOOP:
                continue
            left, right = node.args[-2:]
            joined = left.args[0] if left.target in _FLAT else left
            if node.kwargs or stage[right] != _STATIC or joined.target is not aten.cat.default:
                continue
            whole, dim = value(joined), joined.args[1] if len(joined.args) > 1 else 0
            if dim % whole.ndim != whole.ndim - 1 or value(left).shape[-1] != whole.shape[-1]:
                continue
            late = [stage[piece] == _LOOP for piece in joined.args[0]]
            if any(late) and not all(late):
                _Split(self.graph.graph, node, joined, late)
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    # pieces

    def moving(self, *, whole: bool) -> Part | None:
        """All parts but the static one as a single part; changing states come first.

        Args:
            whole: include the static part; the result is None if an output is static.
        """
        stage = self._stages()
        states = [i for i in range(len(self.state)) if i not in self.constant]
        fixed = self.static.inputs if whole else self.static.outputs
        if whole and any(stage[n] == _STATIC for n in self.outputs):
            return None
        ahead = [self.next[i] for i in states]
        wanted = dict.fromkeys(n for n in self.outputs if stage[n] > _STATIC)
        outputs = [*ahead, *wanted, *self.to_show]
        given = [*fixed, *(self.state[i] for i in states), *self.inputs, *self.noise]
        return Part(extract(self.graph, given, outputs), given, outputs)

    def _cut(self) -> None:
        stage, graph = self._stages(), self.graph
        order = {node: i for i, node in enumerate(graph.graph.nodes)}

        def ordered(nodes: Iterable[fx.Node]) -> list[fx.Node]:
            return sorted(set(nodes), key=order.__getitem__)

        def inputs(nodes: Iterable[fx.Node], computed: set[fx.Node]) -> set[fx.Node]:
            calls = [node for node in nodes if node.op == "call_function"]
            return {n for node in calls for n in node.all_input_nodes if n not in computed}

        ahead = [self.next[i] for i in self.recurring]
        recurs = nodes_for([*ahead, *self.to_show], ())
        within = _whole({n for n in recurs if stage[n] == _LOOP})
        # what no state needs is computed afterwards, from what the loop keeps for it
        later = {n for n in nodes_for(self.outputs, ()) if stage[n] == _LOOP} - within
        frontier = {n for n in inputs(later, later) if n in within and n not in ahead}
        wanted = list(dict.fromkeys(n for n in self.outputs if n in within))
        wanted += ordered(frontier - set(wanted))
        computed = {n for n in within if n.op == "call_function"}
        outputs = [*ahead, *wanted, *self.to_show]
        own = {self.state[i] for i in self.recurring}
        needed = ordered(inputs(computed, computed) | (set(outputs) - computed) | own)
        self.loop = Part(extract(graph, needed, outputs), needed, outputs)

        last = [n for n in self.outputs if n in later]
        before = ordered(inputs(later, later))
        self.after = Part(extract(graph, before, last), before, last)

        used = {*needed, *before, *self.outputs, *(self.next[i] for i in self.shifted)}
        every = list(graph.graph.nodes)
        read = {n for node in every if stage[node] > _STATIC for n in node.all_input_nodes}
        static = ordered(n for n in {*every} & (used | read) if stage[n] == _STATIC)
        fixed = [*self.read, *(self.state[i] for i in self.constant)]
        self.static = Part(extract(graph, fixed, static), fixed, static)

        self.stages: list[Part] = []
        known = {*static, *self.inputs, *self.noise}
        for number in sorted({s for s in stage.values() if 0 <= s < _LOOP}):
            known |= {self.state[i] for i in self.shifted if stage[self.state[i]] == number}
            mine = [n for n in every if stage[n] == number and n.op == "call_function"]
            made = [
                n
                for n in mine
                if n in used or any(stage[user] > number for user in n.users if user in order)
            ]
            given = ordered(inputs(nodes_for(made, known), set()) & known)
            self.stages.append(Part(extract(graph, given, made), given, made))
            known |= set(made)


def _whole(nodes: set[fx.Node]) -> set[fx.Node]:
    """Add the items of operations with several results, which cannot be stored whole."""
    return nodes | {u for n in nodes for u in n.users if u.target is operator.getitem}


def _check(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target), "requires_grad", False):
            raise Uncapturable("a tensor that requires gradients is no parameter of the modules")
        if node.op == "call_function" and node.target is aten._local_scalar_dense.default:
            raise Uncapturable("the step reads a number out of a tensor")
        if changes(node):
            raise Uncapturable(f"{node.target} changes a tensor in place")


def _drop_empty(graph: fx.GraphModule) -> None:
    """Tensors without elements depend on nothing; joining one to others adds nothing."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("value"), Tensor):
            continue
        example, new = value(node), None
        if example.numel() == 0 and node.all_input_nodes:
            kind = {"dtype": example.dtype, "device": example.device}
            with graph.graph.inserting_before(node):
                shape = (list(example.shape),)
                new = graph.graph.call_function(aten.empty.memory_format, shape, kind)
            new.meta["value"] = example
        elif node.target is aten.cat.default:
            full = [piece for piece in node.args[0] if value(piece).numel()]
            if len(full) == 1 and value(full[0]).shape == example.shape:
                new = full[0]
            elif full:
                node.args = (full, *node.args[1:])
        if new is not None:
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


class _Split:
    """Splits one product.

    Args:
        graph: of the step.
        node: the product, ``[pieces] W`` or with a bias.
        joined: the concatenation that it reads.
        late: which of its pieces are known in the loop only.
    """

    def __init__(
        self, graph: fx.Graph, node: fx.Node, joined: fx.Node, late: Sequence[bool]
    ) -> None:
        self.graph, self.node = graph, node
        *bias, _, right = node.args
        pieces, whole = joined.args[0], value(joined)
        early = [i for i, is_late in enumerate(late) if not is_late]
        rest = [i for i, is_late in enumerate(late) if is_late]
        self.ends = [0]
        for piece in pieces:
            self.ends.append(self.ends[-1] + value(piece).shape[-1])
        known = [_unexpanded(pieces[i]) for i in early]
        leads = {value(piece).shape[:-1] for piece in known}
        if len(leads) > 1:  # of different leading dimensions
            known, leads = [pieces[i] for i in early], {whole.shape[:-1]}
        ahead = (self._joined(known), self._rows(right, early))
        product = self._call(aten.addmm.default if bias else aten.mm.default, *bias, *ahead)
        within = self._joined([pieces[i] for i in rest]), self._rows(right, rest)
        if len(value(product)) == len(value(node)):
            total = self._call(aten.addmm.default, product, *within)
        else:  # the known part is the same for all particles
            width = value(node).shape[-1]
            part = self._call(aten.mm.default, *within)
            part = self._call(aten.view.default, part, [*whole.shape[:-1], width])
            product = self._call(aten.view.default, product, [*leads.pop(), width])
            total = self._call(aten.add.Tensor, part, product)
            total = self._call(aten.view.default, total, list(value(node).shape))
        node.replace_all_uses_with(total)
        graph.erase_node(node)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args)
        new.meta["value"] = target(*torch.utils._pytree.tree_map_only(fx.Node, value, args))
        return new

    def _rows(self, matrix: fx.Node, chosen: list[int]) -> fx.Node:
        """Rows of the matrix that belong to these pieces; neighbours stay together."""
        runs: list[list[int]] = []
        for i in chosen:
            if runs and runs[-1][1] == self.ends[i]:
                runs[-1][1] = self.ends[i + 1]
            else:
                runs.append([self.ends[i], self.ends[i + 1]])
        parts = [self._call(aten.slice.Tensor, matrix, 0, a, b) for a, b in runs]
        return parts[0] if len(parts) == 1 else self._call(aten.cat.default, parts, 0)

    def _joined(self, pieces: list[fx.Node]) -> fx.Node:
        flat = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, -1)
        if value(flat).ndim == 2:
            return flat
        return self._call(aten.reshape.default, flat, [-1, value(flat).shape[-1]])


def _unexpanded(node: fx.Node) -> fx.Node:
    """What was expanded along leading dimensions, without them."""
    if node.target is aten.expand.default and isinstance(node.args[0], fx.Node):
        source, whole = value(node.args[0]), value(node)
        trailing = whole.shape[whole.ndim - source.ndim :]
        if source.ndim >= 2 and source.shape == trailing:
            return node.args[0]
    return node
