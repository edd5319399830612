"""The recurrence of a captured step: T steps without autograd, and their gradients.

``Loop`` differentiates the loop's graph once and writes two plain functions for it, forward and
backward, in which every operation writes into memory reserved for all steps. A gradient of a
weight, a sum over steps of products, is formed after the loop by one product: the inputs and the
output gradients of all steps lie side by side by then.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import (
    VIEWS,
    Part,
    Uncapturable,
    aten,
    changes,
    nodes_for,
    traced,
    value,
)
from pyro_avrnn.engine.views import over_time
from pyro_avrnn.products import SHARED, dense, onednn, pays, times

#: operations that write into a tensor given to them: how they are called
_INTO: dict[Any, tuple[Any, str]] = {
    aten.add.Tensor: (torch.add, "out"),
    aten.sub.Tensor: (torch.sub, "out"),
    aten.mul.Tensor: (torch.mul, "out"),
    aten.div.Tensor: (torch.div, "out"),
    aten.addcmul.default: (torch.addcmul, "out"),
    aten.neg.default: (torch.neg, "out"),
    aten.exp.default: (torch.exp, "out"),
    aten.log.default: (torch.log, "out"),
    aten.sqrt.default: (torch.sqrt, "out"),
    aten.reciprocal.default: (torch.reciprocal, "out"),
    aten.pow.Tensor_Scalar: (torch.pow, "out"),
    aten.sigmoid.default: (torch.sigmoid, "out"),
    aten.tanh.default: (torch.tanh, "out"),
    aten.softplus.default: (torch._C._nn.softplus, "out"),
    aten.elu.default: (torch._C._nn.elu, "out"),
    aten.silu.default: (torch._C._nn.silu, "out"),
    aten.relu.default: (torch.relu, ""),
    aten.mm.default: (torch.mm, "out"),
    aten.addmm.default: (torch.addmm, "out"),
    aten.bmm.default: (torch.bmm, "out"),
    aten.cat.default: (torch.cat, "out"),
    aten.sum.dim_IntList: (torch.sum, "out"),
} | {
    getattr(aten, f"{name}_backward").default: (
        getattr(aten, f"{name}_backward").grad_input,
        "grad_input",
    )
    for name in ("threshold", "sigmoid", "tanh", "softplus", "elu", "silu")
}


def _relu(x: Tensor, *, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=out)


_INTO[aten.relu.default] = (_relu, "out")


class _Place(NamedTuple):
    """Where the value of a node is while a loop runs.

    ``constant``: the same at every step; ``buffer``: memory that every step uses again; ``row``:
    one of T; ``local``: made anew.
    """

    kind: str
    name: str
    sample: Tensor | None = None  # of a row: memory like it, of two steps


class _Writer:
    """Writes the source of a loop over nodes of a graph.

    Args:
        nodes: to be computed, in order.
        stacked: nodes of which the values of all steps are wanted afterwards.
    """

    def __init__(self, nodes: Sequence[fx.Node], stacked: Iterable[fx.Node]) -> None:
        self.names: dict[str, Any] = {"torch": torch, "over_time": over_time}
        self.before: list[str] = []
        self.body: list[str] = []
        self.places: dict[fx.Node, _Place] = {}
        self.rows: dict[
            str, str
        ] = {}  # name of stacked memory -> of its row, if the loop reads it
        self.nodes, self.stacked = nodes, set(stacked)
        self.bases = {base(node) for node in self.stacked}
        self.memory: dict[fx.Node, _Place] = {}  # of nodes whose memory is a part of another's
        self.joins: dict[fx.Node, set[fx.Node]] = {}

    def ref(self, thing: Any) -> str:
        """How the body of the loop speaks of a value."""
        if isinstance(thing, list | tuple):
            return f"[{', '.join(map(self.ref, thing))}]"
        if isinstance(thing, fx.Node):
            place = self.places[thing]
            return self.row(place.name) if place.kind == "row" else place.name
        plain = isinstance(thing, bool | int | str | None)
        return repr(thing) if plain else self.constant(thing)

    def row(self, name: str) -> str:
        """This step's row of stacked memory."""
        return self.rows.setdefault(name, f"r_{name}")

    def constant(self, thing: Any) -> str:
        """A name for an object."""
        name = f"k{len(self.names)}"
        self.names[name] = thing
        return name

    def call(self, node: fx.Node, function: Any, **more: str) -> str:
        """The call of a node's operation."""
        parts = [self.ref(argument) for argument in node.args]
        parts += [f"{key}={self.ref(item)}" for key, item in node.kwargs.items()]
        parts += [f"{key}={item}" for key, item in more.items()]
        return f"{self.constant(function)}({', '.join(parts)})"

    def blank(self, example: Tensor, lead: str = "") -> str:
        """New memory for a value, or with ``lead`` for several."""
        shape = "".join(f"{size}, " for size in example.shape)
        dtype, device = self.constant(example.dtype), self.constant(example.device)
        return f"torch.empty(({lead}{shape}), dtype={dtype}, device={device})"

    def write(self) -> None:
        """All nodes."""
        self._join()
        for node in self.nodes:
            kinds = {self.places[n].kind for n in node.all_input_nodes}
            if node.op == "get_attr":
                owner: Any = node.graph.owning_module
                self.places[node] = _Place("constant", self.constant(getattr(owner, node.target)))
            elif kinds <= {"constant"} and node not in self.memory:
                self.places[node] = _Place("constant", f"n_{node.name}")
                self.before.append(f"n_{node.name} = {self.call(node, node.target)}")
            elif node.target in VIEWS:
                self._view(node)
            elif node.target in _INTO and isinstance(node.meta["value"], Tensor):
                self._compute(node)
            else:
                self._local(node)

    def _view(self, node: fx.Node) -> None:
        source = self.places[node.args[0]]
        if source.kind == "row":
            assert source.sample is not None
            try:
                sample = over_time(node, source.sample)
            except RuntimeError:  # the rows do not lie so that they can be seen like this
                return self._local(node)
            line = f"over_time({self.constant(node)}, {source.name})"
            self.places[node] = _Place("row", f"v_{node.name}", sample)
        elif source.kind == "buffer":
            line = self.call(node, node.target)
            self.places[node] = _Place("buffer", f"v_{node.name}")
        else:
            return self._local(node)
        self.before.append(f"v_{node.name} = {line}")
        return None

    def _local(self, node: fx.Node) -> None:
        self.places[node] = _Place("local", f"n_{node.name}")
        self.body.append(f"n_{node.name} = {self.call(node, node.target)}")
        if node in self.stacked:
            self.before.append(f"l_{node.name} = []")
            self.body.append(f"l_{node.name}.append(n_{node.name})")

    def _compute(self, node: fx.Node) -> None:
        if node not in self.memory:
            self.reserve(node)
        self.places[node] = self.memory[node]
        if node in self.joins:
            self._fill(node)
        elif self._by_onednn(node):
            *bias, left, right = map(self.ref, node.args)
            whole, weight = self.constant(dense), f"w_{node.name}"
            if self.places[node.args[-1]].kind == "constant":
                self.before.append(f"{weight} = {whole}({right}.t())")
            else:
                weight = f"{whole}({right}.t())"
            made = f"{self.constant(onednn())}({whole}({left}), {weight}, None, 'none', [], '')"
            into = self.ref(node)
            line = f"torch.add({made}, {bias[0]}, out={into})" if bias else f"{into}.copy_({made})"
            self.body.append(line)
        else:
            function, into = _INTO[node.target]
            function = getattr(function, "_op", function)  # an overload's own call is slower
            self.body.append(self.call(node, function, **{into: self.ref(node)}))

    @staticmethod
    def _by_onednn(node: fx.Node) -> bool:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            return False
        left, right = (value(n) for n in node.args[-2:])
        return pays(len(left), right)

    def reserve(self, node: fx.Node, expression: str | None = None, rows: bool = False) -> None:
        """Memory of a node, new if no expression says where."""
        name, example = f"m_{node.name}", value(node)
        if expression is None:
            rows = node in self.bases
            expression = self.blank(example, "T, " if rows else "")
        sample = example.new_empty(2, *example.shape) if rows else None
        self.before.append(f"{name} = {expression}")
        self.memory[node] = _Place("row" if rows else "buffer", name, sample)

    # what a concatenation joins is written to where it belongs in it, and never copied

    def _join(self) -> None:
        for node in self.nodes:
            if node.target is not aten.cat.default:
                continue
            dim, pieces = _pieces(node)
            fit = {
                piece
                for piece in pieces
                if piece in self.nodes
                and piece.target in _INTO
                and piece.target is not aten.cat.default
                and piece not in self.memory
                and piece not in self.bases
                and pieces.count(piece) == 1
                and not any(user.target in VIEWS for user in piece.users)
            }
            if not fit or len(pieces) - len(fit) > 1:
                continue
            if node not in self.memory:
                self.reserve(node)
            self.joins[node] = fit
            start, whole = 0, self.memory[node]
            for piece in pieces:
                width = value(piece).shape[dim]
                if piece in fit:
                    name, sample = f"m_{piece.name}", whole.sample
                    along = dim if sample is None else dim + 1
                    self.before.append(f"{name} = {whole.name}.narrow({along}, {start}, {width})")
                    if sample is not None:
                        sample = sample.narrow(along, start, width)
                    self.memory[piece] = _Place(whole.kind, name, sample)
                start += width

    def _fill(self, node: fx.Node) -> None:
        dim, pieces = _pieces(node)
        start, whole = 0, self.places[node]
        for piece in pieces:
            width = value(piece).shape[dim]
            if piece not in self.joins[node]:
                name = f"p{start}_{node.name}"
                along = dim if whole.sample is None else dim + 1
                self.before.append(f"{name} = {whole.name}.narrow({along}, {start}, {width})")
                target = name if whole.sample is None else self.row(name)
                self.body.append(f"{target}.copy_({self.ref(piece)})")
            start += width

    def all_steps(self, node: fx.Node, backwards: bool = False) -> str:
        """An expression for the values of all steps."""
        place = self.places[node]
        if place.kind == "row":
            return place.name
        if place.kind == "constant":
            return f"{place.name}.expand(T, *{place.name}.shape)"
        return f"torch.stack(l_{node.name}{'[::-1]' if backwards else ''})"

    def function(
        self, name: str, arguments: Sequence[str], end: Sequence[str], result: str, step: str = ""
    ) -> Callable[..., Any]:
        """The whole as a function; ``step`` is "[::-1]" for a loop that runs backwards."""
        lists = [f"{name}.unbind(0){step}" for name in self.rows]
        body = [*self.body, *end] or ["pass"]
        lines = [f"def {name}(T, {', '.join(arguments)}):", *_indent(self.before, 4)]
        targets = ", ".join(["step", *self.rows.values()])
        lines += [f"    for {targets}, in zip({', '.join([f'range(T){step}', *lists])}):"]
        lines += _indent(body, 8) + [f"    return {result}"]
        source = "\n".join(lines)
        space = dict(self.names)
        exec(compile(source, f"<{name} loop>", "exec"), space)  # noqa: S102 - written above
        made = space[name]
        made.source = source
        return made


