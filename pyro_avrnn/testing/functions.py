"""Checks of the functions of model and guide, called one by one."""

from typing import Any, NamedTuple

import torch
from pyro.distributions import Distribution
from torch import Size, Tensor

from pyro_avrnn.testing.subject import TERMS, Subject, conformance, mapped, random_state


class Step(NamedTuple):
    """One step of a walk along the guide, of leading dimensions ``batch``."""

    state: tuple[Tensor, ...]  # the model's NamedTuple
    z: Tensor
    x: Tensor  # (B, X)
    c: Tensor  # (B, C)
    f: Tensor | None
    log_prior: Tensor  # f's densities are not in these
    log_emission: Tensor
    log_proposal: Tensor


@conformance("shapes")
def check_shapes(s: Subject) -> None:
    """Check states, batch and event shapes, with leading dimensions (B,) and (K, B)."""
    for batch in (Size((s.particles, len(s.x))), Size((len(s.x),))):
        _walk(s, batch)


def _walk(s: Subject, batch: Size) -> list[Step]:
    """Call the functions step by step, with latents from the guide, and check every shape."""
    size, length = s.mask.shape
    steps: list[Step] = []
    with torch.no_grad():
        c = s.call("guide.encode", None, s.x, s.mask)
        if not isinstance(c, Tensor) or c.ndim != 3 or c.shape[:2] != s.mask.shape:
            shape = tuple(getattr(c, "shape", ()))
            s.fail("guide.encode", None, f"gives shape {shape}, not ({size}, {length}, C)")
        state, f = _start(s, batch)
        for t in range(1, length + 1):
            step = _step(s, t, batch, state, s.x[:, t - 1], c[:, t - 1], f)
            steps.append(step)
            given = mapped(torch.clone, state), step.z.clone(), step.x
            state = _state(s, "model.advance", t, batch, *given)
            if [v.shape for v in state] != [v.shape for v in step.state]:
                s.fail("model.advance", t, "gives a state of other shapes than it was given")
    return steps


def _start(s: Subject, batch: Size) -> tuple[Any, Tensor | None]:
    """The state before step 1, and f."""
    state, f_dim = _state(s, "model.init", None, batch, batch), s.model.f_dim
    if not f_dim:
        return state, None
    _distribution(s, "model.prior_f", None, f_dim, batch, batch)
    proposal = _distribution(s, "guide.proposal_f", None, f_dim, batch[-1:], s.x, s.mask)
    f = proposal.expand(batch).sample()
    return _state(s, "model.condition", None, batch, state, f), f


def _step(
    s: Subject, t: int, batch: Size, state: Any, x_t: Tensor, c_t: Tensor, f: Tensor | None
) -> Step:
    z_dim, x_dim = s.model.z_dim, s.model.x_dim
    copies = [mapped(torch.clone, state) for _ in TERMS]
    prior = _distribution(s, "model.transition", t, z_dim, batch, copies[0])
    proposal = _distribution(s, "guide.proposal", t, z_dim, batch, copies[1], c_t)
    z_t = s.run("guide.proposal", t, proposal.sample)
    emission = _distribution(s, "model.emission", t, x_dim, batch, z_t, copies[2])
    scored = zip(TERMS.values(), (prior, emission, proposal), (z_t, x_t, z_t), strict=True)
    terms = [s.run(part, t, made.log_prob, value) for part, made, value in scored]
    return Step(state, z_t, x_t, c_t, f, *terms)


def _distribution(
    s: Subject, part: str, t: int | None, width: int, batch: Size, *args: Any
) -> Distribution:
    """What a function gives, if it is a distribution of this event size and batch shape."""
    made = s.call(part, t, *args)
    for name, found, expected in (
        ("event", made.event_shape, (width,)),
        ("batch", made.batch_shape, tuple(batch)),
    ):
        if tuple(found) != expected:
            s.fail(part, t, f"has {name} shape {tuple(found)}, not {expected}")
    return made


def _state(s: Subject, part: str, t: int | None, batch: Size, *args: Any) -> Any:
    """What a function gives, if it is a state of these leading dimensions."""
    state = s.call(part, t, *args)
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        s.fail(part, t, f"gives a {type(state).__name__}, not a NamedTuple of tensors")
    for name, value in zip(state._fields, state, strict=True):
        if not isinstance(value, Tensor):
            s.fail(part, t, f"gives {name} as a {type(value).__name__}, not as a tensor")
        if value.shape[: len(batch)] != batch:
            shape, what = tuple(value.shape), "which does not start with the leading dimensions"
            s.fail(part, t, f"gives {name} of shape {shape}, {what} {tuple(batch)}")
    return state


