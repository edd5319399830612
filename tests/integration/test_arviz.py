"""What ``to_arviz`` gives is what ArviZ reads, in another process too."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from inference import ELBO, fit, seeded, step_densities, to_arviz
from inference.arviz_adapter import write_arviz
from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe

T, X, Z, DRAWS = 7, 3, 2, 60
SAMPLED = ["posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood"]


def trained(kind: str = "vrnn") -> tuple[Recipe, Tensor]:
    """A few steps of training, and one sequence (T, X)."""
    r = recipes.rnn(X, 6) if kind == "rnn" else recipes.vrnn(X, Z, 6)
    x = torch.randn(4, T, X).cumsum(dim=1)
    with pyro.get_param_store().scope():
        svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
        fit(svi, [(x, torch.ones(4, T, dtype=torch.bool))], steps=10, seed=0, progress=False)
    return r, x[0]


def test_groups_dimensions_and_coordinates() -> None:
    r, x = trained()
    data: Any = to_arviz(r.model, r.guide, x, draws=DRAWS, frame_seconds=0.5)
    assert {*SAMPLED, "sample_stats", "observed_data"} == set(data.groups())
    shapes = {
        ("posterior", "z"): {"chain": 1, "draw": DRAWS, "time": T, "latent": Z},
        ("prior", "z"): {"chain": 1, "draw": DRAWS, "time": T, "latent": Z},
        ("posterior_predictive", "x"): {"chain": 1, "draw": DRAWS, "time": T, "feature": X},
        ("prior_predictive", "x"): {"chain": 1, "draw": DRAWS, "time": T, "feature": X},
        ("log_likelihood", "x"): {"chain": 1, "draw": DRAWS, "time": T},
        ("sample_stats", "lp"): {"chain": 1, "draw": DRAWS},
        ("sample_stats", "log_q"): {"chain": 1, "draw": DRAWS},
        ("sample_stats", "log_weight"): {"chain": 1, "draw": DRAWS, "time": T},
        ("observed_data", "x"): {"time": T, "feature": X},
    }
    for (group, name), shape in shapes.items():
        variable = data[group][name]
        assert dict(zip(variable.dims, variable.shape, strict=True)) == shape, (group, name)
        assert np.isfinite(variable.values).all()
        if "time" in shape:
            assert variable.coords["time"].values.tolist() == [0.5 * t for t in range(1, T + 1)]
    assert data["posterior"]["z"].coords["latent"].values.tolist() == [0, 1]
    assert data["observed_data"]["x"].coords["feature"].values.tolist() == [0, 1, 2]
    assert np.array_equal(data["observed_data"]["x"].values, x.numpy())


def test_without_the_length_of_a_frame_time_counts_from_one() -> None:
    r, x = trained()
    data: Any = to_arviz(r.model, r.guide, x[None], draws=3)
    assert data["posterior"].coords["time"].values.tolist() == list(range(1, T + 1))


def test_densities_are_those_of_the_draws_in_the_groups() -> None:
    r, x = trained()
    data: Any = to_arviz(r.model, r.guide, x, draws=DRAWS, seed=3)
    z = torch.tensor(data["posterior"]["z"].values)[0].transpose(0, 1).unsqueeze(2)  # (T, K, 1, Z)
    with torch.no_grad():
        d = r.model.rollout(r.guide, x[None], z=z)
        emission = r.model.emission(z, d.states).log_prob(x[:, None, None])  # (T, K, 1)
    given = data["log_likelihood"]["x"].values[0]
    np.testing.assert_allclose(given, emission[:, :, 0].T.numpy(), rtol=1e-10)
    stats = data["sample_stats"]
    lp = (d.log_prior + d.log_emission).sum(dim=0)[:, 0]
    np.testing.assert_allclose(stats["lp"].values[0], lp.numpy(), rtol=1e-10)
    log_q = d.log_proposal.sum(dim=0)[:, 0]
    np.testing.assert_allclose(stats["log_q"].values[0], log_q.numpy(), rtol=1e-10)
    weight = d.log_weight[:, :, 0].T.numpy()
    np.testing.assert_allclose(stats["log_weight"].values[0], weight, rtol=1e-10)
    # the twin: draws in another order have other densities
    assert not np.allclose(given[::-1], emission[:, :, 0].T.numpy(), rtol=1e-3)


def test_predictive_draws_belong_to_their_distributions() -> None:
    r, x = trained()
    data: Any = to_arviz(r.model, r.guide, x, draws=2000, seed=1)
    with seeded(1), torch.no_grad():
        d: Any = step_densities(r.model, r.guide, x[None], num_particles=2000)
    drawn = torch.tensor(data["posterior_predictive"]["x"].values)[0].transpose(0, 1)
    residual = (drawn - d.emission.mean[:, :, 0]) / d.emission.stddev[:, :, 0]
    error = residual.square().std() / residual.numel() ** 0.5
    assert abs(residual.square().mean() - 1.0) < 5 * error
    with torch.no_grad():
        first = r.model.transition(r.model.init(torch.Size((1,))))
    z_1 = torch.tensor(data["prior"]["z"].values)[0, :, 0]
    standard = (z_1 - first.mean) / first.stddev
    assert (standard.mean(dim=0).abs() < 5 / 2000**0.5).all()
    # the twin: the posterior's draws are not the prior's
    posterior = (torch.tensor(data["posterior"]["z"].values)[0, :, 0] - first.mean) / first.stddev
    assert not (posterior.mean(dim=0).abs() < 5 / 2000**0.5).all()


def test_a_seed_is_a_result_and_the_global_generator_is_left_alone() -> None:
    r, x = trained()
    before = torch.get_rng_state()
    runs = [to_arviz(r.model, r.guide, x, draws=5, seed=s)["posterior"]["z"] for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert (runs[0] == runs[1]).all() and not (runs[0] == runs[2]).any()


def test_two_models_one_after_the_other_and_the_parameter_store_stays_as_it_was() -> None:
    for seed in (0, 1):
        with seeded(seed):
            r, x = trained()
        assert to_arviz(r.model, r.guide, x, draws=3)["prior"]["z"].shape == (1, 3, T, Z)
        assert not list(pyro.get_param_store().keys())


def test_a_plain_pyro_pair_with_a_learnt_parameter() -> None:
    def model(x: Tensor | None, mask: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("sequences", len(mask), dim=-1):
            for t in (1, 2):
                z = pyro.sample(f"z_{t}", dist.Normal(loc.expand(1), 1e-3).to_event(1))
                seen = None if x is None else x[:, t - 1]
                pyro.sample(f"x_{t}", dist.Normal(z, 1e-3).to_event(1), obs=seen)

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(mask), dim=-1):
            for t in (1, 2):
                pyro.sample(f"z_{t}", dist.Normal(x[:, t - 1], 0.1).to_event(1))

    pyro.param("loc", torch.tensor(7.0))
    data: Any = to_arviz(model, guide, torch.zeros(2, 1), draws=20)
    # the store's value, not the one the parameter would start with
    assert abs(data["prior_predictive"]["x"].values - 7.0).max() < 0.1
    assert abs(data["posterior"]["z"].values).max() < 1.0
    assert set(pyro.get_param_store().keys()) == {"loc"}


def test_steps_are_in_the_order_of_their_numbers() -> None:
    def model(x: Tensor | None, mask: Tensor) -> None:
        with pyro.plate("sequences", len(mask), dim=-1):
            for t in range(1, 13):
                z = pyro.sample(f"z_{t}", dist.Normal(torch.full((1,), 1.0 * t), 1e-3).to_event(1))
                seen = None if x is None else x[:, t - 1]
                pyro.sample(f"x_{t}", dist.Normal(-z, 1e-3).to_event(1), obs=seen)

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(mask), dim=-1):
            for t in range(1, 13):
                pyro.sample(f"z_{t}", dist.Normal(-x[:, t - 1], 1e-3).to_event(1))

    steps = torch.arange(1.0, 13.0)
    data: Any = to_arviz(model, guide, -steps[:, None], draws=4)
    for group in ("prior", "posterior"):
        z, x = data[group]["z"].values, data[f"{group}_predictive"]["x"].values
        assert abs(z[0, :, :, 0] - steps.numpy()).max() < 0.02
        assert abs(x[0, :, :, 0] + steps.numpy()).max() < 0.02


def test_a_latent_that_all_steps_share_is_f() -> None:
    with seeded(2):
        r = recipes.dsae(X, Z, 6, f_dim=2)
        r.guide.head.net[-1].bias.data[:2] += 9.0  # the mean of q(f), far from the prior's
        x = torch.randn(T, X)
    data: Any = to_arviz(r.model, r.guide, x, draws=DRAWS, seed=4)
    with seeded(4), torch.no_grad():
        d: Any = step_densities(r.model, r.guide, x[None], num_particles=DRAWS)
    f, prior = data["posterior"]["f"], data["prior"]["f"]
    assert f.dims == prior.dims == ("chain", "draw", "global")
    assert np.array_equal(f.values[0], d.f[:, 0].numpy())
    assert abs(prior.values).max() < 5.0 < f.values.mean()


@pytest.mark.parametrize("shape", [(2, T, X), (T,), (1, 1, T, X)])
def test_anything_but_one_sequence_is_refused(shape: tuple[int, ...]) -> None:
    r, _ = trained()
    with pytest.raises(ValueError, match="x must be one sequence of shape .T, X.* its padding"):
        to_arviz(r.model, r.guide, torch.zeros(shape))


def test_an_rnn_has_no_latents_and_still_predicts(tmp_path: Path) -> None:
    r, x = trained("rnn")
    data: Any = to_arviz(r.model, r.guide, x, draws=DRAWS)
    groups = {*SAMPLED, "sample_stats", "observed_data"} - {"posterior", "prior"}
    assert set(data.groups()) == groups
    with torch.no_grad():
        d = r.model.rollout(r.guide, x[None])
    expected = np.broadcast_to(d.log_emission[:, 0, 0].numpy(), (DRAWS, T))
    np.testing.assert_allclose(data["log_likelihood"]["x"].values[0], expected, rtol=1e-10)
    assert (data["sample_stats"]["log_q"].values == 0.0).all()
    data.to_netcdf(str(tmp_path / "rnn.nc"))


READER = """
import sys, warnings
import matplotlib
matplotlib.use("Agg")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az
assert "torch" not in sys.modules and "pyro" not in sys.modules
data = az.from_netcdf(sys.argv[1])
print(sorted(data.groups()))
print(dict(data.posterior.sizes), data.attrs["row"])
summary = az.summary(data, var_names=["z"], kind="stats")
print(len(summary), "r_hat" in summary.columns, bool(summary["sd"].gt(0).all()))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loo = az.loo(data, var_name="x", pointwise=True)
print(loo.pareto_k.shape, loo.n_data_points, bool(loo.warning), bool((loo.pareto_k > 0.7).any()))
print(any("shape parameter of Pareto distribution" in str(w.message) for w in caught))
axes = az.plot_ppc(data, var_names=["x"], num_pp_samples=10, random_seed=0)
print(type(axes).__name__)
az.plot_ppc(data, var_names=["x"], group="prior", num_pp_samples=10, random_seed=0)
"""


def test_the_file_opens_in_a_process_that_knows_only_arviz(tmp_path: Path) -> None:
    r, x = trained()
    # An untrained guide's draws differ a lot in what they say of x, and each frame's own z_t has
    # seen that frame: leaving the frame out changes its posterior, so LOO must warn by k-hat.
    data = to_arviz(r.model, r.guide, 5.0 * x, draws=DRAWS)
    data.attrs["row"] = "a row, seed 0"
    path = tmp_path / "posterior.nc"
    write_arviz(data, path)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(sorted({*SAMPLED, "sample_stats", "observed_data"}))
    assert lines[1] == (
        f"{{'chain': 1, 'draw': {DRAWS}, 'time': {T}, 'latent': {Z}}} a row, seed 0"
    )
    assert lines[2] == f"{T * Z} False True"  # R-hat is not reported: one chain
    assert lines[3] == f"({T},) {T} True True"
    assert lines[4] == "True"


def test_loo_pit_is_the_share_of_reweighted_draws_below_the_data() -> None:
    r, x = trained()
    whole: Any = to_arviz(r.model, r.guide, x, draws=DRAWS)
    data: Any = to_arviz(r.model, r.guide, x, draws=DRAWS, by_feature=True)
    by_feature = data["log_likelihood"]["x"]
    assert by_feature.dims == ("chain", "draw", "time", "feature")
    np.testing.assert_allclose(by_feature.sum("feature"), whole["log_likelihood"]["x"], rtol=1e-9)
    pit = az.loo_pit(data, y="x")
    log_weight, _ = az.psislw(-by_feature.stack(__sample__=("chain", "draw")))
    drawn = data["posterior_predictive"]["x"].stack(__sample__=("chain", "draw")).values
    below = (np.exp(log_weight.values) * (drawn <= x.numpy()[..., None])).sum(axis=-1)
    np.testing.assert_allclose(np.asarray(pit), below, rtol=1e-9)
    with pytest.raises(ValueError, match="same shape"):  # ArviZ's own sentence
        az.loo_pit(whole, y="x")


def test_features_that_depend_on_each_other_are_not_split() -> None:
    r = recipes.vrnn(X, Z, 6, emission="mixture")
    with pytest.raises(NotImplementedError, match="by_feature=True needs an emission"):
        to_arviz(r.model, r.guide, torch.rand(T, X), draws=3, by_feature=True)
