"""The output folder of ``avrnn compare``: one owner, and what an earlier comparison left there."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pyro_avrnn.cli.runs import Result, row_folder
from pyro_avrnn.cli.settings import Settings

#: the files that a report writes next to results.json
DERIVED = (
    *("table.md", "learning.md", "metrics.csv", "posterior.nc"),
    *("learning_curves.png", "critic_curves.png", "rate.png"),
    *("sequences.png", "posterior.png", "filter.png"),
    *("candidates.csv", "rows.txt"),  # of a search
)


def check_writable(folder: Path) -> None:
    """Make the folder, or say in one sentence that nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out {folder} is not a folder that can be written to ({error.strerror}); "
            "give another one"
        ) from error


def resumed(out: Path, facts: dict[str, Any]) -> list[Result]:
    """Finished trainings in the folder, if all of them share these facts.

    Raises:
        ValueError: a file of another kind, or trainings from other data or with other settings.
    """
    path, begun = out / "results.json", out / "rows" / "settings.json"
    reading, here = path, json.loads(json.dumps(facts))
    try:
        earlier = json.loads(path.read_text()) if path.is_file() else []
        finished = [r for r in earlier if not r["error"]]
        others = [r["row"] for r in finished if not _agree(r, here)]
        kept = [r for r in finished if row_folder(out, r["row"], r["seed"]).is_dir()]
        reading = begun
        if begun.is_file() and not _agree(json.loads(begun.read_text()), here):
            others.append("one that was begun")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{reading} is not a results file of this command; remove it or leave out --resume"
        ) from error
    if others:
        raise ValueError(
            f"--resume: {path} holds row {others[0]!r} made from other data or with other "
            "settings; give them again, or another --out"
        )
    return kept


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Hold the folder; the lock of a process that has died is free."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(
            f"--out {out} is in use by another comparison; wait for it, or give another folder"
        ) from None
    try:
        for path in out.glob("rows/*/.*.tmp"):  # of a process that was killed as it wrote
            path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def emptied(out: Path, overwrite: bool) -> list[Result]:
    """No results; those of an earlier comparison are set aside if the user says so.

    Raises:
        ValueError: the folder holds results, or trainings that were begun.
    """
    results, begun = out / "results.json", list((out / "rows").glob("*/checkpoint.pt"))
    if not (results.is_file() or begun):
        return []
    if not overwrite:
        raise ValueError(
            f"--out {out} holds an earlier comparison; go on with it by --resume, start anew by "
            "--overwrite, or give another folder"
        )
    if results.is_file():
        results.replace(out / "results.previous.json")
    for path in (*begun, *(out / name for name in DERIVED)):
        path.unlink(missing_ok=True)
    return []


def _agree(facts: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether earlier facts are those of this command; older files may lack some of them."""
    settings = asdict(Settings(**facts["settings"]))
    completed = {"reader": here["reader"], **facts, "settings": settings}
    return all(completed[name] == value for name, value in here.items())
