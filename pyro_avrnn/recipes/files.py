"""The one file of parameters: a recipe's tensors, and the call that made it."""

import os
from pathlib import Path

from inference.files import load_plain, save_plain
from pyro_avrnn.recipes.build import Recipe
from pyro_avrnn.recipes.papers import RECIPES

_FORMAT = "pyro-avrnn parameters 2"


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write model, guide, critic and the call that made them, atomically.

    Args:
        recipe: made by a function of this package.
        path: file to write; :func:`load` reads it.

    Raises:
        ValueError: a part of your own, which a file cannot name.
    """
    for argument, value in recipe.config.items():
        if callable(value):
            raise ValueError(
                f"{argument} of this recipe is your own "
                f"({getattr(value, '__name__', type(value).__name__)}), and a file of parameters "
                "can only name parts; save the state_dict of model and guide instead"
            )
    parts = {"model": recipe.model, "guide": recipe.guide, "critic": recipe.critic}
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    save_plain(path, {"format": _FORMAT, "recipe": recipe.config, **states})


def load(path: str | os.PathLike[str]) -> Recipe:
    """Make the recipe again that :func:`save` wrote, with its parameters.

    Nothing is unpickled: tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or version, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no parameters at {path}; give a file that recipes.save wrote")
    try:
        content = load_plain(path)
        if content["format"] != _FORMAT:
            raise ValueError("another format")
        config = dict(content["recipe"])
        recipe = RECIPES[config.pop("recipe")](**config)
        for part in ("model", "guide", "critic"):
            if (module := getattr(recipe, part)) is not None:
                values = content[part].values()
                dtypes = {value.dtype for value in values if value.is_floating_point()}
                module.to(*dtypes).load_state_dict(content[part])
    except Exception as error:
        raise ValueError(
            f"{path} is not a parameter file of this version of pyro-avrnn, or is damaged "
            f"({type(error).__name__}); give a file that recipes.save wrote"
        ) from error
    return recipe
