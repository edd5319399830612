"""Losses against Pyro's RenyiELBO, against formulas written out, and against one another."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO
from torch import Tensor, nn

from inference import ELBO, FIVO, IWAE, Clock, Ramp
from inference.densities import StepDensities
from inference.particles import Bootstrap
from pyro_avrnn import recipes
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.models.lgssm import LGSSM, ExactSmoother, LGSSMState
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.unit.table import (
    CASES,
    FEW,
    PROPOSALS,
    H,
    X,
    Z,
    assert_all_close,
    assert_close,
    gradients,
    observations,
    parameters,
    prefix_mask,
    value_and_gradients,
)

LENGTHS = (4, 2, 3)
FILTERING = "vrnn-filtering-conditional-normal-gru"
VRNNS = [name for name in FEW if name.startswith("vrnn")]
Gradients = dict[str, Tensor]


GUIDES: dict[str, Callable[[], Recipe]] = {
    name: lambda part=part: recipes.vrnn(X, Z, H, **part) for name, part in PROPOSALS.items()
} | {"smoothing": lambda: recipes.vrnn(X, Z, H, guide="smoothing")}


def data(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A ragged batch that the model can score."""
    return observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


def drawn(recipe: Recipe, particles: int, *args: Any) -> StepDensities:
    """The densities that a loss sees under :func:`value_and_gradients`."""
    torch.manual_seed(7)
    return recipe.model.rollout(recipe.guide, *args, num_particles=particles)


def part(found: Gradients, which: str) -> Gradients:
    """Those of the "model", or of the "guide"."""
    return {name: g for name, g in found.items() if name.startswith(f"{which}.")}


def identical(one: Gradients, other: Gradients) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def compare(recipe: Recipe, ours: Any, theirs: Any, *args: Any) -> None:
    """Two losses with the same value and gradients: rtol 1e-10."""
    value, found = value_and_gradients(recipe, ours, *args)
    expected_value, expected = value_and_gradients(recipe, theirs, *args)
    assert_close(value, expected_value, "value")
    assert_all_close(found, expected)


# Pyro's importance-weighted bound: it keeps the plate of sequences apart, so takes whole batches


def renyi(particles: int, alpha: float = 0.0) -> RenyiELBO:
    return RenyiELBO(alpha, particles, vectorize_particles=particles > 1, max_plate_nesting=1)


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("case", FEW)
def test_iwae_is_pyros_renyi_elbo_at_alpha_zero(case: str, particles: int) -> None:
    recipe = CASES[case]()
    compare(recipe, IWAE(num_particles=particles), renyi(particles), *data(recipe))


def one_weight_for_the_batch(model: Any, guide: Any, *args: Any) -> Tensor:
    """A planted fault: particles of different sequences share a weight."""
    d = model.rollout(guide, *args, num_particles=4)
    return math.log(4) - d.log_weight.sum(dim=(0, 2)).logsumexp(dim=0)


@pytest.mark.parametrize(
    "other",
    [IWAE(num_particles=3), ELBO(num_particles=4), one_weight_for_the_batch, renyi(4, 0.01)],
)
def test_the_comparison_with_pyro_rejects_another_loss(other: Any) -> None:
    recipe = CASES[FILTERING]()
    with pytest.raises(AssertionError, match="value"):
        compare(recipe, other, renyi(4), *data(recipe))


@pytest.mark.parametrize("case", VRNNS)
def test_the_comparison_with_pyro_rejects_the_other_gradient(case: str) -> None:
    recipe = CASES[case]()
    with pytest.raises(AssertionError, match="guide"):
        compare(recipe, IWAE(doubly_reparameterised=True), renyi(4), *data(recipe))


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("case", FEW)
def test_losses_that_are_the_same_in_special_cases(case: str, kl_weight: float) -> None:
    recipe = CASES[case]()
    args = data(recipe)
    elbo = ELBO(kl_weight=kl_weight)
    compare(recipe, IWAE(num_particles=1, kl_weight=kl_weight), elbo, *args)
    compare(recipe, FIVO(num_particles=1, kl_weight=kl_weight), elbo, *args)
    iwae = IWAE(num_particles=4, kl_weight=kl_weight)
    compare(recipe, FIVO(num_particles=4, criterion="never", kl_weight=kl_weight), iwae, *args)


# the ELBO, written out


