"""Conformance checks: whether a model and a guide of one's own keep the library's contract.

Everything here - Pyro programs, rollouts, bounds, filters, masks - is derived from a model's four
functions and a guide's two, so a mistake in one of them shows up far from where it was made.
These checks find it where it is. In a test of one's own::

    from pyro_avrnn.testing import check

    check(my_model, my_guide, x)  # x (B, T, X), a few short sequences

Nothing happens if all is well. Otherwise an ``AssertionError`` says in one sentence which check
failed, in which function, at which step (counted from 1), and what was wrong. Every check can be
called by itself, with the same arguments. Two paths to one number are compared at rtol 1e-10 in
float64 and 1e-4 in float32, so float64 finds more. The checks run in evaluation mode with a
parameter store of their own, and take no random numbers from the caller.
"""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Size, Tensor, nn

from pyro_avrnn.rollout import StepDensities
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

#: whose density each term is
TERMS = {
    "log_prior": "model.transition",
    "log_emission": "model.emission",
    "log_proposal": "guide.proposal",
}
#: relative to an entry; a hundredth of it, relative to the largest one, is allowed on top
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4}


def check(
    model: SequenceModel,
    guide: SequenceGuide,
    x: Tensor,
    mask: Tensor | None = None,
    num_particles: int = 3,
) -> None:
    """All checks of this module, in the order of :data:`CHECKS`.

    Args:
        model: one's own, or any other.
        guide: proposes its latents.
        x: data ``(B, T, X)`` that the model can score; (2, 4, X) will do.
        mask: ``(B, T)`` bool, a prefix, or None: checks of padding then shorten x themselves.
        num_particles: K, at least 2; one or two more are taken where K would equal B or T,
            which would hide that dimensions are mixed up.

    Raises:
        AssertionError: naming the check, the function and the step.
        ValueError: data that the model refuses, or fewer than 2 particles.
        TypeError: anything but a SequenceModel and a SequenceGuide.

    Example:
        >>> from pyro_avrnn import recipes
        >>> r = recipes.vrnn(x_dim=3, z_dim=2, h_dim=4)
        >>> check(r.model, r.guide, torch.zeros(2, 4, 3))
    """
    for each in CHECKS:
        each(model, guide, x, mask, num_particles)


class _Subject(NamedTuple):
    """What is checked, and under which heading."""

    heading: str
    model: SequenceModel
    guide: SequenceGuide
    x: Tensor  # (B, T, X), padding overwritten
    mask: Tensor  # (B, T)
    particles: int

    def fail(self, part: str, t: int | None, what: str) -> NoReturn:
        """Raise the sentence; ``part`` is "model", "guide", or a function such as "model.init"."""
        owner, _, name = part.partition(".")
        part = ".".join(filter(None, (type(getattr(self, owner)).__name__, name)))
        at = "" if t is None else f" at step {t}"
        raise AssertionError(f"{self.heading}: {part}{at} {what}")

    def call(
        self, part: str, t: int | None, fn: Callable[..., Any], *args: Any, given: str = ""
    ) -> Any:
        """The function's result; if it raises, the sentence says so."""
        try:
            return fn(*args)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            try:
                self.fail(part, t, f"raises {type(error).__name__}{given}: {first}")
            except AssertionError as sentence:
                raise sentence from error

    def same(
        self, part: str, t: int | None, found: Tensor, known: Tensor, what: str, steps: bool = True
    ) -> None:
        """Fail where two paths to one number differ; ``steps``: dimension 0 is time."""
        if found.shape != known.shape:
            self.fail(part, t, f"{what}: shapes {tuple(found.shape)} and {tuple(known.shape)}")
        found, known = found.detach(), known.detach()
        rtol = RTOL.get(found.dtype, 1e-2)
        largest = known.abs().max() if known.numel() else 0.0
        near = (found - known).abs() <= rtol * (known.abs() + 0.01 * largest)
        bad = ~near & (found != known)  # equal infinities are near, NaN never is
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            if steps:
                t = where[0] + 1
            self.fail(
                part, t, f"{what}: {found[where].item():.12g}, not {known[where].item():.12g}"
            )

    def longer(self) -> "_Subject":
        """The same with two sequences at least, and with padding."""
        x, mask = self.x, self.mask
        if len(x) == 1:
            x, mask = torch.cat([x, x]), torch.cat([mask, mask])
        if x.shape[1] == 1:
            x, mask = torch.cat([x, x], dim=1), torch.cat([mask, mask], dim=1)
        if bool(mask.all()):
            size, length = mask.shape
            lengths = length - torch.arange(size, device=x.device) % length
            mask = torch.arange(length, device=x.device) < lengths.unsqueeze(1)
        return self._replace(x=x, mask=mask)


