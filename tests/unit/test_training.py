"""``fit``: best parameters, files, clipping, schedules, seeds, and what stops a run."""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

from inference import (
    ELBO,
    FIVO,
    IWAE,
    Adversarial,
    Checkpointing,
    Clock,
    DegenerateWeightsError,
    NonFiniteLossError,
    Ramp,
    Records,
    Validation,
    fit,
    iwae,
    seeded,
)
from pyro_avrnn import recipes
from pyro_avrnn.recipes import Recipe
from tests.unit.table import parameters, prefix_mask

EVERY = Records(every=1)
LENGTHS = (4, 2, 3)
X_DIM, Z_DIM, H_DIM = 3, 2, 5


def pair(seed: int = 1) -> Recipe:
    with seeded(seed):
        return recipes.vrnn(X_DIM, Z_DIM, H_DIM)


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(len(LENGTHS), max(LENGTHS), X_DIM, generator=torch.Generator().manual_seed(2))
    return x, prefix_mask(LENGTHS)


def svi_of(recipe: Recipe, loss: Any = None, lr: float = 1e-2) -> SVI:
    optim = pyro.optim.Adam({"lr": lr})
    return SVI(recipe.model, recipe.guide, optim, ELBO() if loss is None else loss)


def train(recipe: Recipe, loss: Any = None, **options: Any) -> Any:
    svi = options.pop("svi", None) or svi_of(recipe, loss)
    options = {"steps": 6, "progress": False, "seed": 0} | options
    return fit(svi, options.pop("batches", [batch()]), **options)


def copied(recipe: Recipe) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters(recipe).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Peaked:
    """A validation function with a known best call, which records the parameters it saw."""

    def __init__(self, recipe: Recipe, bounds: list[float]) -> None:
        self.recipe, self.bounds = recipe, bounds
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self) -> float:
        self.seen.append(copied(self.recipe))
        return self.bounds[len(self.seen) - 1]


def test_the_best_parameters_are_in_place_afterwards() -> None:
    recipe = pair()
    peak = Peaked(recipe, [0.0, 2.0, 1.0, -math.inf])
    history = train(recipe, steps=8, validation=Validation(peak, every=2))
    assert (history.best_step, history.best_bound, history.steps) == (4, 2.0, 8)
    assert history.stopped == "all steps done"
    assert same(copied(recipe), peak.seen[1]) and not same(peak.seen[1], peak.seen[3])


def test_without_validation_the_last_parameters_stay() -> None:
    recipe, seen = pair(), []
    history = train(recipe, hooks=[lambda *_: seen.append(copied(recipe)) or {}])
    assert same(copied(recipe), seen[-1]) and not same(seen[0], seen[-1])
    assert (history.best_step, history.best_bound) == (0, -math.inf)


@pytest.mark.parametrize("seed", [0, 5, None])
def test_a_validation_batch_is_scored_by_iwae_with_the_same_draws_every_time(
    seed: int | None,
) -> None:
    recipe = pair()
    x, mask = batch()
    # a learning rate of 0: the bound must not move
    svi = svi_of(recipe, lr=0.0)
    validation = Validation((x, mask), 2, num_particles=7)
    history = train(recipe, svi=svi, validation=validation, seed=seed)
    with seeded(seed or 0), torch.no_grad():
        weight = recipe.model.rollout(recipe.guide, x, mask, num_particles=7).log_weight
    expected = float(iwae(weight).sum()) / sum(LENGTHS)
    bounds = [row["validation_bound"] for row in history.rows if "validation_bound" in row]
    assert bounds == [pytest.approx(expected, rel=1e-10)] * 3


@pytest.mark.parametrize(("bounds", "steps"), [([1.0, 0.0, 0.0, 2.0], 3), ([0, 1, 2, 3, 4, 5], 6)])
def test_patience_counts_validations_without_a_better_one(bounds: list[float], steps: int) -> None:
    recipe = pair()
    history = train(recipe, validation=Validation(Peaked(recipe, bounds), every=1, patience=2))
    assert history.steps == steps
    assert ("no better bound in 2 validations" == history.stopped) == (steps < 6)


