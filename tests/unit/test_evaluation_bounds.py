"""``evaluate``: the particle filter's bound, particles in portions, and weights that fail."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor

from inference import DegenerateWeightsError, evaluate, particle_filter, seeded
from inference.particles import Filtered
from inference.weights import effective_sample_size, pareto_k
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.reference import kalman
from tests.unit.table import CASES, X, observations, prefix_mask

LENGTHS = (4, 2, 5, 1, 3)
FRAMES, COUNT = sum(LENGTHS), len(LENGTHS)
VRNN = "vrnn-filtering-conditional-normal-gru"


def data(recipe: Recipe) -> tuple[Tensor, Tensor]:
    return observations(recipe, COUNT, max(LENGTHS)), prefix_mask(LENGTHS)


def portions(batch_size: int) -> list[tuple[slice, int]]:
    """Which sequences are scored together, and the steps that the longest of them has."""
    cuts = [slice(i, min(i + batch_size, COUNT)) for i in range(0, COUNT, batch_size)]
    return [(cut, max(LENGTHS[cut])) for cut in cuts]


def averages(values: list[float]) -> dict[str, float]:
    """Means a frame and a sequence, and their standard errors over sequences."""
    ratio, mean = sum(values) / FRAMES, sum(values) / COUNT
    residuals = [v - ratio * n for v, n in zip(values, LENGTHS, strict=True)]
    spread = sum((v - mean) ** 2 for v in values)
    return {
        "per_frame": ratio,
        "per_frame_se": math.sqrt(COUNT / (COUNT - 1) * sum(r * r for r in residuals)) / FRAMES,
        "per_sequence": mean,
        "per_sequence_se": math.sqrt(spread / (COUNT - 1) / COUNT),
    }


def assert_reported(found: Any, name: str, values: list[float]) -> None:
    for suffix, value in averages(values).items():
        assert getattr(found, f"{name}_{suffix}") == pytest.approx(value, rel=1e-10), suffix


# ---- the filter ----


def survivors(filtered: Filtered, b: int) -> int:
    """How many particles of step 1 the last ones of sequence b descend from, traced one by one."""
    steps, particles, _ = filtered.ancestors.shape
    first = set()
    for k in range(particles):
        for t in range(steps - 1, 0, -1):
            k = int(filtered.ancestors[t, k, b])
        first.add(k)
    return len(first)


@pytest.mark.parametrize("batch_size", [2, 50])
@pytest.mark.parametrize(
    ("resampler", "criterion"),
    [("systematic", "ess"), ("multinomial", "always"), ("stratified", "never")],
)
def test_the_filters_numbers_are_those_of_the_particle_filter(
    resampler: str, criterion: str, batch_size: int
) -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    x = 5.0 * x  # of small data all particles weigh about the same, and none is lost
    found = evaluate(
        recipe.model,
        recipe.guide,
        x,
        mask,
        num_particles=3,
        fivo_particles=8,
        batch_size=batch_size,
        resampler=resampler,
        criterion=criterion,
        seed=4,
    )
    evidence, ess, first, resampled = [], 0.0, [], False
    with seeded(4), torch.no_grad():
        for cut, longest in portions(batch_size):  # the draws of the other bounds come before
            recipe.model.rollout(recipe.guide, x[cut, :longest], mask[cut, :longest], 3)
        for cut, longest in portions(batch_size):
            filtered = particle_filter(
                recipe.model,
                recipe.guide,
                x[cut, :longest],
                mask[cut, :longest],
                num_particles=8,
                resampler=resampler,
                criterion=criterion,
            )
            evidence += filtered.log_evidence.tolist()
            resampled = resampled or bool(filtered.resampled.any())
            for b, length in enumerate(LENGTHS[cut]):
                ess += sum(filtered.ess[:length, b].tolist())
                first.append(survivors(filtered, b))
    assert resampled == (criterion != "never")
    assert found.fivo_particles == 8
    assert_reported(found, "fivo", evidence)
    assert found.filter_ess == pytest.approx(ess / FRAMES, rel=1e-10)
    assert found.filter_first_ancestors == pytest.approx(sum(first) / COUNT, rel=1e-12)
    # the twin: an average of sequences' averages is another number
    naive = sum(v / n for v, n in zip(evidence, LENGTHS, strict=True)) / COUNT
    assert abs(naive - found.fivo_per_frame) > 1e-3


def test_without_the_filter_its_numbers_are_absent_and_the_others_are_the_same() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    plain = evaluate(recipe.model, recipe.guide, x, mask, num_particles=30).as_dict()
    more = evaluate(recipe.model, recipe.guide, x, mask, num_particles=30, fivo_particles=2)
    own = {name for name in plain if name.startswith(("fivo", "filter"))}
    assert len(own) == 7 and all(plain[name] is None for name in own)
    for name, value in more.as_dict().items():
        assert (value is not None) if name in own else value == plain[name], name


def test_an_rnns_filter_gives_its_exact_log_likelihood() -> None:
    recipe = CASES["rnn-normal-gru"]()
    x, mask = data(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=1, fivo_particles=3)
    with torch.no_grad():
        exact = recipe.model.rollout(recipe.guide, x, mask).log_emission.sum(dim=(0, 1))
    assert_reported(found, "fivo", exact.tolist())
    assert_reported(found, "iwae", exact.tolist())
    assert found.filter_ess == pytest.approx(3.0) and found.filter_first_ancestors == 3.0


def test_a_pair_without_single_steps_has_no_filter() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    model, guide = recipe.model.forward, recipe.guide.forward
    assert evaluate(model, guide, x, mask, num_particles=2).fivo_per_frame is None
    with pytest.raises(TypeError, match="lacks init, transition, emission, advance"):
        evaluate(model, guide, x, mask, num_particles=2, fivo_particles=2)


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "name", ["num_particles", "batch_size", "particles_at_once", "fivo_particles"]
)
def test_a_number_below_one_is_named(name: str, value: int) -> None:
    recipe = CASES[VRNN]()
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
        evaluate(recipe.model, recipe.guide, *data(recipe), **{name: value})


@pytest.mark.parametrize("name", ["resampler", "criterion"])
def test_an_unknown_part_of_the_filter_is_named(name: str) -> None:
    recipe = CASES[VRNN]()
    with pytest.raises(ValueError, match=f"{name} must be one of .*, or a function, got 'often'"):
        evaluate(recipe.model, recipe.guide, *data(recipe), fivo_particles=2, **{name: "often"})


# ---- particles in portions ----


class Drawn(NamedTuple):
    """What evaluate draws, all particles side by side, for some sequences."""

    log_weight: Tensor  # (T, K, B)
    log_emission: Tensor
    loc_q: Tensor  # (T, K, B, Z)
    scale_q: Tensor
    loc_p: Tensor
    scale_p: Tensor


def drawn(recipe: Recipe, x: Tensor, mask: Tensor, particles: int, at_once: int) -> Drawn:
    parts = []
    for done in range(0, particles, at_once):
        d = recipe.model.rollout(recipe.guide, x, mask, min(at_once, particles - done))
        moments = (d.proposal.mean, d.proposal.stddev, d.prior.mean, d.prior.stddev)
        parts.append(Drawn(d.log_weight, d.log_emission, *moments))
    return Drawn(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("at_once", [1, 8, 15, 29, 30, 64])
def test_particles_in_portions_are_averaged_as_if_drawn_together(at_once: int) -> None:
    recipe, particles = CASES[VRNN](), 30
    x, mask = data(recipe)
    found = evaluate(
        recipe.model,
        recipe.guide,
        x,
        mask,
        num_particles=particles,
        particles_at_once=at_once,
        batch_size=2,
        seed=7,
    )
    sums: dict[str, list[float]] = {name: [] for name in ("iwae", "elbo", "fit", "ess", "k")}
    frames: dict[str, list[Tensor]] = {name: [] for name in ("kl", "w2", "p", "q", "shift")}
    naive = []
    with seeded(7), torch.no_grad():
        for cut, longest in portions(2):
            d = drawn(recipe, x[cut, :longest], mask[cut, :longest], particles, at_once)
            total = d.log_weight.sum(dim=0)  # (K, B)
            sums["ess"] += effective_sample_size(total).tolist()
            sums["k"] += pareto_k(total).tolist()
            for b, length in enumerate(LENGTHS[cut]):
                weights = total[:, b].tolist()
                largest = max(weights)
                mean = math.fsum(math.exp(w - largest) for w in weights) / particles
                sums["iwae"].append(largest + math.log(mean))
                sums["elbo"].append(math.fsum(weights) / particles)
                sums["fit"].append(d.log_emission[:length, :, b].sum().item() / particles)
                chunks = torch.tensor(weights).split(at_once)
                naive.append(sum(c.mean().item() for c in chunks) / len(chunks))
                loc_q, scale_q, loc_p, scale_p = (part[:length, :, b] for part in d[2:])
                shift = (loc_q - loc_p) / scale_p
                ratio = (scale_q / scale_p).square()
                frames["kl"].append(0.5 * (ratio - 1 - ratio.log() + shift**2).sum(-1).mean(1))
                squares = (loc_q - loc_p).square() + (scale_q - scale_p).square()
                frames["w2"].append(squares.sum(-1).sqrt().mean(1))
                frames["p"].append(scale_p.mean((1, 2)))
                frames["q"].append(scale_q.mean((1, 2)))
                frames["shift"].append(shift.reshape(length * particles, -1))
    assert_reported(found, "iwae", sums["iwae"])
    assert_reported(found, "elbo", sums["elbo"])
    fit, elbo = sum(sums["fit"]) / FRAMES, sum(sums["elbo"]) / FRAMES
    expected = {name: torch.cat(values).mean(dim=0) for name, values in frames.items()}
    for name, value in (
        ("reconstruction_per_frame", fit),
        ("kl_per_frame", fit - elbo),
        ("closed_form_kl_per_frame", expected["kl"].item()),
        ("closed_form_w2_per_frame", expected["w2"].item()),
        ("prior_scale", expected["p"].item()),
        ("proposal_scale", expected["q"].item()),
        ("effective_sample_size", sum(sums["ess"]) / COUNT),
        ("pareto_k_median", torch.tensor(sums["k"]).median().item()),
        ("pareto_k_above_07", sum(k > 0.7 for k in sums["k"]) / COUNT),
        ("pareto_k_constant", 0.0),
    ):
        assert getattr(found, name) == pytest.approx(value, rel=1e-10, abs=1e-14), name
    moved = torch.cat(frames["shift"]).var(dim=0, unbiased=False)
    assert found.active_units == int((moved > 0.01).sum())
    if particles % at_once and at_once < particles:  # the twin: portions that count alike
        assert abs(sum(naive) / FRAMES - elbo) > 1e-4


def test_a_portion_of_all_particles_is_no_portion() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    runs = [
        evaluate(recipe.model, recipe.guide, x, mask, num_particles=9, particles_at_once=at_once)
        for at_once in (None, 9, 1000, 4)
    ]
    assert runs[0] == runs[1] == runs[2] != runs[3]


def test_long_sequences_are_cut_into_portions_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    asked: list[int] = []
    rollout = type(recipe.model).rollout

    def counted(self: Any, guide: Any, *args: Any, num_particles: int, **kwargs: Any) -> Any:
        asked.append(num_particles)
        return rollout(self, guide, *args, num_particles=num_particles, **kwargs)

    monkeypatch.setattr(type(recipe.model), "rollout", counted)
    # 10 particles of 5 steps are 50 frames: two sequences at once, the last one alone
    monkeypatch.setattr("inference.columns._FRAMES_AT_ONCE", 100)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=10, seed=2)
    assert asked == [10, 10, 10]
    asked.clear()
    monkeypatch.setattr("inference.columns._FRAMES_AT_ONCE", 20)  # not even one: 4 particles
    evaluate(recipe.model, recipe.guide, x[:1, :5], mask[:1].new_ones(1, 5), num_particles=10)
    assert asked == [4, 4, 2]
    monkeypatch.undo()
    explicit = {"num_particles": 10, "seed": 2, "batch_size": 2}
    assert evaluate(recipe.model, recipe.guide, x, mask, **explicit) == found


def test_many_particles_filter_fewer_sequences_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    given = {"num_particles": 1, "batch_size": 2, "fivo_particles": 6, "seed": 2}
    small = evaluate(recipe.model, recipe.guide, x, mask, **given)
    # 6 particles of 5 steps: 30 a sequence, so two fit, and one, and one although it does not
    for most, same in ((60, True), (59, False), (1, False)):
        monkeypatch.setattr("inference.evaluation._FILTERED_AT_ONCE", most)
        found = evaluate(recipe.model, recipe.guide, x, mask, **given)
        assert (found == small) == same
        assert math.isfinite(found.fivo_per_frame)


# ---- exact ----


def log_evidence(model: LGSSM, x: Tensor, lengths: tuple[int, ...]) -> list[float]:
    """Kalman's log p(x) of each sequence; 0 of one without steps."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    q, r, s = (p[f"{name}_scale_tril"] for name in ("transition", "emission", "initial"))
    a, c, m = (p[name] for name in ("transition_matrix", "emission_matrix", "initial_mean"))
    given = (a, q @ q.T, c, r @ r.T, m, s @ s.T)
    return [
        kalman.log_evidence(v[:n].numpy(), *given) if n else 0.0
        for v, n in zip(x, lengths, strict=True)
    ]


