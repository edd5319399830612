"""Step densities read off two traces equal the rollout's; what cannot be read is refused."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import ELBO, iwae, step_densities
from inference.bounds import analytic_kl
from inference.protocols import HasRollout
from pyro_avrnn.recipes import Recipe
from tests.unit.table import (
    CASES,
    FEW,
    X,
    Z,
    assert_all_close,
    assert_close,
    gradients,
    observations,
    prefix_mask,
)

LENGTHS = (4, 1, 3)
LATENT = [name for name in FEW if name.startswith("vrnn")]
TERMS = ("log_prior", "log_emission", "log_proposal", "log_weight")


def plain(program: Callable[..., Any]) -> Callable[..., Any]:
    """The same Pyro program as a function, so that no rollout is to be seen."""
    return lambda *args: program(*args)


def data(recipe: Recipe, ragged: bool) -> tuple[Tensor, Tensor | None]:
    x = observations(recipe, len(LENGTHS), max(LENGTHS))
    return x, prefix_mask(LENGTHS) if ragged else None


def both(recipe: Recipe, ragged: bool, particles: int) -> tuple[Any, Any]:
    """The traced route and the rollout, from the same random numbers."""
    args = data(recipe, ragged)
    model, guide = plain(recipe.model), plain(recipe.guide)
    assert isinstance(recipe.model, HasRollout) and not isinstance(model, HasRollout)
    torch.manual_seed(7)
    traced = step_densities(model, guide, *args, num_particles=particles)
    torch.manual_seed(7)
    rolled = step_densities(recipe.model, recipe.guide, *args, num_particles=particles)
    return traced, rolled


def compare(recipe: Recipe, traced: Any, rolled: Any) -> None:
    shape = rolled.log_weight.shape
    for name in TERMS:
        assert getattr(traced, name).shape == shape
        assert_close(getattr(traced, name), getattr(rolled, name), name)
    assert_close(traced.z, rolled.z, "z")
    observed = rolled.mask.unsqueeze(-1)
    assert_close(
        traced.x.where(observed, 0.0), rolled.x.expand_as(traced.x).where(observed, 0.0), "x"
    )
    assert torch.equal(traced.mask.expand(shape), rolled.mask.expand(shape))
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = gradients(recipe, (weights * traced.log_weight).sum())
    assert_all_close(found, gradients(recipe, (weights * rolled.log_weight).sum()))
    bound = gradients(recipe, iwae(traced.log_weight).sum())
    assert_all_close(bound, gradients(recipe, iwae(rolled.log_weight).sum()))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("case", FEW)
def test_the_traced_route_equals_the_rollout(case: str, ragged: bool, particles: int) -> None:
    recipe = CASES[case]()
    compare(recipe, *both(recipe, ragged, particles))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("case", LATENT)
def test_the_analytic_kl_of_both_routes_is_the_same(case: str, particles: int) -> None:
    recipe = CASES[case]()
    traced, rolled = both(recipe, True, particles)
    kl = analytic_kl(rolled)
    assert_close(analytic_kl(traced), kl, "kl")
    assert not kl[:, :, 1][1:].any() and (kl[:, :, 0] > 0).all()  # 0 where padded
    assert_all_close(gradients(recipe, analytic_kl(traced).sum()), gradients(recipe, kl.sum()))


@pytest.mark.parametrize("case", ["vrnn-filtering-conditional-normal-gru"])
def test_prior_emission_and_proposal_of_both_routes_are_the_same(case: str) -> None:
    traced, rolled = both(CASES[case](), False, 3)
    for name in ("prior", "emission", "proposal"):
        ours, theirs = getattr(traced, name), getattr(rolled, name)
        assert ours.batch_shape == theirs.batch_shape and ours.event_shape == theirs.event_shape
        assert_close(ours.mean, theirs.mean, name)
        assert_close(ours.stddev, theirs.stddev, name)


@pytest.mark.parametrize("analytic", [False, True])
def test_an_objective_gives_the_same_loss_by_both_routes(analytic: bool) -> None:
    recipe = CASES["vrnn-residual-conditional-normal-gru"]()
    args = data(recipe, True)
    found = []
    for model, guide in ((recipe.model, recipe.guide), (plain(recipe.model), plain(recipe.guide))):
        torch.manual_seed(7)
        loss = ELBO(num_particles=3, kl_weight=0.5, analytic_kl=analytic)(model, guide, *args)
        found.append((loss, gradients(recipe, loss)))
    assert_close(found[1][0], found[0][0], "loss")
    assert_all_close(found[1][1], found[0][1])


def test_the_comparison_rejects_a_guide_with_other_parameters() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe, True)
    torch.manual_seed(7)
    traced = step_densities(plain(recipe.model), plain(recipe.guide), x, mask)
    with torch.no_grad():
        for parameter in recipe.guide.parameters():
            parameter.mul_(1.0 + 1e-8)
    torch.manual_seed(7)
    rolled = step_densities(recipe.model, recipe.guide, x, mask)
    with pytest.raises(AssertionError, match="log_"):
        compare(recipe, traced, rolled)


def two_latents(x: Tensor) -> None:
    """Two latents a step, one of them global: all of step 1."""
    with pyro.plate("sequences", len(x), dim=-1):
        f = pyro.sample("f", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        for t in (1, 2):
            z = pyro.sample(f"z_{t}", dist.Normal(f, 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0).to_event(1), obs=x[:, t - 1])


def guide_of_two(x: Tensor, sites: tuple[str, ...] = ("f", "z_1", "z_2")) -> None:
    with pyro.plate("sequences", len(x), dim=-1):
        for name in sites:
            pyro.sample(name, dist.Normal(x.new_ones(1), 0.5).to_event(1))


def test_a_global_latent_belongs_to_the_first_step() -> None:
    d: Any = step_densities(two_latents, guide_of_two, torch.randn(3, 2, 1), num_particles=4)
    assert d.z.shape == (2, 4, 3, 2) and d.log_prior.shape == (2, 4, 3)
    one = dist.Normal(0.0, 1.0)
    f, z_1, z_2 = d.z[0, ..., 0], d.z[0, ..., 1], d.z[1, ..., 0]
    assert_close(d.log_prior[0], one.log_prob(f) + one.log_prob(z_1 - f), "step 1")
    assert_close(d.log_prior[1], one.log_prob(z_2 - f), "step 2")
    with pytest.raises(NotImplementedError, match="a proposal and a prior that are diagonal"):
        analytic_kl(d)


def test_a_latent_that_is_not_proposed_is_named() -> None:
    with pytest.raises(ValueError, match="the guide does not propose the model's latent 'z_2'"):
        step_densities(two_latents, lambda x: guide_of_two(x, ("f", "z_1")), torch.randn(3, 2, 1))


def test_a_latent_that_is_not_reparameterised_is_named_with_the_way_out() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z_1", dist.Bernoulli(x.new_tensor(0.5)))
            pyro.sample("x_1", dist.Normal(z, 1.0), obs=x[:, 0, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            pyro.sample("z_1", dist.Bernoulli(x.new_tensor(0.3)))

    with pytest.raises(NotImplementedError, match="'z_1' is not reparam.*Trace_ELBO takes such"):
        step_densities(model, guide, torch.randn(3, 1, 1))


def test_a_site_outside_the_plate_over_sequences_is_named() -> None:
    def model(x: Tensor) -> None:
        f = pyro.sample("f", dist.Normal(x.new_tensor(0.0), 1.0))  # one for all sequences
        with pyro.plate("sequences", len(x), dim=-1):
            pyro.sample("x_1", dist.Normal(f, 1.0), obs=x[:, 0, 0])

    def guide(x: Tensor) -> None:
        pyro.sample("f", dist.Normal(x.new_tensor(0.0), 0.5))

    with pytest.raises(NotImplementedError, match="site 'f' has .* need one plate over the 3"):
        step_densities(model, guide, torch.randn(3, 1, 1), num_particles=2)


def test_a_family_that_cannot_be_stacked_is_left_out_and_its_kl_refused() -> None:
    recipe = CASES["vrnn-filtering-conditional-bernoulli-gru"]()
    assert both(recipe, False, 1)[0].emission is None
    pyro.clear_param_store()

    def laplace(x: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(1, x.shape[1] + 1):
                pyro.sample(f"z_{t}", dist.Laplace(x.new_zeros(Z), 1.0).to_event(1))

    x = torch.randn(2, 3, X)
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    d = step_densities(plain(recipe.model), laplace, x)
    assert d.proposal is None and d.log_weight.isfinite().all()
    with pytest.raises(NotImplementedError, match="use the sampled KL, analytic_kl=False"):
        analytic_kl(d)
