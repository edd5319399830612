"""``evaluate`` against formulas written out by hand, and what it says of the weights."""

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Size, Tensor

from inference import Adversarial, evaluate, seeded
from inference.weights import effective_sample_size, log_mean_exp, pareto_k
from pyro_avrnn import recipes
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from tests.unit.table import CASES, H, X, Z, observations, prefix_mask

LENGTHS = (4, 2, 5, 1, 3)
VRNN = "vrnn-filtering-conditional-normal-gru"


def data(recipe: Recipe) -> tuple[Tensor, Tensor]:
    return observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


class ByHand(NamedTuple):
    """Sums of each sequence over its own steps, from the rollout's draws, in plain loops."""

    iwae: list[float]
    elbo: list[float]
    reconstruction: list[float]
    kl: list[float]


def by_hand(recipe: Recipe, x: Tensor, mask: Tensor, particles: int, seed: int) -> ByHand:
    with seeded(seed), torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, mask, num_particles=particles)
    found = ByHand([], [], [], [])
    for b, length in enumerate(mask.sum(dim=1).tolist()):
        weights, fits, rates = [], [], []
        for k in range(particles):
            fit = rate = 0.0
            for t in range(length):
                for i in range(x.shape[-1]):
                    loc, scale = d.emission.mean[t, k, b, i], d.emission.stddev[t, k, b, i]
                    fit += log_normal(x[b, t, i], loc, scale)
                for i in range(recipe.model.z_dim):
                    z = d.z[t, k, b, i]
                    q, p = d.proposal, d.prior
                    rate += log_normal(z, q.mean[t, k, b, i], q.stddev[t, k, b, i])
                    rate -= log_normal(z, p.mean[t, k, b, i], p.stddev[t, k, b, i])
            weights.append(fit - rate)
            fits.append(fit)
            rates.append(rate)
        largest = max(weights)
        mean = sum(math.exp(w - largest) for w in weights) / particles
        found.iwae.append(largest + math.log(mean))
        found.elbo.append(sum(weights) / particles)
        found.reconstruction.append(sum(fits) / particles)
        found.kl.append(sum(rates) / particles)
    return found


def log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> float:
    z = (x.item() - loc.item()) / scale.item()
    return -0.5 * z * z - math.log(scale.item()) - 0.5 * math.log(2 * math.pi)


def ratio_error(values: list[float], lengths: tuple[int, ...]) -> float:
    """Linearised error of sum(values) / sum(lengths) when sequences are the sample."""
    count, total = len(values), sum(lengths)
    ratio = sum(values) / total
    squares = sum((v - ratio * n) ** 2 for v, n in zip(values, lengths, strict=True))
    return math.sqrt(count / (count - 1) * squares) / total


def test_bounds_and_errors_are_those_of_the_formulas() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=6, seed=3)
    hand = by_hand(recipe, x, mask, 6, seed=3)
    frames, count = sum(LENGTHS), len(LENGTHS)
    assert (found.frames, found.sequences, found.num_particles) == (frames, count, 6)
    for name, values in (("iwae", hand.iwae), ("elbo", hand.elbo)):
        mean = sum(values) / count
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
        expected = {
            "per_frame": sum(values) / frames,
            "per_frame_se": ratio_error(values, LENGTHS),
            "per_sequence": mean,
            "per_sequence_se": error,
        }
        for suffix, value in expected.items():
            assert getattr(found, f"{name}_{suffix}") == pytest.approx(value, rel=1e-10)
    fit, rate = sum(hand.reconstruction) / frames, sum(hand.kl) / frames
    assert found.reconstruction_per_frame == pytest.approx(fit, rel=1e-10)
    assert found.kl_per_frame == pytest.approx(rate, rel=1e-10)
    assert found.elbo_per_frame == pytest.approx(fit - rate, rel=1e-10)
    assert found.iwae_per_frame > found.elbo_per_frame
    # the twins: an average of sequences' averages, and an error that forgets the lengths
    naive = sum(v / n for v, n in zip(hand.iwae, LENGTHS, strict=True)) / count
    assert abs(naive - found.iwae_per_frame) > 1e-3
    assert abs(ratio_error(hand.iwae, (3,) * count) - found.iwae_per_frame_se) > 1e-3