@pytest.mark.parametrize("lengths", [(4, 2, 5, 1, 3), (1, 1, 1), (3, 0, 1, 0, 0, 5)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 50])
@pytest.mark.parametrize("at_once", [None, 1, 7, 30])
def test_under_the_exact_smoother_any_portions_give_kalmans_evidence(
    at_once: int | None, batch_size: int, lengths: tuple[int, ...]
) -> None:
    model = LGSSM.random(2, 3, seed=1)
    x, mask = 2.0 * torch.randn(len(lengths), max(lengths), 3), prefix_mask(lengths)
    found = evaluate(
        model,
        ExactSmoother(model),
        x.where(mask[..., None], torch.nan),
        mask,
        num_particles=30,
        batch_size=batch_size,
        particles_at_once=at_once,
        fivo_particles=6,
        criterion="never",  # a filter that resamples under the smoother is not tight
    )
    exact = log_evidence(model, x, lengths)
    for name in ("iwae", "elbo", "fivo"):
        per_frame = getattr(found, f"{name}_per_frame")
        assert per_frame == pytest.approx(sum(exact) / sum(lengths), rel=1e-10)
        per_sequence = getattr(found, f"{name}_per_sequence")
        assert per_sequence == pytest.approx(sum(exact) / len(lengths), rel=1e-10)
    assert (found.frames, found.sequences) == (sum(lengths), len(lengths))
    assert found.effective_sample_size == pytest.approx(30.0, rel=1e-9)
    assert found.pareto_k_constant == 1.0
    assert found.pareto_k_median is None and found.pareto_k_above_07 is None


