"""Writes the operations of a graph as C; neighbouring elementwise ones share a loop."""

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from pyro_avrnn.engine.c_operations import EACH, FILLED, MOST, REDUCED, Unsupported, number
from pyro_avrnn.engine.c_places import Ends, Place, contiguous, nest, padded
from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.views import VIEWS

#: formulas: forward, or the sum and the result of the way back
_SOFTMAX: dict[Any, tuple[str, tuple[str, str]]] = {
    aten._softmax.default: ("exp_(x - m) / s", ("", "")),
    aten._log_softmax.default: ("x - m - log(s)", ("", "")),
    aten._softmax_backward_data.default: ("", ("x * y", "y * (x - s)")),
    aten._log_softmax_backward_data.default: ("", ("x", "x - exp_(y) * s")),
}


class Writer:
    """Writes one C function: the forward or the backward pass.

    Args:
        name: of the function.
        nodes: to be computed, in order.

    Attributes:
        places: of values that are in memory.
        targets: where values are wanted, if somewhere.
        group: operations of each element that are still to be written, all of one shape.
    """

    def __init__(self, name: str, nodes: Sequence[fx.Node]) -> None:
        self.name, self.nodes = name, nodes
        self.arguments: list[str] = []
        self.once: list[str] = []
        self.rows: list[str] = []
        self.sizes: dict[str, int] = {}
        self.body: list[str] = []
        self.after: list[str] = []
        self.places: dict[fx.Node, Place] = {}
        self.targets: dict[fx.Node, Place] = {}
        self.wanted: set[fx.Node] = set()
        self.constant: set[fx.Node] = set()
        self.scratch = 0
        self.group: list[fx.Node] = []
        self.packed: dict[tuple[str, tuple[int, ...]], str] = {}

    # arguments

    def same(self, node: fx.Node) -> None:
        """Add an argument that is the same at every step, with the strides of its example."""
        name = self.argument()
        self.places[node] = Place(name, tuple(value(node).shape), tuple(node.meta["stride"]))
        self.constant.add(node)

    def row(self, shape: Sequence[int], step: str = "t") -> Place:
        """Add an argument with one contiguous row for each step."""
        name, size = self.argument(), math.prod(shape)
        self.rows.append(f"REAL *r_{name} = {name} + ({step}) * {size};")
        self.sizes[name] = size
        return Place(f"r_{name}", tuple(shape), contiguous(shape))

    def argument(self) -> str:
        """Add an argument and return its name."""
        self.arguments.append(f"p{len(self.arguments)}")
        return self.arguments[-1]

    def whole(self, node: fx.Node) -> Place:
        """Add a contiguous argument that all steps share."""
        shape = tuple(value(node).shape)
        return Place(self.argument(), shape, contiguous(shape))

    def room(self, size: int) -> str:
        """Reserve scratch memory, which all steps share, and return a pointer to it."""
        start, self.scratch = self.scratch, self.scratch + -(-size // 16) * 16
        return f"(scratch + {start})"

    def memory(self, shape: Sequence[int]) -> Place:
        """Reserve scratch memory for a value of this shape."""
        return Place(self.room(math.prod(shape)), tuple(shape), contiguous(shape))

    # nodes

    def write(self) -> None:
        """Write all nodes. Those that depend only on constants are computed before the loop."""
        for node in self.nodes:
            given = node.all_input_nodes
            if given and all(n in self.constant for n in given):
                self.targets.pop(node, None)  # which is of a step
                with self.into(self.once):
                    self._write(node)
                self.constant.add(node)
            else:
                self._write(node)
        self.flush()

    @contextmanager
    def into(self, lines: list[str]) -> Iterator[None]:
        """Write to these lines inside the block; pending operations of the step stay pending."""
        body, group = self.body, self.group
        self.body, self.group = lines, []
        yield
        self.flush()
        self.body, self.group = body, group

    def _write(self, node: fx.Node) -> None:
        if node.target in VIEWS or node.target is operator.getitem:
            self.view(node)
        elif node.target in EACH or node.target in FILLED:
            self._element(node)
        elif node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
            self._product(node)
        elif node.target is aten.cat.default:
            self._join(node)
        elif node.target in REDUCED:
            self._reduce(node)
        elif node.target in _SOFTMAX:
            self._softmax(node)
        elif node.target in (aten.slice_backward.default, aten.select_backward.default):
            self._scatter(node)
        else:
            raise Unsupported(str(node.target))

    def finish(self, ends: Ends) -> None:
        """Write all nodes, and copy each wanted value to its place."""
        self.wanted = {node for node, _ in ends}
        self.targets = dict(reversed(ends))
        self.write()
        for node, place in ends:
            if self.places[node] != place:
                self.copy(self.places[node], place)

    def place(self, node: fx.Node) -> Place:
        """Place of a node; a pending value is written to memory first."""
        if node in self.group:
            self.flush()
        return self.places[node]

    def view(self, node: fx.Node) -> None:
        """Find the place of a view; copy its source first where strides cannot express it."""
        if node.target is operator.getitem:
            raise Unsupported("an operation with several results")
        source = self.place(node.args[0])
        blank = torch.empty_strided(source.shape, source.strides, device="meta")
        try:
            seen = node.target(blank, *node.args[1:], **node.kwargs)
        except RuntimeError:
            seen = None
        if seen is None or not seen._is_view():  # memory that does not lie so
            whole = self.memory(source.shape)
            self.copy(source, whole)
            source = whole
            blank = torch.empty_strided(source.shape, source.strides, device="meta")
            seen = node.target(blank, *node.args[1:], **node.kwargs)
        pointer = f"({source.pointer} + {seen.storage_offset()})"
        self.places[node] = Place(pointer, tuple(seen.shape), tuple(seen.stride()))

    def _element(self, node: fx.Node) -> None:
        shape = tuple(value(node).shape)
        if self.group and tuple(value(self.group[0]).shape) != shape:
            self.flush()
        self.group.append(node)

    def flush(self) -> None:
        """Write the pending operations as one loop over elements."""
        group, self.group = self.group, []
        if not group:
            return
        shape, inside = tuple(value(group[0]).shape), set(group)
        reads: dict[fx.Node, Place] = {}
        lines: list[str] = []
        stores: list[tuple[Place, str]] = []
        for node in group:
            if node.target in FILLED:
                made = number(FILLED[node.target](*node.args))
            else:
                args = [self._operand(a, inside, reads) for a in node.args]
                kwargs = {k: v for k, v in node.kwargs.items() if v is not None}
                made = EACH[node.target](*args, **kwargs)
            kind = "int" if value(node).dtype == torch.bool else "REAL"
            lines.append(f"{kind} v_{node.name} = {made};")
            if node in self.wanted or any(user not in inside for user in node.users):
                if kind == "int":
                    raise Unsupported("a truth value that is kept")
                self.places[node] = self.targets.get(node) or self.memory(shape)
                stores.append((self.places[node], f"v_{node.name}"))
        loads = [(place, f"x_{node.name}") for node, place in reads.items()]
        self.body += nest(shape, loads, lines, stores)

    def _operand(self, thing: Any, inside: set[fx.Node], reads: dict[fx.Node, Place]) -> Any:
        if not isinstance(thing, fx.Node):
            return thing
        if thing in inside:
            return f"v_{thing.name}"
        reads[thing] = self.places[thing]
        return f"x_{thing.name}"

    def copy(self, source: Place, target: Place) -> None:
        """Write a copy of what is in one place to another."""
        self.flush()
        self.body += nest(target.shape, [(source, "x")], [], [(target, "x")])

    def _product(self, node: fx.Node) -> None:
        *bias, a, b = (self.place(n) for n in node.args)
        (rows, inner), columns = a.shape, b.shape[1]
        if a.strides[1] != 1 and inner > 1:
            whole = self.memory(a.shape)
            self.copy(a, whole)
            a = whole
        self.flush()
        width = padded(columns)
        made = Place(self.room(rows * width), (rows, columns), (width, 1))
        if bias:
            self.copy(bias[0], made)
        key = b.pointer, b.strides
        if node.args[-1] in self.constant and key in self.packed:
            panel = self.packed[key]
        else:
            panel = self.packed[key] = self.room(inner * width)
            strides = f"{b.strides[0]}, {b.strides[1]}"
            line = f"pack({inner}, {columns}, {b.pointer}, {strides}, {panel});"
            (self.once if node.args[-1] in self.constant else self.body).append(line)
        self.body.append(
            f"gemm({rows}, {columns}, {inner}, {a.pointer}, {a.strides[0]}, {panel}, "
            f"{made.pointer}, {width}, {int(bool(bias))});"
        )
        self._made(node, made)

    def _made(self, node: fx.Node, made: Place) -> None:
        """Record the place of a value, and copy it to where it is wanted."""
        self.places[node] = made
        if node in self.wanted and node in self.targets:
            self.copy(made, self.targets[node])

    def _join(self, node: fx.Node) -> None:
        dim = (node.args[1] if len(node.args) > 1 else 0) % value(node).ndim
        pieces = [self.place(n) for n in node.args[0]]
        made, start = self.targets.get(node) or self.memory(value(node).shape), 0
        for piece in pieces:
            into = f"({made.pointer} + {start * made.strides[dim]})"
            self.copy(piece, Place(into, piece.shape, made.strides))
            start += piece.shape[dim]
        self.places[node] = made

    def _reduce(self, node: fx.Node) -> None:
        source = self.place(node.args[0])
        self.flush()
        rank = len(source.shape)
        given = node.args[1] if len(node.args) > 1 else list(range(rank))
        dims = {d % rank for d in (given if isinstance(given, list) else [given])}
        kept = tuple(1 if d in dims else n for d, n in enumerate(source.shape))
        loads = [(source, "x")]
        if node.target is aten.logsumexp.default:
            loads.append((self._folded(kept, loads, "x", "(REAL)-INFINITY", MOST), "m"))
        each, last = REDUCED[node.target]
        whole = self._folded(kept, loads, each)
        if last:
            count = math.prod(source.shape) // max(math.prod(kept), 1)
            ends = [(whole, "x"), *loads[1:]]
            self.body += nest(kept, ends, [], [(whole, last.format(count=count))])
        shape = tuple(value(node).shape)
        self._made(node, Place(whole.pointer, shape, contiguous(shape)))

    def _folded(
        self,
        kept: tuple[int, ...],
        loads: Sequence[tuple[Place, str]],
        each: str,
        first: str = "0",
        assign: str = "{0} += {1};",
    ) -> Place:
        """Reduce along the dimensions that are not kept; ``assign`` combines elements."""
        whole = self.memory(kept)
        self.body += nest(kept, [], [], [(whole, first)])
        self.body += nest(loads[0][0].shape, loads, [], [(whole, each)], assign)
        return whole

    def _softmax(self, node: fx.Node) -> None:
        """Write a softmax or log-softmax of x, or its gradient from the result y."""
        forward, backward = _SOFTMAX[node.target]
        backwards = not forward
        loads = [
            (self.place(n), name)
            for n, name in zip(node.args, "xy", strict=False)
            if isinstance(n, fx.Node)
        ]
        made, shape = self.memory(value(node).shape), tuple(value(node).shape)
        self.flush()
        dim = node.args[1 + backwards] % len(shape)
        kept = tuple(1 if d == dim else n for d, n in enumerate(shape))
        if backwards:
            loads.append((self._folded(kept, loads, backward[0]), "s"))
        else:
            loads.append((self._folded(kept, loads, "x", "(REAL)-INFINITY", MOST), "m"))
            loads.append((self._folded(kept, loads, "exp_(x - m)"), "s"))
        self.body += nest(shape, loads, [], [(made, forward or backward[1])])
        self._made(node, made)

    def _scatter(self, node: fx.Node) -> None:
        """Write the gradient of a slice or of one item, with zeros elsewhere."""
        gradient, sizes, dim, start, *rest = node.args
        source, whole = self.place(gradient), self.memory(sizes)
        dim %= len(sizes)
        step, pointer = rest[1] if rest else 1, whole.pointer
        strides = [s * step if d == dim else s for d, s in enumerate(whole.strides)]
        if not rest:
            del strides[dim]
        start = start % sizes[dim] if start < 0 else min(start, sizes[dim])
        into = f"({pointer} + {start * whole.strides[dim]})"
        self.flush()
        self.body += nest(sizes, [], [], [(whole, "0")])
        self.copy(source, Place(into, source.shape, tuple(strides)))
        self._made(node, whole)

    # the function

    def source(self, backwards: bool) -> str:
        """C source of the function, which runs steps ``begin`` to ``end``, or down from the end.

        All T steps may be run in several calls, in order.
        """
        arguments = "\n".join(f"  REAL *{a} = p[{i}];" for i, a in enumerate(self.arguments))
        steps = "t = end - 1; t >= begin; t--" if backwards else "t = begin; t < end; t++"
        first, last = ("end == T", "begin == 0") if backwards else ("begin == 0", "end == T")
        lines = "\n    ".join([*self.rows, *self.body])
        once, after = "\n    ".join(self.once), "\n    ".join(self.after)
        return f"""
void {self.name}(long begin, long end, long T, REAL **p, REAL *scratch) {{
{arguments}
  if ({first}) {{
    {once}
  }}
  for (long {steps}) {{
    {lines}
  }}
  if ({last}) {{
    {after}
  }}
}}
"""
