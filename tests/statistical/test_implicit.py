"""A guide that only samples finds both modes of a posterior that a normal cannot have."""

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Size, Tensor, nn

from inference import (
    AVB,
    ELBO,
    Adversarial,
    LearningRate,
    Ramp,
    evaluate,
    fit,
    particle_filter,
    roles,
)
from pyro_avrnn.critics import FeedForwardCritic
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.implicit import Implicit, ImplicitGuide, MomentGuide
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.sequence import SequenceModel

SEEN, NOISE = 1.3, 0.3
GRID = np.linspace(-6, 6, 4801)
STEP = GRID[1] - GRID[0]


class Nothing(NamedTuple):
    h: Tensor  # (*batch, 1), zeros


class Folded(SequenceModel):
    """x = |z| + noise, z standard normal: the sign of z is unknown."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.unused = nn.Parameter(torch.zeros(1))

    def init(self, batch_shape: Size) -> Nothing:
        return Nothing(torch.zeros(*batch_shape, 1))

    def transition(self, state: Nothing) -> dist.Distribution:
        return diagonal_normal(state.h, torch.ones_like(state.h))

    def emission(self, z_t: Tensor, state: Nothing) -> dist.Distribution:
        return diagonal_normal(z_t.abs(), torch.full_like(z_t, NOISE))

    def advance(self, state: Nothing, z_t: Tensor, x_t: Tensor) -> Nothing:
        return state


def posterior() -> tuple[np.ndarray, float]:
    """Density on the grid, and log p(x)."""
    log = -0.5 * GRID**2 - 0.5 * ((SEEN - np.abs(GRID)) / NOISE) ** 2
    joint = np.exp(log) / (2 * math.pi * NOISE)
    return joint / (joint.sum() * STEP), math.log(joint.sum() * STEP)


def distance(z: Tensor) -> float:
    """Total variation between draws and the posterior, in bins."""
    edges = np.linspace(-3, 3, 41)
    found = np.histogram(z.numpy(), edges)[0] / len(z)
    density, _ = posterior()
    exact = np.diff(np.interp(edges, GRID, np.cumsum(density) * STEP))
    return float(0.5 * np.abs(found - exact).sum())


def trained(guide: Any, model: Folded, loss: Any, hooks: list[Any], steps: int) -> None:
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), loss)
        x = torch.full((256, 1, 1), SEEN)
        fit(
            *(svi, [(x,)]),
            steps=steps,
            hooks=hooks,
            seed=0,
            lr_schedule=LearningRate("cosine"),
            progress=False,
        )


def drawn(guide: Any, model: Folded) -> Tensor:
    with torch.no_grad():
        x = torch.full((1, 1, 1), SEEN)
        return model.rollout(guide, x, num_particles=40_000, scored=False).z.flatten()


@pytest.mark.parametrize("role", ["ratio", pytest.param("ratio_to_prior", marks=pytest.mark.slow)])
def test_both_modes(role: str) -> None:
    torch.manual_seed(0)
    model = Folded()
    guide = ImplicitGuide(model, [32, 32], activation="silu")
    critic = FeedForwardCritic(1, 2, 64, view="joint", activation="silu")
    optim = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.9))
    adversarial = Adversarial(critic, role=role, optim=optim, critic_steps=3)
    loss = AVB(critic=adversarial, kl_weight=Ramp(5, 1, over=0.7))  # from the prior, slowly
    trained(guide, model, loss, [adversarial.update], 1200)
    z = drawn(guide, model)
    found, positive = distance(z), float((z > 0).double().mean())
    print(f"{role}: total variation {found:.3f}, {positive:.2f} of the draws above 0")
    normal = FilteringGuide(model, [32])
    trained(normal, model, ELBO(), [], 400)
    alone = distance(drawn(normal, model))
    print(f"a normal: {alone:.3f}")
    assert found < 0.4 < 0.5 < alone
    assert 0.3 < positive < 0.7


def test_padding_counts_for_nothing_in_the_bound() -> None:
    torch.manual_seed(0)
    model = Folded()
    guide = ImplicitGuide(model, [4])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for role in ("ratio", "ratio_to_prior"):
        critic = Adversarial(FeedForwardCritic(1, 2, 4, view="joint"), role=role)
        d = AVB(critic=critic).draw(model, guide, torch.rand(2, 3, 1), mask)
        for terms in (d.log_emission, d.log_prior, d.log_proposal):
            assert torch.equal(terms[:, 0] != 0, mask.t())


def test_the_moments_of_a_guide_are_constants() -> None:
    model = Folded()
    d = model.rollout(ImplicitGuide(model, [4]), torch.rand(2, 3, 1), scored=False)
    assert d.z.requires_grad
    moments = roles._moments(d)
    assert not moments.loc.requires_grad and not moments.scale.requires_grad


def test_a_moment_guide_has_the_mean_and_deviation_of_the_draws() -> None:
    torch.manual_seed(0)
    model, draws = Folded(), 20_000
    guide = ImplicitGuide(model, [4])  # begins as a normal
    state, c_t = Nothing(torch.zeros(3, 1)), torch.rand(3, 1)
    normal = guide.proposal(state, c_t)
    loc, scale = normal.loc.detach(), 0.3 * normal.scale.detach()
    narrow = Implicit(loc, scale, normal.context, normal.net)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guide, "proposal", lambda *_: narrow)
        found = MomentGuide(model, guide, draws).proposal(state, c_t)
    error = scale / draws**0.5
    assert ((found.mean - loc).abs() < 5 * error).all()
    assert ((found.base_dist.scale - scale).abs() < 5 * error).all()


def test_what_has_no_density_says_so() -> None:
    model = Folded()
    guide, x = ImplicitGuide(model, [4]), torch.zeros(2, 1, 1)
    critic = Adversarial(FeedForwardCritic(1, 2, 4, view="joint"), role="ratio")
    for refuse in (
        lambda: ELBO()(model, guide, x),
        lambda: evaluate(model, guide, x),
        lambda: particle_filter(model, guide, x),
    ):
        with pytest.raises(
            NotImplementedError, match="an implicit guide has no density; train it"
        ):
            refuse()
    with pytest.raises(NotImplementedError):
        AVB(critic=critic, analytic_kl=True)(model, guide, x)
    with pytest.raises(NotImplementedError, match="a critic of role 'ratio' is no penalty"):
        ELBO(penalties=[critic])(model, FilteringGuide(model), x)
    with pytest.raises(ValueError, match="critic must have the role ratio or ratio_to_prior"):
        AVB(critic=Adversarial(FeedForwardCritic(1, 0, 4, view="marginal")))


def test_the_critic_is_shown_codes_in_units_of_their_moments() -> None:
    """A normal guide's codes are then standard normal, as those of the other side are."""
    torch.manual_seed(3)
    model = Folded()
    guide, x = FilteringGuide(model, [4]), torch.linspace(0.2, 2.0, 4000).reshape(-1, 1, 1)
    adversarial = Adversarial(FeedForwardCritic(1, 2, 4, view="joint"), role="ratio")
    with torch.no_grad():
        d = model.rollout(guide, x)
        narrow = dist.Normal(d.proposal.mean, 0.2).to_event(1)
        d = d._replace(proposal=narrow, z=narrow.sample())
        contrast, own = adversarial.role.codes(d, d.z, adversarial.view, False)
        moments = narrow.base_dist
    assert float(contrast.z.std()) == pytest.approx(1.0, abs=0.06)
    assert float(((d.z - moments.loc) / moments.scale - own.z).abs().median()) < 0.3
    assert float(own.z.std()) == pytest.approx(1.0, abs=0.15)  # 16 draws say what a unit is


