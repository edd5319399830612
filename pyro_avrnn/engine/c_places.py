"""Where values are in the memory of a C function, and loops over their elements."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx


class Place(NamedTuple):
    """Where the value of a node is, at every step."""

    pointer: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def like(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Strides of the value broadcast to a shape."""
        lead = len(shape) - len(self.shape)
        pairs = zip(self.shape, self.strides, shape[lead:], strict=True)
        return (0,) * lead + tuple(0 if have != want else s for have, s, want in pairs)


Ends = Sequence[tuple[fx.Node, Place]]  #: nodes, and where their values are wanted


def padded(columns: int) -> int:
    """Number of columns that a product takes in memory: whole panels."""
    return -(-columns // 32) * 32


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of memory without gaps."""
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def nest(
    shape: Sequence[int],
    loads: Sequence[tuple[Place, str]],
    lines: Sequence[str],
    stores: Sequence[tuple[Place, str]],
    assign: str = "{0} = {1};",
) -> list[str]:
    """Write nested loops over elements; adjacent dimensions are merged where memory allows.

    Args:
        shape: of the elements.
        loads: what is read of each, and its name in ``lines``.
        lines: what is computed of it.
        stores: where it goes, and what.
        assign: how.
    """
    every = [place.like(shape) for place, _ in (*loads, *stores)]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in every]
    for d, n in enumerate(shape):
        joins = sizes and all(own[-1] == s[d] * n for own, s in zip(strides, every, strict=True))
        if n == 1:
            continue
        if joins:
            sizes[-1] *= n
        else:
            sizes.append(n)
        for own, s in zip(strides, every, strict=True):
            own[-1 if joins else len(own) :] = [s[d]]
    made, names = [], [f"i{d}" for d in range(len(sizes))]
    for d, n in enumerate(sizes):
        last = "EACH " if d == len(sizes) - 1 and assign == "{0} = {1};" else ""
        made.append(f"{last}for (long i{d} = 0; i{d} < {n}; i{d}++) {{")

    def at(place: Place, own: Sequence[int]) -> str:
        terms = [f"{n} * {s}" for n, s in zip(names, own, strict=True) if s]
        return f"{place.pointer}[{' + '.join(terms) or '0'}]"

    for (place, name), own in zip(loads, strides, strict=False):
        made.append(f"REAL {name} = {at(place, own)};")
    made += lines
    for (place, name), own in zip(stores, strides[len(loads) :], strict=True):
        made.append(assign.format(at(place, own), name))
    return ["{ " + " ".join(made) + "}" * len(sizes) + " }"]
