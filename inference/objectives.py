"""Bounds on log p(x_{1:T}), in nats, and the losses for ``pyro.infer.SVI`` made of them.

The functions take log-weights of shape ``(T, K, B)`` and return one bound a sequence. The
classes are callables ``(model, guide, x, mask) -> loss``: the negative objective, summed over
the batch as Pyro's own losses are. What the last call was made of is in ``terms``.

In expectation ELBO <= IWAE-K <= log p(x) and FIVO-K <= log p(x); on long series FIVO-K, which
resamples, usually lies above IWAE-K.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from inference.divergences import normal_parameters
from inference.particles import (
    CRITERIA,
    RESAMPLERS,
    Criterion,
    Resampler,
    Selection,
    fivo,
    multinomial,
    pick,
    stretches,
    systematic,
    temper,
)
from inference.densities import StepDensities, select_particles
from inference.protocols import HasRollout, Penalty, require_stepwise
from inference.schedules import Clock, Schedule
from inference.traces import step_densities
from inference.weights import log_mean_exp, normalise, require_usable


def elbo(log_weight: Tensor) -> Tensor:
    """Evidence lower bound, shape (B,)."""
    return log_weight.sum(dim=0).mean(dim=0)


def iwae(log_weight: Tensor) -> Tensor:
    """Importance-weighted bound, shape (B,). Source: Burda et al. (2016), eq. 8."""
    return log_mean_exp(log_weight.sum(dim=0), dim=0)


def reconstruction(densities: StepDensities) -> Tensor:
    """E_q log p(x | z), shape (B,)."""
    return densities.log_emission.sum(dim=0).mean(dim=0)


def rate(densities: StepDensities, *, analytic: bool = False) -> Tensor:
    """KL(q || p) along the guide's path, shape (B,): sampled, or each step's in closed form.

    Raises:
        NotImplementedError: ``analytic`` for families whose KL has no closed form.
    """
    if not analytic:
        return (densities.log_proposal - densities.log_prior).sum(dim=0).mean(dim=0)
    return analytic_kl(densities).sum(dim=0).mean(dim=0)


def analytic_kl(densities: StepDensities) -> Tensor:
    """KL(q(z_t | ...) || p(z_t | ...)) in closed form, ``(T, K, B)``, 0 where padded.

    The KL of a latent that all steps share is counted with step 1.

    Raises:
        NotImplementedError: families whose KL has no closed form.
    """
    if densities.proposal is None or densities.prior is None:
        raise NotImplementedError(
            "analytic_kl needs a proposal and a prior that are diagonal normals at every step; "
            "use the sampled KL, analytic_kl=False"
        )
    try:
        kl = kl_divergence(densities.proposal, densities.prior)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; use the sampled KL, analytic_kl=False") from error
    if (prior_f := getattr(densities, "prior_f", None)) is not None:  # counted with step 1
        of_f = kl_divergence(densities.proposal_f, prior_f)  # type: ignore[attr-defined]
        kl = torch.cat([(kl[0] + of_f).unsqueeze(0), kl[1:]])
    return kl.where(densities.mask, 0.0)


@dataclass(kw_only=True)
class Objective:
    """A bound as a ``loss`` for ``pyro.infer.SVI``, negative and summed over the batch.

    With ``kl_weight`` other than 1 the prior and the proposal enter the weights with that
    exponent, and the value is that of the weighted objective and no bound. Penalties of
    ``penalties`` are subtracted: each is an average over observed frames, multiplied by
    their number, so that a weight of 1 prices a unit of distance in a frame at one nat.

    A series too long for one backward pass is taken window by window: ``svi.step(x, mask,
    start=state, carry=True)`` leaves in ``after`` the ``start`` of the next window, as
    ``fit(truncate=)`` does it.

    Args:
        num_particles: K draws a sequence.
        kl_weight: a number, or a schedule over the run such as ``Ramp(0, 1, over=0.5)``.
        penalties: penalties with their weights, such as ``Adversarial``.
        clock: counts calls with gradients; give its ``total`` if ``fit`` does not train.
        recompute: for long sequences, the number of steps between states that are kept: the
            backward pass computes the steps between them a second time, so that memory grows
            with T / recompute + recompute and not with T; None keeps everything.
        compile: run the recurrence in compiled chunks of steps, worth it where steps are small;
            needs a C++ compiler, takes half a minute once, and is kept on disk.
    """

    num_particles: int = 1
    kl_weight: float | Schedule = 1.0
    penalties: Sequence[Penalty] = ()
    clock: Clock = field(default_factory=Clock)
    recompute: int | None = None
    compile: bool = False
    terms: dict[str, Tensor | float] = field(default_factory=dict, init=False, repr=False)
    after: Any = field(default=None, init=False, repr=False)
    bound: ClassVar[str] = ""  # name of its value in terms; the ELBO is there anyway

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {self.num_particles}")
        if self.recompute is not None and self.recompute < 1:
            raise ValueError(f"recompute must be at least 1 step, got {self.recompute}")

    @property
    def options(self) -> dict[str, Any]:
        """What a rollout is told beside the number of particles."""
        given = {"recompute": self.recompute, "compile": self.compile or None}
        return {name: value for name, value in given.items() if value is not None}

    def __call__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        start: Any = None,
        carry: bool = False,
    ) -> Tensor:
        """The loss, nats summed over the batch.

        Args:
            model: a Pyro program.
            guide: a Pyro program over the same latents.
            args: what both are called with, ``(x, mask)``.
            start: the state before step 1 of a series that goes on, tensors ``(K, B, ...)``.
            carry: whether to leave the state after the last step in ``after``.

        Raises:
            DegenerateWeightsError: the objective is not finite, from the step and sequence on
                that are named.
        """
        given = {} if start is None else {"start": start}
        densities = self.draw(model, guide, *args, **given)
        loss = self.loss(densities)
        self.after = self.carry(model, densities) if carry else None
        if loss.requires_grad:
            loss = loss + self.correction(densities, model, guide)
            self.clock.calls += 1
        return loss

    def draw(self, model: Any, guide: Any, *args: Any, **given: Any) -> StepDensities:
        """Densities of every step, ``(T, K, B)``, latents drawn from the guide."""
        given = {"num_particles": self.num_particles, **self.options, **given}
        return step_densities(model, guide, *args, **given)

    @torch.no_grad()
    def carry(self, model: Any, densities: Any) -> Any:
        """The state after the last step, constant, of the particles that go on from there."""
        states = densities.states
        last = type(states)(*(tensor[-1] for tensor in states))
        state = model.advance(last, densities.z[-1], densities.x[-1])
        parents = self.survivors(densities)
        if parents is not None:
            state = select_particles(state, parents)
        # a copy: what advance gives may be a view of a parameter, which the update then changes
        return type(state)(*(tensor.detach().clone() for tensor in state))

    def survivors(self, densities: StepDensities) -> Tensor | None:
        """Which particles go on after the last step, indices ``(K, B)``; None: all as they are.

        Right for draws that are averaged. Where they are weighed against each other the next
        window knows nothing of their weights, so they must be resampled by them.
        """
        return None

    def loss(self, densities: StepDensities) -> Tensor:
        """The loss of given densities; leaves its terms, nats a frame, in ``terms``."""
        weight = self.clock.weight(self.kl_weight)
        frames = densities.mask.sum()
        objective = self.objective(densities, weight)
        if not bool(objective.isfinite().all()):  # say where, if the weights tell
            self.find_fault(densities.log_weight.detach())
        fit, kl = reconstruction(densities), rate(densities)
        self.terms = {
            "reconstruction": fit.detach().sum() / frames,
            "kl": kl.detach().sum() / frames,
            "elbo": (fit - kl).detach().sum() / frames,
            "kl_weight": weight,
        }
        if self.bound:  # of weighted terms the value is no bound
            name = self.bound if weight == 1.0 else "objective"
            self.terms = {name: objective.detach().sum() / frames, **self.terms}
        loss = -objective.sum()
        shared = getattr(densities, "f", None) is not None
        if shared and self.penalties and self.kl_weight == 0.0:
            raise NotImplementedError(
                "a critic compares z_t alone, so with kl_weight=0 nothing would price the latent "
                "f that all steps share; give a kl_weight above 0"
            )
        for penalty in self.penalties:
            price, paid = self.clock.weight(penalty.weight), penalty.penalty(densities)
            self.terms[f"{penalty.name}_penalty"] = paid.detach()
            self.terms[f"{penalty.name}_weight"] = price
            loss = loss + price * frames * paid
        return loss

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """What is maximised, shape (B,)."""
        raise NotImplementedError

    def find_fault(self, log_weight: Tensor) -> None:
        """Raise, naming the first step where no particle has a weight, or one is not a number."""
        require_usable(log_weight.cumsum(dim=0).logsumexp(dim=1))

    def correction(self, densities: StepDensities, model: Any, guide: Any) -> Tensor | float:
        """Zero; its gradient is what the loss's own lacks."""
        return 0.0


