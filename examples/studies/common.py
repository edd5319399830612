"""What the studies share: arguments, the usual training, parallel runs, tables, results."""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import pyro
import torch
from pyro.infer import SVI

from inference import (
    ELBO,
    AdaptiveClip,
    DegenerateWeightsError,
    History,
    LearningRate,
    NonFiniteLossError,
    Ramp,
    Validation,
    evaluate,
    fit,
    seeded,
)
from inference.files import write_text
from inference.objectives import Objective
from inference.protocols import Hook
from pyro_avrnn.cli import main as avrnn
from pyro_avrnn.cli.runs import commit
from pyro_avrnn.data import Batches, Dataset, Sequences
from pyro_avrnn.recipes import Recipe

Row = dict[str, Any]
Task, Result = TypeVar("Task"), TypeVar("Result")


def arguments(doc: str, out: str | None, steps: int | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options of every study.

    Args:
        doc: the study's docstring; its first line heads the help.
        out: default folder of the results; None if the study chooses it by other arguments.
        steps: default of ``--steps``, which is left out where this is None.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=out and Path(out), help="folder of the results"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="SVI steps of a training")
    return parser


def parse(parser: argparse.ArgumentParser, needed: str = "") -> argparse.Namespace:
    """Read the command line and make the output folder.

    With ``--smoke``, one seed of the first two rows is left.

    Args:
        parser: from :func:`arguments`.
        needed: the data without which only ``--smoke`` runs; empty if there are none.
    """
    args = parser.parse_args()
    if needed and args.data is None and not args.smoke:
        parser.error(f"{needed} is needed (or --smoke)")
    if args.smoke:
        args.seeds = args.jobs = 1
        if "rows" in args:
            args.rows = args.rows[:2]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


def train(
    recipe: Recipe,
    loss: Objective,
    data: Dataset,
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    lr_decay: bool = False,
    batch_size: int = 64,
    clip_norm: float | AdaptiveClip | None = AdaptiveClip(10.0),  # noqa: B008 - frozen
    validations: int = 20,
    num_particles: int = 16,
    hooks: Sequence[Hook] = (),
    title: str | None = None,
) -> History:
    """Train by Adam; keep the parameters with the best validation bound.

    Args:
        recipe: model and guide; they end up with the parameters of the best step.
        loss: what SVI minimises.
        data: its training and validation splits are used.
        steps: SVI steps.
        seed: of batches and draws.
        lr: learning rate.
        lr_decay: let the learning rate fall linearly to a tenth.
        batch_size: sequences per step.
        clip_norm: as of ``fit``.
        validations: how often the bound is computed.
        num_particles: of the validation bound.
        hooks: as of ``fit``.
        title: of the progress bar; None shows none.
    """
    validation = Validation(
        (data.valid.x, data.valid.mask),
        every=max(steps // validations, 1),
        num_particles=num_particles,
    )
    return fit(
        SVI(recipe.model, recipe.guide, pyro.optim.Adam({"lr": lr}), loss),
        Batches(data.train, batch_size, seed=seed),
        steps=steps,
        validation=validation,
        clip_norm=clip_norm,
        lr_schedule=LearningRate("linear", end=0.1) if lr_decay else None,
        hooks=hooks,
        keep=[] if recipe.critic is None else [recipe.critic],
        seed=seed,
        progress=False if title is None else title,
    )


def train_and_score(
    assemble: Callable[[], Recipe],
    data: Dataset,
    test: Sequences,
    *,
    steps: int,
    seed: int,
    validations: int,
    filtered: bool,
) -> Row:
    """Train by the annealed ELBO, then evaluate the best parameters.

    Args:
        assemble: makes model and guide, with parameters drawn from torch's global state.
        data: its training and validation splits are used.
        test: the sequences to score.
        steps, seed, validations: as for :func:`train`.
        filtered: also compute FIVO.

    Returns:
        All numbers of :func:`inference.evaluate`; ``error`` holds the reason where training or
        evaluation stopped early, and None otherwise.
    """
    with pyro.get_param_store().scope(), seeded(seed):
        r = assemble()
        row: Row = {"parameters": count_parameters(r), "commit": commit(), "error": None}
        loss = ELBO(kl_weight=Ramp(0, 1, over=0.5))
        particles = 64 if r.model.z_dim else 1  # without latents one is exact
        try:
            history = train(r, loss, data, steps=steps, seed=seed, validations=validations)
            row |= {"best_step": history.best_step, "seconds": history.seconds}
            found = evaluate(
                r.model,
                r.guide,
                test.x,
                test.mask,
                num_particles=particles,
                fivo_particles=particles if filtered else None,
                seed=seed,
            )
        except (NonFiniteLossError, DegenerateWeightsError) as error:
            return row | {"error": str(error)}
    return row | found.as_dict()


def count_parameters(recipe: Recipe) -> int:
    """Count the weights of model and guide."""
    return sum(p.numel() for part in (recipe.model, recipe.guide) for p in part.parameters())


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Iterator[Result]:
    """Yield results as they are finished, from ``jobs`` processes of one thread each."""
    if jobs == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            for future in as_completed([pool.submit(work, task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def compare(
    settings: Row, rows: Sequence[str], name: str, table: Callable[[list[Row]], str]
) -> int:
    """Run ``avrnn compare``, publish a table of its results, and generate from the best row.

    Args:
        settings: options of the command line, ``data`` and ``out`` among them.
        rows: the trainings, as ``--rows`` takes them.
        name: file name of the table.
        table: makes the table from the rows of ``results.json``.

    Returns:
        The exit status of the commands.
    """
    out = settings["out"]
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    status = avrnn(["compare", *given, "--lr-decay", "linear", "--resume", "--rows", *rows])
    if status > 1:  # 1: some training stopped early
        return status
    publish(out, name, table(json.loads((out / "results.json").read_text())))
    return max(status, avrnn(["generate", str(out), "--data", str(settings["data"])]))


def publish(out: Path, name: str, text: str, *others: str) -> None:
    """Print a table, write it to ``out``, and name the files that lie there."""
    write_text(out / name, text + "\n")
    print(f"\n{text}\n\nwritten to {out}: {', '.join([name, *others])}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Make a table in Markdown, its columns aligned."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def by_label(rows: Sequence[Row], key: str = "row") -> dict[str, list[Row]]:
    """Group the rows that have numbers by their label, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.get("error"):
            groups.setdefault(row[key], []).append(row)
    return groups


def mean(values: Sequence[float], digits: int = 2, spread: float | None = None) -> str:
    """Write the mean and, after "±", the standard deviation; of one value, ``spread``."""
    deviation = stdev(values) if len(values) > 1 else spread
    after = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{fmean(values):.{digits}f}{after}"
