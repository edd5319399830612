"""Emissions: normalised, equal to references, stable in float32, and drawn as they score."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_avrnn.emissions import (
    EMISSIONS,
    BernoulliEmission,
    CategoricalEmission,
    Classes,
    DiscretisedLogisticMixture,
    MixtureOfNormalsEmission,
    NormalEmission,
)
from pyro_avrnn.logistics import MixtureOfLogistics

X = 3
ALL: dict[str, Callable[[], nn.Module]] = {
    "normal": lambda: NormalEmission(5, X, (4,)),
    "bernoulli": lambda: BernoulliEmission(5, X, (4,)),
    "mixture": lambda: MixtureOfNormalsEmission(5, X, (4,), num_components=4),
    "categorical": lambda: CategoricalEmission(5, X, (4,), num_classes=6),
    "logistic": lambda: DiscretisedLogisticMixture(5, X, (4,), bits=8, num_components=4),
}
OUTSIDE = {
    "normal": [math.nan],
    "bernoulli": [0.5, 2.0, math.nan],
    "mixture": [math.nan],
    "categorical": [0.5, -1.0, 6.0, math.nan, math.inf],
    "logistic": [0.0, 1.0, -1.0, 257 / 256, 0.5, math.nan, math.inf],
}


def levels(bits: int) -> Tensor:
    """All centres of cells, computed as integers."""
    return (2 * torch.arange(2**bits) + 1) / 2**bits - 1


# ---- what all emissions share ----


def test_every_emission_is_in_the_table() -> None:
    assert EMISSIONS.keys() == ALL.keys()
    for name, make in ALL.items():
        assert type(make()) is EMISSIONS[name]


@pytest.mark.parametrize("name", ALL)
def test_sizes_support_and_shapes(name: str) -> None:
    emission = ALL[name]()
    assert (emission.in_dim, emission.x_dim) == (5, X)
    assert emission.expects and "\n" not in emission.expects
    given = emission(torch.randn(6, 1, 4, 2), torch.randn(7, 4, 3))  # (T, 1, B, .), (K, B, .)
    assert (given.batch_shape, given.event_shape) == ((6, 7, 4), (X,))
    x = given.sample()
    assert x.shape == (6, 7, 4, X) and x.dtype == torch.float64 and not x.requires_grad
    assert bool(emission.support.check(x).all())
    assert given.sample((2,)).shape == (2, 6, 7, 4, X)
    assert given.mean.shape == (6, 7, 4, X)
    assert emission.support.check(torch.tensor(getattr(emission, "padding", 0.0)))
    for value in OUTSIDE[name]:
        assert not emission.support.check(torch.tensor(value)), value


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_parts(name: str) -> None:
    emission = ALL[name]()
    z, h = torch.randn(6, 1, 4, 2), torch.randn(7, 4, 3)
    whole = emission(z, h)
    x = whole.sample()[:, :1]  # (T, 1, B, X), as a rollout scores data
    score = whole.log_prob(x)
    assert score.shape == (6, 7, 4)
    for t, k, b in ((0, 0, 0), (5, 6, 3), (2, 4, 1)):
        one = emission(z[t, 0, b], h[k, b])
        torch.testing.assert_close(one.log_prob(x[t, 0, b]), score[t, k, b], rtol=1e-12, atol=0)
    wide = whole.expand((2, 6, 7, 4))
    assert wide.batch_shape == (2, 6, 7, 4) and wide.sample().shape == (2, 6, 7, 4, X)
    torch.testing.assert_close(wide.log_prob(x)[1], score, rtol=1e-12, atol=0)
    many = whole.sample((3,))
    torch.testing.assert_close(
        whole.log_prob(many)[2], whole.log_prob(many[2]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtype_follows_the_network_and_every_parameter_learns(name: str, kind: Any) -> None:
    emission = ALL[name]().to(kind)
    given = emission(torch.randn(50, 5, dtype=kind))
    x = given.sample()
    score = given.log_prob(x)
    assert x.dtype == score.dtype == given.mean.dtype == kind
    score.sum().backward()
    for path, parameter in emission.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, path


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MixtureOfNormalsEmission(5, X, num_components=1), "num_components must be at "),
        (lambda: MixtureOfNormalsEmission(5, X, num_components=1), "got 1; use NormalEmission"),
        (lambda: MixtureOfNormalsEmission(5, X, num_components=0), "at least 2, got 0; use"),
        (
            lambda: MixtureOfNormalsEmission(5, X, min_scale=-1.0),
            "min_scale must be at least 0, got -1",
        ),
        (lambda: CategoricalEmission(5, X, num_classes=1), "must be at least 2, got 1"),
        (lambda: DiscretisedLogisticMixture(5, X, bits=17), "bits must be from 1 to 16, got 17"),
        (lambda: DiscretisedLogisticMixture(5, X, bits=0), "bits must be from 1 to 16, got 0"),
        (lambda: DiscretisedLogisticMixture(5, X, num_components=1), "at least 2, got 1"),
        (lambda: DiscretisedLogisticMixture(5, X, min_log_scale=-30.0), "-20 to 0, got -30"),
        (lambda: DiscretisedLogisticMixture(5, X, min_log_scale=math.nan), "got nan"),
        (lambda: CategoricalEmission(5, X, num_classes=3, activation="no"), "activation must be"),
    ],
)
def test_bad_arguments_are_named(call: Callable, words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- mixture of normals ----


def test_mixture_of_normals_by_hand() -> None:
    emission = MixtureOfNormalsEmission(5, X, (4,), num_components=4, min_scale=0.2)
    inputs, x = torch.randn(6, 5), torch.randn(6, X)
    actual = emission(inputs).log_prob(x).detach().numpy()
    out = emission.net(inputs).detach().numpy()
    for i in range(6):
        weights = np.exp(out[i, :4]) / np.exp(out[i, :4]).sum()
        total, mean = 0.0, np.zeros(X)
        for c in range(4):
            loc = out[i, 4 + c * X : 4 + (c + 1) * X]
            raw = out[i, 4 + (4 + c) * X : 4 + (5 + c) * X]
            scale = 0.2 + np.log1p(np.exp(raw + 0.5))
            total += weights[c] * stats.norm.pdf(x[i].numpy(), loc, scale).prod()
            mean += weights[c] * loc
        np.testing.assert_allclose(actual[i], np.log(total), rtol=1e-10)
        np.testing.assert_allclose(emission(inputs).mean[i].detach().numpy(), mean, rtol=1e-10)


@pytest.mark.parametrize("fault", [False, True])
def test_mixture_of_normals_draws_one_component_a_frame(fault: bool) -> None:
    """The two features move together: a component for each would leave them independent."""
    emission = MixtureOfNormalsEmission(1, 2, (), num_components=2)
    with torch.no_grad():
        emission.net[0].weight.zero_()
        emission.net[0].bias.copy_(torch.tensor([0.0, math.log(3), -1, -1, 1, 1, -1, -1, -1, -1]))
    given, n = emission(torch.zeros(1)), 20_000
    x = given.sample((n,))
    if fault:
        x = torch.stack([x[:, 0], given.sample((n,))[:, 1]], dim=1)
    products = (x - given.mean.detach()).prod(dim=1)
    expected = 4 * 0.25 * 0.75  # of a coin that is 1 with probability 3/4, else -1
    z = float((products.mean() - expected) / (products.std() / n**0.5))
    assert (abs(z) < 5) is not fault


# ---- categorical ----


def test_categorical_by_hand() -> None:
    emission = CategoricalEmission(5, X, (4,), num_classes=6)
    inputs = torch.randn(7, 5)
    given, x = emission(inputs), torch.randint(0, 6, (7, X)).double()
    table = emission.net(inputs).reshape(7, X, 6).detach().numpy()
    table = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    rows, columns = np.indices((7, X))
    expected = np.log(table[rows, columns, x.long().numpy()]).sum(-1)
    np.testing.assert_allclose(given.log_prob(x).detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(given.mean.detach(), (table * np.arange(6)).sum(-1), rtol=1e-10)
    np.testing.assert_array_equal(given.mode, table.argmax(-1))
    assert given.mode.dtype == torch.float64


def test_classes_are_refused_outside_and_enumerated_in_floats() -> None:
    given = Classes(logits=torch.randn(2, 4), validate_args=True)
    assert given.enumerate_support().dtype == torch.float64
    total = given.log_prob(given.enumerate_support()).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2))
    with pytest.raises(ValueError, match="support"):
        given.log_prob(torch.tensor([0.5, 1.0]))


# ---- mixture of logistics ----


def parameters(
    log_scale: float, features: int, spread: float = 0.7, components: int = 5
) -> Tensor:
    """Random ``(3, C, X)`` about one log scale."""
    drawn = torch.randn(3, components, features)
    return drawn * torch.tensor([1.0, spread, 0.3])[:, None, None] + torch.tensor(
        [0.0, 0.0, log_scale]
    ).reshape(3, 1, 1)


def reference(p: Tensor, bits: int, floor: float) -> np.ndarray:
    """Masses of all levels ``(2^bits, X)``: differences of scipy's cdf at the borders.

    Where a component lies below a cell, the difference is of upper tails, which are small there.
    """
    logits, loc, log_scale = (part.numpy() for part in p)
    weights = np.exp(logits) / np.exp(logits).sum(0)
    scale = np.exp(np.maximum(log_scale, floor))
    borders = np.linspace(-1, 1, 2**bits + 1)[:, None, None]
    borders[0], borders[-1] = -np.inf, np.inf
    lower, upper = stats.logistic.cdf(borders, loc, scale), stats.logistic.sf(borders, loc, scale)
    mass = np.where(borders[:-1] > loc, upper[:-1] - upper[1:], lower[1:] - lower[:-1])
    return (mass * weights).sum(1)


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -3.0, 0.0, 4.0, 40.0, 90.0])
@pytest.mark.parametrize("bits", [1, 8, 16])
def test_masses_sum_to_one(bits: int, log_scale: float) -> None:
    p = parameters(log_scale, 1).double()
    masses = MixtureOfLogistics(p, bits).log_prob(levels(bits).unsqueeze(-1)).exp()
    assert masses.shape == (2**bits,)
    assert float(masses.sum()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("log_scale", [-12.0, -6.0, -2.0, 1.0])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_masses_are_differences_of_cdfs(bits: int, log_scale: float) -> None:
    p = parameters(log_scale, 4)
    expected = reference(p, bits, floor=-7.0)
    actual = np.stack(
        [
            MixtureOfLogistics(p[..., i : i + 1], bits).log_prob(levels(bits)[:, None]).exp()
            for i in range(4)
        ],
        axis=1,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-15)
    x = levels(bits)[torch.randint(0, 2**bits, (30, 4))]
    joint = MixtureOfLogistics(p, bits).log_prob(x)
    apart = sum(
        MixtureOfLogistics(p[..., i : i + 1], bits).log_prob(x[:, i : i + 1]) for i in range(4)
    )
    torch.testing.assert_close(joint, apart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [1, 6, 16])
@pytest.mark.parametrize("log_scale", [-6.0, -2.0, 1.0, 8.0])
def test_gradients_are_the_derivatives(bits: int, log_scale: float) -> None:
    """Against autograd through the plain formula, end cells included."""
    p = torch.stack([parameters(log_scale, 4) for _ in range(9)]).requires_grad_()
    x = levels(bits)[torch.randint(0, 2**bits, (9, 4))]
    x[0], x[1] = levels(bits)[0], levels(bits)[-1]
    weight = torch.randn(9)
    score = MixtureOfLogistics(p, bits).log_prob(x)
    (actual,) = torch.autograd.grad((score * weight).sum(), p)
    logits, loc, log_scales = p.unbind(1)
    scale = log_scales.clamp(min=-7.0).exp()
    half = 0.5**bits
    b, a = (x[:, None] + half - loc) / scale, (x[:, None] - half - loc) / scale
    first, last = (x == levels(bits)[0])[:, None], (x == levels(bits)[-1])[:, None]
    inner = torch.nn.functional.logsigmoid(b) + torch.nn.functional.logsigmoid(-a)
    inner = inner + (-torch.expm1(-2 * half / scale)).log()
    ends = torch.where(
        first, torch.nn.functional.logsigmoid(b), torch.nn.functional.logsigmoid(-a)
    )
    plain = (torch.where(first | last, ends, inner) + logits.log_softmax(1)).logsumexp(1).sum(-1)
    (expected,) = torch.autograd.grad((plain * weight).sum(), p)
    torch.testing.assert_close(score, plain, rtol=1e-10, atol=1e-10)
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * largest)


def test_gradients_of_broadcast_parameters_are_summed() -> None:
    p = parameters(-2.0, 4).requires_grad_()
    x = levels(8)[torch.randint(0, 256, (5, 2, 4))]
    given = MixtureOfLogistics(p, 8)
    (whole,) = torch.autograd.grad(given.log_prob(x).sum(), p, retain_graph=True)
    parts = sum(torch.autograd.grad(given.log_prob(v).sum(), p)[0] for v in x.reshape(-1, 4))
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_blocks_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.stack([parameters(-2.0, 4) for _ in range(11)]).requires_grad_()
    x = levels(8)[torch.randint(0, 256, (11, 4))]

    def both() -> tuple[Tensor, Tensor]:
        score = MixtureOfLogistics(p, 8).log_prob(x)
        return score.detach(), torch.autograd.grad(score.sum(), p)[0]

    whole = both()
    monkeypatch.setattr(
        "pyro_avrnn.logistics._blocks", lambda q: [slice(i, i + 3) for i in range(0, len(q), 3)]
    )
    for actual, expected in zip(both(), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    empty = torch.zeros(0, 3, 2, 4, requires_grad=True)
    score = MixtureOfLogistics(empty, 8, validate_args=False).log_prob(torch.zeros(0, 4))
    assert score.shape == (0,) and torch.autograd.grad(score.sum(), empty)[0].shape == empty.shape


@pytest.mark.parametrize("floor", [-7.0, -20.0])
def test_float32_is_finite_and_right_in_extreme_cases(floor: float) -> None:
    """Values and gradients in float32 against float64 from the same float32 numbers."""
    locs = [0.0, 0.3, -1.0, 1.0, -3.0, 40.0, 1e6]
    scales = [-100.0, -20.0, -12.0, -7.0, -2.0, 0.0, 5.0, 30.0, 49.0, 200.0]
    centre = [0, 1, 2**15 - 1, 2**15, 2**16 - 2, 2**16 - 1]
    grid = torch.cartesian_prod(torch.tensor(locs), torch.tensor(scales))  # N, 2
    x = torch.cat([levels(16)[centre], torch.zeros(1)])  # padding is 0, and no centre
    pairs = grid.repeat_interleave(len(x), dim=0)
    single = torch.stack([torch.zeros(len(pairs)), *pairs.T], dim=1)[:, :, None, None]
    double = torch.cat([single, single.flip(0)], dim=2)  # a second component, of another kind
    value = x.repeat(len(grid))[:, None]
    for p in (single, double):
        found = []
        for kind in (torch.float32, torch.float64):
            own = p.float().to(kind).requires_grad_()
            given = MixtureOfLogistics(own, 16, floor, validate_args=False)
            score = given.log_prob(value.to(kind))
            found += [score.detach(), torch.autograd.grad(score.sum(), own)[0]]
        score, gradient, exact_score, exact_gradient = found
        assert score.dtype == gradient.dtype == torch.float32
        assert score.isfinite().all() and gradient.isfinite().all() and (score <= 1e-6).all()
        torch.testing.assert_close(score.double(), exact_score, rtol=2e-6, atol=2e-6)
        # shares of components come from differences of log-masses, which may be large numbers
        large = exact_score.abs().reshape(-1, 1, 1, 1) > 1e3
        unit = exact_gradient.abs().amax(dim=(2, 3), keepdim=True).clamp(min=1.0)
        off = (gradient.double() - exact_gradient).abs() / unit
        assert float(off.masked_fill(large & (p.shape[2] > 1), 0.0).max()) < 1e-4


def test_the_floor_bounds_the_mass() -> None:
    for bits, floor, best in ((16, -7.0, 0.00837), (16, -12.5, 0.9672), (8, -7.0, 0.9728)):
        x = levels(bits)[[200]]
        p = torch.tensor([0.0, float(x), -50.0]).reshape(3, 1, 1)
        exact = math.tanh(0.5**bits * math.exp(-floor) / 2)
        mass = float(MixtureOfLogistics(p, bits, floor).log_prob(x).exp())
        assert mass == pytest.approx(exact, rel=1e-9) and exact == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("fault", [None, "shifted", "narrower", "another component"])
def test_draws_follow_the_masses(fault: str | None) -> None:
    """Chi-square of 100,000 draws over 64 levels, some of them in the ends."""
    p, bits, n = torch.zeros(3, 2, 1), 6, 100_000
    p[:, 0, 0], p[:, 1, 0] = torch.tensor([0.5, -0.8, -1.5]), torch.tensor([-0.5, 0.6, -2.5])
    expected = n * MixtureOfLogistics(p, bits).log_prob(levels(bits)[:, None]).exp()
    assert expected.min() > 10  # else the statistic is no chi-square
    drawn = p.clone()
    if fault == "shifted":
        drawn[1] += 1 / 64  # half a cell: what rounding down instead of to the nearest would do
    elif fault == "narrower":
        drawn[2] -= 0.05
    elif fault == "another component":
        drawn[0, 0] += 0.1
    x = MixtureOfLogistics(drawn, bits).sample((n,))
    index = ((x.flatten() + 1) * 2**bits / 2 - 0.5).round().long()
    counts = torch.bincount(index, minlength=2**bits)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    z = (statistic - 63) / (2 * 63) ** 0.5
    assert (z < 5) is (fault is None), z


def test_draws_are_clamped_to_the_ends_and_each_feature_has_its_own() -> None:
    p = torch.zeros(3, 2, 3)
    p[1] = torch.tensor([-50.0, 0.001, 50.0])
    p[2] = -7.0
    p[0, 1] = -1000.0  # the second component is never drawn
    p[1, 1] = 0.5
    for kind in (torch.float32, torch.float64):
        x = MixtureOfLogistics(p.to(kind), 4).sample((500,))
        assert x.dtype == kind and x.unique(dim=0).tolist() in (
            [[-0.9375, 0.0625, 0.9375]],
            [[-0.9375, -0.0625, 0.9375], [-0.9375, 0.0625, 0.9375]],
        )


@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -4.0, -1.0, 0.5, 3.0, 40.0])
def test_mean_is_that_of_the_levels_within_half_a_cell(log_scale: float) -> None:
    p = parameters(log_scale, 1, spread=1.5)
    given = MixtureOfLogistics(p, 8)
    masses = given.log_prob(levels(8)[:, None]).exp()
    expected = float((masses * levels(8)).sum())
    assert float(given.mean) == pytest.approx(expected, abs=1 / 256 + 1e-9)
    rough = MixtureOfLogistics(p.float(), 8).mean
    assert float(rough) == pytest.approx(float(given.mean), abs=1e-5)


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_support_is_the_centres_of_cells(bits: int, kind: torch.dtype) -> None:
    support = DiscretisedLogisticMixture(5, X, bits=bits).support
    assert f"{2**bits:,} equal cells" in DiscretisedLogisticMixture(5, X, bits=bits).expects
    x = levels(bits).to(kind)
    assert support.check(x).all()
    assert support.check(torch.linspace(x[0], x[-1], 2**bits, dtype=kind)).all()  # round-off
    cell = 2.0 ** (1 - bits)
    assert not support.check(x + cell / 2).any() and not support.check(x - cell / 8).any()
    assert not support.check(x[[0, -1]] + torch.tensor([-cell, cell], dtype=kind)).any()


def test_validation_refuses_other_values() -> None:
    given = MixtureOfLogistics(parameters(-2.0, 2), 8, validate_args=True)
    assert isinstance(given, dist.TorchDistribution) and not given.has_rsample
    assert given.log_prob(given.sample()).isfinite()
    with pytest.raises(ValueError, match="support"):
        given.log_prob(torch.zeros(2))
