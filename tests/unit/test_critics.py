import pytest
import torch
from torch.func import functional_call

from inference.adversarial import closed_forms
from inference.divergences import normal_parameters, wasserstein2
from pyro_avrnn import recipes
from pyro_avrnn.critics import GroupSort, LSTMCritic


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
