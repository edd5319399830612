"""``run``: the recurrence of a model and guide as one function of all steps."""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from inference.random import draw
from pyro_avrnn.engine.batched import all_steps
from pyro_avrnn.engine.capture import Part, Parts, Uncapturable, take_apart, traced, value
from pyro_avrnn.engine.compiled import Chunks, warn
from pyro_avrnn.engine.loops import Loop
from pyro_avrnn.products import undisturbed

_log = logging.getLogger(__name__)


#: (t from 0 and log p(z_t), log p(x_t), log q(z_t) of a step) -> the particles that go on
Select = Callable[..., Tensor | None]


class Path(NamedTuple):
    """What a recurrence gives: states ``(T + 1, ...)``, the last after all steps, and results."""

    states: list[Tensor]
    results: list[Tensor]


class _Run(torch.autograd.Function):
    """The loop as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, loop: Loop, driver: Any, select: Select | None, length: int, *inputs: Tensor
    ) -> Any:
        ordered = loop.order(inputs)
        watch: list[Any] = [] if select is None else [select, []]
        with undisturbed(loop.small):
            states, wanted, saved = driver.forward(length, *watch, *ordered)
        ctx.loop, ctx.driver, ctx.length, ctx.parents = loop, driver, length, watch[1:]
        # saved views of what is returned would be views made without gradients
        ctx.save_for_backward(*loop.slim(ordered), *states, *(s.data for s in saved))
        return (*states, *wanted)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the recurrence has no second derivatives (create_graph=True) on the fast path; "
                "compute it inside `with pyro_avrnn.engine.switched_off():`"
            )
        loop, kept, count = ctx.loop, list(ctx.saved_tensors), len(ctx.loop.before)
        start = len(loop.fixed) + len(loop.rows)
        kept[start : start + count] = [s[:-1] for s in kept[start : start + count]]
        late = [cotangents[i].contiguous() for i in loop.live if i >= count]
        late += [g.contiguous() for g in cotangents[:count]]
        with undisturbed(loop.small):
            found = ctx.driver.backward(ctx.length, *ctx.parents, *kept, *late)
        return None, None, None, None, *loop.finish(kept, late, found)


class Recurrence:
    """A step of guide and model for given shapes, run for any number of steps.

    Args:
        step: a module whose forward is ``(state, c_t, x_t) -> [*next state, *results]``.
        tensors: parameters and buffers of the step, by name.
        state: before step 1, tensors ``(*batch, ...)``.
        c, x: what every step is given, ``(T, B, ...)``.
        learns: whether gradients are wanted.
        watched: whether the step's last three results are for a ``select``, and no others.

    Raises:
        Uncapturable: a step that is no fixed graph of tensor operations.
    """

    def __init__(
        self,
        step: nn.Module,
        tensors: dict[str, Tensor],
        state: Sequence[Tensor],
        c: Tensor,
        x: Tensor,
        learns: bool,
        watched: bool = False,
    ) -> None:
        self.watched = watched
        names, weights, count = list(tensors), list(tensors.values()), len(state)

        def run(*flat: Tensor) -> Any:
            own = dict(zip(names, flat[: len(names)], strict=True))
            rest = flat[len(names) :]
            return functional_call(step, own, (rest[:count], *rest[count:]))

        examples = [e.detach().clone() for e in (*weights, *state, c[0], x[0])]
        with torch.random.fork_rng(_devices(x)):
            graph = traced(run, examples, marks=True)
            self.parts: Parts = take_apart(graph, len(names), count, watched)
            self.learns = learns
            self.driver: Chunks | Loop | None = None
            self.loop: Any = self._loop(weights, list(state), c[:1], x[:1])
        own = [] if self.loop is None else self.loop.graph.graph.nodes
        pieces = [p.module.graph.nodes for p in (*self.parts.stages, self.parts.after)]
        for node in [n for nodes in (graph.graph.nodes, own, *pieces) for n in nodes]:
            if isinstance(made := node.meta.get("value"), Tensor):
                node.meta["device"], node.meta["stride"] = made.device, made.stride()
                node.meta["value"] = made.to("meta")  # shape and dtype, no memory

    def _compiled(self) -> Any:
        if self.driver is None:
            chunks = Chunks(self.loop)
            try:
                chunks.compile()
                self.driver = chunks
            except Exception as error:  # noqa: BLE001 - of whatever kind, it works without
                warn((str(error).strip().splitlines() or [type(error).__name__])[0])
                self.driver = self.loop
        return self.driver

    def _loop(
        self, weights: list[Tensor], state: list[Tensor], c: Tensor, x: Tensor
    ) -> Loop | None:
        parts = self.parts
        if not parts.loop.outputs:
            return None
        known = self._ahead(weights, state, c, x)
        states = [parts.state[i] for i in parts.recurring]
        fixed = {n for n in parts.loop.inputs if n in set(parts.static.outputs)}
        want = None
        if self.learns:
            want = {n for n in parts.loop.inputs if n in known and known[n].requires_grad}
            want |= set(states)
        return Loop(parts.loop, states, fixed, want, self.watched)

    def _ahead(
        self, weights: list[Tensor], state: list[Tensor], c: Tensor, x: Tensor
    ) -> dict[fx.Node, Tensor]:
        """All that is known before the loop, under autograd."""
        parts, length = self.parts, len(x)
        known = dict(zip(parts.parameters, weights, strict=True))
        known |= {parts.state[i]: state[i] for i in parts.constant}
        known |= _results(parts.static, parts.static.module, known)
        fixed = set(known)
        known |= dict(zip(parts.given, (c, x), strict=True))
        known |= self._drawn(length)
        waiting = list(parts.shifted)
        for part in parts.stages:
            for i in [i for i in waiting if parts.state[i] in part.inputs]:
                known[parts.state[i]] = self._shift(state[i], known, i, length)
                waiting.remove(i)
            if part.outputs:
                known |= all_steps(part, known, fixed, length)
        for i in waiting:
            known[parts.state[i]] = self._shift(state[i], known, i, length)
        return known

    def _shift(self, first: Tensor, known: dict[fx.Node, Tensor], i: int, length: int) -> Tensor:
        after = known[self.parts.after_state[i]]
        if self.parts.after_state[i] in self.parts.static.outputs:
            after = after.expand(length, *after.shape)
        return torch.cat([first.unsqueeze(0), after[: length - 1].expand(-1, *first.shape)])

    def _drawn(self, length: int) -> dict[fx.Node, Tensor]:
        """Noise for all steps, drawn in the order of the loop; of watched ones for the first."""
        made = {n: value(n) for n, _ in self.parts.noise}
        rows = {
            n: torch.empty((length, *v.shape), dtype=v.dtype, device=draw.device)
            for (n, draw), v in zip(self.parts.noise, made.values(), strict=True)
        }
        for t in range(1 if self.watched else length):
            self._draw(rows, t)
        return rows

    @torch.no_grad()
    def _draw(self, rows: dict[fx.Node, Tensor], t: int) -> None:
        for node, noise in self.parts.noise:
            rows[node][t] = noise.target(*noise.args, **noise.kwargs)

    def _drawing(self, select: Select, known: dict[fx.Node, Tensor], length: int) -> Select:
        """Noise for a step is drawn after it is known which particles go on to it."""
        rows = {n: known[n] for n, _ in self.parts.noise}

        def select_and_draw(t: int, *terms: Tensor) -> Tensor | None:
            parents = select(t, *terms)
            if t + 1 < length:
                self._draw(rows, t + 1)
            return parents

        return select_and_draw

    def __call__(
        self,
        tensors: dict[str, Tensor],
        state: Sequence[Tensor],
        c: Tensor,
        x: Tensor,
        *,
        select: Select | None = None,
        compile: bool = False,
    ) -> Path:
        """All steps.

        Args:
            tensors, state, c, x: of the shapes this was made with, c and x ``(T, B, ...)``.
            select: is shown the step's last three results, and says which particles go on.
            compile: run compiled chunks of steps.
        """
        parts, length = self.parts, len(x)
        known = self._ahead(list(tensors.values()), list(state), c, x)
        for i in parts.recurring:
            known[parts.state[i]] = state[i]
        inputs = [known[n] for n in parts.loop.inputs]
        fixed = set(parts.static.outputs)
        inputs = [
            t if n in fixed else t.contiguous()
            for n, t in zip(parts.loop.inputs, inputs, strict=True)
        ]
        if select is not None:
            select = self._drawing(select, known, length)
        made: tuple[Tensor, ...] = ()
        if self.loop is not None:
            driver = self._compiled() if compile and select is None else self.loop
            if self.learns:
                made = _Run.apply(self.loop, driver, select, length, *inputs)
            else:
                watch: list[Any] = [] if select is None else [select, []]
                with undisturbed(self.loop.small):
                    states, wanted, _ = driver.forward(length, *watch, *self.loop.order(inputs))
                made = (*states, *wanted)
        wanted_nodes = parts.loop.outputs[len(parts.recurring) :]
        known |= dict(zip(wanted_nodes, made[len(parts.recurring) :], strict=False))
        paths: list[Tensor] = []
        recurring = dict(zip(parts.recurring, made, strict=False))
        for i, first in enumerate(state):
            if i in recurring:
                paths.append(recurring[i])
            elif i in parts.constant:
                paths.append(first.expand(length + 1, *first.shape))
            else:
                after = known[parts.after_state[i]]
                if parts.after_state[i] in parts.static.outputs:
                    after = after.expand(length, *after.shape)
                paths.append(torch.cat([first.unsqueeze(0), after.expand(length, *first.shape)]))
        for i, path in zip(parts.recurring, made, strict=False):
            known[parts.state[i]] = path[:-1]
            known.setdefault(parts.after_state[i], path[1:])
        known |= {parts.state[i]: paths[i][:-1] for i in parts.constant}
        if parts.after.outputs:
            known |= all_steps(parts.after, known, set(parts.static.outputs), length)
        results = []
        for node in parts.results:
            found = known[node]
            if node in parts.static.outputs or node in parts.parameters:
                found = found.expand(length, *found.shape)
            results.append(found)
        return Path(paths, results)


def _results(
    part: Part, run: Callable[..., Any], known: dict[fx.Node, Tensor]
) -> dict[Any, Tensor]:
    made = run(*(known[n] for n in part.inputs))
    return dict(zip(part.outputs, made, strict=True))


def _devices(x: Tensor) -> list[Any]:
    return [x.device] if x.device.type == "cuda" else []


class _Step(nn.Module):
    """One step of a guide's recurrence: ``(state, c_t, x_t) -> [*next state, z_t, *of q]``."""

    def __init__(self, model: Any, guide: Any, kind: type, learns: bool, watched: bool) -> None:
        super().__init__()
        self.model, self.guide, self.kind = model, guide, kind
        self.learns, self.watched = learns, watched

    def forward(self, state: Sequence[Tensor], c_t: Tensor, x_t: Tensor) -> list[Tensor]:
        before = self.kind(*state)
        proposal = self.guide.proposal(before, c_t)
        z_t = draw(proposal, self.learns)
        after = self.model.advance(before, z_t, x_t)
        made = [*after, z_t, *of_proposal(proposal, z_t)]
        return made + terms(self.model, before, proposal, z_t, x_t) if self.watched else made


