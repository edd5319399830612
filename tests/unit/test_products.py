"""Products by the faster library are the same products."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_avrnn import products

needs_onednn = pytest.mark.skipif(
    products.onednn() is None, reason="torch's own products are not slower on this processor"
)
LARGE = (96, 192, 160)  # rows, in, out


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, width, out = LARGE
    shapes = [(3, rows // 3, width), (out, width), (out,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def value_and_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0.0, atol=1e-5 * scale)


@needs_onednn
def test_the_sizes_here_go_to_onednn() -> None:
    assert products.pays(LARGE[0], operands()[1])


def test_a_large_layer_is_the_float64_layer_values_and_gradients() -> None:
    expected = value_and_gradients(F.linear, operands(torch.float64))
    assert_same(value_and_gradients(products.linear, operands()), expected)


def test_the_comparison_rejects_a_layer_without_its_bias() -> None:
    expected = value_and_gradients(F.linear, operands(torch.float64))
    with pytest.raises(AssertionError):
        assert_same(
            value_and_gradients(lambda x, w, b: products.linear(x, w) + 0 * b, operands()),
            expected,
        )


@pytest.mark.parametrize("seen", ["sliced", "transposed", "expanded"])
def test_matrices_with_gaps_are_multiplied_right(seen: str) -> None:
    x, weight, bias = (tensor.detach() for tensor in operands())
    x = x.flatten(0, 1)
    if seen == "sliced":
        x, weight = x[:, 8:], weight[:, 8:]
    elif seen == "transposed":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    else:
        x = x[:1].expand(len(x), -1)
    assert_same(
        [products.times(x, weight, bias)], [F.linear(*map(Tensor.double, (x, weight, bias)))]
    )


def test_small_layers_and_other_types_stay_where_they_are() -> None:
    assert not products.pays(2, torch.zeros(4, 4))
    assert not products.pays(10**6, torch.zeros(64, 64, dtype=torch.float64))


def test_second_derivatives_of_a_large_layer() -> None:
    found = []
    for function, dtype in ((F.linear, torch.float64), (products.linear, torch.float32)):
        x, weight, bias = operands(dtype)
        out = (0.05 * function(x, weight, bias)).tanh().sum()
        (first,) = torch.autograd.grad(out, weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert_same([found[1]], [found[0]])


def test_the_mode_reaches_the_layers_of_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = products.linear
    monkeypatch.setattr(products, "linear", lambda *args: seen.append(args) or real(*args))
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = network(x)
    with products.Faster():
        torch.testing.assert_close(network(x), expected)
    assert len(seen) == 2
