"""Simulation-based calibration and k-hat, on a model whose posterior is known exactly."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from inference.calibration import Calibration, calibrate, latent_summaries
from inference.weights import pareto_k
from pyro_avrnn import recipes
from pyro_avrnn.models import LGSSM, ExactSmoother, LGSSMState
from pyro_avrnn.sequence import SequenceGuide
from tests.unit.table import prefix_mask

SURE = 1e-3  # exact guides are turned down by chance this seldom, and seeds are fixed


class Scaled(ExactSmoother):
    """The exact smoother, every proposal's deviation multiplied by a factor."""

    def __init__(self, model: LGSSM, factor: float) -> None:
        super().__init__(model)
        self.factor = factor

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        scale_tril = self.factor * q.scale_tril
        return dist.MultivariateNormal(q.mean, scale_tril=scale_tril, validate_args=False)


class Prior(SequenceGuide):
    """Draws as if there were no data."""

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        return self.transition(state)


def full(length: int) -> Tensor:
    return torch.ones(1, length, dtype=torch.bool)


def said(result: Calibration) -> str:
    return ", ".join(f"{n} {p:.2g}" for n, p in zip(result.names, result.p_values, strict=True))


# exact guides pass, others do not


@pytest.mark.parametrize("mask", [full(10), prefix_mask((10, 1, 4))], ids=["full", "ragged"])
@pytest.mark.parametrize("z_dim", [1, 2])
def test_the_exact_posterior_is_calibrated(z_dim: int, mask: Tensor) -> None:
    model = LGSSM.random(z_dim, 2, seed=0)
    result = calibrate(model, ExactSmoother(model), mask, num_simulations=500)
    print(said(result))
    assert result.ranks.shape == (500, 3 * z_dim + 1) and result.uniform(SURE)


@pytest.mark.parametrize("mask", [full(10), prefix_mask((10, 1, 4))], ids=["full", "ragged"])
@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_posterior_of_wrong_width_is_not(factor: float, mask: Tensor) -> None:
    model = LGSSM.scalar()
    result = calibrate(model, Scaled(model, factor), mask)
    print(said(result))
    assert not result.uniform(SURE)
    assert (result.p_values < 1e-5).all()  # every quantity sees it
    middle = result.histogram()[:3, 5:15].sum(dim=1)
    assert (middle < 500).all() if factor < 1.0 else (middle > 500).all()


def expected_ranks(factor: float, num_draws: int, num_bins: int) -> np.ndarray:
    """Shares of bins if the truth is N(0, 1) and the draws are N(0, factor^2)."""
    grid = scipy.stats.norm.ppf((np.arange(20000) + 0.5) / 20000)
    below = scipy.stats.norm.cdf(grid / factor)[:, None]
    shares = scipy.stats.binom.pmf(np.arange(num_draws + 1), num_draws, below).mean(axis=0)
    return shares.reshape(num_bins, -1).sum(axis=1)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_ranks_of_a_wrong_width_are_those_computed(factor: float) -> None:
    model = LGSSM.scalar()
    result = calibrate(model, Scaled(model, factor), full(10), num_draws=39, num_simulations=2000)
    for counts in result.histogram()[:3].numpy():  # first, last and mean are all normal

        def p_value(f: float, counts: np.ndarray = counts) -> float:
            shares = expected_ranks(f, 39, 20)
            return scipy.stats.chisquare(counts, 2000 * shares).pvalue

        assert p_value(factor) > SURE
        assert p_value(factor + 0.2) < 1e-6  # planted fault


def test_only_a_quantity_of_the_data_sees_that_a_guide_ignores_them() -> None:
    model = LGSSM.scalar()
    result = calibrate(model, Prior(model), full(10))
    print(said(result))
    assert (result.p_values[:3] > SURE).all() and result.p_values[3] < 1e-10
    assert not result.uniform()


# ranks and their test, by construction


def coin(x: Tensor | None, mask: Tensor) -> Tensor:
    """z and x have nothing to do with each other."""
    with pyro.plate("sequences", len(mask)):
        pyro.sample("z_1", dist.Normal(0.0, 1.0))
        obs = None if x is None else x[:, 0, 0]
        return pyro.sample("x_1", dist.Normal(0.0, 1.0), obs=obs)[:, None, None]


