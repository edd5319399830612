import copy
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI

from inference import (
    ELBO,
    FIVO,
    IWAE,
    Adversarial,
    Checkpointing,
    Validation,
    evaluate,
    fit,
    gradient_penalty,
    particle_filter,
    to_arviz,
    wasserstein,
)
from pyro_avrnn import recipes
from pyro_avrnn.testing import check

MODELS = {
    "vae": {"prior": "mixture"},
    "storn": {},
    "vrnn": {"prior": "flow", "guide": "smoothing_flow"},
    "srnn": {"cell": "lstm"},
    "dmm": {},
    "dsae": {},
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.fast_path,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_rollout_on_the_gpu_equals_the_cpu_s(cell: str) -> None:
    here = recipes.vrnn(3, 2, 8, cell=cell, guide="residual")
    there = copy.deepcopy(here)
    there.model.cuda()
    there.guide.cuda()
    x, z = torch.randn(4, 6, 3), torch.randn(6, 5, 4, 2)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [5]])
    a = here.model.rollout(here.guide, x, mask, z=z).log_weight
    b = there.model.rollout(there.guide, x.cuda(), mask.cuda(), z=z.cuda()).log_weight
    torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("view", ["conditional", "trajectory"])
def test_adversarial_training_and_diagnostics_run_on_the_gpu(view: str) -> None:
    r = recipes.avrnn(3, 2, 8, view=view, critic="lstm", critic_dim=8)
    assert r.critic is not None
    for module in (r.model, r.guide, r.critic):
        module.cuda()
    adversarial = Adversarial(r.critic, divergence=wasserstein(gradient_penalty()))
    x = torch.randn(8, 5, 3, device="cuda")
    mask = torch.ones(8, 5, dtype=torch.bool, device="cuda")
    svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-3}), ELBO(penalties=[adversarial]))
    history = fit(
        svi,
        [(x, mask)],
        steps=4,
        hooks=[adversarial.update],
        validation=Validation((x, mask), every=2),
        seed=0,
        progress=False,
    )
    assert history.steps == 4
    found = evaluate(
        r.model, r.guide, x, mask, num_particles=25, adversarial=adversarial, train=(x, mask)
    )
    assert found.frames == 40
    assert to_arviz(r.model, r.guide, x[0], draws=10) is not None


@pytest.mark.parametrize("resampler", ["multinomial", "stratified", "systematic"])
@pytest.mark.parametrize("criterion", ["never", "always", "ess"])
def test_filters_and_their_bounds_run_on_the_gpu(resampler: str, criterion: str) -> None:
    r = recipes.vrnn(3, 2, 8)
    r.model.cuda()
    r.guide.cuda()
    x = torch.randn(4, 6, 3, device="cuda")
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).cuda()
    settings = {"num_particles": 8, "resampler": resampler, "criterion": criterion}
    torch.manual_seed(1)
    filtered = particle_filter(r.model, r.guide, x, mask, **settings)
    assert filtered.trajectories().is_cuda
    torch.manual_seed(1)
    loss = FIVO(**settings)(r.model, r.guide, x, mask)
    torch.testing.assert_close(-loss, filtered.log_evidence.sum(), rtol=1e-8, atol=1e-8)
    loss.backward()
    IWAE(num_particles=4, doubly_reparameterised=True)(r.model, r.guide, x, mask).backward()
    found = evaluate(r.model, r.guide, x, mask, num_particles=25, fivo_particles=25)
    assert found.fivo_per_frame is not None


@pytest.mark.parametrize("name", MODELS)
def test_models_and_guides_keep_the_contract_on_the_gpu(name: str) -> None:
    r = recipes.RECIPES[name](3, 2, 8, **MODELS[name])
    check(r.model.cuda(), r.guide.cuda(), torch.randn(2, 4, 3, device="cuda"))


def test_speech_on_levels_runs_on_the_gpu() -> None:
    here = recipes.vrnn(4, 2, 8, "logistic", emission_options={"bits": 8})
    there = copy.deepcopy(here)
    there.model.cuda()
    there.guide.cuda()
    x = (2 * torch.randint(0, 256, (3, 5, 4)) + 1) / 256 - 1
    z = torch.randn(5, 2, 3, 2)
    a = here.model.rollout(here.guide, x, z=z).log_weight
    b = there.model.rollout(there.guide, x.cuda(), z=z.cuda()).log_weight
    torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-9)
    b.sum().backward()


def test_a_run_with_an_average_goes_on_on_the_gpu(tmp_path: Path) -> None:
    """Its file is read onto the CPU."""

    def run(steps_done: int | None, resume: bool = False) -> list[dict[str, float]]:
        def progress(done: int) -> None:
            if len(counted.append(done) or counted) == steps_done:
                raise KeyboardInterrupt

        pyro.clear_param_store()
        torch.manual_seed(0)
        counted, r = list[int](), recipes.vrnn(3, 2, 8)
        r.model.cuda()
        r.guide.cuda()
        x = torch.randn(4, 5, 3).cuda()
        svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-3}), ELBO())
        saved = Checkpointing(tmp_path / f"{steps_done or resume}.pt", every=1, resume=resume)
        given = {"average": 0.9, "checkpoint": saved, "progress": progress, "seed": 0}
        return fit(svi, [(x,)], steps=4, validation=Validation((x,), every=1), **given).rows

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(2)
    (tmp_path / "2.pt").rename(tmp_path / "True.pt")
    bounds = [row["validation_bound"] for row in run(None, resume=True)]
    assert bounds == pytest.approx([row["validation_bound"] for row in whole], rel=1e-9)
