"""Free runs against the posterior's path: penalty and gradient against closed forms.

The latent is a stationary autoregression, z_t = A z_{t-1} + noise, so that free runs have the same
normal marginal p at every step; the guide draws from one normal q. With the exact log q / p for a
critic the penalty is KL(q, p), and its gradient is that of KL(q, p) in the parameters of both.
"""

import math
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn

from inference import Adversarial, Matching, log_ratio, mmd, wasserstein
from inference.densities import StepDensities
from inference.free_runs import free_run
from pyro_avrnn import recipes
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.statistical.test_critic_calibration import pairs

A, NOISE, LOC, SCALE = 0.8, 0.6, 0.5, 0.7
STEPS, SIZE, REPEATS = 5, 500, 40


class State(NamedTuple):
    z: Tensor  # (*batch, 1)
    begun: Tensor  # (*batch, 1)


class Stationary(SequenceModel):
    def __init__(self) -> None:
        super().__init__(1, 1)
        self.a = nn.Parameter(torch.tensor(A))

    def init(self, batch_shape: Size) -> State:
        return State(torch.zeros(*batch_shape, 1), torch.zeros(*batch_shape, 1))

    @property
    def deviation(self) -> Tensor:
        """Of z_t, at every t."""
        return NOISE / (1 - self.a**2).sqrt()

    def transition(self, state: State) -> dist.Distribution:
        scale = torch.where(state.begun > 0, torch.tensor(NOISE), self.deviation)
        return diagonal_normal(self.a * state.z, scale)

    def emission(self, z_t: Tensor, state: State) -> dist.Distribution:
        return diagonal_normal(z_t, torch.ones_like(z_t))

    def advance(self, state: State, z_t: Tensor, x_t: Tensor) -> State:
        return State(z_t, torch.ones_like(state.begun).expand_as(z_t))


class OneNormal(SequenceGuide):
    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.loc, self.scale = (nn.Parameter(torch.tensor(v)) for v in (LOC, SCALE))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x

    def proposal(self, state: State, c_t: Tensor) -> dist.Distribution:
        one = torch.ones_like(state.z)
        return diagonal_normal(self.loc * one, self.scale * one)


class ExactRatio(nn.Module):
    view = "marginal"

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, context: None, path: None) -> Tensor:
        p = dist.Normal(0.0, NOISE / math.sqrt(1 - A**2))
        return (dist.Normal(LOC, SCALE).log_prob(z) - p.log_prob(z)).squeeze(-1)


def exact(model: Stationary, guide: OneNormal) -> Tensor:
    """KL(q, p)."""
    p = dist.Normal(0.0, model.deviation)
    return torch.distributions.kl_divergence(dist.Normal(guide.loc, guide.scale), p)


def errors(free_runs: bool = True, *, follow: bool = True) -> Tensor:
    """Deviations of penalty and gradients in a, loc and scale, in standard errors."""
    torch.manual_seed(0)
    model = Stationary()
    guide = OneNormal(model)
    critic = Adversarial(
        ExactRatio(), divergence=log_ratio(), free_runs_of=model if free_runs else None
    )
    parameters = [model.a, guide.loc, guide.scale]

    def told(value: Tensor) -> Tensor:
        made = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.stack([value.detach(), *(torch.zeros(()) if g is None else g for g in made)])

    x, mask = torch.zeros(SIZE, STEPS, 1), torch.ones(SIZE, STEPS, dtype=torch.bool)
    found = []
    for _ in range(REPEATS):
        model.a.requires_grad_(follow)
        densities = model.rollout(guide, x, mask)
        penalty = critic.penalty(densities)
        model.a.requires_grad_(True)
        found.append(told(penalty))
    drawn = torch.stack(found)
    error = drawn.std(dim=0) / REPEATS**0.5
    return ((drawn.mean(dim=0) - told(exact(model, guide))) / error.clamp(min=1e-9)).abs()


def test_penalty_and_gradient_are_those_of_the_kl() -> None:
    assert errors().max() < 5


def test_draws_at_the_posterior_s_states_are_another_comparison() -> None:
    assert errors(free_runs=False)[0] > 10


