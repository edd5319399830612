"""Adversarial regularisation: a critic between prior and proposal, trained between SVI steps.

:mod:`inference.roles` says what a critic can be shown and what its scores can be used for.

Sources: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, eq. 12, algorithms 1 and 2.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inference.bounds import analytic_kl
from inference.densities import StepDensities, check_batch
from inference.divergences import Codes, Divergence, wasserstein2
from inference.modes import evaluating
from inference.protocols import (
    Program,
    Stepwise,
    StepwiseGuide,
    at_least,
    counts,
    given,
    of_kind,
    one_of,
)
from inference.roles import ROLES, VIEWS, View, draw, trajectory, trajectory_redrawn
from inference.schedules import Schedule
from inference.schedules import weight as check_weight
from inference.traces import draws_alone, step_densities


class Adversarial:
    """A critic in training: ``update`` is the hook of ``fit``, ``penalty`` a term of an objective.

    Args:
        critic: scores codes, ``critic(z, context, path) -> (T, K, B)``. Its attribute ``view``
            says what it is shown, a name of ``VIEWS`` or a function like those; in role "refine"
            it is that of the model's ``RefinedPrior``, which says so itself.
        role: what its scores are used for, a name of ``ROLES``.
        divergence: its loss; None for that of the role. A Wasserstein critic is high for the
            prior, the others estimate log q / p, which is high for the proposal.
        optim: a torch optimiser over the critic's parameters alone; Adam(1e-3, (0.5, 0.9)) if
            None.
        critic_steps: critic updates per SVI step; each redraws the codes on one rollout's states,
            but for the posterior's own path, where the view shows it.
        standardise: show codes as deviations from the prior's mean, in units of its scale, so
            that shrinking prior and proposal together no longer lowers the distance. What both
            sides share, h_t, x_t and the posterior's path before t, stays in its own units.
        weight: of the penalty in the objective, a number or a schedule. On a separate
            adversarial step (``Alternating``) an adaptive optimiser divides a constant weight
            out: there the step ratios and learning rates matter.
        name: prefix of its metrics.

    Raises:
        ValueError: a critic without a known view, or one that does not fit the divergence's
            constraint.
    """

    def __init__(
        self,
        critic: nn.Module,
        *,
        role: str = "penalty",
        divergence: Divergence | None = None,
        optim: torch.optim.Optimizer | None = None,
        critic_steps: int = 1,
        weight: float | Schedule = 1.0,
        standardise: bool = False,
        name: str = "critic",
    ) -> None:
        one_of(ROLES, role=role)
        self.role = ROLES[role]
        view = VIEWS["conditional"] if role == "refine" else getattr(critic, "view", None)
        if not callable(view) and not (isinstance(view, str) and view in VIEWS):
            raise ValueError(
                f"critic must have a view, one of {', '.join(VIEWS)} or a function, but that of "
                f"{type(critic).__name__} is {view!r}; set its attribute view to what it is shown"
            )
        counts(0, critic_steps=critic_steps)
        check_weight(weight, "weight")
        of_kind(Divergence, "a divergence such as wasserstein()", **given(divergence=divergence))
        of_kind(torch.optim.Optimizer, "an optimiser of torch", **given(optim=optim))
        self.critic, self.critic_steps, self.weight, self.name = critic, critic_steps, weight, name
        self.view: View = view if callable(view) else VIEWS[view]
        self.standardise = standardise
        self.divergence = self.role.loss() if divergence is None else divergence
        self.divergence.constraint.check(critic)
        self.optim = optim or torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
        moved = {id(p) for group in self.optim.param_groups for p in group["params"]}
        if moved != {id(p) for p in critic.parameters() if p.requires_grad or self.role.frozen}:
            raise ValueError(
                "optim must hold the critic's parameters and no others; make it with "
                "critic.parameters()"
            )

    @property
    def sees_path(self) -> bool:
        """Whether the critic is shown earlier codes, as a path."""
        return self.view in (trajectory, trajectory_redrawn)

    def penalty(self, densities: StepDensities, posterior: Tensor | None = None) -> Tensor:
        """Scalar, differentiable in prior and guide; the critic is a constant in eval mode here.

        Args:
            densities: of one rollout.
            posterior: the posterior's codes ``(T, K, B, Z)``; the rollout's own z if None.

        Returns:
            The critic's distance, averaged over observed frames.

        Raises:
            NotImplementedError: a critic whose scores are part of the model.
        """
        if self.role.frozen:
            raise NotImplementedError(
                "a critic that refines the prior is no penalty: its scores are in the model's "
                "density; leave it out of penalties= and give its update to fit(hooks=)"
            )
        return self._distance(densities, posterior)

    def _distance(self, densities: StepDensities, posterior: Tensor | None = None) -> Tensor:
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        drawn = densities.z if posterior is None else posterior
        if drawn.shape != densities.z.shape:
            raise ValueError(
                f"posterior must have the shape of z, {tuple(densities.z.shape)}, got "
                f"{tuple(drawn.shape)}"
            )
        codes = self._codes(densities, drawn)
        with evaluating(self.critic):
            scores = [
                self._observed(functional_call(self.critic, frozen, tuple(side)), densities.mask)
                for side in codes
            ]
        return self.divergence.penalty(*scores)

    def update(
        self, model: Program, guide: Program, *args: Any, start: Any = None
    ) -> dict[str, float]:
        """Take ``critic_steps`` critic steps, with model and guide as constants.

        Args:
            model, guide, args: of the SVI step before.
            start: the state it started from, tensors ``(K, B, ...)``, if the series goes on; then
                the critic sees a draw of each particle, else one draw of each sequence.

        Returns:
            The critic's last loss and distance, with the closed-form KL and W2.
        """
        given: dict[str, Any] = (
            {} if start is None else {"start": start, "num_particles": len(start[0])}
        )
        given |= self.draws(model, guide)
        with torch.no_grad():
            densities = step_densities(model, guide, *args, **given)
        return self.improve(densities)

    def draws(self, model: Program, guide: Program) -> dict[str, Any]:
        """Options of step densities for draws alone; a view of your own may read densities."""
        known = self.role.frozen or self.view in VIEWS.values()
        return draws_alone(model, guide) if known else {}

    def improve(self, densities: StepDensities) -> dict[str, float]:
        """Take critic steps on given densities, which hold no gradient; metrics as ``update``."""
        metrics: dict[str, float] = {}
        with self._learning():
            for i in range(self.critic_steps):
                with torch.no_grad():
                    # where the draws are a path, one-step redraws would be another comparison
                    kept = i == 0 or self.view is trajectory_redrawn
                    posterior = densities.z if kept else draw(densities.proposal)
                    codes = self._codes(densities, posterior)
                metrics = self._step(codes, densities.mask)
        return metrics | closed_forms(densities, standardise=self.standardise)

    def _step(self, codes: tuple[Codes, Codes], mask: Tensor) -> dict[str, float]:
        scores = [self._observed(self.critic(*side), mask) for side in codes]
        distance = self.divergence.penalty(*scores)
        loss = self.divergence.critic_loss(*scores)
        loss = loss + self.divergence.constraint.cost(self.critic, *codes, mask)
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.divergence.constraint.project(self.critic)
        return {f"{self.name}_loss": loss.item(), f"{self.name}_distance": distance.item()}

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """The critic in training mode; one that is part of the model takes gradients only here."""
        self.critic.train()
        if not self.role.frozen:
            yield
            return
        self.critic.requires_grad_(True)
        try:
            yield
        finally:
            self.critic.requires_grad_(False)
            self.critic.eval()

    @torch.no_grad()
    def distance(self, densities: StepDensities) -> float:
        """Return the critic's distance on given densities, updating nothing."""
        return float(self._distance(densities))

    def state_dict(self) -> dict[str, Any]:
        """The critic with its buffers, and its optimiser."""
        return {"critic": self.critic.state_dict(), "optim": self.optim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.critic.load_state_dict(state["critic"])
        self.optim.load_state_dict(state["optim"])

    def _codes(self, densities: StepDensities, posterior: Tensor) -> tuple[Codes, Codes]:
        return self.role.codes(densities, posterior, self.view, self.standardise)

    @staticmethod
    def _observed(scores: Tensor, mask: Tensor) -> Tensor:
        observed = scores[mask.expand_as(scores)]
        if not len(observed):
            raise ValueError("mask must observe a frame for a critic to compare, but has none")
        return observed


class Alternating:
    """Run algorithm 2 of AVRNN as a hook: critic steps, then one step on TR and PS.

    With ``ELBO(kl_weight=0)`` as SVI's loss (Algorithm 1, the reconstruction phase)
    this is the paper's schedule to the letter: reconstruction moves emission, proposal,
    recurrence and encoders; the critic moves alone; the adversarial step moves the transition
    (TR) and the proposal (PS) with an RMSProp of its own. It drifts on real data.

    Args:
        adversarial: the critic; the paper's is clipped, RMSProp(5e-5), 5 steps.
        transition: the parameters of TR, ``model.prior.parameters()``.
        proposal: the parameters of PS, ``guide.parameters()``.
        lr: of the adversarial step's RMSProp, which would divide a weight out.
        detach_state: keep h_t constant in the adversarial step, as the text updates TR and PS
            only; False lets the gradient reach TR and PS through all earlier steps.
    """

    def __init__(
        self,
        adversarial: Adversarial,
        transition: Iterable[nn.Parameter],
        proposal: Iterable[nn.Parameter],
        *,
        lr: float = 5e-5,
        detach_state: bool = True,
    ) -> None:
        of_kind(Adversarial, "an Adversarial", adversarial=adversarial)
        of_kind(Iterable, "parameters", transition=transition, proposal=proposal)
        at_least(0.0, lr=lr)
        self.adversarial, self.detach_state = adversarial, detach_state
        parameters = [*transition, *proposal]
        if not parameters:
            raise ValueError(
                "transition and proposal hold no parameters: nothing would be regularised"
            )
        self.parameters = parameters
        self.optim = torch.optim.RMSprop(parameters, lr=lr)

    def update(self, model: Program, guide: Program, *args: Any) -> dict[str, float]:
        """Run algorithm 2 for one batch; leave no gradient on model or guide."""
        options = self.adversarial.draws(model, guide)
        with torch.no_grad():
            densities = step_densities(model, guide, *args, **options)
        if densities.f is not None:
            raise NotImplementedError(
                "the alternating schedule compares z_t alone, so nothing would price the latent f "
                "that all steps share; use a joint objective with a kl_weight above 0"
            )
        metrics = self.adversarial.improve(densities)
        if self.detach_state:
            states = densities.states
            if (
                not (isinstance(model, Stepwise) and isinstance(guide, StepwiseGuide))
                or not states
            ):
                raise NotImplementedError(
                    "detach_state=True needs a model and guide with the stepwise functions "
                    "(transition, proposal); use detach_state=False"
                )
            c = guide.encode(*check_batch(model, *args)).transpose(0, 1).unsqueeze(1)
            densities = densities._replace(prior=model.transition(states))
            loss = self.adversarial.penalty(densities, draw(guide.proposal(states, c)))
        else:
            loss = self.adversarial.penalty(step_densities(model, guide, *args))
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        self.optim.step()
        for parameter in [*_parameters(model), *_parameters(guide), *self.parameters]:
            parameter.grad = None
        return metrics | {f"{self.adversarial.name}_penalty": loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """The critic's side, and the optimiser of the adversarial step."""
        return {"adversarial": self.adversarial.state_dict(), "optim": self.optim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.adversarial.load_state_dict(state["adversarial"])
        self.optim.load_state_dict(state["optim"])


def closed_forms(densities: StepDensities, *, standardise: bool = False) -> dict[str, float]:
    """Average the exact KL and W2 between normal proposals and priors over observed frames.

    Args:
        densities: of one rollout.
        standardise: W2 in units of the prior's deviation, as a critic of such codes sees it.

    Returns:
        Nothing for other families.
    """
    try:
        kl, w2 = analytic_kl(densities), wasserstein2(densities, standardise=standardise)
    except NotImplementedError:
        return {}
    count = densities.mask.expand_as(kl).sum()
    return {
        "closed_form_kl": (kl.sum() / count).item(),
        "closed_form_w2": (w2.sum() / count).item(),
    }


def _parameters(program: Any) -> Iterator[nn.Parameter]:
    return program.parameters() if isinstance(program, nn.Module) else iter(())
