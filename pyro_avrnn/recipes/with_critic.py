"""Models with a critic: the network of a penalty, or one in the prior."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, nn

from inference.protocols import counts, of_kind, one_of, said
from pyro_avrnn.critics import (
    CRITICS,
    VIEWS,
    FeedForwardCritic,
    LogRatio,
    LSTMCritic,
    context_dim,
)
from pyro_avrnn.pair_critics import ConditionalPairCritic, PairCritic, Reads
from pyro_avrnn.recipes.build import WITH_LATENTS, Recipe, plain_config
from pyro_avrnn.refinement import RefinedPrior


def penalty_critic(
    model: Any,
    *,
    view: str,
    critic: str,
    critic_dim: int,
    critic_activation: str,
    lipschitz: str | None,
    window: int,
) -> nn.Module:
    """The critic of a model by name; arguments and errors are those of :func:`~.papers.avrnn`."""
    width, sees_path = context_dim(view, model.h_dim, model.x_dim), VIEWS[view][2]
    if critic not in CRITICS:
        raise ValueError(
            f"critic must be one of {', '.join(CRITICS)}, got {said(critic)}; make a critic of "
            "your own by itself: Adversarial(critic)"
        )
    if critic == "lstm":
        if lipschitz is not None:
            raise NotImplementedError(
                "spectral normalisation does not bound an LSTM critic: use critic='feedforward', "
                "or a gradient penalty or weight clipping with lipschitz=None"
            )
        return LSTMCritic(model.z_dim, width, critic_dim, view=view)
    counts(int(sees_path), f" for view {view!r}", window=window)
    return FeedForwardCritic(
        model.z_dim,
        width,
        critic_dim,
        view=view,
        activation=critic_activation,
        lipschitz=lipschitz,
        window=window if sees_path else 0,
    )


#: roles whose critic stands in the bound of a guide without density
RATIO_ROLES = ("ratio", "ratio_to_prior")


def ratio_critic(recipe: Recipe, critic_dim: int) -> nn.Module:
    """The critic of AVB, which reads z, h and what the guide reads of x."""
    guide: Any = recipe.guide
    reads = getattr(getattr(guide, "network", None), "in_dim", None)
    if reads is None or not getattr(guide, "reads_state", False):
        raise ValueError(
            f"guide must read the state and x for AVB, as 'implicit' does, got a "
            f"{type(guide).__name__}"
        )
    z_dim = recipe.model.z_dim
    return FeedForwardCritic(z_dim, reads, critic_dim, view="joint", activation="silu")


#: estimators of mutual information, by what their critic is: a score, or a density
ESTIMATORS: dict[str, Callable[..., nn.Module]] = {
    **dict.fromkeys(("density_ratio", "nwj", "infonce"), PairCritic),
    **dict.fromkeys(("club", "reversal"), ConditionalPairCritic),
}


def information_critic(
    z_dim: int, f_dim: int, estimator: str, critic_dim: int = 64, reads: Reads = "path"
) -> nn.Module:
    """The critic of pairs of an f and a path of z that an estimator of I(f; z) needs.

    Raises:
        ValueError: an unknown estimator, or a size below 1.
    """
    one_of(ESTIMATORS, information=estimator)
    return ESTIMATORS[estimator](z_dim, f_dim, critic_dim, reads=reads)


def refined(recipe: Recipe, *, num_candidates: int = 16, critic_dim: int = 64) -> Recipe:
    """Put a refined prior into the model of a recipe, trained or not: :class:`RefinedPrior`.

    The prior is changed in place, so that the guide, which knows the model, stays its guide. It
    is equal to its base until its critic has learnt: see :func:`inference.refine`.

    Args:
        recipe: of a model with latents.
        num_candidates: S, draws of the base among which the prior chooses.
        critic_dim: width of the critic's two layers.

    Returns:
        The same model and guide, and the critic.

    Raises:
        ValueError: a model without latents in each step, or one whose prior is refined already.
    """
    of_kind(Recipe, "a recipe of this package", recipe=recipe)
    base = recipe.config.get("base", recipe.config.get("recipe"))
    model: Any = recipe.model
    if base not in WITH_LATENTS or isinstance(model.prior, RefinedPrior):
        has = "a refined prior already" if base in WITH_LATENTS else "no prior of each step"
        raise ValueError(
            f"recipe must be of a model whose prior can be refined ({', '.join(WITH_LATENTS)}), "
            f"but this {type(model).__name__} has {has}"
        )
    like, training = next(model.parameters()), model.training
    critic = LogRatio(model.z_dim, _read_by_prior(model), critic_dim).to(like)
    model.prior = RefinedPrior(model.prior, critic, num_candidates)
    model.train(training)
    own = {"base": base, "role": "refine"}
    own |= {"num_candidates": num_candidates, "critic_dim": critic_dim}
    config = plain_config("avrnn", {**recipe.config, **own})
    return Recipe(model, recipe.guide, critic, config)


@torch.no_grad()
def _read_by_prior(model: Any) -> int:
    """H, the width of what the prior is given, even where it depends on nothing."""
    seen: list[int] = []
    handle = model.prior.register_forward_pre_hook(lambda _, h: seen.append(h[0].shape[-1]))
    model.transition(model.init(Size((1,))))
    handle.remove()
    return seen[0]