def coin_guide(x: Tensor, mask: Tensor) -> None:
    with pyro.plate("sequences", len(mask)):
        pyro.sample("z_1", dist.Normal(0.0, 1.0))


def discrete(z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """z, how often it is above 0, and a constant."""
    return {"z": z[0, ..., 0], "positive": (z[0, ..., 0] > 0).double(), "one": 0 * z[0, ..., 0]}


@pytest.mark.parametrize("num_draws", [1, 4, 9])
def test_draws_of_the_truth_have_uniform_ranks_and_ties_are_broken_evenly(num_draws: int) -> None:
    bins = num_draws + 1
    result = calibrate(
        coin,
        coin_guide,
        full(1),
        num_simulations=20000,
        num_draws=num_draws,
        num_bins=bins,
        quantities=discrete,
        batch_size=5000,
    )
    assert result.names == ("z", "positive", "one", "log p(x, z)")
    for ranks in result.ranks.t().tolist():
        assert set(ranks) == set(range(bins))
    assert result.uniform(SURE)
    faulty = result.ranks.clone()
    faulty[::10] = faulty[::10].clamp(max=num_draws - 1)  # a tenth loses its last rank
    assert not result._replace(ranks=faulty).uniform(SURE)


def test_p_values_are_those_of_scipy() -> None:
    ranks = torch.randint(100, (700, 5))
    ranks[:, 3] = (ranks[:, 3] + 0.1 * ranks[:, 3]).clamp(max=99).long()
    ranks[:, 4] = 7
    result = Calibration(ranks, tuple("abcde"), num_draws=99, num_bins=20)
    counts = np.stack([np.histogram(r, 20, (0, 100))[0] for r in ranks.t().numpy()])
    np.testing.assert_array_equal(result.histogram(), counts)
    expected = scipy.stats.chisquare(counts, axis=1).pvalue
    np.testing.assert_allclose(result.p_values, expected, rtol=1e-10)
    assert result.p_values[4] == 0.0 and not result.uniform()
    assert result.p_values.dtype == torch.float64


def test_the_verdict_is_bonferronis() -> None:
    ranks = torch.arange(400).remainder(20).repeat(4, 1).t().clone()
    assert Calibration(ranks, tuple("abcd"), 19, 20).uniform(0.999)
    ranks[:28, 0] = 0  # the first bin holds 46 instead of 20
    result = Calibration(ranks, tuple("abcd"), 19, 20)
    assert not result.uniform(4.01 * result.p_values[0].item())
    assert result.uniform(3.99 * result.p_values[0].item())


def test_pit_lies_between_0_and_1() -> None:
    result = Calibration(torch.tensor([[0], [99]]), ("a",), num_draws=99, num_bins=20)
    torch.testing.assert_close(result.pit(), torch.tensor([[0.005], [0.995]]))


# what is ranked


def test_summaries_read_observed_steps_only() -> None:
    mask = prefix_mask((3, 1, 2))
    z = torch.arange(3 * 2 * 3 * 2, dtype=torch.get_default_dtype()).reshape(3, 2, 3, 2)
    z = torch.where(mask.t()[:, None, :, None], z, torch.nan)
    values = latent_summaries(z, torch.zeros(3, 3, 1), mask)
    assert list(values) == [f"z[{i}] {n}" for i in range(2) for n in ("first", "last", "mean")]
    for i in range(2):
        torch.testing.assert_close(values[f"z[{i}] first"], z[0, ..., i])
        last = torch.stack([z[2, :, 0, i], z[0, :, 1, i], z[1, :, 2, i]], dim=1)
        torch.testing.assert_close(values[f"z[{i}] last"], last)
        torch.testing.assert_close(values[f"z[{i}] mean"], z[..., i].nanmean(dim=0))
    assert list(latent_summaries(z[:1], torch.zeros(3, 1, 1), mask[:, :1])) == [
        "z[0] first",
        "z[1] first",
    ]


def test_lengths_are_those_of_the_masks_rows_in_turn() -> None:
    model, seen = LGSSM.scalar(), []

    def lengths(z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if z.shape[1] == 1:
            seen.extend(mask.sum(dim=1).tolist())
        return {"z": z[0, ..., 0]}

    mask = prefix_mask((5, 2, 3))
    options = {"num_simulations": 25, "num_draws": 4, "num_bins": 5, "batch_size": 10}
    calibrate(model, ExactSmoother(model), mask, quantities=lengths, **options)
    assert seen == [5, 2, 3] * 8 + [5]


@pytest.mark.parametrize("mask", [full(4), prefix_mask((4, 1, 2))], ids=["full", "ragged"])
def test_traced_programs_have_the_ranks_of_the_rollout(mask: Tensor) -> None:
    model = LGSSM.random(2, 2, seed=0)
    guide = ExactSmoother(model)
    options: dict[str, Any] = {"num_simulations": 50, "num_draws": 9, "num_bins": 10}
    rolled = calibrate(model, guide, mask, **options)
    traced = calibrate(lambda *a: model(*a), lambda *a: guide(*a), mask, **options)
    assert rolled.names == traced.names and torch.equal(rolled.ranks, traced.ranks)


def with_global(x: Tensor | None, mask: Tensor) -> Tensor:
    """A latent shared by all steps, and one more a step."""
    observations = []
    with pyro.plate("sequences", len(mask)):
        f = pyro.sample("f", dist.Normal(0.0, 1.0))
        for t in range(1, 3):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            obs = None if x is None else x[:, t - 1, 0]
            observations.append(pyro.sample(f"x_{t}", dist.Normal(f + z, 1.0), obs=obs))
    return torch.stack(observations, dim=1).unsqueeze(-1)


def with_global_guide(x: Tensor, mask: Tensor) -> None:
    """The exact posterior: x_t is f plus noise of variance 2; then z_t given f and x_t."""
    with pyro.plate("sequences", len(mask)):
        f = pyro.sample("f", dist.Normal(x[..., 0].sum(dim=1) / 4, 0.5**0.5))
        for t in range(1, 3):
            pyro.sample(f"z_{t}", dist.Normal((x[:, t - 1, 0] - f) / 2, 0.5**0.5))


def test_a_plain_pyro_program_with_a_global_latent() -> None:
    result = calibrate(with_global, with_global_guide, full(2))
    assert len(result.names) == 7 and result.uniform(SURE)

    def shrunk(x: Tensor, mask: Tensor) -> None:
        with_global_guide(0.7 * x, mask)  # planted fault

    assert not calibrate(with_global, shrunk, full(2)).uniform(SURE)


def test_nothing_global_is_touched() -> None:
    recipe = recipes.vrnn(x_dim=3, z_dim=2, h_dim=4)
    options: dict[str, Any] = {"num_simulations": 25, "num_draws": 4, "num_bins": 5}
    before = torch.get_rng_state()
    first = calibrate(recipe.model, recipe.guide, full(3), **options)
    again = calibrate(recipe.model, recipe.guide, full(3), **options, progress=True)
    other = calibrate(recipe.model, recipe.guide, full(3), **options, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.ranks, again.ranks) and not torch.equal(first.ranks, other.ranks)
    assert not list(pyro.get_param_store())
    assert not first.ranks.requires_grad


def test_programs_run_in_evaluation_mode_and_go_back() -> None:
    model = LGSSM.scalar().train()
    guide = ExactSmoother(model).eval()
    modes: list[bool] = []

    def watched(z: Tensor, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        modes.append(model.training or guide.training)
        return {"z": z[0, ..., 0]}

    options: dict[str, Any] = {"num_simulations": 25, "num_draws": 4, "num_bins": 5}
    calibrate(model, guide, full(3), quantities=watched, **options)
    assert not any(modes) and model.training and not guide.training


# bad input


def silent(x: Tensor | None, mask: Tensor) -> None:
    coin(x, mask)


def flat(x: Tensor | None, mask: Tensor) -> Tensor:
    return coin(x, mask)[:, 0]


def constant(value: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda z, x, mask: {"mine": value(z)}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"mask": torch.ones(1, 1).float()}, TypeError, "mask must be .*bool, got torch.float32"),
        ({"mask": [[True]]}, TypeError, "mask must be .*bool, got list"),
        ({"mask": full(1)[0]}, ValueError, r"mask must have shape \(B, T\).*got \(1,\)"),
        ({"mask": full(1)[:0]}, ValueError, r"mask must .*got \(0, 1\)"),
        ({"mask": prefix_mask((2, 0))}, ValueError, "mask must .*sequence 1 .*leave it out"),
        ({"num_draws": 100}, ValueError, "num_draws must .*got 100; use num_draws=99"),
        ({"num_draws": 50, "num_bins": 20}, ValueError, "got 50; use num_draws=59"),
        ({"num_draws": 0}, ValueError, "num_draws must .*got 0; use num_draws=19"),
        ({"num_draws": -1}, ValueError, "num_draws must .*got -1"),
        ({"num_bins": 1}, ValueError, "num_bins must be at least 2, got 1"),
        ({"num_simulations": 99}, ValueError, "num_simulations must be at least 100 .*got 99"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"model": silent}, TypeError, r"model must return the x \(B, T, X\).*got NoneType"),
        ({"model": flat}, ValueError, r"model must return x .*\(100, 1, X\).*got \(100, 1\)"),
        ({"quantities": constant(lambda z: z)}, ValueError, "quantities must give 'mine' with"),
        (
            {"quantities": constant(lambda z: torch.nan * z[0, ..., 0])},
            ValueError,
            "quantities must be numbers, but 'mine' holds NaN",
        ),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    good: dict[str, Any] = {"model": coin, "guide": coin_guide, "mask": full(1)}
    with pytest.raises(error, match=sentence):
        calibrate(**good | options)


def test_a_model_without_latents_is_refused() -> None:
    recipe = recipes.rnn(x_dim=3, h_dim=4)
    with pytest.raises(ValueError, match="model must have latents"):
        calibrate(recipe.model, recipe.guide, full(3))


def test_a_result_is_not_cut_into_unequal_bins_or_judged_at_no_level() -> None:
    result = Calibration(torch.zeros(200, 1, dtype=torch.long), ("a",), num_draws=99, num_bins=20)
    with pytest.raises(ValueError, match="num_draws must be a multiple of num_bins = 7, less 1"):
        _ = result._replace(num_bins=7).p_values
    with pytest.raises(ValueError, match="num_simulations must be at least 250"):
        result._replace(num_bins=50).histogram()
    for level in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
            result.uniform(level)


# k-hat of the same guides: the tails of 20 sequences' weights


def k_hats(factor: float) -> Tensor:
    """Of one guide, 20 sequences of 10 steps, 2000 particles each.

    With n the norm of a draw in posterior deviations, log w = (1 - 1 / factor^2) * -n^2 / 2 but
    for a constant: in the limit k = 1 - factor^2 for a narrow guide, -2 / T for a wide one.
    """
    model = LGSSM.scalar()
    with torch.no_grad():
        x = model(mask=torch.ones(20, 10, dtype=torch.bool))
        d = model.rollout(Scaled(model, factor), x, num_particles=2000)
        return pareto_k(d.log_weight.sum(dim=0))


def test_k_hat_sees_a_guide_that_is_too_narrow() -> None:
    k = k_hats(0.7)
    print(f"mean {k.mean():.2f}, from {k.min():.2f} to {k.max():.2f}")
    assert 0.5 < k.mean() < 0.8  # 0.51 in the limit, approached from above


def test_k_hat_is_blind_to_one_that_is_too_wide() -> None:
    k = k_hats(1.3)
    print(f"mean {k.mean():.2f}, from {k.min():.2f} to {k.max():.2f}")
    assert k.max() < 0.5 and -0.3 < k.mean() < 0.1  # -0.2 in the limit


def test_constant_weights_have_no_k_hat() -> None:
    assert k_hats(1.0).isnan().all()
