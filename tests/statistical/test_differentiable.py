"""Resamplers that gradients can follow: what stays unbiased, and what does not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import FIVO, fivo, particle_filter
from inference.differentiable import Soft, StopGradient, Transport
from pyro_avrnn.models import LGSSM
from tests.reference.unbiased import deviation
from tests.statistical.test_evidence import K, Loose, batch, exact, series, simulate

PARTS, SIZE = 60, 2000
WHOLE = (5,) * 5


def estimate(resampler: Any, criterion: str) -> Tensor:
    d, selection, _ = simulate(WHOLE, resampler, criterion)
    return fivo(selection.weighed(d.log_weight), selection.events(d.log_weight))


@pytest.mark.parametrize("criterion", ["ess", "always"])
@pytest.mark.parametrize("resampler", [Soft(0.3), Soft(1.0), StopGradient("systematic")])
def test_the_evidence_stays_unbiased(resampler: Any, criterion: str) -> None:
    *_, log_z = simulate(WHOLE)
    found = {"FIVO": estimate(resampler, criterion)}
    model = LGSSM.scalar()
    x, mask, _ = batch(WHOLE)
    with torch.no_grad():
        found["filter"] = particle_filter(
            *(model, Loose(model), x, mask),
            num_particles=K,
            resampler=resampler,
            criterion=criterion,
        ).log_evidence
    for name, value in found.items():
        off = deviation(value, log_z)
        print(f"{type(resampler).__name__}, {name}: {off:+.2f} s.e.")
        assert abs(off) < 5


def test_soft_weights_left_out_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, log_z = simulate(WHOLE)
    monkeypatch.setattr(Soft, "fresh", lambda self, w, parents: torch.zeros_like(w))
    assert abs(deviation(estimate(Soft(0.3), "always"), log_z)) > 5


def slope(name: str) -> float:
    """Derivative of log Z, by differences of Kalman's."""
    values = []
    for h in (1e-4, -1e-4):
        model = LGSSM.scalar()
        with torch.no_grad():
            getattr(model, name).add_(h)
        x = series(1)
        values.append(float(exact(model, x, torch.ones(1, 5, dtype=torch.bool))))
    return (values[0] - values[1]) / 2e-4


def gradients(resampler: Any) -> dict[str, Tensor]:
    """Gradients of the mean of Z_hat / Z, one of each part."""
    torch.manual_seed(0)
    model = LGSSM.scalar()
    guide, x = Loose(model), series(SIZE)
    log_z = float(exact(model, x[:1], torch.ones(1, 5, dtype=torch.bool)))
    names = ("transition_matrix", "emission_scale_tril")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(PARTS):
        kept: list[Tensor] = []

        class Kept(FIVO):
            def objective(self, densities: Any, kl_weight: float) -> Tensor:
                kept.append(super().objective(densities, kl_weight))  # noqa: B023
                return kept[-1]  # noqa: B023

        Kept(num_particles=2, resampler=resampler, criterion="always")(model, guide, x)
        ratio = (kept[0] - log_z).exp().mean()
        parameters = [getattr(model, name) for name in names]
        for name, value in zip(names, torch.autograd.grad(ratio, parameters), strict=True):
            found[name].append(value.squeeze())
    return {name: torch.stack(values) for name, values in found.items()}


def off(found: Tensor, truth: float) -> float:
    return float((found.mean() - truth) / (found.std() / math.sqrt(len(found))))


def test_the_stop_gradient_of_the_evidence_is_unbiased() -> None:
    right, plain = gradients(StopGradient()), gradients("multinomial")
    for name, values in right.items():
        truth = slope(name)
        print(
            f"{name}: {truth:.4f}, off by {off(values, truth):+.1f} s.e., the plain one by "
            f"{off(plain[name], truth):+.1f}"
        )
        assert abs(off(values, truth)) < 5
    assert max(abs(off(plain[name], slope(name))) for name in plain) > 5


def test_a_plan_moves_all_weight_and_no_more_than_it_must() -> None:
    torch.manual_seed(1)
    particles = torch.randn(20, 3, 2)
    log_weight = torch.randn(20, 3).log_softmax(dim=0)
    plan = Transport(0.05, 500).plan(particles, log_weight)
    torch.testing.assert_close(plan.sum(dim=2), torch.full((3, 20), 1 / 20), rtol=1e-9, atol=0)
    assert (plan.sum(dim=1) - log_weight.t().exp()).abs().sum(dim=1).max() < 0.01
    even = torch.full((20, 3), -math.log(20))
    near = Transport(0.005, 500).plan(particles, even)
    diagonal = near.diagonal(dim1=1, dim2=2).sum(dim=1)
    assert (diagonal > 0.9).all()  # equal weights stay where they are


def moved(resampler: Transport) -> tuple[Tensor, Tensor]:
    """Deviations of log Z_hat and of its slope from the exact ones, with standard errors."""
    model, truth = LGSSM.scalar(), slope("transition_matrix")
    log_z = float(exact(model, series(1), torch.ones(1, 5, dtype=torch.bool)))
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        given = {"num_particles": 48, "criterion": "always", "resampler": resampler}
        value = particle_filter(model, Loose(model), series(40), **given).log_evidence.mean()
        (gradient,) = torch.autograd.grad(value, model.transition_matrix)
        found.append(torch.stack([value.detach() - log_z, gradient.squeeze() - truth]))
    drawn = torch.stack(found)
    return drawn.mean(dim=0), drawn.std(dim=0) / len(drawn) ** 0.5


def test_transport_is_right_where_it_is_sharp() -> None:
    """What is left of log Z_hat is due to 48 particles; a plain filter has as much."""
    (value, gradient), error = moved(Transport(0.01))
    print(f"log Z_hat {value:+.3f} ± {error[0]:.3f}, slope {gradient:+.3f} ± {error[1]:.3f}")
    assert abs(value) < 0.1
    assert abs(gradient) < 5 * error[1] < 0.1
    (value, gradient), error = moved(Transport(1.0, 30))
    print(f"blunt: {value:+.3f} ± {error[0]:.3f}, slope {gradient:+.3f} ± {error[1]:.3f}")
    assert gradient > 10 * error[1]


def test_refused() -> None:
    model = LGSSM.scalar()
    x = series(2)
    with pytest.raises(NotImplementedError, match="Transport averages particles"):
        FIVO(num_particles=2, resampler=Transport(), criterion="always")(model, Loose(model), x)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        Soft(0.0)
    with pytest.raises(ValueError, match="regularisation must be positive, got 0"):
        Transport(0.0)
    with pytest.raises(NotImplementedError, match="leave auxiliary out"):
        particle_filter(
            *(model, Loose(model), x),
            num_particles=2,
            resampler=Transport(),
            auxiliary=lambda state, x_t: torch.zeros(state[0].shape[:2]),
        )
