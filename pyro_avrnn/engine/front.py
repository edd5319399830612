"""Selects the graph of a step: TorchDynamo traces it and guards every Python value it reads.

A capture must not outlive what it was made from: an attribute, a schedule, a global, a closure, a
mode. Dynamo knows all of it. Its backend here keeps the graph and compiles nothing; before each
run the step is called once on blank tensors, and the entry whose guards pass says which graph the
step is now, and which tensors it reads besides the blanks. That call computes nothing.

Dynamo does not guard the code of methods (``Linear.forward = ...``): it is compared here.
"""

import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

_KEPT = 64  #: graphs of one step, after which it begins anew
_BLANKS = 32  #: sets of blank tensors that it keeps, by their shapes
_FREE = 8  #: traces in a row without a hit between them; then they become rarer
_REFUSED = 64  #: calls before a step that cannot be traced is tried again
_SETTINGS = {  #: with which Dynamo overlooks no change
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "assume_dunder_attributes_remain_unchanged": False,
    "side_effect_replay_policy": "error",
    "accumulated_recompile_limit": 2**30,
}
TRACING = threading.RLock()  # tracing patches torch for all threads
_NUMBER = itertools.count()


class Uncapturable(Exception):
    """A step that cannot run as a graph, and why. The plain loop can run any step."""


class _Missed(Exception):
    """The guards of no graph pass."""


class _Function(NamedTuple):
    """A function that was traced, and where it is found."""

    holder: Any  # a class or module
    name: str
    raw: Any
    function: FunctionType
    code: CodeType
    attributes: dict[str, Any]

    def unchanged(self) -> bool:
        """Whether the holder still has this function, unchanged."""
        there = self.holder.__dict__.get(self.name) is self.raw
        known = self.function.__code__ is self.code and self.function.__dict__ == self.attributes
        return there and known


@dataclass
class Graph:
    """A step as it was traced."""

    module: fx.GraphModule
    marks: tuple[Tensor, ...]  # in place of its outputs, in what a selecting call returns
    codes: set[CodeType]  # of the functions that were traced
    functions: list[_Function] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)  # of inputs among the blanks, if any
    # leaves of what the step returns: which output, or which of what it reads and the blanks
    outputs: list[tuple[bool, int]] = field(default_factory=list)
    spec: Any = None  # how they are nested
    made: dict[Any, Any] = field(default_factory=dict)  # what was made of this graph


class Selected(NamedTuple):
    """The current graph of a step, and what it reads."""

    graph: Graph
    read: list[Any]  # inputs of the graph that are no blanks: tensors, and numbers that vary


def _call(step: Any, of: Any, state: Any, inputs: Any) -> Any:
    """The step, as Dynamo traces it; it is never run."""
    if not torch.compiler.is_compiling():
        raise _Missed
    return step(*of, state, inputs)


