"""Free runs, continuations and swaps: against Pyro's own program, hand loops and Kalman."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn

from pyro_avrnn import generation, recipes
from pyro_avrnn.exchange import swap_f
from pyro_avrnn.generation import continue_from, generate
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.models import LGSSM, RNN, ExactSmoother
from pyro_avrnn.networks import CELLS
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.reference import kalman
from tests.unit.table import assert_close, observations, prefix_mask

X, Z, H, F = 3, 2, 5, 4
MODELS: dict[str, Callable[[], Recipe]] = {
    "rnn": lambda: recipes.rnn(X, H),
    "rnn-bernoulli-lstm": lambda: recipes.rnn(X, H, "bernoulli", cell="lstm"),
    "vae": lambda: recipes.vae(X, Z, H),
    "storn": lambda: recipes.storn(X, Z, H),
    "vrnn": lambda: recipes.vrnn(X, Z, H),
    "vrnn-flow": lambda: recipes.vrnn(X, Z, H, prior="flow", guide="flow"),
    "vrnn-bernoulli-lstm": lambda: recipes.vrnn(X, Z, H, "bernoulli", cell="lstm"),
    "srnn": lambda: recipes.srnn(X, Z, H),
    "dmm": lambda: recipes.dmm(X, Z, H),
    "dsae": lambda: recipes.dsae(X, Z, H, F),
    "dsae-factorised": lambda: recipes.dsae(X, Z, H, F, guide="factorised"),
}
LENGTHS = (5, 1, 3)
A, Q, R, S0 = 0.9, 0.7, 0.5, 1.3  # of the linear-Gaussian model, deviations
ERRORS = 5.0  # standard errors


def by_hand(model: SequenceModel, state: Any, steps: int, mean: bool) -> Tensor:
    """A free run ``(*batch, S, X)`` in a loop of its own."""
    found = []
    for _ in range(steps):
        z_t = model.transition(state).sample()
        p = model.emission(z_t, state)
        x_t = p.mean if mean else p.sample()
        state = model.advance(state, z_t, x_t)
        found.append(x_t)
    return torch.stack(found, dim=-2)


# a free run


@pytest.mark.parametrize("name", MODELS)
def test_a_free_run_is_what_the_pyro_program_draws(name: str) -> None:
    model = MODELS[name]().model
    torch.manual_seed(1)
    expected = model(None, torch.ones(4, 6, dtype=torch.bool)).detach()
    torch.manual_seed(1)
    assert_close(generate(model, 4, 6), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("rnn")])
def test_means_are_fed_back(name: str) -> None:
    model = MODELS[name]().model
    torch.manual_seed(1)
    actual = generate(model, 4, 6, mean=True)
    torch.manual_seed(1)
    with torch.no_grad():
        state = model.init(Size((4,)))
        if model.f_dim:
            state = model.condition(state, model.prior_f(Size((4,))).sample())
        assert_close(actual, by_hand(model, state, 6, mean=True))


def test_without_latents_means_are_one_and_the_same_run() -> None:
    found = generate(recipes.rnn(X, H).model, 3, 6, mean=True)
    assert_close(found, found[:1].expand_as(found))


def test_a_given_f_is_kept_for_all_steps() -> None:
    model = recipes.dsae(X, Z, H, F).model
    f = torch.randn(4, F)
    torch.manual_seed(1)
    actual = generate(model, 4, 6, f=f)
    torch.manual_seed(1)
    with torch.no_grad():
        state = model.condition(model.init(Size((4,))), f)
        assert_close(actual, by_hand(model, state, 6, mean=False))
    torch.manual_seed(1)
    alike = generate(model, 4, 6, f=f[0])
    assert_close(alike[0], actual[0])
    assert not torch.allclose(alike[1:], actual[1:])


# a continuation


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_sequence_goes_on_from_its_own_end(
    name: str, mean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given which particles are chosen, and the guide's draws, all is a loop by hand."""
    r = MODELS[name]()
    x, mask = observations(r, 3, max(LENGTHS)), prefix_mask(LENGTHS)
    chosen = torch.tensor([[2, 0, 1], [1, 1, 0]])  # (N, B), of 3 particles
    monkeypatch.setattr(generation, "_choose", lambda log_weight, count: chosen)
    torch.manual_seed(1)
    actual = continue_from(
        r.model, r.guide, x, mask, steps=4, num_continuations=2, num_particles=3, mean=mean
    )
    torch.manual_seed(1)
    with torch.no_grad():
        d = r.model.rollout(r.guide, x, mask, num_particles=3)
        ends = []
        for row in chosen.tolist():
            for b, (k, length) in enumerate(zip(row, LENGTHS, strict=True)):
                state = r.model.init(Size(()))
                if d.f is not None:
                    state = r.model.condition(state, d.f[k, b])
                for t in range(length):
                    state = r.model.advance(state, d.z[t, k, b], x[b, t])
                ends.append(state)
        values = (torch.stack(v) for v in zip(*ends, strict=True))
        state = type(ends[0])(*(v.reshape(2, 3, *v.shape[1:]) for v in values))
        assert_close(actual, by_hand(r.model, state, 4, mean))