@torch.no_grad()
def terms(
    model: Any, state: Any, proposal: Any, z_t: Tensor, x_t: Tensor, prior: Any = None
) -> list[Tensor]:
    """log p(z_t), log p(x_t) and log q(z_t), constants ``(K, B)``; the prior may be given."""
    found = (
        (model.transition(state) if prior is None else prior).log_prob(z_t),
        model.emission(z_t, state).log_prob(x_t),
        proposal.log_prob(z_t),
    )
    return list(torch.broadcast_tensors(*found))


def of_proposal(proposal: Any, z_t: Tensor) -> list[Tensor]:
    """What spares computing a proposal again: its mean and scale if it is a diagonal normal.

    Of a flow log q(z_t), as it remembers how it came to its own draw; nothing of others.
    """
    if isinstance(proposal, dist.TransformedDistribution):
        return [proposal.log_prob(z_t)]
    if isinstance(proposal, dist.Independent) and type(proposal.base_dist) is dist.Normal:
        if proposal.reinterpreted_batch_ndims == 1:
            return [proposal.base_dist.loc, proposal.base_dist.scale]
    return []


#: a capture costs as much as a hundred steps or so; shorter sequences are not worth one
LEAST_STEPS = 16
_CACHE: WeakKeyDictionary[nn.Module, dict[Any, tuple[Recurrence | None, Any]]] = (
    WeakKeyDictionary()
)
_KEPT = 16  # captures of a guide, by shapes and modes
_ON = ContextVar("on", default=True)


