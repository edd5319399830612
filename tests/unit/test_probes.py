"""``sequence_codes`` against guides whose means are known, ``LinearProbe`` against Bayes."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from inference import seeded
from inference.probes import Codes, LinearProbe, sequence_codes
from pyro_avrnn import recipes
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother
from tests.reference import dense_gaussian
from tests.unit.table import observations, prefix_mask

LENGTHS = (4, 2, 5, 1, 3)


def dsae(guide: str) -> recipes.Recipe:
    return recipes.dsae(x_dim=3, z_dim=2, h_dim=5, f_dim=4, guide=guide)


def data(recipe: recipes.Recipe) -> tuple[Tensor, Tensor]:
    return observations(recipe, len(LENGTHS), max(LENGTHS)), prefix_mask(LENGTHS)


# ---- codes ----


@torch.no_grad()
def test_codes_are_means_of_the_proposals_over_the_steps_a_sequence_has() -> None:
    r = dsae("factorised")  # q(z_t | x_t): no path, so its mean is the posterior's
    x, mask = data(r)
    found = sequence_codes(r.model, r.guide, x, mask, num_particles=3, batch_size=2)
    assert found.f is not None
    for b, length in enumerate(LENGTHS):
        alone, whole = x[b : b + 1, :length], mask[b : b + 1, :length]
        q_f = r.guide.proposal_f(alone, whole)
        torch.testing.assert_close(found.f[b], q_f.mean[0], rtol=1e-10, atol=1e-12)
        state, c = r.model.init(torch.Size((1,))), r.guide.encode(alone, whole)
        means = [r.guide.proposal(state, c[:, t]).mean[0] for t in range(length)]
        expected = torch.stack(means).mean(dim=0)
        torch.testing.assert_close(found.z[b], expected, rtol=1e-10, atol=1e-12)


def errors(guide: Any, model: LGSSM, x: Tensor) -> Tensor:
    """Of the code, in standard errors, against the exact posterior; one series in many rows."""
    rows = 2_000
    many = x.expand(rows, -1, -1)
    mask = torch.ones(many.shape[:2], dtype=torch.bool)
    z = sequence_codes(model, guide, many, mask, num_particles=2, batch_size=500).z
    given = [np.array([[v]]) for v in (0.9, 0.7**2, 1.0, 0.5**2)]  # A, Q, C, R
    start = (np.array([0.0]), np.array([[1.3**2]]))
    posterior, _ = dense_gaussian.posterior(x[0].numpy(), *given, *start)
    expected = torch.tensor(posterior).reshape(x.shape[1], -1).mean(dim=0)
    return (z.mean(dim=0) - expected).abs() / (z.std(dim=0) / rows**0.5)


def test_codes_average_over_paths_to_the_posterior_mean() -> None:
    model = LGSSM.scalar(a=0.9, q=0.7, r=0.5, s0=1.3)
    x = torch.tensor([[[0.4], [1.2], [0.1], [0.9], [1.4]]])
    assert errors(ExactSmoother(model), model, x).max() < 5.0
    # planted fault: a guide that does not see the future has another mean
    assert errors(ExactFilter(model), model, x).max() > 5.0


def test_draws_are_of_the_proposals_and_differ_by_seed_alone() -> None:
    r = dsae("full")
    x, mask = data(r)
    a, b, c = (sequence_codes(r.model, r.guide, x, mask, seed=s) for s in (0, 0, 1))
    for first, second in zip(a, b, strict=True):
        assert torch.equal(first, second)
    assert a.f_draw is not None and c.f_draw is not None
    assert not torch.allclose(a.f_draw, c.f_draw) and torch.equal(a.f, c.f)
    assert a.z_draw.shape == a.z.shape == (len(LENGTHS), 2)


def test_a_draw_is_the_average_of_one_path() -> None:
    r = dsae("full")
    x, mask = data(r)
    found = sequence_codes(r.model, r.guide, x, mask, num_particles=3, seed=6)
    with seeded(6), torch.no_grad():
        d = r.model.rollout(r.guide, x, mask, num_particles=3)
    assert found.f_draw is not None and torch.equal(found.f_draw, d.f[0])
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(found.z_draw[b], d.z[:length, 0, b].mean(dim=0))


def test_draws_of_f_have_its_mean_and_scale() -> None:
    r = dsae("factorised")
    x, mask = data(r)
    rows, b = 4_000, 2
    found = sequence_codes(
        r.model,
        r.guide,
        x[b].expand(rows, -1, -1),
        mask[b].expand(rows, -1),
        num_particles=1,
        batch_size=1_000,
    )
    assert found.f is not None and found.f_draw is not None
    with torch.no_grad():
        q_f = r.guide.proposal_f(x[b : b + 1], mask[b : b + 1])
    standardised = (found.f_draw - q_f.mean) / q_f.stddev
    assert (standardised.mean(dim=0) * rows**0.5).abs().max() < 5.0
    assert ((standardised.var(dim=0) - 1.0) * (rows / 2) ** 0.5).abs().max() < 5.0


def test_padding_changes_nothing_and_what_was_there_is_left_alone() -> None:
    r = dsae("factorised")
    x, mask = data(r)
    r.model.train()
    state = torch.get_rng_state()
    found = sequence_codes(r.model, r.guide, x, mask)
    padded = torch.where(mask.unsqueeze(-1), x, torch.nan)
    longer = torch.cat([padded, torch.full_like(x, torch.nan)], dim=1)
    again = sequence_codes(
        r.model, r.guide, longer, torch.cat([mask, torch.zeros_like(mask)], dim=1)
    )
    assert r.model.training and torch.equal(torch.get_rng_state(), state)
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_codes_of_a_model_without_f_and_of_a_flow_without_means() -> None:
    r = recipes.vrnn(x_dim=3, z_dim=2, h_dim=5, guide="flow")
    x, mask = data(r)
    found = sequence_codes(r.model, r.guide, x, mask, num_particles=1)
    assert found.f is None and found.f_draw is None
    torch.testing.assert_close(found.z, found.z_draw)  # one draw is all that is known of it


def test_codes_are_in_the_dtype_of_the_data() -> None:
    r = dsae("full")
    r.model.float(), r.guide.float()
    x, mask = data(r)
    found: Codes = sequence_codes(r.model, r.guide, x.float(), mask)
    assert {part.dtype for part in found if part is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mask": torch.zeros(5, 5, dtype=torch.bool)}, r"sequence 0 \(counted from 0\) has none"),
    ],
)
def test_codes_say_what_is_wrong(options: dict[str, Any], says: str) -> None:
    r = dsae("full")
    x, mask = data(r)
    with pytest.raises(ValueError, match=says):
        sequence_codes(r.model, r.guide, x, **{"mask": mask, **options})


# ---- probes ----


def normals(count: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Two classes, unit normals whose means lie that far apart in a direction of the plane."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, size=count)
    codes = random.normal(size=(count, 2))
    codes[:, 0] += distance * labels
    return codes, labels


def test_a_probe_of_two_normals_has_the_accuracy_of_bayes() -> None:
    codes, labels = normals(8_000, 2.0)
    score = LinearProbe(codes[:4_000], labels[:4_000]).score(codes[4_000:], labels[4_000:])
    best = stats.norm.cdf(1.0)  # half the distance away, on the right side
    assert score.standard_error == pytest.approx((best * (1 - best) / 4_000) ** 0.5, rel=0.05)
    assert abs(score.accuracy - best) < 5 * score.standard_error
    assert score.chance == 0.5
    assert score.largest_class == np.bincount(labels[4_000:]).max() / 4_000
    # planted fault: labels of other codes
    fault = LinearProbe(codes[:4_000], np.roll(labels[:4_000], 1))
    wrong = fault.score(codes[4_000:], labels[4_000:])
    assert abs(wrong.accuracy - best) > 5 * score.standard_error


def test_a_probe_does_not_see_units() -> None:
    codes, labels = normals(400, 1.0)
    units, origin = np.array([1e-6, 1e5]), np.array([1e-4, -3e6])
    one = LinearProbe(codes[:200], labels[:200]).predict(codes[200:])
    other = LinearProbe(codes[:200] * units + origin, labels[:200])
    assert (one == other.predict(codes[200:] * units + origin)).all()


def test_accuracy_counts_what_is_found() -> None:
    probe = LinearProbe(torch.tensor([[0.0], [1.0], [10.0], [11.0], [20.0]]), ["a", "a", *"bbc"])
    assert probe.predict(torch.tensor([[0.5], [10.5]])).tolist() == ["a", "b"]
    score = probe.score([[0.5], [10.5], [0.4], [0.2]], ["a", "b", "b", "b"])
    assert score == (0.5, 0.25, 1 / 3, 0.75)


@pytest.mark.parametrize(
    ("codes", "labels", "says"),
    [
        ([0.0, 1.0], [0, 1], r"codes must be numbers of shape \(N, D\), got float64 \(2,\)"),
        ([["a"], ["b"]], [0, 1], r"codes must be numbers of shape \(N, D\)"),
        ([[0.0], [np.nan]], [0, 1], "for sequence 1 "),
        ([[0.0], [1.0]], [0, 1, 1], r"labels must have shape \(2,\), one a code, got \(3,\)"),
        ([[0.0], [1.0]], [3, 3], r"labels must be of two classes at least, got \[3\]"),
    ],
)
def test_a_probe_says_what_is_wrong(codes: Any, labels: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LinearProbe(codes, labels)


def test_a_probe_refuses_a_label_it_has_never_seen() -> None:
    probe = LinearProbe([[0.0], [1.0]], ["ada", "ben"])
    with pytest.raises(ValueError, match=r"\['ada', 'ben'\], got 'cleo'"):
        probe.score([[0.0]], ["cleo"])


def test_without_scikit_learn_a_probe_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install pyro-avrnn\[examples\]"):
        LinearProbe([[0.0], [1.0]], [0, 1])