def test_other_guides_weights_are_not_constant() -> None:
    model = LGSSM.random(2, 3, seed=1)
    x, mask = 2.0 * torch.randn(COUNT, max(LENGTHS), 3), prefix_mask(LENGTHS)
    found = evaluate(model, ExactFilter(model), x, mask, num_particles=30)
    # but of the sequence of one step: the filter is the smoother there
    assert found.pareto_k_constant == pytest.approx(1 / COUNT)
    assert found.pareto_k_median is not None
    few = evaluate(model, ExactFilter(model), x, mask, num_particles=24)
    assert few.pareto_k_constant is None and few.pareto_k_median is None


def test_a_sequence_without_steps_adds_nothing_a_frame() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    given = {"num_particles": 30, "batch_size": 1, "seed": 5}
    plain = evaluate(recipe.model, recipe.guide, x, mask, **given)
    more_x, more_mask = torch.cat([x, x[:1] * torch.nan]), torch.cat([mask, mask[:1] & False])
    more = evaluate(recipe.model, recipe.guide, more_x, more_mask, **given)
    assert (more.sequences, more.frames) == (COUNT + 1, FRAMES)
    for name, value in plain.as_dict().items():
        of_weights = name.startswith(("effective", "pareto"))
        if of_weights or name.endswith(("per_frame", "_scale")) or name == "active_units":
            assert getattr(more, name) == value, name