def test_the_error_of_a_ratio_is_the_spread_of_resampled_sets() -> None:
    recipe = recipes.rnn(X, H)
    lengths = (1, 4, 2, 5, 3) * 12
    x, mask = observations(recipe, len(lengths), 5), prefix_mask(lengths)
    x = x * torch.linspace(0.2, 2.0, len(lengths))[:, None, None]
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=1)
    with torch.no_grad():
        total = recipe.model.rollout(recipe.guide, x, mask).log_emission.sum(dim=(0, 1))
    index = torch.randint(len(lengths), (4000, len(lengths)))
    ratios = total[index].sum(dim=1) / mask.sum(dim=1)[index].sum(dim=1)
    assert found.iwae_per_frame_se == pytest.approx(ratios.std().item(), rel=0.1)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_an_rnn_is_given_its_exact_log_likelihood_in_any_chunks(batch_size: int) -> None:
    recipe = CASES["rnn-normal-gru"]()
    x, mask = data(recipe)
    exact = sum(by_hand(recipe, x, mask, 1, seed=0).iwae) / sum(LENGTHS)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=4, batch_size=batch_size)
    for name in ("iwae", "elbo", "reconstruction"):
        assert getattr(found, f"{name}_per_frame") == pytest.approx(exact, rel=1e-10)
    assert found.kl_per_frame == 0.0 and found.effective_sample_size == pytest.approx(4.0)
    assert found.active_units is None and found.closed_form_kl_per_frame is None


def test_an_rnn_has_no_k_hat_in_float32_either() -> None:
    recipe = recipes.rnn(12, 8)
    recipe.model.float()
    x, mask = observations(recipe, 40, 12).float(), prefix_mask((12, 7) * 20)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=25)
    assert found.pareto_k_median is None and found.pareto_k_above_07 is None


class WalkState(NamedTuple):
    before: Tensor


class Walk(SequenceModel):
    """z_t = 0.8 z_{t-1} + N(0, 0.7^2), x_t = z_t + N(0, 0.5^2)."""

    def __init__(self) -> None:
        super().__init__(x_dim=1, z_dim=1)

    def init(self, batch_shape: Size) -> WalkState:
        return WalkState(torch.zeros(*batch_shape, 1))

    def transition(self, state: WalkState) -> dist.Distribution:
        return dist.Normal(0.8 * state.before, 0.7 * torch.ones(())).to_event(1)

    def emission(self, z_t: Tensor, state: WalkState) -> dist.Distribution:
        return dist.Normal(z_t, 0.5 * torch.ones(())).to_event(1)

    def advance(self, state: WalkState, z_t: Tensor, x_t: Tensor) -> WalkState:
        return WalkState(z_t)


class Posterior(SequenceGuide):
    """p(z_t | z_{t-1}, x_{t:T}) of the walk, exactly: the log-weights then do not vary."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        # backward information filter: p(x_{t:T} | z_t) is a normal in z_t
        information, precision = torch.zeros_like(x), torch.zeros_like(x)
        later_i, later_p = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
        for t in range(x.shape[1] - 1, -1, -1):
            seen = mask[:, t : t + 1].to(x)
            shrink = 1.0 / (1.0 + 0.49 * later_p)
            later_i, later_p = 0.8 * shrink * later_i, 0.64 * shrink * later_p
            later_i, later_p = later_i + seen * x[:, t] / 0.25, later_p + seen / 0.25
            information[:, t], precision[:, t] = later_i, later_p
        return torch.cat([information, precision], dim=-1)

    def proposal(self, state: WalkState, c_t: Tensor) -> dist.Distribution:
        information, precision = c_t[..., :1], c_t[..., 1:]
        precision = precision + 1.0 / 0.49
        mean = (information + 0.8 * state.before / 0.49) / precision
        return dist.Normal(mean, precision.rsqrt()).to_event(1)


class Blind(SequenceGuide):
    """The prior itself."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        prior = self.transition(state)
        return prior.expand(torch.broadcast_shapes(prior.batch_shape, c_t.shape[:-1]))


def dense_evidence(x: Tensor) -> float:
    """log p(x) of one series of the walk, by its covariance matrix."""
    length = len(x)
    step = torch.eye(length) - 0.8 * torch.eye(length).roll(1, dims=0).tril(-1)
    inverse = torch.linalg.inv(step)
    covariance = 0.49 * inverse @ inverse.T + 0.25 * torch.eye(length)
    return torch.distributions.MultivariateNormal(torch.zeros(length), covariance).log_prob(x)


