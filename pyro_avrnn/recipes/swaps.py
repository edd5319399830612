"""Another guide for a model that is trained."""

from typing import Any

from inference.protocols import of_kind
from pyro_avrnn.recipes.build import Options, Recipe
from pyro_avrnn.recipes.papers import RECIPES
from pyro_avrnn.recipes.with_critic import RATIO_ROLES


def with_guide(recipe: Recipe, guide: str, guide_options: Options = None) -> Recipe:
    """The same model, a copy, with a new guide that has still to learn.

    It is fitted to the model by SVI with the model's parameters frozen:
    ``recipe.model.requires_grad_(False)``.

    Args:
        recipe: of a model with latents, trained or not.
        guide: its name, see :class:`Parts`.
        guide_options: of the new guide.

    Returns:
        The recipe, with a copy of the critic, unless that was part of the old guide's objective.

    Raises:
        ValueError: a guide or option that the model does not have, or a model without latents.
    """
    of_kind(Recipe, "a recipe of this package", recipe=recipe)
    if "guide" not in recipe.config:
        raise ValueError(
            f"recipe must be of a model that has a choice of guides, got {recipe.config['recipe']}"
        )
    config: dict[str, Any] = {**recipe.config, "guide": guide, "guide_options": guide_options}
    if config.get("role") in RATIO_ROLES:
        config["recipe"] = config.pop("base")
        for name in ("role", "critic_dim"):
            del config[name]
    made = RECIPES[config.pop("recipe")](**config)
    made.model.to(next(recipe.model.parameters())).load_state_dict(recipe.model.state_dict())
    made.guide.to(next(recipe.model.parameters()))
    if made.critic is not None and recipe.critic is not None:
        made.critic.to(next(recipe.critic.parameters()))
        made.critic.load_state_dict(recipe.critic.state_dict())
    return made
