"""Plain Pyro works on a model and a guide of this library, with nothing of ours around them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.stats import effective_sample_size
from torch import Size, Tensor

from inference import ELBO, evaluate
from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceModel
from tests.unit.table import (
    CASES,
    FEW,
    H,
    X,
    Z,
    assert_all_close,
    observations,
    parameters,
    prefix_mask,
    value_and_gradients,
)

LENGTHS = (4, 2, 3)
PROGRAMS: dict[str, Callable[[], Recipe]] = {
    **{name: CASES[name] for name in FEW},
    "avrnn": lambda: recipes.avrnn(X, Z, H),
}
FILTERING = "vrnn-filtering-conditional-normal-gru"


def data(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A ragged batch that the model can score."""
    return observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


def compare_losses(recipe: Recipe, ours: Any, theirs: Any) -> None:
    """The same value and gradients: rtol 1e-10, atol 1e-12 of a tensor's largest entry."""
    args = data(recipe)
    value, found = value_and_gradients(recipe, ours, *args)
    expected_value, expected = value_and_gradients(recipe, theirs, *args)
    torch.testing.assert_close(
        value, expected_value, rtol=1e-10, atol=0.0, msg=lambda text: f"value: {text}"
    )
    assert_all_close(found, expected)


def pyros(kind: type, particles: int) -> Any:
    return kind(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("case", PROGRAMS)
def test_trace_elbo_is_our_elbo_with_a_sampled_kl(case: str, particles: int) -> None:
    compare_losses(PROGRAMS[case](), ELBO(num_particles=particles), pyros(Trace_ELBO, particles))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("case", PROGRAMS)
def test_trace_mean_field_elbo_is_our_elbo_with_the_analytic_kl(case: str, particles: int) -> None:
    ours = ELBO(num_particles=particles, analytic_kl=True)
    compare_losses(PROGRAMS[case](), ours, pyros(TraceMeanField_ELBO, particles))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ELBO(analytic_kl=True), Trace_ELBO),
        (ELBO(), TraceMeanField_ELBO),
        (ELBO(kl_weight=0.999999), Trace_ELBO),
        (ELBO(num_particles=2), Trace_ELBO),
    ],
)
def test_the_comparison_rejects_another_loss(ours: ELBO, theirs: type) -> None:
    with pytest.raises(AssertionError, match="value"):
        compare_losses(CASES[FILTERING](), ours, pyros(theirs, 1))


def test_the_comparison_rejects_another_gradient() -> None:
    recipe = CASES["vrnn-residual-conditional-normal-gru"]()

    def stopped(model: Any, guide: Any, *args: Any) -> Tensor:
        guide.prior_gradient = False
        loss = ELBO()(model, guide, *args)
        guide.prior_gradient = True
        return loss

    with pytest.raises(AssertionError, match="model.prior"):
        compare_losses(recipe, stopped, pyros(Trace_ELBO, 1))


def train(
    recipe: Recipe, *args: Any, loss: Callable[[], Any] = Trace_ELBO
) -> tuple[list[float], bool]:
    """Losses of a few SVI steps, and whether every parameter moved."""
    before = {name: p.detach().clone() for name, p in parameters(recipe).items()}
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), loss())
    losses = [svi.step(*args) for _ in range(40)]
    moved = [not torch.equal(p, before[name]) for name, p in parameters(recipe).items()]
    return losses, all(moved)


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, ELBO])
@pytest.mark.parametrize("case", PROGRAMS)
def test_svi_learns_with_every_elbo(case: str, loss: Callable[[], Any]) -> None:
    recipe = PROGRAMS[case]()
    args = data(recipe)
    losses, moved = train(recipe, *args, loss=loss)
    assert moved and sum(losses[-5:]) < sum(losses[:5])


def generated(recipe: Recipe, samples: int, length: int, parallel: bool) -> tuple[Tensor, Tensor]:
    """Series ``(samples, T, X)`` and their latents ``(T, 1, samples, Z)``, by Predictive."""
    mask = torch.ones(1, length, dtype=torch.bool)
    with torch.no_grad():
        found = Predictive(recipe.model, num_samples=samples, parallel=parallel)(None, mask)
    steps = range(1, length + 1)
    x = torch.stack([found[f"x_{t}"].reshape(samples, X) for t in steps], dim=1)
    if not recipe.model.z_dim:
        return x, x.new_zeros(length, 1, samples, 0)
    return x, torch.stack([found[f"z_{t}"].reshape(1, samples, Z) for t in steps])


def residuals_are_standard(recipe: Recipe, x: Tensor, z: Tensor) -> bool:
    """Whether (x - mean) / scale and the same of z have variance 1, to five standard errors."""
    with torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, z=z)
    squares = [((d.x - d.emission.mean) / d.emission.stddev).square().mean(dim=(0, 1, 3))]
    if recipe.model.z_dim:
        squares.append(((d.z - d.prior.mean) / d.prior.stddev).square().mean(dim=(0, 1, 3)))
    errors = [s.std() / len(s) ** 0.5 for s in squares]  # one independent number a sequence
    return all(abs(s.mean() - 1.0) < 5 * e for s, e in zip(squares, errors, strict=True))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("case", ["rnn-normal-gru", FILTERING])
