"""Evidence estimates: unbiased for Z, tight under the exact posterior, better with more particles.

The same short series stands in every row of a large batch, so that one call gives as many
independent estimates; errors are computed from them.
"""

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from numpy import ndarray
from torch import Tensor

from inference import elbo, fivo, iwae, particle_filter
from inference.bounds import stretches
from inference.densities import StepDensities
from inference.resampling import CRITERIA, RESAMPLERS, Selection, multinomial, systematic
from inference.weights import log_mean_exp
from pyro_avrnn import recipes
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from tests.reference import kalman
from tests.reference.unbiased import deviation
from tests.unit.table import observations, prefix_mask

SERIES = (0.4, 1.2, 0.1, 0.9, 1.4)
REPEATS, K = 20_000, 4
LENGTHS = {"whole": (5,) * 5, "ragged": (5, 1, 3, 2, 4)}


class Loose(ExactFilter):
    """The locally optimal proposal, shifted and wider: its weights vary, and are bounded."""

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        exact = super().proposal(state, c_t)
        return dist.MultivariateNormal(
            exact.mean - 0.3, scale_tril=1.5 * exact.scale_tril, validate_args=False
        )


def reference(model: LGSSM) -> tuple[ndarray, ...]:
    """(A, Q, C, R, m, S), the covariances multiplied out."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    q, r, s = (p[f"{name}_scale_tril"] for name in ("transition", "emission", "initial"))
    return (
        *(p["transition_matrix"], q @ q.T, p["emission_matrix"], r @ r.T),
        *(p["initial_mean"], s @ s.T),
    )


def exact(model: LGSSM, x: Tensor, mask: Tensor) -> Tensor:
    """Kalman's log p(x) of each sequence, (B,)."""
    given, lengths = reference(model), mask.sum(dim=1).tolist()
    return torch.tensor(
        [kalman.log_evidence(v[:n].numpy(), *given) for v, n in zip(x, lengths, strict=True)]
    )


def series(repeats: int) -> Tensor:
    """(B, T, X)"""
    return torch.tensor(SERIES).unsqueeze(1).expand(repeats, -1, 1)


