"""The critic of a row: what it does, and what goes with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from inference import AVB, Adversarial, Alternating
from inference.constraints import clip, gradient_penalty, spectral
from inference.divergences import DIVERGENCES
from inference.global_information import GlobalInformation, GlobalMatching
from inference.matching import DISTANCES, Matching, mmd
from inference.mutual_information import ESTIMATORS
from inference.objectives import Objective
from inference.protocols import Hook, Penalty
from inference.twists import TwistLearning
from pyro_avrnn import recipes
from pyro_avrnn.cli.training import Training, ramp
from pyro_avrnn.implicit import IMPLICIT

Arguments = dict[str, Any]


class Chosen(NamedTuple):
    """A recipe, and what its critic brings along."""

    recipe: recipes.Recipe
    adversarial: Adversarial | None = None
    hooks: tuple[Hook, ...] = ()
    penalties: tuple[Penalty, ...] = ()
    objective: Callable[..., Objective] | None = None  # where it is not that of the row's bound
    options: Arguments = {}  # of the objective


def chosen(training: Training, arguments: Arguments, steps: int) -> Chosen:
    """What a row trains, and the hooks and penalties that go with it.

    Args:
        training: the row.
        arguments: of its recipe.
        steps: of the run.
    """
    _check_guide(training)
    if training.schedule == "avb":
        return _avb(training, arguments)
    if training.schedule == "refined" and training.stage == "loop":
        return _refined(training, arguments, steps)
    if training.twist:
        return _twisted(training, arguments)
    if training.schedule == "global":
        return _global(training, arguments)
    if training.view is None:
        return Chosen(recipes.RECIPES[training.model](**arguments))
    return _penalised(training, training.view, arguments)


def _avb(training: Training, arguments: Arguments) -> Chosen:
    role = "ratio" if training.contrast == "moments" else "ratio_to_prior"
    recipe = _with_role(training, arguments, role)
    adversarial = _learning(training, recipe, role)
    options = {"critic": adversarial}
    return Chosen(recipe, adversarial, (adversarial.update,), objective=AVB, options=options)


def _refined(training: Training, arguments: Arguments, steps: int) -> Chosen:
    recipe = _with_role(training, arguments, "refine", num_candidates=training.candidates)
    adversarial = _learning(training, recipe, "refine")
    begun = From(adversarial, round(training.begin * steps))
    return Chosen(recipe, adversarial, (begun.update,))


def _twisted(training: Training, arguments: Arguments) -> Chosen:
    if training.bound != "fivo":
        raise ValueError(f"twist=true goes with bound=fivo, got {training.bound}")
    recipe = _with_role(training, arguments, "twist")
    assert recipe.critic is not None
    optim = torch.optim.Adam(recipe.critic.parameters(), lr=training.critic_lr)
    learning = TwistLearning(recipe.critic, optim=optim, steps=training.critic_steps)
    return Chosen(recipe, hooks=(learning.update,), options={"twist": recipe.critic})


def _penalised(training: Training, view: str, arguments: Arguments) -> Chosen:
    if training.divergence in DISTANCES:
        recipe = recipes.RECIPES[training.model](**arguments)
        return Chosen(recipe, penalties=(_matching(training, recipe),))
    recipe = _with_critic(training, view, arguments)
    adversarial = _adversarial(training, recipe)
    if training.schedule == "joint":
        return Chosen(recipe, adversarial, (adversarial.update,), (adversarial,))
    return Chosen(recipe, adversarial, (_alternating(training, recipe, adversarial).update,))


def _global(training: Training, arguments: Arguments) -> Chosen:
    """What is done for the latent of a DSAE that all steps share."""
    if training.model != "dsae" or training.bound != "elbo":
        raise ValueError(
            f"row {training.label!r} needs model=dsae and bound=elbo, got "
            f"model={training.model}, bound={training.bound}"
        )
    own: Arguments = {"information": training.information, "critic_dim": training.critic_dim}
    recipe = recipes.dsae(**arguments, **own, reads=training.reads)
    penalties: list[Penalty] = []
    if training.alpha != 0.0:
        penalties.append(GlobalInformation("infonce", weight=ramp(training.alpha)))
    if training.free_bits:
        bits = training.free_bits
        penalties.append(GlobalInformation("free_bits", free_bits=bits, name="free_bits"))
    if training.match != 0.0:
        penalties.append(GlobalMatching(mmd(), weight=ramp(training.match)))
    options = {"kl_f_weight": ramp(training.kl_f)}
    if training.information is None:
        return Chosen(recipe, penalties=(*penalties,), options=options)
    assert recipe.critic is not None
    adversarial = Adversarial(
        recipe.critic,
        role="information_of_z" if training.detach_f else "information",
        divergence=ESTIMATORS[training.information](),
        optim=torch.optim.Adam(recipe.critic.parameters(), lr=training.critic_lr),
        critic_steps=training.critic_steps,
        weight=ramp(training.gamma),
        watch=training.watch,
    )
    hooks = (adversarial.update,)
    return Chosen(recipe, adversarial, hooks, (*penalties, adversarial), options=options)


def _with_role(training: Training, arguments: Arguments, role: str, **more: Any) -> recipes.Recipe:
    """A recipe whose critic is no penalty."""
    own = {"base": training.model, "role": role, "critic_dim": training.critic_dim, **more}
    return recipes.avrnn(**arguments, **own)


class From:
    """A hook that begins after some steps of a run."""

    def __init__(self, adversarial: Adversarial, steps: int) -> None:
        self.adversarial, self.steps, self.seen = adversarial, steps, 0

    def update(self, *args: Any, **options: Any) -> dict[str, float]:
        """The critic's update, and its metrics, once it is time."""
        self.seen += 1
        return self.adversarial.update(*args, **options) if self.seen > self.steps else {}

    def state_dict(self) -> dict[str, Any]:
        """The state of the critic's hook, and the steps seen."""
        return {"adversarial": self.adversarial.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.adversarial.load_state_dict(state["adversarial"])
        self.seen = state["seen"]


def _learning(training: Training, recipe: recipes.Recipe, role: str) -> Adversarial:
    """The critic of such a recipe."""
    assert recipe.critic is not None
    optim = torch.optim.Adam(recipe.critic.parameters(), lr=training.critic_lr)
    steps = training.critic_steps
    return Adversarial(recipe.critic, role=role, optim=optim, critic_steps=steps)


def _check_guide(training: Training) -> None:
    """A guide without density goes with AVB, and with nothing else."""
    implicit = training.guide in IMPLICIT
    if training.schedule == "avb" and not (implicit and training.bound == "elbo"):
        raise ValueError(
            f"row {training.label!r} needs a guide without density ({', '.join(IMPLICIT)}) and "
            f"bound=elbo, got guide={training.guide}, bound={training.bound}"
        )
    if implicit and training.schedule != "avb":
        raise ValueError(
            f"guide {training.guide} has no density, which row {training.label!r} needs; use the "
            "row avb"
        )


def _with_critic(training: Training, view: str, arguments: dict[str, Any]) -> recipes.Recipe:
    normalised = _constraint(training) == "spectral"
    return recipes.avrnn(
        **arguments,
        base=training.model,
        view=view,
        critic=training.critic,
        critic_dim=training.critic_dim,
        critic_activation="groupsort" if normalised else "relu",
        lipschitz=training.on if normalised else None,
    )


def _constraint(training: Training) -> str | None:
    """What makes the critic of a row Lipschitz."""
    return training.constraint or ("spectral" if training.divergence == "wasserstein" else None)


def _matching(training: Training, recipe: recipes.Recipe) -> Matching:
    """A penalty without a critic."""
    if training.schedule == "alternating":
        raise NotImplementedError(
            f"row {training.label!r} alternates with a critic, which {training.divergence} has "
            f"not; use a row such as {training.view}:divergence={training.divergence}"
        )
    return Matching(
        DISTANCES[training.divergence](),
        view=str(training.view),
        weight=ramp(training.weight),
        standardise=training.standardise,
        free_runs_of=_free_runs_of(training, recipe),
    )


def _adversarial(training: Training, recipe: recipes.Recipe) -> Adversarial:
    """The critic of a recipe as a penalty, with its constraint and its optimiser."""
    assert recipe.critic is not None
    name = _constraint(training)
    constraint = {
        None: lambda: None,
        "spectral": spectral,
        "gradient_penalty": lambda: gradient_penalty(training.strength, on=training.on),
        "clip": lambda: clip(training.strength),
    }[name]()
    parameters, lr = list(recipe.critic.parameters()), training.critic_lr
    optim: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9))
    if name == "clip":
        optim = torch.optim.RMSprop(parameters, lr=lr)
    return Adversarial(
        recipe.critic,
        divergence=DIVERGENCES[training.divergence](constraint),
        optim=optim,
        critic_steps=training.critic_steps,
        weight=ramp(training.weight),
        standardise=training.standardise,
        free_runs_of=_free_runs_of(training, recipe),
        watch=training.watch,
    )


def _free_runs_of(training: Training, recipe: recipes.Recipe) -> Any:
    return recipe.model if training.pairing == "free_runs" else None


def _alternating(
    training: Training, recipe: recipes.Recipe, adversarial: Adversarial
) -> Alternating:
    return Alternating(
        adversarial,
        recipe.model.prior.parameters(),  # type: ignore[union-attr]
        recipe.guide.parameters(),
        lr=training.adversarial_lr,
        detach_state=training.detach_state,
    )
