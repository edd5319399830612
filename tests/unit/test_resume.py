"""Resuming: a run that was interrupted ends as one that was not, bit for bit."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader

from inference import (
    ELBO,
    AdaptiveClip,
    Adversarial,
    Alternating,
    Checkpointing,
    DegenerateWeightsError,
    LearningRate,
    NonFiniteLossError,
    Ramp,
    Records,
    Validation,
    fit,
    seeded,
    spectral,
    wasserstein,
)
from inference.training import History
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, Sequences
from tests.unit.table import prefix_mask

X_DIM, Z_DIM, H_DIM, STEPS = 2, 2, 3, 9
LENGTHS = (3, 1, 2, 3, 2, 1, 3)  # 7 sequences, so 4 batches of 2 in a pass
ADAM = {"lr": 1e-2}


class Run(NamedTuple):
    """A training as a new process would set it up."""

    svi: SVI
    batches: Any
    options: dict[str, Any]


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(len(LENGTHS), 3, X_DIM, generator=torch.Generator().manual_seed(2))
    return x, prefix_mask(LENGTHS)


def sequences() -> Batches:
    x, mask = data()
    names = tuple(map(str, LENGTHS))
    return Batches(Sequences(x * mask[..., None], mask, names), batch_size=2, bucket=True)


RECORDS = Records(every=1)


def scheduled_vrnn() -> Run:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM)
    optim = pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.1})
    loss = ELBO(kl_weight=Ramp(0, 1), num_particles=2)
    options = {
        "lr_schedule": Ramp(1.0, 0.1),
        "clip_norm": 1.0,
        "validation": Validation(data(), every=3),
    }
    return Run(SVI(recipe.model, recipe.guide, optim, loss), sequences(), options)


def shifted(piece: Tensor, generator: torch.Generator) -> Tensor:
    return piece + torch.randn((), generator=generator)


def well_trained_vrnn() -> Run:
    """With all that keeps a training going: it has 16 steps, as the first ten are not clipped."""
    recipe, (x, mask) = recipes.vrnn(X_DIM, Z_DIM, H_DIM), data()
    sequences = Sequences(x * mask[..., None], mask, tuple(map(str, LENGTHS)))
    options = {
        "steps": 16,
        "clip_norm": AdaptiveClip(1.0, window=10),
        "average": 0.7,
        "lr_schedule": LearningRate("cosine", warmup=0.2),
        "validation": Validation(data(), every=3),
    }
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), ELBO(kl_weight=Ramp(0, 1)))
    return Run(svi, Batches(sequences, batch_size=4, window=2, augment=shifted), options)


def stepped_vrnn(kind: str = "ExponentialLR", **arguments: Any) -> Run:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM)
    arguments = arguments or {"gamma": 0.7}
    optim = getattr(pyro.optim, kind)(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, **arguments}
    )
    loss = Trace_ELBO()
    return Run(
        SVI(recipe.model, recipe.guide, optim, loss),
        sequences(),
        {"validation": Validation(data(), every=3)},
    )


def milestones_vrnn() -> Run:
    return stepped_vrnn("MultiStepLR", milestones=[2, 4, 5, 7], gamma=0.5)


def adversary(critic_dim: int = 4) -> tuple[Any, Adversarial]:
    recipe = recipes.avrnn(
        X_DIM, Z_DIM, H_DIM, critic="feedforward", critic_dim=critic_dim, lipschitz="all"
    )
    assert recipe.critic is not None
    adversarial = Adversarial(recipe.critic, divergence=wasserstein(spectral()), weight=Ramp(0, 1))
    return recipe, adversarial


def critic_between_steps(critic_dim: int = 4) -> Run:
    recipe, adversarial = adversary(critic_dim)
    loss = ELBO(penalties=[adversarial])
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)
    options = {
        "hooks": [adversarial.update],
        "keep": [recipe.critic],
        "validation": Validation(data(), every=3),
    }
    return Run(svi, sequences(), options)


def alternating() -> Run:
    recipe, adversarial = adversary()
    hook = Alternating(
        adversarial, recipe.model.prior.parameters(), recipe.guide.parameters(), lr=1e-3
    )
    loss = ELBO(kl_weight=0.0)
    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)
    options = {
        "hooks": [hook.update],
        "keep": [recipe.critic],
        "validation": Validation(data(), every=3),
    }
    return Run(svi, sequences(), options)


def plain_model(x: Tensor, mask: Tensor | None = None) -> None:
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("sequences", len(x), dim=-1):
        z = x.new_zeros(len(x), 1)
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.5 * z, 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z, scale).to_event(1), obs=x[:, t - 1, :1])


def plain_guide(x: Tensor, mask: Tensor | None = None) -> None:
    gain = pyro.param("gain", lambda: torch.rand(()))  # drawn at the first call alone
    width = pyro.param("width", torch.tensor(0.7), constraint=constraints.interval(0.1, 2.0))
    with pyro.plate("sequences", len(x), dim=-1):
        for t in pyro.markov(range(1, x.shape[1] + 1)):
            loc = gain * x[:, t - 1, :1]
            pyro.sample(f"z_{t}", dist.Normal(loc, width).to_event(1))


def plain_functions() -> Run:
    x, _ = data()
    svi = SVI(plain_model, plain_guide, pyro.optim.Adam(ADAM), Trace_ELBO())
    loader = DataLoader(x, batch_size=2, shuffle=True)  # in an order from the global generator
    return Run(svi, loader, {"validation": Validation((x,), every=3, num_particles=4)})


def without_seed() -> Run:
    run = plain_functions()
    return run._replace(options=run.options | {"seed": None})


class Net(nn.Module):
    """A common shape of Pyro code: model and guide are methods, with running averages inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(X_DIM, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
        self.head = nn.Linear(3, 1)

    def model(self, x: Tensor) -> None:
        pyro.module("net", self)
        with pyro.plate("sequences", len(x), dim=-1):
            z = pyro.sample("z_1", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x_1", dist.Normal(z, 1.0).to_event(1), obs=x[:, 0, :1])

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self)
        loc = self.head(self.encoder(x[:, 0]))
        with pyro.plate("sequences", len(x), dim=-1):
            pyro.sample("z_1", dist.Normal(loc, 0.5).to_event(1))


def buffers() -> Run:
    net, (x, _) = Net(), data()
    svi = SVI(net.model, net.guide, pyro.optim.Adam(ADAM), Trace_ELBO())
    return Run(svi, [x[:4], x[4:]], {})


class Features(nn.Module):
    """Features through batch normalisation, in a model that is a module itself."""

    in_dim, out_dim = X_DIM, H_DIM

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(X_DIM, H_DIM), nn.BatchNorm1d(H_DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.norm(h.reshape(-1, H_DIM)).reshape(h.shape)


def averages() -> Run:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM)
    recipe.model.encode_x = features = Features()

    def bound() -> float:  # the first validation, at step 3, is the best
        return -float(features.norm.num_batches_tracked)

    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), ELBO())
    x, mask = data()
    batches = [(x[:4], mask[:4]), (x[4:], mask[4:])]
    return Run(svi, batches, {"validation": Validation(bound, every=3)})


