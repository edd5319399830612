"""Every pair of parts learns: short trainings by the ELBO, by FIVO, and with a critic.

The calls are those of ``table.pairwise``, in which every allowed pair of parts meets. Data are
noisy sines that any of these models can learn something of in 20 steps; that a loss falls is
judged on the same data with the same random numbers before and after.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from inference import (
    ELBO,
    FIVO,
    Adversarial,
    fit,
    spectral,
    wasserstein,
)
from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe
from tests.unit.table import EMITTED, H, X, Z, build, fitted, pairwise, prefix_mask

COVER = {"-".join(call.values()): call for call in pairwise()}
#: the other half of the cases is slow: of FIVO that which learns by a critic, and the reverse
BY_FIVO, BY_A_CRITIC = (
    [pytest.param(c, marks=pytest.mark.slow if i % 2 == half else ()) for i, c in enumerate(COVER)]
    for half in (0, 1)
)
STEPS = 20


def sines(recipe: Recipe, size: int = 12) -> tuple[Tensor, Tensor]:
    """Noisy sines of all phases, those of a sequence alike, in the support; a ragged batch."""
    generator = torch.Generator().manual_seed(3)
    phase = 2 * math.pi * torch.rand(size, 1, 1, generator=generator)
    time = torch.arange(6.0).reshape(1, -1, 1)
    noise = torch.randn(size, 6, X, generator=generator)
    x = 1.5 * torch.sin(time + phase + 0.5 * torch.arange(X)) + 0.5 * noise
    return fitted(recipe, x), prefix_mask((6, 4, 5) * (size // 3))


def value(recipe: Recipe, loss: Callable[..., Tensor], data: tuple[Tensor, Tensor]) -> float:
    """The loss in nats a frame, averaged over draws that are the same at every call."""
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(11)
        draws = [loss(recipe.model, recipe.guide, *data) for _ in range(4)]
    return float(torch.stack(draws).mean() / data[1].sum())


def gain(
    recipe: Recipe, loss: Any, hooks: tuple[Callable[..., Any], ...] = (), minimised: Any = None
) -> float:
    """By how much the loss fell when it was minimised (or ``minimised`` was), nats a frame."""
    data = sines(recipe)
    before = value(recipe, loss, data)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-2}), minimised or loss)
    fit(svi, [data], steps=STEPS, hooks=hooks, seed=0, progress=False)
    pyro.clear_param_store()
    return before - value(recipe, loss, data)


@pytest.mark.parametrize("case", COVER)
def test_the_elbo_learns(case: str) -> None:
    found = gain(build(**COVER[case]), ELBO())
    print(f"{case}: {found:.3f}")
    assert found > 0.02


@pytest.mark.parametrize("case", BY_FIVO)
def test_fivo_learns(case: str) -> None:
    found = gain(build(**COVER[case]), FIVO(num_particles=4))
    print(f"{case}: {found:.3f}")
    assert found > 0.02


def with_a_critic(call: dict[str, str]) -> Recipe:
    """As ``build``, with the critic of the README."""
    given = {k: v for k, v in call.items() if k != "model"}
    torch.manual_seed(5)
    return recipes.avrnn(
        X,
        Z,
        H,
        base=call["model"],
        emission_options=EMITTED[call["emission"]],
        view="conditional",
        critic="feedforward",
        critic_dim=8,
        lipschitz="z",
        critic_activation="groupsort",
        **given,
    )


@pytest.mark.parametrize("case", BY_A_CRITIC)
def test_an_adversarial_training_learns(case: str) -> None:
    recipe = with_a_critic(COVER[case])
    assert recipe.critic is not None
    before = {name: p.clone() for name, p in recipe.critic.named_parameters()}
    adversarial = Adversarial(recipe.critic, divergence=wasserstein(spectral()), weight=0.1)
    # a critic of z_t does not price a latent that all steps share
    loss = ELBO(penalties=[adversarial], kl_weight=0.1 if recipe.model.f_dim else 0.0)
    found = gain(recipe, loss, (adversarial.update,))
    print(f"{case}: {found:.3f}")
    assert found > 0.02
    # but for a constant added to all scores, of which no distance depends
    moved = [
        name for name, p in recipe.critic.named_parameters() if not torch.equal(p, before[name])
    ]
    assert len(moved) >= len(before) - 1


def test_the_criterion_rejects_a_training_uphill() -> None:
    recipe = build(**next(iter(COVER.values())))
    assert gain(recipe, ELBO()) > 0.02
    assert not gain(recipe, ELBO(), minimised=lambda *args: -ELBO()(*args)) > 0.02
