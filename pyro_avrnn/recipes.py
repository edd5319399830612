"""Papers by name: functions that assemble model, guide and critic from parts.

Every part is an argument, given by its name or as one's own: a cell as a callable ``(in_dim,
h_dim)``, a prior ``(h_dim, z_dim)``, an emission ``(in_dim, x_dim)``, a guide ``(model)``.

Example:
    >>> r = vrnn(x_dim=12, z_dim=8, h_dim=64, emission="normal")
    >>> x = torch.zeros(2, 5, 12)
    >>> r.model.rollout(r.guide, x, num_particles=4).log_weight.shape
    torch.Size([5, 4, 2])
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from pyro_avrnn.critics import CRITICS, VIEWS, FeedForwardCritic, LSTMCritic, context_dim
from pyro_avrnn.emissions import EMISSIONS
from pyro_avrnn.guides import GUIDES, NoLatents
from pyro_avrnn.models import (
    DMM,
    DSAE,
    RNN,
    SRNN,
    STORN,
    VAE,
    VRNN,
    ConvolutionalGuide,
    GlobalGuide,
    PixelCNN,
    PixelCNNVAE,
)
from pyro_avrnn.networks import CELLS, MLP, RecurrentEncoder
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

#: a part by its name, or what makes one
Part = str | Callable[..., Any]
Options = Mapping[str, Any] | None


@dataclass(frozen=True)
class Recipe:
    """Parts that belong together, and the call that made them."""

    model: SequenceModel
    guide: SequenceGuide
    critic: nn.Module | None = None
    config: dict[str, Any] = field(default_factory=dict)


class Parts(TypedDict, total=False):
    """What recipes take by name, all of it optional; left out, a part is the paper's own.

    Args:
        prior: "conditional", "standard", "gated", "mixture", "flow", or one's own.
        guide: "filtering", "residual" or "flow", each also as "smoothing" ("smoothing_residual",
            "smoothing_flow"), "mean_field" (reads all of x, but not the path of z),
            "mean_field_forward" (x up to t), "mean_field_frame" (x_t alone), or one's own.
        cell: "gru" or "lstm", or one's own.
        min_scale: floor of a normal emission's scale, in units of the data (default 0.001).
        prior_gradient: for a residual guide, whether its gradient reaches the prior (default).
        dropout: share of x's features hidden from recurrence and guide in training mode. As Pyro
            programs, model and guide hide different ones: train by this library's objectives.
        activation: of all hidden layers, "relu" (default), "elu", "silu" or "tanh".
        prior_options, guide_options, emission_options: what else a part takes, such as
            ``{"num_components": 20}`` or ``{"num_flows": 4}``.
    """

    prior: Part
    guide: Part
    cell: Part
    min_scale: float
    prior_gradient: bool
    dropout: float
    activation: str
    prior_options: Options
    guide_options: Options
    emission_options: Options


#: each paper's own parts; a recipe has no others
OWN: dict[str, dict[str, str]] = {
    "rnn": {"cell": "gru"},
    "vae": {"prior": "standard", "guide": "mean_field_frame"},
    "storn": {"prior": "standard", "guide": "mean_field_forward", "cell": "gru"},
    "vrnn": {"prior": "conditional", "guide": "filtering", "cell": "gru"},
    "srnn": {"prior": "conditional", "guide": "smoothing_residual", "cell": "gru"},
    "dmm": {"prior": "gated", "guide": "smoothing"},
    "dsae": {"prior": "conditional", "guide": "full", "cell": "lstm"},
}
#: guides that only a DSAE has
OF_DSAE = {"full": (GUIDES["smoothing"][0], "both"), "factorised": GUIDES["mean_field_frame"]}


def rnn(x_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]) -> Recipe:
    """RNN without latents; its guide is empty.

    Args:
        x_dim, h_dim, emission: as for :func:`vrnn`.
        parts: a cell and options, see :class:`Parts`.
    """
    build = _Builder("rnn", parts, x_dim=x_dim, h_dim=h_dim, emission=emission)
    model = RNN(
        x_dim,
        decoder=build.decoder(h_dim),
        cell=build.cell(h_dim),
        encode_x=build.encode_x(),
    )
    return Recipe(model, NoLatents(model), config=build.config)


def vae(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """VAE of every frame by itself, of Kingma and Welling (2014).

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        parts: see :class:`Parts`; a prior that would read the past reads a constant here.
    """
    build = _Builder("vae", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    model = VAE(
        x_dim,
        z_dim,
        prior=build.prior(1),
        decoder=build.decoder(z_dim),
        encode_x=build.encode_x(),
    )
    return build.recipe(model)


def storn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """STORN of Bayer and Osendorfer (2014).

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        parts: see :class:`Parts`.
    """
    build = _Builder("storn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    model = STORN(
        x_dim,
        z_dim,
        prior=build.prior(h_dim),
        decoder=build.decoder(h_dim),
        cell=build.cell(2 * h_dim),
        encode_x=build.encode_x(),
        encode_z=build.encode_z(),
    )
    return build.recipe(model)


def vrnn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """VRNN of Chung et al. (2015); with ``prior="standard"`` their VRNN-I.

    Args:
        x_dim: X, size of an observation.
        z_dim: Z, size of a latent.
        h_dim: H, width of the state and of every hidden layer.
        emission: "normal", "bernoulli", "mixture" (of normals), "categorical", "logistic"
            (discretised mixture of logistics, for mu-law speech), or one's own.
        parts: prior, guide, cell and options, see :class:`Parts`.

    Raises:
        ValueError: an unknown part, or an option that a part does not take; the known ones are
            listed.
        TypeError: a part that this model does not have.
        NotImplementedError: parts that do not go together, such as a residual guide and a prior
            without a mean.
    """
    build = _Builder("vrnn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    model = VRNN(
        x_dim,
        z_dim,
        prior=build.prior(h_dim),
        decoder=build.decoder(2 * h_dim),
        cell=build.cell(2 * h_dim),
        encode_x=build.encode_x(),
        encode_z=build.encode_z(),
    )
    return build.recipe(model)


def srnn(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """SRNN of Fraccaro et al. (2016).

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        parts: see :class:`Parts`.
    """
    build = _Builder("srnn", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    model = SRNN(
        x_dim,
        z_dim,
        prior=build.prior(h_dim + z_dim),
        decoder=build.decoder(z_dim + h_dim),
        cell=build.cell(h_dim),
        encode_x=build.encode_x(),
    )
    return build.recipe(model)


def dmm(
    x_dim: int, z_dim: int, h_dim: int, emission: Part = "normal", **parts: Unpack[Parts]
) -> Recipe:
    """Deep Markov model of Krishnan et al. (2017); Pyro's tutorial has ``guide="smoothing_flow"``.

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        parts: see :class:`Parts`; dropout concerns the guide alone, the model does not read x.
    """
    build = _Builder("dmm", parts, x_dim=x_dim, z_dim=z_dim, h_dim=h_dim, emission=emission)
    model = DMM(
        x_dim,
        z_dim,
        prior=build.prior(z_dim),
        decoder=build.decoder(z_dim),
        encode_x=build.encode_x(),
    )
    return build.recipe(model)


def dsae(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    f_dim: int = 16,
    emission: Part = "normal",
    **parts: Unpack[Parts],
) -> Recipe:
    """DSAE of Li and Mandt (2018): a latent f of the whole sequence beside z_t.

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        f_dim: F, size of the latent that all steps share.
        parts: see :class:`Parts`; the guide of z is "full" (reads all of x, and f) or
            "factorised" (reads x_t alone), the two of the paper, or any other.
    """
    sizes = {"x_dim": x_dim, "z_dim": z_dim, "h_dim": h_dim, "f_dim": f_dim}
    build = _Builder("dsae", parts, **sizes, emission=emission)
    model = DSAE(
        x_dim,
        z_dim,
        f_dim,
        prior=build.prior(h_dim),
        decoder=build.decoder(z_dim + f_dim),
        cell=build.cell(h_dim),
        encode_x=build.encode_x(),
        encode_z=build.encode_z(),
    )
    guide_of_z = build.guide(model, GUIDES | OF_DSAE)
    return Recipe(model, GlobalGuide(model, guide_of_z, rnn_dim=h_dim), config=build.config)


def pixelcnn(
    x_dim: int,
    *,
    channels: int = 32,
    layers: int = 5,
) -> Recipe:
    """PixelCNN of van den Oord et al. (2016): a binary image by its own past, without a latent.

    Args:
        x_dim: X, pixels of an image, a square number; an image is a sequence of one step.
        channels: maps of each of the two stacks.
        layers: of gated convolutions.

    Raises:
        ValueError: images that are not square, or a size below 1.
    """
    config = _config("pixelcnn", locals())
    model = PixelCNNVAE(x_dim, 0, decoder=PixelCNN(x_dim, 0, channels=channels, layers=layers))
    return Recipe(model, NoLatents(model), config=config)


def pixelcnn_vae(
    x_dim: int,
    z_dim: int,
    *,
    channels: int = 32,
    layers: int = 5,
) -> Recipe:
    """PixelCNN-VAE (Gulrajani et al. 2017; Chen et al. 2017): a latent for the whole image.

    Args:
        x_dim, channels, layers: as for :func:`pixelcnn`.
        z_dim: Z, size of the latent.

    Raises:
        ValueError: images that are not square, or a size below 1.
    """
    config = _config("pixelcnn_vae", locals())
    decoder = PixelCNN(x_dim, z_dim, channels=channels, layers=layers)
    model = PixelCNNVAE(x_dim, z_dim, decoder=decoder)
    return Recipe(model, ConvolutionalGuide(model), config=config)


def avrnn(
    x_dim: int,
    z_dim: int,
    h_dim: int,
    emission: Part = "normal",
    *,
    base: str = "vrnn",
    view: str = "conditional",
    critic: str = "lstm",
    critic_dim: int = 64,
    lipschitz: str | None = None,
    activation: str = "relu",
    hidden_activation: str = "relu",
    window: int = 4,
    **parts: Any,
) -> Recipe:
    """A model with a critic: AVRNN of Huang and Xiao (2021), https://arxiv.org/abs/2108.04496.

    Args:
        x_dim, z_dim, h_dim, emission: as for :func:`vrnn`.
        base: the model; the paper's is "vrnn", any other recipe with latents will do.
        view: what the critic sees: marginal, trajectory, trajectory_redrawn, conditional, joint.
        critic: "lstm", the paper's, or "feedforward".
        critic_dim: width of the critic's layers.
        lipschitz: for a feed-forward critic, spectral normalisation in "z" or in "all" it sees.
        activation: of a feed-forward critic, "relu" or "groupsort".
        hidden_activation: of model and guide, as ``activation`` of :class:`Parts`.
        window: for a feed-forward critic whose view shows a path, how many codes of it are seen.
        parts: of the base, see :class:`Parts`. A VRNN's guide is by default the paper's, which
            uses the mean of the prior and gives it no gradient: ``guide="residual"``,
            ``prior_gradient=False``.

    Raises:
        ValueError: an unknown part; the known ones are listed.
        NotImplementedError: spectral normalisation of an LSTM critic.
    """
    if base == "vrnn":
        parts = {"guide": "residual", "prior_gradient": False} | parts
    given = {k: v for k, v in locals().items() if k != "parts"} | parts
    config = _config("avrnn", given)
    recipe = _pick("base", base, {name: RECIPES[name] for name in WITH_LATENTS})
    sizes = {"x_dim": x_dim, "z_dim": z_dim, "h_dim": h_dim, "emission": emission}
    made = recipe(**sizes, **parts, activation=hidden_activation)
    width = context_dim(view, made.model.h_dim, x_dim)
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
    return Recipe(made.model, made.guide, network, config)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "rnn": rnn,
    "vae": vae,
    "storn": storn,
    "vrnn": vrnn,
    "avrnn": avrnn,
    "srnn": srnn,
    "dmm": dmm,
    "dsae": dsae,
    "pixelcnn": pixelcnn,
    "pixelcnn_vae": pixelcnn_vae,
}
#: what may have a critic
WITH_LATENTS = ("vae", "storn", "vrnn", "srnn", "dmm", "dsae")


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write model, guide, critic and the call that made them, atomically.

    Args:
        recipe: made by a function of this module.
        path: file to write; :func:`load` reads it.

    Raises:
        ValueError: a part that has no name, as it is one's own.
    """
    for argument, value in recipe.config.items():
        if callable(value):
            raise ValueError(
                f"{argument} of this recipe is one's own ({_called(value)}), and a file of "
                "parameters can only name parts; keep the state_dict of model and guide instead"
            )
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
                values = content[part].values()
                dtypes = {value.dtype for value in values if value.is_floating_point()}
                module.to(*dtypes).load_state_dict(content[part])
    except Exception as error:
        raise ValueError(
            f"{path} is not a parameter file of this library, or is damaged "
            f"({type(error).__name__}); give a file that recipes.save wrote"
        ) from error
    return recipe


