"""The parts of one training: model, guide and critic, objective, and hooks between SVI steps."""

from typing import Any, NamedTuple

import pyro
from pyro.optim import PyroOptim

from inference import ELBO, FIVO, IWAE, AdaptiveClip, Adversarial
from inference.clipping import Clipper
from inference.objectives import Objective
from inference.protocols import Hook
from pyro_avrnn import recipes
from pyro_avrnn.cli.critics import chosen
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training, ramp
from pyro_avrnn.data import Dataset

BOUNDS: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "fivo": FIVO}


class Parts(NamedTuple):
    """What the SVI of a training needs."""

    recipe: recipes.Recipe  # model, guide, critic
    optimiser: PyroOptim
    objective: Objective
    hooks: tuple[Hook, ...]
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
    made = chosen(training, _recipe_arguments(training, data, settings), settings.steps)
    objective = (made.objective or BOUNDS[training.bound])(
        num_particles=training.particles,
        kl_weight=ramp(training.kl),
        penalties=made.penalties,
        recompute=settings.recompute,
        compile=settings.compile,
        **made.options,
    )
    rest = objective, made.hooks, made.adversarial, _clip(settings.clip_norm)
    return Parts(made.recipe, optimiser(settings), *rest)


def refined(training: Training, recipe: recipes.Recipe) -> recipes.Recipe:
    """The recipe of a trained row with its prior refined; its critic has still to learn."""
    if recipe.critic is not None:  # it has learnt in the loop
        return recipe
    sizes = {"num_candidates": training.candidates, "critic_dim": training.critic_dim}
    return recipes.refined(recipe, **sizes)


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
    if training.model == "dsae":
        arguments |= {"f_dim": training.f_dim, "normalise": training.normalise}
        arguments["segment"] = _shares(training.segment)
    for part in ("guide", "prior", "cell"):
        chosen = getattr(training, part)
        if part in own:
            arguments[part] = chosen or own[part]
        elif chosen is not None:
            raise ValueError(f"{part} is no part of the model {training.model!r}, got {chosen!r}")
    return arguments


def _shares(text: str | None) -> tuple[float, float] | None:
    """Shares of a sequence, such as 0.3-0.7."""
    if text is None:
        return None
    try:
        least, most = map(float, text.split("-"))
    except ValueError:
        raise ValueError(
            f"option segment must be two shares of a sequence such as 0.3-0.7, got {text!r}"
        ) from None
    return least, most


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


def optimiser(settings: Settings) -> PyroOptim:
    """Adam, with decay of weights where it is asked for."""
    if settings.weight_decay:
        return pyro.optim.AdamW({"lr": settings.lr, "weight_decay": settings.weight_decay})
    return pyro.optim.Adam({"lr": settings.lr})