@pytest.mark.parametrize("batch_size", [2, 50])
def test_the_exact_posterior_is_scored_with_the_evidence_whatever_the_draws(
    batch_size: int,
) -> None:
    model = Walk()
    x, mask = torch.randn(len(LENGTHS), max(LENGTHS), 1), prefix_mask(LENGTHS)
    guide = Posterior(model)
    found = evaluate(model, guide, x, mask, num_particles=30, batch_size=batch_size)
    exact = sum(float(dense_evidence(x[b, :n, 0])) for b, n in enumerate(LENGTHS)) / sum(LENGTHS)
    assert found.iwae_per_frame == pytest.approx(exact, rel=1e-8)
    assert found.elbo_per_frame == pytest.approx(exact, rel=1e-8)
    assert found.effective_sample_size == pytest.approx(30.0, rel=1e-6)
    assert found.pareto_k_median is None and found.pareto_k_above_07 is None


def test_chunks_are_cut_in_order_and_drawn_one_after_the_other() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=5, batch_size=2, seed=4)
    total = 0.0
    with seeded(4), torch.no_grad():
        for chunk in (slice(0, 2), slice(2, 4), slice(4, 5)):
            longest = int(mask[chunk].sum(dim=1).max())
            d = recipe.model.rollout(
                recipe.guide, x[chunk, :longest], mask[chunk, :longest], num_particles=5
            )
            total += float(log_mean_exp(d.log_weight.sum(dim=0), dim=0).sum())
    assert found.iwae_per_frame == pytest.approx(total / sum(LENGTHS), rel=1e-10)


def test_chunks_agree_in_expectation() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    means, errors = [], []
    for batch_size in (2, 5):
        runs = torch.tensor(
            [
                evaluate(
                    recipe.model,
                    recipe.guide,
                    x,
                    mask,
                    num_particles=10,
                    batch_size=batch_size,
                    seed=seed,
                ).elbo_per_frame
                for seed in range(40 * batch_size, 40 * batch_size + 40)
            ]
        )
        means.append(runs.mean().item())
        errors.append(runs.std().item() / math.sqrt(len(runs)))
    tolerance = 5 * math.hypot(*errors)
    assert abs(means[0] - means[1]) < tolerance
    assert abs(means[0] + 0.2 - means[1]) > tolerance  # the twin: the test could tell


def test_padding_and_its_values_change_nothing() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    plain = evaluate(recipe.model, recipe.guide, x, mask, num_particles=4)
    wider = torch.cat([x.where(mask[..., None], torch.nan), x.new_full((5, 3, X), 9.0)], dim=1)
    padded = torch.cat([mask, mask.new_zeros(5, 3)], dim=1)
    again = evaluate(recipe.model, recipe.guide, wider, padded, num_particles=4)
    assert again.as_dict() == plain.as_dict()


def test_a_seed_is_a_result_and_the_global_generator_is_left_alone() -> None:
    recipe = CASES[VRNN]()
    before = torch.get_rng_state()
    runs = [evaluate(recipe.model, recipe.guide, *data(recipe), seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]


def test_one_sequence_has_no_error_over_sequences() -> None:
    recipe = CASES[VRNN]()
    found = evaluate(recipe.model, recipe.guide, torch.randn(1, 3, X), prefix_mask((3,)))
    assert math.isnan(found.iwae_per_sequence_se) and math.isfinite(found.iwae_per_frame)


@pytest.mark.parametrize("shape", [0.2, 0.7])
def test_pareto_k_finds_the_shape_of_known_tails(shape: float) -> None:
    columns, draws = 40, 20_000
    weights = scipy.stats.genpareto.rvs(shape, size=(draws, columns), random_state=0)
    found = pareto_k(torch.as_tensor(weights).log())
    error = found.std().item() / math.sqrt(columns)
    # one estimate from M = 3 sqrt(20000) = 424 exceedances: sd (1 + k) / sqrt(M) = 0.06 to 0.08;
    # the estimator's weakly informative prior, 10 exceedances at 0.5, adds a bias below 0.01
    assert abs(found.mean().item() - shape) < 5 * error + 0.01
    assert found.std().item() == pytest.approx((1 + shape) / math.sqrt(424), rel=0.4)


@pytest.mark.parametrize("shape", [0.2, 0.7])
def test_pareto_k_agrees_with_scipys_fit_of_the_same_tail(shape: float) -> None:
    weights = scipy.stats.genpareto.rvs(shape, size=(20_000, 1), random_state=1)
    tail = int(3 * math.sqrt(len(weights)))
    ordered = sorted(weights[:, 0].tolist(), reverse=True)
    excess = [w - ordered[tail] for w in ordered[:tail]]
    expected, _, _ = scipy.stats.genpareto.fit(excess, floc=0.0)
    assert pareto_k(torch.as_tensor(weights).log()).item() == pytest.approx(expected, abs=0.06)


def test_pareto_k_does_not_depend_on_the_scale_of_the_weights() -> None:
    log_weight = torch.randn(500, 3) * 2.0
    found = pareto_k(log_weight)
    torch.testing.assert_close(pareto_k(log_weight - 800.0), found, rtol=1e-8, atol=0.0)


def test_pareto_k_of_constant_weights_is_no_number_and_few_weights_are_refused() -> None:
    log_weight = torch.cat([torch.full((100, 1), -3.0), torch.randn(100, 1)], dim=1)
    found = pareto_k(log_weight)
    assert found[0].isnan() and found[1].isfinite()
    with pytest.raises(ValueError, match="num_particles of at least 25, got 24"):
        pareto_k(torch.randn(24, 2))


def test_the_effective_sample_size_lies_between_one_and_all() -> None:
    log_weight = torch.randn(50, 200) * torch.linspace(0.0, 60.0, 200)
    found = effective_sample_size(log_weight)
    assert (found >= 1.0 - 1e-12).all() and (found <= 50.0 + 1e-9).all()
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    expected = weights.sum() ** 2 / weights.square().sum()
    torch.testing.assert_close(effective_sample_size(weights.log()), expected)
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7.0, rel=1e-12)
    one = torch.full((7,), -torch.inf).index_fill(0, torch.tensor(3), -900.0)
    assert effective_sample_size(one) == pytest.approx(1.0, rel=1e-12)


