"""Does the suite notice a fault? Plant each fault in a copy of the code and run its tests.

    python tests/mutations/run.py                       # all faults, one process a core
    python tests/mutations/run.py adversarial --jobs 1  # those whose file or name has this text

A fault is caught if its tests fail. Survivors are printed last; the exit status is 1 where one
survives that is not named as equivalent: a change that no value can show. The run is no part of
the suite; it takes about 15 seconds a fault on one core.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """A change of the code that some test must notice."""

    path: str  # of the file, from the root
    name: str  # in words
    old: str  # stands in the file once
    new: str
    tests: tuple[str, ...]  # files or node ids that are run, from the root
    equivalent: str = ""  # why no test can notice it, if so


def faults() -> list[Fault]:
    """All lists: files ``faults_*.py`` next to this one, each with ``FAULTS``."""
    sys.path.insert(0, str(ROOT))
    found: list[Fault] = []
    for path in sorted(Path(__file__).parent.glob("faults_*.py")):
        scope: dict[str, object] = {"Fault": Fault}
        exec(compile(path.read_text(), str(path), "exec"), scope)  # our own file
        found += scope["FAULTS"]  # type: ignore[arg-type]
    return found


def planted(fault: Fault, folder: Path) -> None:
    """Copy the code into a folder, with the fault."""
    for name in ("inference", "pyro_avrnn", "tests", "examples", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    path = folder / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.path}: {fault.old!r} stands {text.count(fault.old)} times")
    path.write_text(text.replace(fault.old, fault.new))


def caught(fault: Fault, limit: float = 300.0) -> tuple[bool, str]:
    """Whether a test fails, and the first that does."""
    with tempfile.TemporaryDirectory() as folder:
        planted(fault, Path(folder))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            done = subprocess.run(
                [*command, *fault.tests],
                cwd=folder,
                capture_output=True,
                text=True,
                env=environment,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return True, "time ran out"
        failed = [
            line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-800:]}"
            )
        return done.returncode == 1, failed[0].partition(" - ")[0] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="?", default="", help="text in the file or name of a fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    chosen = [f for f in faults() if args.only in f.path or args.only in f.name]
    found: dict[Fault, bool] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {pool.submit(caught, fault): fault for fault in chosen}
        for done in as_completed(waiting):
            fault, (noticed, by) = waiting[done], done.result()
            found[fault] = noticed
            mark = "caught  " if noticed else "SURVIVES"
            print(f"{mark} {fault.path}: {fault.name}  {by}", flush=True)
    real = [fault for fault in chosen if not fault.equivalent]
    survivors = [fault for fault in real if not found[fault]]
    for part in ("", "inference/adversarial.py", "inference/divergences.py"):
        of_part = [fault for fault in real if part in fault.path]
        if of_part:
            count = sum(found[fault] for fault in of_part)
            print(
                f"{part or 'all'}: {count} of {len(of_part)} caught ({count / len(of_part):.0%})"
            )
    for fault in chosen:
        if fault.equivalent:
            print(f"equivalent: {fault.path}: {fault.name}: {fault.equivalent}")
    for fault in survivors:
        print(f"survives: {fault.path}: {fault.name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