def test_metrics_hold_every_term_and_go_to_a_csv_file(tmp_path: Path) -> None:
    recipe = pair()
    history = train(
        recipe,
        ELBO(kl_weight=Ramp(0, 1)),
        hooks=[lambda *_: {"extra": 3.0}],
        validation=Validation(batch(), every=3),
        records=Records(tmp_path / "metrics.csv", every=2),
    )
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 6]
    parts = ("guide", "prior", "decoder", "cell", "encode_x", "encode_z")
    wanted = {"step", "loss", "elbo", "kl", "kl_weight", "reconstruction", "gradient_norm"}
    wanted |= {f"gradient_norm_{part}" for part in parts} | {"clipped_share"}
    assert wanted | {"extra", "validation_bound"} == set(rows[0])
    for written, row in zip(rows, history.rows, strict=True):
        assert {k: float(v) for k, v in written.items() if v} == {
            k: float(v) for k, v in row.items()
        }
        weighted = row["reconstruction"] - row["kl_weight"] * row["kl"]
        assert row["loss"] == pytest.approx(-weighted, rel=1e-10)  # nats a frame
        assert row["elbo"] == pytest.approx(row["reconstruction"] - row["kl"], rel=1e-10)
    assert [row["kl_weight"] for row in history.rows] == pytest.approx(
        [i / 6 for i in (0, 1, 2, 3, 5)]
    )
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_each_improvement_is_told_with_the_best_parameters_in_place(tmp_path: Path) -> None:
    recipe, path, calls = pair(), tmp_path / "best.pt", []

    def on_best() -> None:
        calls.append(copied(recipe))
        recipes.save(recipe, path)

    peak = Peaked(recipe, [0.0, 2.0, 1.0, -math.inf])
    train(recipe, steps=8, validation=Validation(peak, every=2, on_best=on_best))
    assert len(calls) == 2 and same(calls[1], copied(recipe)) and not same(*calls)
    assert same(copied(recipes.load(path)), copied(recipe))


class Watched(pyro.optim.PyroOptim):
    """Plain SGD that records every gradient and learning rate it is given."""

    def __init__(self, lr: float) -> None:
        super().__init__(torch.optim.SGD, {"lr": lr})
        self.norms: list[float] = []
        self.rates: list[float] = []

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        squares = [p.grad.square().sum().item() for p in params if p.grad is not None]
        super().__call__(params, *args, **kwargs)
        if squares:
            self.norms.append(math.sqrt(sum(squares)))
            self.rates += {g["lr"] for p in params for g in self.optim_objs[p].param_groups}


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 1e6])
def test_clip_norm_bounds_the_gradient_a_frame_that_reaches_the_optimiser(
    clip_norm: float | None,
) -> None:
    recipe, optim = pair(), Watched(1e-3)
    svi = SVI(recipe.model, recipe.guide, optim, ELBO())
    history = train(recipe, svi=svi, clip_norm=clip_norm, records=EVERY)
    frames = sum(LENGTHS)
    reported = [row["gradient_norm"] for row in history.rows]  # before clipping
    bound = math.inf if clip_norm is None else clip_norm
    assert all(norm > 1e-3 for norm in reported)
    expected = [min(norm, bound) for norm in reported]
    assert [norm / frames for norm in optim.norms] == pytest.approx(expected, rel=1e-10)


def test_x_alone_is_counted_in_frames_as_with_a_mask() -> None:
    x, found = batch()[0], []
    for data in ((x, torch.ones(x.shape[:2], dtype=torch.bool)), (x, None), x):
        pyro.clear_param_store()
        history = train(pair(), batches=[data], steps=1)
        found.append([history.rows[0][name] for name in ("loss", "gradient_norm", "elbo")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (lambda at: 1.0 - at, [1.0, 0.75, 0.5, 0.25]),
        (lambda at: min(0.5 + at, 1.0), [0.5, 0.75, 1.0, 1.0]),  # a warm-up, then constant
        (lambda at: 0.1, [0.1] * 4),
        (None, [1.0] * 4),
    ],
    ids=["decay", "warm-up", "constant", "none"],
)
def test_lr_schedule_is_a_factor_on_the_learning_rate_of_every_step(
    schedule: Callable[[float], float] | None, factors: list[float]
) -> None:
    recipe, optim = pair(), Watched(1e-3)
    svi = SVI(recipe.model, recipe.guide, optim, ELBO())
    train(recipe, svi=svi, lr_schedule=schedule, steps=4)
    assert optim.rates == pytest.approx([1e-3 * factor for factor in factors], rel=1e-12)


def test_a_pyro_lr_scheduler_is_stepped_once_an_svi_step() -> None:
    recipe = pair()
    arguments = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, "gamma": 0.5}
    svi = SVI(recipe.model, recipe.guide, pyro.optim.ExponentialLR(arguments), ELBO())
    train(recipe, svi=svi, steps=3)
    schedulers = svi.optim.optim_objs.values()
    assert {s.get_last_lr()[0] for s in schedulers} == {1e-3 * 0.5**3}
    with pytest.raises(ValueError, match="PyroLRScheduler would both set the learning rate"):
        train(recipe, svi=svi, steps=3, lr_schedule=lambda at: 1.0)


