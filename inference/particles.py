r"""Particle filters: propose, weigh, and now and then resample.

At step t every particle draws z_t from a guide and gets the weight
p(z_t, x_t | past) / q(z_t | ...). Weights multiply along a particle until the criterion asks
for resampling: particles then go on as copies of the heavy ones, and all weights start anew.
The estimate of the evidence is a product with one factor for each stretch between resamplings,

.. math:: \hat Z = \prod_{s} \frac{1}{K} \sum_k \prod_{t \in s} w_t^k, \qquad E[\hat Z] = p(x),

so that log Z_hat is a bound of log p(x) in expectation: FIVO. Without resampling it is IWAE.

Sources: Maddison et al. (2017), https://arxiv.org/abs/1705.09279, algorithm 1; Naesseth et al.
(2018), https://arxiv.org/abs/1705.11140; Doucet and Johansen (2009), section 4, for the rest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inference.densities import check_mask, select_particles
from inference.protocols import require_stepwise
from inference.random import draw, learnable
from inference.weights import effective_sample_size, log_mean_exp, normalise

#: normalised log-weights ``(K, B)`` -> bool ``(B,)``: whether to resample
Criterion = Callable[[Tensor], Tensor]
#: normalised log-weights ``(K, B)`` -> indices ``(K, B)`` of the particles that go on
Resampler = Callable[[Tensor], Tensor]
#: (state before step t + 1 of the particles, x_{t+1} ``(B, X)``) -> log-weights ``(K, B)``
Auxiliary = Callable[[Any, Tensor], Tensor]


def never(log_weight: Tensor) -> Tensor:
    """No resampling; the filter is importance sampling, and consumes no further randomness."""
    return log_weight.new_zeros(log_weight.shape[1:], dtype=torch.bool)


def always(log_weight: Tensor) -> Tensor:
    """Resampling after every step."""
    return log_weight.new_ones(log_weight.shape[1:], dtype=torch.bool)


def ess_below(fraction: float = 0.5) -> Criterion:
    """Resampling where the effective sample size is below ``fraction`` of the particles.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")

    def criterion(log_weight: Tensor) -> Tensor:
        # of normalised weights the effective sample size is 1 / sum w^2
        return (2 * log_weight).logsumexp(dim=0).neg().exp() < fraction * log_weight.shape[0]

    return criterion


def multinomial(log_weight: Tensor) -> Tensor:
    """Independent draws."""
    return _invert(log_weight, torch.rand_like(log_weight))


def stratified(log_weight: Tensor) -> Tensor:
    """One draw in each of K equal parts of the unit interval."""
    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight)))


def systematic(log_weight: Tensor) -> Tensor:
    """One draw, and K points at equal distances from it."""
    return _invert(log_weight, _grid(log_weight, torch.rand_like(log_weight[:1])))


CRITERIA: dict[str, Criterion] = {"never": never, "always": always, "ess": ess_below(0.5)}
RESAMPLERS: dict[str, Resampler] = {f.__name__: f for f in (multinomial, stratified, systematic)}


def _grid(log_weight: Tensor, uniform: Tensor) -> Tensor:
    steps = torch.arange(len(log_weight), device=log_weight.device).unsqueeze(1)
    return (steps + uniform) / len(log_weight)


