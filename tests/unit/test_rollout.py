"""The loop is the meaning of a model; the rollout says the same, values and gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from inference.densities import StepDensities
from pyro_avrnn.models import VRNN
from pyro_avrnn.recipes import Recipe
from tests.unit.table import (
    CASES,
    PROPOSALS,
    H,
    X,
    assert_all_close,
    build,
    gradients,
    observations,
    prefix_mask,
)

LENGTHS = (5, 2, 1, 4)
TERMS = ("log_prior", "log_emission", "log_proposal")


def data(recipe: Recipe, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Observations the model can score; ``ragged`` adds a mask and fills padding with NaN."""
    x = observations(recipe, len(LENGTHS), max(LENGTHS))
    if not ragged:
        return x, None
    mask = prefix_mask(LENGTHS)
    return torch.where(mask[..., None], x, torch.nan), mask


def traces(recipe: Recipe, x: Tensor, mask: Tensor | None, particles: int) -> tuple[Trace, Trace]:
    """Guide and replayed model as plain Pyro runs them."""

    def within(program: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> None:
            plate = pyro.plate("particles", particles, dim=-2) if particles > 1 else nullcontext()
            with plate:
                program(*args)

        return inner

    guide = poutine.trace(within(recipe.guide)).get_trace(x, mask)
    model = poutine.trace(poutine.replay(within(recipe.model), trace=guide)).get_trace(x, mask)
    guide.compute_log_prob()
    model.compute_log_prob()
    return model, guide


def loop(recipe: Recipe, x: Tensor, mask: Tensor | None, particles: int) -> dict[str, Tensor]:
    """Draws (T, K, B, Z) and log-densities (T, K, B) of every site of the loop."""
    model, guide = traces(recipe, x, mask, particles)
    size, length = x.shape[:2]

    def stack(trace: Trace, site: str, what: str, *event: int) -> Tensor:
        shape = (particles, size, *event)
        values = [trace.nodes[f"{site}_{t}"][what] for t in range(1, length + 1)]
        return torch.stack([v.expand(shape) for v in values])

    terms = {"log_emission": stack(model, "x", "log_prob")}
    if recipe.model.z_dim == 0:
        nothing = torch.zeros(length, particles, size)
        return terms | {
            "log_prior": nothing,
            "log_proposal": nothing,
            "z": torch.zeros(length, particles, size, 0),
        }
    return terms | {
        "log_prior": stack(model, "z", "log_prob"),
        "log_proposal": stack(guide, "z", "log_prob"),
        "z": stack(guide, "z", "value", recipe.model.z_dim),
    }


def mixed(terms: dict[str, Tensor]) -> Tensor:
    """One random linear function of all log-densities.

    A plain sum would let an error in one density hide behind another; random weights do not.
    """
    generator = torch.Generator().manual_seed(1)
    shape = terms["log_emission"].shape
    total = torch.zeros(())
    for name in TERMS:
        total = total + (torch.randn(shape, generator=generator) * terms[name]).sum()
    return total


def assert_agree(recipe: Recipe, looped: dict[str, Tensor], rolled: StepDensities) -> None:
    stacked = {name: getattr(rolled, name) for name in (*TERMS, "z")}
    assert_all_close(stacked, looped)
    assert_all_close(gradients(recipe, mixed(stacked)), gradients(recipe, mixed(looped)))


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_loop_and_rollout_agree_in_values_and_gradients(
    case: str, ragged: bool, particles: int
) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe, ragged)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, particles)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, mask, particles)
    assert_agree(recipe, looped, rolled)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_rollout_scores_given_draws_as_the_loop_does(proposal: str, particles: int) -> None:
    recipe = CASES[f"vrnn-{proposal}-conditional-normal-gru"]()
    x, mask = data(recipe, ragged=True)
    looped = loop(recipe, x, mask, particles)
    assert_agree(recipe, looped, recipe.model.rollout(recipe.guide, x, mask, z=looped["z"]))


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("case", ["vrnn-filtering-conditional-normal-gru", "rnn-normal-gru"])
def test_rollout_consumes_the_random_numbers_of_the_guides_loop(case: str, particles: int) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe, ragged=True)
    torch.manual_seed(7)
    loop(recipe, x, mask, particles)
    after_loop = torch.rand(())
    torch.manual_seed(7)
    recipe.model.rollout(recipe.guide, x, mask, particles)
    assert torch.rand(()) == after_loop


@pytest.mark.parametrize("case", ["vrnn-residual-conditional-bernoulli-lstm", "rnn-normal-lstm"])
def test_site_names_are_counted_from_one(case: str) -> None:
    recipe = CASES[case]()
    x, _ = data(recipe, ragged=False)
    model, guide = traces(recipe, x, None, 1)
    steps = range(1, x.shape[1] + 1)
    latents = [f"z_{t}" for t in steps] if recipe.model.z_dim else []
    assert sorted(set(guide.stochastic_nodes) - {"sequences"}) == sorted(latents)
    assert sorted(model.observation_nodes) == sorted(f"x_{t}" for t in steps)
    assert sorted(set(model.stochastic_nodes) - {"sequences"}) == sorted(latents)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("case", ["vrnn-filtering-standard-normal-lstm", "rnn-bernoulli-gru"])
