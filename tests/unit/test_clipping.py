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

from inference import Validation, fit
from inference.averages import Average
from inference.clipping import AdaptiveClip, Clipper
from inference.schedules import LearningRate
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
