"""A step may read a Python value from anywhere, and the value may change between two calls.

Each row of the table is one way of holding a value: how the step reads it, and how it changes. In
every case, values and gradients after the change are those of the plain loop.
"""

import collections
import contextvars
import dataclasses
import enum
import functools
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_avrnn.engine import front
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.recipes import Recipe
from tests.unit.table import assert_all_close, build, observations
from tests.unit.test_engine import (
    ALWAYS,
    NEVER,
    Found,
    captured_from,
    every,
    in_c,
    mixed,
    rolled,
)

pytestmark = pytest.mark.fast_path
LENGTH = 40


class Reading(FilteringGuide):
    """Its mean goes through a function of its own, which reads a value somewhere."""

    read: Callable[[Any, Tensor], Tensor]

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc, scale = self.network.parameters_of(c_t, self.hidden(state))
        return diagonal_normal(self.read(self, loc), scale)


class Way(NamedTuple):
    """One way of holding a value."""

    read: Callable[[Any, Tensor], Any]  # (guide, mean) -> mean
    change: Callable[[Any], Any]  # of the guide
    prepare: Callable[[Any], Any] = lambda guide: None


class Plain:
    """An object with attributes."""

    shared = 1.0

    def __init__(self, value: Any = 1.0) -> None:
        self.value = value

    def method(self) -> Any:
        return self.value

    @property
    def told(self) -> Any:
        return self.value

    @staticmethod
    def static() -> float:
        return 1.0

    @classmethod
    def of_class(cls) -> float:
        return 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.value


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


class Asked:
    """Knows its attributes only when it is asked."""

    def __init__(self) -> None:
        self.known = {"value": 1.0}

    def __getattr__(self, name: str) -> Any:
        if name == "value":
            return self.known["value"]
        raise AttributeError(name)


class Described:
    """A descriptor."""

    def __init__(self) -> None:
        self.kept = 1.0

    def __get__(self, owner: Any, kind: Any = None) -> float:
        return self.kept


class WithDescribed:
    value = Described()


@dataclasses.dataclass
class Data:
    value: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: float = 1.0


class Pair(NamedTuple):
    value: float
    other: int


class Mode(enum.Enum):
    ONE = 1.0
    TWO = 2.0


