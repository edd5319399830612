"""The limits of the house: sizes of files and functions, parameters of ``fit``, tracked files.

``python tests/unit/test_house.py [ROOT]`` prints all figures of a checkout, among them some that
have no limit. The packages are ``pyro_avrnn`` and ``inference``; the engine (``pyro_avrnn/engine``
and ``pyro_avrnn/products.py``) is counted apart.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pyro_avrnn", "inference")
ENGINE = ("pyro_avrnn/engine/", "pyro_avrnn/products.py")
RESULTS = "examples/results/"
FILE_LIMIT, FUNCTION_LIMIT, PASSAGE = 300, 40, 6
MEGABYTE = 1_000_000
#: files outside the engine that may have over 300 lines, at most 8, each with its reason
LONG_FILES = {
    "inference/adversarial.py": "one class: what a critic is shown, learns, and is used for",
    "inference/objectives.py": "the one base of all losses, and three losses told together",
    "inference/training.py": "one training loop, half of the file its documentation",
    "pyro_avrnn/recipes/papers.py": "the table a reader looks for: ten papers, one function each",
    "pyro_avrnn/rollout.py": "one algorithm: draw along the guide, score all steps at once",
    "pyro_avrnn/sequence.py": "the contract of models and guides, all Pyro sites in one place",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Passage(NamedTuple):
    """Lines that stand in two places."""

    first: str
    again: str
    length: int


@dataclass(frozen=True)
class House:
    """Figures of a checkout, read from its source."""

    root: Path

    @cached_property
    def texts(self) -> dict[str, str]:
        """Source by path."""
        files = (path for name in PACKAGES for path in sorted((self.root / name).rglob("*.py")))
        return {path.relative_to(self.root).as_posix(): path.read_text() for path in files}

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Syntax tree by path."""
        return {path: ast.parse(text) for path, text in self.texts.items()}

    @cached_property
    def lines(self) -> dict[str, int]:
        """Number of lines by path."""
        return {path: len(text.splitlines()) for path, text in self.texts.items()}

    def long_files(self) -> dict[str, int]:
        """Files over the limit, the longest first."""
        return _beyond(self.lines, FILE_LIMIT)

    def functions(self) -> dict[str, int]:
        """Lines of every function and method, from ``def`` to its end, without the docstring."""
        found = {}
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    assert node.end_lineno is not None
                    documented = ast.get_docstring(node) is not None
                    first = node.body[0]
                    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                    length = node.end_lineno - node.lineno + 1 - docstring
                    found[f"{path}:{node.lineno} {node.name}"] = length
        return found

    def long_functions(self) -> dict[str, int]:
        """Functions over the limit, the longest first."""
        return _beyond(self.functions(), FUNCTION_LIMIT)

    def parameters(self, function: str) -> int:
        """Number of parameters of a function of ``inference``."""
        for path, tree in self.trees.items():
            for node in tree.body:
                if path.startswith("inference/") and getattr(node, "name", "") == function:
                    assert isinstance(node, Function)
                    return len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        raise LookupError(f"inference has no function {function}")

    def anys(self) -> dict[str, list[str]]:
        """Annotations that mention Any, of public functions, methods and class fields, by path."""
        found: dict[str, list[str]] = {}
        for path, tree in self.trees.items():
            named = [
                f"{line} {name}: {ast.unparse(annotation)}"
                for line, name, annotation in _annotations(tree, "")
                if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(annotation))
            ]
            if named:
                found[path] = named
        return found

    def passages(self, *, signatures: bool) -> list[Passage]:
        """Passages of six lines or more that stand twice.

        Lines are compared without their indentation; blank lines, comments and imports do not
        count, lines of a ``def`` with its parameters only with ``signatures``. A passage that
        stands n times is reported n - 1 times, with the place where it stands first.
        """
        first: dict[tuple[str, ...], tuple[str, int]] = {}
        found: list[Passage] = []
        kept = {
            path: list(_telling_lines(text, self.trees[path], signatures))
            for path, text in self.texts.items()
        }
        for path, lines in kept.items():
            running: tuple[str, int] | None = None  # where this passage would go on
            for i in range(len(lines) - PASSAGE + 1):
                window = tuple(line for _, line in lines[i : i + PASSAGE])
                other, j = first.setdefault(window, (path, i))
                if (other, j) == (path, i):
                    running = None
                    continue
                if running == (other, j):
                    found[-1] = found[-1]._replace(length=found[-1].length + 1)
                else:
                    places = f"{other}:{kept[other][j][0]}", f"{path}:{lines[i][0]}"
                    found.append(Passage(*places, PASSAGE))
                running = (other, j + 1)
        return found

    def tracked(self) -> dict[str, int]:
        """Size in bytes of every file that git tracks, by path."""
        command = ["git", "-C", str(self.root), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        paths = [self.root / name for name in listed.split("\0") if name]
        return {
            path.relative_to(self.root).as_posix(): path.stat().st_size
            for path in paths
            if path.is_file()
        }

    def report(self) -> str:
        """All figures, with the places that a reader would look at."""
        long_functions = self.long_functions()
        anys = self.anys()
        passages = self.passages(signatures=False)
        tracked = self.tracked()
        results = sum(size for path, size in tracked.items() if path.startswith(RESULTS))
        return "\n".join(
            [
                *(f"lines of {name}: {_both(_inside(self.lines, name))}" for name in PACKAGES),
                f"lines of both: {_both(self.lines)}",
                f"files over {FILE_LIMIT} lines: {_count(self.long_files())}",
                *_listed(self.long_files()),
                f"functions over {FUNCTION_LIMIT} lines: {_count(long_functions)}",
                *_listed(long_functions),
                f"median lines of a function: {median(self.functions().values()):g}",
                f"parameters of fit: {self.parameters('fit')}",
                f"Any in public signatures: {_both({path: len(n) for path, n in anys.items()})}",
                f"passages of {PASSAGE} lines that stand twice: {len(passages)}, with parameter "
                f"lists {len(self.passages(signatures=True))}",
                *(f"    {p.length:4} {p.first} and {p.again}" for p in passages),
                f"tracked files over 1 MB: {len(_beyond(tracked, MEGABYTE))}",
                *_listed(_beyond(tracked, MEGABYTE)),
                f"{RESULTS}: {results / MEGABYTE:.2f} MB",
            ]
        )


def _beyond(sizes: dict[str, int], limit: int) -> dict[str, int]:
    beyond = {name: size for name, size in sizes.items() if size > limit}
    return dict(sorted(beyond.items(), key=lambda item: -item[1]))


def _inside(sizes: dict[str, int], package: str) -> dict[str, int]:
    return {path: size for path, size in sizes.items() if path.startswith(f"{package}/")}


def _outside_engine(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if not name.startswith(ENGINE)}


def _both(sizes: dict[str, int]) -> str:
    return f"{sum(sizes.values())}, without engine {sum(_outside_engine(sizes).values())}"


def _count(sizes: dict[str, int]) -> str:
    return f"{len(sizes)}, without engine {len(_outside_engine(sizes))}"


def _listed(sizes: dict[str, int]) -> list[str]:
    return [f"    {size:4} {name}" for name, size in sizes.items()]


def _annotations(
    tree: ast.Module | ast.ClassDef, owner: str
) -> Iterator[tuple[int, str, ast.expr]]:
    """Line, name and annotation of what the public part of a module or class declares."""
    for node in tree.body:
        name = getattr(node, "name", getattr(getattr(node, "target", None), "id", ""))
        if name.startswith("_") and not (name.startswith("__") and name.endswith("__")):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _annotations(node, f"{owner}{name}.")
        elif isinstance(node, ast.AnnAssign):
            yield node.lineno, f"{owner}{name}", node.annotation
        elif isinstance(node, Function):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            for one in [*given, *(x for x in (a.vararg, a.kwarg) if x is not None)]:
                if one.annotation is not None:
                    yield one.lineno, f"{owner}{name}({one.arg})", one.annotation
            if node.returns is not None:
                yield node.lineno, f"{owner}{name}() ->", node.returns


def _telling_lines(text: str, tree: ast.Module, signatures: bool) -> Iterator[tuple[int, str]]:
    """Number and text of the lines that :meth:`House.passages` compares."""
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, Function) and not signatures:
            left_out.update(range(node.lineno, node.body[0].lineno))
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and number not in left_out:
            yield number, stripped


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