def test_series_from_predictive_are_draws_of_the_scored_density(case: str, parallel: bool) -> None:
    recipe = PROGRAMS[case]()
    x, z = generated(recipe, 400 if parallel else 100, 3, parallel)
    assert residuals_are_standard(recipe, x, z)


def test_the_check_of_generated_series_rejects_latents_of_another_series() -> None:
    recipe = CASES[FILTERING]()
    x, z = generated(recipe, 400, 3, parallel=True)
    assert not residuals_are_standard(recipe, x, z * 1.2)
    assert not residuals_are_standard(recipe, x * 1.2, z)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("case", PROGRAMS)
def test_predictive_gives_the_guides_draws_and_the_data(case: str, parallel: bool) -> None:
    recipe = PROGRAMS[case]()
    x, mask = data(recipe)
    found = Predictive(recipe.model, guide=recipe.guide, num_samples=6, parallel=parallel)(x, mask)
    sites = "xz" if recipe.model.z_dim else "x"
    assert set(found) == {f"{site}_{t}" for t in range(1, max(LENGTHS) + 1) for site in sites}
    for t in range(1, max(LENGTHS) + 1):
        seen = torch.where(mask[:, t - 1 : t], x[:, t - 1], 0.0)
        assert torch.equal(found[f"x_{t}"].expand(6, *seen.shape), seen.expand(6, *seen.shape))
        if recipe.model.z_dim:
            z_t = found[f"z_{t}"]
            assert z_t.shape == (6, len(LENGTHS), Z) and len(z_t.flatten().unique()) == z_t.numel()


@pytest.mark.parametrize("case", PROGRAMS)
def test_the_model_draws_x_from_a_mask_alone(case: str) -> None:
    recipe = PROGRAMS[case]()
    _, mask = data(recipe)
    trace = poutine.trace(recipe.model).get_trace(None, mask)
    drawn = trace.nodes["_RETURN"]["value"]
    steps = range(1, max(LENGTHS) + 1)
    sites = [trace.nodes[f"x_{t}"] for t in steps]
    assert drawn.shape == (len(LENGTHS), max(LENGTHS), X)
    assert torch.equal(drawn, torch.stack([site["value"] for site in sites], dim=1))
    assert not any(site["is_observed"] for site in sites)
    names = {f"{site}_{t}" for t in steps for site in ("xz" if recipe.model.z_dim else "x")}
    assert set(trace.stochastic_nodes) == names | {"sequences"}


class WalkState(NamedTuple):
    before: Tensor


class Walk(SequenceModel):
    """z_t = 0.8 z_{t-1} + N(0, 0.7^2), x_t = z_t + N(0, 0.5^2), in each of two dimensions."""

    def __init__(self) -> None:
        super().__init__(x_dim=2, z_dim=2)

    def init(self, batch_shape: Size) -> WalkState:
        return WalkState(torch.zeros(*batch_shape, 2))

    def transition(self, state: WalkState) -> dist.Distribution:
        return dist.Normal(0.8 * state.before, 0.7).to_event(1)

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        return dist.Normal(z_t, 0.5).to_event(1)

    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        return WalkState(z_t)


