"""The linear-Gaussian model and its exact guides, against two references and Pyro's own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy import ndarray
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from inference.densities import StepDensities
from pyro_avrnn import recipes
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from pyro_avrnn.recipes import Recipe
from pyro_avrnn.sequence import SequenceGuide
from tests.reference import dense_gaussian, kalman
from tests.unit.table import assert_all_close, assert_close, gradients, prefix_mask

GUIDES = {"filter": ExactFilter, "smoother": ExactSmoother}
SIZES = [(1, 1), (2, 1), (1, 3), (3, 2), (4, 4)]  # (Z, X)
TERMS = ("log_prior", "log_emission", "log_proposal")
LENGTHS = (5, 1, 0, 4)


class PriorGuide(SequenceGuide):
    """A guide that is far from exact: the model's own law, half as wide."""

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        scale_tril = 0.5 * state.scale_tril
        return dist.MultivariateNormal(state.mean, scale_tril=scale_tril, validate_args=False)


class Deaf(ExactFilter):
    """Planted fault: the smoother with its backward message dropped, which is the filter."""


class Sharp(ExactSmoother):
    """Planted fault: the likelihood of the present and future is sharper by 1e-6."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        vector, matrix = super().encode(x, mask).tensor_split([self.z_dim], dim=-1)
        return torch.cat([vector, matrix * (1 + 1e-6)], dim=-1)


class Stopped(ExactSmoother):
    """Planted fault: right values, but no gradient through what is heard of the future."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().encode(x, mask).detach()


def reference(model: LGSSM) -> tuple[ndarray, ...]:
    """(A, Q, C, R, m, S), the covariances multiplied out."""
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    q, r, s = (p[f"{name}_scale_tril"] for name in ("transition", "emission", "initial"))
    return (
        p["transition_matrix"],
        q @ q.T,
        p["emission_matrix"],
        r @ r.T,
        p["initial_mean"],
        s @ s.T,
    )


def data(model: LGSSM, size: int, length: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(size, length, model.x_dim, generator=generator)


def log_evidence(model: LGSSM, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kalman's log p(x) of each sequence, (B,)."""
    lengths = [x.shape[1]] * len(x) if mask is None else mask.sum(dim=1).tolist()
    given = reference(model)
    return torch.tensor(
        [kalman.log_evidence(v[:n].numpy(), *given) for v, n in zip(x, lengths, strict=True)]
    )


def hmm_log_evidence(model: LGSSM, x: Tensor) -> Tensor:
    """Pyro's log p(x), (B,), differentiable in the model's parameters.

    Its z_0 sits one transition before x_1; a first transition that forgets z_0 makes z_1 ours.
    """
    length, z = x.shape[1], model.z_dim
    later = (length - 1, z, z)
    first = model.initial_mean.new_zeros(1, z, z)
    matrix = torch.cat([first, model.transition_matrix.mT.expand(later)])
    mean = torch.cat([model.initial_mean[None], first[0, :1].expand(length - 1, z)])
    factor = torch.cat(
        [model.initial_scale_tril[None], model.transition_scale_tril.expand(later)]
    ).tril()
    hmm = dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(z), scale_tril=torch.eye(z)),
        matrix,
        dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False),
        model.emission_matrix.mT,
        dist.MultivariateNormal(
            torch.zeros(model.x_dim),
            scale_tril=model.emission_scale_tril.tril(),
            validate_args=False,
        ),
    )
    return hmm.log_prob(x)


# the references agree with each other


@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.parametrize(("z_dim", "x_dim"), SIZES)
def test_two_references_and_pyro_agree(z_dim: int, x_dim: int, length: int) -> None:
    model = LGSSM.random(z_dim, x_dim, seed=length)
    given, x = reference(model), data(model, 2, length)
    expected = [dense_gaussian.log_evidence(v, *given) for v in x.numpy()]
    np.testing.assert_allclose(log_evidence(model, x), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        hmm_log_evidence(model, x).detach(), expected, rtol=1e-10, atol=1e-10
    )
    mean, cov = dense_gaussian.posterior(x[0].numpy(), *given)
    smoothed = kalman.smooth(x[0].numpy(), *given)
    np.testing.assert_allclose(smoothed.mean, mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(smoothed.cov, np.einsum("tztw->tzw", cov), rtol=1e-10, atol=1e-10)


def test_the_scalar_model_is_given_by_standard_deviations() -> None:
    model = LGSSM.scalar(a=0.9, q=0.7, r=0.5, s0=1.3)
    # by hand: var z_1 = s0^2, cov(x_1, x_2) = a s0^2, var x_2 = a^2 s0^2 + q^2 + r^2
    cov = torch.tensor([[1.69 + 0.25, 0.9 * 1.69], [0.9 * 1.69, 0.81 * 1.69 + 0.49 + 0.25]])
    x = torch.tensor([[[0.3], [-1.2]]])
    expected = dist.MultivariateNormal(torch.zeros(2), cov).log_prob(x[..., 0])
    actual = model.rollout(ExactSmoother(model), x).log_weight.sum(0)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0.0)