@contextmanager
def switched_off() -> Iterator[None]:
    """Rollouts run step by step in here: for second derivatives, or to see each step."""
    before = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(before)


def run(
    model: Any,
    guide: Any,
    state: Any,
    c: Tensor,
    x: Tensor,
    learns: bool,
    *,
    select: Select | None = None,
    compile: bool = False,
) -> Path | None:
    """States and draws along the guide, or None where the plain loop must do it.

    Args:
        model, guide: whose step it is.
        state: before step 1, every tensor ``(K, B, ...)``.
        c, x: ``(T, B, ...)``.
        learns: whether the guide is to learn.
        select: says after each step which particles go on, as for a rollout.
        compile: run compiled chunks of steps.
    """
    short = len(x) < LEAST_STEPS or not isinstance(guide, nn.Module)
    if short or _autocast() or not _ON.get():
        return None
    single = select is None and len(state[0]) == 1  # a dimension less, for one particle
    now = [tensor.squeeze(0) for tensor in state] if single else [*state]
    step = _Step(model, guide, type(state), learns, select is not None)
    seen = _look(step, now, c, x)
    if seen is None:
        return None
    kept = _CACHE.setdefault(guide, {})
    found, held = kept.pop(seen.key, (None, None))  # the latest used is the last
    if held is None or any(alive() is None for alive in held):
        found, held = _capture(step, seen.tensors, now, c, x, select is not None), seen.held
    kept[seen.key] = found, held
    if len(kept) > _KEPT:
        del kept[next(iter(kept))]
    if found is None:
        return None
    path = found(seen.tensors, now, c, x, select=select, compile=compile)
    if not single:
        return path
    return Path(*([tensor.unsqueeze(1) for tensor in tensors] for tensors in path))