def test_padding_is_not_read() -> None:
    r = recipes.srnn(X, Z, H)
    x, mask = observations(r, 3, max(LENGTHS)), prefix_mask(LENGTHS)
    options = {"steps": 2, "num_continuations": 2, "num_particles": 3}
    torch.manual_seed(1)
    expected = continue_from(r.model, r.guide, x, mask, **options)
    torch.manual_seed(1)
    actual = continue_from(
        r.model, r.guide, x.masked_fill(~mask[..., None], torch.nan), mask, **options
    )
    assert_close(actual, expected)


class Prior(SequenceGuide):
    """A guide that is far from the posterior: the transition, whatever the data."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        return self.transition(state)


def kalman_prediction(prefix: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mean (S,) and covariance (S, S) of what follows one prefix (T, 1), by hand."""
    one = np.eye(1)
    filtered = kalman.kalman_filter(
        prefix.numpy(), A * one, Q**2 * one, one, R**2 * one, np.zeros(1), S0**2 * one
    ).filtered
    m, v = float(filtered.mean[-1, 0]), float(filtered.cov[-1, 0, 0])
    mean, cov = np.zeros(steps), np.zeros((steps, steps))
    for i in range(steps):
        m, v = A * m, A * A * v + Q * Q  # of z, i + 1 steps on
        mean[i] = m
        for j in range(i, steps):
            cov[i, j] = cov[j, i] = A ** (j - i) * v + (R * R if i == j else 0.0)
    return torch.tensor(mean), torch.tensor(cov)


def deviation(draws: Tensor, prefix: Tensor) -> float:
    """Largest distance of mean and covariances from Kalman's, in standard errors of the draws.

    Args:
        draws: independent continuations of one prefix, ``(n, S)``.
        prefix: ``(T, 1)``.
    """
    mean, cov = kalman_prediction(prefix, draws.shape[1])
    centred = draws - mean  # by the true mean, so that products are unbiased
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)  # (n, S, S)
    count = len(draws)
    of_mean = centred.mean(dim=0) / (centred.std(dim=0) / count**0.5)
    of_cov = (products.mean(dim=0) - cov) / (products.std(dim=0) / count**0.5)
    return max(of_mean.abs().max().item(), of_cov.abs().max().item())


PREFIXES = torch.tensor(
    [[1.5, -0.5, 2.0, 2.5], [-2.0, 1.0, 0.0, 0.0]], dtype=torch.float64
).unsqueeze(-1)
ENDS = (4, 2)


def worst(
    guide: type[SequenceGuide], num_particles: int, count: int, mask: Tensor | None
) -> float:
    """Of both prefixes: each copied, one continuation a copy, so that draws are independent."""
    model = LGSSM.scalar(A, Q, R, S0)
    x = PREFIXES.repeat_interleave(count, dim=0)
    found = continue_from(
        model,
        guide(model),
        x,
        None if mask is None else mask.repeat_interleave(count, dim=0),
        steps=3,
        num_continuations=1,
        num_particles=num_particles,
    )[0, ..., 0]
    return max(
        deviation(found[i * count : (i + 1) * count], prefix[:end])
        for i, (prefix, end) in enumerate(zip(PREFIXES, ENDS, strict=True))
    )


@pytest.mark.parametrize(
    ("guide", "num_particles", "count"),
    [(ExactSmoother, 1, 40_000), (ExactSmoother, 3, 40_000), (Prior, 1_500, 300)],
)
def test_continuations_follow_kalman(
    guide: type[SequenceGuide], num_particles: int, count: int
) -> None:
    assert worst(guide, num_particles, count, prefix_mask(ENDS)) < ERRORS


