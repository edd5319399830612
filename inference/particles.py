r"""Particle filters: propose, weigh, and now and then resample.

At step t every particle draws z_t from a guide and gets the weight
p(z_t, x_t | past) / q(z_t | ...). Weights multiply along a particle until the criterion asks
for resampling. Particles then go on as copies of the heavy ones, and all weights start anew.
The evidence estimate is a product with one factor for each stretch between resamplings,

.. math:: \hat Z = \prod_{s} \frac{1}{K} \sum_k \prod_{t \in s} w_t^k, \qquad E[\hat Z] = p(x),

so that log Z_hat is a bound of log p(x) in expectation: FIVO. Without resampling it is IWAE.

Sources: Maddison et al. (2017), https://arxiv.org/abs/1705.09279, algorithm 1; Naesseth et al.
(2018), https://arxiv.org/abs/1705.11140; Doucet and Johansen (2009), section 4, for the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.densities import check_batch, select_particles
from inference.protocols import (
    Stepwise,
    StepwiseGuide,
    counts,
    given,
    of_kind,
    require_stepwise,
)
from inference.random import draw, learnable
from inference.resampling import Criterion, Resampler, Selection, fresh_weights, identity
from inference.twists import Foresight
from inference.weights import effective_sample_size, log_mean_exp, normalise

#: (state before step t + 1 of the particles, x_{t+1} ``(B, X)``) -> log-weights ``(K, B)``
Auxiliary = Callable[[Any, Tensor], Tensor]


class Filtered(NamedTuple):
    """Result of a particle filter. Padded steps change no weight and no ancestor.

    With the weights ``log_weight`` the particles ``z`` represent p(z_t | x_{1:t}). The criterion
    looks at ``ess``, or, if there are auxiliary weights, at that of both weights together.
    """

    log_evidence: Tensor  # (B,), log Z_hat, nats per sequence
    log_evidence_path: Tensor  # (T, B), log of the estimate of p(x_{1:t})
    log_weight: Tensor  # (T, K, B), normalised, before resampling
    ess: Tensor  # (T, B), effective sample size in [1, K]
    resampled: Tensor  # (T, B) bool, whether particles were resampled after the step
    ancestors: Tensor  # (T, K, B), each particle's parent among those of the step before
    mean: Tensor  # (T, B, Z), filtered means, 0 where padded
    z: Tensor | None  # (T, K, B, Z), particles as they were at each step
    mask: Tensor  # (T, B) bool

    def lineage(self) -> Tensor:
        """Indices of the last particles' ancestors at every step, ``(T, K, B)``."""
        rows = [identity(self.ancestors[0])]
        for parents in self.ancestors[1:].flip(0):
            rows.append(parents.gather(0, rows[-1]))
        return torch.stack(rows[::-1])

    def trajectories(self) -> Tensor:
        """Paths z_{1:T} of the last particles, ``(T, K, B, Z)``.

        With the weights ``log_weight[-1]`` they represent p(z_{1:T} | x_{1:T}).

        Raises:
            ValueError: the filter did not keep its particles.
        """
        if self.z is None:
            raise ValueError("trajectories need the particles; filter with paths=True")
        index = self.lineage().unsqueeze(-1).expand_as(self.z)
        return self.z.gather(1, index)

    def unique_ancestors(self) -> Tensor:
        """Number of particles of each step that the last ones descend from, ``(T, B)``."""
        ordered = self.lineage().sort(dim=1).values
        return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)


class Bootstrap(nn.Module):
    """A guide without parameters that proposes from the transition of ``model``."""

    def __init__(self, model: Stepwise) -> None:
        super().__init__()
        self.transition = model.transition
        self.prior_f: Any = getattr(model, "prior_f", None)

    def encode(self, x: Tensor, mask: Tensor, start: Any = None) -> Tensor:
        """Read nothing of the data, ``(B, T, 0)``."""
        return x[..., :0]

    def proposal_f(self, x: Tensor, mask: Tensor) -> Distribution:
        """p(f), for models whose steps share a latent."""
        prior: Distribution = self.prior_f(x.shape[:1])
        return prior

    def proposal(self, state: Any, c_t: Tensor) -> Distribution:
        """p(z_t | state)."""
        return self.transition(state)


