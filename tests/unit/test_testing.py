"""The conformance checks accept a correct model, and name each planted fault."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_avrnn import testing
from pyro_avrnn.guides import FilteringGuide, SmoothingGuide
from pyro_avrnn.models.lgssm import LGSSM, ExactFilter, ExactSmoother
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.shapes import broadcast_cat
from pyro_avrnn.testing import check
from tests.unit.table import build, observations, prefix_mask

B, T, D = 2, 4, 2


class WalkState(NamedTuple):
    before: Tensor  # z_{t-1}
    seen: Tensor  # x_{t-1}


class Walk(SequenceModel):
    """z_t = a z_{t-1} + noise, x_t = z_t + b x_{t-1} + noise, in each of D dimensions."""

    def __init__(self) -> None:
        super().__init__(x_dim=D, z_dim=D)
        self.a, self.b = nn.Parameter(torch.tensor([0.8, 0.5])), nn.Parameter(torch.tensor(0.3))
        self.raw_scale = nn.Parameter(torch.zeros(2, D))
        self.register_buffer("unit", torch.tensor(1.5))

    def init(self, batch_shape: Size) -> WalkState:
        return WalkState(self.a.new_zeros(*batch_shape, D), self.a.new_zeros(*batch_shape, D))

    def transition(self, state: WalkState) -> dist.Distribution:
        return dist.Normal(self.a * state.before, F.softplus(self.raw_scale[0])).to_event(1)

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        loc = self.unit * z_t + self.b * state.seen
        return dist.Normal(loc, F.softplus(self.raw_scale[1])).to_event(1)

    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        return WalkState(z_t, x_t.expand_as(z_t))


class WalkGuide(SequenceGuide):
    """q(z_t | z_{t-1}, x_t): a normal with a linear mean."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.net = nn.Linear(3 * D, D)
        self.raw_scale = nn.Parameter(torch.zeros(D))

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc = self.net(broadcast_cat(self.hidden(state), c_t[..., :D]))
        return dist.Normal(loc, F.softplus(self.raw_scale)).to_event(1)


def data(size: int = B, length: int = T, **options: Any) -> Tensor:
    return torch.randn(size, length, D, **options)


# what is correct passes


def test_a_correct_model_of_ones_own_passes() -> None:
    model = Walk()
    for guide in (WalkGuide(model), FilteringGuide(model, (4,)), SmoothingGuide(model, rnn_dim=3)):
        check(model, guide, data())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("particles", [2, 3])
def test_sizes_that_coincide_are_no_fault(size: int, length: int, particles: int) -> None:
    model = Walk()
    check(model, WalkGuide(model), data(size, length), num_particles=particles)


@pytest.mark.parametrize("lengths", [(4, 2), (1, 4, 3)])
def test_a_ragged_batch_passes_with_anything_in_its_padding(lengths: tuple[int, ...]) -> None:
    model, mask = Walk(), prefix_mask(lengths)
    x = data(len(lengths)).where(mask[..., None], torch.nan)
    check(model, WalkGuide(model), x, mask)
    mask[1] = False  # a sequence of padding alone
    check(model, WalkGuide(model), x, mask)


@pytest.mark.parametrize("guide", [ExactFilter, ExactSmoother])
def test_exact_guides_pass(guide: Callable[[LGSSM], SequenceGuide]) -> None:
    model = LGSSM.random(2, D, seed=1)
    check(model, guide(model), data())


def test_single_precision_passes_at_its_own_tolerance() -> None:
    model = Walk()
    guide = SmoothingGuide(model, rnn_dim=3)
    model.float(), guide.float()
    check(model, guide, data(dtype=torch.float32))


class Coin(dist.Normal):
    """A normal that pretends to have no reparameterised draws."""

    has_rsample = False


class NotReparameterised(WalkGuide):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t).base_dist
        return Coin(q.loc, q.scale).to_event(1)


def test_a_guide_that_is_not_reparameterised_passes() -> None:
    model = Walk()
    check(model, NotReparameterised(model), data())