def test_planted_fault_a_prior_without_gradient() -> None:
    assert errors(follow=False)[1] > 10


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_what_is_watched(shift: float) -> None:
    """A linear critic of two normals: its accuracy is known, and so is its slope."""

    class Linear(nn.Module):
        view = "marginal"

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-0.3, -0.4]))

        def forward(self, z: Tensor, context: None, path: None) -> Tensor:
            return z @ self.weight

    torch.manual_seed(0)
    size = 100_000
    zeros = torch.zeros(1, 1, size, 2)
    densities = pairs(zeros, zeros + shift * torch.tensor([0.6, 0.8]), zeros)
    wide = dist.Normal(densities.proposal.mean, 2.0).to_event(1)
    densities = densities._replace(proposal=wide, z=wide.sample())
    own = Linear()
    watched = Adversarial(
        own, optim=torch.optim.SGD(own.parameters(), lr=0.0), watch=True, divergence=wasserstein()
    )
    found = watched.improve(densities)
    right = dist.Normal(0.0, 1.0).cdf(torch.tensor([shift / 2, shift / 4]))
    assert found["critic_accuracy"] == pytest.approx(float(right.mean()), abs=5 * 0.5 / size**0.5)
    assert found["critic_slope"] == pytest.approx(0.5, rel=1e-5)


def one_batch() -> tuple[SequenceModel, StepDensities]:
    torch.manual_seed(0)
    r = recipes.vrnn(x_dim=2, z_dim=3, h_dim=4)
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    return r.model, r.model.rollout(r.guide, torch.randn(3, 6, 2), mask, num_particles=2)


def test_each_side_is_seen_with_states_and_data_of_its_own() -> None:
    model, densities = one_batch()
    seen = []

    class Watching(nn.Module):
        def __init__(self, view: str) -> None:
            super().__init__()
            self.view, self.weight = view, nn.Parameter(torch.ones(1))

        def forward(self, z: Tensor, context: Tensor | None, path: Tensor | None) -> Tensor:
            seen.append((z, context, path))
            return self.weight * z.sum(dim=-1)

    for view in ("joint", "trajectory_redrawn"):
        critic = Adversarial(Watching(view), divergence=log_ratio(), free_runs_of=model)
        torch.manual_seed(1)
        run = free_run(model, densities.mask, 2)
        torch.manual_seed(1)
        critic.penalty(densities)
        (z, context, path), (own, own_context, own_path) = seen[-2:]
        torch.testing.assert_close(z, run.z)
        torch.testing.assert_close(own, densities.z)
        if view == "joint":
            torch.testing.assert_close(context, torch.cat([run.h, run.x], dim=-1))
            x = densities.x.expand(-1, 2, -1, -1)
            torch.testing.assert_close(own_context, torch.cat([densities.h, x], dim=-1))
        else:
            torch.testing.assert_close(path, run.z)
            torch.testing.assert_close(own_path, densities.z)


def test_a_free_run_has_the_states_of_what_it_drew() -> None:
    torch.manual_seed(0)
    r = recipes.vrnn(x_dim=2, z_dim=3, h_dim=4)
    run = free_run(r.model, torch.ones(6, 1, 5, dtype=torch.bool))
    again = r.model.rollout(r.guide, run.x[:, 0].transpose(0, 1), z=run.z)
    torch.testing.assert_close(run.h, again.h)
    torch.testing.assert_close(run.prior.log_prob(run.z), again.log_prior)


def test_matching_takes_free_runs() -> None:
    model, densities = one_batch()
    rows = []

    def distance(prior: Tensor, proposal: Tensor) -> Tensor:
        rows.extend([prior, proposal])
        return mmd(bandwidth=1.0)(prior, proposal)

    penalty = Matching(distance, view="conditional", free_runs_of=model)
    torch.manual_seed(1)
    run = free_run(model, densities.mask, 2)
    torch.manual_seed(1)
    penalty.penalty(densities).backward()
    assert all(p.grad is not None for p in model.prior.parameters())
    keep = densities.mask.expand_as(densities.z[..., 0])
    scale = densities.h[keep].std(dim=0) * densities.h.shape[-1] ** 0.5
    for found, side in zip(rows, (run, densities), strict=True):
        expected = torch.cat([side.z[keep], side.h[keep] / scale], dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_refused() -> None:
    model, _ = one_batch()
    critic = recipes.avrnn(x_dim=2, z_dim=3, h_dim=4, view="marginal").critic
    with pytest.raises(ValueError, match="free_runs_of goes with role 'penalty', got role 'ref"):
        Adversarial(critic, role="refine", free_runs_of=model)
    with pytest.raises(NotImplementedError, match="free runs need a model with the stepwise"):
        Adversarial(critic, free_runs_of=torch.nn.Linear(1, 1))
    with pytest.raises(NotImplementedError, match="without a latent f that all steps share"):
        Adversarial(critic, free_runs_of=recipes.dsae(x_dim=2, z_dim=3, h_dim=4, f_dim=2).model)
    with pytest.raises(NotImplementedError, match="begin at the start of a series"):
        Adversarial(critic, free_runs_of=model).update(model, model, start=(torch.zeros(1),))
