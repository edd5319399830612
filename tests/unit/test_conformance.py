"""Every model with every prior, guide, emission and cell keeps the contract; bounds on a cover.

The cover is a set of calls in which every allowed pair of parts meets; see ``table.pairwise``.
"""

import copy
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from inference import ELBO, FIVO, IWAE, particle_filter
from inference.densities import StepDensities
from pyro_avrnn import recipes
from pyro_avrnn.models.dsae import GlobalGuide
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.testing import check
from tests.unit.table import (
    ALL,
    REFUSED,
    assert_all_close,
    assert_close,
    build,
    gradients,
    observations,
    pairwise,
    prefix_mask,
    value_and_gradients,
)

LENGTHS = (4, 2)
COVER = {"-".join(call.values()): call for call in pairwise()}


def data(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A ragged batch that the model can score."""
    return observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


def compare(recipe: Recipe, ours: Any, theirs: Any) -> None:
    """Two losses with the same value and gradients, from the same draws."""
    value, found = value_and_gradients(recipe, ours, *data(recipe))
    expected_value, expected = value_and_gradients(recipe, theirs, *data(recipe))
    assert_close(value, expected_value, "value")
    assert_all_close(found, expected)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if i % 2 else ()) for i, c in enumerate(ALL)]
)
def test_model_and_guide_keep_the_contract(case: str) -> None:
    recipe = ALL[case]()
    check(recipe.model, recipe.guide, observations(recipe, 2, 4))


def test_the_cover_shows_every_allowed_pair_and_the_refused_ones_are_none() -> None:
    seen: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for call in COVER.values():
        for one, other in (("model", "prior"), ("model", "guide"), ("prior", "guide")):
            seen.setdefault((one, other), set()).add((call[one], call[other]))
        seen.setdefault(("model", "emission"), set()).add((call["model"], call["emission"]))
    assert {pair: len(found) for pair, found in seen.items()} == {
        ("model", "prior"): 6 * 5,
        ("model", "guide"): 6 * 9 + 2,  # two that a DSAE alone has
        ("prior", "guide"): 5 * (9 + 2) - 2,  # no residual guide of a flow
        ("model", "emission"): 6 * 5,
    }


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_may_not_meet_say_so(case: str) -> None:
    make, kind, sentence = REFUSED[case]
    with pytest.raises(kind, match=sentence):
        make()


@pytest.mark.parametrize("case", COVER)
def test_losses_that_are_the_same_in_special_cases(case: str) -> None:
    recipe = build(**COVER[case])
    compare(recipe, IWAE(num_particles=1), ELBO())
    compare(recipe, FIVO(num_particles=3, criterion="never"), IWAE(num_particles=3))
    pyros = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    compare(recipe, ELBO(num_particles=3), pyros)


@pytest.mark.parametrize("case", COVER)
def test_a_filter_that_never_resamples_is_iwae(case: str) -> None:
    recipe = build(**COVER[case])
    with torch.no_grad():
        torch.manual_seed(7)
        loss = IWAE(num_particles=3)(recipe.model, recipe.guide, *data(recipe))
        torch.manual_seed(7)
        options: dict[str, Any] = {"num_particles": 3, "criterion": "never"}
        filtered = particle_filter(recipe.model, recipe.guide, *data(recipe), **options)
    assert_close(filtered.log_evidence.sum(), -loss)


def test_the_comparisons_reject_another_number_of_particles() -> None:
    recipe = build(**next(iter(COVER.values())))
    with pytest.raises(AssertionError, match="value"):
        compare(recipe, IWAE(num_particles=2), ELBO(num_particles=2))
    with pytest.raises(AssertionError, match="value"):
        always = FIVO(num_particles=3, criterion="always", resampler="multinomial")
        compare(recipe, always, IWAE(num_particles=3))


@pytest.mark.parametrize("case", COVER)
def test_what_is_saved_is_loaded(case: str, tmp_path: Path) -> None:
    recipe = build(**COVER[case])
    recipes.save(recipe, tmp_path / "r.pt")
    loaded = recipes.load(tmp_path / "r.pt")
    assert loaded.config == recipe.config
    found = []
    for one in (recipe, loaded):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(one.model.rollout(one.guide, *data(recipe), num_particles=3))
    assert all(map(torch.equal, *((d.z, d.h, d.log_weight) for d in found)))


# the closed-form KL of a latent that all steps share


CLOSED = [
    (prior, guide)
    for prior in ("conditional", "standard", "gated")
    for guide in ("full", "factorised", "filtering", "smoothing_residual")
]


@pytest.mark.parametrize(("prior", "guide"), CLOSED)
def test_the_closed_form_kl_with_a_shared_latent_is_pyros(prior: str, guide: str) -> None:
    recipe = build("dsae", prior=prior, guide=guide)
    compare(recipe, ELBO(analytic_kl=True), TraceMeanField_ELBO())


def test_the_comparison_rejects_a_kl_that_forgets_the_shared_latent() -> None:
    def forgetful(model: Any, guide: Any, *args: Any) -> Tensor:
        densities = model.rollout(guide, *args)._replace(prior_f=None)
        return ELBO(analytic_kl=True).loss(densities)

    with pytest.raises(AssertionError, match="value"):
        compare(build("dsae"), forgetful, TraceMeanField_ELBO())


# doubly reparameterised gradients

DOUBLY = {
    f"{model}-{guide}": {"model": model, "guide": guide}
    for model in ("vrnn", "srnn", "dsae")
    for guide in ("smoothing", "flow", "smoothing_flow", "smoothing_residual")
} | {"dsae-full": {"model": "dsae", "guide": "full"}}


def dreg_by_hand(recipe: Recipe, particles: int) -> dict[str, Tensor]:
    """Tucker et al. (2019), eq. 8: paths weighted by w^2, the density of q held constant."""
    x, mask = data(recipe)
    torch.manual_seed(7)
    d: StepDensities = recipe.model.rollout(recipe.guide, x, mask, particles)
    frozen = copy.deepcopy(recipe.guide).requires_grad_(False)
    log_q = frozen.proposal(d.states, d.c.detach()).log_prob(d.z)
    surrogate = torch.zeros(())
    for b, length in enumerate(LENGTHS):
        steps = (d.log_emission + d.log_prior - log_q)[:length, :, b]
        log_w = steps.sum(dim=0)
        if d.f is not None:
            assert isinstance(frozen, GlobalGuide)
            log_w = log_w - frozen.proposal_f(x, mask).log_prob(d.f)[:, b]
        w = log_w.detach().softmax(dim=0)
        surrogate = surrogate - (w**2 * log_w).sum()
    return gradients(recipe, surrogate)


@pytest.mark.parametrize("case", DOUBLY)
def test_doubly_reparameterised_gradients_of_smoothing_flows_and_shared_latents(case: str) -> None:
    recipe = build(**DOUBLY[case])
    args = data(recipe)
    value, plain = value_and_gradients(recipe, IWAE(num_particles=3), *args)
    loss = IWAE(num_particles=3, doubly_reparameterised=True)
    same, doubly = value_and_gradients(recipe, loss, *args)
    assert torch.equal(value, same)
    by_hand = dreg_by_hand(recipe, 3)
    for name, gradient in doubly.items():
        if name.startswith("model."):
            assert torch.equal(gradient, plain[name]), name
        else:
            assert_close(gradient, by_hand[name], name)
    moved = [name for name in doubly if not torch.allclose(doubly[name], plain[name], rtol=1e-3)]
    assert moved
    assert all(name.startswith("guide.") for name in moved)
    if recipe.model.f_dim:  # the reader and the head of f are among them
        assert any(".head." in name for name in moved)
    pyro.clear_param_store()
