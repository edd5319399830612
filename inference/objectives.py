"""Bounds on log p(x_{1:T}) as losses for ``pyro.infer.SVI``.

Each is a callable ``(model, guide, x, mask) -> loss``: the negative objective, in nats, summed
over the batch as Pyro's own losses are. The estimates themselves are functions in
:mod:`inference.bounds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from pyro.infer.elbo import ELBOModule
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from inference.bounds import (
    analytic_kl,
    elbo,
    evidence_path,
    fivo,
    iwae,
    rate,
    reconstruction,
    tempered,
)
from inference.densities import StepDensities, select_particles
from inference.gradients import ancestor_score, doubly_reparameterised, norms_of_gradients
from inference.protocols import (
    HasRollout,
    Penalty,
    Program,
    at_least,
    counts,
    given,
    of_kind,
    require_stepwise,
)
from inference.resampling import (
    CRITERIA,
    RESAMPLERS,
    Criterion,
    Resampler,
    Selection,
    multinomial,
    pick,
    systematic,
)
from inference.schedules import Clock, Schedule, weight
from inference.traces import step_densities
from inference.twists import Foresight
from inference.weights import normalise, require_usable, wide


@dataclass(kw_only=True)
class Objective:
    """A bound as a ``loss`` for ``pyro.infer.SVI``, negative and summed over the batch.

    With a ``kl_weight`` other than 1 the prior and the proposal enter the weights with that
    exponent; the value is then that of the weighted objective, which is not a bound. Penalties
    are subtracted: each is an average over observed frames, multiplied by their number, so that
    a weight of 1 prices a unit of distance in a frame at one nat.

    A series too long for one backward pass is taken window by window: ``svi.step(x, mask,
    start=state, carry=True)`` leaves in ``after`` the ``start`` of the next window, as
    ``fit(truncate=)`` does it.

    Args:
        num_particles: K draws a sequence.
        kl_weight: a number, or a schedule over the run such as ``Ramp(0, 1, over=0.5)``.
        penalties: what is subtracted, such as ``Adversarial``, each with its own weight.
        clock: counts calls with gradients; give its ``total`` if ``fit`` does not train.
        recompute: for long sequences, the number of steps between states that are kept. The
            backward pass computes the steps between them a second time, so that memory grows
            with T / recompute + recompute instead of T; None keeps everything.
        compile: run the recurrence in C, written for this model. It pays most where steps are
            small and needs a C compiler, which takes half a second once; the result is kept in
            the user's cache folder. Filters, whose particles change places, run without.

    Attributes:
        terms: what the last call was made of, nats a frame. Where a penalty has ``watch``, the
            norm of the gradient in the guide's parameters of the bound, and of each penalty, is
            among them: a penalty whose pull is far below that of the bound does nothing.
        after: the state after the last step of the last call, if it was asked for.
    """

    num_particles: int = 1
    kl_weight: float | Schedule = 1.0
    penalties: Sequence[Penalty] = ()
    clock: Clock = field(default_factory=Clock)
    recompute: int | None = None
    compile: bool = False
    terms: dict[str, Tensor | float] = field(default_factory=dict, init=False, repr=False)
    after: Any = field(default=None, init=False, repr=False)
    _shares: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # of a loss
    bound: ClassVar[str] = ""  # name of its value in terms; the ELBO is there anyway

    def __post_init__(self) -> None:
        counts(1, num_particles=self.num_particles, **given(recompute=self.recompute))
        weight(self.kl_weight, "kl_weight")
        of_kind(Clock, "a Clock", clock=self.clock)
        of_kind(list | tuple, "a list of penalties such as Adversarial", penalties=self.penalties)
        for i, penalty in enumerate(self.penalties):
            of_kind(Penalty, "a penalty such as Adversarial", **{f"penalties[{i}]": penalty})
        names = [penalty.name for penalty in self.penalties]
        if len({*names}) < len(names):
            raise ValueError(
                f"penalties must have names of their own, got {', '.join(names)}; give name= to "
                "each"
            )

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of a rollout, those that were given."""
        given = {"recompute": self.recompute, "compile": self.compile or None}
        return {name: value for name, value in given.items() if value is not None}

    def __call__(
        self,
        model: Program,
        guide: Program,
        *args: Any,
        start: Any = None,
        carry: bool = False,
    ) -> Any:
        """Return the loss, nats summed over the batch.

        Without ``args`` return Pyro's module form: ``ELBO()(model, guide)`` is a torch module that
        holds both, and whose call ``(x, mask)`` is this loss.

        Args:
            model: a Pyro program.
            guide: a Pyro program over the same latents.
            args: what both are called with, ``(x, mask)``.
            start: the state before step 1 of a series that goes on, tensors ``(K, B, ...)``.
            carry: whether to leave the state after the last step in ``after``.

        Raises:
            DegenerateWeightsError: the objective is not finite; the error names the step and
                the sequence from which on.
        """
        if not args and torch.is_grad_enabled() and not am_i_wrapped():  # so SVI does not call
            return ELBOModule(model, guide, self)
        options = {"start": start, "distributions": False if self.terms_alone else None}
        densities = self.draw(model, guide, *args, **given(**options))
        loss = self.loss(densities)
        self.after = self.carry(model, densities) if carry else None
        if loss.requires_grad:
            watched = any(getattr(penalty, "watch", False) for penalty in self.penalties)
            if watched and isinstance(guide, nn.Module):
                self._watch(guide, densities.mask.sum())
            self._shares = {}  # and with them the graph
            loss = loss + self.correction(densities, model, guide)
            self.clock.calls += 1
        return loss

    differentiable_loss = __call__  # the name that Pyro's module form calls

    def _watch(self, guide: Any, frames: Tensor) -> None:
        """Leave the pull of the bound and of each penalty on the guide in ``terms``."""
        own = [p for p in guide.parameters() if p.requires_grad]
        norms = norms_of_gradients(self._shares, own)
        self.terms |= {f"{name}_pull": norm / frames for name, norm in norms.items()}

    @property
    def terms_alone(self) -> bool:
        """Whether log-densities are all it looks at, so that C may leave out distributions."""
        return False

    def draw(self, model: Program, guide: Program, *args: Any, **given: Any) -> StepDensities:
        """Densities of every step, ``(T, K, B)``, latents drawn from the guide."""
        given = {"num_particles": self.num_particles, **self.options, **given}
        return step_densities(model, guide, *args, **given)

    @torch.no_grad()
    def carry(self, model: Any, densities: StepDensities) -> Any:
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
        """Indices ``(K, B)`` of the particles that go on after the last step; None for all.

        All go on where draws are averaged. Where they are weighed against each other the next
        window knows nothing of their weights, so they must be resampled by them.
        """
        return None

    def loss(self, densities: StepDensities) -> Tensor:
        """Return the loss of given densities, and leave its terms in ``terms``."""
        weight = self.clock.weight(self.kl_weight)
        frames = densities.mask.sum()
        objective = self.objective(densities, weight)
        if not bool(objective.isfinite().all()):  # say where, if the weights tell
            self.find_fault(densities.log_weight.detach())
        fit, kl = reconstruction(densities), rate(densities)
        shown, spent = wide(fit.detach()), wide(kl.detach())
        self.terms = {
            "reconstruction": shown.sum() / frames,
            "kl": spent.sum() / frames,
            "elbo": (shown - spent).sum() / frames,
            "kl_weight": weight,
        }
        if self.bound:  # of weighted terms the value is not a bound
            name = self.bound if weight == 1.0 else "objective"
            self.terms = {name: objective.detach().sum() / frames, **self.terms}
        if densities.f is not None and self.penalties and self.kl_weight == 0.0:
            raise NotImplementedError(
                "a critic compares z_t alone, so with kl_weight=0 nothing would price the latent "
                "f that all steps share; give a kl_weight above 0"
            )
        loss = -objective.sum()
        self._shares = {"bound": loss}
        for penalty in self.penalties:
            price, paid = self.clock.weight(penalty.weight), penalty.penalty(densities)
            self.terms[f"{penalty.name}_penalty"] = paid.detach()
            self.terms[f"{penalty.name}_weight"] = price
            self._shares[penalty.name] = price * frames * paid
            loss = loss + self._shares[penalty.name]
        return loss * densities.scale if densities.scale != 1.0 else loss

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """The quantity to maximise, shape (B,)."""
        raise NotImplementedError

    def find_fault(self, log_weight: Tensor) -> None:
        """Raise, naming the first step where no particle has a weight, or one is not a number."""
        require_usable(log_weight.cumsum(dim=0).logsumexp(dim=1))

    def correction(self, densities: StepDensities, model: Any, guide: Any) -> Tensor | float:
        """Zero; its gradient is what the loss's own lacks."""
        return 0.0


