"""A comparison that is ended from outside leaves no process, no torn file, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.files import load_plain
from pyro_avrnn.cli import main

ROOT = Path(__file__).parents[2]
# without pictures, which take a third of the time, and which other tests look at
COMMAND = """
from pyro_avrnn.cli import main, report
report.illustrate = lambda *_: []
raise SystemExit(main())
"""
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
EVERY_DAY = {(signal.SIGTERM, "parent", 2), (signal.SIGKILL, "parent", 2)}
ENDINGS = [
    pytest.param(*case, marks=[] if case in EVERY_DAY else pytest.mark.slow)
    for case in product(SIGNALS, ("parent", "group"), (1, 2))
]


COMPARE = "compare --data waves.npz --rows rnn elbo --steps 200 --validate-every 20 --h-dim 4"
SIZES = "--z-dim 2 --particles 25 --batch-size 4"


def start(folder: Path, out: str, *more: str, jobs: int = 2) -> subprocess.Popen[str]:
    command = [*COMPARE.split(), *SIZES.split(), "--out", out, "--jobs", str(jobs)]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *command, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=240)
    return process.returncode, said


def gone(group: int) -> bool:
    """Whether no process is left within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def results(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "command", "commit")} for r in rows
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data."""
    x = np.random.default_rng(0).normal(size=(20, 8, 2)).cumsum(axis=1)
    np.savez(tmp_path / "waves.npz", x=x)
    return tmp_path


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize(("ending", "whom", "jobs"), ENDINGS, ids=str)
def test_a_comparison_that_is_ended_goes_on(
    ending: signal.Signals,
    whom: str,
    jobs: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = f"{ending.name}-{whom}-{jobs}"
    process = start(folder, out, jobs=jobs)
    deadline = time.monotonic() + 120
    while not list((folder / out).glob("rows/*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.05)
    (os.killpg if whom == "group" else os.kill)(process.pid, ending)
    status, said = finish(process)
    assert gone(process.pid)
    for path in (folder / out).rglob("*.pt"):
        load_plain(path)  # whole
    for path in (folder / out).rglob("*.json"):
        json.loads(path.read_text())
    if ending is not signal.SIGKILL:
        assert status == 130 and "--resume goes on from there" in said and "Traceback" not in said
        assert "leaked" not in said
    status, said = finish(start(folder, out, "--resume"))
    assert status == 0, said
    monkeypatch.chdir(folder)
    assert main([*COMPARE.split(), *SIZES.split(), "--out", "whole"]) == 0
    assert results(folder / out) == results(folder / "whole")
    left = [p.name for p in (folder / out).rglob("*") if p.name == "checkpoint.pt"]
    assert not left


def test_two_comparisons_in_one_folder(folder: Path) -> None:
    first = start(folder, "shared")
    deadline = time.monotonic() + 120
    while not list((folder / "shared").glob("rows/*")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    status, said = finish(start(folder, "shared", "--resume"))
    assert status == 2 and "is in use by another comparison" in said
    assert finish(first)[0] == 0
    status, said = finish(start(folder, "shared"))
    assert status == 2 and "go on with it by --resume, start anew by --overwrite" in said


@pytest.mark.slow
def test_a_training_that_fails_ends_the_others(folder: Path) -> None:
    (folder / "failing" / "rows").mkdir(parents=True)
    (folder / "failing" / "rows" / "elbo-seed0").touch()  # where a folder must be
    process = start(folder, "failing", "--steps", "100000")
    status, said = finish(process)
    assert status == 2 and "File exists" in said.splitlines()[-1] and "Traceback" not in said
    assert gone(process.pid)
