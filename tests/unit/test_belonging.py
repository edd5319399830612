"""A guide belongs to the model it was built for; what does not fit says so in one sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inference import (
    ELBO,
    FIVO,
    Adversarial,
    Alternating,
    calibrate,
    evaluate,
    particle_filter,
    wasserstein,
)
from inference.constraints import gradient_penalty
from pyro_avrnn import recipes
from pyro_avrnn.models import GlobalGuide
from tests.unit.table import H, X, Z

SENTENCE = r"^guide \w+ was built for another model, .*, and does not fit this one, .*$"
USES: dict[str, Callable[..., Any]] = {
    "rollout": lambda m, g, x: m.rollout(g, x),
    "elbo": lambda m, g, x: ELBO()(m, g, x),
    "fivo": lambda m, g, x: FIVO()(m, g, x),
    "filter": lambda m, g, x: particle_filter(m, g, x, num_particles=2),
    "evaluate": lambda m, g, x: evaluate(m, g, x, torch.ones(2, 3, dtype=torch.bool)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("other", ["rnn", "vrnn", "srnn", "dsae"])
def test_the_guide_of_another_model_is_refused(other: str, use: str) -> None:
    sizes = {"x_dim": X, "h_dim": H} | ({} if other == "rnn" else {"z_dim": Z})
    model, guide = recipes.vrnn(X, Z, H).model, recipes.RECIPES[other](**sizes).guide
    with pytest.raises(ValueError, match=SENTENCE):
        USES[use](model, guide, torch.zeros(2, 3, X))


def test_sizes_of_both_models_are_named() -> None:
    model, guide = recipes.vrnn(X, Z, H).model, recipes.vrnn(X, Z + 1, H).guide
    with pytest.raises(ValueError, match=rf"z_dim {Z + 1}, .* z_dim {Z}, "):
        model.rollout(guide, torch.zeros(2, 3, X))


def test_a_global_guide_takes_a_local_one_of_its_own_model() -> None:
    model, other = recipes.dsae(X, Z, H).model, recipes.dsae(X, Z, H).guide
    with pytest.raises(ValueError, match=SENTENCE):
        GlobalGuide(model, other)


def test_a_critic_alone_does_not_price_a_shared_latent() -> None:
    r = recipes.avrnn(X, Z, H, base="dsae", critic_dim=4)
    assert r.critic is not None
    critic = Adversarial(r.critic, divergence=wasserstein(gradient_penalty()))
    x = torch.zeros(2, 3, X)
    with pytest.raises(NotImplementedError, match="nothing would price the latent f"):
        ELBO(penalties=[critic], kl_weight=0.0)(r.model, r.guide, x)
    assert ELBO(penalties=[critic], kl_weight=0.1)(r.model, r.guide, x).isfinite()


def test_the_alternating_schedule_does_not_price_a_shared_latent() -> None:
    r = recipes.avrnn(X, Z, H, base="dsae", critic_dim=4)
    assert r.critic is not None
    critic = Adversarial(r.critic, divergence=wasserstein(gradient_penalty()))
    alternating = Alternating(critic, r.model.parameters(), r.guide.parameters())
    with pytest.raises(NotImplementedError, match="nothing would price the latent f"):
        alternating.update(r.model, r.guide, torch.zeros(2, 3, X))


def test_a_shared_latent_is_not_ranked() -> None:
    r = recipes.dsae(X, Z, H)
    with pytest.raises(NotImplementedError, match="calibrate ranks the latents of steps"):
        calibrate(r.model, r.guide, torch.ones(2, 3, dtype=torch.bool), num_simulations=100)