@conformance("purity")
def check_pure(s: Subject) -> None:
    """Check that functions change nothing, draw nothing, and repeat their results."""
    batch = Size((s.particles, len(s.x)))
    calls, before, firsts = _calls(s, batch, _walk(s, batch)[:2]), _snapshot(s), []
    with torch.no_grad():
        for part, t, value, args in calls:
            given, random = [mapped(torch.clone, a) for a in args], random_state(s.x)
            firsts.append(mapped(torch.clone, s.call(part, t, *given, value=value)))
            if not all(map(_equal, args, given)):
                s.fail(part, t, "modifies what it is given; build new tensors instead")
            if not torch.equal(random, random_state(s.x)):
                s.fail(part, t, "draws random numbers, which only Pyro's sites may")
        # in another order, so that what a function remembers of its last call is noticed
        for (part, t, value, args), first in zip(calls[::-1], firsts[::-1], strict=True):
            given = [mapped(torch.clone, a) for a in args]
            if not _equal(first, s.call(part, t, *given, value=value)):
                s.fail(part, t, "gives another result when called again with the same arguments")
    for name, value in _snapshot(s).items():
        if name not in before or not torch.equal(value, before[name]):
            s.fail(name.split(".")[0], None, f"changes its {name.partition('.')[2]} when called")


#: part, step, what its distribution is to score (or None), arguments
_Call = tuple[str, int | None, Tensor | None, tuple[Any, ...]]


def _calls(s: Subject, batch: Size, steps: list[Step]) -> list[_Call]:
    """Calls of all functions of model and guide at some steps."""
    calls: list[_Call] = [("guide.encode", None, None, (s.x, s.mask))]
    for t, step in enumerate(steps, 1):
        calls += [
            ("model.init", None, None, (batch,)),
            ("model.transition", t, step.z, (step.state,)),
            ("model.emission", t, step.x, (step.z, step.state)),
            ("model.advance", t, None, (step.state, step.z, step.x)),
            ("model.hidden", t, None, (step.state,)),
            ("guide.proposal", t, step.z, (step.state, step.c)),
        ]
        if step.f is not None:
            calls += [
                ("model.prior_f", None, step.f, (batch[1:],)),
                ("model.condition", None, None, (step.state, step.f)),
                ("guide.proposal_f", None, step.f, (s.x, s.mask)),
            ]
    return calls


def _snapshot(s: Subject) -> dict[str, Tensor]:
    return {name: v.detach().clone() for name, v in s.named("parameters", "buffers")}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) or torch.allclose(one, other, 1e-6, 0.0, equal_nan=True)
    return all(map(_equal, one, other)) if hasattr(one, "_fields") else one == other


@conformance("ownership")
def check_ownership(s: Subject) -> None:
    """Check that the guide registers no parameter or buffer of the model."""
    owned: dict[int, str] = {}
    for path, value in s.named("parameters", "buffers"):
        part, _, name = path.partition(".")
        if part == "model":
            owned[id(value)] = name
        elif id(value) in owned:
            what = f"registers {type(s.model).__name__}'s {owned[id(value)]} as {name}"
            hint = "borrow bound methods (self.encode_x = model.features), not modules"
            s.fail(part, None, f"{what}; {hint}")


@conformance("broadcasting")
def check_broadcasting(s: Subject) -> None:
    """Check that leading dimensions (K, B) and (T, K, B) change no particle's densities."""
    walks = [_walk(s, Size((len(s.x),))) for _ in range(s.particles)]
    columns = [mapped(lambda *v: torch.stack(v), *steps) for steps in walks]  # (T, B, ...)
    known = mapped(lambda *v: torch.stack(v, dim=1), *columns)  # (T, K, B, ...)
    x, c = columns[0].x, columns[0].c
    with torch.no_grad():
        for t in range(len(x)):
            step = mapped(lambda v, t=t: v[t], known)
            _score(s, t + 1, step._replace(x=x[t], c=c[t]), "(K, B)")
        _score(s, None, known._replace(x=x.unsqueeze(1), c=c.unsqueeze(1)), "(T, K, B)")
        _compare_start(s, known._replace(x=x))


def _score(s: Subject, t: int | None, known: Step, leading: str) -> None:
    """Score the data and latents of one step, or of all, and compare."""
    given = f" with leading dimensions {leading}"
    args = ((known.state,), (known.z, known.state), (known.state, known.c))
    values = (known.z, known.x, known.z)
    for (term, part), value, each in zip(TERMS.items(), values, args, strict=True):
        found = s.call(part, t, *each, value=value, given=given)
        what = f"does not broadcast:{given} the log-density"
        s.same(part, t, found, getattr(known, term), what, steps=t is None)


def _compare_start(s: Subject, known: Step) -> None:
    """Step 1 of the programs: a state of (B,) meets latents of (K, B)."""
    given = " with leading dimensions (B,) of the state and (K, B) of z"
    z_1, x_1 = known.z[0], known.x[0]

    def compare(part: str, name: str, found: Tensor, expected: Tensor) -> None:
        found = s.run(part, 1, found.expand, expected.shape, given=given)
        s.same(part, 1, found, expected, f"does not broadcast:{given} {name}", steps=False)

    start = s.call("model.init", None, Size((len(x_1),)))
    if known.f is not None:
        start = s.call("model.condition", None, start, known.f[0])
    found = s.call("model.emission", 1, z_1, start, value=x_1, given=given)
    compare("model.emission", "the log-density", found, known.log_emission[0])
    after = s.call("model.advance", 1, start, z_1, x_1, given=given)
    for name, value, values in zip(after._fields, after, known.state, strict=True):
        if len(values) > 1:
            compare("model.advance", name, value, values[1])