def test_weight_decay_is_the_optimisers() -> None:
    found = []
    for decay in (0.0, 0.5):
        pyro.clear_param_store()
        recipe = pair()
        optim = pyro.optim.AdamW({"lr": 1e-2, "weight_decay": decay})
        before = copied(recipe)
        train(recipe, svi=SVI(recipe.model, recipe.guide, optim, ELBO()), steps=1)
        found.append(copied(recipe))
    for name, plain in found[0].items():  # AdamW's first step: p (1 - lr * decay) - lr * update
        expected = plain - 1e-2 * 0.5 * before[name]
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-14)


def test_modules_to_keep_go_back_to_the_best_step_too() -> None:
    recipe = recipes.avrnn(X_DIM, Z_DIM, H_DIM, critic="feedforward", critic_dim=4)
    critic: Any = recipe.critic
    adversarial = Adversarial(critic)
    seen: list[dict[str, Tensor]] = []

    def validate() -> float:
        seen.append({k: v.clone() for k, v in critic.state_dict().items()})
        return 1.0 if len(seen) == 2 else 0.0

    train(
        recipe,
        ELBO(penalties=[adversarial]),
        hooks=[adversarial.update],
        validation=Validation(validate, every=1),
        keep=[critic],
    )
    assert same(critic.state_dict(), seen[1]) and not same(seen[1], seen[-1])


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
def test_a_seed_gives_the_same_run_bit_for_bit_and_leaves_the_global_generator_alone(
    clip_norm: float | None,
) -> None:
    found = []
    for other_seed in (11, 12):
        pyro.clear_param_store()
        recipe = pair()
        torch.manual_seed(other_seed)
        before = torch.get_rng_state()
        history = train(recipe, seed=5, clip_norm=clip_norm, validation=batch(), records=EVERY)
        assert torch.equal(torch.get_rng_state(), before)
        found.append((copied(recipe), history.rows))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    pyro.clear_param_store()
    recipe = pair()
    history = train(recipe, seed=6, clip_norm=clip_norm, validation=batch(), records=EVERY)
    assert history.rows != found[0][1]  # the twin: another seed is another run


def test_without_a_seed_the_global_generator_decides() -> None:
    found = []
    for seed in (3, 3, 4):
        pyro.clear_param_store()
        recipe = pair()
        torch.manual_seed(seed)
        train(recipe, seed=None)
        found.append(copied(recipe))
    assert same(found[0], found[1]) and not same(found[0], found[2])


def test_a_ramp_is_linear_and_then_constant() -> None:
    ramp = Ramp(2.0, 4.0, over=0.5)
    assert [ramp(at) for at in (0.0, 0.25, 0.5, 0.75, 1.0)] == [2.0, 3.0, 4.0, 4.0, 4.0]
    for over in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"over must be a fraction of the run in \(0, 1\]"):
            Ramp(0.0, 1.0, over=over)


def test_a_schedule_needs_the_length_of_the_run() -> None:
    recipe = pair()
    with pytest.raises(ValueError, match="whose length is not known; train with fit"):
        ELBO(kl_weight=Ramp(0, 1))(recipe.model, recipe.guide, *batch())
    assert Clock().weight(0.5) == 0.5  # a number needs no run
    clock = Clock(total=4, calls=9)
    assert clock.weight(Ramp(0, 1)) == 1.0  # a longer run than announced stays at the end


def test_only_calls_with_gradients_advance_the_clock() -> None:
    recipe = pair()
    loss = ELBO(kl_weight=Ramp(0, 1), clock=Clock(total=4))
    weights = []
    for gradients in (True, False, False, True, True):
        with torch.set_grad_enabled(gradients):
            loss(recipe.model, recipe.guide, *batch())
        weights.append(loss.terms["kl_weight"])
    assert weights == [0.0, 0.25, 0.25, 0.25, 0.5] and loss.clock.calls == 3


def test_fit_tells_the_clock_the_length_of_the_run_and_does_not_overwrite_it() -> None:
    for given, expected in ((None, 6), (100, 100)):
        pyro.clear_param_store()
        loss = ELBO(kl_weight=Ramp(0, 1), clock=Clock(total=given))
        train(pair(), loss, validation=Validation(batch(), every=1))
        assert (loss.clock.total, loss.clock.calls) == (expected, 6)