class Front:
    """The graphs of one step.

    Attributes:
        graphs: those that its guards choose from.
    """

    def __init__(self) -> None:
        self.local = threading.local()
        self.blanks: dict[Any, Any] = {}
        self.free, self.wait = _FREE, 0
        self.forget: Any = None
        self._begin()

    def _begin(self) -> None:
        """Forget all graphs."""
        if self.forget is not None:
            self.forget()
        self.graphs: list[Graph] = []
        self.calls = self.hits = self.again = 0
        name = f"step_{next(_NUMBER)}"  # guards are kept by code object, with its globals
        # Dynamo holds its backends for good, so they hold nothing
        keep, choose = weakref.WeakMethod(self._keep), weakref.WeakMethod(self._filter)
        own = FunctionType(_call.__code__.replace(co_name=name), dict(globals()), name)
        # what Dynamo keeps of a code object refers to that object
        self.forget = weakref.finalize(self, _forget, own.__code__)
        options: dict[str, Any] = {
            "backend": lambda *given: keep()(*given),  # type: ignore[misc]
            "options": {"guard_filter_fn": lambda entries: choose()(entries)},  # type: ignore[misc]
            "recompile_limit": 2**20,
            "isolate_recompiles": True,
        }
        try:
            self.compiled: Any = torch.compile(own, fullgraph=True, **options)
        except Exception as reason:  # noqa: BLE001 - such as a Python that Dynamo does not know
            raise Uncapturable(first_line(reason)) from None

    def select(self, step: Any, of: Sequence[Any], state: Any, inputs: Any) -> Selected | None:
        """The current graph of a step, or None where another trace would not pay.

        Args:
            step: ``step(*of, state, inputs)`` gives nested tensors.
            of: what it reads besides.
            state: nested tensors.
            inputs: the same, of all steps.

        Raises:
            Uncapturable: a step that cannot be traced.
        """
        with TRACING:
            self.calls += 1
            blanks = self._blanks(state, inputs)
            with torch.compiler.set_stance("eager_on_recompile"):
                found = self._selected(step, of, blanks)
            if found is not None and not all(f.unchanged() for f in found.graph.functions):
                found = None
                self._begin()
            if found is None:
                return self._traced(step, of, blanks) if self._pays() else None
            self.hits += 1
            if self.hits % _REFUSED == 0:
                self.free, self.wait = min(self.free + 1, _FREE), 0
            return found

    def _pays(self) -> bool:
        """Whether another trace pays; a value that changes at every call would need one a call."""
        if len(self.graphs) >= _KEPT:
            if self.hits > self.calls // 2:
                return False  # most of them are of use
            self._begin()
        if self.free:
            self.free -= 1
            return True
        if self.calls < self.again:
            return False
        self._later(1)
        return True

    def _later(self, least: int) -> None:
        self.wait = min(max(2 * self.wait, least), 2**16)
        self.again = self.calls + self.wait

    def _traced(self, step: Any, of: Sequence[Any], blanks: Any) -> Selected | None:
        from torch._dynamo import config  # which takes a second to import

        self.seen = [m for part in of if isinstance(part, nn.Module) for m in part.modules()]
        try:
            with config.patch(_SETTINGS), pyro.validation_enabled(False), _silence():
                found = self._selected(step, of, blanks)
            if found is not None:
                found.graph.functions = list(_functions(found.graph.codes, self.seen))
            return found
        except Exception as reason:  # noqa: BLE001 - whatever Dynamo cannot do, the loop can
            self.free = 0
            self._later(_REFUSED)
            raise Uncapturable(first_line(reason)) from None
        finally:
            del self.seen

    def _selected(self, step: Any, of: Sequence[Any], blanks: Any) -> Selected | None:
        try:
            made = self.compiled(step, of, *blanks)
        except _Missed:
            return None
        graph, given = self.local.last
        del self.local.last
        if graph.spec is None:
            _place(graph, given, blanks, made)
        places = zip(given, graph.places, strict=True)
        return Selected(graph, [thing for thing, place in places if place is None])

    def _keep(self, module: fx.GraphModule, examples: Any) -> Callable[..., Any]:
        """Dynamo's backend."""
        from torch._dynamo.utils import get_traced_code

        codes = set(get_traced_code() or ())
        if any({"environ", "getenv"} & {*code.co_names} for code in codes):
            raise Uncapturable("the step reads the environment, which nobody watches")
        count = len(module.graph.output_node().args[0])
        marks = tuple(torch.empty(0) for _ in range(count))
        graph = Graph(module, marks, codes)
        self.graphs.append(graph)
        local = self.local

        def selected(*inputs: Any) -> Any:
            local.last = graph, inputs
            return marks

        return selected

    def _filter(self, entries: Sequence[Any]) -> list[bool]:
        """Keep all guards except on Pyro's validation, which is off during a trace."""
        self.seen += [entry.value for entry in entries if entry.has_value]
        return ["_validate_args" not in entry.name for entry in entries]

    def _blanks(self, state: Any, inputs: Any) -> Any:
        """Blank tensors of the shapes that one step reads."""
        leaves, spec = pytree.tree_flatten(state)
        rows, nested = pytree.tree_flatten(inputs)
        kinds = [(t.shape, t.dtype, t.device, t.requires_grad) for t in leaves]
        kinds += [(t.shape[1:], t.dtype, t.device, t.requires_grad) for t in rows]
        key = (spec, nested, torch.is_inference_mode_enabled(), *kinds)
        if key not in self.blanks:
            if len(self.blanks) >= _BLANKS:
                self.blanks.clear()
            made = [_blank(*kind) for kind in kinds]
            count = len(leaves)
            self.blanks[key] = spec.unflatten(made[:count]), nested.unflatten(made[count:])
        return self.blanks[key]


def _blank(shape: Any, dtype: Any, device: Any, requires_grad: bool) -> Tensor:
    from torch._dynamo import mark_static

    made = torch.zeros(shape, dtype=dtype, device=device, requires_grad=requires_grad)
    mark_static(made)
    return made


def _place(graph: Graph, given: Sequence[Any], blanks: Any, made: Any) -> None:
    """Which inputs are blanks, and which leaves of what the step returns are which outputs."""
    leaves = pytree.tree_leaves(blanks)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}
    graph.places = [place.get(id(thing)) for thing in given]
    read = [thing for thing, p in zip(given, graph.places, strict=True) if p is None]
    known = {id(leaf): (False, i) for i, leaf in enumerate([*read, *leaves])}
    known |= {id(mark): (True, i) for i, mark in enumerate(graph.marks)}
    found, graph.spec = pytree.tree_flatten(made)
    if any(id(leaf) not in known for leaf in found):
        raise Uncapturable("the step returns something that it neither computes nor is given")
    graph.outputs = [known[id(leaf)] for leaf in found]


def _functions(codes: set[CodeType], seen: Sequence[Any]) -> Iterator[_Function]:
    """Locate the functions of these code objects, in classes or by their qualified names.

    Functions that were seen themselves may be asked for attributes, also where none was called.
    """
    holders: dict[int, Any] = {id(c): c for thing in seen for c in type(thing).__mro__}
    files = {getattr(m, "__file__", None): m for m in list(sys.modules.values())}
    for code in codes:
        holder = files.get(code.co_filename)
        for name in code.co_qualname.split(".")[:-1]:
            holder = getattr(holder, name, None)
        holders[id(holder)] = holder
    for own in {thing for thing in seen if isinstance(thing, FunctionType)}:
        yield _function(SimpleNamespace(itself=own), "itself", own, own)
    for holder in holders.values():
        for name, raw in list(getattr(holder, "__dict__", {}).items()):
            function = _unwrapped(raw)
            if function is not None and function.__code__ in codes:
                yield _function(holder, name, raw, function)


def _function(holder: Any, name: str, raw: Any, function: FunctionType) -> _Function:
    return _Function(holder, name, raw, function, function.__code__, dict(function.__dict__))


def _unwrapped(raw: Any) -> FunctionType | None:
    for name in ("__func__", "fget", "__wrapped__"):
        raw = getattr(raw, name, raw)
    return raw if isinstance(raw, FunctionType) else None


def _forget(code: CodeType) -> None:
    from torch._dynamo.eval_frame import reset_code

    reset_code(code)


@contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings that Dynamo raises about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(reason: Exception) -> str:
    """First line of an error message."""
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