@dataclass(kw_only=True)
class ELBO(Objective):
    """Negative evidence lower bound: beta-VAE and KL annealing by ``kl_weight``, free bits.

    Args:
        num_particles, kl_weight, penalties, clock: as for :class:`Objective`; the draws of a
            sequence are averaged.
        analytic_kl: the closed-form KL of each step instead of the sampled one.
        free_bits: nats of KL a frame that cost nothing: at every step the KL, averaged over
            the batch, is charged as ``max(KL, free_bits)`` (Kingma et al. 2016,
            https://arxiv.org/abs/1606.04934, eq. 15, with one group of units).
    """

    analytic_kl: bool = False
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.free_bits >= 0.0:
            raise ValueError(f"free_bits must be at least 0 nats a frame, got {self.free_bits}")

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """Reconstruction less the weighted KL, shape (B,)."""
        if not self.analytic_kl and not self.free_bits:
            return elbo(_tempered(densities, kl_weight))
        kl = (  # (T, B)
            analytic_kl(densities)
            if self.analytic_kl
            else densities.log_proposal - densities.log_prior
        ).mean(dim=1)
        if self.free_bits:
            observed = densities.mask[:, 0]
            count = observed.sum(dim=1, keepdim=True).clamp(min=1)
            floored = (kl.sum(dim=1, keepdim=True) / count).clamp(min=self.free_bits)
            kl = torch.where(observed, floored, 0.0)
        fit = reconstruction(densities)
        return fit - kl_weight * kl.sum(dim=0) if kl_weight else fit

    def find_fault(self, log_weight: Tensor) -> None:
        """As for other objectives, but one particle without a weight is one too many here."""
        require_usable(log_weight.cumsum(dim=0).sum(dim=1))


