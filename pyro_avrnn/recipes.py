"""Papers by name: functions that assemble model, guide and critic from parts.

Example:
    >>> r = vrnn(x_dim=12, z_dim=8, h_dim=64, emission="normal")
    >>> x = torch.zeros(2, 5, 12)
    >>> r.model.rollout(r.guide, x, num_particles=4).log_weight.shape
    torch.Size([5, 4, 2])
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_avrnn.critics import CRITICS, VIEWS, FeedForwardCritic, LSTMCritic, context_dim
from pyro_avrnn.emissions import EMISSIONS, BernoulliEmission, NormalEmission
from pyro_avrnn.guides import GUIDES, FilteringGuide, NoLatents, ResidualGuide
from pyro_avrnn.models import RNN, VRNN
from pyro_avrnn.networks import CELLS, MLP
from pyro_avrnn.priors import ConditionalNormal, StandardNormal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

PRIORS = ("conditional", "standard")


@dataclass(frozen=True)
class Recipe:
    """Parts that belong together, and the call that made them."""

    model: SequenceModel
    guide: SequenceGuide
    critic: nn.Module | None = None
    config: dict[str, Any] = field(default_factory=dict)


def rnn(
    x_dim: int,
    h_dim: int,
    emission: str = "normal",
    *,
    cell: str = "gru",
    min_scale: float = 1e-3,
    dropout: float = 0.0,
    activation: str = "relu",
) -> Recipe:
    """RNN without latents; its guide is empty.

    Args:
        x_dim: X, size of an observation.
        h_dim: H, width of the state and of every hidden layer.
        emission: "normal" or "bernoulli".
        cell: "gru" or "lstm".
        min_scale: floor of a normal emission's scale, in units of the data.
        dropout: share of x's features hidden from the recurrence in training.
        activation: of all hidden layers, "relu", "elu", "silu" or "tanh".

    Raises:
        ValueError: an unknown part; the known ones are listed.
    """
    config = _config("rnn", locals())
    model = RNN(
        x_dim,
        decoder=_emission(emission, h_dim, x_dim, h_dim, min_scale, activation),
        cell=_pick("cell", cell, CELLS)(h_dim, h_dim),
        encode_x=MLP([x_dim, h_dim], final=True, dropout=dropout, activation=activation),
    )
    return Recipe(model, NoLatents(model), config=config)


def vrnn(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    emission: str = "normal",
    *,
    prior: str = "conditional",
    guide: str = "filtering",
    cell: str = "gru",
    min_scale: float = 1e-3,
    prior_gradient: bool = True,
    dropout: float = 0.0,
    activation: str = "relu",
) -> Recipe:
    """VRNN of Chung et al. (2015).

    Args:
        x_dim: X, size of an observation.
        z_dim: Z, size of a latent.
        h_dim: H, width of the state and of every hidden layer.
        emission: "normal" or "bernoulli".
        prior: "conditional" or "standard".
        guide: "filtering" or "residual".
        cell: "gru" or "lstm".
        min_scale: floor of a normal emission's scale, in units of the data.
        prior_gradient: for the residual guide, whether its gradient reaches the prior.
        dropout: share of x's features hidden from recurrence and guide in training mode. As Pyro
            programs, model and guide hide different ones: train by this library's objectives.
        activation: of all hidden layers, "relu", "elu", "silu" or "tanh".

    Raises:
        ValueError: an unknown part; the known ones are listed.
    """
    config = _config("vrnn", locals())
    _pick("prior", prior, PRIORS)
    model = VRNN(
        x_dim,
        z_dim,
        prior=(
            StandardNormal(z_dim)
            if prior == "standard"
            else ConditionalNormal(h_dim, z_dim, (h_dim,), activation=activation)
        ),
        decoder=_emission(emission, 2 * h_dim, x_dim, h_dim, min_scale, activation),
        cell=_pick("cell", cell, CELLS)(2 * h_dim, h_dim),
        encode_x=MLP([x_dim, h_dim], final=True, dropout=dropout, activation=activation),
        encode_z=MLP([z_dim, h_dim], final=True, activation=activation),
    )
    proposal: FilteringGuide
    sizes = (h_dim, h_dim, (h_dim,))
    if _pick("guide", guide, GUIDES) is ResidualGuide:
        proposal = ResidualGuide(
            model, *sizes, activation=activation, prior_gradient=prior_gradient
        )
    else:
        proposal = FilteringGuide(model, *sizes, activation=activation)
    return Recipe(model, proposal, config=config)


def avrnn(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    emission: str = "normal",
    *,
    prior: str = "conditional",
    guide: str = "residual",
    cell: str = "gru",
    min_scale: float = 1e-3,
    prior_gradient: bool = False,
    dropout: float = 0.0,
    hidden_activation: str = "relu",
    view: str = "conditional",
    critic: str = "lstm",
    critic_dim: int = 64,
    lipschitz: str | None = None,
    activation: str = "relu",
    window: int = 4,
) -> Recipe:
    """VRNN with a critic: AVRNN of Huang and Xiao (2021), https://arxiv.org/abs/2108.04496.

    Args:
        x_dim, z_dim, h_dim, emission, prior, guide, cell, min_scale: as for :func:`vrnn`; the
            guide defaults to the paper's, which uses the mean of the prior.
        prior_gradient: False keeps the reconstruction step from moving the prior.
        dropout: as for :func:`vrnn`.
        hidden_activation: of model and guide, as ``activation`` of :func:`vrnn`.
        view: what the critic sees: marginal, trajectory, trajectory_redrawn, conditional, joint.
        critic: "lstm", the paper's, or "feedforward".
        critic_dim: width of the critic's layers.
        lipschitz: for a feed-forward critic, spectral normalisation in "z" or in "all" it sees.
        activation: of a feed-forward critic, "relu" or "groupsort".
        window: for a feed-forward critic whose view shows a path, how many codes of it are seen.

    Raises:
        ValueError: an unknown part; the known ones are listed.
        NotImplementedError: spectral normalisation of an LSTM critic.
    """
    config = _config("avrnn", locals())
    base = vrnn(
        x_dim,
        z_dim,
        h_dim,
        emission,
        prior=prior,
        guide=guide,
        cell=cell,
        min_scale=min_scale,
        prior_gradient=prior_gradient,
        dropout=dropout,
        activation=hidden_activation,
    )
    width = context_dim(view, h_dim, x_dim)
    network: nn.Module
    if _pick("critic", critic, CRITICS) == "lstm":
        if lipschitz is not None:
            raise NotImplementedError(
                "spectral normalisation does not bound an LSTM critic: use critic='feedforward', "
                "or a gradient penalty or weight clipping with lipschitz=None"
            )
        network = LSTMCritic(z_dim, width, critic_dim)
    else:
        if VIEWS[view][2] and window < 1:
            raise ValueError(f"window must be at least 1 for view {view!r}, got {window}")
        network = FeedForwardCritic(
            z_dim,
            width,
            critic_dim,
            activation=activation,
            lipschitz=lipschitz,
            window=window if VIEWS[view][2] else 0,
        )
    return Recipe(base.model, base.guide, network, config)


RECIPES: dict[str, Callable[..., Recipe]] = {"rnn": rnn, "vrnn": vrnn, "avrnn": avrnn}


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write model, guide, critic and the call that made them, atomically.

    Args:
        recipe: made by a function of this module.
        path: file to write; :func:`load` reads it.
    """
    content = {"recipe": recipe.config, "model": recipe.model.state_dict()}
    content["guide"] = recipe.guide.state_dict()
    if recipe.critic is not None:
        content["critic"] = recipe.critic.state_dict()
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe that :func:`save` wrote, with its parameters.

    Nothing is unpickled: tensors and plain values only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or a damaged one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no parameters at {path}; give a file that recipes.save wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config = dict(content["recipe"])
        recipe = RECIPES[config.pop("recipe")](**config)
        for part in ("model", "guide", "critic"):
            if (module := getattr(recipe, part)) is not None:
                dtypes = {value.dtype for value in content[part].values()}
                module.to(*dtypes).load_state_dict(content[part])
    except Exception as error:
        raise ValueError(
            f"{path} is not a parameter file of this library, or is damaged "
            f"({type(error).__name__}); give a file that recipes.save wrote"
        ) from error
    return recipe


def _config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The call as plain values, its sizes checked before any network is built."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in arguments.items()}
    for size in ("x_dim", "z_dim", "h_dim", "critic_dim"):
        if plain.get(size, 1) < 1:
            hint = "; recipes.rnn has no latents" if size == "z_dim" else ""
            raise ValueError(f"{size} must be at least 1, got {plain[size]}{hint}")
    return {**plain, "recipe": name}


def _pick(argument: str, name: str, known: Iterable[str]) -> Any:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")
    return known[name] if isinstance(known, dict) else name


def _emission(
    name: str, in_dim: int, x_dim: int, h_dim: int, min_scale: float, activation: str
) -> NormalEmission | BernoulliEmission:
    kind = _pick("emission", name, EMISSIONS)
    if kind is NormalEmission:
        return NormalEmission(in_dim, x_dim, (h_dim,), min_scale=min_scale, activation=activation)
    return BernoulliEmission(in_dim, x_dim, (h_dim,), activation=activation)
