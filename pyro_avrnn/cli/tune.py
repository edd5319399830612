"""``avrnn tune``: the same random search for every row, judged on validation sequences."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from inference.files import write_csv, write_text
from pyro_avrnn.cli.compare import run_rows
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.needs import lacking
from pyro_avrnn.cli.options import kind_of, option, options_of
from pyro_avrnn.cli.report import validation_bound
from pyro_avrnn.cli.rows import ROWS, parse, set_by, vary
from pyro_avrnn.cli.runs import Result
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.tables import markdown
from pyro_avrnn.cli.training import Training
from pyro_avrnn.data import Dataset
from pyro_avrnn.data._checks import optional
from pyro_avrnn.recipes import OWN


@dataclass(frozen=True)
class Search:
    """Where the search looks, and how long."""

    trials: int = option(12, "candidates for each row, the same for all", "at least 1")
    space: tuple[str, ...] = option(
        (
            "lr=0.0003~0.01",
            "clip_norm=none|10x|1x",
            "kl=0>1@0.1|0>1@0.25|0>1@0.5",
            "batch_size=16|32|64",
            "dropout=0|0.1",
            "guide=filtering|smoothing",
        ),
        "options of a row and their values: low~high, drawn on a log scale, or a|b|c; a row that "
        "sets an option itself, or lacks it, keeps its own",
    )


def tune(search: Search, comparison: Comparison, settings: Settings, command: str) -> int:
    """Try candidates of every row, and write the winners.

    The exit status is that of ``compare``, but 0 where every row has a winner: a candidate whose
    training failed is one that lost.

    Args:
        search: space and number of candidates.
        comparison: rows and data; its first seed is that of the search, too.
        settings: shared by all trainings.
        command: as the user gave it, for the report.

    Raises:
        ValueError, OSError: bad input, in one sentence.
        ImportError: optuna is not installed.
    """
    studies = _Studies(search, comparison)

    def finish(out: Path, results: list[Result], _: Dataset) -> None:
        studies.tell(results, comparison)
        written = studies.write(out, results, command)
        print("\nwritten: " + ", ".join(map(str, written)))

    trainings = [parse(label) for label in studies.candidates]
    settings = replace(settings, split="valid")
    status = run_rows(trainings, comparison, settings, command, finish)
    return 0 if status == 1 and len(studies.winners()) == len(studies.studies) else status


class _Studies:
    """One study of optuna a row; all of them draw the same numbers."""

    def __init__(self, search: Search, comparison: Comparison) -> None:
        self.optuna = optional("optuna", "tune")
        self.optuna.logging.set_verbosity(logging.WARNING)
        space = dict(map(self._dimension, search.space))
        self.candidates: dict[str, tuple[str, int]] = {}  # row and number, by the label
        self.chosen: dict[str, dict[str, str]] = {}  # what the search set, by the label
        self.studies: dict[str, Any] = {}
        self.trials: dict[str, Any] = {}  # by the label
        for row in comparison.trainings():
            sampler = self.optuna.samplers.RandomSampler(seed=comparison.first_seed)
            study = self.optuna.create_study(sampler=sampler, direction="maximize")
            self.studies[row.label] = study
            for number in range(search.trials):
                trial = study.ask(space)  # all of the space, so that rows stay in step
                texts = _set(row, trial.params)
                label = _with(row, texts)
                self.chosen[label] = texts
                self.candidates.setdefault(label, (row.label, number))
                self.trials.setdefault(label, trial)

    def _dimension(self, text: str) -> tuple[str, Any]:
        """An option and its distribution."""
        name, equals, values = text.partition("=")
        if name not in options_of(Training) or not equals or not values:
            raise ValueError(
                f"--space must hold options of a row such as lr=0.001~0.01 or dropout=0|0.1, got "
                f"{text!r}"
            )
        kinds = self.optuna.distributions
        if "~" not in values:
            return name, kinds.CategoricalDistribution(values.split("|"))
        whole = kind_of(options_of(Training)[name])[0] is int
        try:
            low, high = map(int if whole else float, values.split("~"))
            if not 0 < low < high < math.inf:
                raise ValueError
        except ValueError:
            numbers = " of whole numbers" if whole else ""
            raise ValueError(
                f"--space {name} must be low~high{numbers} with 0 < low < high, got {values}"
            ) from None
        return name, (kinds.IntDistribution if whole else kinds.FloatDistribution)(
            low, high, log=True
        )

    def tell(self, results: list[Result], comparison: Comparison) -> None:
        """Give the studies their values: the mean bound over seeds."""
        seeds = range(comparison.first_seed, comparison.first_seed + comparison.seeds)
        for label, trial in self.trials.items():
            row, _ = self.candidates[label]
            bounds = [_bound(r) for r in results if r["row"] == label and r["seed"] in seeds]
            if len(bounds) == comparison.seeds:
                trial.set_user_attr("row", label)
                if math.isfinite(mean := sum(bounds) / len(bounds)):  # else it wins nothing
                    self.studies[row].tell(trial, mean)

    def winners(self) -> dict[str, Any]:
        """The best trial of each row that has one."""
        return {
            row: study.best_trial
            for row, study in self.studies.items()
            if any(trial.value is not None for trial in study.trials)
        }

    def write(self, out: Path, results: list[Result], command: str) -> list[Path]:
        """All candidates as CSV, the winners as a table and as rows for ``avrnn compare``."""
        records = self._records(results)
        write_csv(out / "candidates.csv", records)
        winners = self.winners()
        lines = [
            (
                f"`{best.user_attrs['row']}`",
                f"{best.value:.3f}",
                f"{median([r['validation'] for r in records if r['row'] == row]):.3f}",
                len({r["candidate"] for r in records if r["row"] == row}),
            )
            for row, best in winners.items()
        ]
        head = ["winner of each row", "validation bound", "median of the row", "candidates"]
        without = [row for row in self.studies if row not in winners]
        notes = [f"No candidate of `{row}` has a bound." for row in without]
        notes.append(f"Made by `{command}`.")
        text = markdown(head, lines) + "\n\n" + "\n".join(f"* {note}" for note in notes)
        print(text)
        write_text(out / "table.md", text + "\n")
        rows = "".join(f"{best.user_attrs['row']}\n" for best in winners.values())
        write_text(out / "rows.txt", rows)
        return [out / "candidates.csv", out / "table.md", out / "rows.txt"]

    def _records(self, results: list[Result]) -> list[dict[str, Any]]:
        """One line for each training."""
        return [
            {
                "row": row,
                "candidate": number,
                "seed": r["seed"],
                **self.chosen[label],
                "validation": _bound(r),
                "best_step": r.get("best_step"),
                "still_rising": r.get("still_rising"),
                "clipped_share": r.get("clipped_share"),
                "seconds": r.get("seconds"),
                "commit": r["commit"],
                "written": label,
            }
            for label, (row, number) in self.candidates.items()
            for r in results
            if r["row"] == label
        ]


def _set(row: Training, drawn: Mapping[str, Any]) -> dict[str, str]:
    """Of the options drawn, those that the search may set and that have an effect together."""
    texts = {name: _text(value) for name, value in drawn.items() if _applies(row, name)}
    varied = vary(row, _pairs(texts))
    return {name: text for name, text in texts.items() if not lacking(varied, name)}


def _applies(row: Training, name: str) -> bool:
    """Whether the search may set this option of a row."""
    if name in ("prior", "guide", "cell") and name not in OWN[row.model]:
        return False
    if name == "guide" and ROWS[row.label.partition(":")[0]].guide is not None:
        return False  # its name says which
    if name == "kl" and not isinstance(row.kl, tuple):
        return False  # a row that has no ramp by its name has none to tune
    return name not in set_by(row)


def _text(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _with(row: Training, options: Mapping[str, str]) -> str:
    """The row with further options, in the notation."""
    pairs = _pairs(options)
    return row.label + ("," if ":" in row.label else ":") * bool(pairs) + pairs


def _pairs(options: Mapping[str, str]) -> str:
    return ",".join(f"{name}={text}" for name, text in options.items())


def _bound(result: Result) -> float:
    return -math.inf if result["error"] else validation_bound(result)
