"""What users do at the edges: programs of other shapes, files in other places, numbers in between.

Each was wrong once, in silence or with an error from below.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor, nn

from inference import (
    ELBO,
    FIVO,
    Adversarial,
    Checkpointing,
    Validation,
    calibrate,
    evaluate,
    fit,
    particle_filter,
    rate_split,
    seeded,
    sequence_codes,
    to_arviz,
)
from inference.calibration import _simulate
from inference.files import atomically, write_text
from inference.particles import Bootstrap
from pyro_avrnn import recipes
from pyro_avrnn.cli.folder import emptied, owned
from pyro_avrnn.data.dataset import standardise
from pyro_avrnn.data.sequences import Sequences
from tests.unit.table import prefix_mask

X, Z, H = 2, 2, 5


def library() -> recipes.Recipe:
    with seeded(3):
        return recipes.vrnn(X, Z, H)


def pair() -> tuple[Any, Any]:
    r = library()
    return r.model, r.guide


def svi(loss: Any, model: Any, guide: Any) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)


# ---- losses ----


def test_a_score_function_s_second_filter_is_of_its_own_batch() -> None:
    r = library()
    loss = FIVO(num_particles=3, resampler="multinomial", criterion="always", score_function=True)
    steps = svi(loss, r.model, r.guide)
    steps.step(torch.randn(4, 6, X))
    other = torch.randn(3, 5, X)
    with seeded(0):
        after = steps.evaluate_loss(other)
    with seeded(0), torch.no_grad():
        fresh = FIVO(num_particles=3, resampler="multinomial", criterion="always")
        assert after == pytest.approx(float(fresh(r.model, r.guide, other)))


def test_programs_that_close_over_their_data_are_trained() -> None:
    x = torch.randn(6)

    def model() -> None:
        with pyro.plate("sequences", 6, dim=-1):
            z = pyro.sample("z_1", dist.Normal(0.0, 1.0))
            pyro.sample("x_1", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(6))
        with pyro.plate("sequences", 6, dim=-1):
            pyro.sample("z_1", dist.Normal(loc, 1.0))

    steps = svi(ELBO(), model, guide)
    losses = [steps.step() for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20]) and isinstance(steps.evaluate_loss(), float)


def test_a_block_which_changes_no_density_does_not_stop_a_filter() -> None:
    r, x = library(), torch.randn(2, 4, X)
    loss = FIVO(num_particles=3)
    with seeded(0), torch.no_grad():
        plain = loss(r.model, r.guide, x)
    with seeded(0), torch.no_grad(), poutine.block():
        assert loss(r.model, r.guide, x) == plain


def test_a_scale_of_its_own_for_each_sequence_is_refused_in_a_sentence() -> None:
    r, x = library(), torch.randn(2, 4, X)
    scale = poutine.scale(scale=torch.tensor([1.0, 2.0]))
    with pytest.raises(NotImplementedError, match=r"different scales \(1.0, 2.0\)"):
        ELBO()(scale(r.model), scale(r.guide), x)


# ---- programs ----


def test_simulations_are_scored_without_the_scale_of_a_loss() -> None:
    r, mask = library(), torch.ones(3, 4, dtype=torch.bool)
    with seeded(0):
        x, z, joint = _simulate(r.model, mask)
    with seeded(0):
        other = _simulate(poutine.scale(r.model, 0.5), mask)
    assert torch.equal(other[0], x) and torch.equal(other[1], z)
    torch.testing.assert_close(other[2], joint)
    d = r.model.rollout(r.guide, x, z=z)  # independently
    torch.testing.assert_close(joint, (d.log_prior + d.log_emission).sum(dim=0))


def test_a_guide_that_is_no_module_is_served_everywhere() -> None:
    r, x = library(), torch.randn(2, 4, X)

    class Plain:
        encode, proposal = staticmethod(r.guide.encode), staticmethod(r.guide.proposal)

    guide: Any = Plain()
    assert (
        evaluate(r.model, guide, x).iwae_per_frame == evaluate(r.model, r.guide, x).iwae_per_frame
    )
    particle_filter(r.model, guide, x, num_particles=2)


def test_the_bootstrap_filter_reads_nothing_and_so_goes_on_with_any_model() -> None:
    r = recipes.srnn(X, Z, H)
    x, mask = torch.randn(3, 6, X), prefix_mask((6, 4, 6))
    loss = FIVO(num_particles=4)
    history = fit(
        svi(loss, r.model, Bootstrap(r.model)),
        [(x, mask)],
        steps=2,
        truncate=3,
        progress=False,
        seed=0,
    )
    assert history.steps == 2


def test_padding_of_a_program_stays_in_the_support_of_its_data() -> None:
    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(x.shape[1]):
                with poutine.mask(mask=mask[:, t]):
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(0.0, 1.0))
                    pyro.sample(f"x_{t + 1}", dist.LogNormal(z, 1.0), obs=x[:, t, 0])

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("sequences", len(x), dim=-1):
            for t in range(x.shape[1]):
                with poutine.mask(mask=mask[:, t]):
                    pyro.sample(f"z_{t + 1}", dist.Normal(x[:, t, 0].log(), 0.7))

    mask = prefix_mask((3, 1))
    x = torch.where(mask[..., None], torch.rand(2, 3, 1) + 0.5, 1.0)
    found = evaluate(model, guide, x, mask, num_particles=2)
    assert found.frames == 4 and np.isfinite(found.elbo_per_frame)
    assert sequence_codes(model, guide, x, mask).z.isfinite().all()


# ---- training ----


def test_a_scheduler_made_by_a_function_is_taken() -> None:
    r = library()
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}
    optim = pyro.optim.PyroLRScheduler(decay, arguments)
    steps = SVI(r.model, r.guide, optim, ELBO())
    assert fit(steps, [(torch.randn(2, 3, X), None)], steps=2, progress=False).steps == 2


def test_a_hook_of_ones_own_may_hold_the_critic_under_any_name() -> None:
    with seeded(0):
        r = recipes.avrnn(X, Z, H)
    adversarial = Adversarial(r.critic)

    class Mine:
        def __init__(self) -> None:
            self.critic_of_mine = adversarial

        def hook(self, *args: Any) -> dict[str, float]:
            return self.critic_of_mine.update(*args)

    steps = svi(ELBO(penalties=[adversarial]), r.model, r.guide)
    batches = [(torch.randn(2, 3, X), None)]
    assert fit(steps, batches, steps=1, hooks=[Mine().hook], progress=False).steps == 1


def test_a_buffer_that_is_new_since_the_best_step_stays() -> None:
    r = library()
    bounds = iter((1.0, 0.0))

    def bound() -> float:
        value = next(bounds)
        if value == 0.0:
            r.model.late = nn.Buffer(torch.ones(1))
        return value

    steps = svi(ELBO(), r.model, r.guide)
    batches = [(torch.randn(2, 3, X), None)]
    assert (
        fit(
            steps, batches, steps=2, validation=Validation(bound, every=1), progress=False
        ).best_step
        == 1
    )
    assert bool(r.model.late == 1.0)


def test_batches_whose_epoch_never_moves_are_found_again(tmp_path: Path) -> None:
    x = torch.randn(4, 3, X)

    class Fixed:
        epoch = 0

        def __iter__(self) -> Iterator[tuple[Tensor, None]]:
            order = np.random.default_rng(self.epoch).permutation(4)
            return ((x[[i]], None) for i in order)

    def run(steps: int, **options: Any) -> dict[str, Tensor]:
        pyro.clear_param_store()
        r = library()
        fit(
            svi(ELBO(), r.model, r.guide),
            Fixed(),
            steps=6,
            seed=0,
            progress=interrupt(steps),
            **options,
        )
        return {k: p.detach().clone() for k, p in r.model.named_parameters()}

    def interrupt(at: int) -> Callable[[int], None]:
        done: list[int] = []

        def progress(steps: int) -> None:
            done.append(steps)
            if sum(done) == at:
                raise KeyboardInterrupt

        return progress

    whole = run(99)
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(5, checkpoint=Checkpointing(path, every=1))
    again = run(99, checkpoint=Checkpointing(path, every=1, resume=True))
    assert all(torch.equal(again[k], p) for k, p in whole.items())


# ---- numbers and data ----


def test_a_large_offset_of_double_precision_is_no_constant() -> None:
    generator = np.random.default_rng(0)
    raw = 1e8 + generator.uniform(0.0, 40.0, size=(3, 50, 1))
    parts = [Sequences.from_list([part], dtype=torch.float64) for part in raw]
    train, _, _, mean, std = standardise(*parts, resolution=float(np.finfo(np.float64).eps))
    assert float(std) == pytest.approx(raw[0].std()) and float(train.x.abs().max()) < 2.0
    near = np.full((3, 50, 1), 0.3)
    near[:, ::2] = 0.1 + 0.2
    parts = [Sequences.from_list([part], dtype=torch.float64) for part in near]
    train, _, _, mean, std = standardise(*parts, resolution=float(np.finfo(np.float64).eps))
    assert float(std) == 1.0 and not train.x.any()  # zero, not round-off


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Adversarial(recipes.avrnn(X, Z, H).critic, critic_steps=1.5), "critic_steps"),
        (lambda: calibrate(*pair(), torch.ones(1, 2).bool(), num_bins=2.5), "num_bins"),
        (lambda: recipes.vrnn(3.5, Z, H), "x_dim"),  # type: ignore[arg-type]
        (lambda: recipes.vrnn(X, "2", H), "z_dim"),  # type: ignore[arg-type]
        (lambda: split(steps=2.5), "steps"),
        (lambda: split(width=0), "width"),
        (lambda: split(bound=float("nan")), "bound"),
        (lambda: to_arviz(library().model, library().guide, np.zeros((3, X))), "x must"),
        (lambda: to_arviz(library().model, library().guide, torch.ones(3, X), draws=1.5), "draws"),
    ],
)
def test_numbers_in_between_are_refused_at_the_door(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{message}"):
        call()


def split(**options: Any) -> Any:
    r, x = library(), torch.ones(6, 4, X).cumsum(dim=1)
    return rate_split(r.model, r.guide, (x, None), (x, None), **{"steps": 2} | options)


def test_the_rate_split_takes_data_without_a_mask_and_refuses_a_program_without_a_state() -> None:
    r, x = library(), torch.ones(6, 4, X).cumsum(dim=1)
    whole = torch.ones(6, 4, dtype=torch.bool)
    assert split() == rate_split(r.model, r.guide, (x, whole), (x, whole), steps=2)
    evaluate(r.model, r.guide, x, train=(x, None))
    with poutine.scale(scale=0.5), pytest.raises(NotImplementedError, match="rate_split needs"):
        rate_split(r.model, r.guide, (x, whole), (x, whole))


# ---- files ----


def test_errors_that_are_not_the_disks_keep_their_kind(tmp_path: Path) -> None:
    def endless(path: Path) -> None:
        endless(path)

    with pytest.raises(RecursionError, match="recursion"):
        atomically(tmp_path / "a", endless)
    with pytest.raises(FileNotFoundError, match="cannot be written") as raised:
        write_text(tmp_path / "none" / "a", "")
    assert raised.value.errno == 2 and "\n" not in str(raised.value)
    write_text(tmp_path / "file", "")
    with pytest.raises(NotADirectoryError, match="cannot be written"):
        write_text(tmp_path / "file" / "a", "")


def test_starting_anew_removes_what_a_comparison_wrote_and_nothing_else(tmp_path: Path) -> None:
    rows = tmp_path / "rows" / "elbo-seed0"
    rows.mkdir(parents=True)
    for name in ("results.json", "rate.png", "holiday.png", "table.md"):
        (tmp_path / name).write_text("[]")
    (rows / "checkpoint.pt").write_text("")
    (rows / ".checkpoint.pt.123.tmp").write_text("")
    with owned(tmp_path):
        assert emptied(tmp_path, overwrite=True) == []
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"holiday.png", "results.previous.json", ".lock"}
