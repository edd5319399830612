"""A twist changes which particles go on, never what is estimated; the exact twist is exact.

The model drifts, z_t = z_{t-1} + drift + noise, and shows its latent at the last step alone, as in
the first example of Lawson et al. (2022). Evidence, exact twist and exact proposal are normal.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn

from inference import FIVO, fivo, particle_filter
from inference.resampling import Selection
from inference.twists import Foresight, TwistLearning
from pyro_avrnn.networks import diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.twists import FutureTwist
from tests.reference.unbiased import deviation

DRIFT, NOISE, SEEN, LENGTH, END = 0.4, 0.6, 0.5, 6, 4.1
REPEATS, K = 20_000, 4


class State(NamedTuple):
    z: Tensor  # (*batch, 1)
    t: Tensor  # (*batch, 1), steps that are done


class Drifting(SequenceModel):
    """Observations before the last are standard normal noise."""

    def __init__(self, length: int = LENGTH) -> None:
        super().__init__(1, 1)
        self.length = length
        self.unused = nn.Parameter(torch.zeros(1))

    def init(self, batch_shape: Size) -> State:
        return State(torch.zeros(*batch_shape, 1), torch.zeros(*batch_shape, 1))

    def transition(self, state: State) -> dist.Distribution:
        return diagonal_normal(state.z + DRIFT, torch.full_like(state.z, NOISE))

    def emission(self, z_t: Tensor, state: State) -> dist.Distribution:
        last = (state.t == self.length - 1).expand_as(z_t)
        return diagonal_normal(torch.where(last, z_t, 0.0), torch.where(last, SEEN, 1.0))

    def advance(self, state: State, z_t: Tensor, x_t: Tensor) -> State:
        return State(z_t, (state.t + 1).expand_as(z_t))


def to_come(state_z: Tensor, t: Tensor, end: Tensor) -> dist.Distribution:
    """x_T given the state before step t, t from 0."""
    left = LENGTH - t
    scale = (left * NOISE**2 + SEEN**2).sqrt()
    return dist.Normal(state_z + DRIFT * left, scale)


class Exact(nn.Module):
    """The twist that knows the model; ``shift`` makes it wrong."""

    def __init__(self, shift: float = 0.0, sharp: float = 1.0) -> None:
        super().__init__()
        self.shift, self.sharp = shift, sharp

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, -1:].expand(*x.shape)

    def forward(self, h: Tensor, code: Tensor) -> Tensor:
        z, t = h[..., :1], h[..., 1:]
        told = to_come(z, t, code).log_prob(code.expand_as(z) + self.shift)
        return self.sharp * told.squeeze(-1)


class Blind(SequenceGuide):
    """The transition, as in a bootstrap filter."""

    def proposal(self, state: State, c_t: Tensor) -> dist.Distribution:
        return self.transition(state)


class Knowing(SequenceGuide):
    """p(z_t | z_{t-1}, x_T)."""

    smoothing = True

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, -1:].expand(*x.shape)

    def proposal(self, state: State, c_t: Tensor) -> dist.Distribution:
        left = LENGTH - state.t - 1  # steps after this one
        seen = left * NOISE**2 + SEEN**2  # variance of x_T given z_t
        precision = 1 / NOISE**2 + 1 / seen
        mean = (state.z + DRIFT) / NOISE**2 + (c_t - DRIFT * left) / seen
        return diagonal_normal(mean / precision, precision.rsqrt())


def series(size: int = REPEATS) -> tuple[Tensor, float]:
    """Data, and their evidence."""
    x = torch.zeros(size, LENGTH, 1)
    x[:, -1] = END
    start = torch.zeros(1)
    log_z = float(to_come(start, torch.zeros(1), x).log_prob(torch.tensor([END])))
    return x, log_z + (LENGTH - 1) * -0.5 * math.log(math.tau)


@torch.no_grad()
def estimates(twist: Any, guide: type[SequenceGuide] = Blind) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Drifting()
    x, _ = series()
    chosen = Selection("systematic", "always")
    looking = None if twist is None else partial(Foresight.of, twist)
    d = model.rollout(guide(model), x, num_particles=K, select=chosen, twist=looking)
    options: dict[str, Any] = {"num_particles": K, "criterion": "always", "twist": twist}
    return {
        "FIVO": fivo(d.log_weight, chosen.events(d.log_weight)),
        "filter": particle_filter(model, guide(model), x, **options).log_evidence,
    }


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_any_twist_leaves_the_estimate_unbiased(shift: float) -> None:
    _, log_z = series()
    for name, found in estimates(Exact(shift, sharp=0.6)).items():
        print(f"{name}, off by {shift}: {deviation(found, log_z):+.2f} s.e.")
        assert abs(deviation(found, log_z)) < 5


def at_the_end_too(self: Foresight, h: Tensor, t: int) -> Tensor:
    return self.twist(h, self.codes[min(t, LENGTH - 1)])


def test_a_twist_at_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, log_z = series()
    monkeypatch.setattr(Foresight, "before", at_the_end_too)
    assert abs(deviation(estimates(Exact(sharp=0.6))["filter"], log_z)) > 5


def test_the_exact_twist_with_the_exact_proposal_is_the_evidence() -> None:
    _, log_z = series()
    for found in estimates(Exact(), Knowing).values():
        torch.testing.assert_close(found, torch.full_like(found, log_z))
    plain = estimates(None, Knowing)["FIVO"]
    assert plain.std() > 0.1  # without it the same particles do not all have one weight


def test_a_rollout_and_a_filter_of_one_twist_agree_under_gradients() -> None:
    model = Drifting()
    x, _ = series(50)
    values = []
    for recompute in (None, 2):
        torch.manual_seed(1)
        loss = FIVO(num_particles=8, twist=Exact(0.3), recompute=recompute)
        values.append(loss(model, Blind(model), x))
    torch.testing.assert_close(values[0], values[1])


def test_a_twist_is_0_at_both_ends_and_where_padded() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    sight = Foresight.of(Exact(0.3), torch.randn(2, 6, 1), mask)
    h = torch.cat([torch.randn(7, 3, 2, 1), torch.rand(7, 3, 2, 1)], dim=-1)
    found = sight.all_before(h)
    torch.testing.assert_close(found, torch.stack([sight.before(h[t], t) for t in range(7)]))
    known = torch.zeros(7, 2, dtype=torch.bool)
    known[1:6] = mask.t()[1:]
    assert torch.equal((found != 0).all(dim=1), known)
    assert torch.equal((found != 0).any(dim=1), known)


def test_a_twist_is_learnt_from_the_model() -> None:
    torch.manual_seed(2)
    model = Drifting()
    twist, (x, log_z) = FutureTwist(model, 32), series(64)
    optim = torch.optim.Adam(twist.parameters(), lr=5e-3)
    learning = TwistLearning(twist, optim=optim, num_particles=8)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 400)
    for _ in range(400):
        learning.update(model, Blind(model), x)
        falling.step()
    twists = {"none": None, "learnt": twist, "exact": Exact()}
    gap = {name: float(estimates(t)["FIVO"].mean() - log_z) for name, t in twists.items()}
    print({name: round(found, 3) for name, found in gap.items()})
    assert gap["none"] < -0.9 and gap["exact"] > -0.5  # the proposal is blind still
    assert gap["learnt"] == pytest.approx(gap["exact"], abs=0.03)