@dataclass(kw_only=True)
class IWAE(Objective):
    r"""Negative importance-weighted bound, :math:`\log \frac1K \sum_k w_k`.

    Args:
        num_particles, kl_weight, penalties, clock: as for :class:`Objective`.
        doubly_reparameterised: the guide's own parameters get the doubly reparameterised
            gradient, whose signal does not drown in noise as K grows; all others, among them
            the prior that a residual guide reads, keep the plain one. The value is the same; it
            costs a second backward pass.

    Source: Burda et al. (2016), https://arxiv.org/abs/1509.00519, eq. 8; Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152, eq. 8.
    """

    num_particles: int = 4
    bound: ClassVar[str] = "iwae"
    doubly_reparameterised: bool = False

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """The bound, shape (B,)."""
        return iwae(_tempered(densities, kl_weight))

    def survivors(self, densities: StepDensities) -> Tensor | None:
        """Resampled, systematically, by the weights of all steps."""
        if self.num_particles == 1:
            return None
        log_weight = _tempered(densities, self.clock.weight(self.kl_weight))
        return systematic(normalise(log_weight.sum(dim=0), len(log_weight)))

    def correction(self, densities: Any, model: Any, guide: Any) -> Tensor | float:
        """Zero, with a gradient that turns the guide's parameters' plain one into the other.

        The plain gradient holds the score of q, whose expectation, by reparameterising once
        more, is a path derivative: each path then counts ``(1 - b) w + b w^2`` instead of w,
        with normalised weights w and the exponent b of the prior and the proposal.
        """
        if not self.doubly_reparameterised:
            return 0.0
        if not isinstance(guide, nn.Module) or not hasattr(densities, "states"):
            raise NotImplementedError(
                "doubly_reparameterised=True needs a model with a rollout and a guide that is a "
                "torch module; use IWAE(doubly_reparameterised=False)"
            )
        shared = {id(p) for p in model.parameters()}  # these enter p, too, and stay plain
        own = [p for p in guide.parameters() if p.requires_grad and id(p) not in shared]
        weight = self.clock.weight(self.kl_weight)
        with _constant(own):
            proposal: Any = guide.proposal
            log_proposal = proposal(densities.states, densities.c.detach()).log_prob(densities.z)
        if getattr(densities, "f", None) is not None:
            loc, scale = (p.detach() for p in normal_parameters(densities.proposal_f))
            of_f = torch.distributions.Normal(loc, scale).log_prob(densities.f).sum(dim=-1)
            log_proposal = torch.cat([(log_proposal[0] + of_f).unsqueeze(0), log_proposal[1:]])
        log_proposal = torch.where(densities.mask, log_proposal, 0.0)
        path = temper(densities.log_prior, densities.log_emission, log_proposal, weight)
        plain = _tempered(densities, weight)
        share = plain.detach().sum(dim=0).softmax(dim=0)
        wanted = ((1.0 - weight) * share + weight * share.square()) * path.sum(dim=0)
        difference = iwae(plain).sum() - wanted.sum()  # of losses, hence the order
        return _with_gradient(difference, own)


