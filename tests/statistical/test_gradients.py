"""Gradient estimators: unbiased where they claim to be, and less noisy where they claim to be.

*Doubly reparameterised gradients* (DReG) are compared with plain ones of IWAE draw by draw: the
mean of the differences is zero. *FIVO with its score function* is compared with the exact
gradient of E[log Z_hat] in a model of binary latents, all of whose draws and ancestors are
enumerated here. Run pytest with ``-rP`` to read the numbers.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count, product
from operator import attrgetter
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor

from inference import FIVO, IWAE
from inference.gradients import ancestor_score
from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

# doubly reparameterised gradients

Coefficient = Callable[[Tensor, float], Tensor]  # (normalised weights, exponent) -> of a path


def tiny(guide: str) -> tuple[Recipe, Tensor]:
    """An untrained VRNN with X = 2, Z = 1, H = 3, and four series of three steps."""
    torch.manual_seed(7)
    return recipes.vrnn(2, 1, 3, guide=guide), 1.5 * torch.randn(4, 3, 2)


def parameters(recipe: Recipe, which: str) -> list[Tensor]:
    return list(attrgetter(which)(recipe).parameters())


def flat(loss: Tensor, wanted: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(wanted, found, strict=True)
        ]
    )


def losses_gradients(
    recipe: Recipe, loss: Any, x: Tensor, repetitions: int, which: str = "guide"
) -> Tensor:
    """Gradients of independent draws, the same for every loss: ``(repetitions, coordinates)``."""
    rows = []
    for seed in range(repetitions):
        torch.manual_seed(seed)
        rows.append(flat(loss(recipe.model, recipe.guide, x), parameters(recipe, which)))
    return torch.stack(rows)


def by_paths(coefficient: Coefficient, particles: int, kl_weight: float) -> Any:
    """A loss whose guide gradient adds up paths with these coefficients; its value is nothing."""

    def loss(model: Any, guide: Any, x: Tensor) -> Tensor:
        d = model.rollout(guide, x, num_particles=particles)
        log_q = copy.deepcopy(guide).proposal(d.states, d.c).log_prob(d.z)
        log_w = (d.log_emission + kl_weight * (d.log_prior - log_q)).sum(dim=0)
        share = log_w.detach().softmax(dim=0)
        return -(coefficient(share, kl_weight) * log_w).sum()

    return loss


def deviations(samples: Tensor, expected: Tensor | float = 0.0) -> Tensor:
    """Means less what is expected, in standard errors; coordinates that never vary left out."""
    mean, error = samples.mean(dim=0), samples.std(dim=0) / len(samples) ** 0.5
    off = (mean - expected).abs()
    moves = error > 1e-12 * (1.0 + mean.abs())
    assert bool((off[~moves] < 1e-10).all()) and bool(moves.any())
    return off[moves] / error[moves]


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
@pytest.mark.parametrize("guide", ["filtering", "residual"])
def test_doubly_reparameterised_gradients_are_unbiased(guide: str, kl_weight: float) -> None:
    recipe, x = tiny(guide)
    many = x.repeat(75, 1, 1)  # 300 independent draws a repetition

    def off(loss: Any) -> Tensor:
        return deviations(losses_gradients(recipe, loss, many, 60) - plain)

    options = {"num_particles": 3, "kl_weight": kl_weight}
    plain = losses_gradients(recipe, IWAE(**options), many, 60)
    found = off(IWAE(**options, doubly_reparameterised=True))
    right = by_paths(lambda w, b: (1.0 - b) * w + b * w**2, 3, kl_weight)
    assert off(right).max() < 5.0  # so that what is wrong below are the coefficients alone
    faults: dict[str, Coefficient] = {
        "w": lambda w, b: w,
        "w^2": lambda w, b: w**2,
        "1/K": lambda w, b: torch.full_like(w, 1 / 3),
    }
    if kl_weight == 1.0:
        faults.pop("w^2")  # which is right there
    missed = {
        name: off(by_paths(fault, 3, kl_weight)).max().item() for name, fault in faults.items()
    }
    planted = ", ".join(f"{name} {value:.1f}" for name, value in missed.items())
    print(
        f"{guide}, exponent {kl_weight}: {len(found)} coordinates, off by at most "
        f"{found.max():.2f} s.e., rms {found.square().mean().sqrt():.2f}; faults: {planted}"
    )
    assert found.max() < 5.0
    assert all(value > 5.0 for value in missed.values())


@pytest.mark.parametrize("particles", [4, 16, 64])
@pytest.mark.parametrize("guide", ["filtering", "residual"])
def test_doubly_reparameterised_gradients_are_less_noisy(guide: str, particles: int) -> None:
    recipe, x = tiny(guide)
    for kl_weight in (1.0, 0.5):
        plain, doubly = (
            losses_gradients(
                recipe,
                IWAE(num_particles=particles, kl_weight=kl_weight, doubly_reparameterised=doubly),
                x,
                60,
            )
            for doubly in (False, True)
        )
        noise = [g.var(dim=0).sum().item() for g in (plain, doubly)]
        signal = doubly.mean(dim=0).square().sum().item()
        print(
            f"{guide}, K = {particles}, exponent {kl_weight}: total variance {noise[0]:.3g} "
            f"plain, {noise[1]:.3g} doubly: ratio {noise[1] / noise[0]:.3f}; squared mean "
            f"{signal:.3g}"
        )
        assert noise[1] < noise[0]


def test_the_priors_gradients_under_a_residual_guide_are_the_plain_ones() -> None:
    recipe, x = tiny("residual")
    for which in ("model", "model.prior"):
        plain, doubly = (
            losses_gradients(recipe, IWAE(doubly_reparameterised=doubly), x, 5, which)
            for doubly in (False, True)
        )
        assert torch.equal(plain, doubly) and bool((plain != 0).any())


# FIVO's score function

X = (0.0, 1.0, 2.5)
THETA = (1.0, 0.3)  # a and c
CHANCE, SCALE, KEEP = 0.4, 0.6, 0.8  # q(z_t = 1), the emission's deviation, s_t's memory
SIZE = 20_000


class Trail(NamedTuple):
    s: Tensor  # (*batch, 1), of the z before; the last counts most


class Switch(SequenceModel):
    """Binary z_t, likely to be 1 after many ones: s_{t+1} = KEEP s_t + z_t, s_1 = 0.

    p(z_t = 1) = sigmoid(a (2 s_t - 1)); x_t is normal about c (2 z_t - 1) + s_t / 2. The
    parameters a and c have a value for every sequence, ``(2, B)``, so that each has a gradient.
    """

    def __init__(self, theta: Tensor) -> None:
        super().__init__(x_dim=1, z_dim=1)
        self.a, self.c = theta.unsqueeze(-1)  # each (B, 1)

    def init(self, batch_shape: Size) -> Trail:
        return Trail(torch.zeros(*batch_shape, 1))

    def transition(self, state: Trail) -> dist.Distribution:
        return dist.Bernoulli(logits=self.a * (2.0 * state.s - 1.0)).to_event(1)

    def emission(self, z_t: Tensor, state: Trail) -> dist.Distribution:
        return dist.Normal(self.c * (2.0 * z_t - 1.0) + 0.5 * state.s, SCALE).to_event(1)

    def advance(self, state: Trail, z_t: Tensor, x_t: Tensor) -> Trail:
        return Trail(KEEP * state.s + z_t)


class Coin(SequenceGuide):
    """z_t = 1 with a fixed chance: no gradient runs through the draws."""

    def proposal(self, state: Trail, c_t: Tensor) -> dist.Distribution:
        return dist.Bernoulli(torch.full_like(state.s, CHANCE)).to_event(1)


Times = tuple[int, ...]  # the steps, from 1, after which particles are resampled


def expected_bound(theta: Tensor, length: int, kl_weight: float, times: Times) -> Tensor:
    """E[log Z_hat] of the filter with K = 2, differentiable: all draws and all ancestors."""
    a, c = theta

    @cache
    def weight(z: int, s: float, t: int) -> Tensor:
        log_odds = a * (2 * s - 1)
        prior = torch.sigmoid(log_odds if z else -log_odds)
        off = (X[t - 1] - c * (2 * z - 1) - 0.5 * s) / SCALE
        likelihood = torch.exp(-0.5 * off**2) / (SCALE * math.sqrt(2 * math.pi))
        return likelihood * (prior / (CHANCE if z else 1 - CHANCE)) ** kl_weight

    def from_step(t: int, s: tuple[float, ...], w: tuple[Any, ...]) -> Tensor:
        total = torch.zeros(())
        for z in product((0, 1), repeat=2):
            chance = math.prod(CHANCE if z_k else 1 - CHANCE for z_k in z)
            grown = tuple(w[k] * weight(z[k], s[k], t) for k in (0, 1))
            moved = tuple(KEEP * s[k] + z[k] for k in (0, 1))
            both = grown[0] + grown[1]
            if t == length:
                value = torch.log(both / 2)
            elif t not in times:
                value = from_step(t + 1, moved, grown)
            else:
                value = torch.log(both / 2)
                for i, j in product((0, 1), repeat=2):
                    chosen = grown[i] / both * grown[j] / both
                    value = value + chosen * from_step(t + 1, (moved[i], moved[j]), (1.0, 1.0))
            total = total + chance * value
        return total

    return from_step(1, (0.0, 0.0), (1.0, 1.0))


def exact(length: int, kl_weight: float, times: Times) -> tuple[float, Tensor]:
    """E[log Z_hat] and its gradient (2,)."""
    theta = torch.tensor(THETA, requires_grad=True)
    bound = expected_bound(theta, length, kl_weight, times)
    return bound.item(), torch.autograd.grad(bound, theta)[0]


def after(times: Times) -> Callable[[Tensor], Tensor]:
    """A criterion that looks at the clock alone."""
    step = count(1)
    return lambda log_weight: torch.full(log_weight.shape[1:], next(step) in times)


class Estimates(NamedTuple):
    value: Tensor  # (B,)
    gradient: Tensor  # (B, 2)


def estimates(
    lengths: tuple[int, ...], loss: type[FIVO] = FIVO, size: int = SIZE, **options: Any
) -> Estimates:
    """FIVO's value and gradients, one of each a sequence; lengths take turns."""
    theta = torch.tensor(THETA).unsqueeze(1).repeat(1, size).requires_grad_()
    model = Switch(theta)
    steps = torch.tensor(lengths).repeat(size // len(lengths))
    longest = max(lengths)
    x = torch.tensor(X[:longest]).reshape(1, longest, 1).expand(size, -1, -1)
    mask = torch.arange(longest) < steps.unsqueeze(1)
    kept: list[Tensor] = []

    class Kept(loss):
        def objective(self, densities: Any, kl_weight: float) -> Tensor:
            kept.append(super().objective(densities, kl_weight))
            return kept[-1]

    objective = Kept(**{"num_particles": 2, "resampler": "multinomial"} | options)
    total = objective(model, Coin(model), x, mask)
    assert torch.allclose(total, -kept[0].sum())
    return Estimates(kept[0].detach(), -torch.autograd.grad(total, theta)[0].t())


def next_stretch_only(
    log_weight: Tensor, resampled: Tensor, parents: Sequence[Tensor | None], expected: Tensor
) -> Tensor:
    """A planted fault: ancestors are credited with the stretch that follows, not with all."""
    total = torch.zeros(log_weight.shape[-1])
    for t, chosen in enumerate(parents):
        assert chosen is not None  # criterion "always"
        gain = log_weight[t + 1].logsumexp(dim=0).detach() - math.log(2)
        total = total + gain * log_weight[t].log_softmax(dim=0).gather(0, chosen).sum(dim=0)
    return total


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
@pytest.mark.parametrize(
    ("lengths", "times"),
    [((2,), (1,)), ((3,), (1, 2)), ((3,), (1,)), ((3,), (2,)), ((2, 3), (1, 2))],
)
def test_fivos_score_function_makes_its_gradient_unbiased(
    lengths: tuple[int, ...], times: Times, kl_weight: float
) -> None:
    def found(**options: Any) -> Estimates:
        criterion = "always" if len(times) + 1 == max(lengths) else after(times)
        return estimates(lengths, kl_weight=kl_weight, criterion=criterion, **options)

    scored, twin = found(score_function=True), found()
    for i, length in enumerate(lengths):
        value, gradient = exact(length, kl_weight, times)
        rows = slice(i, None, len(lengths))
        off = deviations(scored.value[rows, None], value).max()
        by_score = deviations(scored.gradient[rows], gradient)
        without = deviations(twin.gradient[rows], gradient)
        print(
            f"T = {length} of {lengths}, resampled after {times}, exponent {kl_weight}: value "
            f"{value:.4f} off by {off:.2f} s.e.; gradient "
            f"{[round(g, 4) for g in gradient.tolist()]} off by {by_score.max():.2f} s.e., "
            f"without the score {without.max():.1f}"
        )
        assert off < 5.0
        assert deviations(twin.value[rows, None], value).max() < 5.0
        assert by_score.max() < 5.0
        assert without.max() > 5.0


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_the_enumeration_rejects_a_score_that_looks_one_stretch_ahead(
    kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.objectives.ancestor_score", next_stretch_only)
    options = {"criterion": "always", "score_function": True, "kl_weight": kl_weight}
    two, three = (estimates((n,), **options) for n in (2, 3))
    # of two steps it is right
    assert deviations(two.gradient, exact(2, kl_weight, (1,))[1]).max() < 5.0
    off = deviations(three.gradient, exact(3, kl_weight, (1, 2))[1]).max()
    print(f"one stretch ahead, exponent {kl_weight}: off by {off:.1f} s.e.")
    assert off > 5.0


def test_the_noise_of_the_score_does_not_grow_with_the_particles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noise(particles: int) -> Tensor:
        options = {"criterion": "always", "score_function": True, "num_particles": particles}
        return estimates((3,), size=1000, **options).gradient.std(dim=0)

    few, many = noise(4), noise(64)
    monkeypatch.setattr(
        "inference.objectives.ancestor_score", lambda *args: ancestor_score(*args[:3])
    )
    few_blind, many_blind = noise(4), noise(64)
    print(f"a gradient's deviation, K = 4 and 64: {few.tolist()} and {many.tolist()}; without")
    print(f"what is expected {few_blind.tolist()} and {many_blind.tolist()}")
    # the blind score grows with the root of K, here from 4 to 64, the other does not
    assert bool((many < 1.3 * few).all()) and bool((many_blind > 2.0 * few_blind).all())
    assert bool((many < 0.25 * many_blind).all())


def test_the_enumeration_rejects_another_value() -> None:
    found = estimates((3,), criterion="always")
    for wrong in (exact(3, 0.5, (1, 2))[0], exact(3, 1.0, (1,))[0]):
        assert deviations(found.value[:, None], wrong).max() > 5.0


def test_the_enumeration_of_one_step_is_the_sum_over_two_draws() -> None:
    theta = torch.tensor(THETA)
    log_w = []
    for z in (0.0, 1.0):
        prior = dist.Bernoulli(logits=-theta[0]).log_prob(torch.tensor(z))
        emission = dist.Normal(theta[1] * (2 * z - 1), SCALE).log_prob(torch.tensor(X[0]))
        log_w.append(prior + emission - math.log(CHANCE if z else 1 - CHANCE))
    chances = (1 - CHANCE, CHANCE)
    by_hand = sum(
        chances[i] * chances[j] * torch.logaddexp(log_w[i], log_w[j]) - math.log(2) / 4
        for i, j in product((0, 1), repeat=2)
    )
    torch.testing.assert_close(expected_bound(theta, 1, 1.0, ()), by_hand, rtol=1e-12, atol=0.0)
