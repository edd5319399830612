"""Bounds of gradients, averaged parameters, and batches that weigh alike."""

import math
import warnings
from collections import Counter
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from inference import Records, Validation, fit
from inference.averages import Average
from inference.clipping import AdaptiveClip, Clipper
from inference.schedules import LearningRate
from inference.updates import NonFiniteLossError
from pyro_avrnn.data import Batches, Sequences


def model(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("sequences", len(x), dim=-1):
        pyro.sample("x_1", dist.Normal(loc, 1.0), obs=x[:, 0, 0])


def guide(x: Tensor) -> None:
    pass


def train(x: Tensor, steps: int, lr: float = 1e-3, **options: Any) -> Any:
    svi = SVI(model, guide, pyro.optim.SGD({"lr": lr}), Trace_ELBO())
    return fit(svi, [(x,)], steps=steps, progress=False, **options)


# ---- clipping ----


def test_a_bound_that_cuts_every_step_is_told_once_and_is_in_the_metrics() -> None:
    x = torch.full((4, 1, 1), 10.0)  # the gradient a frame is loc - 10
    with pytest.warns(UserWarning, match=r"cut 100% of the last 100 steps, to 0\.1 of") as told:
        rows = train(x, 250, lr=0.0, clip_norm=1.0).rows
    assert len(told) == 1 and rows[-1]["clipped_share"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(x, 250, lr=0.0, clip_norm=11.0).rows[-1]["clipped_share"] == 0.0
        assert train(x, 250, lr=0.0, clip_norm=AdaptiveClip()).rows[-1]["clipped_share"] == 0.0
        train(x, 99, lr=0.0, clip_norm=1.0)  # too few to say


def test_a_spike_is_cut_and_leaves_the_bound_where_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = (5.0 * torch.rand(400, generator=generator) + 1.0).tolist()
    with_spike, without = Clipper(AdaptiveClip()), Clipper(AdaptiveClip())
    for i, norm in enumerate(norms):
        factor = with_spike.factor(1e6 if i == 200 else norm)
        assert without.factor(norm) == 1.0
        if i == 200:
            assert factor * 1e6 == pytest.approx(without.bound, rel=0.05)
        else:
            assert factor == 1.0
        assert with_spike.bound == without.bound or i >= 200
        if i >= 10:  # at most a rank of a hundred
            assert with_spike.bound == pytest.approx(without.bound, rel=0.05)


def test_the_bound_is_a_multiple_of_the_median_of_what_was_applied() -> None:
    clipper, applied = Clipper(AdaptiveClip(multiple=2.0, window=20)), list[float]()
    for i, norm in enumerate([1.0] * 15 + [10.0] * 40):
        bound = math.inf if i < 10 else 2.0 * median(applied[-20:])
        assert clipper.bound == bound
        factor = clipper.factor(norm)
        assert factor == min(1.0, bound / norm)
        applied.append(norm * factor)
    assert clipper.factor(10.0) == 1.0  # it has followed


def test_a_training_survives_a_spike_and_its_bound_does_not_move_for_a_hundred_steps() -> None:
    """Against the same descent by hand, with a median of Python's own."""
    lr, spike = 1e-3, 120
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(221, generator=generator) + 0.5  # gradients of about 1 at loc 0
    values[::2] *= -1.0
    values[spike] = 1e6
    seen: list[float] = []

    def look(*_: Any) -> dict[str, float]:
        seen.append(float(pyro.param("loc").detach()))
        return {}

    svi = SVI(model, guide, pyro.optim.SGD({"lr": lr}), Trace_ELBO())
    batches = [(v.reshape(1, 1, 1),) for v in values]
    given: dict[str, Any] = {"clip_norm": AdaptiveClip(4.0), "hooks": [look], "progress": False}
    rows = fit(svi, batches, steps=len(batches), records=Records(every=1), **given).rows
    loc, expected, applied, bounds = 0.0, list[float](), list[float](), list[float]()
    for i, value in enumerate(values.tolist()):
        gradient = loc - value
        bounds.append(math.inf if i < 10 else 4.0 * median(applied[-100:]))
        applied.append(min(abs(gradient), bounds[-1]))
        loc -= lr * math.copysign(applied[-1], gradient)
        expected.append(loc)
    torch.testing.assert_close(seen, expected, rtol=1e-8, atol=1e-12)
    norms = [row["gradient_norm"] for row in rows]  # as they were, not as they were applied
    assert norms[spike] == pytest.approx(1e6, rel=1e-5) and max(seen) < 1.0
    assert abs(seen[spike] - seen[spike - 1]) == pytest.approx(lr * bounds[spike], rel=1e-8)
    assert bounds[spike + 1 :] == pytest.approx([bounds[spike]] * 100, rel=0.1)
    clipped = [sum(norm > bound for norm, bound in zip(norms, bounds, strict=True))]
    assert clipped == [1] and rows[-1]["clipped_share"] == 0.0  # it left the window of 100 steps
    assert rows[spike]["clipped_share"] == rows[-2]["clipped_share"] == 0.01


class Steep(torch.autograd.Function):
    """The identity, with an infinite gradient where a value is above 5."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, x: Tensor) -> Tensor:
        ctx.steep = bool((x > 5.0).any())
        return loc.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * (math.inf if ctx.steep else 1.0), None


def steep(x: Tensor) -> None:
    loc = Steep.apply(pyro.param("loc", torch.zeros(())), x)
    with pyro.plate("sequences", len(x), dim=-1):
        pyro.sample("x_1", dist.Normal(loc, 1.0), obs=x[:, 0, 0])


def descend(values: list[float], clip: float | AdaptiveClip | None) -> Any:
    svi = SVI(steep, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    batches = [(torch.tensor(v).reshape(1, 1, 1),) for v in values]
    given: dict[str, Any] = {"records": Records(every=1), "progress": False}
    with pyro.get_param_store().scope():
        history = fit(svi, batches, steps=len(values), clip_norm=clip, **given)
        return history.rows, float(pyro.param("loc").detach())


def test_a_step_whose_gradient_is_infinite_is_not_taken() -> None:
    with pytest.warns(
        UserWarning, match="the gradient of a step is inf, so that the step was not"
    ):
        rows, loc = descend([1.0, 2.0, 9.0, 9.0, 9.0, 1.0, 9.0, 2.0], AdaptiveClip())
    _, same = descend([1.0, 2.0, 1.0, 2.0], AdaptiveClip())
    assert loc == same
    assert [row.get("skipped", 0.0) for row in rows] == [0, 0, 1, 2, 3, 3, 4, 4]
    assert rows[3]["clipped_share"] == 0.5 and "gradient_norm" not in rows[3]


@pytest.mark.parametrize("clip", [None, 5.0, AdaptiveClip(patience=0)])
def test_an_infinite_gradient_ends_a_training_that_has_no_patience(clip: Any) -> None:
    with pytest.raises(
        NonFiniteLossError, match="training stopped at step 3: the gradient is inf"
    ):
        descend([1.0, 2.0, 9.0, 1.0], clip)


def test_a_loss_that_is_not_finite_ends_a_training_at_once() -> None:
    with pytest.raises(NonFiniteLossError, match="training stopped at step 2: loss is inf"):
        descend([1.0, math.inf, 1.0], AdaptiveClip())


def test_infinite_gradients_in_a_row_end_a_training() -> None:
    with (
        pytest.warns(UserWarning, match="4 in a row end the training"),
        pytest.raises(NonFiniteLossError, match="training stopped at step 5: the gradient is inf"),
    ):
        descend([1.0, 9.0, 9.0, 9.0, 9.0, 1.0], AdaptiveClip())


def test_a_clipper_goes_on_as_one_that_was_not_stopped() -> None:
    norms = (5.0 * torch.rand(150, generator=torch.Generator().manual_seed(1))).tolist()
    whole, first, rest = (Clipper(AdaptiveClip(1.3, window=20)) for _ in range(3))
    expected = [whole.factor(norm) for norm in norms]
    found = [first.factor(norm) for norm in norms[:70]]
    assert first.share == sum(factor < 1.0 for factor in expected[:70]) / 70
    rest.load_state_dict(first.state_dict())
    assert found + [rest.factor(norm) for norm in norms[70:]] == expected
    assert rest.state_dict() == whole.state_dict() and min(expected) < 1.0
    assert rest.share == sum(factor < 1.0 for factor in expected[-100:]) / 100


def test_a_clipper_remembers_the_steps_that_were_not_taken() -> None:
    first, rest = Clipper(AdaptiveClip()), Clipper(AdaptiveClip())
    with pytest.warns(UserWarning, match="not taken"):
        assert [first.skips(math.nan) for _ in range(2)] == [True, True]
    rest.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [rest.skips(math.nan) for _ in range(2)] == [True, False]
    assert rest.skipped == 3


def test_a_warning_is_not_told_again_after_resuming() -> None:
    fixed = Clipper(1.0)
    with pytest.warns(UserWarning, match="clip_norm=1.0 cut 100%"):
        for _ in range(100):
            fixed.factor(3.0)
    again = Clipper(1.0)
    again.load_state_dict(fixed.state_dict())
    again.factor(3.0)  # warnings are errors here
    assert again.share == 1.0 and again.bound == 1.0 and Clipper(None).bound == math.inf


@pytest.mark.parametrize(("cut", "told"), [(50, False), (51, True)])
def test_a_bound_that_cuts_more_than_half_of_the_steps_is_told(cut: int, told: bool) -> None:
    clipper = Clipper(2.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for i in range(100):
            assert clipper.factor(5.0 if i < cut else 1.0) == (0.4 if i < cut else 1.0)
    said = [str(warning.message).split(" of the")[0] for warning in found]
    assert said == [f"clip_norm=2.0 cut {cut}%"] * told


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf])
def test_bounds_that_are_none_are_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="^clip_norm must be"):
        train(torch.ones(2, 1, 1), 1, clip_norm=clip)
    with pytest.raises(ValueError, match="^multiple must be"):
        AdaptiveClip(multiple=clip)


# ---- averages and learning rates ----


def test_the_average_is_that_of_all_steps_and_training_does_not_see_it() -> None:
    x = torch.full((4, 1, 1), 10.0)
    seen: list[float] = []

    def bound() -> float:
        seen.append(float(pyro.param("loc").detach()))
        return float(len(seen))

    every = Validation(bound, every=1)
    plain = [10.0 * (1 - 0.9**n) for n in range(1, 31)]  # lr 0.1 of the sum over 4, a frame 0.025
    history = train(x, 30, lr=0.025, validation=every, average=0.8)
    average = plain[0]
    expected = [average]
    for n, value in enumerate(plain[1:], start=2):
        decay = min(0.8, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
        expected.append(average)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    assert float(pyro.param("loc").detach()) == pytest.approx(expected[history.best_step - 1])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, math.nan])
def test_a_decay_outside_zero_to_one_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="average must be a decay between 0 and 1"):
        Average(decay)


def test_without_validation_a_run_ends_with_the_average() -> None:
    x = torch.full((4, 1, 1), 10.0)
    train(x, 2, lr=0.025, average=0.9)  # trained: 1, then 1.9; the second weighs 9 in 12
    assert float(pyro.param("loc").detach()) == pytest.approx(0.25 * 1.0 + 0.75 * 1.9)


def test_an_average_of_constrained_parameters_stays_inside_and_hooks_see_what_is_trained() -> None:
    seen: list[float] = []

    def scaled(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("sequences", len(x), dim=-1):
            pyro.sample("x_1", dist.Normal(0.0, scale), obs=x[:, 0, 0])

    def look(*_: Any) -> dict[str, float]:
        seen.append(float(pyro.param("scale").detach().log()))
        return {}

    svi = SVI(scaled, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    fit(svi, [(torch.full((4, 1, 1), 2.0),)], steps=3, progress=False, hooks=[look], average=0.5)
    average = seen[0]
    for n, value in enumerate(seen[1:], start=2):  # of the logarithm, which is what is trained
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert float(pyro.param("scale").detach()) == pytest.approx(math.exp(average))
    assert seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_learning_rate_is_a_factor_on_each_step(decay: str) -> None:
    x, seen, rate = torch.full((1, 1, 1), 10.0), [0.0], LearningRate(decay, warmup=0.3, end=0.1)

    def look(*_: Any) -> dict[str, float]:
        seen.append(float(pyro.param("loc").detach()))
        return {}

    train(x, 10, lr=0.1, lr_schedule=rate, hooks=[look])
    moved = [(b - a) / (0.1 * (10.0 - a)) for a, b in zip(seen, seen[1:], strict=False)]
    fractions = [(i / 10 - 0.3) / 0.7 for i in range(3, 10)]  # of what the warm-up leaves
    shape = {
        "constant": [1.0] * 7,
        "linear": [1.0 - at for at in fractions],
        "cosine": [math.cos(math.pi * at / 2) ** 2 for at in fractions],
    }[decay]
    expected = [0.0, 1 / 3, 2 / 3, *(0.1 + 0.9 * height for height in shape)]
    assert moved == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_learning_rates_warm_up_and_decay() -> None:
    rate = LearningRate("cosine", warmup=0.1, end=0.2)
    assert [rate(at) for at in (0.0, 0.05, 0.1)] == pytest.approx([0.0, 0.5, 1.0])
    assert rate(0.55) == pytest.approx(0.6) and rate(1.0) == pytest.approx(0.2)
    assert LearningRate()(0.7) == 1.0
    for bad in ({"decay": "step"}, {"warmup": 1.5}, {"end": -0.1}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))} must be"):
            LearningRate(**bad)  # type: ignore[arg-type]


# ---- batches ----

LENGTHS = (1, 5, 10, 11, 25, 100, 7, 30)


def ragged() -> Sequences:
    """Frame t of sequence i is 1000 i + t + 1."""
    return Sequences.from_list(
        [1000.0 * i + torch.arange(1.0, n + 1.0)[:, None] for i, n in enumerate(LENGTHS)]
    )


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("window", [None, 1, 10, 40])
def test_an_epoch_has_every_frame_once_in_batches_alike_in_size(
    window: int | None, bucket: bool
) -> None:
    batches = Batches(ragged(), 6, bucket=bucket, window=window)
    starts: list[Counter[int]] = []
    for _ in range(40):
        count = len(batches)
        frames, sizes, first = Counter[float](), [], Counter[int]()
        for x, mask in batches:
            sizes.append(len(x))
            frames.update(x[mask].flatten().tolist())
            first.update(x[:, 0, 0].int().tolist())
            inside = mask[:, 1:] & mask[:, :-1]
            assert bool(((x[:, 1:, 0] - x[:, :-1, 0])[inside] == 1).all())  # no seam
        assert len(sizes) == count and max(sizes) <= 6 and max(sizes) - min(sizes) <= 1
        assert set(frames.values()) == {1} and len(frames) == sum(LENGTHS)
        starts.append(first)
    if window == 10:  # windows of the long one begin everywhere, none much longer than asked
        begun = {start - 5001 for first in starts for start in first if start > 5000}
        assert len({start % 10 for start in begun}) == 10
