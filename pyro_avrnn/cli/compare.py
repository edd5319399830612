"""``avrnn compare``: train several rows with several seeds side by side, then report."""

import json
import multiprocessing
import os
import queue
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from inference import seeded
from pyro_avrnn import data
from pyro_avrnn.cli import report
from pyro_avrnn.cli.rows import Row
from pyro_avrnn.cli.runs import Settings, build, row_folder, run, write_json

_state: dict[str, Any] = {}  # of a worker process: its data and where to report progress


def compare(
    source: str,
    rows: list[Row],
    seeds: list[int],
    settings: Settings,
    out: Path,
    *,
    options: dict[str, Any],
    jobs: int,
    resume: bool,
    command: str,
) -> int:
    """Train and evaluate every row with every seed, write ``out``, print one table.

    Args:
        source: what ``data.load`` takes.
        rows: trainings to compare.
        seeds: each row is trained once with each.
        settings: shared by all rows.
        out: folder for results; made if absent.
        options: of ``data.load``.
        jobs: trainings at the same time, one thread each.
        resume: keep what ``out/results.json`` has, made from this data with these settings;
            without it, an earlier file is set aside as ``results.previous.json``.
        command: as the user gave it, for the report.

    Returns:
        The exit status: 0, or 1 if a training stopped early.

    Raises:
        ValueError, OSError: bad input, in one sentence.
    """
    dataset = data.load(source, **options)
    with seeded(0):  # parts that do not go together are refused before anything is trained
        for row in rows:
            parts = build(row, dataset, settings)
            parts.recipe.model.check(dataset.train.x[:1], dataset.train.mask[:1])
    # what the densities depend on beside the model: every row carries it
    scale = {k: torch.as_tensor(getattr(dataset, k)).tolist() for k in ("mean", "std")}
    about = {
        "standardisation": scale,
        "min_scale": settings.min_scale if dataset.kind == "real" else None,
        "baseline_per_frame": data.independent_baseline(dataset),
        "command": command,
        "kind": dataset.kind,
    }
    writable(out)
    facts = {
        "data": dataset.name,
        "baseline_per_frame": about["baseline_per_frame"],
        "sequences": len(getattr(dataset, settings.split)),
        "reader": options,
        "settings": asdict(settings),
    }
    about["reader"] = options
    results = _kept(out, facts) if resume else []
    if not resume:
        if (out / "results.json").is_file():
            (out / "results.json").replace(out / "results.previous.json")
        for begun in (out / "rows").glob("*/checkpoint.pt"):
            begun.unlink()
    write_json(_facts_path(out), facts)
    done = {(r["row"], r["seed"]) for r in results}
    todo = [(r, s) for r in rows for s in seeds if (r.label, s) not in done]
    labels = [*(row.label for row in rows), *(r["row"] for r in results)]
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}

    def write() -> None:
        results.sort(key=lambda r: (order[r["row"]], r["seed"]))
        write_json(out / "results.json", results)

    try:
        for result in _train(todo, source, options, settings, out, jobs, resume):
            results.append(result | about)
            write()
    except KeyboardInterrupt:
        print(
            f"interrupted: {len(results)} finished trainings are in {out / 'results.json'}; "
            "the same command with --resume goes on from there",
            file=sys.stderr,
        )
        return 130
    write()
    report.write(out, results, dataset)
    stopped = [r for r in results if r["error"]]
    for r in stopped:
        print(f"{r['row']}, seed {r['seed']}: {r['error']}", file=sys.stderr)
    return 1 if stopped else 0


def writable(folder: Path) -> None:
    """Make the folder; one sentence if nothing can be written there.

    Raises:
        OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out {folder} is not a folder that can be written to ({error.strerror}); "
            "give another one"
        ) from error


def _facts_path(out: Path) -> Path:
    """Where it is noted what the trainings in ``out`` have in common, begun ones included."""
    (out / "rows").mkdir(exist_ok=True)
    return out / "rows" / "settings.json"


def _kept(out: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Finished rows of an earlier results.json, all made from this data with these settings."""
    path, begun = out / "results.json", _facts_path(out)
    same = json.loads(json.dumps(facts))
    at = path
    try:
        earlier = json.loads(path.read_text()) if path.is_file() else []
        earlier = [r for r in earlier if not r["error"]]
        kept = [_completed(r, same) for r in earlier]
        others = [r["row"] for r in kept if any(r[k] != same[k] for k in same)]
        places = [row_folder(out, r["row"], r["seed"]) for r in earlier]
        at = begun
        if begun.is_file() and _completed(json.loads(begun.read_text()), same) != same:
            others.append("one that was begun")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{at} is not a results file of this command; remove it or leave out --resume"
        ) from error
    if others:
        raise ValueError(
            f"--resume: {path} holds row {others[0]!r} made from other data or with other "
            "settings; give them again, or another --out"
        )
    return [r for r, place in zip(earlier, places, strict=True) if place.is_dir()]


def _completed(facts: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The same, with what a file older than a setting does not say."""
    settings = asdict(Settings(**facts["settings"]))
    return {"reader": here["reader"], **facts, "settings": settings}


def _train(
    todo: list[tuple[Row, int]],
    source: str,
    options: dict[str, Any],
    settings: Settings,
    out: Path,
    jobs: int,
    resume: bool,
) -> Iterator[dict[str, Any]]:
    """Results as they come, from worker processes of one thread each."""
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        ticks = manager.Queue()
        pool = ProcessPoolExecutor(
            min(jobs, len(todo)), context, _start_worker, (source, options, ticks)
        )
        bar = tqdm(total=len(todo) * settings.steps, unit="step", desc="training", smoothing=0.05)
        waiting: set[Future[dict[str, Any]]] = set()
        try:
            for row, seed in todo:
                folder = row_folder(out, row.label, seed)
                waiting.add(pool.submit(_work, row, seed, settings, folder, resume))
            while waiting:
                try:
                    bar.update(ticks.get(timeout=0.5))
                except queue.Empty:
                    pass
                ready = {future for future in waiting if future.done()}
                waiting -= ready
                for future in ready:
                    try:
                        result = future.result()
                    except BrokenProcessPool as error:
                        raise OSError(
                            "a training's process died, perhaps for want of memory; try --jobs 1 "
                            "or a smaller --batch-size; finished rows stay, use --resume"
                        ) from error
                    bar.set_postfix_str(_shown(result))
                    yield result
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()


def _shown(result: dict[str, Any]) -> str:
    """A finished training in a word, for the bar."""
    value = result["iwae_per_frame"]
    return (
        f"{result['row']} seed {result['seed']}: {'stopped' if value is None else f'{value:.3f}'}"
    )


def _start_worker(source: str, options: dict[str, Any], ticks: Any) -> None:
    torch.set_num_threads(1)  # small matrices: processes pay, threads do not
    os.environ["OMP_NUM_THREADS"] = "1"
    _state.update(data=data.load(source, **options), ticks=ticks)


def _work(row: Row, seed: int, settings: Settings, folder: Path, resume: bool) -> dict[str, Any]:
    pending = done = 0

    def progress(steps: int) -> None:
        nonlocal pending, done
        pending += steps
        done += steps
        if pending >= 10:  # a message a step would cost more than some steps
            _state["ticks"].put(pending)
            pending = 0

    result = run(row, seed, _state["data"], settings, folder, progress, resume)
    _state["ticks"].put(pending + settings.steps - done)
    return result
