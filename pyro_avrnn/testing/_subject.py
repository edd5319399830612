"""How the conformance checks look at a model and guide: walks, traces, gradients, sentences."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Size, Tensor, nn

from inference.densities import StepDensities
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

#: whose density each term is
TERMS = {
    "log_prior": "model.transition",
    "log_emission": "model.emission",
    "log_proposal": "guide.proposal",
}
#: relative to an entry; a hundredth of it, relative to the largest one, is allowed on top
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4}


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
