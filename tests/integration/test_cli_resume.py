"""``avrnn compare --resume``: inside a training, with what it takes of earlier files."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from pyro_avrnn import data, recipes
from pyro_avrnn.cli import compare, main
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.rows import parse
from pyro_avrnn.cli.runs import Task, row_folder, run
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.data import Dataset

SETTINGS: dict[str, Any] = {"steps": 9, "validate_every": 3, "h_dim": 8, "z_dim": 2}
SETTINGS |= {"num_particles": 25, "batch_size": 4}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
COMMAND = ["compare", "--jobs=1", *(f.replace("num-particles", "particles") for f in FLAGS)]


pytestmark = pytest.mark.usefixtures("single")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve series of at most 6 frames of 3 noisy waves."""
    random = np.random.default_rng(0)
    x = np.sin(np.arange(6)[:, None] + random.uniform(0, 6, size=(12, 1, 3)))
    x += 0.1 * random.normal(size=x.shape)
    split = np.repeat([0, 1, 2], [8, 2, 2])
    np.savez(tmp_path / "waves.npz", x=x, lengths=np.arange(12) % 4 + 3, split=split)
    return tmp_path / "waves.npz"


@pytest.fixture
def waves(source: Path) -> Dataset:
    return data.load(source)


class Progress:
    """Steps as they are announced; an interrupt, as from the keyboard, when so many are done."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at, self.announced = interrupt_at, list[int]()

    def __call__(self, steps: int) -> None:
        self.announced.append(steps)
        if sum(self.announced) == self.interrupt_at:
            raise KeyboardInterrupt


def trained(
    folder: Path,
    waves: Dataset,
    text: str,
    interrupt_at: int | None = None,
    resume: bool = False,
    seed: int = 3,
    **changes: Any,
) -> tuple[dict[str, Any], list[int]]:
    """A row's result, and the steps announced."""
    progress, settings = Progress(interrupt_at), Settings(**SETTINGS | changes)
    task = Task(parse(text), seed, folder)
    return run(task, waves, settings, progress, resume), progress.announced


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    """Nor the commit, to whose name others add by editing while this runs."""
    return {name: value for name, value in result.items() if name not in ("seconds", "commit")}


def same_files(a: Path, b: Path) -> bool:
    """Metrics and parameters, bit for bit."""
    recipe, other = (recipes.load(folder / "parameters.pt") for folder in (a, b))
    tensors, others = (
        [
            value
            for part in (r.model, r.guide, r.critic)
            if part is not None
            for value in part.state_dict().values()
        ]
        for r in (recipe, other)
    )
    return (
        (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
        and recipe.config == other.config
        and all(map(torch.equal, tensors, others))
    )


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("rnn", {}),
        (
            "elbo-annealed",
            {"lr_decay": "cosine", "lr_warmup": 0.1, "weight_decay": 0.01, "average": 0.9},
        ),
        ("elbo:clip_norm=1x,average=0.8", {"window": 2, "batches": "sorted-rest", "steps": 15}),
        ("iwae:dropout=0.3", {"validate_by": "fivo"}),
        ("fivo", {"validate_by": "fivo", "patience": 2}),
        ("conditional", {}),
        ("alternating", {}),
    ],
)
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(
    tmp_path: Path, waves: Dataset, text: str, changes: dict[str, Any]
) -> None:
    whole, _ = trained(tmp_path / "whole", waves, text, **changes)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        trained(folder, waves, text, interrupt_at=5, **changes)
    assert (folder / "checkpoint.pt").is_file() and (folder / "parameters.pt").is_file()
    with pytest.raises(KeyboardInterrupt):
        trained(folder, waves, text, interrupt_at=8, resume=True, **changes)
    result, announced = trained(folder, waves, text, resume=True, **changes)
    assert announced[0] == 6  # what the second part had done when it was last written
    assert without_time(result) == without_time(whole) and whole["error"] is None
    assert same_files(folder, tmp_path / "whole")
    # the command removes it when the result is written
    assert all((tmp_path / name / "checkpoint.pt").exists() for name in ("whole", "parts"))


def test_the_comparison_of_results_sees_another_seed(tmp_path: Path, waves: Dataset) -> None:
    results = [trained(tmp_path / str(seed), waves, "elbo", seed=seed)[0] for seed in (3, 4)]
    a, b = ({k: v for k, v in without_time(r).items() if k != "seed"} for r in results)
    assert a != b and not same_files(tmp_path / "3", tmp_path / "4")


def test_what_was_interrupted_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, waves: Dataset
) -> None:
    whole, _ = trained(tmp_path / "whole", waves, "elbo")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", waves, "elbo", interrupt_at=2)
    result, announced = trained(tmp_path / "parts", waves, "elbo", resume=True)
    assert announced == [1] * 9 and without_time(result) == without_time(whole)


