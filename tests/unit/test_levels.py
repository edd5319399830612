"""Linear levels: samples and back, masses of levels in any unit, data sets of levels."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_avrnn.data import Dataset, Sequences, independent_baseline, pcm, pcm_decode
from pyro_avrnn.emissions import DiscretisedLogisticMixture
from pyro_avrnn.logistics import Cells, MixtureOfLogistics

EVERY = np.arange(-(2**15), 2**15, dtype=np.int16)
UNITS = (0.0173, 0.25, 1.0, 7.0)
FLOOR = -7.0  # of the log scale where the unit is 1
C, X = 3, 2


# ---- samples ----


@pytest.mark.parametrize("bits", range(1, 17))
def test_a_sample_becomes_the_middle_of_the_cell_that_holds_it(bits: int) -> None:
    borders = np.linspace(-(2**15), 2**15, 2**bits + 1)
    cell = np.searchsorted(borders, EVERY, side="right") - 1
    x = pcm(EVERY, bits)
    assert x.dtype == np.float64 and x.shape == EVERY.shape
    np.testing.assert_array_equal(x, (borders[cell] + borders[cell + 1]) / 2)
    assert len(np.unique(x)) == 2**bits
    back = pcm_decode(x, bits)
    assert back.dtype == np.int16
    assert (np.abs(back.astype(int) - EVERY) <= 2 ** (15 - bits)).all()
    np.testing.assert_array_equal(pcm(back, bits), x)


def test_all_samples_of_sixteen_bits_come_back() -> None:
    np.testing.assert_array_equal(pcm_decode(pcm(EVERY)), EVERY)
    np.testing.assert_array_equal(pcm_decode(torch.from_numpy(pcm(EVERY)).float()), EVERY)


def test_shapes_and_kinds_of_samples() -> None:
    given = np.array([[-7, 0], [7, 32767]])
    for kind in (np.int16, np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(pcm(given.astype(kind), 8), [[-128, 128], [128, 32640]])
    assert (
        pcm(np.zeros((2, 0), dtype=np.int16)).shape == (2, 0) == pcm_decode(np.ones((2, 0))).shape
    )
    x = torch.tensor([[-128.0, 32640.0]], requires_grad=True)
    assert pcm_decode(x, 8).tolist() == [[-128, 32640]]
    assert pcm_decode([-1e9, 1e9, -math.inf, math.inf]).tolist() == [-32768, 32767] * 2


@pytest.mark.parametrize(
    ("samples", "got"),
    [
        ([0, 32768], "-32768 to 32767, got 32768"),
        (np.uint16([40_000]), "got 40000"),
        ([0.5], "got 0.5"),
        ([math.nan], "got nan"),
        ([-math.inf], "got -inf"),
        (["a"], "<U1"),
        ([True], "bool"),
    ],
)
def test_other_samples_are_refused_in_a_sentence(samples: Any, got: str) -> None:
    with pytest.raises(ValueError, match=r"^samples must be [^\n]*integers") as error:
        pcm(samples)
    assert got in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [0, 17, 8.5, True, None])
def test_bits_of_another_number_are_refused(bits: Any) -> None:
    for call in (pcm, pcm_decode):
        with pytest.raises(ValueError, match=f"^bits must be from 1 to 16 bits, got {bits}$"):
            call([0.0], bits)


def test_a_level_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x must hold numbers, got nan$"):
        pcm_decode([0.5, math.nan])


# ---- masses ----


def levels(bits: int, unit: float) -> Tensor:
    """All levels, ``(2^bits, 1)``."""
    return ((2 * torch.arange(2**bits) + 1) / 2**bits - 1).unsqueeze(-1) / unit


def mixture(p: Tensor, bits: int, unit: float, floor: float = FLOOR) -> Any:
    """The mixture with parameters ``(*batch, 3, C, X)``, as the emission makes it of outputs."""
    emission = DiscretisedLogisticMixture(
        2, X, (), bits=bits, num_components=C, min_log_scale=floor - math.log(unit), unit=unit
    )
    return emission.distribution(p.flatten(-3))


def parameters(*batch: int, log_scale: float = -2.0) -> Tensor:
    """Random ``(*batch, 3, C, X)`` where the unit is 1; some scales lie below the floor."""
    p = torch.randn(*batch, 3, C, X)
    p[..., 2, :, :] = log_scale + 3 * p[..., 2, :, :]
    return p


def in_unit(p: Tensor, unit: float) -> Tensor:
    """The same parameters in units of ``unit``."""
    logits, loc, log_scale = p.unbind(-3)
    return torch.stack([logits, loc / unit, log_scale - math.log(unit)], dim=-3)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bits", [1, 5, 16])
def test_masses_of_all_levels_add_up_to_one_in_any_unit(bits: int, unit: float) -> None:
    p = in_unit(parameters(), unit)[..., :1]  # a feature by itself
    of_one = MixtureOfLogistics(p, bits, FLOOR - math.log(unit), unit)
    masses = of_one.log_prob(levels(bits, unit)).exp()
    assert float(masses.sum()) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bits", [1, 5, 16])
def test_a_log_mass_and_its_gradient_know_no_unit(bits: int, unit: float) -> None:
    p = parameters(40)
    rows = torch.randint(2**bits, (40, X))
    rows[0], rows[1] = 0, 2**bits - 1  # the ends
    x = levels(bits, 1.0)[rows, 0]
    plain, other = p.clone().requires_grad_(), in_unit(p, unit).requires_grad_()
    expected = mixture(plain, bits, 1.0).log_prob(x)
    actual = mixture(other, bits, unit).log_prob(x / unit)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(40)
    (slope,) = torch.autograd.grad((expected * weight).sum(), plain)
    (found,) = torch.autograd.grad((actual * weight).sum(), other)
    found[:, 1] /= unit  # what a location moves by in the other unit
    largest = float(slope.abs().max())
    torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-11 * largest)
    low = p[:, 2] < FLOOR
    assert bool(low.any()) and not bool(slope[:, 2][low].any())
    wrong = mixture(other, bits, unit).log_prob(x / unit * 1.5)
    assert float((wrong - expected).detach().abs().max()) > 0.01


@pytest.mark.parametrize("unit", UNITS)
def test_the_end_cells_take_the_tails(unit: float) -> None:
    bits, p = 4, in_unit(parameters(log_scale=-1.0), unit)
    logits, loc, log_scale = (part[:, 0].numpy() for part in p)
    weights = np.exp(logits) / np.exp(logits).sum()
    scale = np.exp(np.maximum(log_scale, FLOOR - math.log(unit)))
    border = (1 - 2 / 2**bits) / unit
    of_one = MixtureOfLogistics(p[..., :1], bits, FLOOR - math.log(unit), unit)
    first, *_, last = of_one.log_prob(levels(bits, unit)).exp().tolist()
    assert first == pytest.approx(weights @ stats.logistic.cdf(-border, loc, scale), rel=1e-9)
    assert last == pytest.approx(weights @ stats.logistic.sf(border, loc, scale), rel=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("bits", [1, 5, 16])
def test_draws_are_levels_and_those_of_the_unit_one(
    bits: int, unit: float, kind: torch.dtype
) -> None:
    p = parameters(50).to(kind)
    given, plain = mixture(in_unit(p, unit), bits, unit), mixture(p, bits, 1.0)
    torch.manual_seed(1)
    x = given.sample((20,))
    assert x.shape == (20, 50, X) and x.dtype == kind
    assert bool(Cells(bits, unit).check(x).all()) and bool(given.support.check(x).all())
    torch.testing.assert_close(given.expand((20, 50)).log_prob(x), given.log_prob(x))
    if kind == torch.float64:
        torch.manual_seed(1)
        torch.testing.assert_close(x * unit, plain.sample((20,)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("log_scale", [-6.0, -2.0, 1.0])
def test_the_mean_is_that_of_all_levels_within_half_a_cell(unit: float, log_scale: float) -> None:
    bits, p = 6, in_unit(parameters(log_scale=log_scale), unit)
    given = mixture(p, bits, unit)
    for feature in range(X):
        own = slice(feature, feature + 1)
        of_one = MixtureOfLogistics(p[..., own], bits, FLOOR - math.log(unit), unit)
        x = levels(bits, unit)
        expected = float((of_one.log_prob(x).exp() * x[:, 0]).sum())
        assert float(given.mean[feature]) == pytest.approx(expected, abs=1.001 * 0.5**bits / unit)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", UNITS)
def test_cells_of_another_unit_hold_their_levels_and_no_others(
    unit: float, kind: torch.dtype
) -> None:
    x, cell = levels(16, unit).to(kind), 2.0**-15 / unit
    assert bool(Cells(16, unit).check(x).all())
    for shift in (cell / 2, cell / 8, -cell / 8):
        assert not bool(Cells(16, unit).check(x + shift).any())
    assert not bool(Cells(16, unit).check(x[[0, -1]] + torch.tensor([[-cell], [cell]])).any())
    assert not bool(Cells(16, 1.1 * unit).check(x).all())


@pytest.mark.parametrize("unit", [0.0, -1.0, math.inf, math.nan])
def test_a_unit_is_a_positive_number(unit: float) -> None:
    with pytest.raises(ValueError, match="^unit must be "):
        DiscretisedLogisticMixture(2, X, unit=unit)


def test_a_unit_is_told_to_those_who_bring_other_data() -> None:
    assert DiscretisedLogisticMixture(2, X, unit=0.5).expects.endswith("(-1, 1), divided by 0.5")
    emission = DiscretisedLogisticMixture(2, X, bits=3, unit=0.5)
    assert bool(emission.support.check(torch.tensor(emission.padding)))


# ---- data sets ----


def dataset(splits: list[Any], std: float, bits: int = 16) -> Dataset:
    """Samples of three splits, each a list of sequences of frames, as linear levels."""
    parts = (
        Sequences.from_list([pcm(np.array(s), bits) / std for s in split]) for split in splits
    )
    return Dataset("made up", *parts, std=std, kind="pcm", bits=bits)


@pytest.mark.parametrize("std", [0.3, 1.0, 566.7251, 1915.3, 9999.9])
def test_levels_in_units_of_the_deviation_stand_for_their_samples(std: float) -> None:
    data = dataset([[EVERY.reshape(-1, 2**8)]] * 3, std)
    assert data.in_levels and data.unit == std / 2**15 and data.train.x.dtype == torch.float32
    np.testing.assert_array_equal(data.samples(data.test.sequence(0)).flatten(), EVERY)
    rough = dataset([[EVERY.reshape(-1, 2**8)]] * 3, std, bits=7)
    found = rough.samples(rough.test.sequence(0).numpy()).flatten()
    np.testing.assert_array_equal(found, pcm_decode(pcm(EVERY, 7), 7))


def test_only_levels_are_levels() -> None:
    part = Sequences.from_list([[[0.0]]])
    for kind, bits in (("real", None), ("binary", None), ("mu-law", 8)):
        data = Dataset("a", part, part, part, std=3.0, kind=kind, bits=bits)
        assert data.in_levels == (kind == "mu-law") and data.unit == 1.0
        if bits is None:
            with pytest.raises(ValueError, match=f"^only levels .* got data of kind '{kind}'$"):
                data.samples([0.5])


@pytest.mark.parametrize("std", [1.0, 566.7251, 9999.9])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_emission_of_levels_scores_them_and_may_put_most_mass_on_one(
    bits: int, std: float
) -> None:
    data = dataset([[EVERY[::64].reshape(-1, X)]] * 3, std, bits)
    options = data.emission
    assert options["emission"] == "logistic" and options["emission_options"]["unit"] == data.unit
    emission = DiscretisedLogisticMixture(2, X, num_components=2, **options["emission_options"])
    x = data.train.sequence(0)
    assert bool(emission.support.check(x).all())
    inner = x[len(x) // 2].double()
    narrow = torch.stack([torch.zeros(2, X), inner.expand(2, X), torch.full((2, X), -99.0)])
    mass = float(emission.distribution(narrow.flatten()).log_prob(inner).exp()) ** (1 / X)
    floor = options["emission_options"]["min_log_scale"]
    # no floor may be above 0, and the two cells of one bit have tails
    assert mass > 0.95 and (mass < 0.96 or floor == 0.0 or bits == 1)


def test_the_baseline_of_linear_levels_is_a_histogram_counted_by_hand() -> None:
    train = [[[-30_000, 100], [5, 9000]], [[20_000, -1]]]
    test = [[[-5, 16_384]], [[16_383, 0], [-32_768, 32_767]]]
    data = dataset([train, train, test], std=123.4, bits=2)
    counts = Counter(value // 2**14 for piece in train for frame in piece for value in frame)
    assert counts == {-2: 1, -1: 1, 0: 3, 1: 1}
    shares = {cell: (counts[cell] + 1) / (6 + 4) for cell in (-2, -1, 0, 1)}
    total = sum(math.log(shares[v // 2**14]) for piece in test for frame in piece for v in frame)
    assert independent_baseline(data) == pytest.approx(total / 3, rel=1e-12)