def test_shapes_of_a_rollout(case: str, particles: int) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe, ragged=True)
    d = recipe.model.rollout(recipe.guide, x, mask, particles)
    size, length = x.shape[:2]
    stacked = (length, particles, size)
    assert d.z.shape == (*stacked, recipe.model.z_dim)
    assert d.h.shape == (*stacked, H)
    assert d.x.shape == (length, 1, size, X) and d.mask.shape == (length, 1, size)
    assert all(getattr(d, name).shape == stacked for name in (*TERMS, "log_weight"))
    assert all(tensor.shape[:3] == stacked for tensor in d.states)
    assert d.emission.batch_shape == stacked and d.emission.event_shape == (X,)
    assert d.prior.batch_shape == d.proposal.batch_shape == stacked


@pytest.mark.parametrize("case", ["vrnn-residual-conditional-normal-lstm", "rnn-normal-gru"])
def test_particles_given_apart_score_as_together(case: str) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe, ragged=True)
    together = recipe.model.rollout(recipe.guide, x, mask, num_particles=3)
    apart = [
        recipe.model.rollout(recipe.guide, x, mask, z=z[:, None]) for z in together.z.unbind(1)
    ]
    assert_all_close(
        {name: torch.cat([getattr(d, name) for d in apart], dim=1) for name in TERMS},
        {name: getattr(together, name) for name in TERMS},
    )


def test_the_log_weight_is_model_minus_guide() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe, ragged=True)
    torch.manual_seed(7)
    model, guide = traces(recipe, x, mask, 4)
    torch.manual_seed(7)
    weight = recipe.model.rollout(recipe.guide, x, mask, num_particles=4).log_weight
    expected = model.log_prob_sum() - guide.log_prob_sum()
    torch.testing.assert_close(weight.sum(), expected, rtol=1e-10, atol=0.0)


def test_a_bare_rollout_leaves_the_parameter_store_alone() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe, ragged=True)
    recipe.model.rollout(recipe.guide, x, mask)
    assert not list(pyro.get_param_store().keys())


class ScaledWhenStacked(VRNN):
    """Planted fault: the stacked emission is a millionth wider."""

    def emission(self, z_t: Tensor, state: Any) -> dist.Distribution:
        loc, scale = self.decoder.parameters_of(self.encode_z(z_t), self.hidden(state))
        return dist.Normal(loc, scale * (1.0 + 1e-6 * (z_t.ndim == 4))).to_event(1)


class StoppedWhenStacked(VRNN):
    """Planted fault: right values, but no gradient from the prior where time is stacked."""

    def transition(self, state: Any) -> dist.Distribution:
        stop = state.memory.ndim == 4
        return super().transition(state._replace(memory=state.memory.detach()) if stop else state)


class LateWhenStacked(VRNN):
    """Planted fault: the stacked transition reads the state one step late."""

    def transition(self, state: Any) -> dist.Distribution:
        if state.memory.ndim == 4:
            state = state._replace(memory=state.memory.roll(1, dims=0))
        return super().transition(state)


def _faulty(fault: type) -> Recipe:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    recipe.model.__class__ = fault  # same parameters, other functions
    return recipe


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        (ScaledWhenStacked, "log_emission"),
        (StoppedWhenStacked, "model.cell"),
        (LateWhenStacked, "log_prior"),
    ],
)
def test_the_comparison_rejects_a_planted_fault(fault: type, seen_in: str) -> None:
    recipe = _faulty(fault)
    x, mask = data(recipe, ragged=True)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, 4)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, mask, 4)
    with pytest.raises(AssertionError, match=seen_in):
        assert_agree(recipe, looped, rolled)


def test_the_comparison_rejects_a_mask_shifted_by_one() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe, ragged=True)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, 1)
    shifted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, shifted)
    with pytest.raises(AssertionError, match="log_emission"):
        assert_agree(recipe, looped, rolled)


@pytest.mark.parametrize("model", ["vrnn", "srnn", "dsae"])
def test_draws_alone_are_those_of_a_scored_rollout(model: str) -> None:
    recipe = build(model)
    x, mask = observations(recipe, 3, 20), prefix_mask((20, 4, 9))
    rolled = []
    for scored in (True, False):
        torch.manual_seed(0)
        options = {"num_particles": 2, "scored": scored, "recompute": 7}
        rolled.append(recipe.model.rollout(recipe.guide, x, mask, **options))
    whole, draws = rolled
    assert draws.log_prior is draws.log_emission is draws.log_proposal is draws.emission is None
    torch.testing.assert_close((draws.z, draws.h), (whole.z, whole.h))
    for mine, other in ((draws.prior, whole.prior), (draws.proposal, whole.proposal)):
        torch.testing.assert_close(mine.base_dist.loc, other.base_dist.loc)