def _conformance(heading: str) -> Callable[[Callable[[_Subject], None]], Callable[..., None]]:
    """The check with its surroundings: data looked at; modes, store and random state kept."""

    def decorate(body: Callable[[_Subject], None]) -> Callable[..., None]:
        @wraps(body)
        def run(
            model: SequenceModel,
            guide: SequenceGuide,
            x: Tensor,
            mask: Tensor | None = None,
            num_particles: int = 3,
        ) -> None:
            for name, given, kind in (
                ("model", model, SequenceModel),
                ("guide", guide, SequenceGuide),
            ):
                if not isinstance(given, kind):
                    raise TypeError(
                        f"{name} must be a {kind.__name__}, got {type(given).__name__}"
                    )
            if num_particles < 2:
                raise ValueError(
                    f"num_particles must be at least 2 to tell them apart, got {num_particles}"
                )
            x, mask = model.check(x, mask)
            while num_particles in mask.shape:
                num_particles += 1
            subject = _Subject(heading, model, guide, x, mask, num_particles)
            with (
                pyro.get_param_store().scope(),
                _evaluating(model, guide),
                _same_draws(x),
                torch.enable_grad(),
            ):
                body(subject)

        del run.__wrapped__  # whose signature is not the one here
        return run

    return decorate


@_conformance("shapes")
def check_shapes(subject: _Subject) -> None:
    """States, batch and event shapes are as agreed, with leading dimensions (B,) and (K, B)."""
    size = len(subject.x)
    for batch in (Size((subject.particles, size)), Size((size,))):
        _walk(subject, batch)


@_conformance("sites")
def check_sites(subject: _Subject) -> None:
    """The Pyro programs have sites f, z_1..z_T, x_1..x_T of the right shapes, and no others."""
    s = subject
    size, length = s.mask.shape
    for particles in (1, s.particles):
        batch = Size((size,)) if particles == 1 else Size((particles, size))
        for part, trace in zip(("model", "guide"), _traces(s, particles), strict=True):
            widths = {"f": s.model.f_dim} if s.model.f_dim else {}
            for t in range(1, length + 1):
                widths |= {f"z_{t}": s.model.z_dim} if s.model.z_dim else {}
                widths |= {f"x_{t}": s.model.x_dim} if part == "model" else {}
            found = _sites(trace)
            for name in sorted(widths.keys() ^ found.keys()):
                what = "lacks the" if name in widths else "has another"
                s.fail(part, None, f"{what} site {name}")
            for name, width in widths.items():
                leading = batch[-1:] if name.startswith("x_") else batch
                shape = tuple(found[name]["value"].shape)
                if shape != (*leading, width):
                    s.fail(part, None, f"has {name} of shape {shape}, not {(*leading, width)}")


