"""A padded batch equals the same sequences unpadded: densities, gradients, critic averages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avrnn import recipes
from pyro_avrnn.critics import FeedForwardCritic, LSTMCritic
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.recipes import Recipe
from tests.unit.table import (
    CASES,
    FEW,
    H,
    X,
    Z,
    assert_all_close,
    assert_close,
    gradients,
    observations,
    prefix_mask,
)

K = 4
LENGTHS = (2, 5, 1, 4)
CRITICS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {  # constructor, sees a path
    "lstm": (lambda c: LSTMCritic(Z, c, 6), False),
    "lstm-path": (lambda c: LSTMCritic(Z, c, 6), True),
    "feedforward": (lambda c: FeedForwardCritic(Z, c, 6), False),
    "feedforward-window": (lambda c: FeedForwardCritic(Z, c, 6, window=2), True),
    "feedforward-spectral": (lambda c: FeedForwardCritic(Z, c, 6, lipschitz="z"), False),
}


def padded(recipe: Recipe, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """A ragged batch, the same observations whatever the padding."""
    x, mask = observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)
    return torch.where(mask[..., None], x, padding), mask


def alone(x: Tensor) -> list[tuple[int, int, Tensor]]:
    """Index, length and unpadded series (1, T, X) of every sequence."""
    return [(b, n, x[b : b + 1, :n]) for b, n in enumerate(LENGTHS)]


def draws(recipe: Recipe, x: Tensor, noise: Tensor) -> Tensor:
    """Reparameterised draws (T, K, B, Z) of a normal guide from given noise of that shape."""
    model, guide = recipe.model, recipe.guide
    c = guide.encode(x, x.new_ones(x.shape[:2], dtype=torch.bool))
    state = model.init(noise.shape[1:3])
    z = []
    for t in range(x.shape[1]):
        q_t = guide.proposal(state, c[:, t])
        z.append(q_t.mean + q_t.stddev * noise[t])
        state = model.advance(state, z[-1], x[:, t])
    return torch.stack(z)


def total(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}


def compare_padded_and_unpadded(recipe: Recipe, particles: int) -> None:
    """Weights of every sequence, and gradients of the summed ELBO through the draws too."""
    x, mask = padded(recipe)
    noise = torch.randn(max(LENGTHS), particles, len(LENGTHS), recipe.model.z_dim)
    weight = recipe.model.rollout(recipe.guide, x, mask, z=draws(recipe, x, noise)).log_weight
    together = gradients(recipe, -weight.sum(dim=0).mean(dim=0).sum())
    found = []
    for b, n, series in alone(x):
        z = draws(recipe, series, noise[:n, :, b : b + 1])
        own = recipe.model.rollout(recipe.guide, series, z=z).log_weight
        assert_close(weight[:n, :, b : b + 1], own, f"log_weight of sequence {b}")
        assert not weight[n:, :, b].any()
        found.append(gradients(recipe, -own.sum(dim=0).mean(dim=0).sum()))
    assert_all_close(together, total(found))


@pytest.mark.parametrize("particles", [1, K])
@pytest.mark.parametrize("case", FEW)
def test_a_padded_batch_equals_its_sequences_unpadded(case: str, particles: int) -> None:
    compare_padded_and_unpadded(CASES[case](), particles)


class SeesPadding(FilteringGuide):
    """Planted fault: features averaged over all T frames, padding among them."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.features(x) + self.features(x).mean(dim=1, keepdim=True)


def test_the_comparison_rejects_a_guide_that_sees_padding() -> None:
    model = recipes.vrnn(X, Z, H).model
    faulty = Recipe(model, SeesPadding(model, (H,)))
    with pytest.raises(AssertionError, match="log_weight"):
        compare_padded_and_unpadded(faulty, K)


def scored_by_rollout(recipe: Recipe, x: Tensor, mask: Tensor) -> Tensor:
    return recipe.model.rollout(recipe.guide, x, mask, K).log_weight


def scored_by_loop(recipe: Recipe, x: Tensor, mask: Tensor) -> Tensor:
    guide = poutine.trace(recipe.guide).get_trace(x, mask)
    model = poutine.trace(poutine.replay(recipe.model, trace=guide)).get_trace(x, mask)
    return model.log_prob_sum() - guide.log_prob_sum()


@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -torch.inf, 1e30, 0.5])
@pytest.mark.parametrize("path", [scored_by_loop, scored_by_rollout])
@pytest.mark.parametrize("case", FEW)
def test_values_of_padding_change_nothing(
    case: str, path: Callable[..., Tensor], padding: float
) -> None:
    recipe = CASES[case]()
    found = []
    for value in (0.0, padding):
        torch.manual_seed(7)
        weight = path(recipe, *padded(recipe, value))
        found.append((weight.detach().clone(), gradients(recipe, weight.sum())))
    assert torch.equal(found[1][0], found[0][0]) and found[0][0].isfinite().all()
    for name, gradient in found[0][1].items():
        assert gradient.isfinite().all() and torch.equal(found[1][1][name], gradient), name


@pytest.mark.parametrize("case", FEW)
def test_the_model_returns_padding_overwritten(case: str) -> None:
    recipe = CASES[case]()
    x, mask = padded(recipe, torch.nan)
    assert torch.equal(recipe.model(x, mask), torch.where(mask[..., None], x, 0.0))


