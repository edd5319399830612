"""The cases of ``compare_commits.py``: calls of recipes, their data, and two spellings of the API.

Every recipe stands in the table with its own parts, then with each prior, guide, emission, cell,
view and critic that it takes. Versions 0.1 and 0.2 of the library are spelled differently only in
the functions under "Two spellings".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI
from torch import Tensor

import inference
from pyro_avrnn import recipes

X, Z, H, F, K = 3, 2, 5, 2, 3
LENGTHS = (4, 1, 3, 4, 2)
PRIORS = ("conditional", "standard", "gated", "mixture", "flow")
GUIDES = ("filtering", "residual", "flow", "smoothing", "smoothing_residual", "smoothing_flow")
GUIDES += ("mean_field", "mean_field_forward", "mean_field_frame")
EMISSIONS: dict[str, dict[str, int]] = {
    "normal": {},
    "bernoulli": {},
    "mixture": {"num_components": 3},
    "categorical": {"num_classes": 5},
    "logistic": {"bits": 8, "num_components": 3},
}
LATENT = ("vae", "storn", "vrnn", "srnn", "dmm", "dsae")
VIEWS = ("marginal", "trajectory", "trajectory_redrawn", "conditional", "joint")


# Two spellings


OLD = "RegularisedELBO" in inference.__all__  # 0.1


def penalised(bound: Callable[..., Any], penalties: list[Any], **options: Any) -> Any:
    """An objective with penalties."""
    return bound(**{"regularisers" if OLD else "penalties": penalties}, **options)


def recomputed(steps: int) -> Any:
    """An ELBO that keeps every so many states for the backward pass."""
    return inference.ELBO(num_particles=K, **{"segment" if OLD else "recompute": steps})


def adversarial(recipe: Any, view: str, **options: Any) -> Any:
    """The recipe's critic as a penalty."""
    options |= {"view": view} if OLD else {}
    return inference.Adversarial(recipe.critic, **options)


def avrnn(activation: str = "relu", critic_activation: str = "relu", **parts: Any) -> Any:
    """A recipe with a critic."""
    if OLD:
        parts |= {"hidden_activation": activation, "activation": critic_activation}
    else:
        parts |= {"activation": activation, "critic_activation": critic_activation}
    return recipes.avrnn(**parts)


def trained(svi: SVI, batches: Any, steps: int, **options: Any) -> Any:
    """The history of a short training, validated at every second step."""
    given = {"steps": steps, "clip_norm": 1.0, "seed": 3, "progress": False, **options}
    if OLD:
        given |= {"validation": batches[0], "validate_every": 2, "num_particles": 4}
        return inference.fit(svi, batches, log_every=1, **given)
    given["validation"] = inference.Validation(batches[0], every=2, num_particles=4)
    return inference.fit(svi, batches, records=inference.Records(every=1), **given)


# The table


class Case(NamedTuple):
    """A call of a recipe, and how its critic is used."""

    recipe: str
    parts: dict[str, Any] = {}
    critic: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The recipe and what is not its own."""
        short = ("base", "view", "critic", "critic_activation", "constraint")
        given = self.parts | self.critic
        said = [str(v) if name in short else f"{name}={v}" for name, v in given.items()]
        return " ".join([self.recipe, *said])

    @property
    def has_f(self) -> bool:
        """Whether a latent is shared by all steps."""
        return "dsae" in (self.recipe, self.parts.get("base"))

    @property
    def emission(self) -> str:
        """Its name; images are binary."""
        images = self.recipe.startswith("pixelcnn")
        return "bernoulli" if images else self.parts.get("emission", "normal")

    @property
    def normal(self) -> bool:
        """Whether prior and guide are normal, so that their KL has a closed form."""
        prior, guide = self.parts.get("prior", ""), self.parts.get("guide", "")
        return prior not in ("mixture", "flow") and not guide.endswith("flow")

    def build(self) -> Any:
        """Model, guide and critic, their weights a function of the call."""
        torch.manual_seed(5)
        if self.recipe == "pixelcnn":
            return recipes.pixelcnn(9, channels=2, layers=2)
        if self.recipe == "pixelcnn_vae":
            return recipes.pixelcnn_vae(9, Z, channels=2, layers=2)
        parts = {"emission_options": EMISSIONS[self.emission]} | self.parts
        sizes = {"x_dim": X, "h_dim": H} | ({} if self.recipe == "rnn" else {"z_dim": Z})
        sizes |= {"f_dim": F} if self.recipe == "dsae" else {}
        if self.recipe == "avrnn":
            return avrnn(**sizes, critic_dim=6, **parts)
        return recipes.RECIPES[self.recipe](**sizes, **parts)

    def data(self, seed: int = 3) -> tuple[Tensor, Tensor]:
        """Data (B, T, X) that the emission can score, and a ragged mask (B, T)."""
        images = self.recipe.startswith("pixelcnn")
        lengths = (1, 1, 1, 1, 1) if images else LENGTHS
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(lengths), max(lengths), 9 if images else X, generator=generator)
        if self.emission == "bernoulli":
            x = (x > 0).to(x.dtype)
        if self.emission == "categorical":
            x = (x + 2.5).floor().clamp(0, 4)
        if self.emission == "logistic":
            x = ((x / 3 * 128).floor().clamp(-128, 127) + 0.5) / 128
        return x, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def table() -> list[Case]:
    """All cases."""
    found = [Case("rnn"), Case("pixelcnn"), Case("pixelcnn_vae")]
    found += [Case("rnn", {"emission": name}) for name in EMISSIONS if name != "normal"]
    found += [Case(recipe) for recipe in (*LATENT, "avrnn")]
    for recipe in LATENT:
        # a residual guide, SRNN's own, corrects the mean of its prior: a flow does not know it
        for name in PRIORS:
            guided = {"guide": "smoothing"} if (recipe, name) == ("srnn", "flow") else {}
            found.append(Case(recipe, {"prior": name, **guided}))
        guides = GUIDES + (("full", "factorised") if recipe == "dsae" else ())
        found += [Case(recipe, {"guide": name}) for name in guides]
        found += [Case(recipe, {"emission": name}) for name in EMISSIONS]
        found += [Case(recipe, {"activation": "silu", "min_scale": 0.1, "dropout": 0.3})]
    for recipe in ("rnn", "storn", "vrnn", "srnn", "dsae"):
        found += [Case(recipe, {"cell": name}) for name in ("gru", "lstm")]
    found += [Case("vrnn", {"guide": "residual", "prior_gradient": False})]
    found += [Case("vrnn", {"prior": "mixture", "prior_options": {"num_components": 4}})]
    found += [Case("avrnn", {"view": view}, {"constraint": "penalty"}) for view in VIEWS]
    for view in VIEWS:
        redrawn = view == "trajectory_redrawn"
        normalised = {"critic": "feedforward", "lipschitz": "all" if redrawn else "z"}
        sorted_ = {"critic": "feedforward", "critic_activation": "groupsort", "window": 2}
        found += [
            Case("avrnn", {"view": view, **normalised}, {"constraint": "spectral"}),
            Case("avrnn", {"view": view, **sorted_}, {"constraint": "clip", "standardise": True}),
        ]
    for base in LATENT:
        found.append(Case("avrnn", {"base": base}, {"constraint": "clip", "critic_steps": 2}))
    found.append(Case("avrnn", {"activation": "elu", "guide": "smoothing"}))
    return found
