import pytest
import torch
from torch import nn
from torch.func import functional_call

from inference.adversarial import closed_forms
from inference.divergences import normal_parameters, wasserstein2
from pyro_avrnn import recipes
from pyro_avrnn.critics import FeedForwardCritic, GroupSort, LSTMCritic
from tests.unit.table import prefix_mask


def test_lstm_critic_scores_a_code_s_own_path_in_one_pass() -> None:
    critic, z = LSTMCritic(z_dim=3, critic_dim=6), torch.randn(5, 2, 4, 3)
    one_pass, step_by_step = critic(z, None, z), critic(z, None, z.clone())
    torch.testing.assert_close(one_pass, step_by_step, rtol=1e-10, atol=1e-12)
    fast, slow = (
        torch.autograd.grad(scores.square().sum(), list(critic.parameters()))
        for scores in (one_pass, step_by_step)
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_pass_uses_the_weights_it_is_given() -> None:
    critic, z = LSTMCritic(z_dim=3, critic_dim=6), torch.randn(5, 2, 4, 3)
    doubled = {name: 2 * p.detach() for name, p in critic.named_parameters()}
    one_pass = functional_call(critic, doubled, (z, None, z))
    torch.testing.assert_close(one_pass, functional_call(critic, doubled, (z, None, z.clone())))
    assert not torch.allclose(one_pass, critic(z, None, z))
    assert not one_pass.requires_grad


def test_group_sort_keeps_the_norm_of_values_and_gradient() -> None:
    x = torch.randn(7, 8, requires_grad=True)
    y = GroupSort()(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(gradient.norm(dim=-1), g.norm(dim=-1))


@pytest.mark.parametrize("standardise", [False, True])
def test_closed_form_w2_stands_in_the_units_of_the_critics_number(standardise: bool) -> None:
    r = recipes.vrnn(3, 2, 5)
    d = r.model.rollout(r.guide, torch.randn(4, 6, 3))
    (mu_q, sigma_q), (mu_p, sigma_p) = (normal_parameters(f) for f in (d.proposal, d.prior))
    unit = sigma_p if standardise else 1.0
    expected = torch.cat([(mu_q - mu_p) / unit, (sigma_q - sigma_p) / unit], dim=-1).norm(dim=-1)
    found = wasserstein2(d, standardise=standardise)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    value = closed_forms(d, standardise=standardise)["closed_form_w2"]
    assert value == pytest.approx(expected.mean().item(), rel=1e-10)


def test_closed_forms_are_averages_over_observed_frames() -> None:
    r, mask = recipes.vrnn(3, 2, 5), prefix_mask((6, 2, 1, 4))
    d = r.model.rollout(r.guide, torch.randn(4, 6, 3), mask, num_particles=3)
    (mu_q, sigma_q), (mu_p, sigma_p) = (normal_parameters(f) for f in (d.proposal, d.prior))
    w2 = torch.cat([mu_q - mu_p, sigma_q - sigma_p], dim=-1).norm(dim=-1)
    square = (sigma_q.square() + (mu_q - mu_p).square()) / sigma_p.square()
    kl = 0.5 * (square - 1.0 + 2.0 * (sigma_p / sigma_q).log()).sum(dim=-1)
    observed = d.mask.expand_as(kl)
    found = closed_forms(d)
    assert found["closed_form_w2"] == pytest.approx(w2[observed].mean().item(), rel=1e-10)
    assert found["closed_form_kl"] == pytest.approx(kl[observed].mean().item(), rel=1e-10)
    assert not wasserstein2(d)[~observed].any() and w2[~observed].all()


@pytest.mark.parametrize("lipschitz", ["z", "all"])
def test_every_layer_that_z_passes_has_norm_one(lipschitz: str) -> None:
    critic = FeedForwardCritic(3, 2, 8, depth=3, lipschitz=lipschitz, activation="groupsort")
    for _ in range(200):  # of the power iteration, one step a pass in training mode
        critic(torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 2))
    layers = [m for part in (critic.first, critic.rest) for m in part.modules()]
    norms = [torch.linalg.matrix_norm(m.weight, 2) for m in layers if isinstance(m, nn.Linear)]
    assert len(norms) == 4
    torch.testing.assert_close(torch.stack(norms), torch.ones(4), rtol=1e-3, atol=0.0)