@pytest.mark.parametrize("path", [scored_by_loop, scored_by_rollout])
@pytest.mark.parametrize("case", FEW)
def test_a_mask_that_is_all_true_changes_nothing(case: str, path: Callable[..., Tensor]) -> None:
    recipe = CASES[case]()
    x, mask = padded(recipe)
    torch.manual_seed(7)
    without = path(recipe, x, None)
    torch.manual_seed(7)
    assert torch.equal(path(recipe, x, torch.ones_like(mask)), without)


@pytest.mark.parametrize("padding", [0.0, torch.nan])
@pytest.mark.parametrize("case", FEW)
def test_a_fully_masked_sequence_weighs_nothing(case: str, padding: float) -> None:
    recipe = CASES[case]()
    x, mask = padded(recipe, padding)
    mask[0] = False
    noise = torch.randn(max(LENGTHS), K, len(LENGTHS), recipe.model.z_dim)
    clean, _ = padded(recipe)
    z = draws(recipe, clean, noise).detach()
    weight = recipe.model.rollout(recipe.guide, x, mask, z=z).log_weight
    others = recipe.model.rollout(recipe.guide, x[1:], mask[1:], z=z[:, :, 1:]).log_weight
    assert torch.equal(weight[:, :, 0], torch.zeros(max(LENGTHS), K))
    assert_all_close(gradients(recipe, weight.sum()), gradients(recipe, others.sum()))


@pytest.mark.parametrize("path", [scored_by_loop, scored_by_rollout])
@pytest.mark.parametrize("case", FEW)
def test_a_batch_of_padding_alone_has_weight_zero(case: str, path: Callable[..., Tensor]) -> None:
    recipe = CASES[case]()
    x, mask = padded(recipe, torch.nan)
    weight = path(recipe, x, torch.zeros_like(mask))
    assert not weight.any()
    assert not any(g.any() for g in gradients(recipe, weight.sum()).values())


def codes(recipe: Recipe, sees_context: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Codes, context, path and mask as views of a padded batch show them, (T, K, B, ...)."""
    x, mask = padded(recipe, torch.nan)
    with torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, mask, K)
    z = d.prior.sample()
    return z, d.h if sees_context else None, d.z, d.mask


def score(critic: nn.Module, z: Tensor, context: Tensor | None, path: Tensor | None) -> Tensor:
    with torch.no_grad():
        return critic.eval()(z, context, path)


def compare_scores(critic: nn.Module, sees_path: bool, sees_context: bool) -> None:
    """Every observed step's score, and the average over frames."""
    z, context, path, mask = codes(recipes.vrnn(X, Z, H), sees_context)
    together = score(critic, z, context, path if sees_path else None)
    found = []
    for b, n in enumerate(LENGTHS):
        own: list[Any] = [
            None if part is None else part[:n, :, b : b + 1]
            for part in (z, context, path if sees_path else None)
        ]
        found.append(score(critic, *own))
        assert_close(together[:n, :, b : b + 1], found[-1], f"score of sequence {b}")
    observed = mask.expand_as(together)
    per_frame = torch.cat([scores.flatten() for scores in found]).mean()
    assert_close(together[observed].mean(), per_frame)
    # the average is over frames: padding counted in would change it
    assert abs(together.mean() - per_frame) > 1e-6


@pytest.mark.parametrize("sees_context", [False, True], ids=["codes", "context"])
@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_scores_a_padded_batch_as_its_sequences(name: str, sees_context: bool) -> None:
    build, sees_path = CRITICS[name]
    compare_scores(build(H if sees_context else 0), sees_path, sees_context)


class SeesFuture(nn.Module):
    """Planted fault: a critic whose score of a step depends on the steps after it."""

    def forward(self, z: Tensor, context: Tensor | None, path: Tensor) -> Tensor:
        return z.sum(dim=-1) + path.sum(dim=(0, -1))


def test_the_comparison_rejects_a_critic_that_sees_the_future() -> None:
    with pytest.raises(AssertionError, match="score of sequence"):
        compare_scores(SeesFuture(), sees_path=True, sees_context=False)


@pytest.mark.parametrize("name", ["lstm-path", "feedforward-window"])
def test_a_critics_score_depends_on_the_path_before_t_and_on_no_later_code(name: str) -> None:
    critic = CRITICS[name][0](0)
    z, path = torch.randn(2, 5, K, 3, Z).unbind(0)
    path = path.requires_grad_(True)
    scores = critic.eval()(z, None, path)
    (reached,) = torch.autograd.grad(scores[3].sum(), path)
    assert reached[2].any() and not reached[3:].any()


def test_a_latent_of_all_steps_weighs_nothing_without_steps() -> None:
    recipe = recipes.dsae(X, Z, H, 2)
    x, mask = padded(recipe)
    mask = mask.index_fill(0, torch.tensor([1]), False)
    guide = poutine.trace(recipe.guide).get_trace(x, mask)
    model = poutine.trace(poutine.replay(recipe.model, trace=guide)).get_trace(x, mask)
    for trace in (guide, model):
        trace.compute_log_prob()
        assert (trace.nodes["f"]["log_prob"] != 0.0).tolist() == [True, False, True, True]
