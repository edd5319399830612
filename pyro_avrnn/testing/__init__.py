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
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.testing._subject import (
    TERMS,
    _conformance,
    _copy,
    _drawn,
    _equal,
    _gradients,
    _mixing,
    _random_state,
    _rollout,
    _same_draws,
    _same_gradients,
    _sites,
    _snapshot,
    _stacked,
    _Subject,
    _Terms,
    _traces,
    _walk,
    _within,
)


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
        if not given:  # the same draws, scored by the proposal of stacked time
            drawn = _rollout(s, particles)
            scored = _rollout(s, particles, z=drawn.z, f=drawn.f)
            _same_gradients(s, scored, _rollout(s, particles), what)


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
