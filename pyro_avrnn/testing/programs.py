"""Checks of the Pyro programs and the rollout: sites, densities, padding, draws, saving."""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_avrnn.testing.subject import TERMS, Subject, Terms, conformance, mixing, same_draws


@conformance("sites")
def check_sites(s: Subject) -> None:
    """Check that the programs have the sites f, z_t and x_t of the right shapes, and no others."""
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
                what = "lacks the" if name in widths else "has an unexpected"
                s.fail(part, None, f"{what} site {name}")
            for name, width in widths.items():
                leading = batch[-1:] if name.startswith("x_") else batch
                shape = tuple(found[name]["value"].shape)
                if shape != (*leading, width):
                    s.fail(part, None, f"has {name} of shape {shape}, not {(*leading, width)}")


@conformance("finiteness")
def check_finite(s: Subject) -> None:
    """Check that the log-densities of the data, and of latents from the guide, are finite."""
    densities = s.drawn()
    for term, part in TERMS.items():
        values = getattr(densities, term)
        if not bool(values.isfinite().all()):
            t, k, b = (~values.isfinite()).nonzero()[0].tolist()
            value = values[t, k, b].item()
            s.fail(part, t + 1, f"gives sequence {b} a log-density of {value}")


@conformance("loop = rollout")
def check_loop_is_rollout(s: Subject) -> None:
    """Check that the Pyro programs and the rollout agree, in values and gradients."""
    _compare_rollout(s, 1)
    _compare_rollout(s.longer(), s.particles)


def _compare_rollout(s: Subject, particles: int) -> None:
    with same_draws(s.x):
        model, guide = _traces(s, particles)
    z, f = None, None
    if not all(site["fn"].has_rsample for site in _sites(guide).values()):
        guide.detach_()  # then draws carry no gradient, and the rollout is given them
        model, guide = _traces(s, particles, guide)
        z = _entries(s, guide, "z", "value", particles, s.model.z_dim)
        if s.model.f_dim:
            f = guide.nodes["f"]["value"].expand(particles, len(s.x), s.model.f_dim)
    for trace in (model, guide):
        trace.compute_log_prob()
    sites = ((model, "z"), (model, "x"), (guide, "z"))
    looped = Terms(*(_entries(s, trace, of, "log_prob", particles) for trace, of in sites))
    rolled = s.rollout(particles, z, f)
    what = "differs between the rollout, of stacked time, and the loop: the log-density"
    s.same_terms(rolled, looped, what)
    what = "differs between the rollout and the loop: the gradient of"
    s.same_gradients(rolled, looped, what)
    if z is None:  # the same draws, scored by the proposal of stacked time
        drawn = s.rollout(particles)
        scored = s.rollout(particles, drawn.z, drawn.f)
        s.same_gradients(scored, s.rollout(particles), what)


def _within(program: Callable[..., Any], particles: int) -> Callable[..., Any]:
    """The program inside a plate of particles, if there are several."""

    def run(*args: Any) -> Any:
        with pyro.plate("particles", particles, dim=-2) if particles > 1 else nullcontext():
            return program(*args)

    return run


def _traces(s: Subject, particles: int, given: Trace | None = None) -> tuple[Trace, Trace]:
    """Model and guide as plain Pyro runs them, the model on the guide's latents."""
    guide, model = _within(s.guide, particles), _within(s.model, particles)
    if given is not None:
        guide = poutine.replay(guide, trace=given)
    guide_trace = s.run("guide", None, poutine.trace(guide).get_trace, s.x, s.mask)
    replayed = poutine.replay(model, trace=guide_trace)
    return s.run("model", None, poutine.trace(replayed).get_trace, s.x, s.mask), guide_trace