def test_what_was_interrupted_while_it_was_scored_is_only_scored(
    tmp_path: Path, waves: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    whole, _ = trained(tmp_path / "whole", waves, "elbo")
    with monkeypatch.context() as patch:
        patch.setattr("pyro_avrnn.cli.runs.evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", waves, "elbo")
    result, announced = trained(tmp_path / "parts", waves, "elbo", resume=True)
    assert announced == [9] and without_time(result) == without_time(whole)


def test_without_resume_a_training_starts_anew(tmp_path: Path, waves: Dataset) -> None:
    whole, _ = trained(tmp_path / "whole", waves, "elbo")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", waves, "elbo", interrupt_at=5)
    result, announced = trained(tmp_path / "parts", waves, "elbo")
    assert announced == [1] * 9 and without_time(result) == without_time(whole)


# ---- the command ----


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Trainings in this process; the function given says after how many steps to interrupt."""
    interrupt: list[int | None] = [None]

    def train(
        tasks: list[Task], comparison: Comparison, settings: Settings
    ) -> Iterator[dict[str, Any]]:
        progress = Progress(interrupt[0])
        loaded = data.load(comparison.data, **comparison.reader_options(settings))
        for task in tasks:
            yield run(task, loaded, settings, progress, comparison.resume)

    monkeypatch.setattr(compare, "train", train)
    # tables and pictures are tested elsewhere
    monkeypatch.setattr(compare.report, "write", lambda *_: None)

    def at(step: int | None) -> None:
        interrupt[0] = step

    return at


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_interrupted_command_goes_on_inside_the_training(
    tmp_path: Path, source: Path, serial: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def command(out: Path, *more: str) -> list[str]:
        rows = ["--rows", "rnn", "iwae"]
        return [*COMMAND, *rows, "--data", str(source), "--out", str(out), *more]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(whole)) == 0
    serial(9 + 5)  # in the second row
    assert main(command(parts)) == 130
    assert "interrupted: 1 finished trainings" in capsys.readouterr().err
    assert [r["row"] for r in read(parts / "results.json")] == ["rnn"]
    (checkpoint,) = parts.glob("rows/*/checkpoint.pt")
    assert checkpoint.parent == row_folder(parts, "iwae", 0)
    # the row that is done and the one that was begun are of the same settings
    for change in ("--lr=0.1", "--split=valid", "--validate-by=fivo"):
        said = refused(command(parts, "--resume", change), capsys)
        assert re.search("--resume: .* made from other data or with other settings", said)
    assert checkpoint.is_file()
    serial(None)
    assert main(command(parts, "--resume")) == 0
    a, b = (
        [{**without_time(r), "command": ""} for r in read(o / "results.json")]
        for o in (whole, parts)
    )
    assert a == b and [r["row"] for r in a] == ["rnn", "iwae"]
    assert not list(parts.glob("rows/*/checkpoint.pt"))


def test_other_settings_than_those_of_a_training_begun_are_refused(
    tmp_path: Path, source: Path, serial: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND, "--rows", "elbo", "--data", str(source), "--out", str(tmp_path / "out")]
    serial(5)
    assert main(command) == 130
    serial(None)
    settings = read(tmp_path / "out" / "rows" / "settings.json")
    assert settings["settings"] == asdict(Settings(**SETTINGS)) and settings["data"] == "waves"
    assert not (tmp_path / "out" / "results.json").exists()
    for change in (
        "--lr=0.1",
        "--steps=20",
        "--h-dim=4",
        "--validate-by=fivo",
        "--lr-decay=linear",
    ):
        said = refused([*command, "--resume", change], capsys)
        assert "holds row 'one that was begun' made from other data or with other settings" in said
    np.savez(source, x=np.random.default_rng(1).normal(size=(12, 6, 3)))
    assert "made from other data" in refused([*command, "--resume"], capsys)
    assert read(tmp_path / "out" / "rows" / "settings.json") == settings
    assert "start anew by --overwrite" in refused([*command, "--lr=0.1"], capsys)
    assert main([*command, "--lr=0.1", "--overwrite"]) == 0
    (result,) = read(tmp_path / "out" / "results.json")
    assert result["settings"]["lr"] == 0.1 and result["steps"] == 9


def test_results_from_before_a_setting_was_there_are_kept(
    tmp_path: Path, source: Path, serial: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, "--rows", "rnn", "elbo", "--data", str(source), "--out", str(out)]
    assert main(command) == 0
    results = read(out / "results.json")
    for r in results:
        del r["settings"]["validate_by"], r["settings"]["patience"]
        for name in [n for n in r if n.startswith(("fivo", "filter"))]:
            del r[name]
    (out / "results.json").write_text(json.dumps(results))
    (out / "rows" / "settings.json").unlink()
    serial(1)  # nothing is trained again
    assert main([*command, "--resume"]) == 0
    assert read(out / "results.json") == results
    assert read(out / "rows" / "settings.json")["settings"]["validate_by"] == "iwae"
    # what the default was not is another setting
    said = refused([*command, "--resume", "--validate-by=fivo"], capsys)
    assert "holds row 'rnn' made from other data or with other settings" in said


def test_a_new_start_forgets_what_an_earlier_one_had_begun(
    tmp_path: Path, source: Path, serial: Callable[..., None]
) -> None:
    def command(out: str, *more: str) -> list[str]:
        place = ["--data", str(source), "--out", str(tmp_path / out)]
        return [*COMMAND, "--rows", "elbo", *place, *more]

    assert main(command("whole", "--lr=0.1")) == 0
    serial(5)
    assert main(command("parts", "--lr=0.001")) == 130
    serial(1)  # started anew with another rate, and stopped before its first checkpoint
    assert main(command("parts", "--lr=0.1", "--overwrite")) == 130
    serial(None)
    assert main(command("parts", "--lr=0.1", "--resume")) == 0
    found = [read(tmp_path / out / "results.json")[0] for out in ("whole", "parts")]
    a, b = ({**without_time(r), "command": ""} for r in found)
    assert a == b


def music(folder: Path) -> Path:
    """Ten pieces of six steps and five keys."""
    random, content = np.random.default_rng(0), {}
    for split, count in (("train", 6), ("valid", 2), ("test", 2)):
        rolls = np.empty((1, count), dtype=object)
        for i in range(count):
            rolls[0, i] = (random.uniform(size=(6, 5)) < 0.3).astype(np.uint8)
        content[f"{split}data"] = rolls
    scipy.io.savemat(folder / "rolls.mat", content)
    return folder / "rolls.mat"


def test_transposed_pieces_are_the_same_after_an_interrupt(tmp_path: Path) -> None:
    rolls = data.load(music(tmp_path), transpose=2)
    text = "elbo-annealed:emission=autoregressive,batch_size=2"
    whole, _ = trained(tmp_path / "whole", rolls, text)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", rolls, text, interrupt_at=5)
    result, announced = trained(tmp_path / "parts", rolls, text, resume=True)
    assert announced[0] == 3 and without_time(result) == without_time(whole)
    assert same_files(tmp_path / "parts", tmp_path / "whole")
    still, _ = trained(tmp_path / "still", data.load(music(tmp_path)), text)
    assert not same_files(tmp_path / "still", tmp_path / "whole")  # it makes a difference


def test_rows_of_other_segments_are_not_kept(
    tmp_path: Path, serial: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*COMMAND, "--rows", "rnn", "--data", str(music(tmp_path))]
    base += ["--out", str(tmp_path / "out")]
    assert main(base) == 0
    assert main([*base, "--segment=2", "--resume"]) == 2
    assert "other data or with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["no json", "{}", '{"settings": {"colour": "red"}}', "[]"])
def test_a_foreign_file_of_settings_is_one_sentence(
    tmp_path: Path,
    source: Path,
    serial: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    path = tmp_path / "out" / "rows" / "settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    command = [*COMMAND, "--rows", "rnn", "--data", str(source), "--out", str(tmp_path / "out")]
    assert "remove it or leave out --resume" in refused([*command, "--resume"], capsys)
    assert path.read_text() == content


def test_another_optimiser_than_the_checkpoints_is_refused(tmp_path: Path, waves: Dataset) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, waves, "elbo", interrupt_at=5)
    with pytest.raises(ValueError, match="checkpoint .* is of a run with optimiser 'Adam', here"):
        trained(tmp_path, waves, "elbo", resume=True, weight_decay=0.1)


# ---- the rows with other bounds, on real data ----


@pytest.mark.parametrize(
    ("text", "by"),
    [("iwae", "iwae"), ("fivo", "iwae"), ("conditional+kl:bound=fivo,particles=2", "fivo")],
)
def test_rows_with_other_bounds_are_trained_and_scored_on_vowels(
    tmp_path: Path, text: str, by: str
) -> None:
    small = {"steps": 4, "validate_every": 2, "batch_size": 16, "validate_by": by}
    result, announced = trained(tmp_path, data.vowels(), text, **small)
    assert result["error"] is None and announced == [1] * 4
    assert result["frames"] == data.vowels().test.num_frames
    assert result["objective"].startswith("FIVO-" if "fivo" in text else "IWAE-4")
    assert result["num_particles"] == result["fivo_particles"] == 25
    bounds = [result[f"{name}_per_frame"] for name in ("elbo", "iwae", "fivo")]
    errors = [result[f"{name}_per_frame_se"] for name in ("elbo", "iwae", "fivo")]
    assert bounds[0] < bounds[1] and bounds[0] < bounds[2]
    assert all(0.0 < error < 1.0 for error in errors)
    assert 1.0 <= result["filter_ess"] <= 25.0
    assert 1.0 <= result["filter_first_ancestors"] <= 25.0
    assert 0.0 <= result["pareto_k_constant"] < 1.0
    other = {"iwae": "fivo", "fivo": "iwae"}[by]
    assert np.isfinite(result[f"validation_{by}_per_frame"])
    assert f"validation_{other}_per_frame" not in result
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert ("fivo" in head) == ("fivo" in text) and "validation_bound" in head


def test_an_rnns_bounds_are_one(tmp_path: Path) -> None:
    result, _ = trained(tmp_path, data.vowels(), "rnn", steps=2, batch_size=16)
    assert result["num_particles"] == result["fivo_particles"] == 1
    assert result["fivo_per_frame"] == pytest.approx(result["iwae_per_frame"], rel=1e-5)
    assert result["pareto_k_constant"] is None