def batch(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The series over and over, cut to these lengths in turn; its mask and exact evidence."""
    copies = REPEATS // len(lengths)
    mask = torch.cat([prefix_mask(lengths)] * copies)
    x = series(REPEATS)
    log_z = exact(LGSSM.scalar(), x[: len(lengths)], mask[: len(lengths)])
    return x, mask, log_z.repeat(copies)


def simulate(
    lengths: tuple[int, ...],
    resampler: str | Callable[[Tensor], Tensor] = "systematic",
    criterion: str = "never",
) -> tuple[StepDensities, Selection, Tensor]:
    """What FIVO sees of a batch, and the exact evidence."""
    model = LGSSM.scalar()
    x, mask, log_z = batch(lengths)
    selection = Selection(resampler, criterion, mask)
    with torch.no_grad():
        d = model.rollout(Loose(model), x, mask, num_particles=K, select=selection)
    return d, selection, log_z


def log_z_hat(d: StepDensities, selection: Selection) -> Tensor:
    return fivo(d.log_weight, selection.events(d.log_weight))


# unbiased


def test_one_huge_ratio_is_no_estimate() -> None:
    """It carries mean and error alike: the mean is 51 for 1, one standard error off."""
    ratio = torch.randn(20_000).mul(0.3).exp().div(math.exp(0.045))
    assert abs(deviation(ratio.log(), 0.0)) < 5
    ratio[7] = 1e6
    naive = (ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio)))
    assert abs(naive) < 5 and deviation(ratio.log(), 0.0) == math.inf


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("particles", [1, K])
def test_iwae_estimates_the_evidence(case: str, particles: int) -> None:
    d, _, log_z = simulate(LENGTHS[case])
    found = deviation(iwae(d.log_weight[:, :particles]), log_z)
    print(f"IWAE-{particles}, {case}: {found:+.2f} s.e.")
    assert abs(found) < 5
    below = deviation(elbo(d.log_weight), log_z)  # the twin: a bound that is no estimate
    assert below < -5


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_fivo_estimates_the_evidence(resampler: str, criterion: str, case: str) -> None:
    d, selection, log_z = simulate(LENGTHS[case], resampler, criterion)
    found = deviation(log_z_hat(d, selection), log_z)
    possible = d.mask[1:, 0]
    share = float(selection.events(d.log_weight)[possible].double().mean())
    print(
        f"FIVO-{K}, {resampler}, {criterion}, {case}: {found:+.2f} s.e., resampled after "
        f"{share:.0%} of steps"
    )
    assert abs(found) < 5
    low, high = {"never": (0.0, 0.0), "ess": (0.1, 0.9), "always": (1.0, 1.0)}[criterion]
    assert low <= share <= high


def ahead(model: LGSSM) -> Callable[[LGSSMState, Tensor], Tensor]:
    """Log-weights by how well a particle foresees what comes."""

    def auxiliary(state: LGSSMState, x_next: Tensor) -> Tensor:
        return model.emission(model.transition(state).mean, state).log_prob(x_next)

    return auxiliary


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("criterion", ["always", "ess"])
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_looking_ahead_stays_unbiased(resampler: str, criterion: str, case: str) -> None:
    model = LGSSM.scalar()
    x, mask, log_z = batch(LENGTHS[case])
    with torch.no_grad():
        filtered = particle_filter(
            model,
            None,
            *(x, mask),
            num_particles=K,
            resampler=resampler,
            criterion=criterion,
            auxiliary=ahead(model),
            paths=False,
        )
    found = deviation(filtered.log_evidence, log_z)
    print(f"auxiliary, {resampler}, {criterion}, {case}: {found:+.2f} s.e.")
    assert abs(found) < 5


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_path_estimates_the_evidence_of_every_prefix(criterion: str) -> None:
    model = LGSSM.scalar()
    x, mask, _ = batch(LENGTHS["whole"])
    with torch.no_grad():
        filtered = particle_filter(model, None, x, num_particles=K, criterion=criterion)
    path = filtered.log_evidence_path
    found = [
        deviation(path[t], kalman.log_evidence(x[0, : t + 1].numpy(), *reference(model)))
        for t in range(len(SERIES))
    ]
    print(f"bootstrap filter, {criterion}, by step: {' '.join(f'{d:+.2f}' for d in found)} s.e.")
    assert max(map(abs, found)) < 5


# planted faults


def carried_weight_dropped(d: StepDensities, _: Selection) -> Tensor:
    """Every step's factor is the average of its own weights."""
    return log_mean_exp(d.log_weight, dim=1).sum(dim=0)


def carried_weight_counted_again(d: StepDensities, selection: Selection) -> Tensor:
    """Every step's factor is the average of the products so far."""
    total, running = torch.zeros(()), torch.zeros(())
    resampled = selection.events(d.log_weight)
    for t, step in enumerate(d.log_weight):
        running = running + step
        total = total + log_mean_exp(running, dim=0) * d.mask[t, 0]
        if t < len(resampled):
            running = running.where(~resampled[t], 0.0)
    return total


def last_stretch_left_out(d: StepDensities, selection: Selection) -> Tensor:
    """Only stretches that ended in a resampling have a factor."""
    resampled = selection.events(d.log_weight)
    factors = log_mean_exp(stretches(d.log_weight, resampled), dim=1)  # (S, B)
    finished = torch.arange(len(factors)).unsqueeze(1) < resampled.sum(dim=0)
    return (factors * finished).sum(dim=0)


def weights_not_reset(d: StepDensities, selection: Selection) -> Tensor:
    """A particle goes on with its parent's weight."""
    running = torch.zeros(d.log_weight.shape[1:])
    for step, parents in zip(d.log_weight, [*selection.parents, None], strict=True):
        running = running + step
        running = running if parents is None else running.gather(0, parents)
    return log_mean_exp(running, dim=0)


def padding_weighed(d: StepDensities, selection: Selection) -> Tensor:
    """A padded step adds the weight that its zeros would have."""
    weight = d.prior.log_prob(d.z) + d.emission.log_prob(torch.where(d.mask[..., None], d.x, 0.0))
    weight = weight - d.proposal.log_prob(d.z)
    return fivo(weight, selection.events(weight))


@pytest.mark.parametrize(
    ("fault", "criterion", "case"),
    [
        (carried_weight_dropped, "never", "whole"),
        (carried_weight_dropped, "ess", "whole"),
        (carried_weight_dropped, "ess", "ragged"),
        (carried_weight_counted_again, "never", "ragged"),
        (carried_weight_counted_again, "ess", "whole"),
        (last_stretch_left_out, "always", "whole"),
        (last_stretch_left_out, "ess", "ragged"),
        (weights_not_reset, "always", "whole"),
        (weights_not_reset, "ess", "whole"),
        (weights_not_reset, "ess", "ragged"),
        (padding_weighed, "never", "ragged"),
        (padding_weighed, "always", "ragged"),
        (padding_weighed, "ess", "ragged"),
    ],
)
def test_planted_faults_are_rejected(
    fault: Callable[[StepDensities, Selection], Tensor],
    criterion: str,
    case: str,
) -> None:
    d, selection, log_z = simulate(LENGTHS[case], "multinomial", criterion)
    found = deviation(fault(d, selection), log_z)
    print(f"{fault.__name__}, multinomial, {criterion}, {case}: {found:+.1f} s.e.")
    assert abs(found) > 5
    assert abs(deviation(log_z_hat(d, selection), log_z)) < 5  # of the same draws


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_so_is_resampling_by_other_weights_than_those_counted(power: float) -> None:
    def by_others(log_weight: Tensor) -> Tensor:
        return systematic((power * log_weight).log_softmax(dim=0))

    d, selection, log_z = simulate(LENGTHS["whole"], by_others, "always")
    found = deviation(log_z_hat(d, selection), log_z)
    print(f"ancestors by weights to the power {power:g}, always: {found:+.1f} s.e.")
    assert abs(found) > 5


def test_so_is_a_favour_that_is_not_taken_back() -> None:
    model = LGSSM.scalar()
    favour, (x, _, log_z) = ahead(model), batch(LENGTHS["whole"])
    kept: list[Tensor] = []

    def hidden(state: LGSSMState, x_next: Tensor) -> Tensor:
        kept.append(favour(state, x_next))
        return torch.zeros_like(kept[-1])

    def by_favour(log_weight: Tensor) -> Tensor:
        return multinomial((log_weight + kept[-1]).log_softmax(dim=0))

    given = {"num_particles": K, "criterion": "always", "paths": False}
    with torch.no_grad():
        filtered = particle_filter(model, None, x, resampler=by_favour, auxiliary=hidden, **given)
    found = deviation(filtered.log_evidence, log_z)
    print(f"auxiliary not taken back, multinomial, always: {found:+.1f} s.e.")
    assert abs(found) > 5


# the exact posterior as guide

MODELS = {"scalar": LGSSM.scalar, "Z = 2, X = 3": lambda: LGSSM.random(2, 3, seed=1)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("particles", [1, 2, 7])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (12, 12), (12, 1, 7, 2)])
def test_every_bound_is_tight(name: str, particles: int, lengths: tuple[int, ...]) -> None:
    model = MODELS[name]()
    mask = prefix_mask(lengths)
    x = 2 * torch.randn(*mask.shape, model.x_dim)
    expected, guide = exact(model, x, mask), ExactSmoother(model)
    selection = Selection("systematic", "never", mask)
    with torch.no_grad():
        d = model.rollout(guide, x, mask, num_particles=particles, select=selection)
        filtered = particle_filter(
            model, guide, x, mask, num_particles=particles, criterion="never"
        )
    for found in (
        elbo(d.log_weight),
        iwae(d.log_weight),
        log_z_hat(d, selection),
        filtered.log_evidence,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("criterion", ["always", "ess"])
def test_fivo_that_resamples_is_not_but_stays_unbiased(criterion: str) -> None:
    model = LGSSM.scalar()
    x = 2 * series(REPEATS)  # surprising enough for partial weights to differ
    log_z = kalman.log_evidence(x[0].numpy(), *reference(model))
    with torch.no_grad():
        filtered = particle_filter(
            model, ExactSmoother(model), x, num_particles=K, criterion=criterion, paths=False
        )
    gap = log_z - filtered.log_evidence
    error = float(gap.std()) / math.sqrt(REPEATS)
    found = deviation(filtered.log_evidence, log_z)
    share = float(filtered.resampled[:-1].double().mean())
    print(
        f"exact smoother, FIVO-{K}, systematic, {criterion} (resampled after {share:.0%} of steps)"
        f": log Z - E log Z_hat = {gap.mean():.4f} +- {error:.4f} nats, sd {gap.std():.4f}; "
        f"E[Z_hat / Z] = 1 {found:+.2f} s.e."
    )
    assert abs(found) < 5
    assert float(gap.mean()) > 5 * error and float(gap.std()) > 0.01


# more particles


def test_the_variance_of_log_evidence_falls_as_one_over_k() -> None:
    model, repeats = LGSSM.scalar(), 200
    with torch.no_grad():
        x = model(mask=prefix_mask((12,))).expand(repeats, -1, -1)  # drawn from the model
    sizes = torch.tensor([32, 64, 128, 256, 512, 1024])
    variances = {}
    for name, guide in (("ExactFilter", ExactFilter(model)), ("bootstrap", None)):
        rows = []
        for particles in sizes.tolist():
            with torch.no_grad():
                filtered = particle_filter(
                    model,
                    guide,
                    x,
                    num_particles=particles,
                    resampler="multinomial",
                    paths=False,
                )
            rows.append(filtered.log_evidence.var())
        variances[name] = torch.stack(rows)
    assert bool((variances["ExactFilter"] < variances["bootstrap"]).all())
    steps = sizes.log() - sizes.log().mean()
    # the logarithm of a variance from R draws has a standard error of about sqrt(2 / R)
    error = math.sqrt(2 / repeats / float(steps.square().sum()))
    for name, found in variances.items():
        slope = float((steps * found.log()).sum() / steps.square().sum())
        print(
            f"{name}: variance of log Z_hat {' '.join(f'{v:.2e}' for v in found)} at K = 32 to "
            f"1024, log-log slope {slope:.3f} +- {error:.3f}"
        )
        assert abs(slope + 1) < 0.2


def test_iwae_does_not_fall_with_k() -> None:
    recipe = recipes.vrnn(3, 2, 5)
    x = 2 * observations(recipe, 1, 6).expand(4000, -1, -1)
    with torch.no_grad():
        d = recipe.model.rollout(recipe.guide, x, num_particles=16)

    def rises(bound: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
        """Rise of the bound of the first K draws from each K to 2 K, and its error."""
        bounds = [bound(d.log_weight[:, :k]) for k in (1, 2, 4, 8, 16)]
        pairs = [later - sooner for sooner, later in zip(bounds, bounds[1:], strict=False)]
        return [(float(p.mean()), float(p.std()) / math.sqrt(len(p))) for p in pairs]

    found = rises(iwae)
    print(
        "IWAE from K to 2 K, K = 1, 2, 4, 8:", ", ".join(f"{r:.4f} +- {e:.4f}" for r, e in found)
    )
    assert all(rise > 5 * error for rise, error in found)
    # the twins: a bound that holds still, and one whose K is counted twice
    assert all(abs(rise) < 5 * error for rise, error in rises(elbo))
    twice = rises(lambda w: iwae(w) - 0.5 * math.log(w.shape[1]))
    assert any(rise < -5 * error for rise, error in twice)


# what the particles stand for


@pytest.mark.parametrize("criterion", CRITERIA)
def test_filtered_and_smoothed_means_are_kalmans(criterion: str) -> None:
    model, repeats = LGSSM.scalar(), 60
    x = series(repeats)
    with torch.no_grad():
        found = particle_filter(model, None, x, num_particles=3000, criterion=criterion)
    smooth = (found.log_weight[-1].exp().unsqueeze(-1) * found.trajectories()).sum(dim=1)
    flat = found.z.mean(dim=1)  # the twin: weights forgotten
    given = (x[0].numpy(), *reference(model))
    filtered = torch.from_numpy(kalman.kalman_filter(*given).filtered.mean)
    smoothed = torch.from_numpy(kalman.smooth(*given).mean)

    def furthest(means: Tensor, expected: Tensor) -> float:
        """The largest distance of any step, in standard errors."""
        error = means.std(dim=1) / math.sqrt(repeats)
        return float(((means.mean(dim=1) - expected) / error).abs().max())

    distances = (
        furthest(found.mean, filtered),
        furthest(smooth, smoothed),
        furthest(flat, filtered),
        furthest(smooth, filtered),
    )
    print(f"{criterion}: at most {' '.join(f'{d:.1f}' for d in distances)} s.e.")
    assert distances[0] < 5 and distances[1] < 5
    assert distances[2] > 5 and distances[3] > 5