@pytest.fixture(scope="module")
def tracked(house: House) -> dict[str, int]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of tracked files")
    return house.tracked()


def test_long_files_are_few_and_each_has_its_reason(house: House) -> None:
    long = _outside_engine(house.long_files())
    assert long.keys() <= LONG_FILES.keys(), (
        f"a file has over {FILE_LIMIT} lines; cut it, or give its reason in LONG_FILES: {long}"
    )
    assert len(LONG_FILES) <= 8
    assert LONG_FILES.keys() <= house.lines.keys()


def test_functions_fit_a_screen(house: House) -> None:
    long = house.long_functions()
    assert len(long) <= 12, long
    assert median(house.functions().values()) < 9


def test_fit_has_few_parameters(house: House) -> None:
    assert house.parameters("fit") <= 14


def test_no_passage_stands_twice(house: House) -> None:
    assert house.passages(signatures=False) == []


def test_tracked_files_are_small(tracked: dict[str, int]) -> None:
    assert not _beyond(tracked, MEGABYTE)
    assert sum(size for path, size in tracked.items() if path.startswith(RESULTS)) <= MEGABYTE


@pytest.fixture
def built(tmp_path: Path) -> House:
    """A house of two files, to count in."""
    body = "".join(f"    a{i} = {i}\n" for i in range(7))
    (tmp_path / "inference").mkdir()
    (tmp_path / "pyro_avrnn" / "engine").mkdir(parents=True)
    (tmp_path / "inference" / "a.py").write_text(
        "from typing import Any\n\n"
        'def fit(a: Any, *, b: list[Any], c: int) -> Any:\n    """One.\n\n    Two.\n    """\n'
        f"{body}\n\ndef _private(a: Any) -> None:\n    pass\n"
    )
    other = f"def same(\n    d: int,\n) -> None:\n{body}    # a comment\n"
    (tmp_path / "pyro_avrnn" / "engine" / "b.py").write_text(other + "    # more\n" * 300)
    return House(tmp_path)


def test_the_figures_count_what_they_say(built: House) -> None:
    assert [*built.functions().values()] == [3 + 7, 1 + 7, 2]
    assert [*built.long_files()] == ["pyro_avrnn/engine/b.py"]
    assert not _outside_engine(built.long_files())
    assert built.parameters("fit") == 3
    assert [len(found) for found in built.anys().values()] == [3]


def test_a_planted_passage_is_found(built: House) -> None:
    found = built.passages(signatures=False)
    assert found[0] == Passage("pyro_avrnn/engine/b.py:4", "inference/a.py:8", 7)


if __name__ == "__main__":
    print(House(Path(sys.argv[1]) if sys.argv[1:] else ROOT).report())
