"""Pathwise gradients of draws from a mixture of normals, against expectations of the components.

With weights p_k = softmax(l)_k and E_k the expectation under component k, the derivative of
E[f] by l_k is p_k (E_k f - E f); those by locations and scales are p_k times the component's own.
"""

import math

import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from pyro_avrnn.priors import MixtureOfNormals

DRAWS, BATCHES = 4_000, 100
FUNCTIONS = {
    "square of the first": lambda z: z[..., 0] ** 2,
    "square of the second": lambda z: z[..., 1] ** 2,
    "both": lambda z: (z[..., 0] * z[..., 1]).sin(),
}


def parameters() -> tuple[Tensor, ...]:
    """Three components in two dimensions, on no line through the origin."""
    locs = torch.tensor([[1.0, 0.5], [0.2, 1.5], [-0.7, 1.0]])
    scales = torch.tensor([[1.0, 0.6], [0.8, 1.2], [0.5, 0.9]])
    return tuple(p.requires_grad_() for p in (locs, scales, torch.tensor([0.3, -0.2, 0.5])))


def exact(function: str, which: int) -> Tensor:
    """The gradient by Gauss-Hermite quadrature in each component: no draws."""
    locs, scales, logits = parameters()
    nodes, weights = map(torch.tensor, hermegauss(60))
    grid = torch.stack(torch.meshgrid(nodes, nodes, indexing="ij"), dim=-1).reshape(-1, 2)
    mass = (weights[:, None] * weights).reshape(-1) / math.tau
    values = FUNCTIONS[function](locs + scales * grid.unsqueeze(1))  # (nodes, components)
    total = (logits.softmax(dim=0) * (mass.unsqueeze(1) * values).sum(dim=0)).sum()
    return torch.autograd.grad(total, (locs, scales, logits))[which]


def estimates(family: type, function: str, which: int) -> Tensor:
    """Independent estimates by draws, one a row."""
    rows = []
    for _ in range(BATCHES):
        given = parameters()
        value = FUNCTIONS[function](family(*given).rsample(torch.Size((DRAWS,)))).mean()
        rows.append(torch.autograd.grad(value, given)[which])
    return torch.stack(rows)


def deviation(family: type, function: str, which: int) -> float:
    """The largest, in standard errors."""
    found = estimates(family, function, which)
    error = found.std(dim=0) / math.sqrt(BATCHES)
    off = (found.mean(dim=0) - exact(function, which)).abs()
    return float((off / error.clamp(min=1e-9)).max())  # some do not matter: 0, without error


@pytest.mark.parametrize("which", [0, 1, 2], ids=["locations", "scales", "weights"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_draws_are_those_of_expectations(function: str, which: int) -> None:
    assert deviation(MixtureOfNormals, function, which) < 5.0


def test_pyros_own_gradient_of_the_weights_is_rejected() -> None:
    assert deviation(dist.MixtureOfDiagNormals, "square of the second", 2) > 20.0


def test_draws_have_the_mixtures_moments_in_one_dimension_too() -> None:
    locs, scales = torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.5], [1.5]])
    mixture = MixtureOfNormals(locs, scales, torch.tensor([0.0, 1.0]))
    z = mixture.rsample(torch.Size((200_000,)))[:, 0]
    p = torch.tensor([0.0, 1.0]).softmax(dim=0)
    mean = float((p * locs[:, 0]).sum())
    variance = float((p * (scales[:, 0] ** 2 + locs[:, 0] ** 2)).sum()) - mean**2
    assert abs(float(z.mean()) - mean) < 5.0 * math.sqrt(variance / len(z))
    assert float(mixture.mean) == pytest.approx(mean)
    squares = (z - mean) ** 2
    assert abs(float(squares.mean()) - variance) < 5.0 * float(squares.std()) / math.sqrt(len(z))
