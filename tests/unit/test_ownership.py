"""Who moves what: SVI the model and guide, the hook the critic, each phase its own parameters."""

from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from inference.adversarial import Adversarial
from inference.alternating import Alternating
from inference.constraints import Codes, Constraint, clip, gradient_penalty, spectral
from inference.divergences import wasserstein
from inference.objectives import ELBO
from inference.roles import VIEWS
from pyro_avrnn import recipes
from pyro_avrnn.critics import FeedForwardCritic, LSTMCritic
from pyro_avrnn.recipes import Recipe

X, Z, H, B, T = 3, 2, 8, 5, 4
#: constraint, the recipe's arguments for a critic it fits
CRITICS: dict[str, tuple[Callable[[], Constraint], dict[str, str]]] = {
    "lstm-penalty": (gradient_penalty, {}),
    "lstm-penalty-all": (lambda: gradient_penalty(on="all"), {}),
    "lstm-clip": (clip, {}),
    "feedforward-penalty": (gradient_penalty, {"critic": "feedforward"}),
    "feedforward-clip": (clip, {"critic": "feedforward"}),
    "feedforward-spectral": (spectral, {"critic": "feedforward", "lipschitz": "z"}),
    "feedforward-spectral-all": (
        spectral,
        {"critic": "feedforward", "lipschitz": "all", "critic_activation": "groupsort"},
    ),
}
CASES = [(critic, view) for critic in CRITICS for view in ("conditional", "joint", "trajectory")]


def build(critic: str, view: str = "conditional", steps: int = 2) -> tuple[Recipe, Adversarial]:
    constraint, arguments = CRITICS[critic]
    recipe = recipes.avrnn(X, Z, H, view=view, critic_dim=8, window=2, **arguments)
    assert recipe.critic is not None
    adversarial = Adversarial(
        recipe.critic, divergence=wasserstein(constraint()), critic_steps=steps
    )
    return recipe, adversarial


def data() -> tuple[Tensor, Tensor]:
    mask = torch.arange(T) < torch.tensor([4, 2, 1, 3, 4])[:, None]
    return torch.randn(B, T, X), mask


def snapshot(*modules: nn.Module | None) -> list[dict[str, Tensor]]:
    """Parameters and buffers."""
    return [
        {name: value.detach().clone() for name, value in module.state_dict().items()}
        for module in modules
        if module is not None
    ]


def identical(before: list[dict[str, Tensor]], *modules: nn.Module | None) -> bool:
    return all(
        old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        for old, new in zip(before, snapshot(*modules), strict=True)
    )


def parameters(*modules: nn.Module | None) -> Iterator[nn.Parameter]:
    for module in modules:
        if module is not None:
            yield from module.parameters()


