"""The joint density of model and guide with time as a batch dimension: the fast path.

The guide's recurrence runs once and draws the latents; every density is then computed for all
steps together. Values and gradients equal those of the ``pyro.markov`` loops of
:mod:`pyro_avrnn.sequence` to round-off, for every model and guide (with dropout: in evaluation
mode).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor

if TYPE_CHECKING:
    from pyro_avrnn.sequence import SequenceGuide, SequenceModel


#: (t from 0, log p(z_t), log p(x_t), log q(z_t)), each (K, B) and constant -> the step-t particles
#: that go on, ``(K, B)`` indices, or None for all as they are
Select = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


class StepDensities(NamedTuple):
    """What guide and model say of every step; padded steps have log-density 0.

    Shapes are ``(T, K, B)`` and event dimensions, unless stated. ``states`` is the model's own
    NamedTuple with every tensor stacked; ``c`` is what the guide's ``encode`` gave.
    """

    z: Tensor  # (T, K, B, Z), drawn by the guide, or given
    h: Tensor  # (T, K, B, H), the state's summary before step t
    x: Tensor  # (T, 1, B, X)
    mask: Tensor  # (T, 1, B) bool
    log_prior: Tensor
    log_emission: Tensor
    log_proposal: Tensor
    prior: dist.Distribution
    emission: dist.Distribution
    proposal: dist.Distribution
    states: Any
    c: Tensor  # (T, 1, B, C)
    # of a latent that all steps share; its densities are in those of step 1, too
    f: Tensor | None = None  # (K, B, F)
    prior_f: dist.Distribution | None = None
    proposal_f: dist.Distribution | None = None

    @property
    def log_weight(self) -> Tensor:
        """log p(x_t, z_t | past) - log q(z_t | ...), ``(T, K, B)``, nats."""
        return self.log_prior + self.log_emission - self.log_proposal


def rollout(
    model: "SequenceModel",
    guide: "SequenceGuide",
    x: Tensor,
    mask: Tensor,
    num_particles: int = 1,
    z: Tensor | None = None,
    f: Tensor | None = None,
    select: Select | None = None,
) -> StepDensities:
    """Draw (or take) latents along the guide and score them under model and guide.

    Args:
        model: the four functions.
        guide: the two functions.
        x: ``(B, T, X)``, padding overwritten by a value in the emission's support.
        mask: ``(B, T)`` bool.
        num_particles: K.
        z: ``(T, K, B, Z)`` to be scored, or None to draw from the guide; draws consume the
            random numbers that the guide's own loop would.
        f: ``(K, B, F)``, given with ``z`` where the model has a latent that all steps share.
        select: called after every step; says which particles go on from it, as a particle
            filter resamples. Row t of the result holds the particles as they were at step t.

    Raises:
        NotImplementedError: a guide with parameters to learn that is not reparameterised.
        ValueError: ``num_particles`` below 1, or ``z`` of another shape.
    """
    size, length = mask.shape
    if z is None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}")
    elif z.ndim != 4 or (z.shape[0], z.shape[2], z.shape[3]) != (length, size, model.z_dim):
        raise ValueError(
            f"z must have shape (T, K, B, Z) = ({length}, K, {size}, {model.z_dim}), "
            f"got {tuple(z.shape)}"
        )
    particles = num_particles if z is None else z.shape[1]
    if particles < 1:
        raise ValueError("z must hold at least one particle, got K = 0")
    learns = torch.is_grad_enabled() and any(
        p.requires_grad for p in getattr(guide, "parameters", tuple)()
    )
    state = model.init(Size((particles, size)))
    prior_f = proposal_f = None
    of_f: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)  # log p(f), log q(f)
    if model.f_dim:
        shape = (particles, size, model.f_dim)
        if (z is None) != (f is None) or (f is not None and f.shape != shape):
            raise ValueError(
                f"f must have shape (K, B, F) = {shape} and be given where z is, got "
                f"{None if f is None else tuple(f.shape)}"
            )
        prior_f = model.prior_f(Size((size,)))
        proposal_f = guide.proposal_f(x, mask)
        if f is None:
            f = _draw(proposal_f.expand(Size((particles, size))), learns)
        state = model.condition(state, f)
        of_f = (prior_f.log_prob(f), proposal_f.log_prob(f))
    c = guide.encode(x, mask)  # (B, T, C)
    states, draws, cached = [], [], []
    for t in range(length):
        if z is None or select is not None:
            q_t = guide.proposal(state, c[:, t])
        if z is None:
            z_t = _draw(q_t, learns)
            if isinstance(q_t, dist.TransformedDistribution):
                cached.append(q_t.log_prob(z_t))  # the flow remembers how it came to this draw
        else:
            z_t = z[t]
        states.append(state)
        draws.append(z_t)
        if t + 1 == length:
            break
        before, state = state, model.advance(state, z_t, x[:, t])
        if select is not None:
            with torch.no_grad():  # the densities with gradients are computed once, below
                log_prior = model.transition(before).log_prob(z_t)
                log_proposal = q_t.log_prob(z_t)
                if t == 0:
                    log_prior, log_proposal = log_prior + of_f[0], log_proposal + of_f[1]
                log_emission = model.emission(z_t, before).log_prob(x[:, t])
                terms = (log_prior, log_emission, log_proposal)
                parents = select(t, *(torch.where(mask[:, t], term, 0.0) for term in terms))
            if parents is not None:
                state = _gather(state, parents)
    stacked = type(state)(*map(torch.stack, zip(*states, strict=True)))
    draws_all = torch.stack(draws) if z is None else z
    x_all = x.transpose(0, 1).unsqueeze(1)
    c_all = c.transpose(0, 1).unsqueeze(1)
    observed = mask.t().unsqueeze(1)
    prior = model.transition(stacked)
    emission = model.emission(draws_all, stacked)
    proposal = guide.proposal(stacked, c_all)
    log_prior = prior.log_prob(draws_all)
    log_proposal = torch.stack(cached) if cached else proposal.log_prob(draws_all)
    if model.f_dim:
        log_prior, log_proposal = (
            torch.cat([(term[0] + extra).unsqueeze(0), term[1:]])
            for term, extra in zip((log_prior, log_proposal), of_f, strict=True)
        )
    return StepDensities(
        z=draws_all,
        h=model.hidden(stacked),
        x=x_all,
        mask=observed,
        log_prior=torch.where(observed, log_prior, 0.0),
        log_emission=torch.where(observed, emission.log_prob(x_all), 0.0),
        log_proposal=torch.where(observed, log_proposal, 0.0),
        prior=prior,
        emission=emission,
        proposal=proposal,
        states=stacked,
        c=c_all,
        f=f,
        prior_f=prior_f,
        proposal_f=proposal_f,
    )


def _draw(proposal: dist.Distribution, learns: bool) -> Tensor:
    if learns and not proposal.has_rsample:
        raise NotImplementedError(
            f"the guide's {type(proposal).__name__} is not reparameterised, so its parameters "
            "would get no gradient; pyro.infer.Trace_ELBO takes such guides"
        )
    return proposal.rsample() if proposal.has_rsample else proposal.sample()


def _gather(state: Any, parents: Tensor) -> Any:
    """Of every tensor ``(K, B, ...)`` the particles ``parents`` (K, B)."""
    particles, size = parents.shape
    flat = (parents * size + torch.arange(size, device=parents.device)).reshape(-1)
    return type(state)(
        *(
            value.reshape(particles * size, -1).index_select(0, flat).view_as(value)
            for value in state
        )
    )
