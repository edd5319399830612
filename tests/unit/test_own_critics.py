"""The check of a critic accepts right ones, and names each planted fault."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference import Adversarial, spectral, wasserstein
from inference.divergences import DIVERGENCES, Divergence
from pyro_avrnn.critics import FeedForwardCritic, LSTMCritic
from pyro_avrnn.testing import check_critic


def feedforward(**options: Any) -> FeedForwardCritic:
    torch.manual_seed(0)
    return FeedForwardCritic(2, 3, 16, view="conditional", **options)


class Own(nn.Module):
    """A critic of a user's own."""

    view = "conditional"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, z: Tensor, context: Tensor, path: None) -> Tensor:
        return self.net(torch.cat([z, context], dim=-1)).squeeze(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_library_s_own_pass(name: str) -> None:
    adversarial = Adversarial(feedforward(), divergence=DIVERGENCES[name]())
    before = [p.clone() for p in adversarial.critic.parameters()]
    check_critic(adversarial, 2, 3, 4)
    assert all(map(torch.equal, before, adversarial.critic.parameters()))


def test_other_networks_pass() -> None:
    check_critic(Adversarial(Own()), 2, 3, 4)
    check_critic(Adversarial(LSTMCritic(2, 7, 8, view="joint")), 2, 3, 4, steps=100)
    critic = feedforward(lipschitz="z", activation="groupsort")
    check_critic(Adversarial(critic, divergence=wasserstein(spectral())), 2, 3, 4)


class Wide(Own):
    def forward(self, z: Tensor, context: Tensor, path: None) -> Tensor:
        return super().forward(z, context, path).unsqueeze(-1)


class Deaf(Own):
    def forward(self, z: Tensor, context: Tensor, path: None) -> Tensor:
        return super().forward(z.detach(), context, path)


class Neighbour(Own):
    """Scores depend on the other sequences, padded ones among them."""

    def forward(self, z: Tensor, context: Tensor, path: None) -> Tensor:
        return super().forward(z - z.mean(dim=2, keepdim=True), context, path)


def flipped() -> Divergence:
    right = wasserstein()
    return right._replace(penalty=lambda p, q: -right.penalty(p, q))


FAULTS: dict[str, tuple[Any, str]] = {
    "wide": (lambda: Adversarial(Wide()), r"not \(T, K, B\)"),
    "deaf": (lambda: Adversarial(Deaf()), "does not reach prior and proposal"),
    "neighbour": (lambda: Adversarial(Neighbour()), "the penalty reads padded codes"),
    "flipped": (
        lambda: Adversarial(Own(), divergence=flipped()),
        "pushes prior and proposal apart",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    make, sentence = FAULTS[fault]
    with pytest.raises(AssertionError, match=sentence):
        check_critic(make(), 2, 3, 4)