def normal_kl(q: dist.Distribution, p: dist.Distribution) -> Tensor:
    """KL of diagonal normals, summed over features."""
    ratio = (q.stddev / p.stddev).square()
    distance = ((q.mean - p.mean) / p.stddev).square()
    return 0.5 * (ratio + distance - 1.0 - ratio.log()).sum(dim=-1)


def kl_by_hand(d: StepDensities, analytic: bool) -> Tensor:
    """KL of every step, ``(T, K, B)``; means nothing where padded."""
    return normal_kl(d.proposal, d.prior) if analytic else d.log_proposal - d.log_prior


def frames(mask: Tensor) -> Iterator[tuple[int, int]]:
    """(t, b) of every observed frame."""
    return ((t, b) for b in range(mask.shape[0]) for t in range(int(mask[b].sum())))


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0, 2.0])
@pytest.mark.parametrize("case", ["vrnn-residual-conditional-normal-gru", FILTERING])
def test_elbo_is_reconstruction_less_the_weighted_kl(
    case: str, kl_weight: float, analytic: bool
) -> None:
    recipe = CASES[case]()
    x, mask = data(recipe)
    loss = ELBO(num_particles=3, kl_weight=kl_weight, analytic_kl=analytic)
    value, found = value_and_gradients(recipe, loss, x, mask)
    d = drawn(recipe, 3, x, mask)
    step = d.log_emission - kl_weight * kl_by_hand(d, analytic)
    by_hand = -sum(step[t, :, b].mean() for t, b in frames(mask))
    assert_close(value, by_hand.detach())
    assert_all_close(found, gradients(recipe, by_hand))


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_free_bits_floor_the_batch_mean_of_every_steps_kl(
    kl_weight: float, analytic: bool
) -> None:
    recipe = CASES[FILTERING]()
    x, mask = data(recipe)
    d = drawn(recipe, 3, x, mask)
    kl = kl_by_hand(d, analytic)
    means = []
    for t in range(max(LENGTHS)):
        there = [b for b in range(len(LENGTHS)) if t < LENGTHS[b]]
        means.append((torch.stack([kl[t, :, b].mean() for b in there]).mean(), len(there)))
    bits = torch.stack([mean for mean, _ in means]).detach().quantile(0.4).item()
    fit = sum(d.log_emission[t, :, b].mean() for t, b in frames(mask))
    charged = [mean if mean > bits else torch.tensor(bits) for mean, _ in means]
    assert 0 < sum(not c.requires_grad for c in charged) < len(charged)  # some are free
    by_hand = kl_weight * sum(c * n for c, (_, n) in zip(charged, means, strict=True)) - fit
    loss = ELBO(num_particles=3, kl_weight=kl_weight, analytic_kl=analytic, free_bits=bits)
    value, found = value_and_gradients(recipe, loss, x, mask)
    assert_close(value, by_hand.detach())
    assert_all_close(found, gradients(recipe, by_hand))


def test_no_free_bits_are_the_elbo_and_very_many_leave_the_reconstruction() -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    for analytic in (False, True):
        plain = ELBO(num_particles=2, analytic_kl=analytic)
        few = ELBO(num_particles=2, analytic_kl=analytic, free_bits=1e-9)
        if analytic:  # a sampled KL may be below zero, and is then floored even so
            compare(recipe, few, plain, *args)
        value, found = value_and_gradients(recipe, ELBO(free_bits=1e3), *args)
        expected, wanted = value_and_gradients(recipe, ELBO(kl_weight=0.0), *args)
        assert_close(value, expected + 1e3 * sum(LENGTHS))
        assert_all_close(found, wanted)


@pytest.mark.parametrize("loss", [ELBO, IWAE])
def test_a_kl_weight_of_zero_asks_nothing_of_the_kl(loss: Callable[..., Any]) -> None:
    recipe = CASES[FILTERING]()
    d = drawn(recipe, 4, *data(recipe))
    impossible = d._replace(log_prior=torch.full_like(d.log_prior, -math.inf))
    objective = loss(num_particles=4, kl_weight=0.0)
    assert torch.equal(objective.loss(impossible), objective.loss(d))


# penalties