# the loop is the dense joint density, and the rollout is the loop


def loop(recipe: Recipe, x: Tensor, mask: Tensor | None, particles: int) -> dict[str, Tensor]:
    """Draws and log-densities of every site of the Pyro programs, (T, K, B, ...)."""

    def within(program: Callable[..., Any]) -> Callable[..., Any]:
        def inner() -> None:
            with pyro.plate("particles", particles, dim=-2):
                program(x, mask)

        return inner

    guide = poutine.trace(within(recipe.guide)).get_trace()
    model = poutine.trace(poutine.replay(within(recipe.model), trace=guide)).get_trace()
    guide.compute_log_prob()
    model.compute_log_prob()

    def stack(trace: Any, site: str, what: str) -> Tensor:
        return torch.stack([trace.nodes[f"{site}_{t}"][what] for t in range(1, x.shape[1] + 1)])

    return {
        "z": stack(guide, "z", "value"),
        "log_prior": stack(model, "z", "log_prob"),
        "log_emission": stack(model, "x", "log_prob"),
        "log_proposal": stack(guide, "z", "log_prob"),
    }


@pytest.mark.parametrize(("z_dim", "x_dim"), SIZES)
def test_the_loops_joint_density_is_the_dense_one(z_dim: int, x_dim: int) -> None:
    model = LGSSM.random(z_dim, x_dim, seed=5)
    x = data(model, 3, 6)
    terms = loop(Recipe(model, PriorGuide(model)), x, None, 2)
    joint = (terms["log_prior"] + terms["log_emission"]).sum(0)
    for k, b in np.ndindex(2, 3):
        z = terms["z"][:, k, b].detach().numpy()
        expected = dense_gaussian.log_joint(z, x[b].numpy(), *reference(model))
        np.testing.assert_allclose(joint[k, b].item(), expected, rtol=1e-10)


