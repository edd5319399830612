"""One step of guide and model as a graph of tensor operations, sorted by what it depends on.

The step is traced once with ``make_fx``. Every operation of it then belongs to one of four parts:

| part | depends on | is run |
|---|---|---|
| static | parameters alone | once a call |
| stages | data, encodings, noise, but not the recurrence | once a call, all steps together |
| loop | the state | T times |
| after | the state, but no later state depends on it | once a call, all steps together |

A product of parameters with inputs of two kinds, ``[c_t, h_t] W``, is split first, so that only
the part that depends on the state stays in the loop.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: operations that give the data of their first argument another shape, without a copy
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.alias.default,
}
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
_STATIC, _LOOP = -1, 10_000  # stages between them


class Uncapturable(Exception):
    """This step cannot be run as a graph; the reason is said. The plain loop takes any."""


@dataclass
class Noise:
    """A random operation of the step: drawn anew for every step, in the order of the loop."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device


@dataclass
class Part:
    """A piece of the graph, with the nodes of the whole that go in and come out."""

    module: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]


@dataclass
class Parts:
    """The step, taken apart; nodes are those of the whole graph."""

    graph: fx.GraphModule
    parameters: list[fx.Node]  # placeholders, as given
    state: list[fx.Node]
    given: list[fx.Node]  # c_t and x_t
    noise: list[tuple[fx.Node, Noise]]
    after_state: list[fx.Node]  # next states
    results: list[fx.Node]  # what else the step returns
    constant: list[int]  # which states never change,
    shifted: list[int]  # and which are known before the loop, one step late
    static: Part
    stages: list[Part]
    loop: Part  # outputs: next states of those that recur, then what else is wanted of it
    after: Part
    recurring: list[int] = field(default_factory=list)


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


def take_apart(
    graph: fx.GraphModule, parameters: int, states: int, watched: bool = False
) -> Parts:
    """Sort a traced step ``(parameters, state, c_t, x_t) -> (next state, results)``.

    Args:
        graph: of the step.
        parameters, states: how many of its inputs are which.
        watched: whether the last three results are wanted at every step.

    Raises:
        Uncapturable: operations that cannot be run for all steps at once, or not replayed.
    """
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    weights = holders[:parameters]
    state = holders[parameters : parameters + states]
    inputs = holders[parameters + states :]
    for node in graph.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(graph, node.target), "requires_grad", False):
            raise Uncapturable("a tensor that requires gradients is no parameter of the modules")
        if node.op == "call_function" and node.target is aten._local_scalar_dense.default:
            raise Uncapturable("the step reads a number out of a tensor")
        if changes(node):
            raise Uncapturable(f"{node.target} changes a tensor in place")
    noise = _noise(graph)
    ends = list(graph.graph.output_node().args[0])
    after_state, results = ends[:states], ends[states:]
    _drop_empty(graph, [*weights, *state, *inputs])
    ends = list(graph.graph.output_node().args[0])
    after_state, results = ends[:states], ends[states:]
    # of particles that may change places all states recur
    constant = [i for i in range(states) if after_state[i] is state[i] and not watched]
    shifted: list[int] = []
    # nor is anything drawn before it is known which particles go on
    drawn = [n for n, _ in noise] if watched else []
    split_products(graph, weights, state, constant, shifted, drawn)
    ends = list(graph.graph.output_node().args[0])
    after_state, results = ends[:states], ends[states:]
    while True:
        stage = _stages(graph, weights, state, constant, shifted, after_state, drawn)
        late = [
            i
            for i in range(states)
            if i not in constant and i not in shifted and stage[after_state[i]] < _LOOP
        ]
        if not late or watched:
            break
        shifted += late
        split_products(graph, weights, state, constant, shifted, drawn)
        ends = list(graph.graph.output_node().args[0])
        after_state, results = ends[:states], ends[states:]
    recurring = [i for i in range(states) if i not in constant and i not in shifted]
    return _cut(
        graph,
        stage,
        weights,
        state,
        inputs,
        noise,
        after_state,
        results,
        constant,
        shifted,
        recurring,
        watched,
    )


def _noise(graph: fx.GraphModule) -> list[tuple[fx.Node, Noise]]:
    """Random operations, each replaced by an input."""
    found: list[tuple[fx.Node, Noise]] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            continue
        args = []
        for argument in node.args:
            if isinstance(argument, fx.Node):
                made = value(argument)
                blank = argument.op == "call_function" and not argument.all_input_nodes
                if not blank:  # such as draws of a Bernoulli with probabilities of this step
                    raise Uncapturable(f"{node.target} draws what depends on the step")
                args.append(made)
            else:
                args.append(argument)
        if any(isinstance(argument, fx.Node) for argument in node.kwargs.values()):
            raise Uncapturable(f"{node.target} draws what depends on the step")
        with graph.graph.inserting_after(last):
            holder = graph.graph.placeholder(f"noise_{len(found)}")
        last = holder
        holder.meta["value"] = value(node)
        node.replace_all_uses_with(holder)
        found.append(
            (holder, Noise(node.target, tuple(args), dict(node.kwargs), value(node).device))
        )
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    return found