def seldom_model(x: Tensor) -> None:
    loc = pyro.param("seldom", torch.tensor(0.3)) if x.shape[1] == 3 else 0.0
    with pyro.plate("sequences", len(x), dim=-1):
        z = pyro.sample("z_1", dist.Normal(0.0, 1.0))
        pyro.sample("x_1", dist.Normal(z + loc, 1.0), obs=x[:, 0, 0])


def seldom_guide(x: Tensor) -> None:
    loc = pyro.param("gain", torch.tensor(0.2)) * x[:, 0, 0]
    with pyro.plate("sequences", len(x), dim=-1):
        pyro.sample("z_1", dist.Normal(loc, 0.8))


def seldom() -> Run:
    """A parameter that one batch of four asks for."""
    x, _ = data()
    svi = SVI(seldom_model, seldom_guide, pyro.optim.Adam(ADAM), Trace_ELBO())
    return Run(svi, [x, *[x[:, :2]] * 3], {})


def seldom_and_late() -> Run:
    """The same, asked for by the third batch of a pass."""
    x, _ = data()
    run = seldom()
    return run._replace(batches=[x[:, :2], x[:, :2], x, x[:, :2]])


def seldom_in_random_order() -> Run:
    """The same, and each batch is drawn as it is asked for."""
    x, _ = data()

    class Drawn:
        epoch = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.epoch += 1
            for i in range(4):
                yield (x if i == 2 else x[:, :2])[torch.randperm(len(x))[:3]]

    return seldom()._replace(batches=Drawn())


