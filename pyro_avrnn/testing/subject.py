"""The subject of a check: a model, a guide and data, and how a fault becomes one sentence."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, NamedTuple, NoReturn, TypeVar

import pyro
import torch
from torch import Tensor

from inference.densities import StepDensities
from inference.modes import evaluating
from pyro_avrnn.refinement import fixed_candidates
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

Value = TypeVar("Value")
Check = Callable[..., None]
#: The log-densities of a step, and the function that each belongs to.
TERMS = {
    "log_prior": "model.transition",
    "log_emission": "model.emission",
    "log_proposal": "guide.proposal",
}
#: Relative to an entry; a hundredth of it, relative to the largest entry, is allowed on top.
RTOL = {torch.float64: 1e-10, torch.float32: 1e-4}


class Terms(NamedTuple):
    """The log-densities of a StepDensities, ``(T, K, B)``."""

    log_prior: Tensor
    log_emission: Tensor
    log_proposal: Tensor


class Subject(NamedTuple):
    """What is checked, and under which heading.

    A ``part`` is "model", "guide", or one of their functions, such as "model.init"; ``t`` is a
    step counted from 1, or None.
    """

    heading: str
    model: SequenceModel
    guide: SequenceGuide
    x: Tensor  # (B, T, X), padding overwritten
    mask: Tensor  # (B, T)
    particles: int

    def fail(self, part: str, t: int | None, what: str) -> NoReturn:
        """Raise an ``AssertionError`` that names the part and the step."""
        owner, _, name = part.partition(".")
        part = ".".join(filter(None, (type(getattr(self, owner)).__name__, name)))
        at = "" if t is None else f" at step {t}"
        raise AssertionError(f"{self.heading}: {part}{at} {what}")

    def run(
        self, part: str, t: int | None, fn: Callable[..., Value], *args: object, given: str = ""
    ) -> Value:
        """The result of ``fn``; if it raises, fail in the name of the part."""
        try:
            return fn(*args)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            try:
                self.fail(part, t, f"raises {type(error).__name__}{given}: {first}")
            except AssertionError as sentence:
                raise sentence from error

    def call(
        self, part: str, t: int | None, *args: object, value: Tensor | None = None, given: str = ""
    ) -> Any:
        """The result of the function that ``part`` names, or its log-density of ``value``."""
        owner, _, name = part.partition(".")
        made: Any = self.run(part, t, getattr(getattr(self, owner), name), *args, given=given)
        return made if value is None else self.run(part, t, made.log_prob, value, given=given)

    def rollout(
        self, particles: int | None = None, z: Tensor | None = None, f: Tensor | None = None
    ) -> StepDensities:
        """The rollout; all calls draw the same latents, as none uses up random numbers."""
        count = self.particles if particles is None else particles
        with same_draws(self.x):
            args = self.guide, self.x, self.mask, count
            return self.run("model.rollout", None, partial(self.model.rollout, *args, z=z, f=f))

    def drawn(self) -> StepDensities:
        """The rollout without gradients, where guides that are not reparameterised may draw."""
        with torch.no_grad():
            return self.rollout()

    def named(self, *kinds: str) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of model and guide, under names such as "model.net.weight"."""
        for part, module in (("model", self.model), ("guide", self.guide)):
            for kind in kinds:
                for name, value in getattr(module, f"named_{kind}")():
                    yield f"{part}.{name}", value

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

    def same_terms(
        self, found: StepDensities | Terms, known: StepDensities | Terms, what: str
    ) -> None:
        """Fail where a log-density differs."""
        for term, part in TERMS.items():
            self.same(part, None, getattr(found, term), getattr(known, term), what)

    def gradients(
        self, densities: StepDensities | Terms, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Every parameter's gradient of one mixture of all log-densities, 0 where there is none.

        Args:
            densities: ``(T, K, B)``.
            weights: of the mixture, ``(3, T, K, B)``; None for those of ``mixing``.
        """
        terms = torch.stack([getattr(densities, term) for term in TERMS])
        total = ((mixing(terms) if weights is None else weights) * terms).sum()
        named = {name: p for name, p in self.named("parameters") if p.requires_grad}
        if not named or not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(named.items(), found, strict=True)
        }

    def same_gradients(
        self,
        found: StepDensities,
        known: StepDensities | Terms | dict[str, Tensor],
        what: str,
    ) -> None:
        """Fail where the gradient of a parameter differs."""
        expected = known if isinstance(known, dict) else self.gradients(known)
        for name, value in self.gradients(found).items():
            part, _, parameter = name.partition(".")
            self.same(part, None, value, expected[name], f"{what} {parameter}", steps=False)

    def longer(self) -> "Subject":
        """The same subject with at least two sequences and two steps, and with padding."""
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


def conformance(heading: str) -> Callable[[Callable[[Subject], None]], Check]:
    """Turn a check of a subject into one of the arguments of :func:`pyro_avrnn.testing.check`.

    The check runs in evaluation mode with a parameter store of its own. Modes and random state
    are restored afterwards.
    """

    def decorate(body: Callable[[Subject], None]) -> Check:
        @wraps(body)
        def run(
            model: SequenceModel,
            guide: SequenceGuide,
            x: Tensor,
            mask: Tensor | None = None,
            num_particles: int = 3,
        ) -> None:
            for given, kind in ((model, SequenceModel), (guide, SequenceGuide)):
                if not isinstance(given, kind):
                    name = "model" if kind is SequenceModel else "guide"
                    found = type(given).__name__
                    raise TypeError(f"{name} must be a {kind.__name__}, got {found}")
            if num_particles < 2:
                raise ValueError(
                    f"num_particles must be at least 2 to tell them apart, got {num_particles}"
                )
            x, mask = model.check(x, mask)
            while num_particles in mask.shape:  # sizes that coincide hide mistakes
                num_particles += 1
            store, modes = pyro.get_param_store().scope(), evaluating(model, guide)
            with store, modes, same_draws(x), fixed_candidates(), torch.enable_grad():
                body(Subject(heading, model, guide, x, mask, num_particles))

        del run.__wrapped__  # whose signature is not the one here
        return run

    return decorate


def mixing(terms: Tensor) -> Tensor:
    """Weights for ``(3, T, K, B)`` terms, all different: no two mistakes cancel in a sum."""
    count = torch.arange(terms.numel(), dtype=terms.dtype, device=terms.device)
    return (1.0 + 0.5 * count.cos()).reshape(terms.shape)


def random_state(x: Tensor) -> Tensor:
    """The state of the generator of the device of ``x``."""
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def same_draws(x: Tensor) -> AbstractContextManager[None]:
    """Restore the random state afterwards, whatever is drawn inside."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])


def mapped(fn: Callable[..., Any], *values: Value) -> Value:
    """``fn`` of tensors, or of the tensors in NamedTuples alike; other values as they are."""
    first: Any = values[0]
    if isinstance(first, Tensor):
        return fn(*values)
    if hasattr(first, "_fields"):
        columns: Any = zip(*values, strict=True)
        return type(first)(*(mapped(fn, *column) for column in columns))
    return first
