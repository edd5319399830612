"""Every example runs from the command line, in an empty folder, and can be read at a sitting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_fewer_than_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 300


def run(path: Path, folder: Path, *arguments: str) -> str:
    """What an example prints when it is run in this folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(path), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    assert run(path, tmp_path, "--smoke").strip()


def test_the_grid_of_swaps_keeps_what_is_done(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).normal(size=(20, 5, 3)))
    parts = ["--priors", "standard", "flow", "--guides", "filtering", "residual"]
    given = ["--data", "own.npz", "--steps", "2", *parts, "--out", "grid"]
    path = ROOT / "examples" / "swap_guides_and_priors.py"
    first, results = run(path, tmp_path, *given), tmp_path / "grid" / "results.json"
    written = results.read_text()
    lines = [line for line in first.splitlines() if line.startswith(("| standard", "| flow"))]
    assert len(lines) == 4 and [" - " in line for line in lines] == [False, False, False, True]
    assert "corrects the prior's mean" in first and len(json.loads(written)) == 3
    assert run(path, tmp_path, *given) == first
    assert results.read_text() == written  # seconds and all: nothing was trained again
