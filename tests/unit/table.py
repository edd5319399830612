"""The table of constructors that drives all models and guides through the same checks.

Also what those checks share: parameters by name, their gradients, and when two are the same.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe

X, Z, H = 3, 2, 5
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


def observations(recipe: Recipe, size: int, length: int, seed: int = 3) -> Tensor:
    """Data ``(B, T, X)`` in the support of the recipe's emission, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, length, recipe.model.x_dim, generator=generator)
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
