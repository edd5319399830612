"""What all networks share: activations, sizes that agree, recurrent cells and encoders."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy.special import expit
from torch import Tensor, nn

from inference.protocols import at_least
from pyro_avrnn import recipes
from pyro_avrnn.networks import (
    ACTIVATIONS,
    CELLS,
    DIRECTIONS,
    MLP,
    Cell,
    Loudness,
    NormalNetwork,
    RecurrentEncoder,
    by_size,
    dropped,
)
from pyro_avrnn.shapes import agree, broadcast_cat, width
from tests.unit.table import H, X, Z, assert_close, prefix_mask


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("emission", ["normal", "bernoulli"])
def test_every_hidden_layer_has_the_activation_asked_for(name: str, emission: str) -> None:
    made = (
        recipes.rnn(X, H, emission, activation=name),
        recipes.vrnn(X, Z, H, emission, activation=name),
        recipes.vrnn(X, Z, H, emission, guide="residual", activation=name),
        recipes.avrnn(X, Z, H, emission, activation=name),
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


def test_parts_that_agree_and_parts_that_do_not_say() -> None:
    agree("h", cell=4, prior=4)
    agree("h", cell=4, prior=None)
    agree("h", cell=None, prior=None)
    sentence = "parts must agree on the width of h, got cell: 4 and prior: 5; build them alike"
    with pytest.raises(ValueError, match=sentence):
        agree("h", cell=4, prior=5, decoder=None)


def test_the_width_of_parts_together() -> None:
    net = MLP([3, 4, 5])
    assert width("out_dim", net) == 5 and width("in_dim", net) == 3
    assert width("out_dim", net, net, 2) == 12
    assert width("out_dim", net, nn.Identity()) is None and width("out_dim", None) is None
    assert width("out_dim") == 0


def test_concatenation_broadcasts_what_leads() -> None:
    a, b, c = torch.randn(4, 1, 3, 2), torch.randn(5, 3, 1), torch.randn(3, 2)
    found = broadcast_cat(a, b, c)
    assert found.shape == (4, 5, 3, 5)
    assert torch.equal(found[2, 3, 1], torch.cat([a[2, 0, 1], b[3, 1], c[1]]))
    assert torch.equal(broadcast_cat(c, c), torch.cat([c, c], dim=-1))


def test_a_number_below_its_limit_is_named() -> None:
    at_least(1, size=1, length=2)
    with pytest.raises(ValueError, match="^length must be at least 1, got 0; use another$"):
        at_least(1, "; use another", size=1, length=0)


# recurrent cells


class Sum(Cell):
    """The least that a cell must write."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        return memory + self.scale * inputs


def test_memory_starts_at_zero_and_its_first_part_is_the_output() -> None:
    for cell, size in ((Sum(), 2), (CELLS["gru"](2, 2), 2), (CELLS["lstm"](2, 2), 4)):
        start = cell.initial(torch.Size((3, 4)))
        assert torch.equal(start, torch.zeros(3, 4, size))
        memory = cell(torch.ones(2), start)
        assert memory.shape == start.shape
        assert torch.equal(cell.output(memory), memory[..., :2])
    assert cell.float().initial(torch.Size(())).dtype == torch.float32


# recurrent encoders

LENGTHS = (4, 1, 3, 2)


def gru(net: nn.GRU, inputs: ndarray) -> list[ndarray]:
    """Outputs after every step of ``(T, C)``, in numpy; gates reset, update, new."""
    w = {name: value.detach().numpy() for name, value in net.named_parameters()}
    h, outputs = np.zeros(net.hidden_size), []
    for v in inputs:
        by_x = np.split(w["weight_ih_l0"] @ v + w["bias_ih_l0"], 3)
        by_h = np.split(w["weight_hh_l0"] @ h + w["bias_hh_l0"], 3)
        reset, update = (expit(by_x[i] + by_h[i]) for i in range(2))
        h = (1.0 - update) * np.tanh(by_x[2] + reset * by_h[2]) + update * h
        outputs.append(h)
    return outputs


