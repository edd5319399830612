"""What the critic sees decides what is lost: a joint critic collapses, a conditional one need not.

All runs add a critic and no KL (``kl_weight=0``). Driving a joint critic to zero makes q = p, so
z carries nothing; driving a conditional critic to zero leaves the information of z_t on x_t.
"""

import math
from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from inference.adversarial import Adversarial, closed_forms
from inference.constraints import spectral
from inference.divergences import wasserstein
from inference.information import RateSplit, rate_split
from inference.objectives import ELBO
from inference.schedules import Ramp, Schedule
from inference.training import fit
from pyro_avrnn import recipes
from pyro_avrnn.data import vowels
from pyro_avrnn.recipes import Recipe

Data = tuple[Tensor, Tensor]


def train(
    recipe: Recipe,
    data: Data,
    *,
    weight: float | Schedule,
    steps: int,
    batch_size: int,
    lr: float,
    standardise: bool = False,
) -> None:
    """The joint schedule: reconstruction and a critic's penalty, no KL; rates decay."""
    assert recipe.critic is not None
    for module in (recipe.model, recipe.guide, recipe.critic):
        module.to(torch.float32)
    adversarial = Adversarial(
        recipe.critic,
        divergence=wasserstein(spectral()),
        optim=torch.optim.Adam(recipe.critic.parameters(), lr=5e-3, betas=(0.5, 0.9)),
        critic_steps=3,
        weight=weight,
        standardise=standardise,
    )
    regularised = weight != 0.0
    objective = ELBO(penalties=[adversarial] if regularised else [], kl_weight=0.0)
    order = torch.randperm(len(data[0])).split(batch_size)
    fit(
        SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": lr}), objective),
        [(data[0][i], data[1][i]) for i in order],
        steps=steps,
        hooks=[adversarial.update] if regularised else [],
        lr_schedule=Ramp(1.0, 0.05),
        progress=False,
    )


def closed_form_kl(recipe: Recipe, data: Data) -> float:
    """Nats a frame."""
    with torch.no_grad():
        return closed_forms(recipe.model.rollout(recipe.guide, *data))["closed_form_kl"]


def collapsed(kl: float) -> bool:
    return kl < 0.05


@pytest.mark.parametrize("weight", [30.0, 0.0])
def test_a_joint_critic_collapses_a_vrnn_of_vowels(weight: float) -> None:
    data = vowels()
    recipe = recipes.avrnn(
        data.x_dim,
        4,
        24,
        view="joint",
        critic="feedforward",
        critic_dim=32,
        lipschitz="z",
        critic_activation="groupsort",
        min_scale=0.1,
    )
    train(
        recipe,
        (data.train.x[:, :12], data.train.mask[:, :12]),
        weight=weight,
        steps=300,
        batch_size=48,
        lr=3e-3,
        standardise=True,  # else prior and proposal shrink together, which costs no distance
    )
    kl = closed_form_kl(recipe, (data.test.x, data.test.mask))
    print(f"weight {weight}: KL {kl:.4f}")
    assert collapsed(kl) == (weight > 0)


# Frames independent of each other: nothing but z_t can tell x_t, and p(x_t) is known, so
# E log p(x_t | z_t, h_t) + entropy is a lower bound on the information (Barber and Agakov 2003).
ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
FLOOR = 0.6  # of the decoder's scale, with which that bound is
HIGHEST = 0.5 - math.log(FLOOR)  # 1.01 nats, where z tells x exactly


@dataclass(frozen=True)
class Outcome:
    kl: float
    information_at_least: float
    split: RateSplit


def late(progress: float) -> float:
    """The weight: 0 until the code is in use, then up to 8; noise would drown it otherwise."""
    return 8.0 * min(max((progress - 0.2) / 0.1, 0.0), 1.0)


def outcome(view: str | None) -> Outcome:
    """Held-out numbers after training with a critic of this view, or with none."""
    torch.manual_seed(1)
    x, x_test = torch.randn(2, 512, 3, 1, dtype=torch.float32)
    mask = torch.ones(512, 3, dtype=torch.bool)
    recipe = recipes.avrnn(
        1,
        1,
        16,
        prior="standard",
        view=view or "joint",
        critic="feedforward",
        critic_dim=32,
        lipschitz="z",
        critic_activation="groupsort",
        min_scale=FLOOR,
    )
    pyro.clear_param_store()
    train(
        recipe,
        (x, mask),
        weight=late if view else 0.0,
        steps=300,
        batch_size=128,
        lr=5e-3,
    )
    with torch.no_grad():
        emission = recipe.model.rollout(recipe.guide, x_test, mask).log_emission
    result = Outcome(
        closed_form_kl(recipe, (x_test, mask)),
        float(emission.mean()) + ENTROPY,
        rate_split(recipe.model, recipe.guide, (x, mask), (x_test, mask)),
    )
    print(view, result)
    return result


def test_a_conditional_critic_keeps_the_information_that_a_joint_critic_removes() -> None:
    reference, conditional, joint = outcome(None), outcome("conditional"), outcome("joint")
    assert reference.information_at_least > 0.7 * HIGHEST
    # paid: the mismatch, nearly all of it; kept: more than half of the information
    assert reference.split.aggregate_mismatch_at_least > 0.3
    assert conditional.split.aggregate_mismatch_at_least < 0.1
    assert conditional.information_at_least > 0.5 * HIGHEST
    assert conditional.split.information_at_most > conditional.information_at_least
    assert not collapsed(conditional.kl)
    # a joint critic on the same task leaves nothing, at the same weight
    assert collapsed(joint.kl)
    assert joint.information_at_least < 0.05
