"""``avrnn tune``: the same candidates for every row, judged by the validation bound."""

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_avrnn.cli import compare, main
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.rows import parse
from pyro_avrnn.cli.runs import Task
from pyro_avrnn.cli.settings import Settings

pytestmark = pytest.mark.usefixtures("single")
TINY = ["--steps=4", "--h-dim=4", "--z-dim=2", "--validate-every=2", "--batch-size=4", "--jobs=1"]
Tune = Callable[..., int]
SPACE = ["lr=0.001~0.1", "kl=0>1@0.1|0>1@0.5", "guide=filtering|smoothing", "dropout=0|0.1|0.2"]


class Trained:
    """In place of training: the bound of a candidate is a function of its row; what was asked."""

    def __init__(self, bound: Callable[[Task], float | None]) -> None:
        self.bound, self.tasks, self.settings = bound, list[Task](), list[Settings]()

    def __call__(
        self, tasks: list[Task], comparison: Comparison, settings: Settings
    ) -> Iterator[dict[str, Any]]:
        self.settings.append(settings)
        for task in tasks:
            self.tasks.append(task)
            task.folder.mkdir(parents=True, exist_ok=True)
            bound = self.bound(task)
            yield {
                "row": task.training.label,
                "seed": task.seed,
                "error": "training stopped" if bound is None else None,
                "validation_iwae_per_frame": bound,
                "commit": "c0",
            }

    @property
    def labels(self) -> list[str]:
        return [task.training.label for task in self.tasks]


def by_rate(task: Task) -> float:
    """The nearer the learning rate is to 0.01, the better."""
    assert task.training.lr is not None
    return -abs(math.log(task.training.lr / 0.01))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Trained:
    made = Trained(by_rate)
    monkeypatch.setattr(compare, "train", made)
    return made


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., int]:
    """The command, on twelve series of 5 frames of 3 noisy waves; its first argument is --out."""
    random = np.random.default_rng(0)
    x = np.sin(np.arange(5)[:, None] + random.uniform(0, 6, size=(12, 1, 3)))
    np.savez(tmp_path / "waves.npz", x=x + 0.1 * random.normal(size=x.shape))

    def run(out: str, *more: str, space: Sequence[str] = SPACE) -> int:
        place = ["--data", str(tmp_path / "waves.npz")]
        place += ["--out", str(tmp_path / out)] if out else []
        return main(["tune", *TINY, *place, "--space", *space, *more])

    return run


def chosen(label: str) -> dict[str, str]:
    """Options of a row as it is written."""
    pairs = filter(None, label.partition(":")[2].split(","))
    return dict(pair.split("=") for pair in pairs)


def of_row(labels: list[str], row: str) -> list[dict[str, str]]:
    return [chosen(label) for label in labels if re.match(rf"{re.escape(row)}(:|,|$)", label)]


# ---- candidates ----


def test_every_row_has_the_same_candidates_but_for_what_it_lacks(
    tune: Tune, fake: Trained
) -> None:
    rows = ["rnn", "elbo", "elbo-annealed", "conditional+kl"]
    assert tune("out", "--trials=6", "--rows", *rows) == 0
    full = of_row(fake.labels, "elbo-annealed")
    names = {"lr", "kl", "guide", "dropout"}
    assert len(full) == 6 and all(found.keys() == names for found in full)
    # a row of latents without a ramp keeps its KL; one without latents has no guide, either
    for row, lacks in (("conditional+kl", set()), ("elbo", {"kl"}), ("rnn", {"kl", "guide"})):
        expected = [{name: options[name] for name in names - lacks} for options in full]
        assert of_row(fake.labels, row) == expected
    assert len({options["lr"] for options in full}) == 6
    assert all(0.001 <= float(options["lr"]) <= 0.1 for options in full)
    for option in SPACE[1:]:
        name, _, values = option.partition("=")
        assert 1 < len({options[name] for options in full}) <= len(values.split("|"))
        assert {options[name] for options in full} <= {*values.split("|")}


def test_what_a_row_sets_itself_stays(tune: Tune, fake: Trained) -> None:
    own, plain = "elbo-annealed:lr=0.02,kl=0>2@0.3", "elbo-annealed"
    assert tune("out", "--trials=4", "--rows", plain, own) == 0
    found = [chosen(label) for label in fake.labels]
    expected = [{**options, "lr": "0.02", "kl": "0>2@0.3"} for options in found[:4]]
    assert found[4:] == [o for i, o in enumerate(expected) if o not in expected[:i]]
    assert all(label.startswith(own + ",guide=") for label in fake.labels[4:])
    assert {task.training.kl for task in fake.tasks[4:]} == {(0.0, 2.0, 0.3)}


