"""The table of constructors that drives all models and guides through the same checks.

Also what those checks share: parameters by name, their gradients, and when two are the same.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Size, Tensor, nn

from pyro_avrnn import recipes
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.networks import Cell
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.recipes import OF_DSAE, Recipe

X, Z, H, F = 3, 2, 5, 2
PROPOSALS: dict[str, dict[str, Any]] = {
    "filtering": {"guide": "filtering"},
    "residual": {"guide": "residual", "prior_gradient": True},
    "residual_stopped": {"guide": "residual", "prior_gradient": False},
}
# one table of constructors: a new model or guide earns its checks by a line here
CASES: dict[str, Callable[[], Recipe]] = {
    f"rnn-{emission}-{cell}": lambda e=emission, c=cell: recipes.rnn(X, H, e, cell=c)
    for emission, cell in product(("normal", "bernoulli"), ("gru", "lstm"))
} | {
    f"vrnn-{name}-{prior}-{emission}-{cell}": lambda n=name, p=prior, e=emission, c=cell: (
        recipes.vrnn(X, Z, H, e, prior=p, cell=c, **PROPOSALS[n])
    )
    for name, prior, emission, cell in product(
        PROPOSALS, ("conditional", "standard"), ("normal", "bernoulli"), ("gru", "lstm")
    )
}
# every part at least once, for checks that would take long on all combinations
FEW = (
    "rnn-normal-gru",
    "rnn-bernoulli-lstm",
    "vrnn-filtering-conditional-normal-gru",
    "vrnn-filtering-conditional-bernoulli-gru",
    "vrnn-filtering-conditional-bernoulli-lstm",
    "vrnn-filtering-standard-normal-lstm",
    "vrnn-residual-conditional-normal-gru",
    "vrnn-residual_stopped-conditional-normal-gru",
    "vrnn-residual_stopped-standard-normal-gru",
)


class Decay(Cell):
    """A user's cell: a leaky memory, ``m = m / 2 + tanh(W input)``."""

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__(in_dim, h_dim)
        self.read = nn.Linear(in_dim, h_dim)

    def initial(self, batch_shape: Size) -> Tensor:
        return self.read.weight.new_zeros(*batch_shape, self.h_dim)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        return 0.5 * memory + self.read(inputs).tanh()

    def output(self, memory: Tensor) -> Tensor:
        return memory


# the second table: every model with every part it can have, by the names of the recipes

MODELS: dict[str, dict[str, int]] = {
    "rnn": {"x_dim": X, "h_dim": H},
    **{name: {"x_dim": X, "z_dim": Z, "h_dim": H} for name in ("vae", "storn", "vrnn", "srnn")},
    "dmm": {"x_dim": X, "z_dim": Z, "h_dim": H},
    "dsae": {"x_dim": X, "z_dim": Z, "h_dim": H, "f_dim": F},
}
LATENT = tuple(name for name in MODELS if name != "rnn")
#: emissions, with the options that keep them small
EMITTED: dict[str, dict[str, int]] = {
    "normal": {},
    "bernoulli": {},
    "mixture": {"num_components": 3},
    "categorical": {"num_classes": 5},
    "logistic": {"bits": 8, "num_components": 3},
}
CELLED: dict[str, str | type[Cell]] = {"gru": "gru", "lstm": "lstm", "decay": Decay}
WITH_CELL = ("rnn", "storn", "vrnn", "srnn", "dsae")


def build(model: str, emission: str = "normal", **parts: Any) -> Recipe:
    """The recipe of that name in the sizes of this table, its weights a function of the call.

    Args:
        model: a name of ``MODELS``.
        emission: a name of ``EMITTED``.
        parts: any other argument of the recipe; sizes, too.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        options = EMITTED[emission]
        given = MODELS[model] | parts
        return recipes.RECIPES[model](emission=emission, emission_options=options, **given)


def guides_of(model: str) -> tuple[str, ...]:
    """Names of the guides that a model's recipe knows."""
    return (*GUIDES, *OF_DSAE) if model == "dsae" else (*GUIDES,)


def meet(prior: str, guide: str) -> bool:
    """Whether they go together; those that do not are in ``REFUSED``."""
    return not (prior == "flow" and guide.endswith("residual"))