def global_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("sequences", len(x), dim=-1):
        pyro.sample("x_1", dist.Normal(loc, 1.0), obs=x[:, 0, 0])


def autoguide() -> Run:
    x, _ = data()
    svi = SVI(global_model, AutoNormal(global_model), pyro.optim.ClippedAdam(ADAM), Trace_ELBO())
    return Run(svi, [x], {})


CASES: list[Callable[[], Run]] = [
    scheduled_vrnn,
    stepped_vrnn,
    milestones_vrnn,
    critic_between_steps,
    alternating,
    plain_functions,
    without_seed,
    buffers,
    averages,
    seldom,
    seldom_and_late,
    seldom_in_random_order,
    autoguide,
]


class Outcome(NamedTuple):
    history: History
    in_place: dict[str, Any]  # after the run: the best parameters, critics and averages
    checkpoint: dict[str, Any]  # the run's last state


def process(
    case: Callable[[], Run],
    path: Path | None,
    new: bool = False,
    resume: bool = False,
    every: int = 3,
    **more: Any,
) -> Outcome:
    """``fit`` where the store is empty; with ``new``, initial values and draws are others too."""
    pyro.clear_param_store()
    with seeded(5 if new else 4):
        run = case()
    torch.manual_seed(8 if new else 7)
    options: dict[str, Any] = {"steps": STEPS, "seed": 0, "records": RECORDS, "progress": False}
    checkpoint = None if path is None else Checkpointing(path, every, resume)
    options |= run.options | {"checkpoint": checkpoint} | more
    history = fit(run.svi, run.batches, **options)
    in_place = {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}
    model = run.svi.model
    in_place |= dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    further = [getattr(model, "__self__", None), *options.get("keep", ())]
    in_place |= {str(i): m.state_dict() for i, m in enumerate(further) if m is not None}
    return Outcome(history, in_place, {} if path is None else torch.load(path, weights_only=True))


def interrupt_at(step: int) -> Callable[[int], None]:
    done: list[int] = []

    def progress(steps: int) -> None:
        done.extend([1] * steps)
        if len(done) == step:
            raise KeyboardInterrupt

    return progress


def resumed(case: Callable[[], Run], path: Path, *interrupts: int, **options: Any) -> Outcome:
    """The outcome after as many processes, each interrupted at its step."""
    for i, step in enumerate(interrupts):
        with pytest.raises(KeyboardInterrupt):
            more = options | {"progress": interrupt_at(step), "resume": i > 0}
            process(case, path, new=i > 0, **more)
    return process(case, path, new=True, resume=True, **options)


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Paths of all that differs, but for the time."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for name in a.keys() - {"seconds"}:
            yield from differences(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, list | tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif a != b:
        yield where


def compared(a: Outcome, b: Outcome) -> list[str]:
    histories = differences(vars(a.history), vars(b.history), "history")
    others = differences([a.in_place, a.checkpoint], [b.in_place, b.checkpoint])
    return [*histories, *others]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    case: Callable[[], Run], tmp_path: Path
) -> None:
    whole = process(case, tmp_path / "whole.pt")
    assert whole.history.steps == STEPS and len(whole.history.rows) == STEPS
    # checkpoints at 3 and 6: within the first pass of Batches and within the second
    found = resumed(case, tmp_path / "parts.pt", 5, 8)
    assert not compared(whole, found)
    unsaved = process(case, None)
    assert not [*differences(whole.in_place, unsaved.in_place)]  # writing changes nothing
    assert not [*differences(vars(whole.history), vars(unsaved.history))]


#: parts of a well trained run, and the first that goes wrong if they start anew
HELD = {
    "inference.clipping.Clipper.load_state_dict": "history/rows/12/clipped_share",
    "inference.averages.Average.load_state_dict": "history/rows/14/validation_bound",
}