@pytest.mark.parametrize("role", ["ratio", "ratio_to_prior"])
def test_with_the_exact_ratio_it_is_the_elbo(role: str) -> None:
    """Value and gradient, for a normal guide whose ratio is known."""
    torch.manual_seed(1)
    model = Folded()
    guide = FilteringGuide(model, [4])
    x = torch.linspace(0.2, 2.0, 4000).reshape(-1, 1, 1)
    critic = Adversarial(FeedForwardCritic(1, 2, 4, view="joint"), role=role)

    def ratio(densities: Any) -> Tensor:
        q = densities.proposal.base_dist
        return dist.Normal(q.loc.detach(), q.scale.detach()).log_prob(densities.z).squeeze(-1)

    right = critic.role.log_ratio

    def exact(_: Any, d: Any) -> tuple[Tensor, Tensor]:
        def score(u: Tensor, seen: Tensor, path: None) -> Tensor:
            r = torch.zeros_like(d.z[..., 0])
            if role == "ratio_to_prior":
                r = d.prior.log_prob(d.z)
            else:
                r = scores["log_r"](d)
            return ratio(d) - r

        return right(score, d)

    moments: list[Any] = []
    keep = roles._moments

    def remembered(d: Any) -> Any:
        moments.append(keep(d))
        return moments[-1]

    scores = {"log_r": lambda d: moments[-1].log_prob(d.z).sum(dim=-1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "_moments", remembered)
        critic.role = critic.role._replace(log_ratio=exact)
        torch.manual_seed(2)
        loss = AVB(critic=critic, num_particles=50)(model, guide, x) / len(x)
    torch.manual_seed(2)
    plain = ELBO(num_particles=50)(model, guide, x) / len(x)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=0.02)
    parameters = [p for p in guide.parameters()]
    for a, b in zip(*(torch.autograd.grad(v, parameters) for v in (loss, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
