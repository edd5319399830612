"""A refined prior is exact: its sampler, its density and its bounds agree with quadrature.

The model is a chain whose base prior is wrong on purpose; its refined prior has an evidence of
its own, that of the model which draws S candidates and keeps one.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import fivo, iwae, particle_filter
from inference.resampling import Selection
from pyro_avrnn.emissions import NormalEmission
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.models import DMM
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.refinement import Refined, RefinedPrior
from tests.reference import selection
from tests.reference.unbiased import deviation

RIGHT, WRONG = (0.8, 0.5, 0.6), (0.3, -0.4, 1.1)  # slope, offset, deviation of z_t given z_{t-1}
NOISE, SERIES, REPEATS, K = 0.7, (0.4, 1.2, -0.3, 0.9), 20_000, 4
GRID = np.linspace(-9.0, 9.0, 721)
STEP = float(GRID[1] - GRID[0])


def normal(x: Any, loc: Any, scale: float) -> Any:
    return np.exp(-0.5 * ((x - loc) / scale) ** 2) / (scale * math.sqrt(math.tau))


class Linear(nn.Module):
    """z_t given z_{t-1}: a normal with these slope, offset and deviation."""

    h_dim = z_dim = 1

    def __init__(self, slope: float, offset: float, scale: float) -> None:
        super().__init__()
        self.slope, self.offset, self.scale = slope, offset, scale

    def forward(self, h: Tensor) -> dist.Distribution:
        loc = self.slope * h + self.offset
        return diagonal_normal(loc, torch.full_like(loc, self.scale))


class Exact(nn.Module):
    """log of the right transition over the wrong one, in units of the wrong one."""

    h_dim = z_dim = 1

    def forward(self, u: Tensor, h: Tensor) -> Tensor:
        slope, offset, scale = WRONG
        z = slope * h + offset + scale * u
        right, wrong = Linear(*RIGHT)(h), Linear(*WRONG)(h)
        return right.log_prob(z) - wrong.log_prob(z)


class Observed(NormalEmission):
    """x_t = z_t + noise."""

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        (z,) = inputs
        return diagonal_normal(z, torch.full_like(z, NOISE))


class Wide(FilteringGuide):
    """A proposal near x_t and the right transition, wide enough for bounded weights."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc = 0.5 * (c_t + RIGHT[0] * state.z + RIGHT[1])
        return diagonal_normal(loc, torch.full_like(loc, 1.2))


def chain(candidates: int) -> tuple[DMM, Wide]:
    prior: nn.Module = Linear(*RIGHT)
    if candidates:
        prior = RefinedPrior(Linear(*WRONG), Exact(), candidates)
    model = DMM(1, 1, prior=prior, decoder=Observed(1, 1), encode_x=nn.Identity())
    return model, Wide(model)


def exact(candidates: int) -> float:
    """log p(x) of the model that keeps one of these candidates; of the right model for 0."""
    slope, offset, scale = RIGHT
    given = np.concatenate([[0.0], GRID])[:, None]  # z_0, then z_{t-1}
    rows = normal(GRID, slope * given + offset, scale)
    if candidates:
        slope, offset, scale = WRONG
        base = normal(GRID, slope * given + offset, scale)
        rows = selection.density(base, np.log(rows + 1e-300) - np.log(base), STEP, candidates)
    likelihood = normal(np.array(SERIES)[:, None], GRID, NOISE)
    return selection.log_evidence(rows[0], rows[1:], likelihood, STEP)


def series() -> tuple[Tensor, Tensor]:
    x = torch.tensor(SERIES).unsqueeze(-1).expand(REPEATS, -1, 1)
    return x, torch.ones(x.shape[:2], dtype=torch.bool)


@torch.no_grad()
def estimates(candidates: int) -> dict[str, Tensor]:
    """log Z_hat by every way to compute one, ``(REPEATS,)`` each."""
    torch.manual_seed(0)
    model, guide = chain(candidates)
    x, mask = series()
    plain = model.rollout(guide, x, mask, num_particles=K)
    chosen = Selection("systematic", "always", mask)
    d = model.rollout(guide, x, mask, num_particles=K, select=chosen)
    filtered = particle_filter(model, guide, x, mask, num_particles=K, criterion="always")
    return {
        "IWAE": iwae(plain.log_weight),
        "FIVO": fivo(d.log_weight, chosen.events(d.log_weight)),
        "filter": filtered.log_evidence,
    }


@pytest.mark.parametrize("candidates", [2, 8, 32])
def test_bounds_are_those_of_the_model_that_keeps_one(candidates: int) -> None:
    log_z, found = exact(candidates), estimates(candidates)
    for name in ("IWAE", "FIVO", "filter"):
        off = deviation(found[name], log_z)
        print(f"S = {candidates}, {name}: {off:+.2f} s.e.")
        assert abs(off) < 5
    assert abs(log_z - exact(0)) > 0.02  # and another model than the right one


def own_left_out(self: Refined, value: Tensor) -> Tensor:
    """Divide by the mean of the others alone."""
    own, others = self.critic(self.units.read(value), self.h), self.log_ratios
    return self.base.log_prob(value) + own - others.logsumexp(0) + math.log(len(others))