@pytest.mark.parametrize("interrupts", [(5, 8), (13, 15), (14,)])
def test_clipping_averages_rates_windows_and_augmentation_go_on(
    interrupts: tuple[int, ...], tmp_path: Path
) -> None:
    whole = process(well_trained_vrnn, tmp_path / "whole.pt")
    cut = [row["clipped_share"] for row in whole.history.rows]
    assert cut[:10] == [0.0] * 10 and cut[-1] > 0.0  # the bound adapts, and bites
    assert not compared(whole, resumed(well_trained_vrnn, tmp_path / "parts.pt", *interrupts))


@pytest.mark.parametrize("name", HELD)
def test_the_comparison_sees_clipping_or_an_average_that_starts_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = process(well_trained_vrnn, tmp_path / "whole.pt")
    monkeypatch.setattr(name, lambda *_: None)
    found = compared(whole, resumed(well_trained_vrnn, tmp_path / "parts.pt", 13))
    assert HELD[name] in found and all("rows/11/" not in path for path in found)


def test_a_state_may_be_written_twice_without_the_parameters_it_holds(tmp_path: Path) -> None:
    whole = process(seldom, tmp_path / "whole.pt")
    assert not compared(whole, resumed(seldom, tmp_path / "parts.pt", 2, 4, every=1))


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a look at the clock takes a second
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr("inference.training.time", clock)
    whole = process(scheduled_vrnn, None)
    parts = resumed(scheduled_vrnn, tmp_path / "parts.pt", 5, 8)
    assert whole.history.seconds == parts.history.seconds == STEPS


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_checkpoints_may_fall_on_any_step(step: int, tmp_path: Path) -> None:
    whole = process(scheduled_vrnn, tmp_path / "whole.pt")
    found = resumed(scheduled_vrnn, tmp_path / "parts.pt", step, every=1)
    assert not compared(whole, found)