def walk_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(T, 2)`` and variance ``(T,)`` of z given x ``(T, 2)``: dense Gaussian algebra."""
    length = len(x)
    whiten = (torch.eye(length) - 0.8 * torch.eye(length).roll(1, dims=0).tril(-1)) / 0.7
    precision = whiten.T @ whiten + torch.eye(length) / 0.5**2
    covariance = torch.linalg.inv(precision)
    return covariance @ x / 0.5**2, covariance.diagonal()


def auto_normal(
    model: Callable[..., Any], x: Tensor, steps: int
) -> tuple[AutoNormal, list[float]]:
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), Trace_ELBO())
    return guide, [svi.step(x) for _ in range(steps)]


def test_an_autoguide_learns_the_latents_of_one_series() -> None:
    recipe = CASES[FILTERING]()
    recipe.model.eval().requires_grad_(False)  # the guide alone learns
    guide, losses = auto_normal(recipe.model, torch.randn(1, 3, X), steps=100)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert {f"z_{t}" for t in (1, 2, 3)} == set(guide.median())


def test_an_autoguide_finds_the_known_posterior_mean() -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 0.0], [2.0, 1.0]])
    guide, _ = auto_normal(Walk(), x[None], steps=400)
    median = torch.cat([guide.median()[f"z_{t}"] for t in (1, 2, 3)])
    expected, variance = walk_posterior(x)
    assert ((median - expected).abs() < 0.5 * variance.sqrt()[:, None]).all()


def nuts(model: Callable[..., Any], x: Tensor, warmup: int, samples: int) -> dict[str, Tensor]:
    chain = MCMC(NUTS(model), samples, warmup_steps=warmup, disable_progbar=True)
    chain.run(x)
    return chain.get_samples()


def test_nuts_runs_on_one_unpadded_series() -> None:
    recipe = CASES[FILTERING]()
    found = nuts(recipe.model, torch.randn(1, 3, X), 20, 20)
    assert set(found) == {"z_1", "z_2", "z_3"}
    for draws in found.values():
        assert draws.shape == (20, 1, Z)
        assert draws.isfinite().all() and (draws.std(dim=0) > 0).all()


def test_nuts_finds_the_known_posterior_and_the_check_rejects_another() -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 0.0], [2.0, 1.0]])
    found = nuts(Walk(), x[None], 50, 200)
    draws = torch.stack([found[f"z_{t}"][:, 0] for t in (1, 2, 3)], dim=1)  # (S, T, 2)
    effective = effective_sample_size(draws[None]).clamp(max=len(draws))
    error = draws.std(dim=0) / effective.sqrt()
    mean, variance = walk_posterior(x)
    assert ((draws.mean(dim=0) - mean).abs() < 5 * error).all()
    # the planted fault: the likelihood dropped, so that the mean would be the prior's
    assert not (draws.mean(dim=0).abs() < 5 * error).all()
    assert ((draws.std(dim=0) / variance.sqrt()[:, None] - 1.0).abs() < 0.5).all()


def test_two_pairs_in_scopes_of_their_own_both_learn() -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        recipe = CASES[FILTERING]()
        args = data(recipe)
        with pyro.get_param_store().scope():
            losses, moved = train(recipe, *args)
        assert moved and sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO, ELBO])
def test_a_second_pair_in_one_store_is_refused_until_it_is_cleared(
    loss: Callable[[], Any],
) -> None:
    first, second = CASES[FILTERING](), CASES[FILTERING]()
    args = data(first)
    train(first, *args)
    svi = SVI(second.model, second.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss())
    with pytest.raises(ValueError, match=r"pyro\.clear_param_store\(\)"):
        svi.step(*args)
    pyro.clear_param_store()
    losses, moved = train(second, *args)
    assert moved and sum(losses[-5:]) < sum(losses[:5])


READER = """
import sys
import pyro, torch
from pyro.infer import SVI
from inference import ELBO, evaluate, particle_filter
from pyro_avrnn import recipes
from pyro_avrnn.generation import generate

torch.set_default_dtype(torch.float64)
r = recipes.vrnn(2, 2, 4)
x = torch.ones(2, 3, 2)
pyro.get_param_store().load(sys.argv[1])
recipes.dsae(2, 2, 4, f_dim=2)  # building asks for no values
svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
verbs = {
    "bare": lambda: r.model(x),
    "guide": lambda: r.guide(x),
    "evaluate": lambda: evaluate(r.model, r.guide, x, seed=0),
    "filter": lambda: particle_filter(r.model, r.guide, x, num_particles=2),
    "generate": lambda: generate(r.model, 1, 2),
    "loss": lambda: ELBO()(r.model, r.guide, x),
    "svi": lambda: svi.step(x),
}
for taken in (False, True):
    for name, verb in verbs.items():
        try:
            found = verb()
            print(name, found.iwae_per_frame if name == "evaluate" else "ran")
        except ValueError as error:
            assert "update_module_params=True" in str(error), error
            print(name, "refused")
    pyro.module("model", r.model, update_module_params=True)
    pyro.module("guide", r.guide, update_module_params=True)
"""


def test_a_store_loaded_in_a_new_process_is_taken_before_it_is_used(tmp_path: Path) -> None:
    r, x = recipes.vrnn(2, 2, 4), torch.ones(2, 3, 2)
    svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
    svi.step(x)
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    trained = evaluate(r.model, r.guide, x, seed=0)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "store.pt")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    verbs = ["bare", "guide", "evaluate", "filter", "generate", "loss", "svi"]
    assert lines[:7] == [f"{verb} refused" for verb in verbs]
    expected = {"evaluate": str(trained.iwae_per_frame)}
    assert lines[7:] == [f"{verb} {expected.get(verb, 'ran')}" for verb in verbs]


def test_a_second_guide_for_the_same_model_is_refused_too() -> None:
    first = CASES[FILTERING]()
    args = data(first)
    train(first, *args)
    other = Recipe(first.model, type(first.guide)(first.model, (H,)))
    with pytest.raises(ValueError, match="another guide's tensor"):
        train(other, *args)


def test_one_pair_may_be_called_again_and_again() -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    for loss in (Trace_ELBO(), ELBO(), TraceMeanField_ELBO()):
        svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        svi.step(*args)
    names = {name.split("$$$")[0] for name in pyro.get_param_store().keys()}
    assert names == {"model", "guide"}