def _capture(
    step: _Step,
    tensors: dict[str, Tensor],
    state: list[Tensor],
    c: Tensor,
    x: Tensor,
    watched: bool,
) -> Recurrence | None:
    """The recurrence of this step, or None, with the reason in the log."""
    try:
        given = [_leaf(tensor) for tensor in state], _leaf(c[:2]), _leaf(x[:2])
        with saved_tensors_hooks(_same, _same):  # nothing of this is for checkpointing to see
            with pyro.validation_enabled(False):  # a look at numbers is no part of a graph
                found = Recurrence(step, tensors, *given, torch.is_grad_enabled(), watched)
            check(found, step, tensors, *given)
    except Exception as reason:  # noqa: BLE001 - whatever tracing cannot do, the loop can
        names = type(step.model).__name__, type(step.guide).__name__
        why = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        _log.info("%s with %s runs step by step: %s", *names, why)
        return None
    return found


def check(
    recurrence: Recurrence,
    step: nn.Module,
    tensors: dict[str, Tensor],
    state: list[Tensor],
    c: Tensor,
    x: Tensor,
) -> None:
    """That a captured recurrence is what it was made from, values and gradients, on examples.

    Raises:
        Uncapturable: it is not; such as a step that computes something else every time.
    """
    wanted = [t for t in tensors.values() if t.requires_grad]
    wanted += [t for t in (*state, c, x) if t.requires_grad]

    shown: list[list[Tensor]] = []

    def looped() -> list[Tensor]:
        now, rows = state, []
        for c_t, x_t in zip(c, x, strict=True):
            made = step(now, c_t, x_t)
            now = made[: len(state)]
            rows.append(made[: len(made) - 3] if recurrence.watched else made)
            shown.append(made[-3:])
        return [torch.stack(row) for row in zip(*rows, strict=True)]

    def rolled() -> list[Tensor]:
        def select(t: int, *terms: Tensor) -> None:
            for mine, theirs in zip(terms, shown[t], strict=True):
                _require_close(theirs, mine)

        watch = select if recurrence.watched else None
        path = recurrence(tensors, state, c, x, select=watch)
        return [*(s[1:] for s in path.states), *path.results]

    found: list[list[Tensor]] = []
    for way in (looped, rolled):
        with torch.random.fork_rng(_devices(x)):
            torch.manual_seed(0)
            made = way()
            weights = [torch.randn_like(m) for m in made]
        total = sum((m * w).sum() for m, w in zip(made, weights, strict=True))
        if isinstance(total, Tensor) and total.requires_grad:
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
            made += [
                torch.zeros_like(t) if g is None else g
                for t, g in zip(wanted, gradients, strict=True)
            ]
        found.append([m.detach() for m in made])
    if len(found[0]) != len(found[1]):
        raise Uncapturable("its results differ in number")
    for one, other in zip(*found, strict=True):
        _require_close(one, other)