class Moved:
    """Which parameters of model and guide move: parts such as ``decoder``, ``guide``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.before = self._values()

    def _values(self) -> dict[str, Tensor]:
        return {
            name: p.detach().clone()
            for prefix, module in (("", self.recipe.model), ("guide", self.recipe.guide))
            for name, p in module.named_parameters(prefix=prefix)
        }

    def parts(self) -> set[str]:
        """Parts of which every parameter moved; a part that moved in part is an error."""
        after = self._values()
        moved: dict[str, set[bool]] = {}
        for name, value in self.before.items():
            moved.setdefault(name.split(".")[0], set()).add(not torch.equal(value, after[name]))
        assert all(len(states) == 1 for states in moved.values()), moved
        return {part for part, states in moved.items() if True in states}


RECONSTRUCTION = {"decoder", "cell", "encode_x", "encode_z", "guide"}


@pytest.mark.parametrize(("critic", "view"), CASES)
def test_the_hook_moves_the_critic_alone_and_leaves_no_gradient(critic: str, view: str) -> None:
    recipe, adversarial = build(critic, view)
    others = snapshot(recipe.model, recipe.guide)
    own = snapshot(recipe.critic)
    adversarial.update(recipe.model, recipe.guide, *data())
    assert identical(others, recipe.model, recipe.guide)
    assert not identical(own, recipe.critic)
    assert all(p.grad is None for p in parameters(recipe.model, recipe.guide, recipe.critic))


def test_the_hook_leaves_a_gradient_that_is_there_as_it_is() -> None:
    recipe, adversarial = build("feedforward-penalty")
    recipe.model.rollout(recipe.guide, *data()).log_weight.sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in parameters(recipe.model)]
    adversarial.update(recipe.model, recipe.guide, *data())
    after = [p.grad for p in parameters(recipe.model)]
    for a, b in zip(before, after, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize(("critic", "view"), CASES)
def test_an_svi_step_leaves_the_critic_as_it_is_buffers_included(critic: str, view: str) -> None:
    recipe, adversarial = build(critic, view)
    assert recipe.critic is not None
    adversarial.update(recipe.model, recipe.guide, *data())
    assert recipe.critic.training
    before, moved = snapshot(recipe.critic), Moved(recipe)
    objective = ELBO(penalties=[adversarial])
    SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-3}), objective).step(*data())
    assert identical(before, recipe.critic)
    assert recipe.critic.training
    assert all(p.grad is None for p in recipe.critic.parameters())
    assert moved.parts() == RECONSTRUCTION | {"prior"}


def test_a_forward_pass_in_training_mode_would_move_the_buffers() -> None:
    # what the two tests above would miss if a penalty did not put the critic in eval mode
    critic = FeedForwardCritic(Z, 0, 8, lipschitz="z")
    before = snapshot(critic)
    critic(torch.randn(T, 1, B, Z))
    assert not identical(before, critic)


def reconstruction_step(recipe: Recipe) -> set[str]:
    moved = Moved(recipe)
    objective = ELBO(kl_weight=0.0)
    SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": 1e-3}), objective).step(*data())
    return moved.parts()


@pytest.mark.parametrize("guide", ["residual", "filtering"])
def test_reconstruction_moves_all_but_the_prior(guide: str) -> None:
    recipe = recipes.avrnn(X, Z, H, guide=guide, critic_dim=8)
    before = snapshot(recipe.critic)
    assert reconstruction_step(recipe) == RECONSTRUCTION
    assert identical(before, recipe.critic)


def test_a_residual_guide_lets_reconstruction_move_the_prior_on_request() -> None:
    recipe = recipes.avrnn(X, Z, H, guide="residual", prior_gradient=True, critic_dim=8)
    assert reconstruction_step(recipe) == RECONSTRUCTION | {"prior"}


@pytest.mark.parametrize("detach_state", [True, False])
@pytest.mark.parametrize("guide", ["residual", "filtering"])
@pytest.mark.parametrize("view", ["conditional", "trajectory_redrawn"])
def test_the_adversarial_step_moves_exactly_prior_and_guide(
    view: str, guide: str, detach_state: bool
) -> None:
    recipe = recipes.avrnn(X, Z, H, guide=guide, view=view, critic_dim=8)
    assert recipe.critic is not None
    adversarial = Adversarial(recipe.critic, divergence=wasserstein(clip()), critic_steps=0)
    alternating = Alternating(
        adversarial,
        recipe.model.prior.parameters(),
        recipe.guide.parameters(),
        lr=1e-3,
        detach_state=detach_state,
    )
    moved, before = Moved(recipe), snapshot(recipe.critic)
    alternating.update(recipe.model, recipe.guide, *data())
    assert moved.parts() == {"prior", "guide"}
    assert identical(before, recipe.critic)
    assert all(p.grad is None for p in parameters(recipe.model, recipe.guide, recipe.critic))


def test_both_phases_of_algorithm_2_move_prior_guide_and_critic() -> None:
    recipe = recipes.avrnn(X, Z, H, critic_dim=8)
    assert recipe.critic is not None
    optim = torch.optim.RMSprop(recipe.critic.parameters(), lr=5e-5)
    adversarial = Adversarial(
        recipe.critic, divergence=wasserstein(clip()), optim=optim, critic_steps=5
    )
    alternating = Alternating(
        adversarial, recipe.model.prior.parameters(), recipe.guide.parameters()
    )
    moved, before = Moved(recipe), snapshot(recipe.critic)
    metrics = alternating.update(recipe.model, recipe.guide, *data())
    assert moved.parts() == {"prior", "guide"}
    assert not identical(before, recipe.critic)
    assert all(p.grad is None for p in parameters(recipe.model, recipe.guide, recipe.critic))
    assert {"critic_loss", "critic_distance", "critic_penalty", "closed_form_kl"} <= set(metrics)


@pytest.mark.parametrize(("critic", "view"), CASES)
def test_the_penalty_reaches_prior_and_guide_and_not_the_critic(critic: str, view: str) -> None:
    recipe, adversarial = build(critic, view)
    densities = recipe.model.rollout(recipe.guide, *data())
    adversarial.penalty(densities).backward()
    for module in (recipe.model.prior, recipe.guide):
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert all(p.grad is None for p in parameters(recipe.critic, recipe.model.decoder))


@pytest.mark.parametrize("critic", ["lstm-clip", "feedforward-clip"])
def test_clipping_keeps_every_weight_within_its_bound(critic: str) -> None:
    recipe, adversarial = build(critic)
    assert recipe.critic is not None
    assert max(float(p.detach().abs().max()) for p in recipe.critic.parameters()) > 0.01
    for _ in range(3):
        adversarial.update(recipe.model, recipe.guide, *data())
        assert all(float(p.detach().abs().max()) <= 0.01 for p in recipe.critic.parameters())


@pytest.mark.parametrize("own_paths", [False, True])
@pytest.mark.parametrize("on", ["z", "all"])
def test_the_gradient_penalty_differentiates_an_lstm_twice(on: str, own_paths: bool) -> None:
    critic = LSTMCritic(Z, X, 6)
    with torch.no_grad():  # slopes above one, or there is nothing to penalise
        for p in critic.parameters():
            p.mul_(4.0)
    z, path, context = torch.randn(2, T, 1, B, Z), torch.randn(T, 1, B, Z), torch.randn(T, 1, B, X)
    prior, posterior = (Codes(code, context, code if own_paths else path) for code in z)
    mask = data()[1].t().unsqueeze(1)

    def cost() -> Tensor:
        torch.manual_seed(7)  # the same mixtures
        return torch.as_tensor(gradient_penalty(on=on).cost(critic, prior, posterior, mask))

    direction = [torch.randn_like(p) for p in critic.parameters()]
    # the last bias shifts all scores alike, so no slope depends on it
    gradients = torch.autograd.grad(cost(), list(critic.parameters()), allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(critic.parameters(), direction, strict=True):
                p.add_(d, alpha=sign * 1e-6)
        sides.append(cost().detach())
        with torch.no_grad():
            for p, d in zip(critic.parameters(), direction, strict=True):
                p.sub_(d, alpha=sign * 1e-6)
    assert sides[0] > 0.01
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_spectral_needs_a_critic_that_is_normalised() -> None:
    for kind in (FeedForwardCritic, LSTMCritic):
        with pytest.raises(ValueError, match="lipschitz='z' or 'all'"):
            Adversarial(kind(Z, H, 8, view="conditional"), divergence=wasserstein(spectral()))


@pytest.mark.parametrize("view", ["everything", None])
def test_a_critic_of_no_known_view_lists_the_known(view: str | None) -> None:
    with pytest.raises(
        ValueError, match=f"one of {', '.join(VIEWS)} or a function, .* is {view!r}"
    ):
        Adversarial(FeedForwardCritic(Z, H, 8, view=view))
