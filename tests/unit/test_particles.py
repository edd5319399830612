"""Particle filters and FIVO: resamplers, the running product by hand, and exact identities."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import (
    ELBO,
    FIVO,
    IWAE,
    DegenerateWeightsError,
    ess_below,
    fivo,
    particle_filter,
    seeded,
)
from inference.bounds import evidence_path, stretches
from inference.gradients import ancestor_score
from inference.particles import Filtered
from inference.resampling import CRITERIA, RESAMPLERS, Resampler, multinomial
from inference.weights import log_mean_exp
from pyro_avrnn.models import LGSSM, ExactFilter, LGSSMState
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide
from tests.unit.table import (
    CASES,
    FEW,
    assert_all_close,
    assert_close,
    gradients,
    observations,
    prefix_mask,
)

LENGTHS = (4, 2, 5, 1, 3)
VRNN = "vrnn-filtering-conditional-normal-gru"
WEIGHTS = (0.0, 0.31, 0.07, 0.0, 0.42, 0.013, 0.187, 0.0)
FLAG = 99.0


def data(recipe: Recipe, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    return observations(recipe, len(lengths), max(lengths)), prefix_mask(lengths)


def log_weights(size: int, weights: tuple[float, ...] = WEIGHTS) -> Tensor:
    """(K, B), the same in every column."""
    return torch.tensor(weights).log().unsqueeze(1).expand(-1, size)


def counts(index: Tensor) -> Tensor:
    """How often each particle goes on, (K, B)."""
    return torch.nn.functional.one_hot(index, len(index)).sum(dim=0).t()


def every_resampler(test: Callable) -> Callable:
    return pytest.mark.parametrize("resampler", RESAMPLERS.values(), ids=list(RESAMPLERS))(test)


def assert_same(actual: Filtered, expected: Filtered) -> None:
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(actual, name), value), name


# resamplers and criteria


@every_resampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_particle_of_weight_zero_goes_on(resampler: Resampler, dtype: torch.dtype) -> None:
    weights = torch.rand(9, 4000, dtype=dtype) * (torch.rand(9, 4000) < 0.5)
    weights[torch.randint(9, (4000,)), torch.arange(4000)] = 1.0  # one at least is positive
    index = resampler((weights / weights.sum(dim=0)).log())
    assert index.shape == weights.shape and index.dtype == torch.long
    assert int(index.min()) >= 0 and int(index.max()) < 9
    assert bool((weights.gather(0, index) > 0).all())


@every_resampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_nor_does_one_at_the_edge_of_what_is_drawn(
    monkeypatch: pytest.MonkeyPatch, resampler: Resampler, dtype: torch.dtype, size: int
) -> None:
    eps = torch.finfo(dtype).eps
    positive = torch.arange(size) % 3 == 1  # zeros before, between and after
    positive[size // 2] = True
    weights = torch.where(positive.unsqueeze(1), torch.rand(size, 20), 0.0).to(dtype)
    log_weight = (weights / weights.sum(dim=0)).log()
    for edge in (0.0, torch.finfo(dtype).tiny, eps / 2, 0.5, 1.0 - eps, 1.0 - eps / 2):
        monkeypatch.setattr(torch, "rand_like", lambda like, u=edge: torch.full_like(like, u))
        index = resampler(log_weight)
        assert int(index.min()) >= 0 and int(index.max()) < size
        assert bool((weights.gather(0, index) > 0).all())


def test_a_point_on_a_boundary_belongs_to_the_next_particle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = torch.tensor([0.0, 0.25, 0.5, 0.75])  # on the cumulative weights
    monkeypatch.setattr(torch, "rand_like", lambda like: points.unsqueeze(1).expand_as(like))
    index = multinomial(torch.tensor([[0.25, 0.0, 0.25, 0.5]]).T.log())
    assert index[:, 0].tolist() == [0, 2, 3, 3]


def test_the_counts_of_even_points_are_bounded() -> None:
    log_weight = (3 * torch.randn(12, 3000)).log_softmax(dim=0)
    expected = 12 * log_weight.exp()
    found = {name: counts(resampler(log_weight)) for name, resampler in RESAMPLERS.items()}
    systematic, stratified = found["systematic"], found["stratified"]
    assert bool((systematic >= expected.floor()).all() & (systematic <= expected.ceil()).all())
    low, high = expected.floor() - 1, expected.ceil() + 1
    assert bool((stratified >= low).all() & (stratified <= high).all())
    assert bool((stratified < expected.floor()).any())  # its bound is the wider one
    for name, n in found.items():  # below any point, one point of the grid more or less
        even = bool(((n - expected).cumsum(dim=0).abs() < 1 + 1e-12).all())
        assert even == (name in ("systematic", "stratified"))
    assert bool((found["residual"] >= expected.floor()).all())
    assert bool((found["multinomial"] < expected.floor()).any())


def assert_expected_counts(resampler: Resampler) -> None:
    n, expected = counts(resampler(log_weights(20_000))).double(), 8 * torch.tensor(WEIGHTS)
    error = n.std(dim=1) / math.sqrt(n.shape[1])
    assert bool(((n.mean(dim=1) - expected).abs() <= 5 * error).all())


@every_resampler
def test_a_particle_goes_on_as_often_as_its_weight_says(resampler: Resampler) -> None:
    assert_expected_counts(resampler)


@every_resampler
@pytest.mark.parametrize("power", [0.0, 0.95])
def test_planted_fault_flattened_weights(resampler: Resampler, power: float) -> None:
    with pytest.raises(AssertionError):
        assert_expected_counts(lambda w: resampler((w.clamp(min=-700.0) * power).log_softmax(0)))


def test_multinomial_draws_are_independent() -> None:
    n = counts(multinomial(log_weights(20_000))).double()
    w = torch.tensor(WEIGHTS)
    error = (w * (1 - w) / (8 * 20_000)).sqrt()  # of a frequency among all draws
    assert bool(((n.sum(dim=1) / (8 * 20_000) - w).abs() <= 5 * error).all())
    positive = w > 0
    spread = (n.var(dim=1) / (8 * w * (1 - w)))[positive]
    assert bool(((spread - 1).abs() < 0.1).all())  # a variance from 20000 draws: 0.01 to 0.03


def test_criteria_say_which_sequences_are_resampled() -> None:
    log_weight = torch.tensor([[0.25] * 4, [0.97, 0.01, 0.01, 0.01], [0.5, 0.5, 0, 0]]).T.log()
    # effective sample sizes 4, 1.06 and 2
    assert CRITERIA["never"](log_weight).tolist() == [False] * 3
    assert CRITERIA["always"](log_weight).tolist() == [True] * 3
    assert CRITERIA["ess"](log_weight).tolist()[:2] == [False, True]
    assert ess_below(0.49)(log_weight).tolist() == [False, True, False]
    assert ess_below(0.51)(log_weight).tolist() == [False, True, True]
    assert ess_below(0.26)(log_weight).tolist() == [False, False, False]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, 50, math.nan])
def test_a_fraction_outside_zero_to_one_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must be in \(0, 1\], got {fraction}"):
        ess_below(fraction)


# the running product, kept by hand


def by_hand(log_weight: Tensor, resampled: Tensor) -> tuple[list[float], list[list[list[float]]]]:
    """log Z_hat of every sequence, and of every stretch the product of each particle's weights."""
    length, particles, size = log_weight.shape
    evidence, every = [], []
    for b in range(size):
        product, finished = [1.0] * particles, []
        for t in range(length):
            product = [p * math.exp(log_weight[t, k, b]) for k, p in enumerate(product)]
            if t + 1 < length and resampled[t, b]:
                finished.append(product)
                product = [1.0] * particles
        finished.append(product)
        evidence.append(sum(math.log(sum(p) / particles) for p in finished))
        every.append(finished)
    return evidence, every


