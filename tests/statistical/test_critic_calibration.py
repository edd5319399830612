"""A critic's number against the true distance: two cases whose W1 is known.

*Shift*: unit normals in 16 dimensions, one shifted by a vector of norm 1: W1 = 1.
*Flip*: p(z | h) = N(h, 1), q(z | h) = N(-h, 1) with h = -1 or 1: the marginals over h agree, so a
critic of z alone is blind, while the average over h of W1 given h is 2.

Scores are of held-out draws. Run pytest with ``-rP`` to read the numbers.
"""

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference.adversarial import Adversarial
from inference.constraints import Codes, Constraint, clip, gradient_penalty, spectral
from inference.densities import StepDensities
from inference.divergences import wasserstein
from inference.roles import View
from pyro_avrnn.critics import FeedForwardCritic

WIDTH, BATCH, HELD_OUT = 32, 256, 100_000
NO_CONSTRAINT = Constraint("none", lambda critic: None, lambda *_: 0.0, lambda critic: None)


def pairs(prior: Tensor, proposal: Tensor, h: Tensor) -> StepDensities:
    """Unit normals with these means."""
    p, q = (dist.Normal(loc, torch.ones_like(loc)).to_event(1) for loc in (prior, proposal))
    mask = torch.ones(h.shape[:-1], dtype=torch.bool)
    zero = torch.zeros_like(h)
    terms = {name: zero[..., 0] for name in ("log_prior", "log_emission", "log_proposal")}
    drawn = {"z": q.sample(), "h": h, "x": zero, "mask": mask}
    return StepDensities(**drawn, **terms, prior=p, emission=None, proposal=q)


def shift(size: int) -> StepDensities:
    zeros = torch.zeros(1, 1, size, 16, dtype=torch.float32)
    return pairs(zeros, zeros + 0.25, zeros[..., :1])


def flip(size: int) -> StepDensities:
    h = 2.0 * torch.randint(2, (1, 1, size, 1)).to(torch.float32) - 1.0
    return pairs(h, -h, h)


def without_h(densities: StepDensities, prior: Tensor, posterior: Tensor) -> tuple[Codes, Codes]:
    """Planted fault: a conditional view whose context says nothing."""
    nothing = torch.zeros_like(densities.h)
    return Codes(prior, nothing), Codes(posterior, nothing)


def trained(
    case: Callable[[int], StepDensities],
    view: str | View,
    constraint: Constraint,
    *,
    steps: int,
    lr: float,
    activation: str = "relu",
    lipschitz: str | None = None,
    rmsprop: bool = False,
    seed: int = 0,
) -> float:
    """Distance on held-out pairs after training on fresh ones, the learning rate decaying."""
    torch.manual_seed(seed)
    sees_h = view != "marginal"
    critic = FeedForwardCritic(
        16 if case is shift else 1,
        int(sees_h),
        WIDTH,
        view=view,
        activation=activation,
        lipschitz=lipschitz,
    ).to(torch.float32)
    parameters = critic.parameters()
    optim = (
        torch.optim.RMSprop(parameters, lr=lr)
        if rmsprop
        else torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9))
    )
    adversarial = Adversarial(critic, divergence=wasserstein(constraint), optim=optim)
    decay = torch.optim.lr_scheduler.LinearLR(
        optim, 1.0, 1.0 if rmsprop else 0.02, total_iters=max(steps, 1)
    )
    for _ in range(steps):
        adversarial.improve(case(BATCH))
        decay.step()
    distance = adversarial.distance(case(HELD_OUT))
    print(f"{case.__name__}, {constraint.name}, {activation}: {distance:.4f}")
    return distance


def calibrated(distance: float, truth: float, within: float) -> bool:
    return abs(distance - truth) <= within * truth