def _sites(trace: Trace) -> dict[str, Any]:
    """Sample sites by name, without those of plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }


def _entries(
    s: Subject, trace: Trace, site: str, what: str, particles: int, *event: int
) -> Tensor:
    """One entry of the sites of all steps, ``(T, K, B, *event)``; log p(f) counts with z_1."""
    size, length = s.mask.shape
    shape = (particles, size, *event)
    if site == "z" and not s.model.z_dim:
        return s.x.new_zeros(length, *shape)
    rows = [trace.nodes[f"{site}_{t}"][what].expand(shape) for t in range(1, length + 1)]
    if site == "z" and s.model.f_dim and what == "log_prob":
        rows[0] = rows[0] + trace.nodes["f"][what].expand(shape)
    return torch.stack(rows)


@conformance("padding")
def check_padding_is_not_read(s: Subject) -> None:
    """Check that the content of padded frames changes nothing, not even if it is NaN."""
    s = s.longer()
    observed = s.mask.unsqueeze(-1)
    clean, _ = s.model.check(s.x, s.mask)  # padding overwritten
    other = torch.where(observed, s.x, s.x[:, :1])  # by frames that can be scored, too
    with torch.no_grad():
        c = [s.call("guide.encode", None, x, s.mask) for x in (clean, other)]
        known, found = (torch.where(observed, each, 0.0).transpose(0, 1) for each in c)
        s.same("guide.encode", None, found, known, "depends on padded frames: c")
        if s.model.f_dim:
            q_f = [s.call("guide.proposal_f", None, x, s.mask) for x in (clean, other)]
            f = q_f[0].sample()
            known, found = (q.log_prob(f) for q in q_f)
            what = "depends on padded frames: a log-density"
            s.same("guide.proposal_f", None, found, known, what, steps=False)
    dirty = s._replace(x=torch.where(observed, s.x, torch.nan))
    drawn = s.drawn()
    s.same_terms(dirty.drawn(), drawn, "depends on NaN in padded frames: the log-density")
    again = dirty.rollout(z=drawn.z, f=drawn.f)
    what = "depends on NaN in padded frames: the gradient of"
    s.same_gradients(again, s.rollout(z=drawn.z, f=drawn.f), what)


@conformance("padded = unpadded")
def check_padded_is_unpadded(s: Subject) -> None:
    """Check that a ragged batch gives the densities and gradients of its single sequences."""
    s = s.longer()
    drawn = s.drawn()
    together = s.rollout(z=drawn.z, f=drawn.f)
    terms = Terms(*(getattr(together, term) for term in TERMS))
    weights = mixing(torch.stack(terms))
    sums: dict[str, Tensor] = {}
    for b, n in enumerate(s.mask.sum(dim=1).tolist()):
        if n == 0:
            continue
        one = s._replace(x=s.x[b : b + 1, :n], mask=s.mask[b : b + 1, :n])
        f = None if drawn.f is None else drawn.f[:, b : b + 1]
        alone = one.rollout(z=drawn.z[:n, :, b : b + 1], f=f)
        what = f"differs for sequence {b} in a padded batch and by itself: the log-density"
        s.same_terms(Terms(*(term[:n, :, b : b + 1] for term in terms)), alone, what)
        share = one.gradients(alone, weights[:, :n, :, b : b + 1])
        sums = {name: value + sums.get(name, 0.0) for name, value in share.items()}
    what = "differs between a padded batch and its single sequences: the gradient of"
    s.same_gradients(together, sums, what)


@conformance("generation")
def check_generation(s: Subject) -> None:
    """Check that ``model(None, mask)`` draws data that the model itself can score."""
    s = s.longer()
    for particles in (1, s.particles):
        batch = (len(s.x),) if particles == 1 else (particles, len(s.x))
        with torch.no_grad():
            program = poutine.trace(_within(s.model, particles))
            trace = s.run("model", None, program.get_trace, None, s.mask)
        sites = _sites(trace)
        for t in range(1, s.mask.shape[1] + 1):
            _check_draw(s, t, sites[f"x_{t}"], (*batch, s.model.x_dim))
        returned = trace.nodes["_RETURN"]["value"]
        if returned.shape != (*batch, *s.x.shape[1:]):
            s.fail("model", None, f"returns {tuple(returned.shape)}, not (*batch, T, X)")


def _check_draw(s: Subject, t: int, site: dict[str, Any], shape: tuple[int, ...]) -> None:
    value = site["value"]
    if value.shape != shape or value.dtype != s.x.dtype:
        found = f"{tuple(value.shape)} of {value.dtype}"
        s.fail("model", t, f"draws x {found}, not {shape} of {s.x.dtype}")
    inside = s.model.support.check(value) & value.isfinite()
    if not bool(inside.all()):
        wrong = value[~inside][0].item()
        s.fail("model.emission", t, f"draws x = {wrong:g}, but expects {s.model.expects}")
    log_prob = s.run("model.emission", t, site["fn"].log_prob, value)
    if not bool(log_prob.isfinite().all()):
        s.fail("model.emission", t, "gives its own draw a log-density that is not finite")


@conformance("saving")
def check_state_dict(s: Subject) -> None:
    """Check that saved parameters, read without pickle, give a copy the same densities."""
    twins = s.run("model", None, copy.deepcopy, (s.model, s.guide))
    for part, twin in zip(("model", "guide"), twins, strict=True):
        content = io.BytesIO()
        s.run(part, None, torch.save, getattr(s, part).state_dict(), content)
        content.seek(0)
        read = s.run(part, None, lambda c=content: torch.load(c, weights_only=True))
        with torch.no_grad():
            for value in twin.state_dict().values():
                if value.is_floating_point():
                    value += 0.1 * (1.0 + value.abs())
        s.run(part, None, twin.load_state_dict, read)
    found = s._replace(model=twins[0], guide=twins[1]).drawn()
    what = "differs in a copy that was given the saved parameters: the log-density"
    s.same_terms(found, s.drawn(), what)
