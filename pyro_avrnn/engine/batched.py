"""Runs a part of a step for all steps together."""

from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import aten, value
from pyro_avrnn.engine.parts import Part
from pyro_avrnn.engine.views import VIEWS, over_time
from pyro_avrnn.products import linear

#: of each element, as pointwise operations are
_EACH = {aten.detach.default, aten.fill.Scalar}


def all_steps(
    part: Part, known: dict[fx.Node, Tensor], fixed: set[fx.Node], length: int
) -> dict[fx.Node, Tensor]:
    """The part's outputs, ``(T, *shape)``, under autograd.

    Args:
        part: of the graph of one step.
        known: its inputs, ``(T, *shape)``, or as they are if ``fixed``.
        fixed: inputs that are the same at every step.
        length: T.
    """
    holders = [n for n in part.module.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = {h: known[n] for h, n in zip(holders, part.inputs, strict=True)}
    rows = {h for h, n in zip(holders, part.inputs, strict=True) if n not in fixed}
    for node in part.module.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(part.module, node.target)
        elif node.op == "call_function":
            if rows.isdisjoint(node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
            else:
                values[node] = _of_rows(node, values, rows)
                rows.add(node)
    ends = part.module.graph.output_node().args[0]
    made = (values[n] if n in rows else values[n].expand(length, *values[n].shape) for n in ends)
    return dict(zip(part.outputs, made, strict=True))


def _of_rows(node: fx.Node, values: dict[fx.Node, Any], rows: set[fx.Node]) -> Any:
    """Apply one operation to all steps, by vmap where a single call does not do it."""
    if node.target in VIEWS:
        return over_time(node, values[node.args[0]], copies=True)
    if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
        *bias, left, right = node.args
        if left in rows and right not in rows:
            whole, weight = values[left], values[right].t()
            if bias and bias[0] not in rows and value(bias[0]).ndim == 1:
                return linear(whole, weight, values[bias[0]])
            made = linear(whole, weight)
            return made + values[bias[0]] if bias else made
    each = node.target in _EACH or torch.Tag.pointwise in getattr(node.target, "tags", ())
    if each and isinstance(value(node), Tensor):
        rank = value(node).ndim

        def aligned(n: fx.Node) -> Tensor:
            ones = [1] * (rank - value(n).ndim) if n in rows else []
            made: Tensor = values[n]
            return made.reshape(len(made), *ones, *made.shape[1:]) if ones else made

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), aligned)
        return node.target(*args, **kwargs)
    inputs = list(dict.fromkeys(node.all_input_nodes))

    def one(*given: Any) -> Any:
        mine = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), mine.__getitem__)
        return node.target(*args, **kwargs)

    # items of an operation that gives several are picked as they are
    dims = tuple(0 if n in rows else None for n in inputs)
    return torch.vmap(one, in_dims=dims)(*(values[n] for n in inputs))