def particle_filter(
    model: Stepwise,
    guide: StepwiseGuide | None,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    num_particles: int = 128,
    resampler: str | Resampler = "systematic",
    criterion: str | Criterion = "ess",
    auxiliary: Auxiliary | None = None,
    twist: Any = None,
    paths: bool = True,
    online: bool = False,
) -> Filtered:
    """Filter sequences step by step, each with K particles; differentiable.

    Gradients are those of log Z_hat with the resampled indices held fixed, as in FIVO. Modules
    stay in their mode, so that this can train; call ``eval()`` first to filter without dropout.

    Args:
        model: a model with single steps.
        guide: a guide with single steps; None for the bootstrap filter, see :class:`Bootstrap`.
        x, mask: ``(B, T, X)``, and ``(B, T)`` bool, a prefix, or None.
        num_particles: K.
        resampler: "multinomial", "stratified", "systematic", "residual", or a function of
            normalised log-weights ``(K, B)``; those of :mod:`inference.differentiable` let
            gradients through.
        criterion: "never", "always", "ess" (below K / 2), ``ess_below(fraction)``, or a function.
        auxiliary: further log-weights, all finite, by which particles are chosen, so that
            resampling looks one step ahead; see :data:`Auxiliary`. The estimate stays unbiased
            (Pitt and Shephard 1999).
        twist: weighs particles by the future, too; see :mod:`inference.twists`. Only the evidence
            of the whole sequence is then one; weights and means before its end are those of
            p(z_t | x_{1:t}) times r.
        paths: whether to keep the particles, which ``trajectories`` needs.
        online: whether to refuse a guide that reads x after step t. The weights are right and
            Z_hat is unbiased with such a guide, too.

    Raises:
        TypeError: missing functions, which are named.
        ValueError: fewer than 1 particle, an unknown resampler or criterion, a guide that cannot
            filter online, or x or mask of another shape.
        DegenerateWeightsError: all weights of a step are zero or one is not a number.
        NotImplementedError: gradients of a guide that is not reparameterised.
    """
    if guide is None and hasattr(model, "transition"):
        guide = Bootstrap(model)
    require_stepwise(model, guide)
    assert guide is not None  # refused above
    counts(1, num_particles=num_particles)
    of_kind(Callable, "a function of state and x", **given(auxiliary=auxiliary))
    if online:
        _require_online(guide)
    x, mask = check_batch(model, x, mask)
    selection = Selection(resampler, criterion, mask)
    sight = None if twist is None else Foresight.of(twist, x, mask)
    run = _Filter(model, guide, x, mask, guide.encode(x, mask), selection, auxiliary, sight)
    cloud = run.start(num_particles)
    rows: list[tuple[Tensor, ...]] = []
    draws: list[Tensor] = []
    for t in range(mask.shape[1]):
        z_t, log_weight = run.propose(cloud, t)
        normal = normalise(log_weight, t + 1)
        mean = (normal.exp().unsqueeze(-1) * z_t).sum(dim=0)
        mean = torch.where(mask[:, t].unsqueeze(-1), mean, 0.0)
        path = cloud.done + log_mean_exp(log_weight, dim=0)
        ancestors, due = cloud.ancestors, torch.zeros_like(mask[:, t])
        if t + 1 < mask.shape[1]:
            cloud, due = run.advance(cloud, z_t, log_weight, normal, t)
        rows.append((path, normal, effective_sample_size(normal), due, ancestors, mean))
        if paths:
            draws.append(z_t)
    path, log_weight, ess, due, ancestors, mean = map(torch.stack, zip(*rows, strict=True))
    z = torch.stack(draws) if paths else None
    return Filtered(path[-1], path, log_weight, ess, due, ancestors, mean, z, mask.t())


def _require_online(guide: Any) -> None:
    """Refuse a guide that reads the future."""
    if getattr(guide, "smoothing", False):
        raise ValueError(
            f"guide {type(guide).__name__} reads x after step t (a smoothing guide), so it cannot "
            "filter online; use one that reads the past and x_t, such as FilteringGuide, or None "
            "for the bootstrap filter"
        )


class _Cloud(NamedTuple):
    """Particles as they enter a step."""

    state: Any  # tensors (K, B, ...)
    log_weight: Tensor  # (K, B), summed since the last resampling
    done: Tensor  # (B,), log of the factors of finished stretches
    ancestors: Tensor  # (K, B), parents among the particles of the step before