@dataclass
class Distance:
    """A penalty that needs no draws: the mean square of z over observed frames and particles."""

    weight: Any = 1.0
    name: str = "distance"
    seen: list[Tensor] = field(default_factory=list)

    def penalty(self, densities: StepDensities) -> Tensor:
        square = densities.z.square().sum(dim=-1)
        self.seen.append(square[densities.mask.expand_as(square)].mean())
        return self.seen[-1]


LOSSES: dict[str, Callable[..., Any]] = {
    "elbo": lambda **kw: ELBO(num_particles=4, kl_weight=0.7, **kw),
    "elbo-analytic": lambda **kw: ELBO(num_particles=4, analytic_kl=True, free_bits=0.1, **kw),
    "iwae": lambda **kw: IWAE(num_particles=4, kl_weight=0.7, **kw),
    "iwae-plain": lambda **kw: IWAE(num_particles=4, **kw),
    "iwae-doubly": lambda **kw: IWAE(num_particles=4, doubly_reparameterised=True, **kw),
    "fivo": lambda **kw: FIVO(num_particles=4, criterion="always", **kw),
    "fivo-score": lambda **kw: FIVO(
        num_particles=4, resampler="multinomial", score_function=True, **kw
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_penalty_adds_its_weight_times_the_frames_times_itself(name: str) -> None:
    recipe = CASES["vrnn-residual-conditional-normal-gru"]()
    args = data(recipe)
    value, found = value_and_gradients(recipe, LOSSES[name](), *args)
    reg = Distance(weight=0.4)
    loss = LOSSES[name](penalties=[reg])
    total, total_gradients = value_and_gradients(recipe, loss, *args)
    torch.manual_seed(7)
    loss(recipe.model, recipe.guide, *args)  # once more, for the penalty's own gradients
    own = reg.seen[-1]
    assert own == reg.seen[0]
    assert_close(total, value + 0.4 * sum(LENGTHS) * own.detach())
    added = gradients(recipe, 0.4 * sum(LENGTHS) * own)
    assert any(bool(g.abs().max() > 1e-3) for g in part(added, "guide").values())
    assert_all_close(total_gradients, {n: found[n] + added[n] for n in found})


def test_penalties_have_weights_of_their_own_on_the_objectives_clock() -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    two = [Distance(0.25, "first"), Distance(Ramp(0.0, 2.0), "second")]
    loss = IWAE(penalties=two, clock=Clock(total=4, calls=1))
    value, _ = value_and_gradients(recipe, loss, *args)
    expected, _ = value_and_gradients(recipe, IWAE(), *args)
    assert (loss.terms["first_weight"], loss.terms["second_weight"]) == (0.25, 0.5)
    assert_close(value, expected + 0.75 * sum(LENGTHS) * loss.terms["first_penalty"])


@pytest.mark.parametrize("options", [{}, {"kl_weight": 0.3, "analytic_kl": True}])
def test_the_regularised_elbo_is_the_elbo_with_penalties(options: dict[str, Any]) -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    one = ELBO(penalties=[Distance(0.4)], num_particles=2, **options)
    other = ELBO(penalties=[Distance(0.4)], num_particles=2, **options)
    value, found = value_and_gradients(recipe, one, *args)
    expected, wanted = value_and_gradients(recipe, other, *args)
    assert torch.equal(value, expected) and identical(found, wanted)
    assert one.terms == other.terms and isinstance(one, ELBO)
    assert ELBO().penalties == ()


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_that_no_sequence_has_changes_nothing(name: str) -> None:
    recipe = CASES[FILTERING]()
    x, mask = data(recipe)
    longer = torch.cat([x, x[:, :1]], dim=1), torch.cat([mask, mask[:, :1] & False], dim=1)
    value, found = value_and_gradients(recipe, LOSSES[name](), *longer)
    expected, wanted = value_and_gradients(recipe, LOSSES[name](), x, mask)
    assert_close(value, expected)
    assert_all_close(found, wanted)


# what is told of a call


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_nats_a_frame_of_what_the_loss_was_made_of(name: str) -> None:
    recipe = CASES[FILTERING]()
    x, mask = data(recipe)
    reg = Distance(weight=0.4)
    objective = LOSSES[name](penalties=[reg], clock=Clock(calls=5))
    torch.manual_seed(7)
    loss = objective(recipe.model, recipe.guide, x, mask)
    terms, price, count = objective.terms, 0.4 * sum(LENGTHS), sum(LENGTHS)
    bound = name.split("-")[0]
    if bound != "elbo" and objective.kl_weight != 1.0:
        bound = "objective"  # of weighted terms: no bound
    plain = {bound, "reconstruction", "kl", "elbo", "kl_weight"}
    assert set(terms) == plain | {"distance_penalty", "distance_weight"}
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in terms.values())
    assert (terms["kl_weight"], terms["distance_weight"]) == (objective.kl_weight, 0.4)
    assert torch.equal(terms["distance_penalty"], reg.seen[0].detach())
    if bound != "elbo":
        assert_close(terms[bound], (price * reg.seen[0] - loss).detach() / count)
    assert_close(terms["elbo"], terms["reconstruction"] - terms["kl"])
    if "fivo" not in name:  # whose particles cannot be drawn here
        d = drawn(recipe, 4, x, mask)
        for term, values in (
            ("reconstruction", d.log_emission),
            ("kl", kl_by_hand(d, analytic=False)),
        ):
            by_hand = sum(values[t, :, b].mean() for t, b in frames(mask)).detach() / count
            assert_close(terms[term], by_hand, term)


@pytest.mark.parametrize("name", LOSSES)
def test_the_clock_counts_calls_with_gradients(name: str) -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    objective = LOSSES[name]()
    svi = SVI(recipe.model, recipe.guide, pyro.optim.SGD({"lr": 0.0}), loss=objective)
    for calls in (1, 2, 3):
        svi.step(*args)
        assert objective.clock.calls == calls
        svi.evaluate_loss(*args)
        with torch.no_grad():
            objective(recipe.model, recipe.guide, *args)
        assert objective.clock.calls == calls


@pytest.mark.parametrize("loss", [ELBO, IWAE, partial(IWAE, doubly_reparameterised=True), FIVO])
def test_a_scheduled_kl_weight_follows_the_clock(loss: Callable[..., Any]) -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)
    objective = loss(num_particles=2, kl_weight=Ramp(0.0, 1.0, over=0.5), clock=Clock(total=4))
    for expected in (0.0, 0.5, 1.0, 1.0, 1.0):
        value, found = value_and_gradients(recipe, objective, *args)
        assert objective.terms["kl_weight"] == expected
        fixed = value_and_gradients(recipe, loss(num_particles=2, kl_weight=expected), *args)
        assert torch.equal(value, fixed[0]) and identical(found, fixed[1])
    clueless = loss(kl_weight=Ramp(0.0, 1.0))
    with pytest.raises(ValueError, match="clock=Clock"):
        clueless(recipe.model, recipe.guide, *args)