def test_a_check_leaves_everything_as_it_was() -> None:
    recipe = build("vrnn", guide="smoothing", dropout=0.5)
    recipe.model.encode_z.eval()
    modes = [part.training for part in (*recipe.model.modules(), *recipe.guide.modules())]
    before = {n: p.clone() for n, p in recipe.model.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        check(recipe.model, recipe.guide, observations(recipe, B, T))
    assert torch.equal(random, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())
    after = [part.training for part in (*recipe.model.modules(), *recipe.guide.modules())]
    assert modes == after and True in modes and False in modes
    for name, p in recipe.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_arguments_that_cannot_be_checked() -> None:
    model = Walk()
    with pytest.raises(TypeError, match="guide must be a SequenceGuide, got Walk"):
        check(model, model, data())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a SequenceModel, got Linear"):
        check(nn.Linear(1, 1), WalkGuide(model), data())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        check(model, WalkGuide(model), data(), num_particles=1)
    with pytest.raises(ValueError, match=r"x must have shape \(B, T, 2\)"):
        check(model, WalkGuide(model), torch.zeros(B, T, D + 1))


# faults of models


class CatsItsInputs(Walk):
    """torch.cat does not broadcast: fails where z has particles and the state has none yet."""

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        loc, seen = torch.cat([z_t, state.seen], dim=-1).chunk(2, dim=-1)
        return dist.Normal(loc + seen, 1.0).to_event(1)


class MixesParticles(Walk):
    """Averages over particles where it should only look at its own."""

    def transition(self, state: WalkState) -> dist.Distribution:
        before = state.before.mean(dim=0, keepdim=True).expand_as(state.before)
        return dist.Normal(before if before.ndim > 2 else state.before, 1.0).to_event(1)


class AdvancesInPlace(Walk):
    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        state.seen.copy_(x_t)
        return WalkState(z_t, state.seen)


class ForgetsTheParticles(Walk):
    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        return WalkState(z_t, x_t)


class InitOfAnotherShape(Walk):
    def init(self, batch_shape: Size) -> WalkState:
        return WalkState(torch.zeros(D), torch.zeros(*batch_shape, D))


class InitOfAnotherKind(Walk):
    def init(self, batch_shape: Size) -> Any:
        return torch.zeros(*batch_shape, D)


class PriorWithoutABatch(Walk):
    def transition(self, state: WalkState) -> dist.Distribution:
        return dist.Normal(torch.zeros(D), 1.0).to_event(1)


class NoEventDimension(Walk):
    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        return dist.Normal(z_t, 1.0)


class OutsideItsSupport(Walk):
    """Says that it scores 0 and 1, and draws real numbers."""

    support, expects = constraints.boolean, "0 and 1 only"


class Rounded(dist.Normal):
    has_rsample = False

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape).long()


class DrawsIntegers(Walk):
    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        return Rounded(z_t, 1.0).to_event(1)


class AnotherSite(Walk):
    def step(self, t: int, state: Any, x_t: Tensor | None = None) -> tuple[Any, Tensor]:
        pyro.sample(f"w_{t}", dist.Normal(self.a.new_zeros(()), 1.0))
        return super().step(t, state, x_t)


class OffWhenStacked(Walk):
    """The density of the stacked emission is off by 1e-6."""

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        return dist.Normal(z_t, 1.0 + 1e-6 * (z_t.ndim == 4)).to_event(1)


class LateWhenStacked(Walk):
    def transition(self, state: WalkState) -> dist.Distribution:
        if state.before.ndim == 4:
            state = WalkState(state.before.roll(1, dims=0), state.seen)
        return super().transition(state)


class NoGradientWhenStacked(Walk):
    def transition(self, state: WalkState) -> dist.Distribution:
        a = self.a.detach() if state.before.ndim == 4 else self.a
        return dist.Normal(a * state.before, 1.0).to_event(1)