@pytest.mark.parametrize(
    ("case", "name", "seen"),
    [
        (scheduled_vrnn, "pyro.optim.PyroOptim.set_state", "history/rows/4/loss"),
        (scheduled_vrnn, "inference.checkpoints.set_random_state", "history/rows/3/loss"),
        (plain_functions, "inference.checkpoints.set_random_state", "history/rows/3/loss"),
        (critic_between_steps, "inference.Adversarial.load_state_dict", "history/rows/3/loss"),
        (alternating, "inference.Adversarial.load_state_dict", "history/rows/3/critic_penalty"),
        (alternating, "torch.optim.RMSprop.load_state_dict", "history/rows/4/loss"),
        (buffers, "torch.nn.Module.load_state_dict", "/0/0/encoder.1.running_mean"),
    ],
)
def test_the_comparison_sees_what_a_resumed_run_does_not_load(
    case: Any, name: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = process(case, tmp_path / "whole.pt", keep=[])  # which would load the critic too
    assert not compared(whole, resumed(case, tmp_path / "parts.pt", 5, keep=[]))
    monkeypatch.setattr(name, lambda *_, **__: None)
    assert seen in compared(whole, resumed(case, tmp_path / "fault.pt", 5, keep=[]))


@pytest.mark.parametrize(
    ("interrupt", "part", "value", "seen"),
    [
        (3, "clock", 0, "history/rows/3/kl_weight"),
        (3, "optimisers", {}, "history/rows/4/loss"),
        (2, "gradients", None, "history/best_bound"),  # one step long: no transition
        (3, "batches", 1, "history/rows/3/loss"),
    ],
)
def test_the_comparison_sees_a_part_of_the_checkpoint_changed(
    interrupt: int, part: str, value: Any, seen: str, tmp_path: Path
) -> None:
    whole, path = process(scheduled_vrnn, tmp_path / "whole.pt"), tmp_path / "parts.pt"
    with pytest.raises(KeyboardInterrupt):
        process(scheduled_vrnn, path, every=1, progress=interrupt_at(interrupt))
    content = torch.load(path, weights_only=True)
    assert content["clock"] == content["batches"]["position"] == interrupt
    assert any(g is not None for g in content["gradients"].values())
    values = {
        "gradients": dict.fromkeys(content["gradients"]),
        "batches": content["batches"] | {"position": 1},
    }
    torch.save(content | {part: values.get(part, value)}, path)
    assert seen in compared(whole, process(scheduled_vrnn, path, new=True, resume=True))


def test_batches_of_the_same_process_are_found_again_by_their_epoch(tmp_path: Path) -> None:
    whole = process(scheduled_vrnn, tmp_path / "whole.pt")
    pyro.clear_param_store()
    with seeded(4):
        run = scheduled_vrnn()
    options = {"steps": STEPS, "seed": 0, "records": RECORDS, **run.options}
    options |= {"checkpoint": Checkpointing(tmp_path / "parts.pt", every=3, resume=True)}
    for step in (4, 8):  # in pass 1, and 7 is in pass 2
        with pytest.raises(KeyboardInterrupt):
            fit(run.svi, run.batches, progress=interrupt_at(step), **options)
    history = fit(run.svi, run.batches, progress=False, **options)
    assert not [*differences(vars(whole.history), vars(history))]
    stored = {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}
    assert not [*differences(whole.in_place, stored)]
    assert run.batches.epoch == 3


@pytest.mark.parametrize("case", [scheduled_vrnn, plain_functions, critic_between_steps, buffers])
def test_a_finished_run_returns_at_once(case: Callable[[], Run], tmp_path: Path) -> None:
    whole = process(case, tmp_path / "whole.pt")
    written, done = (tmp_path / "whole.pt").read_bytes(), []
    again = process(case, tmp_path / "whole.pt", new=True, resume=True, progress=done.append)
    assert again.history == whole.history and done == [STEPS]  # the seconds too
    assert not compared(whole, again)
    assert (tmp_path / "whole.pt").read_bytes() == written


def test_patience_goes_on_counting_and_may_be_raised(tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation": Validation(lambda: 0.0, every=1, patience=4)}
    whole = process(scheduled_vrnn, tmp_path / "whole.pt", **options)
    assert (whole.history.best_step, whole.history.steps) == (1, 5)
    found = resumed(scheduled_vrnn, tmp_path / "parts.pt", 3, **options)
    assert not compared(whole, found) and found.history.stopped.startswith("no better bound in 4")
    more = {"validation": Validation(lambda: 0.0, every=1, patience=20)}
    longer = process(scheduled_vrnn, tmp_path / "parts.pt", new=True, resume=True, **more)
    assert not compared(process(scheduled_vrnn, tmp_path / "whole.pt", **more), longer)


def test_files_are_those_of_the_uninterrupted_run(tmp_path: Path) -> None:
    process(scheduled_vrnn, tmp_path / "whole.pt", records=Records(tmp_path / "whole.csv", 1))
    resumed(scheduled_vrnn, tmp_path / "parts.pt", 5, records=Records(tmp_path / "parts.csv", 1))
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "parts.csv").read_text()
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_where_there_is_no_checkpoint_a_run_starts_anew(tmp_path: Path) -> None:
    whole = process(scheduled_vrnn, tmp_path / "whole.pt")
    assert not compared(whole, process(scheduled_vrnn, tmp_path / "none.pt", resume=True))


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, save, calls = process(scheduled_vrnn, tmp_path / "whole.pt"), torch.save, []

    def full(content: Any, path: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        process(scheduled_vrnn, tmp_path / "parts.pt")
    assert not list(tmp_path.glob(".*"))  # the half file is gone
    found = process(scheduled_vrnn, tmp_path / "parts.pt", new=True, resume=True)
    assert not compared(whole, found)


def flip(path: Path) -> None:
    """One bit of one number, which torch itself would read."""
    content = bytearray(path.read_bytes())
    number = torch.load(path, weights_only=True)["parameters"]["model$$$cell.cell.weight_hh"]
    at = content.index(number.numpy().tobytes())
    content[at + 3] ^= 1
    path.write_bytes(bytes(content))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        flip,
        lambda path: path.write_text("not a file of torch"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"parameters": {}, "about": {}}, path),
        lambda path: torch.save({"format": "fit checkpoint 1", "parameters": {}}, path),
        lambda path: torch.save({"format": Evil()}, path),
    ],
    ids=[
        "truncated",
        "empty",
        "a bit",
        "text",
        "list",
        "parameters",
        "incomplete",
        "pickled code",
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pt"
    process(scheduled_vrnn, path)
    damage(path)
    with pytest.raises(ValueError, match=r"run\.pt is damaged, or no checkpoint .* give another"):
        process(scheduled_vrnn, path, resume=True)
    assert "unpickled" not in capsys.readouterr().out


def wider_vrnn() -> Run:
    recipe = recipes.vrnn(X_DIM, Z_DIM, H_DIM + 1)
    return scheduled_vrnn()._replace(
        svi=SVI(recipe.model, recipe.guide, pyro.optim.AdamW(ADAM), ELBO())
    )


def other_optimiser() -> Run:
    run = scheduled_vrnn()
    return run._replace(svi=SVI(run.svi.model, run.svi.guide, pyro.optim.SGD(ADAM), ELBO()))


def further_parameter() -> Run:
    def guide(*args: Any) -> None:
        pyro.param("bias", torch.tensor(0.0))
        plain_guide(*args)

    run = plain_functions()
    return run._replace(svi=SVI(plain_model, guide, pyro.optim.Adam(ADAM), Trace_ELBO()))


def without_hook() -> Run:
    run = critic_between_steps()
    return run._replace(options=run.options | {"hooks": [lambda *_: {}]})


@pytest.mark.parametrize(
    ("case", "other", "options", "message"),
    [
        (
            scheduled_vrnn,
            wider_vrnn,
            {},
            r"other parameters: model\$\$\$\S+ is \(.*\) torch.float64",
        ),
        (plain_functions, further_parameter, {}, "other parameters: bias is absent, here "),
        (further_parameter, plain_functions, {}, r"parameters: bias is \(\) .*, here absent"),
        (scheduled_vrnn, scheduled_vrnn, {"steps": 10}, "with steps 9, here 10; continue"),
        (scheduled_vrnn, scheduled_vrnn, {"seed": 1}, "with seed 0, here 1"),
        (scheduled_vrnn, scheduled_vrnn, {"seed": None}, "with seed 0, here None"),
        (scheduled_vrnn, other_optimiser, {}, "with optimiser 'AdamW', here 'SGD'"),
        (critic_between_steps, other_optimiser, {}, "with optimiser 'Adam', here 'SGD'"),
        (critic_between_steps, without_hook, {}, r"with a state \[.*'hooks\[0\]'.*\], here \["),
        (critic_between_steps, lambda: critic_between_steps(6), {}, r"another hooks\[0\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_way_out(
    case: Any, other: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    process(case, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        process(other, tmp_path / "run.pt", resume=True, **options)


def test_fewer_batches_than_the_interrupted_run_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        process(scheduled_vrnn, tmp_path / "run.pt", progress=interrupt_at(3))
    with pytest.raises(ValueError, match="those of the interrupted run, which had 3 in a pass"):
        process(
            lambda: scheduled_vrnn()._replace(batches=[data()]),
            tmp_path / "run.pt",
            resume=True,
        )


class Forgetful:
    """A hook whose state would have to be pickled."""

    def __call__(self, *_: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [Path("/")]}

    def load_state_dict(self, state: Any) -> None: ...


def test_a_state_that_could_not_be_read_is_refused_on_writing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"\['hooks\[0\]'\]\['seen'\]\[0\] must be a tensor or a"):
        process(scheduled_vrnn, tmp_path / "run.pt", hooks=[Forgetful()])
    assert not (tmp_path / "run.pt").exists()


def test_degenerate_weights_stop_the_run_and_leave_no_gradient() -> None:
    recipe, elbo = recipes.vrnn(X_DIM, Z_DIM, H_DIM), ELBO()

    def loss(*args: Any) -> Tensor:
        value = elbo(*args)
        if elbo.clock.calls == 4:
            value.backward(retain_graph=True)
            raise DegenerateWeightsError(2, 1, -math.inf)
        return value

    svi = SVI(recipe.model, recipe.guide, pyro.optim.Adam(ADAM), loss)
    with pytest.raises(NonFiniteLossError, match="at step 4: the particles' weights at step 2"):
        fit(svi, [data()], steps=6, seed=0, progress=False)
    stored = [p for _, p in pyro.get_param_store().named_parameters()]
    assert stored and not any(p.grad.any() for p in stored if p.grad is not None)
