"""Does a change keep every number? Compute the same cases in two checkouts and compare them.

    python examples/studies/compare_commits.py v0.1.0          # a commit and the working tree
    python examples/studies/compare_commits.py before after    # two folders

Each checkout computes its cases (``commit_cases.py``, ``commit_measurements.py``) in a process of
its own, in float64 on one thread, both with the Python that runs this script. Compared are initial
parameters, draws, log-densities, losses, gradients, critics, filters, evaluations, generated
sequences and short trainings of about 170 calls of recipes.

Expect the largest relative difference of each kind for every case, 0 where the change moved no
arithmetic, and exit status 1 where one exceeds 1e-12, a value appears or disappears, or a
measurement fails. Takes 90 seconds on 2 cores; ``--only vrnn`` takes those of one recipe.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TOLERANCE = 1e-12
#: columns of the table: the first part of a value's name
KINDS = (
    *("initial", "draws", "densities", "loss", "gradient", "critic", "alternating"),
    *("filter", "evaluate", "generate", "fit"),
)
Found = dict[str, Tensor | str | None]


def difference(before: Tensor | str | None, after: Tensor | str | None) -> float:
    """Largest of |a - b| / (|b| + largest |b|) over the entries, infinite if not comparable.

    At most 1e-12 is the same as "rtol 1e-12, atol 1e-12 times the largest entry". NaN and
    infinities are equal to themselves.
    """
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return 0.0 if before is after is None else torch.inf
    if before.shape != after.shape or before.dtype != after.dtype:
        return torch.inf
    a, b = after.double(), before.double()
    moved = ~((a == b) | (a.isnan() & b.isnan()))
    if not bool(moved.any()):
        return 0.0
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_zeros(())
    ratio = ((a - b).abs() / (b.abs() + largest))[moved]
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def compare(before: dict[str, Found], after: dict[str, Found]) -> dict[str, dict[str, float]]:
    """Difference of every value of every case; infinite where one side lacks it or failed."""
    found: dict[str, dict[str, float]] = {}
    for case in before | after:
        old, new = before.get(case, {}), after.get(case, {})
        found[case] = {
            name: difference(old[name], new[name]) if name in old and name in new else torch.inf
            for name in old | new
        }
    return found


def lines(differences: dict[str, dict[str, float]]) -> str:
    """A line for each case, and the largest difference of each kind."""
    width = max(map(len, differences), default=0)
    rows = [f"{'case':{width}}  {'values':>6}" + "".join(f" {kind:>10}" for kind in KINDS)]
    for case, values in differences.items():
        cells = []
        for kind in KINDS:
            own = [d for name, d in values.items() if name.split("/")[0] == kind]
            cells.append(f" {max(own):>10.2g}" if own else f" {'-':>10}")
        rows.append(f"{case:{width}}  {len(values):>6}" + "".join(cells))
    return "\n".join(rows)


@contextmanager
def checkout(given: str) -> Iterator[Path]:
    """The folder given, or a worktree of the commit given, which is removed afterwards."""
    if Path(given).is_dir():
        yield Path(given).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        git = ["git", "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), given], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def start(tree: Path, out: Path, only: str) -> subprocess.Popen[bytes]:
    """The process that computes the cases of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--inside", str(tree), str(out)]
    return subprocess.Popen([*command, "--only", only], cwd=out.parent, env=environment)


def compute(tree: Path, out: Path, only: str) -> int:
    """Write the tensors of all chosen cases of this checkout to a file."""
    from commit_cases import recipes, table
    from commit_measurements import measure

    import inference

    for module in (inference, recipes):
        if tree not in Path(str(module.__file__)).parents:
            raise ImportError(f"{module.__name__} must come from {tree}, got {module.__file__}")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = {case.name: case for case in table()}
    torch.save({name: measure(c) for name, c in cases.items() if only in name}, out)
    return 0


def main() -> int:
    """Print the table and whatever differs; 1 if anything does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", nargs="?", default="HEAD", help="folder or commit (HEAD)")
    parser.add_argument("after", nargs="?", default=".", help="folder or commit (working tree)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="one case, packages with themselves")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # a process of start()
    arguments = parser.parse_args()
    if arguments.inside:
        return compute(arguments.inside, Path(arguments.before), arguments.only)
    if arguments.smoke:
        spec = find_spec("inference")
        assert spec is not None and spec.origin is not None
        arguments.before = arguments.after = str(Path(spec.origin).parents[1])
        arguments.only = "pixelcnn_vae"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = [stack.enter_context(checkout(t)) for t in (arguments.before, arguments.after)]
        files = [folder / "before.pt", folder / "after.pt"]
        running = [start(t, f, arguments.only) for t, f in zip(trees, files, strict=True)]
        if any([process.wait() for process in running]):
            return 1
        before, after = (torch.load(file, weights_only=True) for file in files)
    differences = compare(before, after)
    print(lines(differences))
    pairs = [(d, case, name) for case, ds in differences.items() for name, d in ds.items()]
    beyond = sorted((p for p in pairs if p[0] > TOLERANCE), key=lambda p: -p[0])
    for size, case, name in beyond[:40]:
        print(f"{size:.2g}  {case}  {name}")
        for text in {before.get(case, {}).get(name), after.get(case, {}).get(name)}:
            print(f"{text}\n" if isinstance(text, str) else "", end="")
    print(f"{len(differences)} cases, {len(pairs)} values, {len(beyond)} differ")
    return int(bool(beyond) or not pairs)


if __name__ == "__main__":
    sys.exit(main())
