"""Does the suite notice a fault? Plant each fault in a copy of the code and run its tests.

    python tests/mutations/run.py                       # all faults, one process a core
    python tests/mutations/run.py adversarial --jobs 1  # those whose file or name has this text

A fault is caught if its tests fail, which pass without it. Survivors are printed last; the exit
status is 1 where one survives that is not named as equivalent: a change that no value can show.
The run is no part of the suite; it takes about 15 seconds a fault on one core.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.mutations.fault import Fault  # noqa: E402


def faults() -> list[Fault]:
    """All lists: files ``faults_*.py`` next to this one, each with ``FAULTS``."""
    paths = sorted(Path(__file__).parent.glob("faults_*.py"))
    return [f for path in paths for f in import_module(f"tests.mutations.{path.stem}").FAULTS]


def red(chosen: list[Fault], jobs: int) -> bool:
    """Whether a test of theirs fails without any fault, and so would notice none."""
    tests = sorted({test for fault in chosen for test in fault.tests})
    files = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in files or test.partition("::")[0] not in files]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *tests], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        print(done.stdout[-3000:])
    return done.returncode != 0


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
    path.write_text(path.read_text().replace(fault.old, fault.new))


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
    if not chosen:
        parser.error(f"no fault has {args.only!r} in its file or name")
    stale = [f for f in chosen if (ROOT / f.path).read_text().count(f.old) != 1]
    for fault in stale:
        print(f"stale, {fault.old!r} must stand once: {fault.path}: {fault.name}")
    if stale:
        return 2
    print(f"{len(chosen)} faults; their tests on the code without them first", flush=True)
    if red(chosen, args.jobs):
        print("tests fail without any fault: mend them first")
        return 2
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