class _Filter(NamedTuple):
    """Parts that all steps of one filter share."""

    model: Any
    guide: Any
    x: Tensor
    mask: Tensor
    c: Tensor
    selection: Selection
    auxiliary: Auxiliary | None
    sight: Foresight | None

    def start(self, num_particles: int) -> _Cloud:
        """Particles before step 1; a latent that all steps share is drawn and weighed here."""
        size = self.mask.shape[0]
        log_weight = self.x.new_zeros(num_particles, size)
        state = self.model.init(log_weight.shape)
        if getattr(self.model, "f_dim", 0):
            q_f = self.guide.proposal_f(self.x, self.mask).expand(log_weight.shape)
            f = draw(q_f, learnable(self.guide))
            ratio = self.model.prior_f(log_weight.shape).log_prob(f) - q_f.log_prob(f)
            log_weight = torch.where(self.mask[:, 0], ratio, 0.0)
            state = self.model.condition(state, f)
        return _Cloud(state, log_weight, self.x.new_zeros(size), identity(log_weight))

    def propose(self, cloud: _Cloud, t: int) -> tuple[Tensor, Tensor]:
        """Draws ``(K, B, Z)`` of step t, from 0, and log-weights ``(K, B)`` that include it."""
        q_t = self.guide.proposal(cloud.state, self.c[:, t])
        z_t = draw(q_t, learnable(self.guide))
        step = (
            self.model.transition(cloud.state).log_prob(z_t)
            + self.model.emission(z_t, cloud.state).log_prob(self.x[:, t])
            - q_t.log_prob(z_t)
        )
        if self.sight is not None:
            after = self.model.advance(cloud.state, z_t, self.x[:, t])
            step = step + self.sight.before(self.model.hidden(after), t + 1)
            step = step - self.sight.before(self.model.hidden(cloud.state), t)
        return z_t, cloud.log_weight + torch.where(self.mask[:, t], step, 0.0)

    def advance(
        self, cloud: _Cloud, z_t: Tensor, log_weight: Tensor, normal: Tensor, t: int
    ) -> tuple[_Cloud, Tensor]:
        """Particles that enter the next step, and where they were resampled, ``(B,)`` bool."""
        state = self.model.advance(cloud.state, z_t, self.x[:, t])
        chosen, favour = normal, torch.zeros_like(normal)
        if self.auxiliary is not None:
            favour = self.auxiliary(state, self.x[:, t + 1])
            of_kind(Tensor, "log-weights (K, B)", **{"what auxiliary gives": favour})
            if favour.shape != normal.shape or not bool(favour.isfinite().all()):
                raise ValueError(
                    f"auxiliary must give finite log-weights (K, B) = {tuple(normal.shape)}, got "
                    f"{tuple(favour.shape)}, all finite: {bool(favour.isfinite().all())}"
                )
            favour = torch.where(self.mask[:, t + 1], favour, 0.0)
            chosen = normalise(normal + favour, t + 1)
        if hasattr(self.selection.resampler, "move"):
            return self._moved(cloud, state, log_weight, normal, t)
        due, parents = self.selection.decide(chosen.detach(), t)
        if parents is None:
            return _Cloud(state, log_weight, cloud.done, identity(normal)), due
        # the auxiliary weight that a particle was chosen by is taken back
        factor, fresh = log_mean_exp(log_weight + favour, dim=0), -favour.gather(0, parents)
        fresh = fresh + fresh_weights(self.selection.resampler, chosen, parents)
        done = cloud.done + torch.where(due, factor, 0.0)
        log_weight = torch.where(due, fresh, log_weight)
        return _Cloud(select_particles(state, parents), log_weight, done, parents), due

    def _moved(
        self, cloud: _Cloud, state: Any, log_weight: Tensor, normal: Tensor, t: int
    ) -> tuple[_Cloud, Tensor]:
        """The same for a resampler that moves particles instead of choosing among them."""
        if self.auxiliary is not None:
            raise NotImplementedError(
                "a resampler that moves particles takes no auxiliary weights; leave auxiliary out"
            )
        resampler: Any = self.selection.resampler
        due = self.selection.due(normal.detach(), t)
        if not bool(due.any()):
            return _Cloud(state, log_weight, cloud.done, identity(normal)), due
        done = cloud.done + torch.where(due, log_mean_exp(log_weight, dim=0), 0.0)
        log_weight = torch.where(due, 0.0, log_weight)
        return _Cloud(resampler.move(state, normal, due), log_weight, done, identity(normal)), due
