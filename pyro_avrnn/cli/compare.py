"""``avrnn compare``: train several rows with several seeds side by side, then report."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inference import seeded
from inference.files import write_json
from pyro_avrnn import data
from pyro_avrnn.cli import report
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.folder import check_writable, emptied, owned, resumed
from pyro_avrnn.cli.parts import build
from pyro_avrnn.cli.runs import Result, Task, row_folder, run
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training
from pyro_avrnn.cli.workers import Progress, spread
from pyro_avrnn.data import Dataset

_FACTS = ("data", "baseline_per_frame", "sequences", "reader", "settings")  # the same to resume


def compare(comparison: Comparison, settings: Settings, command: str) -> int:
    """Train and evaluate every row with every seed, write the output folder, print one table.

    Arguments, status and errors are those of :func:`run_rows`.
    """
    return run_rows(comparison.trainings(), comparison, settings, command, report.write)


def run_rows(
    trainings: list[Training],
    comparison: Comparison,
    settings: Settings,
    command: str,
    finish: Callable[[Path, list[Result], Dataset], None],
) -> int:
    """Train and evaluate every row with every seed, and write the output folder.

    Args:
        trainings: the rows.
        comparison: on which data, and where the results go. With its ``overwrite``, earlier
            results are set aside as ``results.previous.json``.
        settings: shared by all trainings.
        command: as the user gave it, for the report.
        finish: writes what is derived from the results in the folder.

    Returns:
        The exit status: 0, 1 if a training stopped early, 130 if interrupted.

    Raises:
        ValueError, OSError: bad input, in one sentence.
    """
    if comparison.resume and comparison.overwrite:
        raise ValueError("--resume keeps what --overwrite starts anew; give one of them")
    out = comparison.out
    dataset = data.load(comparison.data, **comparison.reader_options(settings))
    _check_parts(trainings, dataset, settings)
    shared = _shared(comparison, settings, dataset, command)
    facts = {name: shared[name] for name in _FACTS}
    check_writable(out)
    with owned(out):
        results = resumed(out, facts) if comparison.resume else emptied(out, comparison.overwrite)
        (out / "rows").mkdir(exist_ok=True)
        write_json(out / "rows" / "settings.json", facts)
        return _run(trainings, comparison, settings, dataset, results, shared, finish)


def _run(
    trainings: list[Training],
    comparison: Comparison,
    settings: Settings,
    dataset: Dataset,
    results: list[Result],
    shared: dict[str, Any],
    finish: Callable[[Path, list[Result], Dataset], None],
) -> int:
    """Train what is missing, write each result as it comes, then the report."""
    out = comparison.out
    try:
        for result in train(_missing(trainings, comparison, results), comparison, settings):
            results.append(result | shared)
            _write(out, results, trainings)
            folder = row_folder(out, result["row"], result["seed"])
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    except KeyboardInterrupt:
        kept = f"{len(results)} finished trainings are in {out / 'results.json'}"
        print(
            f"interrupted: {kept if results else 'no training has finished'}; the same command "
            "with --resume goes on from there",
            file=sys.stderr,
        )
        return 130
    _write(out, results, trainings)
    try:
        finish(out, results, dataset)
    except Exception as error:  # noqa: BLE001 - whatever it is, the numbers are on disk
        raise ValueError(
            f"the report failed ({type(error).__name__}: {error}); all results are in "
            f"{out / 'results.json'}"
        ) from error
    stopped = [r for r in results if r["error"]]
    for r in stopped:
        print(f"{r['row']}, seed {r['seed']}: {r['error']}", file=sys.stderr)
    return 1 if stopped else 0


def _check_parts(trainings: list[Training], dataset: Dataset, settings: Settings) -> None:
    """Refuse parts that do not go together before anything is trained."""
    with seeded(0):
        for training in trainings:
            model = build(training, dataset, training.settings(settings)).recipe.model
            model.check(dataset.train.x[:1], dataset.train.mask[:1])


def _shared(
    comparison: Comparison, settings: Settings, dataset: Dataset, command: str
) -> dict[str, Any]:
    """What all entries of results.json have in common."""
    scale = {name: torch.as_tensor(getattr(dataset, name)).tolist() for name in ("mean", "std")}
    return {
        "data": dataset.name,
        "sequences": len(getattr(dataset, settings.split)),
        "settings": asdict(settings),
        "standardisation": scale,
        "min_scale": settings.min_scale if dataset.kind == "real" else None,
        "baseline_per_frame": data.independent_baseline(dataset),
        "command": command,
        "kind": dataset.kind,
        "reader": comparison.reader_options(settings),
        "flac_bits": data.flac_bits(dataset, settings.split) if dataset.bits == 16 else None,
    }


def _missing(
    trainings: list[Training], comparison: Comparison, results: list[Result]
) -> list[Task]:
    """Trainings and seeds that have no result."""
    done = {(r["row"], r["seed"]) for r in results}
    first = comparison.first_seed
    return [
        Task(training, seed, row_folder(comparison.out, training.label, seed))
        for training in trainings
        for seed in range(first, first + comparison.seeds)
        if (training.label, seed) not in done
    ]


def _write(out: Path, results: list[Result], trainings: list[Training]) -> None:
    """Write the results in the order of the trainings; earlier rows follow."""
    labels = list(dict.fromkeys([*(t.label for t in trainings), *(r["row"] for r in results)]))
    results.sort(key=lambda r: (labels.index(r["row"]), r["seed"]))
    write_json(out / "results.json", results)


def train(tasks: list[Task], comparison: Comparison, settings: Settings) -> Iterator[Result]:
    """Train in at most ``comparison.jobs`` processes; yield each result as soon as it is there.

    Raises:
        OSError: a process died.
    """
    yield from spread(
        partial(_work, settings=settings, resume=comparison.resume),
        tasks,
        jobs=comparison.jobs,
        source=comparison.data,
        reader=comparison.reader_options(settings),
        pieces=settings.steps,
        bar="training",
        unit="step",
        summary=summary,
    )


def _work(
    task: Task, dataset: Dataset, progress: Progress, *, settings: Settings, resume: bool
) -> Result:
    return run(task, dataset, settings, progress, resume)


def summary(result: Result) -> str:
    """A finished training in a few words, for the progress bar."""
    bound = result["iwae_per_frame"]
    shown = "stopped" if bound is None else f"{bound:.3f}"
    return f"{result['row']} seed {result['seed']}: {shown}"
