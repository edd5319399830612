"""A part of a step, for all steps together."""

import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx

from pyro_avrnn.engine.capture import VIEWS, Part, aten, value
from pyro_avrnn.engine.views import over_time
from pyro_avrnn.products import linear

_log = logging.getLogger(__name__)

_SHAPED = VIEWS | {aten.reshape.default}
#: whatever the values, of the same shape
_LIKE = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
}
_EACH = {aten.detach.default, aten.fill.Scalar}  # of each element, as pointwise operations are
#: along dimensions that the second argument names
_ALONG = {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.logsumexp.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.cumsum.default,
}


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
            many = any(n in rows for n in node.all_input_nodes)
            if many and node.target in _LIKE:
                first = {n: values[n][0] if n in rows else values[n] for n in node.all_input_nodes}
                values[node] = _one(node, first, rows, length)
                continue
            if many:
                rows.add(node)
            values[node] = (_many if many else _one)(node, values, rows, length)
    ends = part.module.graph.output_node().args[0]
    made = (values[n] if n in rows else values[n].expand(length, *values[n].shape) for n in ends)
    return dict(zip(part.outputs, made, strict=True))


def _one(node: fx.Node, values: dict[fx.Node, Any], rows: set[fx.Node], length: int) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def _many(node: fx.Node, values: dict[fx.Node, Any], rows: set[fx.Node], length: int) -> Any:
    kind, args = node.target, node.args
    tags = getattr(kind, "tags", ())
    if kind in _SHAPED:
        return over_time(node, values[args[0]], copies=True)
    if kind in (aten.mm.default, aten.addmm.default) and not node.kwargs:
        *bias, left, right = args
        if left in rows and right not in rows:
            flat, weight = values[left].flatten(0, 1), values[right].t()
            if bias and bias[0] not in rows and value(bias[0]).ndim == 1:
                return linear(flat, weight, values[bias[0]]).unflatten(0, (length, -1))
            made = linear(flat, weight).unflatten(0, (length, -1))
            return made + values[bias[0]] if bias else made
    if kind is aten.cat.default:
        pieces = [
            values[n] if n in rows else values[n].expand(length, *value(n).shape) for n in args[0]
        ]
        dim = args[1] if len(args) > 1 else 0
        return torch.cat(pieces, dim % value(node).ndim + 1)
    if kind in _ALONG:
        dims, rank = args[1] if len(args) > 1 else 0, value(args[0]).ndim
        dims = [d % rank + 1 for d in dims] if isinstance(dims, list) else dims % rank + 1
        return kind(values[args[0]], dims, *args[2:], **node.kwargs)
    if (torch.Tag.pointwise in tags or kind in _EACH) and isinstance(
        node.meta.get("value"), Tensor
    ):
        rank = value(node).ndim

        def aligned(n: fx.Node) -> Tensor:
            made, own = values[n], value(n).ndim
            if n not in rows or own == rank:
                return made
            return made.reshape(length, *[1] * (rank - own), *made.shape[1:])

        given, options = fx.node.map_arg((args, node.kwargs), aligned)
        return kind(*given, **options)
    return _mapped(node, values, rows)


def _mapped(node: fx.Node, values: dict[fx.Node, Any], rows: set[fx.Node]) -> Any:
    """An operation that is not known here."""
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]
    inputs = node.all_input_nodes
    _log.debug("%s of all steps goes by vmap", node.target)

    def one(*given: Tensor) -> Any:
        mine = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), mine.__getitem__)
        return node.target(*args, **kwargs)

    dims = tuple(0 if n in rows else None for n in inputs)
    return torch.vmap(one, in_dims=dims)(*(values[n] for n in inputs))