def test_objectives_share_nothing() -> None:
    one, other = IWAE(), IWAE()
    assert one.clock is not other.clock and one.terms is not other.terms


# doubly reparameterised gradients


def dreg_by_hand(recipe: Recipe, kl_weight: float, *args: Any) -> Gradients:
    """Tucker et al. (2019), eq. 8, tempered: paths weighted by (1 - b) w + b w^2."""
    d = drawn(recipe, 4, *args)
    frozen = copy.deepcopy(recipe.guide).requires_grad_(False)  # the density, not the draws
    log_q = frozen.proposal(d.states, d.c.detach()).log_prob(d.z)
    surrogate = torch.zeros(())
    for b, length in enumerate(LENGTHS):
        steps = d.log_emission + kl_weight * (d.log_prior - log_q)
        log_w = steps[:length, :, b].sum(dim=0)
        w = log_w.detach().exp() / log_w.detach().exp().sum()
        surrogate = surrogate - (((1 - kl_weight) * w + kl_weight * w**2) * log_w).sum()
    return gradients(recipe, surrogate)


def both(recipe: Recipe, *args: Any, **options: Any) -> tuple[tuple[Tensor, Gradients], ...]:
    """IWAE-4 with plain gradients, and with doubly reparameterised ones."""
    options = {"num_particles": 4, **options}
    return tuple(
        value_and_gradients(recipe, IWAE(doubly_reparameterised=doubly, **options), *args)
        for doubly in (False, True)
    )


