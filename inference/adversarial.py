"""Adversarial regularisation: a critic between prior and proposal, trained between SVI steps.

:mod:`inference.roles` says what a critic can be shown and what its scores can be used for.

Sources: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, eq. 12. The paper's schedule
is in :mod:`inference.alternating`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inference.bounds import analytic_kl
from inference.constraints import Codes
from inference.densities import StepDensities
from inference.divergences import Divergence, wasserstein2
from inference.free_runs import free_run, require_free_runs
from inference.modes import evaluating
from inference.protocols import (
    Program,
    counts,
    given,
    of_kind,
    one_of,
)
from inference.roles import (
    ROLES,
    VIEWS,
    View,
    draw,
    leaf_of,
    shown_free,
    trajectory,
    trajectory_redrawn,
)
from inference.schedules import Schedule
from inference.schedules import weight as check_weight
from inference.traces import draws_alone, step_densities


class Adversarial:
    """A critic in training: ``update`` is the hook of ``fit``, ``penalty`` a term of an objective.

    Args:
        critic: scores codes, ``critic(z, context, path) -> (T, K, B)``. Its attribute ``view``
            says what it is shown, a name of ``VIEWS`` or a function like those; in role "refine"
            it is that of the model's ``RefinedPrior``; in roles "ratio" and "ratio_to_prior" it
            reads h and what the guide reads of x; in those of information it scores pairs,
            ``critic(z, f, mask) -> (1 or T, K, B, B)``.
        role: what its scores are used for, a name of ``ROLES``.
        divergence: its loss; None for that of the role. A Wasserstein critic is high for the
            prior, the others estimate log q / p, which is high for the proposal. In the roles of
            information it is an estimator of :mod:`inference.mutual_information`.
        optim: a torch optimiser over the critic's parameters alone; Adam(1e-3, (0.5, 0.9)) if
            None.
        critic_steps: critic updates per SVI step; each redraws the codes on one rollout's states,
            but for the posterior's own path, where the view shows it.
        standardise: show codes as deviations from the prior's mean, in units of its scale, so
            that shrinking prior and proposal together no longer lowers the distance. What both
            sides share, h_t, x_t and the posterior's path before t, stays in its own units. In
            role "penalty" alone.
        free_runs_of: the model, to compare free runs of it with the posterior's path, each side
            at states and data of its own, as generation meets them; None compares draws at the
            same states. Views conditional and joint are then of h_t, or of h_t and x_t, as well;
            marginal compares aggregates over time.
        watch: whether the metrics also hold the critic's accuracy, the slope of its penalty in
            the codes, and the pull of the penalty and of the bound on the guide, which costs a
            backward pass for each term.
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
        free_runs_of: Any = None,
        watch: bool = False,
        name: str = "critic",
    ) -> None:
        one_of(ROLES, role=role)
        if free_runs_of is not None:
            require_free_runs(free_runs_of, role)
        self.role = ROLES[role]
        view = getattr(critic, "view", None) if role == "penalty" else VIEWS["conditional"]
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
        self.standardise, self.free_runs_of, self.watch = standardise, free_runs_of, watch
        self.divergence = self.role.loss() if divergence is None else divergence
        self.divergence.constraint.check(critic)
        if self.role.of_sequences and self.divergence.constraint.name != "none":
            raise ValueError(
                f"role {role!r} takes an estimator of mutual information, such as "
                "mutual_information.infonce(), whose critic has no constraint, got one with "
                f"{self.divergence.constraint.name!r}"
            )
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
            The critic's distance, averaged over observed frames; in a role of information the
            estimate, nats of a sequence, over the number of its frames.

        Raises:
            NotImplementedError: a critic whose scores are part of the model, or what is compared
                is not in the densities.
            ValueError: nothing to compare: no observed frame, or a single sequence.
        """
        if self.role.of_sequences:
            value = self._distance(densities, posterior)
            return value * densities.mask.shape[-1] / densities.mask.sum()
        if self.role.name != "penalty":
            raise NotImplementedError(
                f"a critic of role {self.role.name!r} is no penalty: its scores are in the bound; "
                "leave it out of penalties= and give its update to fit(hooks=)"
            )
        return self._distance(densities, posterior)

    def log_ratio(self, densities: StepDensities) -> tuple[Tensor, Tensor]:
        """Log-densities of prior and proposal, ``(T, K, B)``, for AVB; the critic is constant."""
        assert self.role.log_ratio is not None
        with self._constant() as critic:
            return self.role.log_ratio(critic, densities)

    @contextmanager
    def _constant(self) -> Iterator[Callable[..., Tensor]]:
        """The critic in eval mode, a function of codes alone."""
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        with evaluating(self.critic):
            yield lambda *codes: functional_call(self.critic, frozen, codes)

    def _distance(self, densities: StepDensities, posterior: Tensor | None = None) -> Tensor:
        drawn = densities.z if posterior is None else posterior
        if drawn.shape != densities.z.shape:
            raise ValueError(
                f"posterior must have the shape of z, {tuple(densities.z.shape)}, got "
                f"{tuple(drawn.shape)}"
            )
        codes = self._codes(densities, drawn)
        with self._constant() as critic:
            scores = self.role.scores(critic, codes, densities.mask)
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
        if start is not None and self.free_runs_of is not None:
            raise NotImplementedError(
                "free runs begin at the start of a series, so they are no match for pieces that "
                "go on; leave out truncate, or free_runs_of"
            )
        given: dict[str, Any] = (
            {} if start is None else {"start": start, "num_particles": len(start[0])}
        )
        given |= self.draws(model, guide)
        with torch.no_grad():
            densities = step_densities(model, guide, *args, **given)
        return self.improve(densities)

    def draws(self, model: Program, guide: Program) -> dict[str, Any]:
        """Options of step densities for draws alone; a view of your own may read densities."""
        known = self.role.name != "penalty" or self.view in VIEWS.values()
        return draws_alone(model, guide) if known else {}

    def improve(self, densities: StepDensities) -> dict[str, float]:
        """Take critic steps on given densities, which hold no gradient; metrics as ``update``."""
        metrics: dict[str, float] = {}
        with self._learning():
            for i in range(self.critic_steps):
                with torch.no_grad():
                    # where the draws are a path, one-step redraws would be another comparison
                    kept = i == 0 or self.view is trajectory_redrawn or self.role.of_sequences
                    posterior = densities.z if kept else draw(densities.proposal)
                    codes = self._codes(densities, posterior)
                metrics = self._step(codes, densities.mask)
        if self.watch and metrics:
            metrics |= self._watched(codes, densities.mask)
        return metrics | closed_forms(densities, standardise=self.standardise)

    def learn(self, codes: Any) -> dict[str, float]:
        """Take one critic step on pairs of given codes; its loss and distance."""
        with self._learning():
            return self._step(codes, codes.mask)

    def _step(self, codes: Any, mask: Tensor) -> dict[str, float]:
        scores = self.role.scores(self.critic, codes, mask)
        distance = self.divergence.penalty(*scores)
        loss = self.divergence.critic_loss(*scores)
        if not self.role.of_sequences:  # which have no constraint
            sides: tuple[Codes, Codes] = codes
            loss = loss + self.divergence.constraint.cost(self.critic, *sides, mask)
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.divergence.constraint.project(self.critic)
        return {f"{self.name}_loss": loss.item(), f"{self.name}_distance": distance.item()}

    @torch.enable_grad()
    def _watched(self, codes: Any, mask: Tensor) -> dict[str, float]:
        """Accuracy at the middle between mean scores, and slope of the penalty at the proposal.

        The slope is the average norm of a frame's gradient in its code: the push that the guide
        gets.
        """
        z, codes = leaf_of(codes)
        with self._constant() as critic:
            prior, posterior = self.role.scores(critic, codes, mask)
            (slope,) = torch.autograd.grad(self.divergence.penalty(prior, posterior), z)
        middle, up = (prior.mean() + posterior.mean()) / 2, prior.mean() > posterior.mean()
        right = ((prior > middle) == up).double().mean()
        right = right + ((posterior > middle) != up).double().mean()
        return {
            f"{self.name}_accuracy": right.item() / 2,
            f"{self.name}_slope": slope.norm(dim=-1).sum().item(),
        }

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

    def _codes(self, densities: StepDensities, posterior: Tensor) -> Any:
        if self.free_runs_of is None:
            return self.role.codes(densities, posterior, self.view, self.standardise)
        run = free_run(self.free_runs_of, densities.mask, posterior.shape[1])
        return shown_free(run, densities, posterior, self.view, self.standardise)


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