PATTERNS = {
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "first": lambda shape: (torch.arange(shape[0]) == 0).unsqueeze(1).expand(shape),
    "last": lambda shape: (torch.arange(shape[0]) == shape[0] - 1).unsqueeze(1).expand(shape),
    "every other": lambda shape: (torch.arange(shape[0]) % 2 == 1).unsqueeze(1).expand(shape),
    "one sequence": lambda shape: (torch.arange(shape[1]) == 2).expand(shape),
    "mixed": lambda shape: torch.rand(shape) < 0.5,
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
@pytest.mark.parametrize("lengths", [(6,) * 5, (6, 1, 4, 0, 2), (1,) * 5])
@pytest.mark.parametrize("particles", [1, 3])
def test_fivo_is_the_running_product_by_hand(
    pattern: Callable, lengths: tuple[int, ...], particles: int
) -> None:
    mask = prefix_mask(lengths).t()
    log_weight = 2 * torch.randn(len(mask), particles, 5)
    log_weight = torch.where(mask.unsqueeze(1), log_weight, 0.0)
    resampled = pattern((len(mask) - 1, 5)) & mask[1:]  # none after a sequence's last step
    expected, products = by_hand(log_weight, resampled)
    assert_close(fivo(log_weight, resampled), torch.tensor(expected))
    found = stretches(log_weight, resampled)
    assert len(found) == max(map(len, products))
    for b, finished in enumerate(products):
        padded = finished + [[1.0] * particles] * (len(found) - len(finished))
        assert_close(found[:, :, b].exp(), torch.tensor(padded))
    path = evidence_path(log_weight, resampled)
    for t in range(len(mask)):
        assert_close(path[t], torch.tensor(by_hand(log_weight[: t + 1], resampled[:t])[0]))


def test_planted_faults_differ_from_the_product_by_hand() -> None:
    log_weight = torch.randn(6, 3, 5)
    resampled = PATTERNS["every other"]((5, 5))
    expected = torch.tensor(by_hand(log_weight, resampled)[0])
    early = torch.cat([resampled[1:], resampled[:1]])  # a step too early
    for wrong in (fivo(log_weight, ~resampled), fivo(log_weight, early)):
        assert bool(((wrong - expected).abs() > 1e-3).all())


# one number by two paths


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
@pytest.mark.parametrize("criterion", ["always", ess_below(0.8)], ids=["always", "ess"])
def test_fivo_and_the_differentiable_filter_agree(
    name: str, resampler: str, criterion: Any
) -> None:
    recipe = CASES[name]()
    x, mask = data(recipe)
    x = 3 * x if recipe.model.expects.startswith("finite") else x
    given = {"num_particles": 5, "resampler": resampler, "criterion": criterion}
    with seeded(1):
        loss = FIVO(**given)(recipe.model, recipe.guide, x, mask)
    with seeded(1):
        found = particle_filter(recipe.model, recipe.guide, x, mask, **given)
    assert_close(-found.log_evidence.sum(), loss)
    expected = gradients(recipe, loss)
    assert_all_close(gradients(recipe, -found.log_evidence.sum()), expected)
    after_end = ~torch.cat([mask[:, 1:], mask[:, :1] & False], dim=1).t()
    assert not bool((found.resampled & after_end).any())
    if criterion == "always":
        assert torch.equal(found.resampled, ~after_end)
    elif recipe.model.z_dim:
        assert 0 < int(found.resampled.sum()) < int((~after_end).sum())
    if recipe.model.z_dim:  # the twin: other ancestors are another number
        with seeded(2):
            other = FIVO(**given)(recipe.model, recipe.guide, x, mask)
        assert not torch.isclose(other, loss, rtol=1e-6)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_fivo_that_never_resamples_is_iwae_draw_for_draw(name: str, resampler: str) -> None:
    recipe = CASES[name]()
    losses, states, slopes = [], [], []
    for objective in (
        IWAE(num_particles=4),
        FIVO(num_particles=4, resampler=resampler, criterion="never"),
    ):
        with seeded(1):
            losses.append(objective(recipe.model, recipe.guide, *data(recipe)))
            states.append(torch.get_rng_state())
        slopes.append(gradients(recipe, losses[-1]))
    assert_close(losses[1], losses[0])
    assert_all_close(slopes[1], slopes[0])
    assert torch.equal(*states)


@pytest.mark.parametrize("name", FEW)
def test_one_particle_is_the_elbo(name: str) -> None:
    recipe = CASES[name]()
    x, mask = data(recipe)

    def loss(objective: Any) -> Tensor:
        with seeded(1):
            return objective(recipe.model, recipe.guide, x, mask).detach()

    assert torch.equal(loss(IWAE(num_particles=1)), loss(ELBO()))
    assert_close(loss(FIVO(num_particles=1)), loss(ELBO()))  # its particle is always itself
    with seeded(1):
        found = particle_filter(recipe.model, recipe.guide, x, mask, num_particles=1)
    assert_close(-found.log_evidence.sum().detach(), loss(ELBO()))
    assert not bool(found.ancestors.any())


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_padding_and_its_values_change_nothing(name: str, criterion: str) -> None:
    recipe = CASES[name]()
    x, mask = data(recipe)
    wide = torch.cat([x.where(mask[..., None], torch.nan), x.new_full((5, 3, 3), 7.0)], dim=1)
    wide_mask = torch.cat([mask, mask.new_zeros(5, 3)], dim=1)
    given = {"num_particles": 4, "resampler": "multinomial", "criterion": criterion}
    filters, losses = [], []
    for pair in ((x, mask), (wide, wide_mask)):
        with seeded(1), torch.no_grad():
            filters.append(particle_filter(recipe.model, recipe.guide, *pair, **given))
        with seeded(1):
            losses.append(FIVO(**given)(recipe.model, recipe.guide, *pair))
    assert_close(losses[1], losses[0])
    assert torch.equal(filters[1].log_evidence, filters[0].log_evidence)
    for name in ("log_evidence_path", "log_weight", "ess", "resampled", "ancestors", "mean"):
        short, long = (getattr(f, name) for f in filters)
        assert torch.equal(long[:5], short), name
    assert not bool(filters[1].resampled[5:].any()) and not bool(filters[1].mean[5:].any())
    path = filters[1].log_evidence_path
    assert torch.equal(path[5:], path[4:5].expand(3, -1))


def test_a_sequence_without_a_step_has_evidence_one() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe, (4, 0, 5))
    for criterion in CRITERIA:
        found = particle_filter(
            recipe.model, recipe.guide, x, mask, num_particles=6, criterion=criterion
        )
        assert_close(found.log_evidence[1].exp(), torch.ones(()))
        assert_close(found.ess[:, 1], torch.full((5,), 6.0))
        assert not bool(found.resampled[:, 1].any()) and not bool(found.mean[:, 1].any())
        assert torch.equal(found.ancestors[:, :, 1], torch.arange(6).expand(5, -1))
    empty = particle_filter(recipe.model, recipe.guide, x[1:2], mask[1:2], num_particles=6)
    assert_close(empty.log_evidence.exp(), torch.ones(1))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_series_of_length_one_is_importance_sampling(criterion: str) -> None:
    recipe = CASES[VRNN]()
    x = observations(recipe, 3, 1)
    with seeded(1):
        loss = IWAE(num_particles=4)(recipe.model, recipe.guide, x)
    with seeded(1):
        again = FIVO(num_particles=4, criterion=criterion)(recipe.model, recipe.guide, x)
    with seeded(1):
        found = particle_filter(
            recipe.model, recipe.guide, x, num_particles=4, criterion=criterion
        )
    assert_close(again, loss)
    assert_close(-found.log_evidence.sum(), loss)
    assert not bool(found.resampled.any()) and found.resampled.shape == (1, 3)
    assert torch.equal(found.trajectories(), found.z)


