"""Sums over steps of a gradient, as formulas: one product of all rows, where the loop would add T.

A formula is ``("mm", left, right)``, ``("sum", node, dims, keep)``, ``("add", *formulas)``,
``("cat", arguments, *formulas)`` or ``("apply", node, formula)``, for a linear operation.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.views import VIEWS, over_time
from pyro_avrnn.products import times

_LINEAR = {aten.neg.default, aten.slice_backward.default, aten.select_backward.default}


def sum_over_steps(node: fx.Node, late: set[fx.Node]) -> Any:
    """A formula for the sum of a gradient over all steps, if it has one; else None."""
    args = node.args
    if node.target is aten.mm.default:
        left, right = args
        return ("mm", left.args[0], right) if left.target is aten.t.default else None
    if node.target is aten.sum.dim_IntList and args[0] in late:
        dims = [d % value(args[0]).ndim + 1 for d in args[1]]
        return ("sum", args[0], dims, len(args) > 2 and args[2])
    if node.target is aten.add.Tensor and not node.kwargs:
        terms = [sum_over_steps(n, late) if isinstance(n, fx.Node) else None for n in args]
        return None if None in terms else ("add", *terms)
    if node.target is aten.cat.default:
        terms = [sum_over_steps(n, late) for n in args[0]]
        return None if None in terms else ("cat", args[1:], *terms)
    linear = node.target in VIEWS or node.target in _LINEAR
    if linear and not any(isinstance(n, fx.Node) for n in args[1:]):
        inner = sum_over_steps(args[0], late)
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


def sums_of(gradients: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Split gradients into the products and sums of one step, and the nodes computed from them."""
    first: dict[fx.Node, None] = {}
    last: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node.target in (aten.mm.default, aten.sum.dim_IntList):
            first[node] = None
        elif node not in last:
            for source in node.all_input_nodes:
                visit(source)
            last[node] = None

    for gradient in gradients:
        visit(gradient)
    return list(first), list(last)


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
    if kind == "cat":
        return aten.cat.default([total(part, known) for part in parts[1:]], *parts[0])
    if kind == "add":
        return sum(total(part, known) for part in parts[1:]) + total(parts[0], known)
    node, inner = parts
    return node.target(total(inner, known), *node.args[1:], **node.kwargs)


def seen(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor:
    """The values of all steps, by views of what is known."""
    if node not in known:
        known[node] = over_time(node, seen(node.args[0], known), copies=True)
    return known[node]
