"""Right values that faults planted in the library once slipped past."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from inference import (
    ELBO,
    FIVO,
    IWAE,
    Validation,
    evaluate,
    fit,
    information,
    rate_split,
    seeded,
)
from inference.densities import StepDensities
from inference.particles import particle_filter
from inference.resampling import Selection
from pyro_avrnn import recipes
from pyro_avrnn.logistics import MixtureOfLogistics
from pyro_avrnn.models import LGSSM
from pyro_avrnn.models.lgssm import ExactSmoother
from tests.reference.unbiased import deviation
from tests.unit.table import prefix_mask

B, T, X, Z, H = 3, 4, 2, 2, 4


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, X, generator=torch.Generator().manual_seed(2))
    return x, prefix_mask((4, 2, 3))


MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("vae", "storn", "vrnn", "srnn", "dmm", "dsae")},
    "storn, prior that reads h": {"prior": "conditional"},
    "vrnn, flows": {"prior": "flow", "guide": "flow"},
    "vrnn, lstm": {"cell": "lstm", "guide": "smoothing"},
    "vrnn, mixtures": {"prior": "mixture", "emission": "mixture"},
}


@pytest.mark.parametrize("loss", [ELBO(), IWAE(num_particles=3), FIVO(num_particles=3)])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_the_slope_of_the_loss(name: str, loss: Any) -> None:
    """Loop and rollout share the four functions, so only finite differences see a cut there."""
    with seeded(3):
        r = recipes.RECIPES[name.partition(",")[0]](X, Z, H, activation="tanh", **MODELS[name])
    modules = nn.ModuleDict({"model": r.model, "guide": r.guide})
    named = dict(modules.named_parameters())

    def value() -> Tensor:
        with seeded(5):
            return loss(r.model, r.guide, *batch())

    gradients = torch.autograd.grad(value(), list(named.values()), allow_unused=True)
    for (parameter, p), gradient in zip(named.items(), gradients, strict=True):
        direction, start, sides = torch.randn_like(p), p.detach().clone(), []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.copy_(start + step * direction)
                sides.append(float(value()))
                p.copy_(start)
        slope = (sides[0] - sides[1]) / 2e-6
        found = 0.0 if gradient is None else float((gradient * direction).sum())
        assert found == pytest.approx(slope, rel=2e-5, abs=2e-6), parameter


@pytest.mark.parametrize("log_scale", [-9.0, -7.0 + 1e-9, -5.0])
def test_the_logistics_gradient_is_a_slope_on_both_sides_of_the_floor(log_scale: float) -> None:
    bits, floor = 8, -7.0
    x = torch.tensor([[2 * 100 + 1.0]]) / 2**bits - 1.0
    parameters = torch.randn(3, 2, 1) * 0.3
    parameters[1 if parameters.ndim == 3 else 1] = x
    parameters[2] = log_scale
    parameters.requires_grad_()

    def value(p: Tensor) -> Tensor:
        return MixtureOfLogistics(p, bits, floor, validate_args=False).log_prob(x[0]).sum()

    (gradient,) = torch.autograd.grad(value(parameters), parameters)
    for index in range(3):
        side = torch.zeros_like(parameters)
        side[index, 0, 0] = 1e-6
        with torch.no_grad():
            slope = (value(parameters + side) - value(parameters - side)) / 2e-6
        near_kink = index == 2 and abs(log_scale - floor) < 1e-6
        if not near_kink:
            assert float(gradient[index, 0, 0]) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_patience_starts_again_after_a_better_bound() -> None:
    with seeded(1):
        r = recipes.vrnn(X, Z, H)
    bounds = iter([1.0, 0.0, 2.0, 0.0, 0.0, 9.0])
    svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-3}), ELBO())
    validation = Validation(lambda: next(bounds), every=1, patience=2)
    history = fit(svi, [batch()], steps=6, validation=validation, seed=0, progress=False)
    assert (history.steps, history.best_step) == (5, 3)


def test_an_iwae_window_hands_on_by_the_weights_of_all_its_steps() -> None:
    log_weight = torch.zeros(3, 4, 2)
    log_weight[0, 1], log_weight[-1, 2] = 80.0, 10.0  # particle 1 by its first step
    zeros = torch.zeros_like(log_weight)
    d = StepDensities(
        *(zeros[..., None], None, zeros[..., None], zeros[:, :1] == 0.0),
        *(log_weight, zeros, zeros, None, None, None),
    )
    survivors = IWAE(num_particles=4).survivors(d)
    assert survivors is not None and bool((survivors == 1).all())


def test_evaluate_trains_the_rate_split_on_the_training_set() -> None:
    with seeded(1):
        r = recipes.vrnn(X, Z, H)
    train, held = (torch.randn(n, T, X) for n in (12, 7))
    masks = [torch.ones(len(x), T, dtype=torch.bool) for x in (train, held)]
    found = evaluate(r.model, r.guide, held, masks[1], num_particles=2, train=(train, masks[0]))
    one = rate_split(r.model, r.guide, (train, masks[0]), (held, masks[1]))
    other = rate_split(r.model, r.guide, (held, masks[1]), (train, masks[0]))
    assert found.aggregate_mismatch_at_least == one.aggregate_mismatch_at_least
    assert found.aggregate_mismatch_at_least != other.aggregate_mismatch_at_least


def test_the_mismatchs_error_clusters_frames_by_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, mask = batch()  # 4, 2 and 3 frames
    per_sequence = torch.tensor([1.0, -1.0, 2.0])
    rows = torch.arange(3).expand(T, 3)[mask.t()]  # frames as rows, time first
    monkeypatch.setattr(
        "inference.information._nwj",
        lambda posterior, prior: per_sequence[rows] if len(prior) == 9 else posterior + prior,
    )
    with seeded(1):
        r = recipes.vrnn(X, Z, H)
        train = torch.randn(20, T, X), torch.ones(20, T, dtype=torch.bool)
    split = rate_split(r.model, r.guide, train, (x, mask), steps=1)
    mean = (4 * 1.0 - 2 * 1.0 + 3 * 2.0) / 9
    sums = [4 * (1.0 - mean), 2 * (-1.0 - mean), 3 * (2.0 - mean)]
    assert split.aggregate_mismatch_at_least == pytest.approx(mean, rel=1e-12)
    expected = math.sqrt(sum(v * v for v in sums)) / 9
    assert split.aggregate_mismatch_se == pytest.approx(expected, rel=1e-12)


def test_frames_know_their_sequence_in_sets_of_any_size() -> None:
    lengths = tuple(1 + b % T for b in range(70))
    with seeded(1):
        r = recipes.vrnn(X, Z, H)
        x = torch.randn(len(lengths), T, X)
    frames = information._frames(r.model, r.guide, x, prefix_mask(lengths))
    assert frames.sequence.bincount().tolist() == list(lengths)


def test_the_classifier_stops_where_frames_it_has_not_seen_say() -> None:
    noise, features, zeros = torch.randn(40, 1), torch.randn(40, 2), torch.zeros(40)
    frames = information._Frames(noise + 1.0, noise - 1.0, features, zeros, zeros.long())
    against = frames._replace(posterior=frames.prior, prior=frames.posterior)
    ratio = information._LogRatio(frames, 8, 8.0)
    start = {name: p.clone() for name, p in ratio.state_dict().items()}

    def moved(stopping: Any) -> bool:
        information._fit_classifier(ratio, frames, stopping, 60)
        return any(not torch.equal(p, start[name]) for name, p in ratio.state_dict().items())

    assert not moved(against)  # whatever it learns is wrong there
    assert moved(frames)


def test_fivo_selects_by_the_weight_of_f_too_but_not_for_an_empty_sequence() -> None:
    with seeded(4):
        r = recipes.dsae(X, Z, H, f_dim=3)
        r.guide.head.net[-1].bias.data[:3] += 5.0  # the mean of q(f), far from the prior's
    x, mask = torch.randn(2, 3, X), prefix_mask((3, 0))
    with seeded(6), torch.no_grad():
        loss = FIVO(num_particles=50)
        d = loss.draw(r.model, r.guide, x, mask)
    own = d.log_weight[0]
    of_f = d.prior_f.log_prob(d.f) - d.proposal_f.log_prob(d.f)
    assert float(of_f[:, 0].std()) > 3.0
    selection = loss._selection
    assert selection is not None and bool(selection.resampled[0][0])
    chosen = selection.parents[0]
    assert chosen is not None
    # few f have all the weight: those that go on are among the best of them
    best = own[:, 0].topk(10).indices
    assert torch.isin(chosen[:, 0], best).float().mean() > 0.9
    without = (own[:, 0] - of_f[:, 0]).topk(10).indices
    assert not torch.isin(chosen[:, 0], without).float().mean() > 0.9
    assert not bool(selection.resampled[0][1]) and not d.log_weight[:, :, 1].any()


def test_the_auxiliary_weight_of_the_particle_itself_is_taken_back() -> None:
    """Favouring by anything leaves Z_hat unbiased, the largest share of the sum small."""
    model = LGSSM.scalar()
    x = torch.randn(1, 3, 1, generator=torch.Generator().manual_seed(0))
    x = x.expand(3000, -1, -1)
    with torch.no_grad():
        d = model.rollout(ExactSmoother(model), x[:1])
    exact = float(d.log_weight.sum())  # of the exact posterior, every path weighs p(x)

    def favour(state: Any, x_t: Tensor) -> Tensor:
        return 0.5 * torch.sin(3.0 * state[0][..., 0])

    with seeded(1), torch.no_grad():
        filtered = particle_filter(
            model, None, x, num_particles=64, criterion="always", auxiliary=favour, paths=False
        )
    assert abs(deviation(filtered.log_evidence, exact)) < 5
    assert float((filtered.log_evidence - exact).exp().std()) < 1.0  # so that 5 s.e. are 0.1


def test_srnns_features_do_not_see_the_step_they_are_of() -> None:
    with seeded(1):
        r = recipes.srnn(X, Z, H)
    x = torch.randn(1, T, X, requires_grad=True)
    features = r.model.features(x)
    h = features[..., : r.model.cell.h_dim]  # d_t, which has read x up to t - 1
    (seen,) = torch.autograd.grad(h[0, 2].sum(), x)
    assert seen[0, :2].any() and not seen[0, 2:].any()
    state = r.model.init(torch.Size((1,)))
    for t in range(3):
        torch.testing.assert_close(h[:, t], r.model.cell.output(state.memory))
        state = r.model.advance(state, torch.zeros(1, Z), x[:, t])


@pytest.mark.parametrize("part", ["prior", "guide"])
def test_every_dimension_of_a_flow_depends_on_every_other(part: str) -> None:
    """Which takes flows that alternate the order of dimensions."""
    with seeded(1):
        r = recipes.vrnn(X, 3, H, prior="flow", guide="flow")
    state = r.model.init(torch.Size((1,)))
    if part == "prior":
        flow = r.model.transition(state)
    else:
        flow = r.guide.proposal(state, r.model.features(torch.randn(1, X)))
    e = torch.randn(3)

    def moved(e: Tensor) -> Tensor:
        z = e.unsqueeze(0)
        for transform in flow.transforms:
            z = transform(z)
        return z.reshape(-1)

    jacobian = torch.autograd.functional.jacobian(moved, e)
    off = jacobian - torch.diag(jacobian.diag()) if part == "guide" else jacobian
    upper, lower = off.triu(1).abs().max(), off.tril(-1).abs().max()
    assert upper > 1e-4 and lower > 1e-4


def test_a_selection_knows_the_mask() -> None:
    selection = Selection("systematic", "always", prefix_mask((3, 1)))
    zeros = torch.zeros(4, 2)
    selection(0, zeros, zeros, zeros)
    assert selection.resampled[0].tolist() == [True, False]


def test_f_weighs_nothing_in_a_sequence_without_a_step() -> None:
    with seeded(4):
        r = recipes.dsae(X, Z, H, f_dim=3)
    x, mask = torch.randn(2, 3, X), prefix_mask((3, 0))
    with torch.no_grad():
        found = particle_filter(r.model, r.guide, x, mask, num_particles=5)
    assert not found.log_evidence_path[:, 1].any()
    even = torch.full((3, 5), -math.log(5))
    torch.testing.assert_close(found.log_weight[:, :, 1], even, rtol=1e-12, atol=0.0)