def base(node: fx.Node) -> fx.Node:
    """What a chain of views is a view of."""
    while node.target in VIEWS:
        node = node.args[0]
    return node


def _pieces(node: fx.Node) -> tuple[int, list[fx.Node]]:
    dim = node.args[1] if len(node.args) > 1 else 0
    return dim % value(node).ndim, list(node.args[0])


def _indent(lines: Iterable[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]


class Loop:
    """The part of a step that recurs, for T steps.

    Args:
        part: inputs and outputs of one step; the first outputs are the next states.
        states: which inputs are states, in the order of the outputs.
        fixed: inputs that are the same at every step; the others are stacked over time.
        learns: inputs that want a gradient, or None for a loop without.
        watched: whether the last three outputs of every step are shown to a function that says
            which particles go on from it.
    """

    def __init__(
        self,
        part: Part,
        states: Sequence[fx.Node],
        fixed: Iterable[fx.Node],
        learns: Iterable[fx.Node] | None,
        watched: bool = False,
    ) -> None:
        self.watched = watched
        self.inputs, constant = part.inputs, set(fixed)
        examples = [value(node).detach() for node in part.inputs]
        self.saved: list[fx.Node] = []
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
        products = [n for n in self.graph.graph.nodes if n.target in _PRODUCTS]
        sizes = [len(value(n.args[-2])) * value(n.args[-1]).numel() for n in products]
        self.small = max(sizes, default=0) < SHARED  # no step is worth a second thread
        self.learns = learns is not None
        if self.learns:
            self._divide(list(self.graph.graph.nodes))
        self.forward = self._write_forward()
        if self.learns:
            self.backward = self._write_backward()

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
        if self.watched:
            wanted, shown = wanted[:-3], wanted[-3:]
        writer = _Writer(nodes, [*wanted, *self.saved])
        for node in self.fixed:
            writer.places[node] = _Place("constant", node.name)
        for node in self.rows:
            writer.places[node] = _Place("row", node.name, _two(value(node)))
        copies = []
        for i, (node, after) in enumerate(zip(self.before, ahead, strict=True)):
            writer.before += [
                f"S_{i} = {writer.blank(value(node), 'T + 1, ')}",
                f"S_{i}[0].copy_({node.name})",
                f"before_{i}, after_{i} = S_{i}[:-1], S_{i}[1:]",
            ]
            writer.places[node] = _Place("row", f"before_{i}", _two(value(node)))
            source = after
            while source.target in (aten.view.default, aten._unsafe_view.default):
                source = source.args[0]
            mine = source in needed and source.target in _INTO and source not in writer.memory
            if mine and not self.watched:
                shape = ", ".join(map(str, value(source).shape))
                writer.reserve(source, f"after_{i}.view(T, {shape})", rows=True)
            else:
                copies.append((f"after_{i}", after))
        writer.write()
        end = [f"{writer.row(name)}.copy_({writer.ref(node)})" for name, node in copies]
        if self.watched:
            take = writer.constant(gather)
            end = [f"parents.append(select(step, {', '.join(map(writer.ref, shown))}))"]
            end += [
                f"{take}({writer.ref(node)}, parents[-1], {writer.row(name)})"
                for name, node in copies
            ]
        states = ", ".join(f"S_{i}" for i in range(count))
        rest = ", ".join(writer.all_steps(node) for node in wanted)
        kept = ", ".join(writer.all_steps(node) for node in self.saved)
        names = [node.name for node in [*self.fixed, *self.rows, *self.before]]
        names = ["select", "parents", *names] if self.watched else names
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
        assert not self.watched or not any(outs[i].requires_grad for i in (-3, -2, -1))
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
        results = list(self.graph.graph.output_node().args[0])
        self.outputs, found = results[: len(outs)], iter(results[len(outs) :])
        wanted = [n for n, flag in zip(holders, flags, strict=False) if flag]
        self.gradients = {
            n: next(found) if here else None for n, here in zip(wanted, present, strict=True)
        }

    def _divide(self, nodes: list[fx.Node]) -> None:
        """What the backward loop computes, what it is given, and what is left for after it."""
        late = set(self.cotangents)
        for node in nodes:
            if node.op == "call_function" and any(n in late for n in node.all_input_nodes):
                late.add(node)
        early, fixed = nodes_for(self.outputs, ()), set(self.fixed)
        states = set(self.before)
        self.deferred: dict[fx.Node, Any] = {}
        self.sums: list[fx.Node] = []
        self.through = [n for n in self.before if self.gradients.get(n) is not None]
        self.of_rows = []
        wanted = []  # of all steps
        for node, gradient in self.gradients.items():
            if gradient is None or node in states:
                continue
            formula = _sum_over_steps(gradient, late) if node in fixed else None
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
        writer = _Writer(self.late, self.stacked)
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
                writer.places[node] = _Place(kind, node.name, sample)
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
                if self.watched:
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
        names = ["parents", *names] if self.watched else names
        result = f"[{carry}], [{sums}], [{stacked}]"
        return writer.function("backward", names, end, result, "[::-1]")

    def slim(self, ordered: Sequence[Tensor]) -> list[Tensor]:
        """Constants and rows as they are, or of their shapes alone where that is enough."""
        nodes = [*self.fixed, *self.rows]
        return [
            t if n in self.looked_at else t.new_empty(()).expand(t.shape)
            for n, t in zip(nodes, ordered, strict=False)
        ]

    def finish(
        self,
        kept: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        found: Sequence[Sequence[Tensor]],
    ) -> list[Tensor | None]:
        """Gradients of all inputs, from what a backward loop gave.

        Args:
            kept: constants, rows, states and saved values, of all steps.
            cotangents: of the results, then of the states ``(T + 1, ...)``.
            found: of the states, of constants that are summed in the loop, and ``stacked``.
        """
        carry, sums, stacked = found
        known = dict(zip([*self.fixed, *self.rows, *self.before, *self.saved], kept, strict=True))
        late = [
            c for c, i in zip(self.cotangents, self.live, strict=True) if i >= len(self.before)
        ]
        known |= dict(zip(late, cotangents, strict=False))
        known |= dict(zip(self.stacked, stacked, strict=True))
        made: dict[fx.Node, Tensor] = dict(zip(self.sums, sums, strict=True))
        made |= {n: seen(self.gradients[n], known) for n in self.of_rows}
        made |= {n: total(formula, known) for n, formula in self.deferred.items()}
        first = cotangents[len(late) :]
        made |= {n: c + g[0] for n, c, g in zip(self.before, carry, first, strict=True)}
        return [made.get(self.local[n]) for n in self.inputs]


_PRODUCTS = {aten.mm.default, aten.addmm.default}
_LINEAR = {aten.neg.default, aten.slice_backward.default, aten.select_backward.default}


def _all_in(node: fx.Node, inputs: set[fx.Node]) -> bool:
    """Whether a node depends on these inputs alone."""
    return all(n.op != "placeholder" for n in nodes_for([node], inputs))


def _sum_over_steps(node: fx.Node, late: set[fx.Node]) -> Any:
    """A formula for the sum of a gradient over all steps, if it has one; else None."""
    args = node.args
    if node.target is aten.mm.default:
        left, right = args
        return ("mm", left.args[0], right) if left.target is aten.t.default else None
    if node.target is aten.sum.dim_IntList and args[0] in late:
        dims = [d % value(args[0]).ndim + 1 for d in args[1]]
        return ("sum", args[0], dims, len(args) > 2 and args[2])
    if node.target is aten.add.Tensor and not node.kwargs:
        terms = [_sum_over_steps(n, late) if isinstance(n, fx.Node) else None for n in args]
        return None if None in terms else ("add", *terms)
    linear = node.target in VIEWS or node.target in _LINEAR
    if linear and not any(isinstance(n, fx.Node) for n in args[1:]):
        inner = _sum_over_steps(args[0], late)
        return None if inner is None else ("apply", node, inner)
    return None


def leaves(formula: Any) -> list[fx.Node]:
    """The nodes that a formula needs the values of all steps of."""
    kind, *parts = formula
    if kind == "mm":
        return parts
    if kind == "sum":
        return parts[:1]
    inner = parts if kind == "add" else parts[1:]
    return [leaf for part in inner for leaf in leaves(part)]


def total(formula: Any, known: dict[fx.Node, Tensor]) -> Tensor:
    """The sum over all steps: of products, one product of all rows side by side."""
    kind, *parts = formula
    if kind == "mm":
        left, right = (seen(n, known).flatten(0, 1) for n in parts)
        return times(left.t(), right.t())
    if kind == "sum":
        node, dims, keep = parts
        summed = seen(node, known).sum(dim=[0, *dims], keepdim=keep)
        return summed[0] if keep else summed
    if kind == "add":
        return sum(total(part, known) for part in parts[1:]) + total(parts[0], known)
    node, inner = parts
    return node.target(total(inner, known), *node.args[1:], **node.kwargs)


def seen(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    """The values of all steps, by views of what is known."""
    if node not in known:
        known[node] = over_time(node, seen(node.args[0], known), copies=True)
    return known[node]


def gather(state: Tensor, parents: Tensor | None, out: Tensor) -> None:
    """The particles ``parents`` (K, B) of a state ``(K, B, ...)``, or all as they are."""
    if parents is None:
        out.copy_(state)
    else:
        out.copy_(state.gather(0, _index(parents, state)))


def give_back(gradient: Tensor, parents: Tensor | None) -> None:
    """The gradient of what ``gather`` took from, in place of that of what it gave."""
    if parents is not None:
        whole = torch.zeros_like(gradient).scatter_add_(0, _index(parents, gradient), gradient)
        gradient.copy_(whole)


def _index(parents: Tensor, state: Tensor) -> Tensor:
    return parents.reshape(*parents.shape, *[1] * (state.ndim - 2)).expand_as(state)


def _two(example: Tensor) -> Tensor:
    return example.new_empty(2, *example.shape)
