"""Writes the sums over all steps that end a backward pass, as C."""

import re

from torch import fx

from pyro_avrnn.engine.c_code import GRAM_LEAD, GRAM_ROWS
from pyro_avrnn.engine.c_places import Ends, Place, contiguous, nest, padded
from pyro_avrnn.engine.c_writer import Writer
from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.sums import sums_of


class Summing(Writer):
    """Writer of a function that also computes sums after its loop."""

    def sums(self, ends: Ends) -> None:
        """Write the sums over all steps of gradients that are linear in matrix products.

        ``places`` has what is the same at every step, and rows.
        """
        first, last = sums_of(node for node, _ in ends)
        products = [n for n in first if n.target is aten.mm.default]
        self.room_of_gram = self.room(max((_gram_room(n) for n in products), default=0))
        each: list[str] = []
        made = {n: (self._rows if n in products else self._sum)(n, each) for n in first}
        self.after += ["for (long t = 0; t < T; t++) {", *self.rows, *each, "}"]
        self.places |= made
        self.nodes = last
        with self.into(self.after):
            self.finish(ends)

    def _rows(self, node: fx.Node, each: list[str]) -> Place:
        """Write ``a' b`` over the rows of all steps, as one product where these are contiguous."""
        with self.into(each):
            factors = self._seen(node.args[0].args[0]), self._seen(node.args[1])
        (rows, columns), width = factors[0].shape, padded(factors[1].shape[1])
        made = Place(self.room(columns * width), tuple(value(node).shape), (width, 1))
        joined = [self._joined(place) for place in factors]
        (a, a_row), (b, b_row) = (
            one or (place.pointer, place.strides[0])
            for one, place in zip(joined if all(joined) else (None, None), factors, strict=True)
        )
        count, add = (f"T * {rows}", "0") if all(joined) else (rows, "t > 0")
        (self.after if all(joined) else each).append(
            f"gram({columns}, {made.shape[1]}, {count}, {a}, {a_row}, {factors[0].strides[1]}, "
            f"{b}, {b_row}, {factors[1].strides[1]}, {self.room_of_gram}, {made.pointer}, "
            f"{width}, {add});"
        )
        return made

    def _joined(self, place: Place) -> tuple[str, int] | None:
        """Pointer and row stride of all steps as one matrix; None if they are not contiguous."""
        found = re.search(r"\br_(p\d+)\b", place.pointer)
        if found is None:
            return None
        size, rows = self.sizes[found[1]], place.shape[0]
        stride = size if rows == 1 else place.strides[0]
        pointer = place.pointer.replace(found[0], found[1])
        return (pointer, stride) if stride * rows == size else None

    def _sum(self, node: fx.Node, each: list[str]) -> Place:
        with self.into(each):
            place = self._seen(node.args[0])
            dims = {d % len(place.shape) for d in node.args[1]}
            kept = tuple(1 if d in dims else n for d, n in enumerate(place.shape))
            whole = self.memory(kept)
            self.after += nest(kept, [], [], [(whole, "0")])
            self.body += nest(place.shape, [(place, "x")], [], [(whole, "x")], "{0} += {1};")
        shape = tuple(value(node).shape)
        return Place(whole.pointer, shape, contiguous(shape))

    def _seen(self, node: fx.Node) -> Place:
        """Place of a node that is a view of a known one."""
        if node not in self.places:
            self._seen(node.args[0])
            self.view(node)
        return self.places[node]


def _gram_room(node: fx.Node) -> int:
    columns, others = value(node).shape
    return columns * GRAM_LEAD + GRAM_ROWS * padded(others)