def _invert(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """The particles at these points of the cumulative weights; one of weight zero is at none."""
    cumulative = log_weight.detach().exp().cumsum(dim=0).t().contiguous()
    cumulative = cumulative / cumulative[:, -1:]
    points = uniform.clamp(max=1.0 - torch.finfo(uniform.dtype).eps).t().contiguous()
    return torch.searchsorted(cumulative, points, right=True).t()


def pick(argument: str, value: Any, known: dict[str, Any]) -> Any:
    """A function by its name, or the function given.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if callable(value):
        return value
    if value not in known:
        raise ValueError(
            f"{argument} must be one of {', '.join(known)}, or a function, got {value!r}"
        )
    return known[value]


class Selection:
    """Decides after each step which particles go on, and remembers it: a rollout's ``select``.

    Args:
        resampler: a name of ``RESAMPLERS`` or a function like those.
        criterion: a name of ``CRITERIA`` or a function like those.
        mask: ``(B, T)`` bool, or None where every step is observed. A sequence that has ended
            is not resampled any more.
        kl_weight: exponent of p(z_t) / q(z_t) in the weights that decide.

    Attributes:
        resampled: for every step but the last, where particles were resampled after it, ``(B,)``.
        parents: for every such step indices ``(K, B)``, or None where no sequence resampled.
    """

    def __init__(
        self,
        resampler: str | Resampler,
        criterion: str | Criterion,
        mask: Tensor | None = None,
        kl_weight: float = 1.0,
    ) -> None:
        self.resampler = pick("resampler", resampler, RESAMPLERS)
        self.criterion = pick("criterion", criterion, CRITERIA)
        self.mask, self.kl_weight = mask, kl_weight
        self.resampled: list[Tensor] = []
        self.parents: list[Tensor | None] = []
        self._log_weight: Tensor | None = None

    def __call__(
        self, t: int, log_prior: Tensor, log_emission: Tensor, log_proposal: Tensor
    ) -> Tensor | None:
        """The particles that go on from step t, counted from 0."""
        log_weight = temper(log_prior, log_emission, log_proposal, self.kl_weight)
        if self._log_weight is not None:
            log_weight = self._log_weight + log_weight
        due, parents = self.decide(normalise(log_weight, t + 1), t)
        self._log_weight = log_weight if parents is None else torch.where(due, 0.0, log_weight)
        self.resampled.append(due)
        self.parents.append(parents)
        return parents

    def events(self, log_weight: Tensor) -> Tensor:
        """Where particles were resampled, ``(T - 1, B)`` bool, for log-weights (T, K, B)."""
        if self.resampled:
            return torch.stack(self.resampled)
        return log_weight.new_zeros(0, log_weight.shape[-1], dtype=torch.bool)

    def decide(self, log_weight: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        """Where to resample ``(B,)``, given normalised log-weights, and the parents if any."""
        due = self.criterion(log_weight)
        if self.mask is not None:
            due = due & self.mask[:, t + 1]
        if not bool(due.any()):
            return due, None
        particles = torch.arange(len(log_weight), device=log_weight.device).unsqueeze(1)
        return due, torch.where(due, self.resampler(log_weight), particles)


def temper(
    log_prior: Tensor, log_emission: Tensor, log_proposal: Tensor, kl_weight: float
) -> Tensor:
    """log p(x | z) + kl_weight * (log p(z) - log q(z)): the log-weight if ``kl_weight`` is 1."""
    if kl_weight == 1.0:
        return log_prior + log_emission - log_proposal
    if kl_weight == 0.0:  # 0 times an infinite ratio is no number
        return log_emission
    return log_emission + kl_weight * (log_prior - log_proposal)


def stretches(log_weight: Tensor, resampled: Tensor) -> Tensor:
    """Log-weights summed between resamplings.

    Args:
        log_weight: ``(T, K, B)``, 0 where padded; particles as they were at each step.
        resampled: ``(T - 1, B)`` bool, whether particles were resampled after a step.

    Returns:
        ``(S, K, B)``, S the largest number of stretches of a sequence; 0 where one has fewer.
    """
    count = torch.nn.functional.pad(resampled.long().cumsum(dim=0), (0, 0, 1, 0))  # (T, B)
    sums = log_weight.new_zeros(int(count.max()) + 1, *log_weight.shape[1:])
    return sums.scatter_add(0, count.unsqueeze(1).expand_as(log_weight), log_weight)


def fivo(log_weight: Tensor, resampled: Tensor) -> Tensor:
    """log Z_hat of a particle filter, shape (B,): a bound of log p(x) in expectation.

    Args:
        log_weight: ``(T, K, B)``, each step's own, 0 where padded.
        resampled: ``(T - 1, B)`` bool, whether particles were resampled after a step.

    Source: Maddison et al. (2017), eq. 4 and algorithm 1.
    """
    return log_mean_exp(stretches(log_weight, resampled), dim=1).sum(dim=0)


class Filtered(NamedTuple):
    """What a particle filter saw. Padded steps change no weight and no ancestor.

    ``log_weight`` are the normalised weights after each step and before resampling, with which
    the particles ``z`` stand for p(z_t | x_{1:t}); ``ess`` is theirs. With auxiliary weights the
    criterion looks at both together, and may resample above its threshold of ``ess``.
    """

    log_evidence: Tensor  # (B,), log Z_hat, nats a sequence
    log_evidence_path: Tensor  # (T, B), log of the estimate of p(x_{1:t})
    log_weight: Tensor  # (T, K, B)
    ess: Tensor  # (T, B), effective sample size in [1, K]
    resampled: Tensor  # (T, B) bool, whether particles were resampled after the step
    ancestors: Tensor  # (T, K, B), each particle's parent among those of the step before
    mean: Tensor  # (T, B, Z), filtered means, 0 where padded
    z: Tensor | None  # (T, K, B, Z), particles as they were at each step
    mask: Tensor  # (T, B) bool

    def lineage(self) -> Tensor:
        """Index at every step of the last particles' ancestors, ``(T, K, B)``."""
        last = torch.arange(self.ancestors.shape[1], device=self.ancestors.device)
        rows = [last.unsqueeze(1).expand(self.ancestors.shape[1:])]
        for parents in self.ancestors[1:].flip(0):
            rows.append(parents.gather(0, rows[-1]))
        return torch.stack(rows[::-1])

    def trajectories(self) -> Tensor:
        """Paths z_{1:T} of the last particles, ``(T, K, B, Z)``, by tracing their ancestors.

        With the weights ``log_weight[-1]`` they stand for p(z_{1:T} | x_{1:T}).

        Raises:
            ValueError: a filter that was told not to keep its particles.
        """
        if self.z is None:
            raise ValueError("trajectories need the particles; filter with paths=True")
        index = self.lineage().unsqueeze(-1).expand_as(self.z)
        return self.z.gather(1, index)

    def unique_ancestors(self) -> Tensor:
        """How many different particles of each step the last ones descend from, ``(T, B)``."""
        ordered = self.lineage().sort(dim=1).values
        return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)