def test_weights_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: particles of a poor guide chosen with equal probability."""
    choose = generation._choose
    monkeypatch.setattr(generation, "_choose", lambda w, count: choose(torch.zeros_like(w), count))
    assert worst(Prior, 1_500, 300, prefix_mask(ENDS)) > 2 * ERRORS


def test_the_mask_matters() -> None:
    """Planted fault: the padding of the shorter prefix taken for data."""
    assert worst(ExactSmoother, 1, 40_000, None) > 2 * ERRORS


def test_the_prefix_matters() -> None:
    """Planted fault: continuations that start anew."""
    anew = generate(LGSSM.scalar(A, Q, R, S0), 40_000, 3)[..., 0]
    assert all(
        deviation(anew, p[:end]) > 2 * ERRORS for p, end in zip(PREFIXES, ENDS, strict=True)
    )


def test_a_choice_follows_the_weights() -> None:
    """Shares against probabilities, in standard errors; a weight of zero is never chosen."""
    p = torch.tensor([[0.1, 0.0], [0.6, 0.5], [0.3, 0.5]])  # (K, B)
    chosen = generation._choose(p.log() - 1e4, 100_000)  # the weights' scale is no matter
    share = torch.stack([(chosen == k).double().mean(dim=0) for k in range(3)])
    error = (p * (1 - p) / 100_000).sqrt()
    assert bool(((share - p).abs() <= ERRORS * error).all())


# f swapped


@pytest.mark.parametrize("emission", ["normal", "bernoulli"])
@pytest.mark.parametrize("guide", ["full", "factorised"])
def test_one_s_own_f_gives_the_rollout_s_means(guide: str, emission: str) -> None:
    r = recipes.dsae(X, Z, H, F, emission, guide=guide)
    x, mask = observations(r, 3, max(LENGTHS)), prefix_mask(LENGTHS)
    torch.manual_seed(1)
    actual = swap_f(r.model, r.guide, x, [0, 1, 2], mask)
    torch.manual_seed(1)
    expected = r.model.rollout(r.guide, x, mask).emission.mean[:, 0].transpose(0, 1).detach()
    assert_close(actual, expected * mask[..., None])


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1], [0, 0, 0]])
def test_another_f_by_hand(order: list[int]) -> None:
    r = recipes.dsae(X, Z, H, F)
    x, mask = observations(r, 3, max(LENGTHS)), prefix_mask(LENGTHS)
    torch.manual_seed(1)
    actual = swap_f(r.model, r.guide, x, torch.tensor(order), mask)
    torch.manual_seed(1)
    d = r.model.rollout(r.guide, x, mask)
    expected = torch.zeros_like(x)
    for b, length in enumerate(LENGTHS):
        state = r.model.condition(r.model.init(Size(())), d.f[0, order[b]])
        for t in range(length):
            expected[b, t] = r.model.emission(d.z[t, 0, b], state).mean.detach()
            state = r.model.advance(state, d.z[t, 0, b], x[b, t])
    assert_close(actual, expected)


def test_a_swap_may_be_drawn() -> None:
    r = recipes.dsae(X, Z, H, F, "bernoulli")
    x = observations(r, 3, 5)
    found = swap_f(r.model, r.guide, x, [1, 2, 0], mean=False)
    assert found.shape == x.shape and set(found.unique().tolist()) <= {0.0, 1.0}


# what all three leave as it was


@pytest.mark.parametrize("name", ["vrnn", "dsae"])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_modes_come_back(name: str, training: bool) -> None:
    make = {"vrnn": recipes.vrnn, "dsae": recipes.dsae}[name]
    r = make(x_dim=X, z_dim=Z, h_dim=H, dropout=0.5)
    x = observations(r, 3, 5)
    calls: list[Callable[[], Tensor]] = [
        lambda: generate(r.model, 2, 3),
        lambda: continue_from(r.model, r.guide, x, steps=2, num_continuations=2, num_particles=3),
    ]
    if name == "dsae":
        calls.append(lambda: swap_f(r.model, r.guide, x, [1, 2, 0]))
    for call in calls:
        r.model.encode_x.dropout = 0.0
        torch.manual_seed(1)
        expected = call()
        r.model.encode_x.dropout = 0.5
        for module in (*r.model.modules(), *r.guide.modules()):
            module.training = training
        r.model.decoder.training = not training  # each part has its own mode
        torch.manual_seed(1)
        actual = call()
        assert not actual.requires_grad
        assert_close(actual, expected)
        assert r.model.decoder.training != training
        assert r.model.encode_x.training == r.guide.training == r.model.training == training
        assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    r = recipes.vrnn(X, Z, H)
    with pytest.raises(ValueError, match="x must have shape"):
        continue_from(r.model, r.guide, torch.zeros(2, 3, X + 1), steps=1, num_continuations=1)
    assert r.model.training and r.guide.training


def test_float32_stays() -> None:
    r = recipes.dsae(X, Z, H, F)
    r.model.float(), r.guide.float()
    x = torch.zeros(2, 4, X, dtype=torch.float32)
    torch.set_default_dtype(torch.float32)
    found = [
        generate(r.model, 2, 3),
        continue_from(r.model, r.guide, x, steps=2, num_continuations=2),
        swap_f(r.model, r.guide, x, [1, 0]),
    ]
    torch.set_default_dtype(torch.float64)
    assert {value.dtype for value in found} == {torch.float32}


# errors


class Meanless(nn.Module):
    """An emission that does not know its mean."""

    x_dim = X

    def forward(self, h: Tensor) -> dist.Distribution:
        base = dist.Normal(h[..., :X], 1.0).to_event(1)
        return dist.TransformedDistribution(base, [dist.transforms.TanhTransform()])


def meanless() -> RNN:
    return RNN(X, decoder=Meanless(), cell=CELLS["gru"](X, H), encode_x=nn.Identity())


def test_an_emission_without_a_mean() -> None:
    assert generate(meanless(), 2, 3).shape == (2, 3, X)
    with pytest.raises(NotImplementedError, match="TransformedDistribution; mean=False draws"):
        generate(meanless(), 2, 3, mean=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        (
            {"f": torch.zeros(3, F)},
            r"f must have shape \(B, F\) = \(2, 4\) or \(4,\), got \(3, 4\)",
        ),
        ({"f": torch.zeros(F - 1)}, r"got \(3,\)"),
    ],
)
def test_bad_free_runs(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        generate(recipes.dsae(X, Z, H, F).model, **{"size": 2, "length": 3} | options)


def test_f_for_a_model_without_one() -> None:
    r = recipes.vrnn(X, Z, H)
    with pytest.raises(ValueError, match=r"^f needs .* but VRNN has none .*DSAE .* one$"):
        generate(r.model, 2, 3, f=torch.zeros(2, F))
    with pytest.raises(ValueError, match=r"^swap_f needs .* but VRNN has none .*DSAE .* one$"):
        swap_f(r.model, r.guide, torch.zeros(2, 3, X), [1, 0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_continuations": 0}, "num_continuations must be at least 1, got 0"),
        ({"num_particles": -1}, "num_particles must be at least 1, got -1"),
        ({"mask": prefix_mask((3, 0))}, "a step of every sequence, but sequence 1"),
        ({"x": np.zeros((2, 0, X))}, "at least one sequence and one step"),
        ({"x": None}, "x .* is needed; generate"),
        ({"x": np.full((2, 3, X), np.nan)}, "x must hold finite real numbers"),
    ],
)
def test_bad_continuations(options: dict[str, Any], sentence: str) -> None:
    r = recipes.vrnn(X, Z, H)
    given = {"x": np.zeros((2, 3, X)), "steps": 2, "num_continuations": 2} | options
    given["x"] = None if given["x"] is None else torch.from_numpy(given["x"])
    with pytest.raises(ValueError, match=sentence):
        continue_from(r.model, r.guide, **given)


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan, torch.inf])
def test_weights_that_choose_nothing(bad: float) -> None:
    log_weight = torch.zeros(3, 2)
    log_weight[:, 1] = bad
    with pytest.raises(ValueError, match="zero or not numbers for sequence 1"):
        generation._choose(log_weight, 4)


@pytest.mark.parametrize("order", [[0], [0, 2], [-1, 0], [0.0, 1.0], [True, False], [[0, 1]]])
def test_bad_orders(order: Any) -> None:
    r = recipes.dsae(X, Z, H, F)
    with pytest.raises(ValueError, match="order must hold an index from 0 to 1 for each of the 2"):
        swap_f(r.model, r.guide, torch.zeros(2, 3, X), order)


def test_a_swap_needs_a_step_of_every_sequence() -> None:
    r = recipes.dsae(X, Z, H, F)
    with pytest.raises(ValueError, match="a step of every sequence, but sequence 0"):
        swap_f(r.model, r.guide, torch.zeros(2, 3, X), [1, 0], prefix_mask((0, 3)))


class Forgetful(nn.Module):
    """An encoder of the user's, with dropout, which belongs to the guide alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_dim = width

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.dropout(features, 0.5, self.training)


def test_the_guides_own_dropout_is_off() -> None:
    r = recipes.dsae(X, Z, H, F, guide=lambda m: FilteringGuide(m, encoder=Forgetful(m.c_dim)))
    x = observations(r, 3, 5)
    calls: list[Callable[[], Tensor]] = [
        lambda: continue_from(r.model, r.guide, x, steps=2, num_continuations=2, num_particles=3),
        lambda: swap_f(r.model, r.guide, x, [1, 2, 0]),
    ]
    for call in calls:
        found = []
        for training in (False, True):
            r.guide.train(training)
            torch.manual_seed(1)
            found.append(call())
            assert r.guide.local.encoder.training == training
        assert_close(*found)
