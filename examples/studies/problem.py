"""The training step that the speed benchmark times: sizes, data, noise and first weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_avrnn import recipes

SEED, RATE, FLOOR, HALF_LOG_TAU = 1, 1e-3, 1e-3, 0.9189385332046727
Arrays = dict[str, Any]  # of numpy, by name


class Size(NamedTuple):
    """Sequences, steps, features of x, of z, and width of every layer."""

    B: int
    T: int
    X: int
    Z: int
    H: int
    emission: str = "normal"


SIZES = {
    "tiny": Size(2, 4, 8, 4, 4),  # to see that all runs
    "small": Size(4, 20, 200, 64, 64),
    "vowels": Size(48, 26, 12, 8, 64),
    "medium": Size(16, 100, 200, 64, 256),
    "large": Size(32, 200, 200, 128, 512),
    "music": Size(16, 160, 88, 32, 32, "bernoulli"),
}


def recipe(
    size: Size, make: Callable[..., recipes.Recipe] = recipes.vrnn, **parts: Any
) -> recipes.Recipe:
    """Make a model of this size, always with the same parameters."""
    torch.manual_seed(0)
    return make(size.X, size.Z, size.H, size.emission, **parts)


def data(size: Size) -> tuple[Tensor, Tensor]:
    """White noise, or piano rolls with four notes a step, ``(B, T, X)``; a mask of True."""
    shape, generator = (size.B, size.T, size.X), torch.Generator().manual_seed(0)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    if size.emission == "normal":
        return torch.randn(shape, generator=generator), mask
    return (torch.rand(shape, generator=generator) < 4 / size.X).float(), mask


def noise(size: Size) -> Tensor:
    """``(T, B, Z)``, as torch's generator seeded with SEED gives it to a loop over the steps."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randn(size.B, size.Z, generator=generator) for _ in range(size.T)])


def start(size: Size) -> Arrays:
    """First weights of model and guide, under the names that all contenders use."""
    r = recipe(size)
    named = {**dict(r.model.named_parameters()), **dict(r.guide.named_parameters(prefix="guide"))}
    weights = {}
    for name, value in named.items():
        for long, short in ((".network", ""), (".net.", "."), ("cell.cell", "cell")):
            name = name.replace(long, short)
        weights[name] = value.detach().numpy().copy()
    return weights


def operations(size: Size) -> int:
    """Count the floating point operations of all matrix products of one training step."""
    b, t, x, z, h, emission = size
    frame = z * h  # phi(z)
    frame += 2 * h * h + h * 2 * z  # guide, of phi(x) and h
    frame += h * h + h * 2 * z  # prior, of h
    frame += 2 * h * h + h * x * (2 if emission == "normal" else 1)  # decoder, of phi(z) and h
    frame += 3 * h * (2 * h + h)  # GRU, of phi(x), phi(z) and h
    # once forward, twice backward (to inputs and weights); phi(x) needs no gradient to x, the data
    return 2 * b * t * (3 * frame + 2 * x * h)