@dataclass(kw_only=True)
class FIVO(Objective):
    """Negative log-evidence estimate of a particle filter (FIVO, VSMC, AESMC).

    The gradient holds the resampled indices fixed, as its authors do: biased, but far less
    noisy. The score-function term makes it unbiased where the times of resampling do not depend
    on the weights (criterion "always"); with an adaptive criterion the jumps at its threshold
    stay unseen. ``terms`` other than the bound average over the filter's particles, and so do
    penalties, whose critic is trained on draws that were not resampled.

    Args:
        num_particles, kl_weight, penalties, clock: as for :class:`Objective`.
        resampler: "multinomial", "stratified", "systematic" or a function.
        criterion: "never", "always", "ess" (effective sample size below K / 2) or a function.
        score_function: add the term for the choice of ancestors; multinomial resampling only.

    Sources: Maddison et al. (2017), https://arxiv.org/abs/1705.09279; Naesseth et al. (2018),
    https://arxiv.org/abs/1705.11140, eq. 8 for the term.
    """

    num_particles: int = 4
    bound: ClassVar[str] = "fivo"
    resampler: str | Resampler = "systematic"
    criterion: str | Criterion = "ess"
    score_function: bool = False
    _selection: Selection | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        resampler = pick("resampler", self.resampler, RESAMPLERS)
        pick("criterion", self.criterion, CRITERIA)
        if self.score_function and resampler is not multinomial:
            raise NotImplementedError(
                "score_function=True needs independent draws of the ancestors; use "
                "resampler='multinomial'"
            )
        if any(getattr(r, "sees_path", False) for r in self.penalties):
            raise NotImplementedError(
                "a critic of paths cannot follow particles that are resampled; use the view "
                "marginal, conditional or joint, or IWAE"
            )

    def draw(self, model: Any, guide: Any, *args: Any, **given: Any) -> StepDensities:
        """Densities of every step, ``(T, K, B)``, particles as they were before resampling.

        Raises:
            TypeError: a model or guide without single steps; what is missing is named.
            DegenerateWeightsError: all weights of a step are zero, or one is not a number.
        """
        require_stepwise(model, guide)
        if not isinstance(model, HasRollout):
            raise TypeError(
                f"model must have rollout(guide, x, mask, num_particles=, select=) for FIVO, but "
                f"{type(model).__name__} lacks it; the log_evidence of particle_filter is "
                "differentiable, too"
            )
        weight = self.clock.weight(self.kl_weight)
        mask = args[1] if len(args) > 1 else None
        self._selection = Selection(self.resampler, self.criterion, mask, weight)
        options = {"num_particles": self.num_particles, "select": self._selection, **self.options}
        program: Any = model
        return program.rollout(guide, *args, **options, **given)

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """log Z_hat, shape (B,)."""
        assert self._selection is not None, "densities of a filter come from its call"
        log_weight = _tempered(densities, kl_weight)
        resampled = self._selection.events(log_weight)
        bound = fivo(log_weight, resampled)
        if self.score_function and bool(resampled.any()):
            score = self._score(log_weight, resampled)
            bound = bound + score - score.detach()
        return bound

    def find_fault(self, log_weight: Tensor) -> None:
        """As for other objectives; the filter itself has looked at all steps but the last."""
        self._last(log_weight)

    def survivors(self, densities: StepDensities) -> Tensor | None:
        """Resampled by the weights since the last resampling, whatever the criterion."""
        if self.num_particles == 1:
            return None
        assert self._selection is not None
        log_weight = _tempered(densities, self.clock.weight(self.kl_weight))
        return self._selection.resampler(self._last(log_weight))

    def _last(self, log_weight: Tensor) -> Tensor:
        """Normalised log-weights ``(K, B)`` of each sequence's last stretch."""
        assert self._selection is not None
        resampled = self._selection.events(log_weight)
        sums, last = stretches(log_weight, resampled), resampled.sum(dim=0)
        columns = torch.arange(len(last), device=last.device)
        return normalise(sums[last, :, columns].t(), len(log_weight))

    def _score(self, log_weight: Tensor, resampled: Tensor) -> Tensor:
        """Sum over resamplings of log P(ancestors) times what was gained after them, (B,)."""
        assert self._selection is not None
        sums = stretches(log_weight, resampled)  # (S, K, B)
        gain = log_mean_exp(sums, dim=1).detach()
        later = gain.flip(0).cumsum(dim=0).flip(0) - gain  # (S, B), of the stretches after
        log_choice = sums.log_softmax(dim=1)
        count = resampled.long().cumsum(dim=0) - 1  # which stretch ended, (T - 1, B)
        total = log_weight.new_zeros(log_weight.shape[-1])
        for t, parents in enumerate(self._selection.parents):
            if parents is None:
                continue
            stretch = count[t].clamp(min=0)
            index = stretch.expand(1, *parents.shape)
            chosen = log_choice.gather(0, index)[0].gather(0, parents).sum(dim=0)
            reward = later.gather(0, stretch.unsqueeze(0))[0]
            total = total + torch.where(resampled[t], chosen * reward, 0.0)
        return total


def _tempered(densities: StepDensities, kl_weight: float) -> Tensor:
    return temper(densities.log_prior, densities.log_emission, densities.log_proposal, kl_weight)


@contextmanager
def _constant(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _with_gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zero, whose gradient with respect to these parameters is that of ``value``."""
    zero = value.new_zeros(())
    if not parameters:
        return zero
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            zero = zero + ((p - p.detach()) * gradient).sum()
    return zero