def _drop_empty(graph: fx.GraphModule, inputs: list[fx.Node]) -> None:
    """Tensors without elements depend on nothing; joining one to others adds nothing."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("value"), Tensor):
            continue
        if value(node).numel() == 0 and node.all_input_nodes:
            example = value(node)
            with graph.graph.inserting_before(node):
                empty = graph.graph.call_function(
                    aten.empty.memory_format,
                    (list(example.shape),),
                    {"dtype": example.dtype, "device": example.device},
                )
            empty.meta["value"] = example
            node.replace_all_uses_with(empty)
            graph.graph.erase_node(node)
        elif node.target is aten.cat.default:
            full = [piece for piece in node.args[0] if value(piece).numel()]
            if len(full) == 1 and value(full[0]).shape == value(node).shape:
                node.replace_all_uses_with(full[0])
                graph.graph.erase_node(node)
            elif full and len(full) < len(node.args[0]):
                node.args = (full, *node.args[1:])
    graph.graph.eliminate_dead_code()


def _stages(
    graph: fx.GraphModule,
    weights: list[fx.Node],
    state: list[fx.Node],
    constant: list[int],
    shifted: list[int],
    after_state: Sequence[fx.Node],
    within: Sequence[fx.Node] = (),
) -> dict[fx.Node, int]:
    """When each node can be computed: static, a stage before the loop, or in it."""
    kind: dict[fx.Node, int] = {}
    first = {state[i] for i in constant} | set(weights)
    late = {state[i]: after_state[i] for i in shifted}

    def look() -> dict[fx.Node, int]:
        found: dict[fx.Node, int] = {}
        for node in graph.graph.nodes:
            if node in first or node.op == "get_attr":
                found[node] = _STATIC
            elif node in late:
                source = kind.get(late[node], 0)
                found[node] = min(source + 1, _LOOP) if source >= 0 else 0
            elif node in state or node in within:
                found[node] = _LOOP
            elif node.op == "placeholder":
                found[node] = 0
            else:
                found[node] = max((found[n] for n in node.all_input_nodes), default=_STATIC)
        return found

    for _ in range(len(shifted) + 1):
        kind = look()
    return kind


def split_products(
    graph: fx.GraphModule,
    weights: list[fx.Node],
    state: list[fx.Node],
    constant: list[int],
    shifted: list[int],
    within: Sequence[fx.Node] = (),
) -> None:
    """``[a, h] W`` becomes ``a W_a + h W_h`` where a is known before the loop and h is not."""
    ends = list(graph.graph.output_node().args[0])
    kind = _stages(graph, weights, state, constant, shifted, ends[: len(state)], within)
    for node in list(graph.graph.nodes):
        if node.target not in (aten.addmm.default, aten.mm.default) or kind[node] != _LOOP:
            continue
        bias = node.args[0] if node.target is aten.addmm.default else None
        left, right = node.args[-2:]
        if node.kwargs or kind[right] != _STATIC:
            continue
        flat = left.target in (aten.view.default, aten._unsafe_view.default)
        joined = left.args[0] if flat else left
        if joined.target is not aten.cat.default:
            continue
        pieces, whole = joined.args[0], value(joined)
        dim = joined.args[1] if len(joined.args) > 1 else 0
        if dim % whole.ndim != whole.ndim - 1 or value(left).shape[-1] != whole.shape[-1]:
            continue
        before = [i for i, piece in enumerate(pieces) if kind[piece] < _LOOP]
        within = [i for i, piece in enumerate(pieces) if kind[piece] == _LOOP]
        if not before or not within:
            continue
        _split(graph, node, bias, right, pieces, before, within, whole, kind)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _split(
    graph: fx.GraphModule,
    node: fx.Node,
    bias: fx.Node | None,
    right: fx.Node,
    pieces: Sequence[fx.Node],
    before: list[int],
    within: list[int],
    whole: Tensor,
    kind: dict[fx.Node, int],
) -> None:
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + value(piece).shape[-1])
    width = value(node).shape[-1]
    made: list[fx.Node] = []

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(target, args)
        given = torch.utils._pytree.tree_map_only(fx.Node, value, args)
        new.meta["value"] = target(*given)
        kind[new] = max((kind[n] for n in new.all_input_nodes), default=_STATIC)
        made.append(new)
        return new

    def rows(chosen: list[int]) -> fx.Node:
        runs: list[list[int]] = []  # neighbouring rows of W stay together
        for i in chosen:
            if runs and runs[-1][1] == starts[i]:
                runs[-1][1] = starts[i + 1]
            else:
                runs.append([starts[i], starts[i + 1]])
        parts = [call(aten.slice.Tensor, right, 0, a, b) for a, b in runs]
        return parts[0] if len(parts) == 1 else call(aten.cat.default, parts, 0)

    def joined(chosen: Sequence[fx.Node]) -> fx.Node:
        if len(chosen) > 1:
            chosen = [call(aten.cat.default, list(chosen), -1)]
        flat = chosen[0]
        if value(flat).ndim == 2:
            return flat
        return call(aten.reshape.default, flat, [-1, value(flat).shape[-1]])

    known = [_unexpanded(pieces[i]) for i in before]
    leads = {value(piece).shape[:-1] for piece in known}
    if len(leads) > 1:  # of different leading dimensions
        known, leads = [pieces[i] for i in before], {whole.shape[:-1]}
    lead = leads.pop()
    ahead = rows(before)
    product = (
        call(aten.mm.default, joined(known), ahead)
        if bias is None
        else call(aten.addmm.default, bias, joined(known), ahead)
    )
    rest = joined([pieces[i] for i in within])
    if product.meta["value"].shape[0] == value(node).shape[0]:
        total = call(aten.addmm.default, product, rest, rows(within))
    else:  # the known part is the same for all particles
        part = call(aten.mm.default, rest, rows(within))
        spread = call(aten.view.default, part, [*whole.shape[:-1], width])
        known_part = call(aten.view.default, product, [*lead, width])
        summed = call(aten.add.Tensor, spread, known_part)
        total = call(aten.view.default, summed, list(value(node).shape))
    node.replace_all_uses_with(total)
    graph.graph.erase_node(node)


def _unexpanded(node: fx.Node) -> fx.Node:
    """What was expanded along leading dimensions, without them."""
    if node.target is aten.expand.default and isinstance(node.args[0], fx.Node):
        source, whole = value(node.args[0]), value(node)
        if source.shape[-1] == whole.shape[-1] and source.ndim >= 2:
            trailing = whole.shape[whole.ndim - source.ndim :]
            if source.shape == trailing:
                return node.args[0]
    return node


def _cut(
    graph: fx.GraphModule,
    stage: dict[fx.Node, int],
    weights: list[fx.Node],
    state: list[fx.Node],
    given: list[fx.Node],
    noise: list[tuple[fx.Node, Noise]],
    after_state: list[fx.Node],
    results: list[fx.Node],
    constant: list[int],
    shifted: list[int],
    recurring: list[int],
    watched: bool,
) -> Parts:
    """Pieces of the graph by stage."""
    ahead = [after_state[i] for i in recurring]
    shown = results[-3:] if watched else []
    # z, the first result, is wanted of every step; what no state needs is computed afterwards
    within = {n for n in nodes_for([*ahead, results[0], *shown], ()) if stage[n] == _LOOP}
    results = results[: len(results) - len(shown)]
    later = {n for n in nodes_for(results[1:], ()) if stage[n] == _LOOP} - within
    frontier = {
        n for node in later for n in node.all_input_nodes if n in within and n not in ahead
    }
    wanted = list(dict.fromkeys([r for r in results if r in within]))
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    wanted += sorted(frontier - set(wanted), key=order.__getitem__)
    computed = {n for n in within if n.op == "call_function"}
    loop_outputs = [*ahead, *wanted, *shown]
    loop_inputs = sorted(
        {n for node in computed for n in node.all_input_nodes if n not in computed}
        | {n for n in loop_outputs if n not in computed}
        | {state[i] for i in recurring},
        key=order.__getitem__,
    )
    loop = Part(extract(graph, loop_inputs, loop_outputs), loop_inputs, loop_outputs)
    last = [r for r in results if r in later]
    after_inputs = sorted(
        {
            n
            for node in later
            if node.op == "call_function"
            for n in node.all_input_nodes
            if n not in later
        },
        key=order.__getitem__,
    )
    after = Part(extract(graph, after_inputs, last), after_inputs, last)
    used = {*loop_inputs, *after_inputs, *results, *(after_state[i] for i in shifted)}
    statics = sorted(
        {
            n
            for node in graph.graph.nodes
            for n in (node, *node.all_input_nodes)
            if stage[n] == _STATIC and (n in used or (n is not node and stage[node] > _STATIC))
        },
        key=order.__getitem__,
    )
    fixed = [*weights, *(state[i] for i in constant)]
    static = Part(extract(graph, fixed, statics), fixed, statics)
    stages: list[Part] = []
    known: list[fx.Node] = [*given, *(n for n, _ in noise)]
    numbers = sorted({s for s in stage.values() if 0 <= s < _LOOP})
    for number in numbers:
        known = [*known, *(state[i] for i in shifted if stage[state[i]] == number)]
        mine = [n for n in graph.graph.nodes if stage[n] == number and n.op == "call_function"]
        wanted_here = [
            n
            for n in mine
            if n in used or any(stage[user] > number for user in n.users if user.op != "output")
        ]
        inputs = sorted(
            {
                n
                for node in nodes_for(wanted_here, [*known, *statics])
                for n in node.all_input_nodes
                if n in known or n in statics
            },
            key=order.__getitem__,
        )
        stages.append(Part(extract(graph, inputs, wanted_here), inputs, wanted_here))
        known += wanted_here
    return Parts(
        graph,
        weights,
        state,
        given,
        noise,
        after_state,
        results,
        constant,
        shifted,
        static,
        stages,
        loop,
        after,
        recurring,
    )