def test_the_path_is_the_evidence_of_what_was_seen_so_far() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    for length in range(1, 6):
        with seeded(1):
            found = particle_filter(recipe.model, recipe.guide, 3 * x, mask, criterion="always")
        with seeded(1):
            short = particle_filter(
                recipe.model, recipe.guide, 3 * x[:, :length], mask[:, :length], criterion="always"
            )
        assert_close(found.log_evidence_path[length - 1], short.log_evidence)


def test_weights_means_and_sample_sizes_are_those_of_the_particles() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = particle_filter(recipe.model, recipe.guide, 3 * x, mask, num_particles=6)
    weight = found.log_weight.exp()
    assert_close(weight.sum(dim=1), torch.ones(5, 5))
    assert_close(found.ess, 1 / weight.square().sum(dim=1))
    mean = torch.einsum("tkb,tkbz->tbz", weight, found.z)
    assert_close(found.mean, mean * mask.t().unsqueeze(-1))
    assert_close(found.log_evidence, found.log_evidence_path[-1])
    assert torch.equal(found.mask, mask.t())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_without_a_guide_the_transition_proposes(criterion: str) -> None:
    class Blind(SequenceGuide):
        def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
            return self.transition(state)

    for name in FEW:
        recipe = CASES[name]()
        filters = []
        for guide in (None, Blind(recipe.model)):
            with seeded(1):
                filters.append(
                    particle_filter(recipe.model, guide, *data(recipe), criterion=criterion)
                )
        assert_same(*filters)