class InfiniteAtStepThree(Walk):
    """The third step's scale is so small that no draw has a density."""

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        late = (state.seen == 7.0).any(dim=-1, keepdim=True)
        return dist.Normal(z_t, torch.where(late, 1e-300, 1.0)).to_event(1)


class CountsItsCalls(Walk):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        self.calls += 1.0
        return super().advance(state, z_t, x_t)


class RemembersTheLastCall(Walk):
    last: Any = None

    def transition(self, state: WalkState) -> dist.Distribution:
        before, self.last = self.last, state.before.detach().clone()
        shift = 0.0 if before is None or before.shape != self.last.shape else 0.1 * before
        return dist.Normal(self.a * state.before + shift, 1.0).to_event(1)


class ForgetsAParameter(Walk):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        content = super().state_dict(*args, **kwargs)
        del content["b"]
        return content


class LoadsWrongly(Walk):
    def load_state_dict(self, content: Any, *args: Any, **kwargs: Any) -> Any:
        content["a"] = content["a"].flip(0)
        return super().load_state_dict(content, *args, **kwargs)


class SavesAnObject(Walk):
    def get_extra_state(self) -> Any:
        return CatsItsInputs

    def set_extra_state(self, state: Any) -> None:
        pass


MODEL_FAULTS: dict[type[SequenceModel], str] = {
    CatsItsInputs: r"broadcasting: CatsItsInputs\.emission at step 1 raises RuntimeError with",
    MixesParticles: r"broadcasting: MixesParticles\.transition at step 2 does not broadcast",
    AdvancesInPlace: r"purity: AdvancesInPlace\.advance at step 1 modifies what it is given",
    ForgetsTheParticles: r"shapes: ForgetsTheParticles\.advance at step 1 gives seen of shape ",
    InitOfAnotherShape: r"shapes: InitOfAnotherShape\.init gives before of shape \(2,\)",
    InitOfAnotherKind: r"shapes: InitOfAnotherKind\.init gives a Tensor, not a Named",
    PriorWithoutABatch: r"shapes: PriorWithoutABatch\.transition at step 1 has batch shape \(\)",
    NoEventDimension: r"shapes: NoEventDimension\.emission at step 1 has event shape \(\), not",
    OutsideItsSupport: r"generation: OutsideItsSupport\.emission at step 1 draws x = .* expects 0",
    DrawsIntegers: r"generation: DrawsIntegers at step 1 draws x \(2, 2\) of torch\.int64",
    AnotherSite: r"sites: AnotherSite has an unexpected site w_1",
    OffWhenStacked: r"broadcasting: OffWhenStacked\.emission at step 1 .* \(T, K, B\)",
    LateWhenStacked: r"broadcasting: LateWhenStacked\.transition at step 1 .* \(T, K, B\)",
    NoGradientWhenStacked: r"loop = rollout: NoGradientWhenStacked differs .* gradient of a: ",
    InfiniteAtStepThree: r"finiteness: InfiniteAtStepThree\.emission at step 3 gives sequence 1",
    CountsItsCalls: r"purity: CountsItsCalls changes its calls when called",
    RemembersTheLastCall: r"purity: RemembersTheLastCall\.transition at step \d gives another",
    ForgetsAParameter: r"saving: ForgetsAParameter raises RuntimeError",
    LoadsWrongly: r"saving: LoadsWrongly\.transition at step 2 differs in a copy",
    SavesAnObject: r"saving: SavesAnObject raises \w+Error",
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_fault_of_a_model_is_named(fault: Callable[[], SequenceModel]) -> None:
    model, x = fault(), data()
    x[1, 1] = 7.0
    if model.support is constraints.boolean:
        x = (x > 0).to(x.dtype)
    with pytest.raises(AssertionError, match=MODEL_FAULTS[fault]) as caught:
        check(model, WalkGuide(model), x)
    assert "\n" not in str(caught.value)


# faults of guides


class ReadsPadding(WalkGuide):
    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class ReadsTheLengthOfTheBatch(WalkGuide):
    """No value in the padding matters, but how much of it there is does."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x / x.shape[1]


class DrawsInItsProposal(WalkGuide):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return dist.Normal(q.mean + 0.1 * torch.randn_like(q.mean), 1.0).to_event(1)


class OwnsItsModel(WalkGuide):
    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.model = model


class OwnsABuffer(WalkGuide):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.register_buffer("unit", model.unit)


class EncodesTheTranspose(WalkGuide):
    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.transpose(0, 1)


class ScaledWhenStacked(WalkGuide):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return dist.Normal(q.mean, q.stddev * (1.0 + 1e-6 * (c_t.ndim == 4))).to_event(1)


class NoGradientOfTheDraws(WalkGuide):
    """The loop's draws carry no gradient to the mean, the stacked density does."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        q = super().proposal(state, c_t)
        return dist.Normal(q.mean if c_t.ndim == 4 else q.mean.detach(), q.stddev).to_event(1)


class ProposesAnotherSize(WalkGuide):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        return dist.Normal(self.hidden(state), 1.0).to_event(1)


GUIDE_FAULTS: dict[type[SequenceGuide], str] = {
    ReadsPadding: r"padding: ReadsPadding\.encode at step 1 depends on padded frames",
    ReadsTheLengthOfTheBatch: r"padded = unpadded: ReadsTheLengthOfTheBatch\.proposal at step 1",
    DrawsInItsProposal: r"purity: DrawsInItsProposal\.proposal at step 1 draws random numbers",
    OwnsItsModel: r"ownership: OwnsItsModel registers Walk's a as model\.a; borrow",
    OwnsABuffer: r"ownership: OwnsABuffer registers Walk's unit as unit; borrow",
    EncodesTheTranspose: r"shapes: EncodesTheTranspose\.encode gives shape \(4, 2, 2\), not",
    ScaledWhenStacked: r"broadcasting: ScaledWhenStacked\.proposal at step 1 .* \(T, K, B\)",
    NoGradientOfTheDraws: r"loop = rollout: NoGradientOfTheDraws differs .* gradient of ",
    ProposesAnotherSize: r"ProposesAnotherSize\.proposal at step 1 has event shape \(4,\), not",
}


@pytest.mark.parametrize("fault", GUIDE_FAULTS)
def test_a_fault_of_a_guide_is_named(fault: Callable[[SequenceModel], SequenceGuide]) -> None:
    model = Walk()
    with pytest.raises(AssertionError, match=GUIDE_FAULTS[fault]) as caught:
        check(model, fault(model), data())
    assert "\n" not in str(caught.value)


def test_every_check_finds_a_fault_of_its_own_and_can_be_called_by_itself() -> None:
    finders = {
        testing.check_shapes: (InitOfAnotherShape, WalkGuide),
        testing.check_sites: (AnotherSite, WalkGuide),
        testing.check_pure: (CountsItsCalls, WalkGuide),
        testing.check_ownership: (Walk, OwnsItsModel),
        testing.check_finite: (InfiniteAtStepThree, WalkGuide),
        testing.check_broadcasting: (CatsItsInputs, WalkGuide),
        testing.check_loop_is_rollout: (LateWhenStacked, ScaledWhenStacked),
        testing.check_padding_is_not_read: (Walk, ReadsPadding),
        testing.check_padded_is_unpadded: (Walk, ReadsPadding),
        testing.check_generation: (DrawsIntegers, WalkGuide),
        testing.check_state_dict: (LoadsWrongly, WalkGuide),
    }
    assert finders.keys() == set(testing.CHECKS)
    correct = Walk()
    x = data()
    x[:, 1] = 7.0
    for one, (model, guide) in finders.items():
        one(correct, WalkGuide(correct), x)
        faulty = model()
        with pytest.raises(AssertionError):
            one(faulty, guide(faulty), x)


def test_single_precision_finds_larger_faults() -> None:
    model = LateWhenStacked()
    guide = WalkGuide(model)
    model.float(), guide.float()
    with pytest.raises(AssertionError, match="LateWhenStacked.transition"):
        check(model, guide, data(dtype=torch.float32))