class Bootstrap(nn.Module):
    """The transition as proposal: a guide for models that have none; it owns no parameters.

    Args:
        model: lends its transition.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.transition = model.transition
        self.prior_f: Any = getattr(model, "prior_f", None)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Nothing is read of the data."""
        return x[..., :0]

    def proposal_f(self, x: Tensor, mask: Tensor) -> Any:
        """p(f), for models whose steps share a latent."""
        return self.prior_f(x.shape[:1])

    def proposal(self, state: Any, c_t: Tensor) -> Any:
        """p(z_t | state)."""
        return self.transition(state)


def particle_filter(
    model: Any,
    guide: Any,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    num_particles: int = 128,
    resampler: str | Resampler = "systematic",
    criterion: str | Criterion = "ess",
    auxiliary: Auxiliary | None = None,
    paths: bool = True,
    online: bool = False,
) -> Filtered:
    r"""Filter sequences step by step, each with K particles; differentiable.

    Gradients are those of log Z_hat with the resampled indices held fixed, as FIVO takes them.

    Args:
        model: has ``init``, ``transition``, ``emission`` and ``advance``.
        guide: has ``encode`` and ``proposal``; None for the bootstrap filter, whose proposal is
            the model's transition.
        x: ``(B, T, X)``.
        mask: ``(B, T)`` bool, a prefix, or None.
        num_particles: K.
        resampler: "multinomial", "stratified", "systematic", or a function of normalised
            log-weights ``(K, B)``.
        criterion: "never", "always", "ess" (below K / 2), ``ess_below(fraction)``, or a function.
        auxiliary: log-weights by which particles are chosen beside their own, from the state
            they enter step t + 1 with and x_{t+1}, all finite: those to come are favoured
            already when resampling, and the estimate stays unbiased (Pitt and Shephard 1999).
        paths: whether to keep the particles, which ``trajectories`` needs.
        online: whether what is said of step t must not depend on x after t; refuses guides that
            have read the future. (With them, too, the weights are right and log Z_hat unbiased.)

    Raises:
        TypeError: functions are missing; they are named.
        ValueError: fewer than 1 particle, or an unknown resampler or criterion.
        DegenerateWeightsError: all weights of a step are zero or one is not a number.
        NotImplementedError: gradients of a guide that is not reparameterised.
    """
    if guide is None and hasattr(model, "transition"):
        guide = Bootstrap(model)
    require_stepwise(model, guide)
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}")
    if online and getattr(guide, "smoothing", False):
        raise ValueError(
            f"guide {type(guide).__name__} reads x after step t (a smoothing guide), so it cannot "
            "filter online; use one that reads the past and x_t, such as FilteringGuide, or None "
            "for the bootstrap filter"
        )
    x, mask = getattr(model, "check", _checked)(x, mask)
    learns = learnable(guide)
    selection = Selection(resampler, criterion, mask)
    size, length = mask.shape
    identity = torch.arange(num_particles, device=x.device).unsqueeze(1).expand(-1, size)
    c = guide.encode(x, mask)
    state = model.init(torch.Size((num_particles, size)))
    log_weight = x.new_zeros(num_particles, size)
    if getattr(model, "f_dim", 0):  # a latent that all steps share, weighed with step 1
        q_f = guide.proposal_f(x, mask).expand(log_weight.shape)
        f = draw(q_f, learns)
        ratio = model.prior_f(log_weight.shape).log_prob(f) - q_f.log_prob(f)
        log_weight = torch.where(mask[:, 0], ratio, 0.0)
        state = model.condition(state, f)
    done = x.new_zeros(size)  # log of the factors of finished stretches
    parents: Tensor | None = None
    rows: list[tuple[Tensor, ...]] = []
    draws: list[Tensor] = []
    for t in range(length):
        observed = mask[:, t]
        q_t = guide.proposal(state, c[:, t])
        z_t = draw(q_t, learns)
        step = (
            model.transition(state).log_prob(z_t)
            + model.emission(z_t, state).log_prob(x[:, t])
            - q_t.log_prob(z_t)
        )
        log_weight = log_weight + torch.where(observed, step, 0.0)
        normalised = normalise(log_weight, t + 1)
        mean = (normalised.exp().unsqueeze(-1) * z_t).sum(dim=0)
        ancestors = identity if parents is None else parents
        path = done + log_mean_exp(log_weight, dim=0)
        ess = effective_sample_size(normalised)
        due, parents = torch.zeros_like(observed), None
        if t + 1 < length:
            state = model.advance(state, z_t, x[:, t])
            chosen, favour = normalised, None
            if auxiliary is not None:
                favour = torch.where(mask[:, t + 1], auxiliary(state, x[:, t + 1]), 0.0)
                chosen = normalise(normalised + favour, t + 1)
            due, parents = selection.decide(chosen.detach(), t)
            if parents is not None:
                state = select_particles(state, parents)
                factor, fresh = log_mean_exp(log_weight, dim=0), torch.zeros_like(log_weight)
                if favour is not None:  # what a particle was favoured by is taken back
                    factor = log_mean_exp(log_weight + favour, dim=0)
                    fresh = -favour.gather(0, parents)
                done = done + torch.where(due, factor, 0.0)
                log_weight = torch.where(due, fresh, log_weight)
        rows.append(
            (path, normalised, ess, due, ancestors, torch.where(observed.unsqueeze(-1), mean, 0.0))
        )
        if paths:
            draws.append(z_t)
    path, normal, ess, resampled, ancestors, means = map(torch.stack, zip(*rows, strict=True))
    return Filtered(
        log_evidence=path[-1],
        log_evidence_path=path,
        log_weight=normal,
        ess=ess,
        resampled=resampled,
        ancestors=ancestors,
        mean=means,
        z=torch.stack(draws) if paths else None,
        mask=mask.t(),
    )


def _checked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Data and prefix mask, padding overwritten, for models that do not look themselves."""
    if x.ndim != 3 or 0 in x.shape[:2]:
        raise ValueError(f"x must have shape (B, T, X), got {tuple(x.shape)}")
    if mask is None:
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)
    mask = check_mask(mask, x.shape[:2])
    return torch.where(mask.unsqueeze(-1), x, 0.0), mask