@_conformance("purity")
def check_pure(subject: _Subject) -> None:
    """The functions change nothing, draw nothing, and give the same for the same arguments."""
    s = subject
    batch = Size((s.particles, len(s.x)))
    steps, before = _walk(s, batch)[:2], _snapshot(s)
    f = steps[0].f

    def density(fn: Callable[..., Any], value: Tensor) -> Callable[..., Any]:
        return lambda *args: fn(*args).log_prob(value)

    calls: list[tuple[str, int | None, Callable[..., Any], tuple[Any, ...]]] = [
        ("guide.encode", None, s.guide.encode, (s.x, s.mask))
    ]
    for t, step in enumerate(steps, 1):
        calls += [
            ("model.init", None, s.model.init, (batch,)),
            ("model.transition", t, density(s.model.transition, step.z), (step.state,)),
            ("model.emission", t, density(s.model.emission, step.x), (step.z, step.state)),
            ("model.advance", t, s.model.advance, (step.state, step.z, step.x)),
            ("model.hidden", t, s.model.hidden, (step.state,)),
            ("guide.proposal", t, density(s.guide.proposal, step.z), (step.state, step.c)),
        ]
        if f is not None:
            calls += [
                ("model.prior_f", None, density(s.model.prior_f, f), (batch[1:],)),
                ("model.condition", None, s.model.condition, (step.state, f)),
                ("guide.proposal_f", None, density(s.guide.proposal_f, f), (s.x, s.mask)),
            ]
    firsts = []
    with torch.no_grad():
        for part, at, fn, args in calls:
            given, random = [_copy(a) for a in args], _random_state(s.x)
            firsts.append(_copy(s.call(part, at, fn, *given)))
            if not all(map(_equal, args, given)):
                s.fail(part, at, "modifies what it is given; build new tensors instead")
            if not torch.equal(random, _random_state(s.x)):
                s.fail(part, at, "draws random numbers, which only Pyro's sites may")
        # in another order, so that what a function remembers of its last call is noticed
        for (part, at, fn, args), first in zip(calls[::-1], firsts[::-1], strict=True):
            if not _equal(first, s.call(part, at, fn, *map(_copy, args))):
                s.fail(part, at, "gives another result when it is called again with the same")
    for name, value in _snapshot(s).items():
        if name not in before or not torch.equal(value, before[name]):
            s.fail(name.split(".")[0], None, f"changes its {name.partition('.')[2]} when called")


@_conformance("ownership")
def check_ownership(subject: _Subject) -> None:
    """The guide registers no parameter or buffer of the model: none is to have two owners."""
    s = subject
    owned = {id(v): name for name, v in (*s.model.named_parameters(), *s.model.named_buffers())}
    for name, value in (*s.guide.named_parameters(), *s.guide.named_buffers()):
        if id(value) in owned:
            s.fail(
                "guide",
                None,
                f"registers {type(s.model).__name__}'s {owned[id(value)]} as {name}; borrow bound "
                "methods (self.encode_x = model.features), not modules",
            )


@_conformance("finiteness")
def check_finite(subject: _Subject) -> None:
    """Every log-density of the data, and of latents that the guide drew, is a finite number."""
    s = subject
    densities = _drawn(s)
    for term, part in TERMS.items():
        values = getattr(densities, term)
        if not bool(values.isfinite().all()):
            t, k, b = (~values.isfinite()).nonzero()[0].tolist()
            value = values[t, k, b].item()
            s.fail(part, t + 1, f"gives sequence {b} a log-density of {value}")


@_conformance("broadcasting")
def check_broadcasting(subject: _Subject) -> None:
    """Leading dimensions (K, B) and (T, K, B) give what (B,) gives, particle by particle."""
    s = subject
    size, length = s.mask.shape
    alone = [_walk(s, Size((size,))) for _ in range(s.particles)]
    kind = type(alone[0][0].state)

    def stacked(name: str) -> Tensor:  # (T, K, B, ...)
        columns = [[getattr(step, name) for step in steps] for steps in alone]
        return torch.stack([torch.stack(column) for column in columns], dim=1)

    parts = [
        torch.stack([torch.stack([step.state[i] for step in steps]) for steps in alone], dim=1)
        for i in range(len(alone[0][0].state))
    ]
    z, c = stacked("z"), torch.stack([step.c for step in alone[0]])  # (T, B, C)
    known = {term: stacked(term) for term in TERMS}

    def compare(t: int | None, state: Any, z: Tensor, x: Tensor, c: Tensor, leading: str) -> None:
        what = f"does not broadcast: with leading dimensions {leading} the log-density"
        for part, fn, args, value, term in (
            ("model.transition", s.model.transition, (state,), z, "log_prior"),
            ("model.emission", s.model.emission, (z, state), x, "log_emission"),
            ("guide.proposal", s.guide.proposal, (state, c), z, "log_proposal"),
        ):
            at = None if t is None else t + 1
            given = f" with leading dimensions {leading}"
            made = s.call(part, at, fn, *args, given=given)
            found = s.call(part, at, made.log_prob, value, given=given)
            expected = known[term] if t is None else known[term][t]
            s.same(part, at, found, expected, what, steps=t is None)

    with torch.no_grad():
        for t in range(length):
            state = kind(*(p[t] for p in parts))
            compare(t, state, z[t], s.x[:, t], c[t], "(K, B)")
        x_all = s.x.transpose(0, 1).unsqueeze(1)
        compare(None, kind(*parts), z, x_all, c.unsqueeze(1), "(T, K, B)")
        # step 1 of the programs: a state of (B,) meets latents of (K, B)
        start = s.call("model.init", None, s.model.init, Size((size,)))
        if s.model.f_dim:
            f = stacked("f")[0]
            start = s.call("model.condition", None, s.model.condition, start, f)
        given = " with leading dimensions (B,) of the state and (K, B) of z"
        made = s.call("model.emission", 1, s.model.emission, z[0], start, given=given)
        log_prob = s.call("model.emission", 1, made.log_prob, s.x[:, 0], given=given)
        expected = known["log_emission"][0]
        found = s.call("model.emission", 1, log_prob.expand, expected.shape, given=given)
        what = f"does not broadcast:{given} the log-density"
        s.same("model.emission", 1, found, expected, what, steps=False)
        after = s.call("model.advance", 1, s.model.advance, start, z[0], s.x[:, 0], given=given)
        for name, value, values in zip(kind._fields, after, parts, strict=True):
            if length > 1:
                found = s.call("model.advance", 1, value.expand, values[1].shape, given=given)
                what = f"does not broadcast:{given} {name}"
                s.same("model.advance", 1, found, values[1], what, steps=False)