# ---- weights that fail ----


class CeilingState(NamedTuple):
    before: Tensor


class Ceiling(SequenceModel):
    """z_t ~ N(0, 1) and x_t uniform from -10 to z_t: a large x_t leaves few particles a weight."""

    def __init__(self) -> None:
        super().__init__(x_dim=1, z_dim=1)

    def init(self, batch_shape: Size) -> CeilingState:
        return CeilingState(torch.zeros(*batch_shape, 1))

    def transition(self, state: CeilingState) -> dist.Distribution:
        loc = torch.zeros_like(state.before)
        return dist.Normal(loc, torch.ones_like(loc), validate_args=False).to_event(1)

    def emission(self, z_t: Tensor, state: CeilingState) -> dist.Distribution:
        low = torch.full_like(z_t, -10.0)
        return dist.Uniform(low, z_t, validate_args=False).to_event(1)

    def advance(self, state: CeilingState, z_t: Tensor, x_t: Tensor) -> CeilingState:
        return CeilingState(z_t)


class Prior(SequenceGuide):
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        return self.transition(state)


class NoNumber(Prior):
    """The prior; where x is positive, its mean is NaN."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        loc = torch.where(c_t > 0.0, torch.nan, torch.zeros_like(state.before))
        return dist.Normal(loc, torch.ones_like(loc), validate_args=False).to_event(1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize(("guide", "words"), [(Prior, "all zero"), (NoNumber, "not numbers")])
def test_a_sequence_without_weights_has_its_number_in_the_whole_set(
    guide: Callable[..., SequenceGuide], words: str, at_once: int | None, batch_size: int
) -> None:
    model, mask = Ceiling(), prefix_mask(LENGTHS)
    x = torch.full((COUNT, max(LENGTHS), 1), -9.0)
    x[4, 1:] = 100.0  # no particle is above that
    x[1, 2:] = 100.0  # padding, which is not looked at
    given = {"num_particles": 8, "batch_size": batch_size, "particles_at_once": at_once}
    with pytest.raises(DegenerateWeightsError) as error:
        evaluate(model, guide(model), x, mask, **given)
    assert (error.value.step, error.value.sequence) == (2, 4)
    assert f"weights at step 2 of sequence 4 (counted from 0) are {words}" in str(error.value)


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_a_sequence_that_the_filter_alone_loses_is_named_too(batch_size: int) -> None:
    model, mask = Ceiling(), prefix_mask(LENGTHS)
    x = torch.full((COUNT, max(LENGTHS), 1), -9.0)
    x[2, 3] = 2.5  # one particle in 160 is above that
    given: dict[str, Any] = {"num_particles": 4000, "batch_size": batch_size}
    assert math.isfinite(evaluate(model, Prior(model), x, mask, **given).iwae_per_frame)
    with pytest.raises(DegenerateWeightsError) as error:
        evaluate(model, Prior(model), x, mask, fivo_particles=1, **given)
    assert (error.value.step, error.value.sequence) == (4, 2)
    assert error.value.total == -math.inf


def test_a_portion_whose_weights_are_all_zero_is_outweighed_by_the_others() -> None:
    model, mask = Ceiling(), prefix_mask((1, 2))
    x = torch.full((2, 2, 1), -9.0)
    x[0] = 1.0  # one particle in six is above that
    found = evaluate(model, Prior(model), x, mask, num_particles=400, particles_at_once=1, seed=3)
    with seeded(3), torch.no_grad():
        total = torch.cat(
            [model.rollout(Prior(model), x, mask).log_weight.sum(dim=0) for _ in range(400)]
        )
    weights = total.exp().mean(dim=0).log()
    assert 0 < int(total[:, 0].isfinite().sum()) < 400
    assert found.iwae_per_sequence == pytest.approx(weights.mean().item(), rel=1e-10)
    assert found.elbo_per_frame == -math.inf
    assert math.isfinite(found.effective_sample_size)


def test_features_of_the_wrong_size_are_the_models_to_refuse() -> None:
    recipe = CASES[VRNN]()
    with pytest.raises(ValueError, match=rf"x must have shape \(B, T, {X}\)"):
        evaluate(recipe.model, recipe.guide, torch.randn(2, 3, X + 1), prefix_mask((3, 3)))