@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
@pytest.mark.parametrize("guide", GUIDES)
def test_dreg_changes_the_guides_gradients_alone(guide: str, kl_weight: float) -> None:
    recipe = GUIDES[guide]()
    args = data(recipe)
    (value, plain), (same, doubly) = both(recipe, *args, kl_weight=kl_weight)
    assert torch.equal(value, same)
    assert identical(part(plain, "model"), part(doubly, "model"))
    for name, gradient in part(doubly, "guide").items():
        assert (gradient - plain[name]).abs().max() > 1e-3 * plain[name].abs().max(), name
    assert_all_close(part(doubly, "guide"), part(dreg_by_hand(recipe, kl_weight, *args), "guide"))


def test_the_formula_of_dreg_rejects_the_plain_gradient() -> None:
    recipe = GUIDES["smoothing"]()
    args = data(recipe)
    (_, plain), _ = both(recipe, *args)
    with pytest.raises(AssertionError, match="guide"):
        assert_all_close(part(plain, "guide"), part(dreg_by_hand(recipe, 1.0, *args), "guide"))


@pytest.mark.parametrize("guide", GUIDES)
def test_dreg_is_the_plain_gradient_without_a_kl(guide: str) -> None:
    recipe = GUIDES[guide]()
    (value, plain), (same, doubly) = both(recipe, *data(recipe), kl_weight=0.0)
    assert torch.equal(value, same)
    assert_all_close(doubly, plain)


