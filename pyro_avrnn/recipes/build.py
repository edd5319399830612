"""Parts by name: what a recipe was called with, and the networks made of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import nn

from inference.protocols import counts
from pyro_avrnn.autoregressive import AutoregressiveEmission
from pyro_avrnn.convolutions import ImageEmission, ImageFeatures
from pyro_avrnn.emissions import EMISSIONS as INDEPENDENT
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.implicit import IMPLICIT
from pyro_avrnn.networks import CELLS, MLP, RecurrentEncoder
from pyro_avrnn.networks import FEATURES as OF_VECTORS
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

#: a part by its name, or a callable that makes one
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
    """Optional arguments of recipes; a part that is left out is the paper's own.

    Args:
        prior: "conditional", "standard", "gated", "mixture", "flow", or your own.
        guide: "filtering", "residual" or "flow", each also as "smoothing" ("smoothing_residual",
            "smoothing_flow"), "mean_field" (reads all of x, but not the path of z),
            "mean_field_forward" (x up to t), "mean_field_frame" (x_t alone), "implicit" or
            "smoothing_implicit" (no density, for AVB), or your own.
        cell: "gru" or "lstm", or your own.
        features: what x is read by, "mlp" (default), "loudness" for pieces of waveform, which it
            reads in units of their root mean square, "image" for square images, by convolutions;
            or your own.
        min_scale: floor of a normal emission's scale, in units of the data (default 0.001).
        prior_gradient: for a residual guide, whether its gradient reaches the prior (default).
        dropout: share of x's features hidden from recurrence and guide in training mode. As Pyro
            programs, model and guide hide different ones: train by this library's objectives.
        activation: of all hidden layers, "relu" (default), "elu", "silu" or "tanh".
        prior_options, guide_options, emission_options: further arguments of a part, such as
            ``{"num_components": 20}`` or ``{"num_flows": 4}``; :data:`TAKES` lists them.
    """

    prior: Part
    guide: Part
    cell: Part
    features: Part
    min_scale: float
    prior_gradient: bool
    dropout: float
    activation: str
    prior_options: Options
    guide_options: Options
    emission_options: Options


EMISSIONS: dict[str, type[nn.Module]] = INDEPENDENT | {
    "autoregressive": AutoregressiveEmission,
    "image": ImageEmission,
}
FEATURES: dict[str, type[nn.Module]] = {**OF_VECTORS, "image": ImageFeatures}
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
#: recipes of models with latents in each step, which may have a critic
WITH_LATENTS = ("vae", "storn", "vrnn", "srnn", "dmm", "dsae")
#: guides that only a DSAE has
OF_DSAE = {"full": (GUIDES["smoothing"][0], "both"), "factorised": GUIDES["mean_field_frame"]}

_NETWORK = ("hidden", "activation")
_NORMAL = (*_NETWORK, "min_scale")
_GUIDE = (*_NORMAL, "encoder")
#: what the parts take as options beyond their sizes; "" stands for all others of a kind
TAKES: dict[str, dict[str, tuple[str, ...]]] = {
    "prior": {
        "": _NORMAL,
        "standard": (),
        "mixture": (*_NORMAL, "num_components"),
        "flow": (*_NORMAL, "num_flows"),
    },
    "emission": {
        "": _NORMAL,
        "bernoulli": _NETWORK,
        "mixture": (*_NORMAL, "num_components"),
        "categorical": (*_NETWORK, "num_classes"),
        "logistic": (*_NETWORK, "bits", "num_components", "min_log_scale", "unit"),
        "image": (*_NORMAL, "channels"),
        "autoregressive": ("of", "network", "width", "lags"),  # and what that emission takes
    },
    "guide": {
        "": _GUIDE,
        **dict.fromkeys(("residual", "smoothing_residual"), (*_GUIDE, "prior_gradient")),
        **dict.fromkeys(("flow", "smoothing_flow"), (*_GUIDE, "num_flows")),
    },
}


class Builder:
    """Makes the parts of one recipe.

    Args:
        name: of the recipe.
        parts: given by name; the others are the paper's own.
        sizes: of the model, and its emission.

    Attributes:
        config: the call as plain values, from which the same recipe can be made again.

    Raises:
        TypeError: a part or option that the model does not have.
        ValueError: a size below 1.
    """

    def __init__(self, name: str, parts: Parts, **sizes: Any) -> None:
        own = OWN[name]
        known: dict[str, Any] = {"min_scale": 1e-3, "dropout": 0.0, "activation": "relu"}
        known |= {"features": "mlp"}
        known |= {"prior_gradient": True} if "guide" in own else {}
        known |= {f"{part}_options": None for part in ("prior", "guide") if part in own}
        known |= {"emission_options": None, **own}
        for argument in parts:
            if argument not in known:
                raise TypeError(
                    f"{argument} is no part of {name}; it takes {', '.join(sorted(known))}"
                )
        self.given: dict[str, Any] = {**sizes, **known, **parts}
        self.config = plain_config(name, self.given)

    def parts(self, encoders: str, **reads: int) -> dict[str, Any]:
        """Parts of a model by the names of its arguments.

        Args:
            encoders: features the model has, "x" or "x z".
            reads: width of what prior, decoder and cell read.
        """
        made = {part: getattr(self, f"_{part}")(width) for part, width in reads.items()}
        dropout = {"x": self.given["dropout"], "z": 0.0}
        for of in encoders.split():
            sizes = [self.given[f"{of}_dim"], self.given["h_dim"]]
            options = {"dropout": dropout[of], "activation": self.given["activation"]}
            kind = pick("features", self.given["features"], FEATURES) if of == "x" else MLP
            made[f"encode_{of}"] = kind(sizes, final=True, **options)
        return made

    def _prior(self, h_dim: int) -> nn.Module:
        kind, options = self._chosen("prior", PRIORS)
        sizes = () if kind is PRIORS["standard"] else (h_dim,)
        return kind(*sizes, self.given["z_dim"], **options)

    def _decoder(self, in_dim: int) -> nn.Module:
        kind, options = self._chosen("emission", EMISSIONS, min_scale=self.given["min_scale"])
        return kind(in_dim, self.given["x_dim"], **options)

    def _cell(self, in_dim: int) -> Any:
        return pick("cell", self.given["cell"], CELLS)(in_dim, self.given["h_dim"])

    def guide(
        self, model: SequenceModel, known: Mapping[str, Any] = GUIDES | IMPLICIT
    ) -> SequenceGuide:
        """The guide of a model, which is complete by now."""
        made = pick("guide", self.given["guide"], known)
        if not isinstance(made, tuple):
            return made(model, **(self.given["guide_options"] or {}))
        kind, reads = made
        options = self._options("guide", prior_gradient=self.given["prior_gradient"])
        if reads is not None:
            options["encoder"] = RecurrentEncoder(model.c_dim, self.given["h_dim"], reads)
        return kind(model, **options)

    def recipe(self, model: SequenceModel) -> Recipe:
        """Model and guide."""
        return Recipe(model, self.guide(model), config=self.config)

    def _chosen(self, what: str, known: Mapping[str, Any], **own: Any) -> tuple[Any, Any]:
        kind = pick(what, self.given[what], known)
        if not isinstance(self.given[what], str):
            return kind, dict(self.given[f"{what}_options"] or {})
        return kind, self._options(what, **own)

    def _options(self, what: str, **own: Any) -> dict[str, Any]:
        """The recipe's own settings that this part takes, then the user's."""
        name, given = self.given[what], self.given[f"{what}_options"] or {}
        takes = TAKES[what].get(name, TAKES[what][""])
        if name == "autoregressive":
            name = given.get("of", "bernoulli")
            takes += TAKES[what].get(name, TAKES[what][""])
        for option in given:
            if option not in takes:
                raise ValueError(
                    f"{what}_options of {self.given[what]!r} must be among "
                    f"{', '.join(takes) or 'none'}, got {option!r}"
                )
        if name == "categorical" and "num_classes" not in given:
            raise ValueError(
                "emission 'categorical' needs num_classes; give "
                "emission_options={'num_classes': ...}"
            )
        own |= {"hidden": (self.given["h_dim"],), "activation": self.given["activation"]}
        return {**{k: v for k, v in own.items() if k in takes}, **given}


def plain_config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A recipe's call as plain values.

    Raises:
        ValueError: a size below 1.
    """
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in arguments.items()}
    plain |= {k: dict(v) for k, v in plain.items() if isinstance(v, Mapping)}
    for size in ("x_dim", "z_dim", "h_dim", "f_dim", "critic_dim"):
        hint = "; recipes.rnn has no latents" if size == "z_dim" else ""
        if size in plain:
            counts(1, hint, **{size: plain[size]})
    return {**plain, "recipe": name}


def pick(argument: str, part: Any, known: Iterable[str]) -> Any:
    """Look a part up by its name, or return the callable given.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if callable(part):
        return part
    if not isinstance(part, str) or part not in known:
        own = "" if argument in ("critic", "base") else ", or your own"
        raise ValueError(f"{argument} must be one of {', '.join(known)}{own}, got {part!r}")
    return known[part] if isinstance(known, Mapping) else part