def test_a_model_is_taken_by_its_shape() -> None:
    model = LGSSM.scalar()
    bare = SimpleNamespace(
        **{name: getattr(model, name) for name in ("init", "transition", "emission", "advance")}
    )
    filters = []
    for each in (model, bare):
        with seeded(1):
            filters.append(particle_filter(each, None, torch.ones(2, 4, 1), num_particles=5))
    assert_same(*filters)


def test_resamplers_and_criteria_are_functions_or_their_names() -> None:
    recipe = CASES[VRNN]()
    filters = []
    for resampler, criterion in (("stratified", "ess"), (RESAMPLERS["stratified"], ess_below())):
        with seeded(1):
            filters.append(
                particle_filter(
                    recipe.model,
                    recipe.guide,
                    *data(recipe),
                    resampler=resampler,
                    criterion=criterion,
                )
            )
    assert_same(*filters)


# weights that look ahead


@pytest.mark.parametrize("criterion", CRITERIA)
def test_favouring_nobody_is_no_favour(criterion: str) -> None:
    model, mask = LGSSM.scalar(), prefix_mask(LENGTHS)
    x = 3 * torch.randn(5, 5, 1)
    seen: list[Tensor] = []

    def nobody(state: LGSSMState, x_next: Tensor) -> Tensor:
        assert state.mean.shape == (6, 5, 1)
        seen.append(x_next)
        return x_next.new_zeros(6, 5)

    def somebody(state: LGSSMState, x_next: Tensor) -> Tensor:
        return model.emission(state.mean, state).log_prob(x_next)

    filters = []
    for auxiliary in (None, nobody, somebody):
        with seeded(1):
            filters.append(
                particle_filter(
                    model, None, x, mask, num_particles=6, criterion=criterion, auxiliary=auxiliary
                )
            )
    plain, same, other = filters
    assert_same(same, plain)
    seen_x = torch.stack(seen, dim=1)
    assert torch.equal(
        seen_x.where(mask[:, 1:, None], 0.0), x[:, 1:].where(mask[:, 1:, None], 0.0)
    )
    close = torch.isclose(other.log_evidence, plain.log_evidence, rtol=1e-10)
    assert bool(close[LENGTHS.index(1)])  # nothing is ahead of one step
    assert bool(close[LENGTHS.index(5)]) == (criterion == "never")