@pytest.mark.parametrize(
    ("space", "row", "known"),
    [
        ("critic_lr=0.001|0.01", "elbo", False),
        ("critic_lr=0.001|0.01", "conditional", True),
        ("weight=0>1@0.5|0>10@0.5", "joint+kl", True),
        ("weight=1|2", "alternating", False),
        ("adversarial_lr=0.001|0.01", "alternating", True),
        ("adversarial_lr=0.001|0.01", "joint", False),
        ("cell=gru|lstm", "elbo:model=dmm", False),
        ("z_dim=2|3", "rnn", False),
        ("h_dim=4|8", "rnn", True),
    ],
)
def test_options_that_a_row_lacks_are_left_out(
    tune: Tune, fake: Trained, space: str, row: str, known: bool
) -> None:
    fake.bound = lambda task: 0.0
    assert tune("out", "--trials=9", "--rows", row, space=[space]) == 0
    name, _, values = space.partition("=")
    found = [options[name] for options in of_row(fake.labels, row) if name in options]
    # the same candidate twice is trained once
    assert Counter(found) == (Counter(values.split("|")) if known else {})
    assert len(fake.tasks) == (2 if known else 1)


def test_an_option_that_another_drawn_one_makes_void_is_left_out(
    tune: Tune, fake: Trained
) -> None:
    fake.bound = lambda task: 0.0
    space = ["divergence=mmd|kl", "critic_lr=0.001|0.01"]
    assert tune("out", "--trials=30", "--rows=conditional", space=space) == 0
    found = {tuple(options.values()) for options in of_row(fake.labels, "conditional")}
    assert found == {("mmd",), ("kl", "0.001"), ("kl", "0.01")}


def test_whole_numbers_are_drawn_on_a_log_scale(tune: Tune, fake: Trained) -> None:
    fake.bound = lambda task: 0.0
    assert tune("out", "--trials=30", "--rows=rnn", space=["h_dim=2~800"]) == 0
    widths = [task.training.h_dim or 0 for task in fake.tasks]
    assert 100 < max(widths) <= 800 and 2 <= min(widths)
    assert 8 <= sum(width < 40 for width in widths) <= 22  # the middle of the logarithms