@dataclass(kw_only=True)
class ELBO(Objective):
    """Negative evidence lower bound, averaged over the draws of a sequence.

    Args (and those of :class:`Objective`):
        analytic_kl: take the closed-form KL of each step instead of the sampled one.
        free_bits: nats of KL a frame that cost nothing: at every step the KL, averaged over
            the batch, is charged as ``max(KL, free_bits)`` (Kingma et al. 2016,
            https://arxiv.org/abs/1606.04934, eq. 15, with one group of units).
        kl_f_weight: further factor on the KL of a latent that all steps share, a number or a
            schedule; ``kl_weight`` multiplies it, too. Below 1 the latent may hold more of the
            sequence.
    """

    analytic_kl: bool = False
    free_bits: float = 0.0
    kl_f_weight: float | Schedule = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0.0, " nats a frame", free_bits=self.free_bits)
        weight(self.kl_f_weight, "kl_f_weight")

    @property
    def terms_alone(self) -> bool:
        """Whether log-densities are all it looks at, so that C may leave out distributions."""
        own = type(self).objective is ELBO.objective
        asks = self.analytic_kl or self.penalties or self.kl_f_weight != 1.0
        return self.compile and own and not asks

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """Reconstruction minus the weighted KL, shape (B,)."""
        of_f = self.clock.weight(self.kl_f_weight)
        objective = self._elbo(densities, kl_weight)
        return objective + self._spared(densities, kl_weight, of_f) if of_f != 1.0 else objective

    def _spared(self, densities: StepDensities, kl_weight: float, of_f: float) -> Tensor:
        """What the factor on the KL of f saves, (B,)."""
        f, prior, proposal = densities.f, densities.prior_f, densities.proposal_f
        if f is None or prior is None or proposal is None:
            raise NotImplementedError(
                "kl_f_weight needs a model with a latent f that all steps share, such as a DSAE, "
                "and whole sequences (no truncate)"
            )
        kl: Tensor = (proposal.log_prob(f) - prior.log_prob(f)).mean(dim=0)
        return (1.0 - of_f) * kl_weight * kl

    def _elbo(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """The bound with a weight on all KL, shape (B,)."""
        if not self.analytic_kl and not self.free_bits:
            return elbo(tempered(densities, kl_weight))
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
        """Raise as other objectives do, and where a single particle has no weight."""
        require_usable(log_weight.cumsum(dim=0).sum(dim=1))


@dataclass(kw_only=True)
class IWAE(Objective):
    r"""Negative importance-weighted bound, :math:`\log \frac1K \sum_k w_k`.

    Args (and those of :class:`Objective`):
        doubly_reparameterised: give the guide's own parameters the doubly reparameterised
            gradient, whose signal does not drown in noise as K grows. All others, among them
            the prior that a residual guide reads, keep the plain one. The value is the same; it
            costs a second backward pass.

    Source: Burda et al. (2016), https://arxiv.org/abs/1509.00519, eq. 8; Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152, eq. 8.
    """

    num_particles: int = 4
    bound: ClassVar[str] = "iwae"
    doubly_reparameterised: bool = False

    @property
    def terms_alone(self) -> bool:
        """Whether log-densities are all it looks at, so that C may leave out distributions."""
        return self.compile and type(self).objective is IWAE.objective and not self.penalties

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """The bound, shape (B,)."""
        return iwae(tempered(densities, kl_weight))

    def survivors(self, densities: StepDensities) -> Tensor | None:
        """Resampled, systematically, by the weights of all steps."""
        if self.num_particles == 1:
            return None
        log_weight = tempered(densities, self.clock.weight(self.kl_weight))
        return systematic(normalise(log_weight.sum(dim=0), len(log_weight)))

    def correction(self, densities: StepDensities, model: Any, guide: Any) -> Tensor | float:
        """Zero, with the gradient of :func:`~inference.gradients.doubly_reparameterised`."""
        if not self.doubly_reparameterised:
            return 0.0
        if not isinstance(guide, nn.Module) or densities.states is None:
            raise NotImplementedError(
                "doubly_reparameterised=True needs a model with a rollout and a guide that is a "
                "torch module; use IWAE(doubly_reparameterised=False)"
            )
        kl_weight = self.clock.weight(self.kl_weight)
        return doubly_reparameterised(densities, model, guide, kl_weight)


@dataclass(kw_only=True)
class FIVO(Objective):
    """Negative log-evidence estimate of a particle filter (FIVO, VSMC, AESMC).

    The gradient holds the resampled indices fixed, as its authors do: biased, but far less
    noisy. The score-function term makes it unbiased where the times of resampling do not depend
    on the weights (criterion "always"); with an adaptive criterion the jumps at its threshold
    stay unseen. A second filter, without gradients, says what evidence was to be expected, so
    that the term's noise does not grow with K. ``terms`` other than the bound average over the
    filter's particles, and so do penalties, whose critic is trained on draws that were not
    resampled.

    Args (and those of :class:`Objective`):
        resampler: "multinomial", "stratified", "systematic", "residual" or a function, such as
            those of :mod:`inference.differentiable`.
        criterion: "never", "always", "ess" (effective sample size below K / 2) or a function.
        score_function: add the term for the choice of ancestors; multinomial resampling only.
        twist: lets particles be chosen by the future, too, see :mod:`inference.twists`; a
            constant here, which its own hook trains.

    Sources: Maddison et al. (2017), https://arxiv.org/abs/1705.09279; Naesseth et al. (2018),
    https://arxiv.org/abs/1705.11140, eq. 8 for the term.
    """

    num_particles: int = 4
    bound: ClassVar[str] = "fivo"
    resampler: str | Resampler = "systematic"
    criterion: str | Criterion = "ess"
    score_function: bool = False
    twist: Any = None
    _selection: Selection | None = field(default=None, init=False, repr=False)
    _expected: Tensor | float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        resampler = pick("resampler", self.resampler, RESAMPLERS)
        pick("criterion", self.criterion, CRITERIA)
        if self.score_function and resampler is not multinomial:
            raise NotImplementedError(
                "score_function=True needs independent draws of the ancestors; use "
                "resampler='multinomial'"
            )
        if any(getattr(p, "sees_path", False) for p in self.penalties):
            raise NotImplementedError(
                "a critic of paths cannot follow particles that are resampled; use the view "
                "marginal, conditional or joint, or IWAE"
            )

    def draw(self, model: Program, guide: Program, *args: Any, **given: Any) -> StepDensities:
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
        self._expected = 0.0
        if self.twist is not None:
            given["twist"] = partial(Foresight.of, self.twist)
        densities = super().draw(model, guide, *args, select=self._selection, **given)
        if self.score_function and torch.is_grad_enabled():
            # a user's criterion may count its calls, so the second filter must not call it
            criterion = self.criterion if isinstance(self.criterion, str) else "ess"
            select = Selection(self.resampler, criterion, mask, weight)
            with torch.no_grad():
                other = tempered(super().draw(model, guide, *args, select=select, **given), weight)
                path = evidence_path(other, select.events(other))
            self._expected = path[-1] - path
        return densities

    @property
    def terms_alone(self) -> bool:
        """Whether log-densities are all it looks at, so that C may leave out distributions."""
        return self.compile and type(self).objective is FIVO.objective and not self.penalties

    def objective(self, densities: StepDensities, kl_weight: float) -> Tensor:
        """log Z_hat, shape (B,)."""
        selection = self._selected()
        log_weight = selection.weighed(tempered(densities, kl_weight))
        resampled = selection.events(log_weight)
        bound = fivo(log_weight, resampled)
        if self.score_function and bool(resampled.any()):
            score = ancestor_score(log_weight, resampled, selection.parents, self._expected)
            bound = bound + score - score.detach()
        return bound

    def find_fault(self, log_weight: Tensor) -> None:
        """Look at the last stretch only: the filter itself has looked at all steps before."""
        self._selected().last_stretch(log_weight)

    def survivors(self, densities: StepDensities) -> Tensor | None:
        """Resampled by the weights since the last resampling, whatever the criterion."""
        if self.num_particles == 1:
            return None
        selection = self._selected()
        log_weight = tempered(densities, self.clock.weight(self.kl_weight))
        log_weight = selection.weighed(log_weight)
        return selection.resampler(selection.last_stretch(log_weight))

    def _selected(self) -> Selection:
        assert self._selection is not None, "densities of a filter come from its call"
        return self._selection