ALL: dict[str, Callable[[], Recipe]] = (
    {
        f"{model}-{prior}-{guide}": lambda m=model, p=prior, g=guide: build(m, prior=p, guide=g)
        for model in LATENT
        for prior, guide in product(PRIORS, guides_of(model))
        if meet(prior, guide)
    }
    | {
        f"{model}-{emission}": lambda m=model, e=emission: build(m, e)
        for model, emission in product(MODELS, EMITTED)
    }
    | {
        f"{model}-{name}": lambda m=model, c=cell: build(m, cell=c)
        for model, (name, cell) in product(WITH_CELL, CELLED.items())
    }
    | {
        "pixelcnn": lambda: recipes.pixelcnn(9, channels=2, layers=2),
        "pixelcnn_vae": lambda: recipes.pixelcnn_vae(9, Z, channels=2, layers=2),
    }
)
_NO_MEAN = (
    NotImplementedError,
    r"ResidualGuide corrects the prior's mean, which a TransformedDistribution of this model does "
    r"not know; use FilteringGuide or FlowGuide",
)
#: what may not meet: the call, the kind of error, and the sentence (a regular expression)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = (
    {
        f"{model}-flow-{guide}": (
            lambda m=model, g=guide: build(m, prior="flow", guide=g),
            *_NO_MEAN,
        )
        for model, guide in product(LATENT, ("residual", "smoothing_residual"))
    }
    | {
        f"{model}-flow-z1": (
            lambda m=model: build(m, prior="flow", guide="filtering", z_dim=1),
            ValueError,
            "z_dim must be at least 2, got 1; use ConditionalNormal instead of FlowPrior",
        )
        for model in LATENT
    }
    | {
        f"{model}-{guide}-z1": (
            lambda m=model, g=guide: build(m, guide=g, z_dim=1),
            ValueError,
            "z_dim must be at least 2, got 1; use FilteringGuide instead of FlowGuide",
        )
        for model, guide in product(LATENT, ("flow", "smoothing_flow"))
    }
    | {
        f"{model}-{guide}": (
            lambda m=model, g=guide: build(m, guide=g),
            ValueError,
            f"guide must be one of filtering, .*got '{guide}'",
        )
        for model, guide in product(LATENT[:-1], OF_DSAE)
    }
)


def pairwise() -> list[dict[str, str]]:
    """Calls of ``build`` in which every allowed pair of parts meets at least once.

    Pairs are those of model and prior, model and guide, prior and guide, model and emission. At
    each turn the call that shows most new pairs is taken, the first of several.
    """
    open_calls = [
        {"model": model, "prior": prior, "guide": guide, "emission": emission}
        for model in LATENT
        for prior, guide, emission in product(PRIORS, guides_of(model), EMITTED)
        if meet(prior, guide)
    ]

    kinds = (("model", "prior"), ("model", "guide"), ("prior", "guide"), ("model", "emission"))

    def pairs(call: dict[str, str]) -> set[tuple[str, ...]]:
        return {(one, other, call[one], call[other]) for one, other in kinds}

    missing = {pair for call in open_calls for pair in pairs(call)}
    chosen = []
    while missing:
        chosen.append(max(open_calls, key=lambda call: len(pairs(call) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def observations(recipe: Recipe, size: int, length: int, seed: int = 3) -> Tensor:
    """Data ``(B, T, X)`` in the support of the recipe's emission, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, length, recipe.model.x_dim, generator=generator)
    return fitted(recipe, x)


def fitted(recipe: Recipe, x: Tensor) -> Tensor:
    """The value in the support of the recipe's emission that stands for real numbers x."""
    decoder: Any = getattr(recipe.model, "decoder", None)
    if hasattr(decoder, "num_classes"):
        return (x + decoder.num_classes / 2).floor().clamp(0, decoder.num_classes - 1)
    if hasattr(decoder, "bits"):
        half = 2 ** (decoder.bits - 1)
        return ((x / 3 * half).floor().clamp(-half, half - 1) + 0.5) / half
    return (x > 0).to(x.dtype) if recipe.model.expects.startswith("0 and 1") else x


def prefix_mask(lengths: tuple[int, ...]) -> Tensor:
    """``(B, T)``, T the longest."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def parameters(recipe: Recipe) -> dict[str, nn.Parameter]:
    """Every parameter of model and guide by name."""
    return {
        f"{part}.{name}": p
        for part, module in (("model", recipe.model), ("guide", recipe.guide))
        for name, p in module.named_parameters()
    }


def gradients(recipe: Recipe, value: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient, copied before another backward; zero where there is none."""
    named = parameters(recipe)
    found = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.clone()
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def value_and_gradients(recipe: Recipe, loss: Any, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What SVI sees of a loss: its value, and every parameter's gradient, copied."""
    named = parameters(recipe)
    for p in named.values():
        p.grad = None
    torch.manual_seed(7)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.SGD({"lr": 0.1}), loss=loss)
    value = torch.as_tensor(svi.loss_and_grads(recipe.model, recipe.guide, *args)).detach()
    return value, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in named.items()
    }


def assert_close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Two paths to one number: rtol 1e-10, atol 1e-12 of the tensor's largest entry."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=1e-10, atol=1e-12 * largest, msg=lambda text: f"{name}: {text}"
    )


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and each tensor as :func:`assert_close` has it."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, name)