def read_one_by_one(encoder: RecurrentEncoder, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs ``(T_b, C)`` and summary of each sequence by itself, backward ones reversed."""
    found = []
    for series, length in zip(x.numpy(), LENGTHS, strict=True):
        columns, ends = [], []
        if encoder.along is not None:
            columns.append(gru(encoder.along, series[:length]))
            ends.append(columns[-1][-1])
        if encoder.against is not None:
            columns.append(gru(encoder.against, series[:length][::-1])[::-1])
            ends.append(columns[-1][0])
        outputs = np.concatenate([np.stack(column) for column in columns], axis=1)
        found.append((torch.tensor(outputs), torch.tensor(np.concatenate(ends))))
    return found


def compare_with_one_by_one(encoder: RecurrentEncoder, mask: Tensor) -> None:
    x = torch.randn(len(LENGTHS), max(LENGTHS), 3)
    with torch.no_grad():
        outputs, summary = encoder(x, mask), encoder.summary(x, mask)
    assert outputs.shape == (len(LENGTHS), max(LENGTHS), encoder.out_dim)
    for b, (own, end) in enumerate(read_one_by_one(encoder, x)):
        assert_close(outputs[b, : len(own)], own, f"outputs of sequence {b}")
        assert_close(summary[b], end, f"summary of sequence {b}")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_recurrent_encoder_reads_each_sequence_by_itself(direction: str) -> None:
    encoder = RecurrentEncoder(3, 5, direction)
    assert encoder.out_dim == (10 if direction == "both" else 5)
    assert encoder.smoothing == (direction != "forward")
    mask = prefix_mask(LENGTHS)
    compare_with_one_by_one(encoder, mask)
    with pytest.raises(AssertionError, match="of sequence 1"):  # were padding read
        compare_with_one_by_one(encoder, torch.ones_like(mask))


def test_a_sequence_of_padding_alone_is_read_without_complaint() -> None:
    mask = prefix_mask(LENGTHS)
    mask[2] = False
    encoder = RecurrentEncoder(3, 5, "both")
    assert encoder.summary(torch.randn(*mask.shape, 3), mask).isfinite().all()


def test_an_unknown_direction_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of forward, backward, both, got 'sideways'"):
        RecurrentEncoder(3, 5, "sideways")


def test_a_scale_has_the_floor_and_the_bias_it_was_given() -> None:
    network = NormalNetwork(2, 1, (), min_scale=0.25, scale_bias=-3.0)
    for p in network.parameters():
        nn.init.zeros_(p)
    _, scale = network.parameters_of(torch.zeros(2))
    assert scale.item() == pytest.approx(0.25 + math.log1p(math.exp(-3.0)), rel=1e-12)


# ---- waveforms in units of their loudness ----


def test_a_piece_twice_as_loud_differs_by_a_known_number_alone() -> None:
    torch.manual_seed(0)
    network, x = Loudness([X, H]).double(), 1e5 * torch.randn(4, X).double()
    first = network[0]
    assert isinstance(first, nn.Linear)
    louder = network(2.0 * x) - network(x)
    assert_close(louder, (math.log(2.0) * first.weight[:, -1]).expand_as(louder))


def test_silence_is_read_as_silence() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -4.0], [1e-6, 0.0]], dtype=torch.double)
    scaled, size = by_size(x)
    assert_close(size[:2, 0], torch.tensor([1e-3, math.sqrt(12.5 + 1e-6)]).double())
    assert_close(scaled * size, x)
    assert scaled[0].eq(0.0).all() and scaled[2].abs().max() < 0.01


def test_features_of_a_recipe_are_kept_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    r = recipes.vrnn(X, Z, H, features="loudness", guide="smoothing")
    recipes.save(r, tmp_path / "r.pt")
    again = recipes.load(tmp_path / "r.pt")
    assert isinstance(again.model.encode_x, Loudness)
    x = torch.randn(2, 3, X)
    assert torch.equal(again.model.encode_x(x), r.model.encode_x(x))
    with pytest.raises(ValueError, match="features must be one of mlp, loudness"):
        recipes.rnn(X, H, features="loud")


def test_dropout_zeroes_a_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x, p = torch.full((200, 500), 3.0), 0.2
    found = dropped(x, p)
    zero = float((found == 0.0).double().mean())
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(zero - p) < 5 * error
    torch.testing.assert_close(found[found != 0.0].unique(), torch.tensor([3.0 / (1 - p)]))
    assert dropped(x, 0.0) is x
    assert not torch.equal(dropped(x, p), found)  # drawn anew each time