def mixed(terms: dict[str, Tensor]) -> Tensor:
    """One random linear function of all log-densities, so that no two errors cancel."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, *terms["log_prior"].shape, generator=generator)
    return sum((w * terms[name]).sum() for w, name in zip(weights, TERMS, strict=True))


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("guide", [PriorGuide, *GUIDES.values()])
def test_loop_and_rollout_agree_in_values_and_gradients(
    guide: type, ragged: bool, particles: int
) -> None:
    model = LGSSM.random(2, 3, seed=1)
    recipe = Recipe(model, guide(model))
    x, mask = data(model, 4, 5), prefix_mask(LENGTHS) if ragged else None
    torch.manual_seed(7)
    looped = loop(recipe, x, mask, particles)
    torch.manual_seed(7)
    d = model.rollout(recipe.guide, x, mask, particles)
    rolled = {name: getattr(d, name) for name in (*TERMS, "z")}
    assert_all_close(rolled, looped)
    assert_all_close(gradients(recipe, mixed(rolled)), gradients(recipe, mixed(looped)))


def test_shapes_of_a_rollout() -> None:
    model = LGSSM.random(2, 3, seed=1)
    d = model.rollout(ExactSmoother(model), data(model, 4, 5), num_particles=6)
    assert d.z.shape == d.h.shape == d.states.mean.shape == (5, 6, 4, 2)
    assert d.states.scale_tril.shape == (5, 6, 4, 2, 2) and d.c.shape == (5, 1, 4, 6)
    assert d.prior.batch_shape == d.proposal.batch_shape == d.emission.batch_shape == (5, 6, 4)


def test_the_model_draws_observations() -> None:
    x = LGSSM.random(2, 3, seed=1)(mask=prefix_mask((5, 5)))
    assert x.shape == (2, 5, 3) and bool(torch.isfinite(x).all())


# the exact smoother makes the evidence a constant


def total(d: StepDensities) -> Tensor:
    return d.log_weight.sum(dim=0)  # (K, B)


def assert_tight(
    model: LGSSM,
    guide: SequenceGuide,
    x: Tensor,
    mask: Tensor | None,
    particles: int,
    rtol: float = 1e-10,
) -> None:
    actual = total(model.rollout(guide, x, mask, particles))
    expected = log_evidence(model, x, mask).expand(particles, -1)
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("particles", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
def test_every_draw_of_the_smoother_weighs_the_evidence(
    sizes: tuple[int, int], length: int, particles: int
) -> None:
    model = LGSSM.random(*sizes, seed=length)
    assert_tight(model, ExactSmoother(model), data(model, 3, length), None, particles)


@pytest.mark.parametrize("particles", [1, 4])
def test_the_smoother_is_tight_on_ragged_sequences(particles: int) -> None:
    model = LGSSM.random(3, 2, seed=2)
    mask = prefix_mask(LENGTHS)
    x = torch.where(mask[..., None], data(model, 4, 5), torch.nan)
    assert_tight(model, ExactSmoother(model), x, mask, particles)
    nothing = total(model.rollout(ExactSmoother(model), x, mask, particles))[:, LENGTHS.index(0)]
    assert bool((nothing == 0.0).all())


def test_the_smoother_stays_exact_over_200_steps() -> None:
    model = LGSSM.random(4, 3, seed=8)
    assert_tight(model, ExactSmoother(model), data(model, 2, 200), None, 2)


# an emission a thousand times sharper than the transition costs six digits of sixteen
@pytest.mark.parametrize(
    ("q", "r", "rtol"),
    [(1e-3, 1.0, 1e-10), (1.0, 1e-3, 1e-9), (1e3, 1.0, 1e-9), (1.0, 1e3, 1e-10)],
)
def test_the_smoother_stays_exact_where_noises_differ_in_scale(
    q: float, r: float, rtol: float
) -> None:
    model = LGSSM.random(3, 2, seed=4)
    with torch.no_grad():
        model.transition_scale_tril.mul_(q)
        model.emission_scale_tril.mul_(r)
        x = model(mask=prefix_mask((40, 40)))
        assert_tight(model, ExactSmoother(model), x, None, 2, rtol)


@pytest.mark.parametrize("fault", [Deaf, Sharp])
def test_the_evidence_rejects_a_planted_fault(fault: type) -> None:
    model = LGSSM.random(3, 2, seed=2)
    with pytest.raises(AssertionError):
        assert_tight(model, fault(model), data(model, 3, 7), None, 4)


def test_plain_svi_sees_the_evidence_too() -> None:
    model = LGSSM.random(2, 2, seed=2)
    x, mask = data(model, 4, 5), prefix_mask(LENGTHS)
    loss = Trace_ELBO().loss(model, ExactSmoother(model), x, mask)
    assert -loss == pytest.approx(log_evidence(model, x, mask).sum().item(), rel=1e-10)


def assert_gradients_are_the_references(recipe: Recipe, x: Tensor) -> None:
    d = recipe.model.rollout(recipe.guide, x, num_particles=3)
    actual = gradients(recipe, total(d)[1].sum())
    expected = gradients(recipe, hmm_log_evidence(recipe.model, x).sum())
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("length", [1, 2, 20])
def test_gradients_of_the_evidence_are_the_references(length: int) -> None:
    model = LGSSM.random(3, 2, seed=6)
    assert_gradients_are_the_references(
        Recipe(model, ExactSmoother(model)), data(model, 2, length)
    )


def test_the_gradients_reject_a_planted_fault() -> None:
    model = LGSSM.random(3, 2, seed=6)
    with pytest.raises(AssertionError, match="model.transition_matrix"):
        assert_gradients_are_the_references(Recipe(model, Stopped(model)), data(model, 2, 7))


def test_gradients_of_the_evidence_are_kalmans_differences() -> None:
    model = LGSSM.random(3, 2, seed=6)
    recipe, x = Recipe(model, ExactSmoother(model)), data(model, 2, 20)
    gradient = gradients(recipe, total(model.rollout(recipe.guide, x))[0].sum())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = {
        name: torch.randn_like(v).tril() if "tril" in name else torch.randn_like(v)
        for name, v in values.items()
    }

    def moved(step: float) -> float:
        there = LGSSM(**{name: v + step * direction[name] for name, v in values.items()})
        return log_evidence(there, x).sum().item()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    along = sum((gradient[f"model.{name}"] * v).sum().item() for name, v in direction.items())
    assert along == pytest.approx(slope, rel=1e-6)


def test_training_leaves_the_factors_triangular() -> None:
    model = LGSSM.random(2, 2, seed=6)
    with pyro.get_param_store().scope():
        svi = SVI(model, ExactSmoother(model), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(data(model, 4, 5)) for _ in range(5)]
    assert losses[-1] < losses[0]  # exact, so Adam's first steps go downhill
    for name, p in model.named_parameters():
        assert "tril" not in name or bool((p.triu(1) == 0).all())


# the proposals are the conditionals of the dense joint


def entries(steps: list[int], size: int, offset: int = 0) -> ndarray:
    return np.concatenate([offset + s * size + np.arange(size) for s in steps])


def conditional(
    model: LGSSM, x: Tensor, t: int, z_before: Tensor, last: int
) -> tuple[ndarray, ndarray]:
    """Mean and covariance of z_t given z_{t-1} and x_{1:last}, t from 0, by the dense joint."""
    length, z = len(x), model.z_dim
    mean, cov = dense_gaussian.joint(length, *reference(model))
    before = [t - 1] if t else []
    keep = np.concatenate(
        [
            entries([*before, t], z),
            entries(list(range(last)), model.x_dim, offset=length * z),
        ]
    )
    mean, cov = mean[keep], cov[np.ix_(keep, keep)]
    known = np.setdiff1d(np.arange(len(keep)), entries([len(before)], z))
    values = np.concatenate([z_before.numpy()] * len(before) + [x[:last].numpy().ravel()])
    return dense_gaussian.condition(mean, cov, known, values)


@pytest.mark.parametrize("t", [0, 1, 3])
@pytest.mark.parametrize(("z_dim", "x_dim"), SIZES)
@pytest.mark.parametrize("guide", GUIDES)
def test_a_proposal_is_the_dense_conditional(guide: str, z_dim: int, x_dim: int, t: int) -> None:
    model = LGSSM.random(z_dim, x_dim, seed=9)
    x, z_before = data(model, 1, 5), torch.randn(1, z_dim)
    last = t + 1 if guide == "filter" else 5
    exact = GUIDES[guide](model)
    with torch.no_grad():
        state = model.init(torch.Size((1,)))
        if t:
            state = model.advance(state, z_before, x[:, t - 1])
        q = exact.proposal(state, exact.encode(x, torch.ones(1, 5, dtype=torch.bool))[:, t])
    mean, cov = conditional(model, x[0], t, z_before[0], last)
    np.testing.assert_allclose(q.mean[0], mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(q.covariance_matrix[0], cov, rtol=1e-10, atol=1e-10)


def test_beyond_the_end_the_guides_follow_the_model() -> None:
    model = LGSSM.random(2, 3, seed=1)
    x, mask = data(model, 4, 5), prefix_mask(LENGTHS)
    for guide in GUIDES.values():
        d = model.rollout(guide(model), x, mask, num_particles=2)
        padding = ~d.mask.expand(5, 2, 4)
        for name in ("loc", "scale_tril"):
            actual, expected = getattr(d.proposal, name), getattr(d.prior, name)
            assert_close(actual[padding], expected[padding], name)
        assert bool((guide(model).encode(x, mask)[~mask] == 0).all())  # whatever padding holds


# what the smoother draws


def smoothed_mean(model: LGSSM, guide: SequenceGuide, x: Tensor) -> Tensor:
    """E[z] without noise, (T, B, Z): each proposal's mean is linear in the z before it."""
    c = guide.encode(x, torch.ones(x.shape[:2], dtype=torch.bool))
    state, means = model.init(x.shape[:1]), []
    for t in range(x.shape[1]):
        means.append(guide.proposal(state, c[:, t]).mean)
        state = model.advance(state, means[-1], x[:, t])
    return torch.stack(means)


