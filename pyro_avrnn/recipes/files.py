"""The one file of parameters: a recipe's tensors, and the call that made it."""

import os
from typing import Any

import torch

from inference.files import check_plain, file_path, load_plain, save_plain
from inference.protocols import of_kind
from pyro_avrnn.recipes.build import Recipe
from pyro_avrnn.recipes.papers import RECIPES

_FORMAT = "pyro-avrnn parameters 2"


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write model, guide, critic and the call that made them, atomically.

    Args:
        recipe: made by a function of this package.
        path: file to write; :func:`load` reads it.

    Raises:
        TypeError: no recipe.
        ValueError: a part of your own, which a file cannot name, or other parts than those the
            recipe made.
    """
    of_kind(Recipe, "a recipe of this package", recipe=recipe)
    for argument, value in recipe.config.items():
        if callable(value):
            raise ValueError(
                f"{argument} of this recipe is your own "
                f"({getattr(value, '__name__', type(value).__name__)}), and a file of parameters "
                "can only name parts; save the state_dict of model and guide instead"
            )
    parts = {"model": recipe.model, "guide": recipe.guide, "critic": recipe.critic}
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    content = {"format": _FORMAT, "recipe": recipe.config, **states}
    try:  # what cannot be read again would be lost
        check_plain(content, "the recipe")
        with torch.random.fork_rng():
            _made(content)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"recipe cannot be written so that it can be read again ({reason}); give plain values "
            "as options, or save the state_dict of model and guide instead"
        ) from error
    save_plain(path, content)


def load(path: str | os.PathLike[str]) -> Recipe:
    """Make the recipe again that :func:`save` wrote, with its parameters.

    Nothing is unpickled: tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or version, or a damaged one.
    """
    if not file_path(path).is_file():
        raise FileNotFoundError(f"no parameters at {path}; give a file that recipes.save wrote")
    try:
        content = load_plain(path)
        if content["format"] != _FORMAT:
            raise ValueError("another format")
        recipe = _made(content)
    except Exception as error:
        raise ValueError(
            f"{path} is not a parameter file of this version of pyro-avrnn, or is damaged "
            f"({type(error).__name__}); give a file that recipes.save wrote"
        ) from error
    return recipe


def _made(content: Any) -> Recipe:
    """The recipe of a file's content."""
    config = dict(content["recipe"])
    recipe = RECIPES[config.pop("recipe")](**config)
    for part in ("model", "guide", "critic"):
        if (module := getattr(recipe, part)) is not None:
            values = content[part].values()
            dtypes = {value.dtype for value in values if value.is_floating_point()}
            module.to(*dtypes).load_state_dict(content[part])
    return recipe