@_conformance("loop = rollout")
def check_loop_is_rollout(subject: _Subject) -> None:
    """The Pyro programs and the vectorised rollout agree, values and every gradient."""
    for s in (subject, subject.longer()):
        particles = 1 if s is subject else s.particles
        with _same_draws(s.x):
            model, guide = _traces(s, particles)
        given: dict[str, Any] = {}
        if not all(site["fn"].has_rsample for site in _sites(guide).values()):
            guide.detach_()  # then draws carry no gradient, and the rollout is given them
            model, guide = _traces(s, particles, guide)
            given["z"] = _stacked(s, guide, "z", "value", particles, s.model.z_dim)
            if s.model.f_dim:
                shape = (particles, len(s.x), s.model.f_dim)
                given["f"] = guide.nodes["f"]["value"].expand(shape)
        for trace in (model, guide):
            trace.compute_log_prob()
        looped = _Terms(
            _stacked(s, model, "z", "log_prob", particles),
            _stacked(s, model, "x", "log_prob", particles),
            _stacked(s, guide, "z", "log_prob", particles),
        )
        rolled = _rollout(s, particles, **given)
        for term, part in TERMS.items():
            what = "is not in the rollout, of stacked time, what it is in the loop: log-density"
            s.same(part, None, getattr(rolled, term), getattr(looped, term), what)
        what = "is not in the rollout what it is in the loop: the gradient of"
        _same_gradients(s, rolled, looped, what)


@_conformance("padding")
def check_padding_is_not_read(subject: _Subject) -> None:
    """What stands in padded frames changes nothing, NaN included."""
    s = subject.longer()
    observed = s.mask.unsqueeze(-1)
    clean, _ = s.model.check(s.x, s.mask)  # padding overwritten
    other = torch.where(observed, s.x, s.x[:, :1])  # by frames that can be scored, too
    with torch.no_grad():
        c = [s.call("guide.encode", None, s.guide.encode, x, s.mask) for x in (clean, other)]
        known, found = (torch.where(observed, each, 0.0).transpose(0, 1) for each in c)
        s.same("guide.encode", None, found, known, "depends on padded frames: c")
        if s.model.f_dim:
            q_f = [
                s.call("guide.proposal_f", None, s.guide.proposal_f, x, s.mask)
                for x in (clean, other)
            ]
            f = q_f[0].sample()
            known, found = (q.log_prob(f) for q in q_f)
            what = "depends on padded frames: a log-density"
            s.same("guide.proposal_f", None, found, known, what, steps=False)
    dirty = s._replace(x=torch.where(observed, s.x, torch.nan))
    drawn, again = _drawn(s), _drawn(dirty)
    for term, part in TERMS.items():
        what = "depends on NaN in padded frames: the log-density"
        s.same(part, None, getattr(again, term), getattr(drawn, term), what)
    given: dict[str, Any] = {"z": drawn.z, "f": drawn.f}
    what = "depends on NaN in padded frames: the gradient of"
    _same_gradients(s, _rollout(dirty, **given), _rollout(s, **given), what)


