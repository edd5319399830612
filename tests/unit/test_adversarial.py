"""What a critic sees, what its penalty reaches, and what its update leaves behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference import Adversarial, Alternating, seeded
from inference.constraints import Codes, Constraint, gradient_penalty
from inference.densities import StepDensities
from inference.divergences import Divergence, wasserstein
from inference.roles import VIEWS, joint
from pyro_avrnn import recipes
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.networks import RecurrentEncoder
from tests.unit.table import prefix_mask

B, T, X, Z, H, K = 4, 5, 2, 3, 4, 2
LENGTHS = (5, 2, 1, 3)
FREE = Constraint("free", lambda critic: None, lambda *_: 0.0, lambda critic: None)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, X), prefix_mask(LENGTHS)


def recipe(**options: Any) -> recipes.Recipe:
    with seeded(2):
        return recipes.avrnn(X, Z, H, guide="filtering", critic_dim=6, **options)


def densities(r: recipes.Recipe, **options: Any) -> StepDensities:
    return r.model.rollout(r.guide, *batch(), num_particles=K, **options)


class Recorder(nn.Module):
    """A critic whose score is a sum, and which remembers what it was shown."""

    def __init__(self, view: Any = "conditional") -> None:
        super().__init__()
        self.view, self.weight = view, nn.Parameter(torch.tensor(0.5))
        self.shown: list[Codes] = []
        self.modes: list[bool] = []

    def forward(
        self, z: Tensor, context: Tensor | None = None, path: Tensor | None = None
    ) -> Tensor:
        self.shown.append(Codes(z, context, path))
        self.modes.append(self.training)
        extra = sum(part.sum(-1) for part in (context, path) if part is not None)
        return self.weight * z.sum(-1).square() + extra


def free(critic: nn.Module, **options: Any) -> Adversarial:
    return Adversarial(critic, divergence=wasserstein(FREE), **options)


def by_hand(d: StepDensities, prior: Tensor, posterior: Tensor, weight: float) -> Tensor:
    """The distance of ``Recorder`` without a context, frame by frame."""
    frames = [
        weight * (prior[t, k, b].sum() ** 2 - posterior[t, k, b].sum() ** 2)
        for b, n in enumerate(LENGTHS)
        for t in range(n)
        for k in range(K)
    ]
    return torch.stack(frames).mean()


def test_averages_are_over_observed_frames() -> None:
    r = recipe(view="marginal")
    critic, d = Recorder("marginal"), densities(r)
    found = free(critic).penalty(d)
    prior, posterior = (shown.z for shown in critic.shown)
    expected = by_hand(d, prior, posterior, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    everything = 0.5 * (prior.sum(-1).square() - posterior.sum(-1).square()).mean()
    assert abs(float(found.detach() - everything.detach())) > 1e-6


def test_the_gradient_penalty_is_an_average_over_observed_frames() -> None:
    class Steep(nn.Module):
        def __init__(self, slopes: Tensor) -> None:
            super().__init__()
            self.slopes = slopes  # (T, 1, B), of z's first dimension

        def forward(self, z: Tensor, context: Any = None, path: Any = None) -> Tensor:
            return self.slopes * z[..., 0]

    mask = prefix_mask(LENGTHS).t().unsqueeze(1)
    slopes = torch.where(mask, torch.arange(T * B).reshape(T, 1, B) / 5.0, 100.0)
    sides = [Codes(torch.randn(T, 1, B, Z)) for _ in range(2)]
    found = gradient_penalty(3.0).cost(Steep(slopes), *sides, mask)
    expected = 3.0 * (slopes[mask] - 1.0).clamp(min=0).square().mean()
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("view", ["conditional", "joint"])
def test_no_gradient_runs_through_h(view: str) -> None:
    r = recipe(view=view)
    critic = Recorder(view)
    free(critic).penalty(densities(r))
    assert all(shown.context is not None for shown in critic.shown)
    assert not any(shown.context.requires_grad for shown in critic.shown)


def test_no_gradient_runs_through_the_path_that_both_sides_share() -> None:
    critic = Recorder("trajectory")
    free(critic).penalty(densities(recipe(view="trajectory")))
    one, other = (shown.path for shown in critic.shown)
    assert one is other and not one.requires_grad
    assert critic.shown[1].z.requires_grad


@pytest.mark.parametrize("view", VIEWS)
def test_codes_are_redrawn_between_critic_steps(view: str) -> None:
    r, critic = recipe(view=view), Recorder(view)
    with torch.no_grad():
        d = densities(r)
    free(critic, critic_steps=3).improve(d)
    priors, posteriors = critic.shown[::2], critic.shown[1::2]
    assert len(priors) == len(posteriors) == 3
    assert torch.equal(posteriors[0].z, d.z)
    assert not any(torch.equal(priors[0].z, later.z) for later in priors[1:])
    same = [torch.equal(posteriors[0].z, later.z) for later in posteriors[1:]]
    # a path that is redrawn step by step is another comparison: its draws stay
    assert same == [view == "trajectory_redrawn"] * 2
    if view == "trajectory_redrawn":
        assert all(p.path is p.z for p in priors) and all(
            torch.equal(p.path, d.z) for p in posteriors
        )


def test_an_update_leaves_the_critic_in_training_mode_and_a_penalty_as_it_was() -> None:
    r, critic = recipe(view="marginal"), Recorder("marginal")
    adversarial = free(critic)
    critic.eval()
    adversarial.update(r.model, r.guide, *batch())
    assert critic.training and all(critic.modes)
    for mode in (True, False):
        critic.train(mode)
        critic.modes.clear()
        adversarial.penalty(densities(r))
        assert critic.training is mode and not any(critic.modes)


def test_standardised_codes_pass_the_gradient_of_the_priors_moments() -> None:
    r = recipe(view="marginal")
    critic = Recorder("marginal")
    adversarial = free(critic, standardise=True)
    loss = adversarial.penalty(densities(r))
    own = list(r.model.prior.parameters())
    gradients = torch.autograd.grad(loss, own, retain_graph=True)
    # the prior's own codes are (mu + sigma e - mu) / sigma = e: all of its gradient comes from
    # the posterior's, by mu and sigma
    prior, posterior = (shown.z for shown in critic.shown)
    of_prior = torch.autograd.grad(prior.square().sum(), own, retain_graph=True)
    assert max(float(g.abs().max()) for g in of_prior) < 1e-9
    assert max(float(g.abs().max()) for g in gradients) > 1e-4
    # and by finite differences, the same noise
    p, direction = own[0], torch.randn_like(own[0])

    def value(step: float) -> float:
        with torch.no_grad():
            p.add_(direction, alpha=step)
            with seeded(5):
                found = float(adversarial.penalty(densities_of(r)))
            p.sub_(direction, alpha=step)
        return found

    def densities_of(r: recipes.Recipe) -> StepDensities:
        x, mask = X_GIVEN, prefix_mask(LENGTHS)
        return r.model.rollout(r.guide, x, mask, num_particles=K)

    X_GIVEN = torch.randn(B, T, X)
    with seeded(5):
        (g,) = torch.autograd.grad(adversarial.penalty(densities_of(r)), [p])
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float((g * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_alternating_step_reaches_the_guides_own_encoder() -> None:
    with seeded(2):
        r = recipes.avrnn(X, Z, H, view="marginal", critic="feedforward", critic_dim=6)
        encoder = RecurrentEncoder(r.model.c_dim, 3)
        guide = FilteringGuide(r.model, encoder=encoder)
    adversarial = free(r.critic, critic_steps=1)
    step = Alternating(adversarial, r.model.prior.parameters(), guide.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in encoder.parameters()]
    others = [p.detach().clone() for p in r.model.encode_x.parameters()]
    step.update(r.model, guide, *batch())
    moved = [not torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True)]
    assert all(moved)
    assert all(
        torch.equal(a, b) for a, b in zip(others, r.model.encode_x.parameters(), strict=True)
    )


def test_a_view_of_the_users_own_is_shown() -> None:
    def both(d: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
        return joint(d, prior, posterior)

    critic = Recorder(both)
    free(critic).penalty(densities(recipe(view="joint")))
    assert critic.shown[0].context.shape[-1] == H + X


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_prior_and_guide_descend_what_the_critic_ascends(sign: float) -> None:
    one, other = torch.tensor([1.0, 3.0]), torch.tensor([0.5])
    kind: Callable[[], Divergence] = lambda: wasserstein(FREE)  # noqa: E731
    assert float(kind().penalty(sign * one, sign * other)) == sign * 1.5
    assert float(kind().critic_loss(sign * one, sign * other)) == -sign * 1.5


@pytest.mark.parametrize("view", ["conditional", "joint"])
def test_the_context_is_that_of_a_codes_own_step(view: str) -> None:
    r, (x, mask) = recipe(view=view), batch()
    d, critic = r.model.rollout(r.guide, x, mask, num_particles=K), Recorder(view)
    free(critic).penalty(d)
    seen = x.where(mask[..., None], 0.0).transpose(0, 1).unsqueeze(1).expand(T, K, B, X)
    expected = torch.cat([d.h, seen], dim=-1) if view == "joint" else d.h
    assert all(torch.equal(shown.context, expected) for shown in critic.shown)


def test_redrawn_codes_are_their_own_path_in_the_units_they_are_shown_in() -> None:
    critic = Recorder("trajectory_redrawn")
    free(critic, standardise=True).penalty(densities(recipe(view="trajectory_redrawn")))
    assert all(shown.path is shown.z for shown in critic.shown)


def test_every_critic_step_climbs_the_slope_over_observed_frames() -> None:
    r, critic = recipe(view="marginal"), Recorder("marginal")
    with torch.no_grad():
        d = densities(r)
    optim = torch.optim.SGD(critic.parameters(), lr=0.1)
    found = free(critic, critic_steps=3, optim=optim).improve(d)
    weight = 0.5
    for prior, posterior in zip(critic.shown[::2], critic.shown[1::2], strict=True):
        slope = float(by_hand(d, prior.z, posterior.z, 1.0))  # the score is linear in the weight
        last, weight = weight * slope, weight + 0.1 * slope
    assert float(critic.weight.detach()) == pytest.approx(weight, rel=1e-10)
    assert found["critic_distance"] == pytest.approx(last, rel=1e-10)
    assert found["critic_loss"] == pytest.approx(-last, rel=1e-10)


@pytest.mark.parametrize("detach_state", [True, False])
def test_the_adversarial_step_reads_no_padding(detach_state: bool) -> None:
    x, mask = batch()
    after = []
    for padding in (0.0, torch.nan):
        r = recipe(view="marginal")
        own = [r.model.prior.parameters(), r.guide.parameters()]
        step = Alternating(free(r.critic), *own, lr=1e-2, detach_state=detach_state)
        with seeded(5):
            step.update(r.model, r.guide, x.where(mask[..., None], padding), mask)
        after.append([p.detach() for p in nn.ModuleList([r.model, r.guide]).parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))


@pytest.mark.parametrize("own_paths", [False, True])
def test_the_gradient_penalty_looks_on_lines_between_paired_codes(own_paths: bool) -> None:
    critic, shared = Recorder("trajectory"), torch.randn(T, K, B, Z)
    prior, posterior = (
        Codes(z, path=z if own_paths else shared) for z in torch.randn(2, T, K, B, Z)
    )
    gradient_penalty().cost(critic, prior, posterior, torch.ones(T, 1, B, dtype=torch.bool))
    (shown,) = critic.shown
    share = (shown.z.detach() - posterior.z) / (prior.z - posterior.z)
    assert_close = torch.testing.assert_close
    assert_close(share, share[..., :1].expand_as(share), rtol=1e-6, atol=1e-8)
    assert 0.0 <= float(share.min()) and float(share.max()) <= 1.0
    assert float(share[..., 0].std()) > 0.1  # each pair has a point of its own
    assert_close(shown.path, shown.z if own_paths else shared)


@pytest.mark.parametrize(("on", "slope"), [("z", 2.0), ("all", 13**0.5)])
def test_the_slope_in_the_context_counts_where_asked(on: str, slope: float) -> None:
    class Linear(nn.Module):
        def forward(self, z: Tensor, context: Tensor, path: Any = None) -> Tensor:
            return 2.0 * z[..., 0] + 3.0 * context[..., 0]

    context, mask = torch.randn(T, 1, B, H), prefix_mask(LENGTHS).t().unsqueeze(1)
    sides = [Codes(torch.randn(T, 1, B, Z), context) for _ in range(2)]
    found = gradient_penalty(3.0, on=on).cost(Linear(), *sides, mask)
    assert float(found) == pytest.approx(3.0 * (slope - 1.0) ** 2, rel=1e-9)
