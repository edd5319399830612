"""Every example runs as from the command line, in an empty folder, and is short to read."""

import json
import multiprocessing
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "examples").glob("*.py"))
STUDIES = sorted((ROOT / "examples" / "studies").glob("*.py"))
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["pyro_avrnn.cli", "matplotlib.figure"])
RUN = [*LESSONS, *(path for path in STUDIES if "__main__" in path.read_text())]


def test_four_examples_are_numbered_in_the_order_of_reading() -> None:
    assert [path.name[:2] for path in LESSONS] == ["1_", "2_", "3_", "4_"]
    assert len(RUN) > len(LESSONS)


@pytest.mark.parametrize("path", [*LESSONS, *STUDIES], ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 80 if path in LESSONS else lines < 300


class Done(NamedTuple):
    """How an example ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def start(path: Path, folder: Path, *arguments: str) -> Done:
    """Run an example in this folder, in a new process in which the libraries are loaded."""
    streams = [folder / "stdout.txt", folder / "stderr.txt"]
    process = FRESH.Process(target=_example, args=(path, folder, arguments, streams))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{path.name} has not ended within five minutes")
    printed = [stream.read_text() for stream in streams]
    for stream in streams:
        stream.unlink()
    return Done(process.exitcode, *printed)


def _example(path: Path, folder: Path, arguments: tuple[str, ...], streams: list[Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        with stream.open("w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.parent)]
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    runpy.run_path(str(path), run_name="__main__")


def run(path: Path, folder: Path, *arguments: str) -> str:
    """Run an example that must succeed; return what it prints."""
    done = start(path, folder, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    assert run(path, tmp_path, "--smoke").strip()


def test_the_last_example_opens_the_model_of_the_first(tmp_path: Path) -> None:
    first, *_, last = LESSONS
    missing = start(last, tmp_path)
    assert missing.returncode == 2 and f"run examples/{first.name} first" in missing.stderr
    run(first, tmp_path, "--steps", "1")
    assert "90 % interval" in run(last, tmp_path)


def test_free_runs_are_judged_by_what_the_judge_has_not_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    from free_running import distance, hear, told_apart  # type: ignore[import-not-found]

    random = np.random.default_rng(0)

    def noise(colour: float = 0.0, size: float = 0.1, count: int = 40) -> list[np.ndarray]:
        waves = size * random.normal(size=(count, 16_000))
        waves[:, 1:] += colour * waves[:, :-1]
        return list(waves)

    known, asked, alike, coloured, loud = (
        hear(waves, 16_000)
        for waves in (noise(), noise(), noise(), noise(0.5), [2 * w for w in noise()])
    )
    assert told_apart((known, coloured), (asked, hear(noise(0.5), 16_000))) > 0.95
    fresh = told_apart((known, alike), (asked, hear(noise(), 16_000)))
    assert abs(fresh - 0.5) < 0.2  # 80 windows each: 4 standard errors
    assert told_apart((known, alike), (known, alike)) > 0.85  # a judge of what it was fitted on
    assert distance(asked, loud) == pytest.approx(20 * np.log10(2), abs=0.2)
    assert distance(asked, known) < 0.5  # 5.6 dB of a bin in one piece, by 1,240 pieces: 0.22


def test_the_grid_of_swaps_keeps_what_is_done(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).normal(size=(20, 5, 3)))
    parts = ["--priors", "standard", "flow", "--guides", "filtering", "residual"]
    given = ["--data", "own.npz", "--steps", "2", *parts, "--out", "grid"]
    path = ROOT / "examples" / "studies" / "swap_guides_and_priors.py"
    first, results = run(path, tmp_path, *given), tmp_path / "grid" / "results.json"
    written = results.read_text()
    lines = [line for line in first.splitlines() if line.startswith(("| standard", "| flow"))]
    assert len(lines) == 4 and [" - " in line for line in lines] == [False, False, False, True]
    assert "corrects the prior's mean" in first and len(json.loads(written)) == 3
    assert run(path, tmp_path, *given) == first
    assert results.read_text() == written  # seconds and all: nothing was trained again
