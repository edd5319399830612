"""The loop is the meaning of a model; the rollout says the same, values and gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_avrnn import recipes
from pyro_avrnn.guides import FilteringGuide, ResidualGuide
from pyro_avrnn.models import VRNN
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.rollout import StepDensities
from pyro_avrnn.sequence import SequenceModel

X, Z, H = 3, 2, 5
LENGTHS = (5, 2, 1, 4)
PROPOSALS: dict[str, dict[str, Any]] = {
    "filtering": {"guide": "filtering"},
    "residual": {"guide": "residual", "prior_gradient": True},
    "residual_stopped": {"guide": "residual", "prior_gradient": False},
}
# one table of constructors: a new model or guide earns its checks by a line here
CASES: dict[str, Callable[[], Recipe]] = {
    f"rnn-{emission}-{cell}": lambda e=emission, c=cell: recipes.rnn(X, H, e, cell=c)
    for emission, cell in product(("normal", "bernoulli"), ("gru", "lstm"))
} | {
    f"vrnn-{name}-{prior}-{emission}-{cell}": lambda n=name, p=prior, e=emission, c=cell: (
        recipes.vrnn(X, Z, H, e, prior=p, cell=c, **PROPOSALS[n])
    )
    for name, prior, emission, cell in product(
        PROPOSALS, ("conditional", "standard"), ("normal", "bernoulli"), ("gru", "lstm")
    )
}
TERMS = ("log_prior", "log_emission", "log_proposal")


def data(model: SequenceModel, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Observations the model can score; ``ragged`` adds a mask and fills padding with NaN."""
    x = torch.randn(len(LENGTHS), max(LENGTHS), X)
    if model.expects.startswith("0 and 1"):
        x = (x > 0).to(x.dtype)
    if not ragged:
        return x, None
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
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


def gradients(recipe: Recipe, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's gradient of one random linear function of all log-densities, copied.

    A plain sum would let an error in one density hide behind another; random weights do not.
    """
    parameters = {
        f"{part}.{name}": p
        for part, module in (("model", recipe.model), ("guide", recipe.guide))
        for name, p in module.named_parameters()
    }
    generator = torch.Generator().manual_seed(1)
    shape = terms["log_emission"].shape
    total = torch.zeros(())
    for name in TERMS:
        total = total + (torch.randn(shape, generator=generator) * terms[name]).sum()
    found = torch.autograd.grad(
        total, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g.clone()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Two paths to one number: rtol 1e-10, atol 1e-12 of the tensor's largest entry."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-10,
            atol=1e-12 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_agree(recipe: Recipe, looped: dict[str, Tensor], rolled: StepDensities) -> None:
    stacked = {name: getattr(rolled, name) for name in (*TERMS, "z")}
    assert_same(stacked, looped)
    assert_same(gradients(recipe, stacked), gradients(recipe, looped))


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("case", CASES)
def test_loop_and_rollout_agree_in_values_and_gradients(
    case: str, ragged: bool, particles: int
) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe.model, ragged)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, particles)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, mask, particles)
    assert_agree(recipe, looped, rolled)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_rollout_scores_given_draws_as_the_loop_does(proposal: str, particles: int) -> None:
    recipe = CASES[f"vrnn-{proposal}-conditional-normal-gru"]()
    x, mask = data(recipe.model, ragged=True)
    looped = loop(recipe, x, mask, particles)
    assert_agree(recipe, looped, recipe.model.rollout(recipe.guide, x, mask, z=looped["z"]))


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("case", ["vrnn-filtering-conditional-normal-gru", "rnn-normal-gru"])
def test_rollout_consumes_the_random_numbers_of_the_guides_loop(case: str, particles: int) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe.model, ragged=True)
    torch.manual_seed(7)
    loop(recipe, x, mask, particles)
    after_loop = torch.rand(())
    torch.manual_seed(7)
    recipe.model.rollout(recipe.guide, x, mask, particles)
    assert torch.rand(()) == after_loop


@pytest.mark.parametrize("case", ["vrnn-residual-conditional-bernoulli-lstm", "rnn-normal-lstm"])
def test_site_names_are_counted_from_one(case: str) -> None:
    recipe = CASES[case]()
    x, _ = data(recipe.model, ragged=False)
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
    x, mask = data(recipe.model, ragged=True)
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
    x, mask = data(recipe.model, ragged=True)
    together = recipe.model.rollout(recipe.guide, x, mask, num_particles=3)
    apart = [
        recipe.model.rollout(recipe.guide, x, mask, z=z[:, None]) for z in together.z.unbind(1)
    ]
    assert_same(
        {name: torch.cat([getattr(d, name) for d in apart], dim=1) for name in TERMS},
        {name: getattr(together, name) for name in TERMS},
    )


def test_the_log_weight_is_model_minus_guide() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe.model, ragged=True)
    torch.manual_seed(7)
    model, guide = traces(recipe, x, mask, 4)
    torch.manual_seed(7)
    weight = recipe.model.rollout(recipe.guide, x, mask, num_particles=4).log_weight
    expected = model.log_prob_sum() - guide.log_prob_sum()
    torch.testing.assert_close(weight.sum(), expected, rtol=1e-10, atol=0.0)


def test_a_bare_rollout_leaves_the_parameter_store_alone() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe.model, ragged=True)
    recipe.model.rollout(recipe.guide, x, mask)
    assert not list(pyro.get_param_store().keys())


class ScaledWhenStacked(FilteringGuide):
    """Planted fault: the proposal's scale is off by 1e-6 where time is a batch dimension."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc, scale = self.network.parameters_of(c_t, self.hidden(state))
        return dist.Normal(loc, scale * (1.0 + 1e-6 * (c_t.ndim == 4))).to_event(1)


class StoppedWhenStacked(ResidualGuide):
    """Planted fault: right values, but no gradient through the prior where time is stacked."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        self.prior_gradient = c_t.ndim < 4
        return super().proposal(state, c_t)


class LateWhenStacked(VRNN):
    """Planted fault: the stacked transition reads the state one step late."""

    def transition(self, state: Any) -> dist.Distribution:
        if state.memory.ndim == 4:
            state = state._replace(memory=state.memory.roll(1, dims=0))
        return super().transition(state)


def _faulty(fault: type) -> Recipe:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    if fault is LateWhenStacked:
        recipe.model.__class__ = LateWhenStacked  # same parameters, another transition
        return recipe
    return Recipe(recipe.model, fault(recipe.model, H, H, (H,)))


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        (ScaledWhenStacked, "log_proposal"),
        (StoppedWhenStacked, "model.prior"),
        (LateWhenStacked, "log_prior"),
    ],
)
def test_the_comparison_rejects_a_planted_fault(fault: type, seen_in: str) -> None:
    recipe = _faulty(fault)
    x, mask = data(recipe.model, ragged=True)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, 4)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, mask, 4)
    with pytest.raises(AssertionError, match=seen_in):
        assert_agree(recipe, looped, rolled)


def test_the_comparison_rejects_a_mask_shifted_by_one() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, mask = data(recipe.model, ragged=True)
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, 1)
    shifted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    torch.manual_seed(7)
    rolled = recipe.model.rollout(recipe.guide, x, shifted)
    with pytest.raises(AssertionError, match="log_emission"):
        assert_agree(recipe, looped, rolled)