@_conformance("padded = unpadded")
def check_padded_is_unpadded(subject: _Subject) -> None:
    """A ragged batch weighs what its sequences weigh one by one, values and gradients."""
    s = subject.longer()
    drawn = _drawn(s)
    together = _rollout(s, z=drawn.z, f=drawn.f)
    weights = _mixing(s)
    sums: dict[str, Tensor] = {}
    for b, n in enumerate(s.mask.sum(dim=1).tolist()):
        if n == 0:
            continue
        one = s._replace(x=s.x[b : b + 1, :n], mask=s.mask[b : b + 1, :n])
        f = None if drawn.f is None else drawn.f[:, b : b + 1]
        alone = _rollout(one, z=drawn.z[:n, :, b : b + 1], f=f)
        for term, part in TERMS.items():
            what = f"weighs sequence {b} otherwise in a padded batch than by itself: log-density"
            found = getattr(together, term)[:n, :, b : b + 1]
            s.same(part, None, found, getattr(alone, term), what)
        share = _gradients(one, alone, weights[:, :n, :, b : b + 1])
        sums = {name: value + sums.get(name, 0.0) for name, value in share.items()}
    what = "learns otherwise from a padded batch than from its sequences: the gradient of"
    _same_gradients(s, together, sums, what)


@_conformance("generation")
def check_generation(subject: _Subject) -> None:
    """``model(None, mask)`` draws data of the right shape that the model itself can score."""
    s = subject.longer()
    for particles in (1, s.particles):
        batch = (len(s.x),) if particles == 1 else (particles, len(s.x))
        with torch.no_grad():
            program = _within(s.model, particles)
            trace = s.call("model", None, poutine.trace(program).get_trace, None, s.mask)
        sites = [_sites(trace)[f"x_{t}"] for t in range(1, s.mask.shape[1] + 1)]
        for t, site in enumerate(sites, 1):
            value = site["value"]
            if value.shape != (*batch, s.model.x_dim) or value.dtype != s.x.dtype:
                expected = f"{(*batch, s.model.x_dim)} of {s.x.dtype}"
                s.fail(
                    "model", t, f"draws x {tuple(value.shape)} of {value.dtype}, not {expected}"
                )
            inside = s.model.support.check(value) & value.isfinite()
            if not bool(inside.all()):
                wrong = value[~inside][0].item()
                s.fail("model.emission", t, f"draws x = {wrong:g}, but expects {s.model.expects}")
            log_prob = s.call("model.emission", t, site["fn"].log_prob, value)
            if not bool(log_prob.isfinite().all()):
                s.fail("model.emission", t, "gives its own draw a log-density that is not finite")
        returned = trace.nodes["_RETURN"]["value"]
        if returned.shape != (*batch, *s.x.shape[1:]):
            s.fail("model", None, f"returns {tuple(returned.shape)}, not (*batch, T, X)")


@_conformance("saving")
def check_state_dict(subject: _Subject) -> None:
    """Parameters saved, read back without unpickling, give a changed copy the same densities."""
    s = subject
    twins = s.call("model", None, copy.deepcopy, (s.model, s.guide))
    for part, twin in zip(("model", "guide"), twins, strict=True):
        content = io.BytesIO()
        s.call(part, None, torch.save, getattr(s, part).state_dict(), content)
        content.seek(0)
        read = s.call(part, None, lambda c=content: torch.load(c, weights_only=True))
        with torch.no_grad():
            for value in twin.state_dict().values():
                if value.is_floating_point():
                    value += 0.1 * (1.0 + value.abs())
        s.call(part, None, twin.load_state_dict, read)
    known, found = _drawn(s), _drawn(s._replace(model=twins[0], guide=twins[1]))
    for term, part in TERMS.items():
        what = "differs in a copy that was given the saved parameters: the log-density"
        s.same(part, None, getattr(found, term), getattr(known, term), what)