class OneUnit(FilteringGuide):
    """The prior, but for its first latent, whose mean follows x."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        prior = self.transition(state)
        shift = torch.zeros_like(prior.mean)
        shift = shift + torch.cat([c_t[..., :1], torch.zeros_like(c_t[..., : Z - 1])], dim=-1)
        return dist.Normal(prior.mean + shift, prior.stddev.expand_as(shift)).to_event(1)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(("guide", "units"), [(Blind, 0), (OneUnit, 1)])
def test_active_units_are_those_whose_posterior_mean_moves(guide: type, units: int) -> None:
    model = recipes.vrnn(X, Z, H).model
    built = Blind(model) if guide is Blind else OneUnit(model)
    x, mask = data(Recipe(model, built))
    found = evaluate(model, built, x, mask, num_particles=30)
    assert found.active_units == units
    if guide is Blind:
        assert found.kl_per_frame == pytest.approx(0.0, abs=1e-12)
        assert found.closed_form_kl_per_frame == pytest.approx(0.0, abs=1e-12)
        assert found.closed_form_w2_per_frame == pytest.approx(0.0, abs=1e-12)
        assert found.prior_scale == found.proposal_scale
    else:
        assert found.closed_form_kl_per_frame > 0.0


def test_a_prior_mean_that_moves_is_no_activity_of_the_guide() -> None:
    model = Walk()
    x, mask = 3.0 * torch.randn(len(LENGTHS), max(LENGTHS), 1), prefix_mask(LENGTHS)
    assert evaluate(model, Blind(model), x, mask).active_units == 0
    assert evaluate(model, Posterior(model), x, mask).active_units == 1


def test_a_shift_that_is_the_same_everywhere_is_no_activity() -> None:
    class Shifted(Blind):
        def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
            prior = super().proposal(state, c_t)
            return dist.Normal(prior.mean + 3.0 * prior.stddev, prior.stddev).to_event(1)

    model = recipes.vrnn(X, Z, H).model
    found = evaluate(model, Shifted(model), *data(Recipe(model, Blind(model))))
    assert found.active_units == 0
    assert found.closed_form_kl_per_frame == pytest.approx(Z * 4.5, rel=1e-10)  # 3^2 / 2 a unit


def test_closed_forms_and_scales_are_averages_over_observed_frames() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, num_particles=5, seed=1)
    with seeded(1), torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, mask, num_particles=5)
    seen = d.mask.expand(d.log_weight.shape)
    p, q = d.prior, d.proposal
    ratio = (q.stddev / p.stddev).square()
    kl = 0.5 * (ratio - 1 - ratio.log() + ((q.mean - p.mean) / p.stddev).square()).sum(dim=-1)
    squares = (q.mean - p.mean).square() + (q.stddev - p.stddev).square()
    assert found.closed_form_kl_per_frame == pytest.approx(kl[seen].mean().item(), rel=1e-10)
    w2 = squares.sum(dim=-1).sqrt()[seen].mean().item()
    assert found.closed_form_w2_per_frame == pytest.approx(w2, rel=1e-10)
    assert found.prior_scale == pytest.approx(p.stddev[seen].mean().item(), rel=1e-10)
    assert found.proposal_scale == pytest.approx(q.stddev[seen].mean().item(), rel=1e-10)


def test_a_critics_distance_is_reported_and_nothing_is_trained() -> None:
    recipe = recipes.avrnn(X, Z, H, critic="feedforward", critic_dim=4)
    critic: Any = recipe.critic
    x, mask = data(recipe)
    before = {k: v.clone() for k, v in critic.state_dict().items()}
    found = evaluate(recipe.model, recipe.guide, x, mask, adversarial=Adversarial(critic))
    assert found.critic_distance_per_frame is not None
    assert math.isfinite(found.critic_distance_per_frame)
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())


def test_a_critics_distance_and_its_w2_are_averages_over_frames_in_its_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipes.avrnn(X, Z, H, critic="feedforward", critic_dim=4)
    x, mask = data(recipe)
    adversarial = Adversarial(recipe.critic, standardise=True)
    monkeypatch.setattr(adversarial, "distance", lambda d: float(len(d.z)))  # longest of two
    given: dict[str, Any] = {"num_particles": 5, "seed": 1, "adversarial": adversarial}
    found = evaluate(recipe.model, recipe.guide, x, mask, batch_size=2, **given)
    # lengths 4 and 2, 5 and 1, 3
    expected = (6 * 4.0 + 6 * 5.0 + 3 * 3.0) / 15
    assert found.critic_distance_per_frame == pytest.approx(expected, rel=1e-12)
    found = evaluate(recipe.model, recipe.guide, x, mask, **given)
    with seeded(1), torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, mask, num_particles=5)
    p, q, seen = d.prior, d.proposal, d.mask.expand(d.log_weight.shape)
    squares = (q.mean - p.mean).square() + (q.stddev - p.stddev).square()
    w2 = (squares / p.stddev.square()).sum(dim=-1).sqrt()[seen].mean().item()
    assert found.closed_form_w2_per_frame == pytest.approx(w2, rel=1e-10)


def test_with_training_data_the_rate_is_split() -> None:
    recipe = CASES[VRNN]()
    x, mask = data(recipe)
    found = evaluate(recipe.model, recipe.guide, x, mask, train=(x, mask))
    assert found.aggregate_mismatch_at_least is not None
    assert found.information_at_most is not None and found.information_at_most >= 0.0
    assert found.aggregate_mismatch_at_least >= 0.0


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0, 1e4, 1e8])
def test_weights_of_any_spread_have_a_k_hat(scale: float) -> None:
    k = pareto_k(torch.randn(64, 200) * scale)
    assert not k.isnan().any() and bool((k > -1.0).all())
    assert float(k.median()) > (0.2 if scale == 1.0 else 2.0)


@pytest.mark.parametrize("particles", [25, 64, 100])
def test_weights_with_ties_where_the_tail_begins_have_a_k_hat(particles: int) -> None:
    tail = int(min(particles / 5, 3 * math.sqrt(particles)))
    larger = torch.linspace(0.5, 2.0, tail - 1)
    # the quartile that Pyro's fit divides by is number int(tail / 4 - 0.5) from below
    ties = int(tail / 4 - 0.5) + 1
    log_weight = torch.cat([larger[: tail - ties], torch.zeros(particles - tail + ties)])
    assert not pareto_k(log_weight.unsqueeze(1)).isnan().any()


def test_weights_that_hardly_vary_have_a_k_hat_in_float32() -> None:
    # a guide that nearly is the prior, of a model that hardly reads z
    log_weight = (1e-4 * torch.randn(64, 200) - 300.0).float()
    assert pareto_k(log_weight).shape == (200,)


def test_the_tail_of_k_hat_is_all_that_exceeds_the_next_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_weight, seen = torch.randn(100, 1), []
    monkeypatch.setattr(
        "inference.weights.fit_generalized_pareto",
        lambda excess: seen.append(excess) or (0.0, 1.0),
    )
    pareto_k(log_weight)
    ordered = log_weight[:, 0].sort(descending=True).values
    weights = (ordered - ordered[0]).exp()
    expected = (weights[:20] - weights[20]).flip(0)  # min(100 / 5, 3 sqrt(100)) weights
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=0.0)
