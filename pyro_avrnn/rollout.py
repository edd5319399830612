"""The joint density of model and guide with time as a batch dimension: the fast path.

The guide's recurrence runs once and draws the latents; every density is then computed for all
steps together. Values and gradients equal those of the ``pyro.markov`` loops of
:mod:`pyro_avrnn.sequence` to round-off, for every model and guide (with dropout: in evaluation
mode).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, Protocol

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from inference.densities import StepDensities, select_particles
from inference.protocols import Stepwise, counts, given, of_kind
from inference.random import draw, learnable
from pyro_avrnn import engine, products
from pyro_avrnn.networks import diagonal_normal

#: (t from 0, log p(z_t), log p(x_t), log q(z_t)), each (K, B) and constant -> the step-t particles
#: that go on, ``(K, B)`` indices, or None for all as they are
Select = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


class SequenceProgram(Stepwise, Protocol):
    """Protocol of the models that can be rolled out, such as ``SequenceModel``."""

    z_dim: int
    f_dim: int
    features_go_on: bool

    def hidden(self, state: Any) -> Tensor:
        """h_t, ``(*batch, H)``: the part of a state that guides and critics read."""
        ...

    def prior_f(self, batch_shape: Size) -> dist.Distribution:
        """p(f), for models with f_dim > 0."""
        ...

    def condition(self, state: Any, f: Tensor) -> Any:
        """The initial state with f in it, for models with f_dim > 0."""
        ...


class Request(NamedTuple):
    """Arguments of :meth:`~pyro_avrnn.SequenceModel.rollout`, which describes them."""

    num_particles: int
    z: Tensor | None
    f: Tensor | None
    select: Select | None
    start: Any
    recompute: int | None
    compile: bool
    scored: bool
    distributions: bool
    twist: Any = None


def rollout(
    model: SequenceProgram, guide: Any, x: Tensor, mask: Tensor, asked: Request
) -> StepDensities:
    """Draw (or take) latents along the guide and score them under model and guide.

    Args:
        model, guide: that belong together.
        x: ``(B, T, X)``, padding overwritten by a value in the emission's support.
        mask: ``(B, T)`` bool, a prefix.
        asked: number of particles, given latents and the like.
    """
    _check(asked, guide, x)
    particles = _particles(asked, (mask.shape[1], mask.shape[0], model.z_dim))
    state, shared = model.init(Size((particles, len(x)))), _Shared(asked.f)
    if asked.start is not None:
        state = _started(state, asked.start)
    elif model.f_dim:
        shared = _share(model, guide, x, mask, particles, asked)
        assert shared.f is not None  # drawn, if not given
        state = model.condition(state, shared.f)
    sight = None if asked.twist is None else asked.twist(x, mask)
    scored = None if asked.scored and not asked.distributions else asked.scored
    options = asked.compile, _chooser(asked.select, mask, shared), scored, sight
    run = _Run(model, guide, learnable(guide), *options)
    with _faster(x, particles):
        c = _encoded(model, guide, x, mask, asked.start).transpose(0, 1)  # (T, B, C)
    x, observed = x.transpose(0, 1), mask.t().unsqueeze(1)
    given = state, c, x, asked.z, range(len(x))
    cut = asked.scored and asked.recompute
    piece = run.in_segments(*given, cut) if cut else run.piece(*given)
    seen = partial(_seen, observed)
    return StepDensities(
        z=piece.z,
        h=model.hidden(piece.states),
        x=x.unsqueeze(1),
        mask=observed,
        log_prior=seen(shared.counted(piece.log_prior, shared.log_prior)),
        log_emission=seen(piece.log_emission),
        log_proposal=seen(shared.counted(piece.log_proposal, shared.log_proposal)),
        log_twist=piece.log_twist,
        prior=piece.prior,
        emission=piece.emission,
        proposal=piece.proposal,
        states=piece.states,
        c=c.unsqueeze(1),
        f=shared.f,
        prior_f=shared.prior,
        proposal_f=shared.proposal,
    )


def _seen(observed: Tensor, steps: Any) -> Any:
    """Log-densities, 0 where a step is padded; None where there are none."""
    return None if steps is None else torch.where(observed, steps, 0.0)


def _check(asked: Request, guide: Any, x: Tensor) -> None:
    """Refuse arguments that are of another kind than they must be."""
    counts(1, num_particles=asked.num_particles, **given(recompute=asked.recompute))
    of_kind(Tensor, "a tensor (T, K, B, Z)", **given(z=asked.z))
    of_kind(Tensor, "a tensor (K, B, F)", **given(f=asked.f))
    of_kind(Callable, "a function as Select describes it", **given(select=asked.select))
    own = next(guide.parameters(), x) if isinstance(guide, nn.Module) else x
    if own.dtype != x.dtype:
        raise TypeError(
            f"guide must be {x.dtype} as the model is, got {own.dtype}; use guide.to({x.dtype})"
        )


def _encoded(model: SequenceProgram, guide: Any, x: Tensor, mask: Tensor, start: Any) -> Tensor:
    """c, ``(B, T, C)``; features that run through time go on from the start of a window."""
    if start is None or not model.features_go_on:
        return guide.encode(x, mask)
    if "start" not in signature(guide.encode).parameters:
        raise NotImplementedError(
            f"{type(model).__name__}: the features of x go on from window to window, so "
            f"{type(guide).__name__} must have encode(x, mask, start) and give start to features"
        )
    return guide.encode(x, mask, start)


class _Shared(NamedTuple):
    """A latent that all steps share, if the model has one and the series begins here."""

    f: Tensor | None = None  # (K, B, F)
    prior: dist.Distribution | None = None
    proposal: dist.Distribution | None = None
    log_prior: Tensor | float = 0.0  # (K, B)
    log_proposal: Tensor | float = 0.0

    def counted(self, steps: Any, extra: Tensor | float) -> Any:
        """Log-densities ``(T, K, B)``, that of f added to step 1; None where there are none."""
        if self.prior is None or steps is None:
            return steps
        return torch.cat([(steps[0] + extra).unsqueeze(0), steps[1:]])


def _share(
    model: SequenceProgram, guide: Any, x: Tensor, mask: Tensor, particles: int, asked: Request
) -> _Shared:
    shape, f = (particles, len(x), model.f_dim), asked.f
    if (asked.z is None) != (f is None) or (f is not None and f.shape != shape):
        raise ValueError(
            f"f must have shape (K, B, F) = {shape} and be given where z is, got "
            f"{None if f is None else tuple(f.shape)}"
        )
    prior, proposal = model.prior_f(Size((len(x),))), guide.proposal_f(x, mask)
    if f is None:
        f = draw(proposal.expand(Size(shape[:2])), learnable(guide))
    return _Shared(f, prior, proposal, prior.log_prob(f), proposal.log_prob(f))


def _particles(asked: Request, sizes: tuple[int, int, int]) -> int:
    """K, the number to draw, or that of given latents for (T, B, Z)."""
    z = asked.z
    if z is None:
        return asked.num_particles
    if z.ndim != 4 or (z.shape[0], z.shape[2], z.shape[3]) != sizes:
        raise ValueError(
            f"z must have shape (T, K, B, Z) = ({sizes[0]}, K, {sizes[1]}, {sizes[2]}), got "
            f"{tuple(z.shape)}"
        )
    if not z.shape[1]:
        raise ValueError("z must hold at least one particle, got K = 0")
    return z.shape[1]


class _Piece(NamedTuple):
    """Some steps of a rollout; what is not said is as in :class:`StepDensities`."""

    states: Any
    after: Any  # the state after the last of them, if it was asked for
    z: Tensor
    log_prior: Any  # None where densities are not asked for
    log_emission: Any
    log_proposal: Any
    prior: Any
    emission: Any
    proposal: Any
    log_twist: Any = 0.0


#: as :data:`Select`, but also asked after the last step, of terms without mask and f
_Chooser = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


class _Run(NamedTuple):
    """Settings that all pieces of one rollout share."""

    model: SequenceProgram
    guide: Any
    learns: bool
    compile: bool
    choose: _Chooser | None
    scored: bool | None  # None: log-densities alone will do
    sight: Any  # a twist that has read x, or None

    def piece(
        self, state: Any, c: Tensor, x: Tensor, z: Tensor | None, steps: range, go_on: bool = False
    ) -> _Piece:
        """Draws and densities of some steps, from the state before them.

        Args:
            state: every tensor ``(K, B, ...)``.
            c, x, z: of all steps, ``(T, ...)``.
            steps: which of them.
            go_on: whether the state after them is wanted.
        """
        model, guide = self.model, self.guide
        part = slice(steps.start, steps.stop)
        c, x, z = c[part], x[part], None if z is None else z[part]
        shifted, path = self._shifted(steps.start), None
        candidates: list[Tensor] = []
        estimated = shifted is not None and is_estimate(model.transition(state))
        if z is None and not estimated and self.sight is None:
            path = self._scan(state, c, x, shifted)
        scores: Sequence[Any] = ()
        if path is None:
            states, z, own, candidates = self._loop(state, c, x, z, shifted, go_on, steps.start)
        else:
            states, (z, own, scores) = path.states, path.outputs
        after = type(state)(*(tensor[-1] for tensor in states)) if go_on else None
        stacked = type(state)(*(tensor[: len(x)] for tensor in states))
        if scores:
            log_prior, log_emission, log_proposal = scores
            terms = log_prior, log_emission, log_proposal
            return _Piece(stacked, after, z, *terms, prior=None, emission=None, proposal=None)
        with _faster(x, z.shape[1]):
            prior: Any = model.transition(stacked)
            if candidates:  # the weights that chose particles are those that are summed
                prior = prior.among(torch.stack(candidates, dim=1))
            known = "loc" in own
            proposal = diagonal_normal(**own) if known else guide.proposal(stacked, c.unsqueeze(1))
            made: Any = _Piece(stacked, after, z, None, None, None, prior, None, proposal)
            if self.scored is False:
                return made
            emission = model.emission(z, stacked)
            twists = self._twists(stacked, z, x, steps.start)
        return made._replace(
            log_twist=twists,
            log_prior=prior.log_prob(z),
            log_emission=emission.log_prob(x.unsqueeze(1)),
            log_proposal=own["log_prob"] if "log_prob" in own else proposal.log_prob(z),
            emission=emission,
        )

    def _scan(self, state: Any, c: Tensor, x: Tensor, choose: _Chooser | None) -> Any:
        """All steps at once, or None where they must be taken one by one."""
        single = choose is None and state[0].shape[0] == 1  # a dimension less, for one particle
        now = type(state)(*(tensor[0] for tensor in state)) if single else state
        of, given = (self.guide, self.model, self.learns), (now, (c, x))
        path = None
        if self.scored is None and self.compile:
            step = _scored_step if choose is None else _shown_scored_step
            path = engine.scan(step, of, *given, choose=choose, compile=True)
        if path is None:
            step = _step if choose is None else _shown_step
            path = engine.scan(step, of, *given, choose=choose, compile=self.compile)
        if path is None or not single:
            return path
        return engine.Path(*pytree.tree_map(lambda tensor: tensor.unsqueeze(1), (*path,)))

    def _shifted(self, start: int) -> _Chooser | None:
        """The choice of particles, for steps counted from this one."""
        choose = self.choose
        return None if choose is None else lambda t, *terms: choose(t + start, *terms)

    def in_segments(
        self, state: Any, c: Tensor, x: Tensor, z: Tensor | None, steps: range, recompute: int
    ) -> _Piece:
        """Same as :meth:`piece`, in segments of which the backward pass keeps only the results."""
        run = self._replace(choose=None if self.choose is None else _Remembered(self.choose))

        def slim(state: Any, c: Tensor, x: Tensor, z: Tensor | None, part: range) -> _Piece:
            piece = run.piece(state, c, x, z, part, go_on=part.stop < steps.stop)
            return piece._replace(
                prior=_parameters(piece.prior), emission=None, proposal=_parameters(piece.proposal)
            )

        pieces: list[_Piece] = []
        for a in range(0, len(steps), recompute):
            part = steps[a : a + recompute]
            pieces.append(checkpoint(slim, state, c, x, z, part, use_reentrant=False))
            state = pieces[-1].after

        def normal(name: str) -> Any:
            parts = [getattr(piece, name) for piece in pieces]
            return diagonal_normal(*map(torch.cat, zip(*parts, strict=True))) if parts[0] else None

        columns = zip(*(piece.states for piece in pieces), strict=True)
        names = ["z", "log_prior", "log_emission", "log_proposal"]
        names += ["log_twist"] if self.sight is not None else []
        return pieces[0]._replace(
            states=type(pieces[0].states)(*map(torch.cat, columns)),
            after=None,
            prior=normal("prior"),
            proposal=normal("proposal"),
            **{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names},
        )

    def _loop(
        self,
        state: Any,
        c: Tensor,
        x: Tensor,
        z: Tensor | None,
        choose: _Chooser | None,
        go_on: bool,
        start: int,
    ) -> tuple[Any, Tensor, dict[str, Tensor], list[Tensor]]:
        """States and latents step by step, what is known of the proposals, and candidates.

        Candidates are those of priors whose density is an estimate, where particles are chosen.
        """
        model, length = self.model, len(x)
        states, draws, known = [state], [], []
        candidates: list[Tensor] = []
        for t in range(length):
            if z is None or choose is not None:
                q_t = self.guide.proposal(state, c[t])
            z_t = draw(q_t, self.learns) if z is None else z[t]
            if z is None:
                known.append(_told(q_t, z_t))
            draws.append(z_t)
            if choose is not None:
                with torch.no_grad():
                    prior: Any = model.transition(state)
                if is_estimate(prior):
                    candidates.append(prior.candidates)
            if t + 1 == length and not go_on:
                break
            before, state = state, model.advance(state, z_t, x[t])
            if choose is not None:  # the densities with gradients are computed once, for all steps
                terms = _terms(model, before, q_t, z_t, x[t], prior)
                if self.sight is not None:
                    terms[1] = terms[1] + self._twisted(before, state, t + start)
                parents = choose(t, *terms)
                if parents is not None:
                    state = select_particles(state, parents)
            states.append(state)
        stacked = type(state)(*map(torch.stack, zip(*states, strict=True)))
        drawn = torch.stack(draws) if z is None else z
        own = {n: torch.stack([row[n] for row in known]) for n in (known[0] if known else ())}
        return stacked, drawn, own, candidates

    def _twists(self, states: Any, z: Tensor, x: Tensor, start: int) -> Tensor | float:
        """log r_t - log r_{t-1} of steps from ``start``, ``(T, K, B)``; 0 without a twist."""
        if self.sight is None:
            return 0.0
        before = self.model.hidden(states)
        after = self.model.hidden(self.model.advance(states, z, x.unsqueeze(1)))
        all_before = self.sight.all_before
        told: Tensor = all_before(after, start + 1) - all_before(before, start)
        return told

    @torch.no_grad()
    def _twisted(self, before: Any, after: Any, t: int) -> Tensor:
        """log r_t - log r_{t-1} of step t, from 0, ``(K, B)``."""
        sight, hidden = self.sight, self.model.hidden
        told: Tensor = sight.before(hidden(after), t + 1) - sight.before(hidden(before), t)
        return told


def _drawn(guide: Any, model: Any, learns: bool, state: Any, inputs: Any) -> tuple[Any, ...]:
    """Proposal, draw z_t, observation x_t and next state of one step along the guide."""
    c_t, x_t = inputs
    proposal = guide.proposal(state, c_t)
    z_t = draw(proposal, learns)
    return proposal, z_t, x_t, model.advance(state, z_t, x_t)


def _step(guide: Any, model: Any, learns: bool, state: Any, inputs: Any) -> tuple[Any, Any]:
    """One step along the guide, in the form that the engine captures."""
    proposal, z_t, _, after = _drawn(guide, model, learns, state, inputs)
    return after, (z_t, _told(proposal, z_t), ())


def _scored_step(guide: Any, model: Any, learns: bool, state: Any, inputs: Any) -> tuple[Any, Any]:
    """One step and its log-densities."""
    proposal, z_t, x_t, after = _drawn(guide, model, learns, state, inputs)
    return after, (z_t, {}, _scores(model.transition(state), model, state, proposal, z_t, x_t))


def _shown_step(
    guide: Any, model: Any, learns: bool, state: Any, inputs: Any
) -> tuple[Any, Any, list[Tensor]]:
    """One step, with its log-densities as constants for the choice of particles."""
    proposal, z_t, x_t, after = _drawn(guide, model, learns, state, inputs)
    shown = _terms(model, state, proposal, z_t, x_t)
    return after, (z_t, _told(proposal, z_t), ()), shown


def _shown_scored_step(
    guide: Any, model: Any, learns: bool, state: Any, inputs: Any
) -> tuple[Any, Any, list[Tensor]]:
    """One step and its log-densities, which also serve, as constants, to choose particles."""
    after, outputs = _scored_step(guide, model, learns, state, inputs)
    shown = torch.broadcast_tensors(*(score.detach() for score in outputs[2]))
    return after, outputs, list(shown)


def _told(proposal: Any, z_t: Tensor) -> dict[str, Tensor]:
    """Parameters of a diagonal normal proposal, so that it need not be computed again.

    For a flow log q(z_t), as it caches the inverse of its own draw; empty for others.
    """
    if isinstance(proposal, dist.TransformedDistribution):
        return {"log_prob": proposal.log_prob(z_t)}
    if type(proposal) is dist.Independent and type(proposal.base_dist) is dist.Normal:
        if proposal.reinterpreted_batch_ndims == 1:
            return {"loc": proposal.base_dist.loc, "scale": proposal.base_dist.scale}
    return {}


@torch.no_grad()
def _terms(
    model: Any, state: Any, proposal: Any, z_t: Tensor, x_t: Tensor, prior: Any = None
) -> list[Tensor]:
    """log p(z_t), log p(x_t) and log q(z_t), constants ``(K, B)``; the prior may be given."""
    prior = model.transition(state) if prior is None else prior
    return list(torch.broadcast_tensors(*_scores(prior, model, state, proposal, z_t, x_t)))


def _scores(
    prior: Any, model: Any, state: Any, proposal: Any, z_t: Tensor, x_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    emission = model.emission(z_t, state)
    return prior.log_prob(z_t), emission.log_prob(x_t), proposal.log_prob(z_t)


def is_estimate(prior: Any) -> bool:
    """Whether a prior's density is an estimate by candidates, as a ``Refined`` one's is."""
    return hasattr(type(prior), "candidates")


class _Remembered:
    """The second time the same particles go on, and the same random numbers follow."""

    def __init__(self, choose: _Chooser) -> None:
        self.choose = choose
        self.chosen: dict[int, tuple[Tensor | None, Tensor]] = {}

    def __call__(self, t: int, *terms: Tensor) -> Tensor | None:
        cuda = terms[0].is_cuda
        if t not in self.chosen:
            parents = self.choose(t, *terms)
            state = torch.cuda.get_rng_state(terms[0].device) if cuda else torch.get_rng_state()
            self.chosen[t] = parents, state
        else:
            parents, state = self.chosen[t]
            if cuda:
                torch.cuda.set_rng_state(state, terms[0].device)
            else:
                torch.set_rng_state(state)
        return parents


def _faster(x: Tensor, particles: int) -> Any:
    """Networks of all steps go by the faster matrix products, where there are rows enough."""
    many = x.shape[0] * x.shape[1] * particles >= 512
    plain = x.dtype != torch.float32 or x.is_cuda or products.onednn() is None
    return products.Faster() if many and not plain else nullcontext()


def _chooser(select: Select | None, mask: Tensor, shared: _Shared) -> _Chooser | None:
    if select is None:
        return None

    def choose(t: int, log_prior: Tensor, log_emission: Tensor, log_proposal: Tensor) -> Any:
        if t + 1 == mask.shape[1]:
            return None  # nobody goes on
        with torch.no_grad():
            if t == 0:
                log_prior = log_prior + shared.log_prior
                log_proposal = log_proposal + shared.log_proposal
            terms = (log_prior, log_emission, log_proposal)
            return select(t, *(torch.where(mask[:, t], term, 0.0) for term in terms))

    return choose


def _started(state: Any, start: Any) -> Any:
    """The given state, if it has the shapes of the model's own."""
    of_kind(tuple, f"a {type(state).__name__} of tensors (K, B, ...)", start=start)
    here, there = ([tuple(t.shape) for t in one] for one in (state, start))
    if type(start) is not type(state) or here != there:
        raise ValueError(
            f"start must be a {type(state).__name__} of tensors (K, B, ...) of shapes {here}, got "
            f"{type(start).__name__} {there}"
        )
    return start


def _parameters(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and scale of a diagonal normal, None of others."""
    own: Any = getattr(distribution, "base_dist", None)
    return (own.loc, own.scale) if type(own) is dist.Normal else None