#: in the order in which :func:`check` runs them: a mistake is best told by the first that sees it
CHECKS: tuple[Callable[..., None], ...] = (
    check_shapes,
    check_pure,
    check_ownership,
    check_broadcasting,
    check_sites,
    check_finite,
    check_loop_is_rollout,
    check_padding_is_not_read,
    check_padded_is_unpadded,
    check_generation,
    check_state_dict,
)


class _Step(NamedTuple):
    """One step of a walk along the guide, of leading dimensions ``batch``."""

    state: Any
    z: Tensor
    x: Tensor  # (B, X)
    c: Tensor  # (B, C)
    f: Tensor | None
    log_prior: Tensor  # f's densities are not in these
    log_emission: Tensor
    log_proposal: Tensor


def _walk(s: _Subject, batch: Size) -> list[_Step]:
    """The functions called one by one, latents drawn from the guide, every shape looked at."""
    size, length = s.mask.shape
    steps, f = [], None

    def shapes(part: str, t: int | None, made: Any, width: int, leading: Size = batch) -> None:
        for name, found, expected in (
            ("event", made.event_shape, (width,)),
            ("batch", made.batch_shape, tuple(leading)),
        ):
            if tuple(found) != expected:
                s.fail(part, t, f"has {name} shape {tuple(found)}, not {expected}")

    def require(part: str, t: int | None, state: Any) -> None:
        if not (isinstance(state, tuple) and hasattr(state, "_fields")):
            s.fail(part, t, f"gives a {type(state).__name__}, not a NamedTuple of tensors")
        for name, value in zip(state._fields, state, strict=True):
            if not isinstance(value, Tensor):
                s.fail(part, t, f"gives {name} as a {type(value).__name__}, not as a tensor")
            if value.shape[: len(batch)] != batch:
                s.fail(
                    part,
                    t,
                    f"gives {name} of shape {tuple(value.shape)}, which does not start with the "
                    f"leading dimensions {tuple(batch)}",
                )

    with torch.no_grad():
        c = s.call("guide.encode", None, s.guide.encode, s.x, s.mask)
        if not isinstance(c, Tensor) or c.ndim != 3 or c.shape[:2] != s.mask.shape:
            shape = tuple(getattr(c, "shape", ()))
            s.fail("guide.encode", None, f"gives shape {shape}, not ({size}, {length}, C)")
        state = s.call("model.init", None, s.model.init, batch)
        require("model.init", None, state)
        if s.model.f_dim:
            prior_f = s.call("model.prior_f", None, s.model.prior_f, batch)
            shapes("model.prior_f", None, prior_f, s.model.f_dim)
            proposal_f = s.call("guide.proposal_f", None, s.guide.proposal_f, s.x, s.mask)
            shapes("guide.proposal_f", None, proposal_f, s.model.f_dim, batch[-1:])
            f = proposal_f.expand(batch).sample()
            state = s.call("model.condition", None, s.model.condition, state, f)
            require("model.condition", None, state)
        for t in range(1, length + 1):
            x_t, c_t = s.x[:, t - 1], c[:, t - 1]
            prior = s.call("model.transition", t, s.model.transition, _copy(state))
            shapes("model.transition", t, prior, s.model.z_dim)
            proposal = s.call("guide.proposal", t, s.guide.proposal, _copy(state), c_t)
            shapes("guide.proposal", t, proposal, s.model.z_dim)
            z_t = s.call("guide.proposal", t, proposal.sample)
            emission = s.call("model.emission", t, s.model.emission, z_t, _copy(state))
            shapes("model.emission", t, emission, s.model.x_dim)
            terms = [
                s.call(part, t, made.log_prob, value)
                for part, made, value in (
                    ("model.transition", prior, z_t),
                    ("model.emission", emission, x_t),
                    ("guide.proposal", proposal, z_t),
                )
            ]
            steps.append(_Step(state, z_t, x_t, c_t, f, *terms))
            after = s.call("model.advance", t, s.model.advance, _copy(state), z_t.clone(), x_t)
            require("model.advance", t, after)
            if [v.shape for v in after] != [v.shape for v in state]:
                s.fail("model.advance", t, "gives a state of other shapes than it was given")
            state = after
    return steps