# ancestors


def traced(found: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """Lineage, trajectories and unique ancestors, particle by particle."""
    assert found.z is not None
    length, particles, size, _ = found.z.shape
    lineage = torch.zeros(length, particles, size, dtype=torch.long)
    paths, unique = torch.zeros_like(found.z), torch.zeros(length, size, dtype=torch.long)
    for b in range(size):
        for k in range(particles):
            where = k
            for t in reversed(range(length)):
                lineage[t, k, b] = where
                paths[t, k, b] = found.z[t, where, b]
                where = int(found.ancestors[t, where, b])
        for t in range(length):
            unique[t, b] = len(set(lineage[t, :, b].tolist()))
    return lineage, paths, unique


@pytest.mark.parametrize("criterion", CRITERIA)
@every_resampler
def test_lineages_are_traced(resampler: Resampler, criterion: str) -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = particle_filter(
        recipe.model,
        recipe.guide,
        3 * x,
        mask,
        num_particles=4,
        resampler=resampler,
        criterion=criterion,
    )
    lineage, paths, unique = traced(found)
    assert torch.equal(found.lineage(), lineage)
    assert torch.equal(found.trajectories(), paths)
    assert torch.equal(found.unique_ancestors(), unique)
    own = torch.arange(4).unsqueeze(1)
    stayed = (found.ancestors[1:] == own).all(dim=1)
    assert bool((stayed | found.resampled[:-1]).all()) and bool((found.ancestors[0] == own).all())
    if criterion == "always":
        assert int(unique.min()) < 4


def test_a_particle_that_cannot_move_is_its_ancestor() -> None:
    model = LGSSM.scalar(a=1.0, q=1e-9)
    x, mask = torch.randn(3, 6, 1), prefix_mask((6, 2, 4))
    with torch.no_grad():
        found = particle_filter(model, None, x, mask, num_particles=8, criterion="always")
    paths = found.trajectories()
    torch.testing.assert_close(paths, paths[:1].expand_as(paths), rtol=0.0, atol=1e-7)
    assert found.z is not None and float((found.z - found.z[:1]).abs().max()) > 0.1  # untraced


def test_paths_are_kept_on_request() -> None:
    recipe = CASES[VRNN]()
    filters = []
    for paths in (True, False):
        with seeded(1):
            filters.append(particle_filter(recipe.model, recipe.guide, *data(recipe), paths=paths))
    assert filters[1].z is None
    assert_same(filters[1]._replace(z=filters[0].z), filters[0])
    with pytest.raises(ValueError, match="trajectories need the particles; filter with paths=Tr"):
        filters[1].trajectories()


# bad input


@pytest.mark.parametrize("count", [0, -3])
def test_too_few_particles_are_refused(count: int) -> None:
    model = LGSSM.scalar()
    with pytest.raises(ValueError, match=f"num_particles must be at least 1, got {count}"):
        particle_filter(model, None, torch.ones(1, 2, 1), num_particles=count)
    for objective in (FIVO, IWAE, ELBO):
        with pytest.raises(ValueError, match=f"num_particles must be at least 1, got {count}"):
            objective(num_particles=count)


@pytest.mark.parametrize(
    ("argument", "known"), [("resampler", RESAMPLERS), ("criterion", CRITERIA)]
)
def test_an_unknown_name_lists_the_known_ones(argument: str, known: dict[str, Any]) -> None:
    says = f"{argument} must be one of {', '.join(known)}, or a function, got 'nonsense'"
    with pytest.raises(ValueError, match=says):
        particle_filter(LGSSM.scalar(), None, torch.ones(1, 2, 1), **{argument: "nonsense"})
    with pytest.raises(ValueError, match=says):
        FIVO(**{argument: "nonsense"})


NEEDS = ("init", "transition", "emission", "advance", "rollout")


@pytest.mark.parametrize("missing", [NEEDS[:1], NEEDS[1:3], NEEDS[3:4], NEEDS[:4]])
def test_missing_functions_are_named(missing: tuple[str, ...]) -> None:
    model = LGSSM.scalar()
    lacking = SimpleNamespace(**{n: getattr(model, n) for n in NEEDS if n not in missing})
    guide, x = ExactFilter(model), torch.ones(1, 2, 1)
    says = f"^model must .* but SimpleNamespace lacks {', '.join(missing)}; ELBO and IWAE"
    for run in (lambda: particle_filter(lacking, guide, x), lambda: FIVO()(lacking, guide, x)):
        with pytest.raises(TypeError, match=says):
            run()


def test_fivo_needs_a_rollout_that_lets_it_select() -> None:
    model = LGSSM.scalar()
    lacking = SimpleNamespace(**{n: getattr(model, n) for n in NEEDS[:4]})
    x = torch.ones(1, 2, 1)
    assert particle_filter(lacking, ExactFilter(model), x).log_evidence.isfinite().all()
    with pytest.raises(TypeError, match="^model must have rollout.* SimpleNamespace lacks it; "):
        FIVO()(lacking, ExactFilter(model), x)


def test_without_a_models_own_check_data_and_mask_are_looked_at() -> None:
    model = LGSSM.scalar()
    bare = SimpleNamespace(**{n: getattr(model, n) for n in NEEDS[:4]})
    guide, x = ExactFilter(model), torch.randn(2, 4, 1)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    with seeded(0):
        expected = particle_filter(model, guide, x, mask).log_evidence
    dirty = torch.where(mask[..., None], x, torch.nan)
    with seeded(0):
        assert torch.equal(particle_filter(bare, guide, dirty, mask).log_evidence, expected)
    holes = torch.tensor([[True, False, True, True], [True] * 4])
    for wrong, kind, says in (
        (holes, ValueError, "prefix"),
        (mask[:, :3], ValueError, "shape"),
        (mask.int(), TypeError, "bool"),
    ):
        with pytest.raises(kind, match=says):
            particle_filter(bare, guide, x, wrong)
    with pytest.raises(ValueError, match="x must have shape"):
        particle_filter(bare, guide, x[0])


def test_gradients_of_a_guide_that_is_not_reparameterised_are_refused() -> None:
    recipe = CASES["vrnn-filtering-conditional-normal-gru"]()
    x, proposal = observations(recipe, 2, 3), recipe.guide.proposal

    def fixed(state: Any, c_t: Tensor) -> Any:
        q = proposal(state, c_t)
        q.base_dist.has_rsample = False
        return q

    recipe.guide.proposal = fixed
    with pytest.raises(NotImplementedError, match="not reparameterised"):
        particle_filter(recipe.model, recipe.guide, x)
    with torch.no_grad():
        particle_filter(recipe.model, recipe.guide, x)


def test_plain_pyro_functions_have_no_steps() -> None:
    def program(x: Tensor) -> None: ...

    model, x = LGSSM.scalar(), torch.ones(1, 2, 1)
    guide = ExactFilter(model)
    lacks = "but program lacks init, transition, emission, advance"
    with pytest.raises(TypeError, match=f"^model must .* {lacks}; "):
        particle_filter(program, None, x)
    with pytest.raises(TypeError, match=f"^model must .* {lacks}; "):
        FIVO()(program, guide, x)
    for run in (lambda: particle_filter(model, program, x), lambda: FIVO()(model, program, x)):
        with pytest.raises(TypeError, match="^guide must .* but program lacks encode, proposal; "):
            run()
    proposing = SimpleNamespace(proposal=guide.proposal)
    with pytest.raises(TypeError, match="^guide must .* but SimpleNamespace lacks encode; "):
        particle_filter(model, proposing, x)
    silent = SimpleNamespace(encode=guide.encode, proposal=None)
    with pytest.raises(TypeError, match="^guide must .* but SimpleNamespace lacks proposal; "):
        particle_filter(model, silent, x)


@pytest.mark.parametrize("resampler", ["systematic", "stratified", RESAMPLERS["systematic"]])
def test_the_score_needs_independent_ancestors(resampler: Any) -> None:
    with pytest.raises(NotImplementedError, match="use resampler='multinomial'"):
        FIVO(resampler=resampler, score_function=True)
    FIVO(resampler="multinomial", score_function=True)
    FIVO(resampler=multinomial, score_function=True)


class Breaking(LGSSM):
    """Where x is a flag, the emission's log-densities are the ones given, one a particle."""

    broken: dict[float, list[float]]

    def emission(self, z_t: Tensor, state: LGSSMState) -> dist.Distribution:
        whole, broken = super().emission(z_t, state), self.broken

        class Broken(dist.Normal):
            def log_prob(self, value: Tensor) -> Tensor:
                log_prob = super().log_prob(value.clamp(max=3.0))
                for flag, values in broken.items():
                    bad = torch.tensor(values).reshape(-1, 1, 1)
                    log_prob = torch.where(value == flag, bad, log_prob)
                return log_prob

        return Broken(whole.mean, torch.ones(())).to_event(1)


@pytest.fixture
def breaking() -> tuple[nn.Module, SequenceGuide]:
    torch.manual_seed(0)
    model = Breaking.scalar()
    return model, ExactFilter(model)


BROKEN = {
    "zero": ([-math.inf] * 3, "all zero"),
    "nan": ([0.0, math.nan, 0.0], r"not numbers \(NaN\)"),
    "infinite": ([0.0, 0.0, math.inf], "infinite"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("t", [0, 2, 3])
def test_degenerate_weights_name_step_and_sequence(
    breaking: tuple[Any, Any], kind: str, criterion: str, t: int
) -> None:
    model, guide = breaking
    values, says = BROKEN[kind]
    model.broken = {FLAG: values}
    x = torch.ones(4, 5, 1)
    x[2, t] = x[3, t] = FLAG  # of the two the first is named
    message = rf"weights at step {t + 1} of sequence 2 \(counted from 0\) are {says}; "
    for proposing in (None, guide):
        with pytest.raises(DegenerateWeightsError, match=message):
            particle_filter(model, proposing, x, num_particles=3, criterion=criterion)
    with pytest.raises(DegenerateWeightsError, match=message):
        FIVO(num_particles=3, criterion=criterion)(model, guide, x)


@pytest.mark.parametrize("kind", BROKEN)
def test_so_they_do_at_the_last_step(breaking: tuple[Any, Any], kind: str) -> None:
    model, guide = breaking
    values, says = BROKEN[kind]
    model.broken = {FLAG: values}
    x = torch.ones(4, 5, 1)
    x[2, 4] = FLAG
    message = rf"weights at step 5 of sequence 2 \(counted from 0\) are {says}; "
    with pytest.raises(DegenerateWeightsError, match=message):
        particle_filter(model, guide, x, num_particles=3)
    with pytest.raises(DegenerateWeightsError, match=message):
        FIVO(num_particles=3)(model, guide, x)


@pytest.mark.parametrize("criterion", ["always", "ess"])
def test_a_particle_that_died_is_not_counted_against_its_slot(
    breaking: tuple[Any, Any], criterion: str
) -> None:
    model, guide = breaking
    dead = -math.inf
    model.broken = {FLAG: [0.0, dead, dead], FLAG + 1: [dead, 0.0, dead], FLAG + 2: [dead] * 3}
    x = torch.ones(4, 5, 1)
    x[1, 1] = x[2, 1] = FLAG
    x[1, 2] = x[2, 2] = FLAG + 1  # in the slots that were empty before resampling
    given = {"num_particles": 3, "criterion": criterion}
    with seeded(1):
        found = particle_filter(model, guide, x, **given)
    with seeded(1):
        assert_close(FIVO(**given)(model, guide, x), -found.log_evidence.sum())
    x[2, 4] = FLAG + 2
    message = r"weights at step 5 of sequence 2 \(counted from 0\) are all zero; "
    with pytest.raises(DegenerateWeightsError, match=message):
        particle_filter(model, guide, x, **given)
    with pytest.raises(DegenerateWeightsError, match=message):
        FIVO(**given)(model, guide, x)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_some_weights_may_be_zero_and_padding_anything(
    breaking: tuple[Any, Any], criterion: str
) -> None:
    model, guide = breaking
    model.broken = {FLAG: [-math.inf, 0.0, -math.inf]}
    x, mask = torch.ones(4, 5, 1), prefix_mask((5, 5, 3, 5))
    x[1, 2] = x[2, 3] = FLAG
    given = {"num_particles": 3, "criterion": criterion}
    with seeded(1):
        found = particle_filter(model, guide, x, mask, **given)
    with seeded(1):
        loss = FIVO(**given)(model, guide, x, mask)
    assert_close(-found.log_evidence.sum(), loss)
    assert bool(loss.isfinite())
    assert_close(found.ess[2, 1], torch.ones(()))
    if criterion != "never":
        assert bool((found.ancestors[3, :, 1] == 1).all())
    named = list(model.parameters())
    slopes = torch.autograd.grad(loss, named, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in slopes if g is not None)
    weight = found.log_weight[2, :, 1].detach()
    assert weight.tolist() == [-math.inf, 0.0, -math.inf]
    assert float(log_mean_exp(weight, dim=0)) == pytest.approx(-math.log(3))


@pytest.mark.parametrize("kind", BROKEN)
def test_an_elbo_names_the_step_where_one_particle_has_no_weight(
    breaking: tuple[Any, Any], kind: str
) -> None:
    model, guide = breaking
    model.broken = {FLAG: [0.0, 0.0, BROKEN[kind][0][-1 if kind != "nan" else 1]]}
    x = torch.ones(4, 5, 1)
    x[2, 3] = FLAG
    message = rf"weights at step 4 of sequence 2 \(counted from 0\) are {BROKEN[kind][1]}; "
    with pytest.raises(DegenerateWeightsError, match=message):
        ELBO(num_particles=3)(model, guide, x)


# the score of the ancestors


def test_a_sequence_is_credited_for_its_own_resamplings_alone() -> None:
    length, particles, size = 5, 3, 4
    log_weight = torch.randn(length, particles, size, requires_grad=True)
    due = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    drawn, keep = torch.randint(particles, (4, particles, size)), torch.arange(particles)[:, None]
    parents = [
        torch.where(d, p, keep) if d.any() else None for d, p in zip(due, drawn, strict=True)
    ]
    by_hand = []
    for b in range(size):
        ends = [t for t in range(length - 1) if due[t, b]]
        begins = [0, *(t + 1 for t in ends)]
        stretches_of_b = zip(begins, [*begins[1:], length], strict=True)
        sums = [log_weight[i:j, :, b].sum(dim=0) for i, j in stretches_of_b]
        gains = [s.detach().exp().mean().log() for s in sums]
        score = torch.zeros(())
        for n, t in enumerate(ends):
            chosen = sums[n].log_softmax(dim=0)[drawn[t, :, b]].sum()
            score = score + chosen * sum(gains[n + 1 :])
        by_hand.append(score)
    found, expected = ancestor_score(log_weight, due, parents), torch.stack(by_hand)
    surprise = torch.randn(length, size)
    less = ancestor_score(log_weight, due, parents, surprise)
    for b in range(size):
        for t in [t for t in range(length - 1) if due[t, b]]:
            begin = max([s + 1 for s in range(t) if due[s, b]], default=0)
            sums = log_weight[begin : t + 1, :, b].sum(dim=0)
            chosen = sums.log_softmax(dim=0)[drawn[t, :, b]].sum()
            less = less + surprise[t, b] * chosen * (torch.arange(size) == b)
    assert_close(less.detach(), expected.detach())
    assert_close(found.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(s.sum(), log_weight)[0] for s in (found, expected)))