class Doubling(torch.autograd.Function):
    """Doubles the gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Scaling(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


GLOBAL: Any = 1.0
LISTED, TABLE = [1.0], {"value": 1.0}
HELD, TENSOR = Plain(), torch.ones(())
CONTEXT = contextvars.ContextVar("value", default=1.0)
LOCAL = threading.local()


def own_global(guide: Any, x: Tensor) -> Tensor:
    return GLOBAL * x


def by_default(guide: Any, x: Tensor, by: float = 1.0, *, more: float = 0.0) -> Tensor:
    return by * x + more


def helper(x: Tensor) -> Tensor:
    return 1.0 * x


def other_helper(x: Tensor) -> Tensor:
    return 2.0 * x


def two(*args: Any) -> float:
    return 2.0


def cell(deep: bool) -> Way:
    value = 1.0

    def change(guide: Any) -> None:
        nonlocal value
        value = 2.0

    def read(guide: Any, x: Tensor) -> Tensor:
        def inner() -> float:
            return value

        return (inner() if deep else value) * x

    return Way(read, change)


def of(attribute: Any, change: Callable[[Any], Any], read: Callable[[Any], Any]) -> Way:
    """A value in an attribute of the guide, which multiplies the mean."""
    return Way(
        lambda guide, x: read(guide.own) * x,
        change,
        lambda guide: object.__setattr__(guide, "own", attribute()),
    )


def at(attribute: Callable[[], Any], change: Callable[[Any], Any], read: Any = None) -> Way:
    """The same, changed by a function of the attribute itself."""
    return of(attribute, lambda guide: change(guide.own), read or (lambda own: own.value))


def setting(name: str, value: Any = 2.0) -> Callable[[Any], None]:
    return lambda thing: setattr(thing, name, value)


def put(key: Any, value: Any = 2.0) -> Callable[[Any], None]:
    return lambda thing: thing.__setitem__(key, value)


def rebound(first: Any, second: Any, read: Any = lambda own: own) -> Way:
    return of(lambda: first, lambda guide: object.__setattr__(guide, "own", second), read)


def patched(holder: Any, name: str, by: Any) -> Callable[[Any], None]:
    """Changes what a class or module has, until the test ends."""
    return lambda guide: PATCHES[-1].setattr(holder, name, by)


PATCHES: list[pytest.MonkeyPatch] = []


@pytest.fixture(autouse=True)
def _patches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global GLOBAL
    PATCHES.append(monkeypatch)
    yield
    PATCHES.pop()
    GLOBAL, LISTED[:], TABLE["value"], HELD.value = 1.0, [1.0], 1.0, 1.0
    TENSOR.fill_(1.0).requires_grad_(False)
    Plain.shared, LOCAL.value = 1.0, 1.0
    CONTEXT.set(1.0)
    by_default.__defaults__, by_default.__kwdefaults__ = (1.0,), {"more": 0.0}


def _set_global(guide: Any) -> None:
    global GLOBAL
    GLOBAL = 2.0


def _module(made: Callable[[], nn.Module], change: Callable[[Any], Any]) -> Way:
    return Way(
        lambda guide, x: guide.extra(x),
        lambda guide: change(guide.extra),
        lambda guide: setattr(guide, "extra", made()),
    )


def _hooked(name: str, hook: Callable[..., Any]) -> Way:
    return _module(lambda: Scaling(1.0), lambda extra: getattr(extra, name)(hook))


def _gated(behind: Callable[[Tensor], Tensor]) -> Way:
    def read(guide: Any, x: Tensor) -> Tensor:
        return behind(x) if guide.gate else x

    return Way(read, setting("gate", True), setting("gate", False))


def _with_hook(x: Tensor) -> Tensor:
    x = 1.0 * x
    if x.requires_grad:
        x.register_hook(lambda grad: 2 * grad)
    return x


def _buffer(guide: Any) -> None:
    guide.register_buffer("own", torch.ones(()))


def _parameter(guide: Any) -> None:
    guide.own = nn.Parameter(torch.ones(()))


def _fill(guide: Any) -> None:
    with torch.no_grad():
        guide.own.fill_(2.0)


WAYS: dict[str, Callable[[], Way]] = {
    # plain values
    "a float": lambda: rebound(1.0, 2.0),
    "an int": lambda: rebound(1, 2),
    "a bool": lambda: rebound(False, True, lambda own: 2.0 if own else 1.0),
    "a string": lambda: rebound("one", "two", lambda own: {"one": 1.0, "two": 2.0}[own]),
    "None": lambda: rebound(None, 2.0, lambda own: 1.0 if own is None else own),
    "a complex number": lambda: rebound(1 + 1j, 2 + 1j, lambda own: own.real),
    "an int for a float": lambda: rebound(1.0, 2),
    "a nearby float": lambda: rebound(1.0, 1.001),
    "infinity": lambda: rebound(1.0, float("inf"), lambda own: 1.0 if own == 1.0 else 0.5),
    # containers
    "a list": lambda: rebound([1.0], [2.0], lambda own: own[0]),
    "an item of a list": lambda: at(lambda: [1.0], put(0), lambda own: own[0]),
    "the length of a list": lambda: at(lambda: [1.0], lambda own: own.append(1.0), sum),
    "a deep list": lambda: at(
        lambda: [[[[[1.0]]]]],
        lambda own: own[0][0][0][0].__setitem__(0, 2.0),
        lambda own: own[0][0][0][0][0],
    ),
    "a tuple": lambda: rebound((1.0,), (2.0,), lambda own: own[0]),
    "an item of a dict": lambda: at(lambda: {"a": 1.0}, put("a"), lambda own: own["a"]),
    "a key of a dict": lambda: at(
        lambda: {"a": 1.0}, put("b", 1.0), lambda own: sum(own.values())
    ),
    "a nested dict": lambda: at(
        lambda: {"a": {"b": {"c": 1.0}}},
        lambda own: own["a"]["b"].__setitem__("c", 2.0),
        lambda own: own["a"]["b"]["c"],
    ),
    "the order of a dict": lambda: at(
        lambda: {"a": 1.0, "b": 2.0},
        lambda own: own.__setitem__("a", own.pop("a")),
        lambda own: next(iter(own.values())),
    ),
    "a default dict": lambda: at(
        lambda: collections.defaultdict(lambda: 1.0), put("a"), lambda own: own["a"]
    ),
    "an ordered dict": lambda: at(
        lambda: collections.OrderedDict(a=1.0), put("a"), lambda own: own["a"]
    ),
    "a set": lambda: at(set, lambda own: own.add(3), lambda own: 2.0 if 3 in own else 1.0),
    "a deque": lambda: at(
        lambda: collections.deque([1.0]), lambda own: own.appendleft(2.0), lambda own: own[0]
    ),
    "a named tuple": lambda: rebound(Pair(1.0, 0), Pair(2.0, 0), lambda own: own.value),
    "a range": lambda: rebound(range(1), range(2), len),
    # objects
    "an object": lambda: at(Plain, setting("value")),
    "a nested object": lambda: at(
        lambda: Plain(Plain()),
        lambda own: setattr(own.value, "value", 2.0),
        lambda own: own.value.value,
    ),
    "an object exchanged": lambda: rebound(Plain(1.0), Plain(2.0), lambda own: own.value),
    "an object of another class": lambda: rebound(Plain(2.0), Data(1.0), lambda own: own.value),
    "an object without the attribute": lambda: at(
        Plain, setting("late"), lambda own: getattr(own, "late", 1.0)
    ),
    "a method": lambda: at(Plain, setting("value"), lambda own: own.method()),
    "a property": lambda: at(Plain, setting("value"), lambda own: own.told),
    "a callable object": lambda: Way(
        lambda guide, x: guide.own(x),
        lambda guide: setattr(guide.own, "value", 2.0),
        lambda guide: object.__setattr__(guide, "own", Plain()),
    ),
    "a dataclass": lambda: at(Data, setting("value")),
    "a frozen dataclass": lambda: rebound(Frozen(1.0), Frozen(2.0), lambda own: own.value),
    "a namespace": lambda: at(lambda: types.SimpleNamespace(value=1.0), setting("value")),
    "slots": lambda: at(Slots, setting("value")),
    "__getattr__": lambda: at(Asked, lambda own: own.known.__setitem__("value", 2.0)),
    "a descriptor": lambda: at(
        WithDescribed,
        lambda own: PATCHES[-1].setattr(WithDescribed.__dict__["value"], "kept", 2.0),
    ),
    "an enum": lambda: rebound(Mode.ONE, Mode.TWO, lambda own: own.value),
    "a weak reference": lambda: at(
        lambda: weakref.ref(HELD),
        lambda own: setattr(own(), "value", 2.0),
        lambda own: own().value,
    ),
    "a class attribute": lambda: at(
        Plain, lambda own: setattr(Plain, "shared", 2.0), lambda own: own.shared
    ),
    "an attribute of the guide's class": lambda: Way(
        lambda guide, x: guide.by * x,
        patched(Reading, "by", 2.0),
        lambda guide: PATCHES[-1].setattr(Reading, "by", 1.0, raising=False),
    ),
    "an attribute over that of the class": lambda: Way(
        lambda guide, x: guide.by * x,
        setting("by"),
        lambda guide: PATCHES[-1].setattr(Reading, "by", 1.0, raising=False),
    ),
    # names
    "a global": lambda: Way(own_global, _set_global),
    "a global list": lambda: Way(
        lambda guide, x: LISTED[0] * x, lambda guide: LISTED.__setitem__(0, 2.0)
    ),
    "a global dict": lambda: Way(
        lambda guide, x: TABLE["value"] * x, lambda guide: TABLE.update(value=2.0)
    ),
    "a global object": lambda: Way(
        lambda guide, x: HELD.value * x, lambda guide: setattr(HELD, "value", 2.0)
    ),
    "a global function": lambda: Way(
        lambda guide, x: helper(x),
        lambda guide: PATCHES[-1].setitem(globals(), "helper", other_helper),
    ),
    "a constant of another module": lambda: Way(
        lambda guide, x: x * types.MODULE_VALUE,
        lambda guide: PATCHES[-1].setattr(types, "MODULE_VALUE", 2.0),
        lambda guide: PATCHES[-1].setattr(types, "MODULE_VALUE", 1.0, raising=False),
    ),
    "a closure": lambda: cell(False),
    "a closure of a closure": lambda: cell(True),
    "a default argument": lambda: Way(
        by_default, lambda guide: setattr(by_default, "__defaults__", (2.0,))
    ),
    "a default keyword": lambda: Way(
        by_default, lambda guide: setattr(by_default, "__kwdefaults__", {"more": 1.0})
    ),
    "an attribute of a function": lambda: Way(
        lambda guide, x: x * getattr(helper, "by", 1.0),
        lambda guide: PATCHES[-1].setattr(helper, "by", 2.0, raising=False),
    ),
    "a context variable": lambda: Way(
        lambda guide, x: CONTEXT.get() * x, lambda guide: CONTEXT.set(2.0)
    ),
    "an attribute of the thread": lambda: Way(
        lambda guide, x: LOCAL.value * x,
        lambda guide: setattr(LOCAL, "value", 2.0),
        lambda guide: setattr(LOCAL, "value", 1.0),
    ),
    "the environment": lambda: Way(
        lambda guide, x: float(os.environ.get("AVRNN_BY", "1")) * x,
        lambda guide: PATCHES[-1].setenv("AVRNN_BY", "2"),
    ),
    # functions
    "a function": lambda: Way(
        lambda guide, x: guide.own(x),
        lambda guide: object.__setattr__(guide, "own", other_helper),
        lambda guide: object.__setattr__(guide, "own", helper),
    ),
    "a partial": lambda: Way(
        lambda guide, x: guide.own(guide, x),
        lambda guide: object.__setattr__(guide, "own", functools.partial(by_default, by=2.0)),
        lambda guide: object.__setattr__(guide, "own", functools.partial(by_default, by=1.0)),
    ),
    "a method of a class": lambda: at(
        Plain, patched(Plain, "method", two), lambda own: own.method()
    ),
    "a method of the instance": lambda: at(
        Plain, setting("method", two), lambda own: own.method()
    ),
    "a static method": lambda: at(
        Plain, patched(Plain, "static", staticmethod(two)), lambda own: own.static()
    ),
    "a class method": lambda: at(
        Plain, patched(Plain, "of_class", classmethod(two)), lambda own: own.of_class()
    ),
    "a property of a class": lambda: at(
        Plain, patched(Plain, "told", property(two)), lambda own: own.told
    ),
    "the code of a function": lambda: Way(
        lambda guide, x: helper(x),
        lambda guide: PATCHES[-1].setattr(helper, "__code__", other_helper.__code__),
    ),
    "a method of the guide": lambda: Way(
        lambda guide, x: guide.hook(x),
        patched(Reading, "hook", lambda self, x: 2.0 * x),
        lambda guide: PATCHES[-1].setattr(Reading, "hook", lambda self, x: 1.0 * x, raising=False),
    ),
    "a forward of torch's": lambda: _module(
        lambda: nn.Tanh(), patched(nn.Tanh, "forward", lambda self, x: 2.0 * x)
    ),
    # arrays and tensors
    "a number of numpy": lambda: rebound(np.float64(1.0), np.float64(2.0)),
    "an item of an array": lambda: at(lambda: np.ones(2), put(0), lambda own: float(own[0])),
    "an array": lambda: rebound(np.ones(1), 2 * np.ones(1), lambda own: torch.from_numpy(own)),
    "a tensor": lambda: rebound(torch.ones(()), 2 * torch.ones(())),
    "a tensor in place": lambda: at(
        lambda: torch.ones(()), lambda own: own.fill_(2.0), lambda own: own
    ),
    "a tensor in a list": lambda: at(
        lambda: [torch.ones(())], lambda own: own[0].fill_(2.0), lambda own: own[0]
    ),
    "a tensor of another shape": lambda: rebound(torch.ones(()), torch.tensor([1.0, 2.0])),
    "a global tensor": lambda: Way(lambda guide, x: TENSOR * x, lambda guide: TENSOR.fill_(2.0)),
    "a number in a tensor": lambda: at(
        lambda: torch.ones(()), lambda own: own.fill_(2.0), lambda own: own.item()
    ),
    "a buffer": lambda: Way(lambda guide, x: guide.own * x, _fill, _buffer),
    "a buffer exchanged": lambda: Way(
        lambda guide, x: guide.own * x,
        lambda guide: setattr(guide, "own", 2 * torch.ones(())),
        _buffer,
    ),
    "a parameter": lambda: Way(lambda guide, x: guide.own * x, _fill, _parameter),
    "a parameter exchanged": lambda: Way(
        lambda guide, x: guide.own * x,
        lambda guide: setattr(guide, "own", nn.Parameter(2 * torch.ones(()))),
        _parameter,
    ),
    "a parameter of a list": lambda: Way(
        lambda guide, x: guide.own[0] * x,
        lambda guide: guide.own.__setitem__(0, nn.Parameter(2 * torch.ones(()))),
        lambda guide: setattr(guide, "own", nn.ParameterList([torch.ones(())])),
    ),
    # modules
    "training mode": lambda: Way(
        lambda guide, x: x * (2.0 if guide.training else 1.0),
        lambda guide: guide.train(),
        lambda guide: guide.eval(),
    ),
    "an attribute of a module": lambda: _module(lambda: Scaling(1.0), setting("by")),
    "a module exchanged": lambda: Way(
        lambda guide, x: guide.extra(x),
        lambda guide: setattr(guide, "extra", Scaling(2.0)),
        lambda guide: setattr(guide, "extra", Scaling(1.0)),
    ),
    "a module appended": lambda: Way(
        lambda guide, x: guide.extra(x),
        lambda guide: guide.extra.append(Scaling(2.0)),
        lambda guide: setattr(guide, "extra", nn.Sequential(Scaling(1.0))),
    ),
    "the rate of dropout": lambda: _module(lambda: nn.Dropout(0.0), setting("p", 0.5)),
    "a slope": lambda: _module(lambda: nn.LeakyReLU(0.1), setting("negative_slope", 0.9)),
    "another class": lambda: _module(
        lambda: Scaling(1.0),
        setting("__class__", type("Twice", (Scaling,), {"forward": lambda self, x: 2.0 * x})),
    ),
    "a forward hook": lambda: _hooked("register_forward_hook", lambda module, args, out: 2 * out),
    "a forward pre-hook": lambda: _hooked(
        "register_forward_pre_hook", lambda module, args: (2 * args[0],)
    ),
    "a backward hook": lambda: _hooked(
        "register_full_backward_hook", lambda module, into, out: (2 * into[0],)
    ),
    "a custom gradient behind a gate": lambda: _gated(Doubling.apply),
    "a hook of a tensor behind a gate": lambda: _gated(_with_hook),
    "no gradient behind a gate": lambda: _gated(lambda x: x.detach()),
}


def made(way: Way) -> Recipe:
    pyro.clear_param_store()
    recipe = build("vrnn", guide=Reading)
    way.prepare(recipe.guide)
    object.__setattr__(recipe.guide, "read", way.read)
    return recipe


def both(recipe: Recipe, **options: Any) -> tuple[Found, Found]:
    """By the fast path, and by the loop."""
    x = observations(recipe, 2, LENGTH)
    fast, looped = (rolled(recipe, x, least, **options) for least in (ALWAYS, NEVER))
    return fast, looped


@pytest.mark.parametrize("name", every(2, of=WAYS, also="an attribute of a function"))
def test_a_change_is_seen(name: str, compile: bool = False) -> None:
    way = WAYS[name]()
    recipe = made(way)
    fast, before = both(recipe, compile=compile)
    assert_all_close(fast, before)
    way.change(recipe.guide)
    for _ in range(2):
        fast, after = both(recipe, compile=compile)
        assert_all_close(fast, after)
    same = before.keys() == after.keys()
    assert not same or any(not torch.allclose(after[n], before[n], rtol=1e-6) for n in after)


@in_c
@pytest.mark.parametrize("name", [*WAYS][::16])
def test_a_change_is_seen_in_c(name: str) -> None:
    test_a_change_is_seen(name, compile=True)


def test_a_tensor_that_asks_for_a_gradient_later_gets_it() -> None:
    weight = torch.ones(())
    recipe = made(Way(lambda guide, x: weight * x, lambda guide: None))
    x = observations(recipe, 2, LENGTH)
    rolled(recipe, x, ALWAYS)
    weight.requires_grad_()
    found = []
    for least in (ALWAYS, NEVER):
        torch.manual_seed(3)
        with captured_from(least):
            total = mixed(recipe.model.rollout(recipe.guide, x, None, 3))
            found.append(torch.autograd.grad(total, weight)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[0].abs() > 0


@pytest.mark.parametrize("kind", [float, int, lambda step: Plain(1.0 + step)])
def test_a_value_that_changes_at_every_call_costs_no_capture_a_call(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made(of(lambda: 1.0, lambda guide: None, lambda own: getattr(own, "value", own)))
    x, traced = observations(recipe, 2, 3), []
    keep = front.Front._keep
    monkeypatch.setattr(
        front.Front, "_keep", lambda self, *given: traced.append(1) or keep(self, *given)
    )
    for step in range(80):
        object.__setattr__(recipe.guide, "own", kind(step))
        fast, looped = (rolled(recipe, x, least) for least in (ALWAYS, NEVER))
        assert_all_close(fast, looped)
    assert len(traced) <= front._FREE + 8