def assert_draws_follow_rts(model: LGSSM, guide: SequenceGuide, x: Tensor) -> None:
    """Mean and variance of 4000 draws within five standard errors."""
    with torch.no_grad():
        z = model.rollout(guide, x, num_particles=4000).z  # (T, K, B, Z)
    for b, sequence in enumerate(x.numpy()):
        moments = kalman.smooth(sequence, *reference(model))
        centred = z[:, :, b] - torch.from_numpy(moments.mean)[:, None]
        variance = torch.from_numpy(np.einsum("tzz->tz", moments.cov))[:, None]
        for name, values in (("mean", centred), ("variance", centred**2 - variance)):
            errors = values.mean(dim=1).abs() / (values.std(dim=1) / values.shape[1] ** 0.5)
            assert errors.max() < 5.0, f"{name}: {errors.max():.1f} standard errors"


def test_the_smoothers_means_are_those_of_rts() -> None:
    model = LGSSM.random(3, 2, seed=3)
    x = data(model, 2, 12)
    means = smoothed_mean(model, ExactSmoother(model), x).detach()
    for b, sequence in enumerate(x.numpy()):
        expected = torch.from_numpy(kalman.smooth(sequence, *reference(model)).mean)
        torch.testing.assert_close(means[:, b], expected, rtol=1e-10, atol=1e-10)


