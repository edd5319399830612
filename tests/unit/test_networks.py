"""What all networks share: their activations."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pyro_avrnn import recipes
from pyro_avrnn.cli.compare import _shown
from pyro_avrnn.networks import ACTIVATIONS, MLP
from tests.unit.table import H, X, Z


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("emission", ["normal", "bernoulli"])
def test_every_hidden_layer_has_the_activation_asked_for(name: str, emission: str) -> None:
    made = (
        recipes.rnn(X, H, emission, activation=name),
        recipes.vrnn(X, Z, H, emission, activation=name),
        recipes.vrnn(X, Z, H, emission, guide="residual", activation=name),
        recipes.avrnn(X, Z, H, emission, hidden_activation=name),
    )
    for r in made:
        found = [
            type(layer)
            for part in (r.model, r.guide)
            for mlp in part.modules()
            if isinstance(mlp, MLP)
            for layer in mlp
            if not isinstance(layer, nn.Linear)
        ]
        assert len(found) >= 2 and set(found) == {ACTIVATIONS[name]}


def test_an_unknown_activation_is_refused_and_a_known_one_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activation must be one of relu, elu, silu, tanh"):
        recipes.vrnn(X, Z, H, activation="step")
    r = recipes.vrnn(X, Z, H, activation="tanh")
    recipes.save(r, tmp_path / "r.pt")
    again = recipes.load(tmp_path / "r.pt")
    x = torch.randn(2, 3, X)
    densities = []
    for made in (r, again):
        torch.manual_seed(1)
        densities.append(made.model.rollout(made.guide, x).log_weight)
    assert torch.equal(*densities)


def test_a_training_without_a_number_has_a_word_in_the_bar() -> None:
    row = {"row": "elbo", "seed": 3}
    assert _shown({**row, "iwae_per_frame": None}) == "elbo seed 3: stopped"
    assert _shown({**row, "iwae_per_frame": -1.23456}) == "elbo seed 3: -1.235"