def test_the_closed_form_knows_the_shift() -> None:
    # W2 between normals of one covariance is the shift itself, and the KL half its square
    critic = FeedForwardCritic(16, 0, WIDTH, view="marginal").to(torch.float32)
    adversarial = Adversarial(critic)
    metrics = adversarial.improve(shift(4))
    assert metrics["closed_form_w2"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["closed_form_kl"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("activation", ["relu", "groupsort"])
def test_spectral_normalisation_measures_a_shift(activation: str) -> None:
    distance = trained(
        shift, "marginal", spectral(), steps=600, lr=1e-2, activation=activation, lipschitz="z"
    )
    assert calibrated(distance, 1.0, within=0.05)


def test_the_gradient_penalty_measures_a_shift() -> None:
    # its optimum is at slope 1 + W / (2 * 10), which is 1.05
    distance = trained(shift, "marginal", gradient_penalty(10.0), steps=600, lr=3e-3)
    assert calibrated(distance, 1.0, within=0.08)


def test_weight_clipping_does_not_measure_a_shift() -> None:
    # Arjovsky et al. (2017), algorithm 1, as published: products of weights below 0.01 are
    # nearly flat, and the number has no unit. That it is small says nothing.
    distance = trained(shift, "marginal", clip(0.01), steps=1000, lr=5e-5, rmsprop=True)
    assert distance < 0.5
    assert not calibrated(distance, 1.0, within=0.08)


@pytest.mark.parametrize(
    ("constraint", "steps"), [(gradient_penalty(10.0), 0), (NO_CONSTRAINT, 300)]
)
def test_the_check_rejects_a_critic_without_training_or_constraint(
    constraint: Constraint, steps: int
) -> None:
    distance = trained(shift, "marginal", constraint, steps=steps, lr=3e-3)
    assert not calibrated(distance, 1.0, within=0.08)


@pytest.mark.parametrize("spectrally", [True, False])
def test_a_critic_of_z_alone_is_blind_to_a_flip(spectrally: bool) -> None:
    if spectrally:
        distance = trained(
            flip,
            "marginal",
            spectral(),
            steps=400,
            lr=1e-2,
            activation="groupsort",
            lipschitz="z",
        )
    else:
        distance = trained(flip, "marginal", gradient_penalty(100.0), steps=400, lr=3e-3)
    assert abs(distance) < 0.1


def test_spectral_normalisation_in_z_measures_a_flip() -> None:
    distance = trained(
        flip, "conditional", spectral(), steps=600, lr=1e-2, activation="groupsort", lipschitz="z"
    )
    assert calibrated(distance, 2.0, within=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_penalty_in_z_measures_a_flip(seed: int) -> None:
    constraint = gradient_penalty(100.0, on="z")
    distance = trained(flip, "conditional", constraint, steps=400, lr=1e-2, seed=seed)
    assert calibrated(distance, 2.0, within=0.05)


def test_the_default_gradient_penalty_reads_a_flip_too_high_as_it_must() -> None:
    # the optimum of the penalty has slope 1 + W / (2 weight) = 1.1 here, so it reads 2.2
    distance = trained(flip, "conditional", gradient_penalty(), steps=400, lr=1e-2)
    assert calibrated(distance, 2.2, within=0.03)
    assert not calibrated(distance, 2.0, within=0.05)


def test_spectral_normalisation_with_relu_reads_a_flip_too_low() -> None:
    # ReLU loses the gradient's norm where it is off, and normalised layers cannot make up for
    # it; the critic must rise in z for one h and fall for the other, and does neither fully
    distance = trained(flip, "conditional", spectral(), steps=600, lr=1e-2, lipschitz="z")
    assert 0.5 < distance < 1.5
    assert not calibrated(distance, 2.0, within=0.05)


def test_a_two_sided_gradient_penalty_is_trapped_by_a_flip() -> None:
    # The published penalty pushes slopes of a fresh critic to 1 with the sign they happen to
    # have; one that must change sign would have to pass 0, at the penalty's full price.
    distances = [
        trained(
            flip,
            "conditional",
            gradient_penalty(100.0, two_sided=True),
            steps=300,
            lr=1e-2,
            seed=seed,
        )
        for seed in range(4)
    ]
    assert min(distances) < 0.5


def test_the_check_rejects_a_conditional_critic_that_is_not_given_h() -> None:
    distance = trained(flip, without_h, gradient_penalty(100.0), steps=300, lr=1e-2)
    assert not calibrated(distance, 2.0, within=0.05)


def test_the_check_rejects_a_flip_measured_without_a_constraint() -> None:
    distance = trained(flip, "conditional", NO_CONSTRAINT, steps=200, lr=1e-2)
    assert not calibrated(distance, 2.0, within=0.05)


class LinearCritic(nn.Module):
    """Scores a z_t + b z_{t-1}, whose slopes are known; z_0 = 0."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, z: Tensor, context: Tensor | None, path: Tensor) -> Tensor:
        past = torch.cat([torch.zeros_like(path[:1]), path[:-1]])
        return (self.a * z + self.b * past).squeeze(-1)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("own_paths", [False, True])
def test_the_penalty_is_that_of_the_slope_in_each_code(own_paths: bool, two_sided: bool) -> None:
    a, b, length = 0.7, 0.6, 4
    prior, posterior = torch.randn(2, length, 1, 3, 1)
    path = torch.randn(length, 1, 3, 1)
    sides = [Codes(z, path=z if own_paths else path) for z in (prior, posterior)]
    lengths = [4, 2, 1]
    mask = (torch.arange(length)[:, None] < torch.tensor(lengths)).unsqueeze(1)
    constraint = gradient_penalty(3.0, two_sided=two_sided)
    cost = constraint.cost(LinearCritic(a, b), *sides, mask)
    # a code is scored at its step, and is the past of the next one where there is one; a path
    # that both sides share is a given
    slopes = [a + b * (own_paths and t < n) for n in lengths for t in range(1, n + 1)]
    excess = [s - 1 if two_sided else max(s - 1, 0.0) for s in slopes]
    assert float(cost) == pytest.approx(3.0 * sum(e * e for e in excess) / len(excess), rel=1e-10)
