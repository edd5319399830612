"""Writes a loop over steps as a plain Python function.

Every operation writes into memory reserved for all steps, by calls that torch makes anyway.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.views import VIEWS, over_time
from pyro_avrnn.products import dense, onednn, pays

#: operations that write into a tensor given to them: how they are called
INTO: dict[Any, tuple[Any, str]] = {
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


INTO[aten.relu.default] = (_relu, "out")


class Place(NamedTuple):
    """Where the value of a node is while a loop runs.

    ``constant``: the same at every step; ``buffer``: memory that every step uses again; ``row``:
    one of T; ``local``: made anew.
    """

    kind: str
    name: str
    sample: Tensor | None = None  # of a row: memory like it, of two steps


class Writer:
    """Writes the source of a loop over nodes of a graph.

    Args:
        nodes: to be computed, in order.
        stacked: nodes of which the values of all steps are wanted afterwards.
    """

    def __init__(self, nodes: Sequence[fx.Node], stacked: Iterable[fx.Node]) -> None:
        self.names: dict[str, Any] = {"torch": torch, "over_time": over_time}
        self.before: list[str] = []
        self.body: list[str] = []
        self.places: dict[fx.Node, Place] = {}
        self.rows: dict[
            str, str
        ] = {}  # name of stacked memory -> of its row, if the loop reads it
        self.nodes, self.stacked = nodes, set(stacked)
        self.bases = {base(node) for node in self.stacked}
        self.memory: dict[fx.Node, Place] = {}  # of nodes that are written to memory

    def ref(self, thing: Any) -> str:
        """Source text that refers to a value in the body of the loop."""
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

    def constant(self, thing: Any, name: str = "") -> str:
        """A name for an object in the source."""
        name = name or str(getattr(thing, "__name__", thing)).rpartition(".")[2]
        name = f"op_{name}" if name.isidentifier() else f"op_{len(self.names)}"
        while self.names.setdefault(name, thing) is not thing:
            name += "_"
        return name

    def call(self, node: fx.Node, function: Any, **more: str) -> str:
        """The call of a node's operation."""
        parts = [self.ref(argument) for argument in node.args]
        parts += [f"{key}={self.ref(item)}" for key, item in node.kwargs.items()]
        parts += [f"{key}={item}" for key, item in more.items()]
        packet = getattr(node.target, "overloadpacket", node.target)
        name = self.constant(function, getattr(packet, "__name__", ""))
        return f"{name}({', '.join(parts)})"

    def blank(self, example: Tensor, lead: str = "") -> str:
        """New memory for a value, or with ``lead`` for several."""
        shape = "".join(f"{size}, " for size in example.shape)
        dtype, device = self.constant(example.dtype), self.constant(example.device)
        return f"torch.empty(({lead}{shape}), dtype={dtype}, device={device})"

    def write(self) -> None:
        """Write all nodes."""
        for node in self.nodes:
            kinds = {self.places[n].kind for n in node.all_input_nodes}
            if node.op == "get_attr":
                owner: Any = node.graph.owning_module
                self.places[node] = Place("constant", self.constant(getattr(owner, node.target)))
            elif kinds <= {"constant"} and node not in self.memory:
                self.places[node] = Place("constant", f"n_{node.name}")
                self.before.append(f"n_{node.name} = {self.call(node, node.target)}")
            elif node.target in VIEWS:
                self._view(node)
            elif node.target in INTO and isinstance(node.meta["value"], Tensor):
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
            self.places[node] = Place("row", f"v_{node.name}", sample)
        elif source.kind == "buffer":
            line = self.call(node, node.target)
            self.places[node] = Place("buffer", f"v_{node.name}")
        else:
            return self._local(node)
        self.before.append(f"v_{node.name} = {line}")
        return None

    def _local(self, node: fx.Node) -> None:
        self.places[node] = Place("local", f"n_{node.name}")
        self.body.append(f"n_{node.name} = {self.call(node, node.target)}")
        if node in self.stacked:
            self.before.append(f"l_{node.name} = []")
            self.body.append(f"l_{node.name}.append(n_{node.name})")

    def _compute(self, node: fx.Node) -> None:
        if node not in self.memory:
            self.reserve(node)
        self.places[node] = self.memory[node]
        if self._by_onednn(node):
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
            function, into = INTO[node.target]
            function = getattr(function, "_op", function)  # an overload's own call is slower
            self.body.append(self.call(node, function, **{into: self.ref(node)}))

    @staticmethod
    def _by_onednn(node: fx.Node) -> bool:
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            return False
        left, right = (value(n) for n in node.args[-2:])
        return pays(len(left), right)

    def reserve(self, node: fx.Node, expression: str | None = None, rows: bool = False) -> None:
        """Reserve memory for a node: new, or that of an expression."""
        name, example = f"m_{node.name}", value(node)
        if expression is None:
            rows = node in self.bases
            expression = self.blank(example, "T, " if rows else "")
        sample = example.new_empty(2, *example.shape) if rows else None
        self.before.append(f"{name} = {expression}")
        self.memory[node] = Place("row" if rows else "buffer", name, sample)

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
        """Compile the function; ``step`` is "[::-1]" for a loop that runs backwards."""
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


def _indent(lines: Iterable[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]
