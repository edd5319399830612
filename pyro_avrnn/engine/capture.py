"""Traces graphs of tensor operations, simplifies them, and cuts pieces out of them."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}


class _NoGradientMarks(TorchDispatchMode):
    """Puts a ``detach`` behind what is computed where gradients are switched off."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled() or func in _SAME or torch.Tag.inplace_view in func.tags:
            return out
        if func._schema.is_mutable:
            return out
        return torch.utils._pytree.tree_map_only(Tensor, aten.detach.default, out)


def traced(function: Callable[..., Any], args: Sequence[Tensor], *, marks: bool = False) -> Any:
    """The graph of a function of tensors that gives a list of tensors; values in its nodes.

    Args:
        function: is run once, on ``args``.
        args: examples.
        marks: keep no-gradient regions apart, by ``detach``.
    """

    def run(*given: Tensor) -> Any:
        if not marks or not torch.is_grad_enabled():
            return function(*given)
        with _NoGradientMarks():
            return function(*given)

    graph = _recorded(run, args)
    if any(changes(node) for node in graph.graph.nodes):
        graph = _recorded(torch.func.functionalize(graph), args)
    _tidy(graph, keep_detach=marks)
    evaluate(graph, args)
    if not marks:
        simplify(graph)
    return graph


def _recorded(function: Callable[..., Any], args: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)


def changes(node: fx.Node) -> bool:
    """Whether an operation changes a tensor in place."""
    return node.op == "call_function" and getattr(
        getattr(node.target, "_schema", None), "is_mutable", False
    )


def evaluate(graph: fx.GraphModule, args: Sequence[Tensor]) -> Any:
    """Runs the graph and leaves every node's value in ``node.meta["value"]``."""

    class _Values(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            node.meta["value"] = value
            return value

    with torch.no_grad():
        return _Values(graph).run(*args)


def value(node: fx.Node) -> Tensor:
    """The example value of a node."""
    return node.meta["value"]


def example(node: fx.Node) -> Tensor:
    """The example value of a node, or zeros of its shape where it was dropped."""
    made = value(node).detach()
    if made.device == node.meta.get("device", made.device):
        return made
    shape, stride = made.shape, node.meta["stride"]
    return made.new_empty_strided(shape, stride, device=node.meta["device"]).zero_()


def drop_values(nodes: Iterable[fx.Node]) -> None:
    """Replace example values by metadata, so that no memory is held; indices keep theirs."""
    for node in nodes:
        made = node.meta.get("value")
        if isinstance(made, Tensor) and not made.is_meta:
            kept = made.to("meta") if made.is_floating_point() else made.clone()
            node.meta |= {"device": made.device, "stride": made.stride(), "value": kept}


def _tidy(graph: fx.GraphModule, *, keep_detach: bool) -> None:
    """Slices for splits, no aliases, no repeats, nothing unused."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and (piece := _piece(graph.graph, node)) is not None:
            node.replace_all_uses_with(piece)
            graph.graph.erase_node(node)
            node = piece
        alias = node.target in _SAME and not (keep_detach and node.target is aten.detach.default)
        if alias or _is_whole(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
        else:
            seen[key] = node
    graph.graph.eliminate_dead_code()
    graph.recompile()


def simplify(graph: fx.GraphModule) -> None:
    """Fewer operations that do the same, of which autograd writes many.

    ``a + (-b)`` becomes ``a - b``, ``a + b c`` one operation, and slices that were each padded
    with zeros and then summed are joined.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            continue
        if any(value(n).shape != value(node).shape for n in (left, right)):
            continue
        new: tuple[Any, tuple[Any, ...]] | None = None
        if (pieces := _padded(node)) is not None:
            if not any(user.target is aten.add.Tensor and _padded(user) for user in node.users):
                new = aten.cat.default, pieces
        else:
            for one, other in ((left, right), (right, left)):
                if other.target is aten.neg.default:
                    new = aten.sub.Tensor, (one, other.args[0])
                elif other.target is aten.mul.Tensor and len(other.users) == 1:
                    if all(isinstance(n, fx.Node) for n in other.args):
                        new = aten.addcmul.default, (one, *other.args)
                if new is not None:
                    break
        if new is None:
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(*new)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _padded(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """The pieces, in order, and the dimension of a sum of slices that fill it; else None."""
    leaves, stack = [], [node]
    while stack:
        part = stack.pop()
        if part.target is aten.add.Tensor and not part.kwargs:
            stack += [n for n in part.args if isinstance(n, fx.Node)]
        elif part.target is aten.slice_backward.default:
            leaves.append(part)
        else:
            return None
    kinds = {
        (tuple(leaf.args[1]), leaf.args[2] % len(leaf.args[1]), leaf.args[5]) for leaf in leaves
    }
    if len(leaves) < 2 or len(kinds) > 1:
        return None
    shape, dim, step = kinds.pop()
    leaves.sort(key=lambda leaf: leaf.args[3])
    ends = [0, *(min(leaf.args[4], shape[dim]) for leaf in leaves)]
    if step != 1 or ends[-1] != shape[dim] or [leaf.args[3] for leaf in leaves] != ends[:-1]:
        return None
    return [leaf.args[0] for leaf in leaves], dim


def _piece(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The slice that an item of a split is."""
    source, index = node.args
    if isinstance(source, fx.Node) and source.target is aten.unbind.int:
        dim = source.args[1] if len(source.args) > 1 else 0
        with graph.inserting_before(node):
            return graph.call_function(aten.select.int, (source.args[0], dim, index))
    kinds = (aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default)
    if not isinstance(source, fx.Node) or source.target not in kinds:
        return None
    tensor, sizes = source.args[:2]
    dim = source.args[2] if len(source.args) > 2 else 0
    if isinstance(sizes, int):
        start = index * sizes
        stop = start + sizes
    else:
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    with graph.inserting_before(node):
        return graph.call_function(aten.slice.Tensor, (tensor, dim, start, stop))


def _is_whole(node: fx.Node) -> bool:
    """Whether this is a slice of everything."""
    if node.target is not aten.slice.Tensor:
        return False
    start = node.args[2] if len(node.args) > 2 else None
    stop = node.args[3] if len(node.args) > 3 else None
    return start in (None, 0) and (stop is None or stop == 2**63 - 1) and len(node.args) < 5


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    return (type(value), value) if isinstance(value, int | float | bool) else value


def nodes_for(outputs: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything between: what the outputs need, without the inputs and what only they need."""
    stop, found, stack = set(inputs), set(), list(outputs)
    while stack:
        node = stack.pop()
        if node in stop or node in found:
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found


def extract(
    whole: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """The piece of a graph between inputs and outputs, as a module that returns a tuple.

    Views of it become reshapes: of all steps at once they may need a copy.
    """
    needed = nodes_for(outputs, inputs)
    graph, made = fx.Graph(), {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in whole.graph.nodes:
        if node in needed:
            if node.op == "placeholder":
                raise AssertionError(f"{node} is needed, but no input")
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].meta = dict(node.meta)
            if node.target in (aten.view.default, aten._unsafe_view.default):
                made[node].target = aten.reshape.default  # for all steps a copy may be needed
    graph.output(tuple(made[node] for node in outputs))
    return fx.GraphModule(whole, graph)