@pytest.mark.parametrize("guide", GUIDES)
def test_dreg_leaves_a_penaltys_gradient_as_it_is(guide: str) -> None:
    recipe = GUIDES[guide]()
    args = data(recipe)
    without = both(recipe, *args)
    penalised = both(recipe, *args, penalties=[Distance(0.4)])
    for name in without[0][1]:
        added = [a[1][name] - b[1][name] for a, b in zip(penalised, without, strict=True)]
        torch.testing.assert_close(*added, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", ["rnn-normal-gru", "frozen"])
def test_dreg_of_a_guide_with_nothing_to_train_is_iwae(case: str) -> None:
    recipe = CASES[FILTERING]() if case == "frozen" else CASES[case]()
    recipe.guide.requires_grad_(False)
    (value, plain), (same, doubly) = both(recipe, *data(recipe))
    assert torch.equal(value, same) and identical(plain, doubly)
    assert not any(p.requires_grad for p in recipe.guide.parameters())


@pytest.mark.parametrize("guide", GUIDES)
def test_dreg_leaves_a_frozen_parameter_frozen_and_the_others_trainable(guide: str) -> None:
    recipe = GUIDES[guide]()
    args = data(recipe)
    wanted = part(dreg_by_hand(recipe, 1.0, *args), "guide")
    frozen = next(iter(wanted))
    parameters(recipe)[frozen].requires_grad_(False)
    _, (_, doubly) = both(recipe, *args)
    assert [n for n, p in parameters(recipe).items() if not p.requires_grad] == [frozen]
    assert_all_close(part(doubly, "guide"), wanted | {frozen: torch.zeros_like(wanted[frozen])})


def test_dreg_leaves_parameters_that_the_model_has_too_as_they_are() -> None:
    recipe = CASES[FILTERING]()
    recipe.guide.lent = recipe.model.encode_x  # registered with both, and read by the guide
    (value, plain), (same, doubly) = both(recipe, *data(recipe))
    assert torch.equal(value, same)
    assert identical(part(plain, "model"), part(doubly, "model"))
    assert not identical(part(plain, "guide"), part(doubly, "guide"))


class Interrupted(FilteringGuide):
    """Fails where its parameters are held constant."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        if not next(self.network.parameters()).requires_grad:
            raise KeyboardInterrupt
        return super().proposal(state, c_t)


def test_dreg_gives_the_parameters_back_when_a_proposal_fails() -> None:
    model = CASES[FILTERING]().model
    recipe = Recipe(model, Interrupted(model, (H,)))
    objective = IWAE(doubly_reparameterised=True)
    with pytest.raises(KeyboardInterrupt):
        objective(model, recipe.guide, *data(recipe))
    assert all(p.requires_grad for p in parameters(recipe).values())
    assert objective.clock.calls == 0


class OneStep(SequenceGuide):
    """q(z | x) = N(a x + b, s^2), the posterior of z ~ N(0, 1), x ~ N(z, 1) as it begins."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.s = nn.Parameter(torch.tensor(0.5).sqrt())

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        loc = (self.a * c_t + self.b).expand_as(state.mean)
        return dist.Normal(loc, self.s).to_event(1)


class Adjusted(ExactSmoother):
    """The exact smoother, shifted by 0 and stretched by 1: both may be trained."""

    def __init__(self, model: LGSSM) -> None:
        super().__init__(model)
        self.shift = nn.Parameter(torch.zeros(self.z_dim))
        self.stretch = nn.Parameter(torch.ones(()))

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        exact = super().proposal(state, c_t)
        return dist.MultivariateNormal(
            exact.mean + self.shift, scale_tril=self.stretch * exact.scale_tril
        )


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize(("length", "z_dim"), [(1, 1), (1, 2), (4, 1), (4, 2)])
def test_dreg_is_zero_for_every_draw_where_the_guide_is_the_posterior(
    length: int, z_dim: int, particles: int
) -> None:
    if (length, z_dim) == (1, 1):
        model = LGSSM.scalar(s0=1.0, r=1.0)
        recipe = Recipe(model, OneStep(model))
    else:
        model = LGSSM.random(z_dim, 2, seed=5)
        recipe = Recipe(model, Adjusted(model))
    x = torch.randn(3, length, model.x_dim)
    mask = prefix_mask((1, length, length))
    (value, plain), (same, doubly) = both(recipe, x, mask, num_particles=particles)
    assert torch.equal(value, same)
    assert identical(part(plain, "model"), part(doubly, "model"))
    for name, gradient in part(doubly, "guide").items():
        assert gradient.abs().max() < 1e-11 and plain[name].abs().min() > 1e-3, name
    parameters(recipe)["guide.b" if z_dim == length == 1 else "guide.shift"].data += 0.1
    _, (_, elsewhere) = both(recipe, x, mask, num_particles=particles)
    assert all(g.abs().max() > 1e-3 for g in part(elsewhere, "guide").values())


# errors


@pytest.mark.parametrize("loss", [ELBO, IWAE, FIVO])
@pytest.mark.parametrize("particles", [0, -3])
def test_too_few_particles_are_refused(loss: Callable[..., Any], particles: int) -> None:
    with pytest.raises(ValueError, match=f"num_particles must be at least 1, got {particles}"):
        loss(num_particles=particles)


@pytest.mark.parametrize("loss", [ELBO])
@pytest.mark.parametrize("bits", [-0.1, math.nan])
def test_free_bits_below_zero_are_refused(loss: Callable[..., Any], bits: float) -> None:
    with pytest.raises(
        ValueError, match=f"free_bits must be at least 0.0, got {bits} nats a frame"
    ):
        loss(free_bits=bits)


@pytest.mark.parametrize("resampler", ["systematic", "stratified"])
def test_the_score_of_dependent_ancestors_is_refused(resampler: str) -> None:
    with pytest.raises(NotImplementedError, match="use resampler='multinomial'"):
        FIVO(score_function=True, resampler=resampler)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resampler": "best"}, "resampler must be one of multinomial, stratified, sys"),
        ({"criterion": "often"}, "criterion must be one of never, always, ess, or a function"),
    ],
)
def test_unknown_parts_of_a_filter_are_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FIVO(**options)


def test_dreg_needs_a_rollout_and_a_guide_that_is_a_module() -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)

    def program(x: Tensor, mask: Tensor) -> Tensor:
        return recipe.model(x, mask)

    objective = IWAE(doubly_reparameterised=True)
    lent = Bootstrap(recipe.model)  # a guide, but no module
    bare = SimpleNamespace(encode=lent.encode, proposal=lent.proposal, named_parameters=tuple)
    for model, guide in ((recipe.model, bare), (program, recipe.guide)):
        IWAE()(model, guide, *args)
        with pytest.raises(NotImplementedError, match="use IWAE.doubly_reparameterised=False"):
            objective(model, guide, *args)
    assert objective.clock.calls == 0


def test_fivo_needs_single_steps_and_says_which() -> None:
    recipe = CASES[FILTERING]()
    args = data(recipe)

    def program(x: Tensor, mask: Tensor) -> Tensor:
        return recipe.model(x, mask)

    with pytest.raises(TypeError, match="model must have .* but program lacks init, transition"):
        FIVO()(program, recipe.guide, *args)
    with pytest.raises(TypeError, match="guide must have .* lacks encode, proposal; .* IWAE"):
        FIVO()(recipe.model, program, *args)