def not_at_z(self: Refined, value: Tensor) -> Tensor:
    """The ratio of another draw in place of that of z."""
    others = self.log_ratios
    total = torch.cat([others[:1], others]).logsumexp(0)
    return self.base.log_prob(value) + others[0] - total + math.log(self.num_candidates)


def of_another_particle(self: Refined) -> Tensor:
    """Candidates that were drawn for another state."""
    loc, scale = self.base.base_dist.loc, self.base.base_dist.scale
    drawn = loc.roll(1, dims=-3) + scale * torch.randn(self.num_candidates - 1, *loc.shape)
    return (drawn - loc) / scale


def once_for_all_steps(self: Refined) -> Tensor:
    """The candidates of step 1 at every step."""
    drawn = self.units.draw(torch.Size((self.num_candidates - 1,)))
    return drawn[:, :1].expand_as(drawn) if drawn.ndim == 5 else drawn


FAULTS = {
    "normaliser without z": ("log_prob", own_left_out, "IWAE"),
    "ratio not at z": ("log_prob", not_at_z, "IWAE"),
    "candidates of another particle": ("candidates", property(of_another_particle), "IWAE"),
    "candidates of step 1": ("candidates", property(once_for_all_steps), "IWAE"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_no_estimates(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, bound = FAULTS[fault]
    monkeypatch.setattr(Refined, name, value)
    found = {s: deviation(estimates(s)[bound], exact(s)) for s in (2, 8)}
    print(f"{fault}: {found}")
    assert max(map(abs, found.values())) > 5


def test_particles_are_chosen_by_the_weights_that_are_summed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An estimate drawn anew for the sum would not be the one that chose."""
    seen: list[Tensor] = []

    def select(t: int, log_prior: Tensor, *others: Tensor) -> None:
        seen.append(log_prior)

    def summed() -> Tensor:
        seen.clear()
        model, guide = chain(4)
        x, mask = (part[:5] for part in series())
        d = model.rollout(guide, x, mask, num_particles=K, select=select)
        return d.log_prior[:-1] - torch.stack(seen)

    assert summed().abs().max() < 1e-5
    monkeypatch.setattr(Refined, "among", lambda self, candidates: self)
    assert summed().abs().max() > 0.1


@pytest.mark.parametrize("candidates", [2, 16])
def test_draws_follow_the_density(candidates: int) -> None:
    torch.manual_seed(1)
    h = torch.tensor([0.5])
    prior = RefinedPrior(Linear(*WRONG), Exact(), candidates)(h)
    slope, offset, scale = WRONG
    base = normal(GRID, slope * 0.5 + offset, scale)
    right = normal(GRID, RIGHT[0] * 0.5 + RIGHT[1], RIGHT[2])
    density = selection.density(base, np.log(right) - np.log(base), STEP, candidates)
    assert abs(density.sum() * STEP - 1.0) < 1e-6
    drawn = prior.sample((400_000,)).squeeze(-1).numpy()
    edges = np.linspace(-3.0, 4.0, 36)
    counts = np.histogram(drawn, edges)[0]
    cumulative = np.interp(edges, GRID + STEP / 2, np.cumsum(density) * STEP)
    expected = np.diff(cumulative) * len(drawn)
    error = (counts - expected) / np.sqrt(expected + 1)
    print(f"S = {candidates}: largest of {len(counts)} bins off by {abs(error).max():.2f} s.e.")
    assert abs(error).max() < 5
    twin = np.diff(np.interp(edges, GRID + STEP / 2, np.cumsum(base) * STEP)) * len(drawn)
    assert abs((counts - twin) / np.sqrt(twin + 1)).max() > 20  # the base's own density


def test_the_estimate_of_the_density_is_unbiased() -> None:
    torch.manual_seed(2)
    prior = RefinedPrior(Linear(*WRONG), Exact(), 8)
    h, z = torch.full((200_000, 1), 0.5), torch.full((200_000, 1), 0.7)
    slope, offset, scale = WRONG
    base = normal(GRID, slope * 0.5 + offset, scale)
    right = normal(GRID, RIGHT[0] * 0.5 + RIGHT[1], RIGHT[2])
    density = selection.density(base, np.log(right) - np.log(base), STEP, 8)
    log_density = math.log(float(np.interp(0.7, GRID, density)))
    assert abs(deviation(prior(h).log_prob(z), log_density)) < 5
    assert abs(deviation(prior(h).log_prob(z), math.log(normal(0.7, 0.65, 1.1)))) > 5


def test_more_candidates_close_the_gap_to_the_right_prior() -> None:
    slope, offset, scale = WRONG
    base = normal(GRID, slope * 0.5 + offset, scale)
    right = normal(GRID, RIGHT[0] * 0.5 + RIGHT[1], RIGHT[2])
    log_ratio = np.log(right + 1e-300) - np.log(base)
    gaps = []
    for s in (2, 4, 16, 64, 256):
        kept = selection.density(base, log_ratio, STEP, s)
        gaps.append(float((right * (np.log(right + 1e-300) - np.log(kept + 1e-300))).sum() * STEP))
        print(f"S = {s}: the right prior is {gaps[-1]:.4f} nats away")
    whole = float((right * log_ratio).sum() * STEP)
    assert whole > gaps[0] and all(a > b > 0 for a, b in pairwise(gaps))
    assert gaps[-1] < 0.02 * whole
