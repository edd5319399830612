"""The parts of one training: model, guide and critic, objective, and hooks between SVI steps."""

from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim

from inference import ELBO, FIVO, IWAE, AdaptiveClip, Adversarial, Alternating
from inference.clipping import Clipper
from inference.divergences import clip, gradient_penalty, spectral, wasserstein
from inference.objectives import Objective
from inference.protocols import Hook
from pyro_avrnn import recipes
from pyro_avrnn.cli.rows import Training, ramp
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.data import Dataset

BOUNDS: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "fivo": FIVO}


class Parts(NamedTuple):
    """What the SVI of a training needs."""

    recipe: recipes.Recipe  # model, guide, critic
    optimiser: PyroOptim
    objective: Objective
    hooks: list[Hook]
    adversarial: Adversarial | None
    clip_norm: float | AdaptiveClip | None


def build(training: Training, data: Dataset, settings: Settings) -> Parts:
    """Build the parts of a training, drawing parameters from torch's global state.

    Args:
        training: the row.
        data: what it is trained on.
        settings: its own, :meth:`Training.settings`.

    Raises:
        ValueError, NotImplementedError: parts that do not go together.
    """
    if settings.truncate is not None and training.schedule == "alternating":
        raise NotImplementedError(
            f"row {training.label!r} cannot be truncated, as its adversarial step starts from the "
            "model's own initial state; leave it out, as --schedules elbo joint does, or use a "
            "joint row"
        )
    arguments = _recipe_arguments(training, data, settings)
    adversarial, hooks, penalties = None, list[Hook](), list[Adversarial]()
    if training.schedule == "refined" and training.stage == "loop":
        recipe = recipes.avrnn(
            **arguments,
            base=training.model,
            role="refine",
            num_candidates=training.candidates,
            critic_dim=training.critic_dim,
        )
        adversarial = _refining(training, recipe)
        hooks = [From(adversarial, round(training.begin * settings.steps)).update]
    elif training.view is None:
        recipe = recipes.RECIPES[training.model](**arguments)
    else:
        recipe = _with_critic(training, training.view, arguments)
        adversarial = _adversarial(training, recipe)
        if training.schedule == "joint":
            hooks, penalties = [adversarial.update], [adversarial]
        else:
            hooks = [_alternating(training, recipe, adversarial).update]
    objective = BOUNDS[training.bound](
        num_particles=training.particles,
        kl_weight=ramp(training.kl),
        penalties=penalties,
        recompute=settings.recompute,
        compile=settings.compile,
    )
    clip_norm = _clip(settings.clip_norm)
    return Parts(recipe, _optimiser(settings), objective, hooks, adversarial, clip_norm)


def refined(training: Training, recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe of a trained row with its prior refined; its critic has still to learn."""
    if recipe.critic is not None:  # it has learnt in the loop
        return recipe
    sizes = {"num_candidates": training.candidates, "critic_dim": training.critic_dim}
    return recipes.refined(recipe, **sizes)


class From:
    """A hook that begins after some steps of a run."""

    def __init__(self, adversarial: Adversarial, steps: int) -> None:
        self.adversarial, self.steps, self.seen = adversarial, steps, 0

    def update(self, *args: Any, **options: Any) -> dict[str, float]:
        """The critic's update, and its metrics, once it is time."""
        self.seen += 1
        return self.adversarial.update(*args, **options) if self.seen > self.steps else {}

    def state_dict(self) -> dict[str, Any]:
        """That of the critic, and the steps seen."""
        return {"adversarial": self.adversarial.state_dict(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.adversarial.load_state_dict(state["adversarial"])
        self.seen = state["seen"]


def _refining(training: Training, recipe: recipes.Recipe) -> Adversarial:
    assert recipe.critic is not None
    parameters = list(recipe.critic.parameters())
    return Adversarial(
        recipe.critic,
        role="refine",
        optim=torch.optim.Adam(parameters, lr=training.critic_lr),
        critic_steps=training.critic_steps,
    )


def _clip(text: str) -> float | AdaptiveClip | None:
    """The limit on the gradient that ``--clip-norm`` names."""
    try:
        if text == "none":
            return None
        limit = AdaptiveClip(float(text[:-1])) if text.endswith("x") else float(text)
        return Clipper(limit).clip  # which refuses what is no bound
    except ValueError:
        raise ValueError(
            "--clip-norm must be a number above 0, a multiple of the running median of at least 1 "
            f"such as 10x, or none, got {text!r}"
        ) from None


def _recipe_arguments(training: Training, data: Dataset, settings: Settings) -> dict[str, Any]:
    """What the recipe of the model takes."""
    own = recipes.OWN[training.model]
    arguments: dict[str, Any] = {
        "x_dim": data.x_dim,
        "h_dim": settings.h_dim,
        "min_scale": settings.min_scale,
        "dropout": training.dropout,
        "activation": training.activation,
        "features": training.features,
        **_emission(training, data),
    }
    if training.schedule != "none":
        arguments["z_dim"] = settings.z_dim
        arguments["prior_gradient"] = training.prior_gradient
    for part in ("guide", "prior", "cell"):
        chosen = getattr(training, part)
        if part in own:
            arguments[part] = chosen or own[part]
        elif chosen is not None:
            raise ValueError(f"{part} is no part of the model {training.model!r}, got {chosen!r}")
    return arguments


def _emission(training: Training, data: Dataset) -> dict[str, Any]:
    """The emission of a row, and its options."""
    suited = data.emission
    own, options = suited["emission"], dict(suited.get("emission_options", {}))
    emission = training.emission or own
    if data.in_levels and emission not in (own, "autoregressive"):
        raise ValueError(
            f"levels are scored by emission=logistic or autoregressive, got {emission!r}, whose "
            "densities are no bits"
        )
    if training.components is not None and "logistic" in (own, emission):
        options["num_components"] = training.components
    if emission == "autoregressive":
        waveform = data.sample_rate is not None
        network = {"network": "causal", "lags": training.lags} if waveform else {}
        options |= {"of": own, "width": training.width, **network}
    return {"emission": emission, "emission_options": options or None}


def _optimiser(settings: Settings) -> PyroOptim:
    if settings.weight_decay:
        return pyro.optim.AdamW({"lr": settings.lr, "weight_decay": settings.weight_decay})
    return pyro.optim.Adam({"lr": settings.lr})


def _with_critic(training: Training, view: str, arguments: dict[str, Any]) -> recipes.Recipe:
    normalised = training.constraint == "spectral"
    return recipes.avrnn(
        **arguments,
        base=training.model,
        view=view,
        critic=training.critic,
        critic_dim=training.critic_dim,
        critic_activation="groupsort" if normalised else "relu",
        lipschitz=training.on if normalised else None,
    )


def _adversarial(training: Training, recipe: recipes.Recipe) -> Adversarial:
    """The critic of a recipe as a penalty, with its constraint and its optimiser."""
    assert recipe.critic is not None
    constraint = {
        "spectral": spectral,
        "gradient_penalty": lambda: gradient_penalty(training.strength, on=training.on),
        "clip": lambda: clip(training.strength),
    }[training.constraint]()
    parameters, lr = list(recipe.critic.parameters()), training.critic_lr
    optim: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9))
    if training.constraint == "clip":
        optim = torch.optim.RMSprop(parameters, lr=lr)
    return Adversarial(
        recipe.critic,
        divergence=wasserstein(constraint),
        optim=optim,
        critic_steps=training.critic_steps,
        weight=ramp(training.weight),
        standardise=training.standardise,
    )


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