class BreaksAt:
    """An ELBO whose loss or gradient stops being finite at a step."""

    def __init__(self, step: int, fault: str) -> None:
        self.step, self.fault, self.elbo = step, fault, ELBO()
        self.terms: dict[str, Any] = {}

    def __call__(self, model: Any, guide: Any, *args: Any) -> Tensor:
        loss = self.elbo(model, guide, *args)
        self.terms = dict(self.elbo.terms)
        if self.elbo.clock.calls < self.step:
            return loss
        if self.fault == "kl":
            self.terms["kl"] = torch.tensor(math.inf)
        if self.fault == "loss":
            return loss * math.nan
        if self.fault == "the gradient":  # the value stays, the gradient is infinite
            zero = loss * 0.0
            return loss + zero.abs().sqrt()
        return loss


@pytest.mark.parametrize("fault", ["kl", "loss", "the gradient"])
def test_a_loss_that_is_not_finite_names_step_and_term_and_keeps_what_was_before(
    tmp_path: Path, fault: str
) -> None:
    recipe, seen = pair(), []
    with pytest.raises(NonFiniteLossError, match=rf"at step 4: {fault} is (nan|inf)"):
        train(
            recipe,
            BreaksAt(4, fault),
            hooks=[lambda *_: seen.append(copied(recipe)) or {}],
            records=Records(tmp_path / "metrics.csv"),
        )
    assert len(seen) == 3 and same(copied(recipe), seen[-1])
    assert "gradient_norm" in (tmp_path / "metrics.csv").read_text()


@pytest.mark.parametrize("loss", [ELBO, IWAE, FIVO])
def test_weights_that_fail_inside_a_training_name_step_and_sequence(loss: type) -> None:
    recipe, seen = pair(), []
    x, mask = batch()
    far = x.clone()
    far[2, 1] = 1e200  # its density is 0 in floating point numbers, under any draw
    far[1, 2:] = 1e200  # padding
    with pytest.raises(NonFiniteLossError) as error:
        train(
            recipe,
            loss(),
            batches=[(x, mask), (x, mask), (far, mask)],
            hooks=[lambda *_: seen.append(copied(recipe)) or {}],
        )
    said = str(error.value)
    assert said.startswith(
        "training stopped at step 3: the particles' weights at step 2 of sequence 2 (counted "
    )
    assert "the best parameters before it are kept" in said and "\n" not in said
    cause = error.value.__cause__
    assert isinstance(cause, DegenerateWeightsError) and (cause.step, cause.sequence) == (2, 2)
    assert len(seen) == 2 and same(copied(recipe), seen[-1])


def test_after_a_loss_that_is_not_finite_the_best_parameters_are_in_place() -> None:
    recipe = pair()
    peak = Peaked(recipe, [0.0, 1.0, 0.5])
    with pytest.raises(NonFiniteLossError):
        train(recipe, BreaksAt(4, "loss"), validation=Validation(peak, every=1))
    assert same(copied(recipe), peak.seen[1])


def test_a_hook_that_returns_nan_stops_the_run_and_is_named() -> None:
    recipe = pair()
    hook = iter([1.0, 1.0, math.nan])
    with pytest.raises(NonFiniteLossError, match="at step 3: critic_loss is nan after the hooks"):
        train(recipe, hooks=[lambda *_: {"critic_loss": next(hook)}])
    assert all(p.isfinite().all() for p in copied(recipe).values())


@pytest.mark.parametrize("prior_too", [True, False])
def test_parameters_that_a_hook_breaks_are_not_kept(prior_too: bool) -> None:
    recipe, critic, seen = pair(), nn.Linear(1, 1), []

    def hook(model: Any, guide: Any, *_: Any) -> dict[str, float]:
        seen.append(copied(recipe))
        if len(seen) < 3:
            return {}
        with torch.no_grad():
            for p in (*model.prior.parameters(), *critic.parameters())[0 if prior_too else -2 :]:
                p.fill_(math.nan)
        return {"critic_loss": math.nan}

    with pytest.raises(NonFiniteLossError, match="step 3"):
        train(recipe, hooks=[hook], keep=[critic])
    assert same(copied(recipe), seen[-1]) and critic.weight.isfinite().all()