def test_the_search_looks_at_validation_with_seeds_of_its_own(
    tune: Tune, tmp_path: Path, fake: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["--rows=elbo", "--trials=2"]
    assert tune("", *rows, "--seeds=2", "--split=test") == 0
    assert [task.seed for task in fake.tasks] == [100, 101] * 2
    assert (tmp_path / "runs" / "tune" / "rows.txt").is_file()
    assert tune("other", *rows, "--first-seed=7", "--particles=5") == 0
    assert [task.seed for task in fake.tasks[4:]] == [7, 7]
    assert [s.split for s in fake.settings] == ["valid"] * 2  # whatever was said
    assert [s.num_particles for s in fake.settings] == [16, 5]
    # another first seed draws other candidates, the same one the same
    assert tune("again", *rows) == 0
    assert fake.labels[6:] == fake.labels[0:4:2] != fake.labels[4:6]


# ---- winners ----


def test_the_winner_has_the_best_mean_validation_bound(
    tune: Tune, tmp_path: Path, fake: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.bound = lambda task: by_rate(task) + 0.25 * (task.seed - 100.5)  # a mean over seeds
    out, rows = tmp_path / "out", ["rnn", "elbo-annealed"]
    assert tune("out", "--trials=7", "--seeds=2", "--rows", *rows) == 0
    best = [
        max((t for t in fake.tasks if t.training.label.startswith(row)), key=by_rate)
        for row in rows
    ]
    winners = [task.training.label for task in best]
    assert (out / "rows.txt").read_text().splitlines() == winners
    with (out / "candidates.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 2 * 7 * 2
    for record in records:
        task = next(t for t in fake.tasks if t.training.label == record["written"])
        bound = by_rate(task) + 0.25 * (int(record["seed"]) - 100.5)
        assert float(record["validation"]) == pytest.approx(bound, rel=1e-12)
        options = chosen(record["written"])
        assert {name: record[name] for name in options} == options and record["commit"] == "c0"
    assert [r["candidate"] for r in records] == [str(i) for i in range(7) for _ in "ab"] * 2
    said, text = capsys.readouterr().out, (out / "table.md").read_text()
    assert text.strip() in said and f"written: {out / 'candidates.csv'}" in said
    for label, task in zip(winners, best, strict=True):
        assert re.search(rf"^\| `{re.escape(label)}` +\| {by_rate(task):.3f} ", text, re.MULTILINE)


def test_seeds_of_an_earlier_search_do_not_count(
    tune: Tune, tmp_path: Path, fake: Trained
) -> None:
    fake.bound = lambda task: by_rate(task) * (100.5 - task.seed)  # the second seed disagrees
    rows = ["--rows=rnn", "--trials=4"]
    assert tune("whole", *rows) == tune("both", *rows, "--seeds=2") == 0
    assert tune("both", *rows, "--resume") == 0
    assert len({(tmp_path / out / "rows.txt").read_text() for out in ("whole", "both")}) == 1


def test_a_search_goes_on_where_it_was(tune: Tune, tmp_path: Path, fake: Trained) -> None:
    rows = ["--rows", "rnn", "elbo-annealed"]
    assert tune("whole", "--trials=5", *rows) == 0
    whole = fake.labels
    assert tune("parts", "--trials=3", *rows) == 0
    first = fake.labels[len(whole) :]
    assert first == whole[:3] + whole[5:8]
    assert tune("parts", "--trials=5", "--resume", *rows) == 0
    assert fake.labels[len(whole) + len(first) :] == whole[3:5] + whole[8:]
    for name in ("candidates.csv", "rows.txt"):
        texts = [(tmp_path / out / name).read_text() for out in ("whole", "parts")]
        assert texts[0] == texts[1]
    # begun anew, the winners of the search before are gone until there are new ones
    fake.bound = lambda task: 1 / 0
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVRNN_TRACEBACK", "1")
        tune("parts", "--overwrite", *rows)
    assert not any((tmp_path / "parts" / name).exists() for name in ("candidates.csv", "rows.txt"))


@pytest.mark.parametrize("all_fail", [False, True])
def test_a_training_that_fails_wins_nothing(
    tune: Tune, tmp_path: Path, fake: Trained, capsys: pytest.CaptureFixture[str], all_fail: bool
) -> None:
    fake.bound = lambda task: None if all_fail or task.training.dropout == 0.1 else by_rate(task)
    out = tmp_path / "out"
    assert tune("out", "--trials=6", "--rows", "elbo") == all_fail
    said = capsys.readouterr()
    assert "training stopped" in said.err and "000." not in said.out
    assert ("* No candidate of `elbo` has a bound." in said.out) == all_fail
    rows = (out / "rows.txt").read_text().splitlines()
    assert all("dropout=0.1" not in row for row in rows) and len(rows) == (not all_fail)
    assert len(fake.tasks) == 6 and (out / "candidates.csv").read_text().count("-inf") >= 1


def test_winners_can_be_given_back_to_compare(tune: Tune, tmp_path: Path, serial: None) -> None:
    """The one test here that trains."""
    out, rows = tmp_path / "out", ["--rows", "rnn", "elbo-annealed:activation=elu"]
    assert tune("out", "--trials=2", *rows) == 0
    results = json.loads((out / "results.json").read_text())
    assert {(r["split"], r["seed"]) for r in results} == {("valid", 100)} and len(results) == 4
    winners = (out / "rows.txt").read_text().splitlines()
    for row, label in zip(("rnn", "elbo-annealed:activation=elu,"), winners, strict=True):
        tried = [r for r in results if r["row"].startswith(row)]
        best = max(tried, key=lambda r: r["validation_iwae_per_frame"])
        assert best["row"] == label and best["validation_iwae_per_frame"] < 0.0
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "compare", lambda *given: asked.append(given[0]) or 0)
        assert main(["compare", "--rows", f"@{out / 'rows.txt'}", "--out", str(tmp_path)]) == 0
    assert asked[0].trainings() == [parse(label) for label in winners]


# ---- bad input ----


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("colour=red|blue", r"--space must hold options of a row .*, got 'colour=red\|blue'"),
        ("lr", "--space must hold options of a row such as lr=0.001~0.01 or .*, got 'lr'"),
        ("lr=0.1~0.01", "--space lr must be low~high with 0 < low < high, got 0.1~0.01"),
        ("lr=nan~1", "--space lr must be low~high with 0 < low < high, got nan~1"),
        ("lr=0.1~inf", "--space lr must be low~high with 0 < low < high, got 0.1~inf"),
        ("h_dim=0.5~9", "h_dim must be low~high of whole numbers with 0 < low < high, got 0.5~9"),
        ("lr=fast|slow", "option lr must be of kind number, got '(fast|slow)'"),
        ("dropout=2|3", r"option dropout must be in \[0, 1\), got [23]"),
        ("clip_norm=0.5x|tight", "--clip-norm must be a number above 0, a multiple of"),
    ],
)
def test_bad_spaces_are_one_sentence(
    tune: Tune, fake: Trained, capsys: pytest.CaptureFixture[str], space: str, words: str
) -> None:
    assert tune("out", "--rows=elbo", "--trials=2", space=[space]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("avrnn: error: ") and re.search(words, line), line
    assert not fake.tasks


def test_without_optuna_the_extra_is_named(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune("out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "optuna is needed here" in line and line.endswith("pip install pyro-avrnn[tune]")