def test_the_smoothers_draws_follow_rts() -> None:
    model = LGSSM.random(2, 2, seed=3)
    assert_draws_follow_rts(model, ExactSmoother(model), data(model, 2, 6))


def test_the_check_of_draws_rejects_a_smoother_that_hears_no_future() -> None:
    model = LGSSM.random(2, 2, seed=3)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_draws_follow_rts(model, Deaf(model), data(model, 2, 6))


# ownership and bad input


@pytest.mark.parametrize("guide", GUIDES.values())
def test_an_exact_guide_owns_nothing(guide: type) -> None:
    model = LGSSM.scalar()
    assert not list(guide(model).parameters()) and not guide(model).state_dict()
    assert sum(p.numel() for p in model.parameters()) == 6
    copy = LGSSM.random(1, 1, seed=0)
    copy.load_state_dict(model.state_dict())
    x = data(model, 2, 3)
    assert_close(log_evidence(copy, x), log_evidence(model, x))


def test_a_random_model_is_stable_and_a_function_of_its_seed() -> None:
    for seed in range(5):
        model, again = LGSSM.random(3, 2, seed), LGSSM.random(3, 2, seed)
        assert torch.linalg.eigvals(model.transition_matrix).abs().max() < 0.9 + 1e-9
        assert all(map(torch.equal, model.parameters(), again.parameters()))


GOOD = {
    "transition_matrix": torch.eye(2, dtype=torch.float64),
    "transition_scale_tril": torch.eye(2, dtype=torch.float64),
    "emission_matrix": torch.ones(3, 2, dtype=torch.float64),
    "emission_scale_tril": torch.eye(3, dtype=torch.float64),
    "initial_mean": torch.zeros(2, dtype=torch.float64),
    "initial_scale_tril": torch.eye(2, dtype=torch.float64),
}
UPPER = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
SHAPED = r"have shape \(2, 2\) to fit emission_matrix \(X, Z\), got \(3, 3\)"
FACTOR = "be lower triangular with a positive diagonal, got"


@pytest.mark.parametrize(
    ("name", "value", "error", "sentence"),
    [
        ("transition_matrix", torch.eye(3).double(), ValueError, SHAPED),
        ("transition_scale_tril", torch.eye(3).double(), ValueError, SHAPED),
        ("initial_scale_tril", UPPER, ValueError, FACTOR),
        ("transition_scale_tril", -torch.eye(2).double(), ValueError, FACTOR),
        ("emission_scale_tril", torch.zeros(3, 3).double(), ValueError, FACTOR),
        ("transition_matrix", UPPER * torch.inf, ValueError, "be finite, got"),
        (
            "initial_mean",
            torch.zeros(2, 1).double(),
            ValueError,
            r"have shape \(2,\) .*got \(2, 1\)",
        ),
        (
            "emission_matrix",
            torch.ones(3).double(),
            ValueError,
            r"have shape \(X, Z\), .*got \(3,\)",
        ),
        ("emission_matrix", torch.ones(3, 0).double(), ValueError, r".*at least 1, got \(3, 0\)"),
        (
            "emission_matrix",
            torch.ones(3, 2).int(),
            TypeError,
            ".*floating point numbers, got torch.int32",
        ),
        ("emission_matrix", [[1.0]], TypeError, ".*floating point numbers, got list"),
        (
            "initial_mean",
            torch.zeros(2).float(),
            TypeError,
            "be a tensor of torch.float64 .*got torch.float32",
        ),
        ("initial_mean", 0.0, TypeError, "be a tensor of torch.float64 .*got float"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    name: str, value: Any, error: type[Exception], sentence: str
) -> None:
    LGSSM(**GOOD)
    with pytest.raises(error, match=f"^{name} must {sentence}"):
        LGSSM(**GOOD | {name: value})


def test_training_does_not_reach_the_tensors_a_model_was_made_from() -> None:
    model = LGSSM(**GOOD)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(GOOD["initial_mean"], torch.zeros(2))


def test_the_scalar_model_refuses_a_deviation_of_zero() -> None:
    with pytest.raises(ValueError, match=f"emission_scale_tril must {FACTOR}"):
        LGSSM.scalar(r=0.0)


@pytest.mark.parametrize("guide", GUIDES.values())
@pytest.mark.parametrize("model", [lambda: recipes.vrnn(3, 2, 5).model, nn.Identity])
def test_an_exact_guide_refuses_another_model(guide: type, model: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match="must be an LGSSM for an exact guide, got"):
        guide(model())