def test_an_interrupt_keeps_files_and_best_parameters(tmp_path: Path) -> None:
    recipe, calls = pair(), []
    peak = Peaked(recipe, [1.0, 0.0, 0.0])

    def interrupting(*_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(
            recipe,
            hooks=[interrupting],
            validation=Validation(peak, every=1),
            records=Records(tmp_path / "metrics.csv"),
        )
    assert same(copied(recipe), peak.seen[0])
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("batches", [[], iter([])])
def test_batches_must_hold_one(batches: Any) -> None:
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        train(pair(), batches=batches)


def test_an_exhausted_iterator_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="be iterable again"):
        train(pair(), batches=iter([batch()] * 2), steps=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("truncate", 0),
        ("clip_norm", 0.0),
        ("clip_norm", -1.0),
        ("clip_norm", math.nan),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        train(pair(), **{name: value})


@pytest.mark.parametrize("name", ["every", "num_particles", "patience"])
def test_a_number_below_one_of_a_validation_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Validation(batch(), **{name: 0})


@pytest.mark.parametrize("kind", [Records, Checkpointing])
def test_records_and_checkpoints_are_a_step_apart_at_least(kind: Any) -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        kind("run.pt", every=0)


def test_batches_come_in_order_and_again_as_tuples_lists_or_tensors() -> None:
    seen: list[float] = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            x, mask = batch()
            return iter([(x, mask), [x + 1.0, mask], x + 2.0])

    def hook(model: Any, guide: Any, x: Tensor, *rest: Tensor) -> dict[str, float]:
        seen.append(round((x - batch()[0]).mean().item()))
        return {}

    train(pair(), batches=Loader(), hooks=[hook], steps=5)
    assert seen == [0, 1, 2, 0, 1]


def test_hooks_are_called_between_steps_in_order_with_the_steps_batch() -> None:
    recipe, calls = pair(), []
    x, mask = batch()
    start = copied(recipe)

    def hook(name: str) -> Callable[..., dict[str, float]]:
        def call(model: Any, guide: Any, *args: Any) -> dict[str, float]:
            moved = not same(copied(recipe), start)
            calls.append((name, moved, args[0] is x and args[1] is mask, model, guide))
            return {name: float(len(calls))}

        return call

    history = train(recipe, batches=[(x, mask)], hooks=[hook("a"), hook("b")], steps=2)
    assert [name for name, *_ in calls] == ["a", "b", "a", "b"]
    assert all(moved and given for _, moved, given, *_ in calls)
    assert all(m is recipe.model and g is recipe.guide for *_, m, g in calls)
    assert [(row["a"], row["b"]) for row in history.rows] == [(1.0, 2.0), (3.0, 4.0)]


def test_progress_may_be_a_function() -> None:
    done: list[int] = []
    train(pair(), progress=done.append)
    assert done == [1] * 6


def test_a_step_is_that_of_svi() -> None:
    found = []
    for ours in (True, False):
        pyro.clear_param_store()
        recipe = pair()
        svi = svi_of(recipe, Trace_ELBO())
        torch.manual_seed(4)
        if ours:
            train(recipe, svi=svi, seed=None, steps=3)
        else:
            losses = [svi.step(*batch()) for _ in range(3)]
            assert len(losses) == 3
        found.append(copied(recipe))
    assert same(*found)


# a plain Pyro pair: functions, pyro.param, no rollout, a constrained parameter


def plain_model(x: Tensor, mask: Tensor | None = None) -> None:
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("sequences", len(x), dim=-1):
        z = x.new_zeros(len(x), 1)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z, 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, scale).to_event(1), obs=x[:, t - 1])


def plain_guide(x: Tensor, mask: Tensor | None = None) -> None:
    gain = pyro.param("gain", torch.tensor(0.1))
    with pyro.plate("sequences", len(x), dim=-1):
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            pyro.sample(f"z_{t}", dist.Normal(gain * x[:, t - 1], 0.7).to_event(1))


@pytest.mark.parametrize("loss", [ELBO, Trace_ELBO])
def test_a_plain_pyro_pair_is_trained_and_validated(loss: type) -> None:
    x = 3.0 * torch.randn(8, 3, 1)
    svi = SVI(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.05}), loss())
    history = fit(
        svi,
        [x],
        steps=40,
        validation=Validation((x,), every=10),
        clip_norm=10.0,
        seed=0,
        progress=False,
    )
    bounds = [row["validation_bound"] for row in history.rows if "validation_bound" in row]
    assert history.best_bound == max(bounds) > bounds[0] - 1e-9 and history.best_step > 0
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_the_best_parameters_of_a_plain_pair_are_restored_too() -> None:
    x, seen = torch.randn(4, 3, 1), []

    def validate() -> float:
        seen.append(pyro.param("gain").item())
        return 1.0 if len(seen) == 2 else 0.0

    svi = SVI(plain_model, plain_guide, pyro.optim.Adam({"lr": 0.05}), ELBO())
    validation = Validation(validate, every=1)
    fit(svi, [x], steps=5, validation=validation, seed=0, progress=False)
    assert pyro.param("gain").item() == seen[1] != seen[-1]
