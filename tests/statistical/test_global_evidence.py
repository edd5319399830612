"""A latent that all steps share, where the evidence is known: every bound counts it once.

With f ~ N(0, 1), z_t ~ N(0, 1) and x_t ~ N(f + z_t, r^2) a sequence of x is one normal with
covariance 1 1' + (1 + r^2) I, and the posteriors of f given x and of z_t given x_t and f are
normal.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from scipy import stats
from torch import Size, Tensor

from inference import ELBO, FIVO, IWAE, elbo, evaluate, iwae, particle_filter
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.reference.unbiased import deviation
from tests.unit.table import prefix_mask

R = 0.7
NOISE = 1.0 + R * R  # variance of x_t given f
REPEATS = 20_000


class State(NamedTuple):
    f: Tensor  # (*batch, 1)


class Shared(SequenceModel):
    def __init__(self) -> None:
        super().__init__(x_dim=1, z_dim=1, f_dim=1)

    def prior_f(self, batch_shape: Size) -> dist.Distribution:
        return diagonal_normal(torch.zeros(*batch_shape, 1), torch.ones(*batch_shape, 1))

    def init(self, batch_shape: Size) -> State:
        return State(torch.zeros(*batch_shape, 1))

    def condition(self, state: State, f: Tensor) -> State:
        return State(f)

    def transition(self, state: State) -> dist.Distribution:
        return diagonal_normal(torch.zeros_like(state.f), torch.ones_like(state.f))

    def emission(self, z_t: Tensor, state: State) -> dist.Distribution:
        return diagonal_normal(z_t + state.f, torch.full((), R))

    def advance(self, state: State, z_t: Tensor, x_t: Tensor) -> State:
        return State(state.f.expand_as(z_t))


class Exact(SequenceGuide):
    """Both posteriors; f's shifted and scaled on demand."""

    def __init__(self, model: SequenceModel, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(model)
        self.shift, self.scale = shift, scale

    def proposal_f(self, x: Tensor, mask: Tensor) -> dist.Distribution:
        variance = 1.0 / (1.0 + mask.sum(dim=1, keepdim=True) / NOISE)
        mean = variance * x[..., 0].sum(dim=1, keepdim=True) / NOISE
        return diagonal_normal(mean + self.shift, self.scale * variance.sqrt())

    def proposal(self, state: State, c_t: Tensor) -> dist.Distribution:
        return diagonal_normal((c_t - state.f) / NOISE, torch.full((), R / math.sqrt(NOISE)))


def evidence(x: Tensor, mask: Tensor) -> Tensor:
    """log p(x) of each sequence by its covariance, (B,)."""
    found = []
    for values, length in zip(x[..., 0].numpy(), mask.sum(dim=1).tolist(), strict=True):
        cov = [[1.0 + NOISE * (i == j) for j in range(length)] for i in range(length)]
        found.append(stats.multivariate_normal([0.0] * length, cov).logpdf(values[:length]))
    return torch.tensor(found)


@pytest.mark.parametrize("particles", [1, 5])
def test_exact_posteriors_make_every_bound_tight(particles: int) -> None:
    model, mask = Shared(), prefix_mask((4, 1, 3))
    x = torch.randn(3, 4, 1)
    densities = model.rollout(Exact(model), x, mask, particles)
    expected = evidence(x, mask)
    for bound in (elbo, iwae):
        torch.testing.assert_close(bound(densities.log_weight), expected, rtol=1e-10, atol=1e-10)
    never = FIVO(num_particles=particles, criterion="never")(model, Exact(model), x, mask)
    torch.testing.assert_close(-never, expected.sum(), rtol=1e-10, atol=1e-10)
    filtered = particle_filter(
        model, Exact(model), x, mask, num_particles=particles, criterion="never"
    )
    torch.testing.assert_close(filtered.log_evidence, expected, rtol=1e-10, atol=1e-10)
    numbers = evaluate(model, Exact(model), x, mask, num_particles=8, fivo_particles=8)
    assert numbers.iwae_per_frame == pytest.approx(float(expected.sum()) / 8, rel=1e-6)


def test_a_missing_or_doubled_f_is_no_evidence() -> None:
    model, mask = Shared(), prefix_mask((4, 1, 3))
    x = torch.randn(3, 4, 1)
    d = model.rollout(Exact(model), x, mask, 3)
    assert d.f is not None and d.prior_f is not None and d.proposal_f is not None
    of_f = d.prior_f.log_prob(d.f) - d.proposal_f.log_prob(d.f)
    for count in (-1.0, 1.0):
        assert (
            elbo(d.log_weight) + count * of_f.mean(dim=0) - evidence(x, mask)
        ).abs().min() > 0.01


def repeated(length: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.tensor([0.9, -0.4, 1.6, 0.7])[:length].reshape(1, -1, 1).expand(REPEATS, -1, 1)
    mask = torch.ones(REPEATS, length, dtype=torch.bool)
    return x, mask, evidence(x[:1], mask[:1])


ESTIMATES: dict[str, Callable[..., Tensor]] = {
    "iwae": lambda m, g, x, mask: iwae(m.rollout(g, x, mask, 4).log_weight),
    "filter": lambda m, g, x, mask: (
        particle_filter(
            m, g, x, mask, num_particles=4, criterion="always", resampler="multinomial"
        ).log_evidence
    ),
    "bootstrap": lambda m, g, x, mask: (
        particle_filter(m, None, x, mask, num_particles=4, criterion="ess").log_evidence
    ),
}


@pytest.mark.parametrize("name", ESTIMATES)
@torch.no_grad()
def test_the_evidence_is_unbiased(name: str) -> None:
    model = Shared()
    x, mask, log_z = repeated(4)
    found = ESTIMATES[name](model, Exact(model, shift=0.3, scale=1.4), x, mask)
    assert abs(deviation(found, log_z)) < 5.0


@torch.no_grad()
def test_weights_without_f_are_rejected() -> None:
    model = Shared()
    x, mask, log_z = repeated(4)
    d = model.rollout(Exact(model, shift=0.3, scale=1.4), x, mask, 4)
    assert d.f is not None and d.prior_f is not None and d.proposal_f is not None
    without = d.log_weight.clone()
    without[0] -= d.prior_f.log_prob(d.f) - d.proposal_f.log_prob(d.f)
    assert abs(deviation(iwae(without), log_z)) > 20.0


def test_the_closed_form_kl_counts_f_as_pyro_does() -> None:
    model, mask = Shared(), prefix_mask((4, 1, 3))
    guide = Exact(model, shift=0.3, scale=1.4)
    x = torch.randn(3, 4, 1)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss=TraceMeanField_ELBO())
    torch.manual_seed(3)
    expected = svi.evaluate_loss(x, mask)
    torch.manual_seed(3)
    found = ELBO(analytic_kl=True)(model, guide, x, mask)
    assert float(found) == pytest.approx(expected, rel=1e-10)


class Learnt(Exact):
    """f's posterior with a shift and a scale to learn."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.own = torch.nn.Parameter(torch.tensor([0.3, 1.4]))

    def proposal_f(self, x: Tensor, mask: Tensor) -> dist.Distribution:
        self.shift, self.scale = self.own[0], self.own[1]
        return super().proposal_f(x, mask)


def _gradients(doubly: bool) -> Tensor:
    """Of the guide's two parameters, one row for each of many independent estimates."""
    model = Shared()
    guide = Learnt(model)
    x, mask, _ = repeated(3)
    rows = []
    for start in range(0, 4000, 20):
        loss = IWAE(num_particles=3, doubly_reparameterised=doubly)
        value = loss(model, guide, x[start : start + 20], mask[start : start + 20])
        rows.append(torch.autograd.grad(value, guide.own)[0] / 20)
    return torch.stack(rows)


def test_the_doubly_reparameterised_gradient_of_f_has_the_same_mean() -> None:
    plain, doubly = _gradients(False), _gradients(True)
    error = (plain.var(dim=0) + doubly.var(dim=0)).div(len(plain)).sqrt()
    assert ((plain.mean(dim=0) - doubly.mean(dim=0)).abs() < 5.0 * error).all()
    assert (doubly.var(dim=0) < plain.var(dim=0)).all()
    assert (plain.mean(dim=0).abs() > 5.0 * error).any()  # the comparison is not of zeros