def _require_close(one: Tensor, other: Tensor) -> None:
    scale = one.abs().max() if one.numel() else one.new_zeros(())
    close = torch.finfo(one.dtype).eps ** 0.5 * scale
    if one.shape != other.shape or bool((one - other).abs().gt(close).any()):
        raise Uncapturable("as a graph it gives other values or gradients")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_(tensor.requires_grad)


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


class _Seen(NamedTuple):
    """What a step is made of."""

    key: tuple[Any, ...]  # what a capture depends on, beyond the values of tensors
    tensors: dict[str, Tensor]  # parameters and buffers
    held: list[Callable[[], Any]]  # give the objects that the key names by their identity


def _look(step: nn.Module, state: Sequence[Tensor], c: Tensor, x: Tensor) -> _Seen | None:
    """All that a capture of this step depends on; None if hooks look on."""
    key: list[Any] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    tensors: dict[str, Tensor] = {}
    held: list[Callable[[], Any]] = []
    for tensor in (*state, c[0], x[0]):
        key.append((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad))
    if any(_OF_ALL):
        return None
    for path, module in step.named_modules():
        key.append(type(module))
        if any(getattr(module, name, None) for name in _HOOKS):
            return None
        for name, thing in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for own, tensor in thing.items():
                    if tensor is not None:
                        tensors[f"{path}.{own}"] = tensor
            elif name == "training":
                key.append(thing)
            elif name not in _INTERNAL:
                key.append(_told(thing, held))
    tensors = {name: t for t, name in {t: name for name, t in tensors.items()}.items()}
    for name, tensor in tensors.items():
        key.append((name, id(tensor), tensor.shape, tensor.dtype, tensor.requires_grad))
        held.append(weakref.ref(tensor))
    return _Seen(tuple(key), tensors, held)


def _told(thing: Any, held: list[Callable[[], Any]], depth: int = 0) -> Any:
    """What a value of an attribute is: itself, if it is plain, else which object."""
    if isinstance(thing, bool | int | float | str | None):
        return type(thing), thing
    if isinstance(thing, list | tuple | dict) and depth < 3:
        items = [*thing.items()] if isinstance(thing, dict) else thing
        return type(thing), *(_told(item, held, depth + 1) for item in items)
    try:
        held.append(weakref.ref(thing))  # another object may come to have its identity
    except TypeError:
        held.append(lambda: thing)
    return id(thing)


#: attributes that every module has, and those that say that somebody looks at its calls
_INTERNAL = set(vars(nn.Module()))
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OF_ALL = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