def _within(program: Callable[..., Any], particles: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with pyro.plate("particles", particles, dim=-2) if particles > 1 else nullcontext():
            return program(*args)

    return run


def _traces(s: _Subject, particles: int, given: Trace | None = None) -> tuple[Trace, Trace]:
    """Model and guide as plain Pyro runs them, the model on the guide's latents."""
    guide, model = _within(s.guide, particles), _within(s.model, particles)
    if given is not None:
        guide = poutine.replay(guide, trace=given)
    args = (s.x, s.mask)
    guide_trace = s.call("guide", None, poutine.trace(guide).get_trace, *args)
    replayed = poutine.replay(model, trace=guide_trace)
    return s.call("model", None, poutine.trace(replayed).get_trace, *args), guide_trace


def _sites(trace: Trace) -> dict[str, Any]:
    """Sample sites but those of plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }


def _stacked(
    s: _Subject, trace: Trace, site: str, what: str, particles: int, *event: int
) -> Tensor:
    """Of the sites of all steps ``(T, K, B, *event)``; log p(f) is counted with z_1."""
    size, length = s.mask.shape
    if site == "z" and not s.model.z_dim:
        return s.x.new_zeros(length, particles, size, *event)
    shape = (particles, size, *event)
    rows = [trace.nodes[f"{site}_{t}"][what].expand(shape) for t in range(1, length + 1)]
    if site == "z" and s.model.f_dim and what == "log_prob":
        rows[0] = rows[0] + trace.nodes["f"][what].expand(shape)
    return torch.stack(rows)


def _rollout(s: _Subject, particles: int | None = None, **given: Any) -> StepDensities:
    """The rollout; calls of it draw the same latents, as none uses up random numbers."""
    count = s.particles if particles is None else particles
    with _same_draws(s.x):
        run = partial(s.model.rollout, s.guide, s.x, s.mask, count, **given)
        found: StepDensities = s.call("model.rollout", None, run)
    return found


def _drawn(s: _Subject) -> StepDensities:
    """The rollout without gradients, in which guides that are not reparameterised may draw."""
    with torch.no_grad():
        return _rollout(s)


def _mixing(s: _Subject, particles: int | None = None) -> Tensor:
    """Weights ``(3, T, K, B)``, all different, so that no two mistakes cancel in a sum."""
    size, length = s.mask.shape
    shape = (len(TERMS), length, particles or s.particles, size)
    count = torch.arange(Size(shape).numel(), dtype=s.x.dtype, device=s.x.device)
    return (1.0 + 0.5 * count.cos()).reshape(shape)


class _Terms(NamedTuple):
    """The log-densities of a StepDensities, found in another way."""

    log_prior: Tensor
    log_emission: Tensor
    log_proposal: Tensor


def _gradients(
    s: _Subject, densities: StepDensities | _Terms, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Every parameter's gradient of one mixture of all log-densities, 0 where there is none."""
    terms = [getattr(densities, term) for term in TERMS]
    if weights is None:
        weights = _mixing(s, terms[0].shape[1])
    total = (weights * torch.stack(terms)).sum()
    named = {
        f"{part}.{name}": p
        for part, module in (("model", s.model), ("guide", s.guide))
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    if not named or not total.requires_grad:
        return {}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def _same_gradients(
    s: _Subject,
    found: StepDensities,
    known: StepDensities | _Terms | dict[str, Tensor],
    what: str,
) -> None:
    expected = known if isinstance(known, dict) else _gradients(s, known)
    for name, value in _gradients(s, found).items():
        part, _, parameter = name.partition(".")
        s.same(part, None, value, expected[name], f"{what} {parameter}", steps=False)


def _snapshot(s: _Subject) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {
        f"{part}.{name}": value.detach().clone()
        for part, module in (("model", s.model), ("guide", s.guide))
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


def _copy(value: Any) -> Any:
    """A copy of a tensor, or of a state; other values as they are."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(*map(_copy, value)) if hasattr(value, "_fields") else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) or torch.allclose(one, other, 1e-6, 0.0, equal_nan=True)
    return all(map(_equal, one, other)) if hasattr(one, "_fields") else one == other


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _same_draws(x: Tensor) -> Any:
    """Whatever is drawn inside, the random state is afterwards what it was."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """In evaluation mode inside: dropout would tell two paths to one number apart."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in before:
        # cuDNN has no gradients of recurrent layers in evaluation mode; only dropout needs it
        part.training = isinstance(part, nn.RNNBase) and not part.dropout
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