class _Builder:
    """What a recipe was called with, and the parts made of it.

    Args:
        name: of the recipe.
        parts: given by name; the others are the paper's own.
        sizes: of the model, and its emission.

    Raises:
        TypeError: a part or option that the model does not have.
    """

    def __init__(self, name: str, parts: Parts, **sizes: Any) -> None:
        own = OWN[name]
        known: dict[str, Any] = {"min_scale": 1e-3, "dropout": 0.0, "activation": "relu"}
        known |= {"prior_gradient": True} if "guide" in own else {}
        known |= {f"{part}_options": None for part in ("prior", "guide") if part in own}
        known |= {"emission_options": None, **own}
        for argument in parts:
            if argument not in known:
                raise TypeError(
                    f"{argument} is no part of {name}; it takes {', '.join(sorted(known))}"
                )
        self.given: dict[str, Any] = {**sizes, **known, **parts}
        self.config = _config(name, self.given)
        self.hidden: dict[str, Any] = {
            "hidden": (self.given["h_dim"],),
            "activation": self.given["activation"],
        }

    def prior(self, h_dim: int) -> nn.Module:
        kind, options = self._chosen("prior", PRIORS)
        if kind is PRIORS["standard"]:
            return kind(self.given["z_dim"], **options)
        return kind(h_dim, self.given["z_dim"], **options)

    def decoder(self, in_dim: int) -> nn.Module:
        kind, options = self._chosen("emission", EMISSIONS, min_scale=self.given["min_scale"])
        return kind(in_dim, self.given["x_dim"], **options)

    def cell(self, in_dim: int) -> Any:
        return _pick("cell", self.given["cell"], CELLS)(in_dim, self.given["h_dim"])

    def encode_x(self) -> nn.Module:
        return self._features(self.given["x_dim"], self.given["dropout"])

    def encode_z(self) -> nn.Module:
        return self._features(self.given["z_dim"], 0.0)

    def guide(self, model: SequenceModel, known: Mapping[str, Any] = GUIDES) -> SequenceGuide:
        made = _pick("guide", self.given["guide"], known)
        if not isinstance(made, tuple):
            return made(model, **(self.given["guide_options"] or {}))
        kind, reads = made
        options = self._options("guide", kind, prior_gradient=self.given["prior_gradient"])
        if reads is not None:
            options["encoder"] = RecurrentEncoder(model.c_dim, self.given["h_dim"], reads)
        return kind(model, **options)

    def recipe(self, model: SequenceModel) -> Recipe:
        return Recipe(model, self.guide(model), config=self.config)

    def _features(self, in_dim: int, dropout: float) -> nn.Module:
        sizes, activation = [in_dim, self.given["h_dim"]], self.given["activation"]
        return MLP(sizes, final=True, dropout=dropout, activation=activation)

    def _chosen(self, what: str, known: Mapping[str, Any], **own: Any) -> tuple[Any, Any]:
        kind = _pick(what, self.given[what], known)
        if not isinstance(self.given[what], str):
            return kind, dict(self.given[f"{what}_options"] or {})
        return kind, self._options(what, kind, **own)

    def _options(self, what: str, kind: Any, **own: Any) -> dict[str, Any]:
        """Of what all parts get the options this one takes, then the user's."""
        takes = [*signature(kind).parameters]
        given = self.given[f"{what}_options"] or {}
        for option in given:
            if option not in takes:
                raise ValueError(
                    f"{what}_options of {self.given[what]!r} must be among "
                    f"{', '.join(takes[1:])}, got {option!r}"
                )
        common = {k: v for k, v in (self.hidden | own).items() if k in takes}
        needed = [
            name
            for name, p in signature(kind).parameters.items()
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in given
        ]
        if needed:
            raise ValueError(
                f"{what} {self.given[what]!r} needs {', '.join(needed)}; give {what}_options="
                f"{{{needed[0]!r}: ...}}"
            )
        return {**common, **given}


def _config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The call as plain values, its sizes checked before any network is built."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in arguments.items()}
    plain |= {k: dict(v) for k, v in plain.items() if isinstance(v, Mapping)}
    for size in ("x_dim", "z_dim", "h_dim", "f_dim", "critic_dim"):
        if plain.get(size, 1) < 1:
            hint = "; recipes.rnn has no latents" if size == "z_dim" else ""
            raise ValueError(f"{size} must be at least 1, got {plain[size]}{hint}")
    return {**plain, "recipe": name}


def _pick(argument: str, part: Any, known: Iterable[str]) -> Any:
    if callable(part):
        return part
    if part not in known:
        own = "" if argument in ("critic", "base") else ", or one's own"
        raise ValueError(f"{argument} must be one of {', '.join(known)}{own}, got {part!r}")
    return known[part] if isinstance(known, Mapping) else part


def _called(part: Any) -> str:
    return getattr(part, "__name__", type(part).__name__)
