"""Autoregressive emissions: what a feature has read, masses, draws, gradients, models of them."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inference import ELBO, evaluate, seeded
from pyro_avrnn import recipes
from pyro_avrnn.autoregressive import AutoregressiveEmission, CausalNetwork
from pyro_avrnn.emissions import EMISSIONS
from pyro_avrnn.generation import generate

C, X = 3, 5
KINDS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "normal": {"min_scale": 0.01},
    "categorical": {"num_classes": 3},
    "logistic": {"bits": 3, "num_components": 2},
}
BOTH = [(of, network) for of in KINDS for network in ("masked", "causal")]
BOTH.remove(("categorical", "causal"))


def emission(of: str, network: str, scale: float = 1.0, **more: Any) -> AutoregressiveEmission:
    """With random weights in place of zeros."""
    options = {"lags": 3} if network == "causal" else {}
    made = AutoregressiveEmission(
        C, X, (7,), of=of, network=network, **KINDS[of], **options, **more
    )
    for p in made.network.parameters():
        p.data = scale * torch.randn_like(p)
    return made


def values(of: str, *shape: int) -> Tensor:
    if of == "normal":
        return torch.randn(*shape, X)
    if of == "logistic":
        return (torch.randint(8, (*shape, X)) + 0.5) / 4 - 1
    return torch.randint(3 if of == "categorical" else 2, (*shape, X)).double()


@pytest.mark.parametrize(("of", "network"), BOTH)
def test_it_begins_as_the_emission_of_independent_features(of: str, network: str) -> None:
    made = AutoregressiveEmission(C, X, (7,), of=of, network=network, **KINDS[of])
    plain: Any = EMISSIONS[of](C, X, (7,), **KINDS[of])
    plain.load_state_dict(made.base.state_dict())
    context, x = torch.randn(4, C), values(of, 4)
    torch.testing.assert_close(made(context).log_prob(x), plain(context).log_prob(x))


@pytest.mark.parametrize(("of", "network"), BOTH)
def test_a_feature_has_read_those_before_it_and_no_other(of: str, network: str) -> None:
    made, context, x = emission(of, network), torch.randn(C), values(of)
    plain = made.base.net(context)

    def numbers(x: Tensor) -> Tensor:
        read = torch.nn.functional.one_hot(x.long(), 3).double().flatten() if of[0] == "c" else x
        return made.network(read, context)  # (O, X)

    before = numbers(x)
    for i in range(X):
        other = x.clone()
        other[i] = values(of)[i] if of == "normal" else x[i] + (1 if x[i] <= 0 else -1) * 0.5
        if of in ("bernoulli", "categorical"):
            other[i] = 1 - x[i] if x[i] < 2 else 0
        changed = (numbers(other) != before).any(dim=0)
        reach = range(i + 1, X if network == "masked" else min(i + 4, X))
        assert [j for j in range(X) if changed[j]] == list(reach)
    assert made.of_features(x, context, plain).batch_shape == ()


@pytest.mark.parametrize(("of", "network"), [b for b in BOTH if b[0] != "normal"])
def test_masses_of_all_values_add_up_to_one(of: str, network: str) -> None:
    levels = {"bernoulli": (0, 1), "categorical": (0, 1, 2)}
    levels["logistic"] = tuple((k + 0.5) / 4 - 1 for k in range(8))
    made = emission(of, network)
    every = torch.tensor(list(product(levels[of], repeat=X)), dtype=torch.float64)
    total = made(torch.randn(C)).log_prob(every).logsumexp(dim=0)
    assert abs(float(total.detach())) < 1e-10


@pytest.mark.parametrize(("of", "network"), BOTH)
def test_a_density_is_that_of_one_feature_after_the_other(of: str, network: str) -> None:
    made, context, x = emission(of, network), torch.randn(C), values(of)
    start = made.base.net(context)
    total = torch.zeros(())
    for i in range(X):
        known = torch.where(torch.arange(X) < i, x, 2.0)  # the rest is not read
        one = made.of_features(known, context, start, slice(i, i + 1))
        total = total + one.log_prob(x[i : i + 1])
    torch.testing.assert_close(made(context).log_prob(x), total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("of", "network"), BOTH)
def test_draws_have_the_probabilities_that_they_are_scored_with(of: str, network: str) -> None:
    made, context = emission(of, network, scale=0.2), torch.randn(2, C)
    with seeded(1):
        drawn = made(context).sample((20_000,))
    assert drawn.shape == (20_000, 2, X)
    log_prob = made(context).log_prob(drawn)  # (n, 2)
    # E[exp(log q - log p)] = 1 for any q: here that of another emission of the kind
    other = emission(of, network, scale=0.2)
    other.load_state_dict(made.state_dict())
    for p in other.network.parameters():
        p.data = p.data + 0.02 * torch.randn_like(p)

    def off(scored: Tensor) -> Tensor:
        ratio = (other(context).log_prob(drawn) - scored).exp().detach()
        assert float(ratio.max() / ratio.sum()) < 0.02
        return ((ratio.mean(dim=0) - 1) / (ratio.std(dim=0) / len(ratio) ** 0.5)).abs()

    assert float(off(log_prob).max()) < 5
    assert float(off(log_prob - 0.1).max()) > 5  # the planted fault: densities off by a tenth


#: an emission of a few features and all values of one of them
SMALL: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "bernoulli": ({}, (0.0, 1.0)),
    "categorical": ({"num_classes": 3}, (0.0, 1.0, 2.0)),
    "logistic": (
        {"bits": 2, "num_components": 2, "unit": 0.5, "min_log_scale": -3.0},
        (-1.5, -0.5, 0.5, 1.5),
    ),
}


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize(("of", "network"), [b for b in BOTH if b[0] != "normal"])
def test_draws_fall_on_each_value_as_often_as_it_is_probable(
    of: str, network: str, fault: bool
) -> None:
    (options, one), features, n = SMALL[of], 3, 5000
    options = options | ({"lags": 2} if network == "causal" else {})
    made = AutoregressiveEmission(C, features, (7,), of=of, network=network, **options)
    torch.manual_seed(1)  # features that depend on each other by much
    for p in made.parameters():
        p.data = 0.4 * torch.randn_like(p)
    context, every = torch.randn(2, C), torch.tensor(list(product(one, repeat=features)))
    expected = n * made(context).log_prob(every.unsqueeze(1)).exp().detach()  # (V, 2)
    torch.testing.assert_close(expected.sum(dim=0), torch.full((2,), float(n)))
    drawn = made(context).sample((n,))
    if fault:  # each feature from another draw: as often as before, but independent
        drawn = torch.stack([part.roll(i, dims=0) for i, part in enumerate(drawn.unbind(-1))], -1)
    found = (drawn.unsqueeze(1) == every.unsqueeze(1)).all(dim=-1).sum(dim=0)
    assert found.sum(dim=0).tolist() == [n, n]  # all draws are values
    often = expected > 10  # else the statistic is no chi-square
    statistic = float(((found - expected).square() / expected)[often].sum())
    mean = float((1 - expected / n)[often].sum())
    assert ((statistic - mean) / (2 * mean) ** 0.5 < 5) is not fault


# ---- the samples of a signal ----


def causal(lags: int, x_dim: int = 8) -> CausalNetwork:
    """With random weights, a scale, a location and a third number for each sample."""
    network = CausalNetwork(x_dim, C, 3, 6, "tanh", locations=slice(1, 2), lags=lags)
    for p in network.parameters():
        p.data = torch.randn_like(p)
    return network


@pytest.mark.parametrize("lags", [1, 3, 20])
def test_a_sample_is_predicted_from_the_last_before_it_in_one_pass_or_alone(lags: int) -> None:
    network, x, context = causal(lags), torch.randn(4, 8), torch.randn(4, C)
    whole = network(x, context)  # (4, O, X)
    for i in range(8):
        read = [j for j in range(8) if i - lags <= j < i]
        other = torch.full_like(x, torch.nan)  # whatever it reads becomes NaN
        other[:, read] = x[:, read]
        alone = network(other, context, slice(i, i + 1))
        torch.testing.assert_close(alone, whole[..., [i]], rtol=1e-12, atol=1e-12)
        for j in range(8):
            changed = x.clone()
            changed[:, j] += 0.5
            for found in (
                network(changed, context)[..., i],
                network(changed, context, slice(i, i + 1)),
            ):
                moved = (found.reshape(4, 3) - whole[..., i]).abs().amax(dim=1) > 1e-9
                assert moved.tolist() == [j in read] * 4
    torch.testing.assert_close(network(x, context, slice(2, 6)), whole[..., 2:6])


def test_the_numbers_of_a_causal_network_by_hand() -> None:
    network, x, context = causal(3), 5 * torch.randn(8), torch.randn(C)
    w = {name: p.detach().numpy() for name, p in network.named_parameters()}
    c, found = context.numpy(), network(x, context).detach()
    for i in range(8):
        past = np.array([float(x[j]) if j >= 0 else 0.0 for j in range(i - 3, i)])
        size = math.sqrt(sum(past**2) / 3 + 1e-6)
        read = w["read.weight"] @ np.append(past / size, math.log(size))
        hidden = np.tanh(read + w["context.weight"] @ c + w["context.bias"])
        out = w["write.weight"] @ np.tanh(w["middle.weight"] @ hidden + w["middle.bias"])
        linear = (w["predict.weight"] @ c + w["predict.bias"]) @ past
        expected = torch.tensor([out[0], out[1] * size + linear, out[2]])
        torch.testing.assert_close(found[:, i], expected, rtol=1e-10, atol=1e-10)


def test_a_louder_signal_has_louder_locations_and_nothing_else() -> None:
    network, x, context = causal(3), 100 * torch.randn(4, 8), torch.randn(4, C)
    network.read.weight.data[:, -1] = 0.0  # it does not read how loud the signal is
    quiet, loud = network(x, context)[..., 1:], network(7 * x, context)[..., 1:]
    torch.testing.assert_close(loud[:, 1], 7 * quiet[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loud[:, [0, 2]], quiet[:, [0, 2]], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        network.read.weight[:, -1] = 1.0
        heard = network(7 * x, context)[..., 1:] - loud
    assert float(heard.abs().amin(dim=(0, 2)).max()) > 1e-6


@pytest.mark.parametrize("of", ["normal", "logistic"])
def test_a_linear_prediction_moves_the_locations_alone(of: str) -> None:
    made, context, x = emission(of, "causal", scale=0.0), torch.randn(C), values(of)
    made.network.predict.bias.data = torch.tensor([0.0, 0.2, 3.0])
    found = made.of_features(x, context, made.base.net(context))
    plain = made.base(context)
    for part in (found, plain) if of == "normal" else ():
        part.parameters = torch.stack([part.base_dist.loc, part.base_dist.scale])
    moved = (found.parameters - plain.parameters).detach()
    before = torch.nn.functional.pad(x, (2, 0))  # the last sample counts 3, the one before 0.2
    expected = torch.zeros_like(moved)
    expected[0 if of == "normal" else 1] = 3 * before[1:-1] + 0.2 * before[:-2]
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize(("of", "network"), BOTH)
def test_the_gradient_reaches_context_and_weights_and_is_a_slope(of: str, network: str) -> None:
    made, x = emission(of, network), values(of, 3)
    context = torch.randn(3, C, requires_grad=True)
    made(context).log_prob(x).sum().backward()
    assert context.grad is not None
    moved = {name for name, p in made.network.named_parameters() if bool(p.grad.any())}
    nowhere = {"predict.weight", "predict.bias"} if of == "bernoulli" else set[str]()
    assert moved == {name for name, _ in made.network.named_parameters()} - nowhere
    step = torch.zeros_like(context)
    step[1, 2] = 1e-6
    with torch.no_grad():
        up, down = (made(context + s).log_prob(x).sum() for s in (step, -step))
    assert float((up - down) / 2e-6) == pytest.approx(float(context.grad[1, 2]), rel=1e-4)


def test_shapes_broadcast_as_particles_need() -> None:
    made = emission("logistic", "causal")
    x, context = values("logistic", 4, 1, 6), torch.randn(4, 2, 6, C)
    scored = made(context).log_prob(x)
    assert scored.shape == (4, 2, 6)
    assert_one = made(context[1, 1, 3]).log_prob(x[1, 0, 3])
    torch.testing.assert_close(scored[1, 1, 3], assert_one)
    assert made(context).expand((5, 4, 2, 6)).sample().shape == (5, 4, 2, 6, X)


@pytest.mark.parametrize("make", [recipes.vrnn, recipes.srnn, recipes.dmm])
def test_models_of_it_train_score_and_generate(make: Callable[..., Any]) -> None:
    r = make(X, 2, 6, emission="autoregressive")
    x = torch.randint(2, (3, 4, X)).double()
    loss = ELBO()(r.model, r.guide, x)
    loss.backward()
    assert all(p.grad is not None for p in r.model.decoder.network.parameters())
    assert evaluate(r.model, r.guide, x, num_particles=30).iwae_per_frame < 0
    drawn = generate(r.model, 2, 3)
    assert drawn.shape == (2, 3, X) and bool(((drawn == 0) | (drawn == 1)).all())
    with pytest.raises(
        NotImplementedError, match="mean=True needs an emission that knows its mean"
    ):
        generate(r.model, 2, 3, mean=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "mixture"}, "of must be one of bernoulli, normal, categorical, logistic"),
        ({"network": "wave"}, "network must be one of masked, causal"),
        ({"of": "categorical"}, "emission 'categorical' needs num_classes"),
        ({"of": "categorical", "num_classes": 3, "network": "causal"}, "reads numbers, not"),
        ({"bits": 3}, "emission_options of 'autoregressive' must be among"),
        ({"width": 0}, "width must be at least 1"),
        ({"network": "causal", "lags": 0}, "lags must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        recipes.vrnn(X, 2, 6, emission="autoregressive", emission_options=options)


def test_a_file_knows_the_recipe(tmp_path: Any) -> None:
    options = {"of": "logistic", "bits": 4, "network": "causal", "lags": 2}
    r = recipes.rnn(X, 6, emission="autoregressive", emission_options=options)
    recipes.save(r, tmp_path / "r.pt")
    again = recipes.load(tmp_path / "r.pt")
    x = (torch.randint(16, (2, 3, X)) + 0.5) / 8 - 1
    torch.testing.assert_close(ELBO()(again.model, again.guide, x), ELBO()(r.model, r.guide, x))
