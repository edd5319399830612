"""The pages hold what they say: code runs, commands and options exist, links lead somewhere.

Code runs page by page, the blocks of a page in order and in one namespace. To make it fast,
keyword arguments that say how much to do (``SMALL``) are lowered before a block runs, and
``vowels`` gives 16 series for each split. Everything else runs as it is printed.
"""

import ast
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyro_avrnn import data
from pyro_avrnn.cli import main
from pyro_avrnn.cli.rows import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("RESULTS", "CONTRIBUTING", "CHANGELOG"))]
#: the largest value that a keyword argument keeps
SMALL = {
    "steps": 4,
    "every": 2,
    "num_particles": 6,
    "fivo_particles": 6,
    "draws": 20,
    "num_simulations": 100,
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line and text of the page's blocks in this language."""
    text = page.read_text()
    return [
        (text[: match.start(2)].count("\n"), match[2])
        for match in BLOCK.finditer(text)
        if match[1] == language
    ]


def without_code(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


class _Smaller(ast.NodeTransformer):
    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        self.generic_visit(node)
        value = node.value
        if node.arg in SMALL and isinstance(value, ast.Constant) and isinstance(value.value, int):
            node.value = ast.copy_location(ast.Constant(min(value.value, SMALL[node.arg])), value)
        return node


def run(page: Path) -> dict[str, Any]:
    """Run all Python of a page; the namespace it leaves."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        tree = _Smaller().visit(ast.parse("\n" * line + text, name(page)))
        exec(compile(tree, str(page), "exec"), namespace)  # noqa: S102
    return namespace


@pytest.fixture
def few(single: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder to write to, and few vowels."""
    monkeypatch.chdir(tmp_path)
    full = data.vowels()

    def vowels() -> data.Dataset:
        short = {part: getattr(full, part).select(range(16)) for part in ("train", "valid")}
        return replace(full, **short, test=full.test.select(range(16)))

    monkeypatch.setattr(data, "vowels", vowels)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_code_of_a_page_runs(page: Path, few: None, capsys: pytest.CaptureFixture) -> None:
    run(page)


def test_pages_without_code_are_known() -> None:
    silent = {page.stem for page in PAGES if not blocks(page, "python")}
    assert silent == {"README", "command-line", "speed"}  # README: that of docs


def test_code_that_does_not_run_is_seen(tmp_path: Path, few: None) -> None:
    page = ROOT / "docs" / "absent.md"
    text = (
        "```python\nfrom pyro_avrnn import recipes\nrecipes.vrnn(12, 8, 64, prior='none')\n```\n"
    )
    copy = tmp_path / page.name
    copy.write_text(text)
    with pytest.raises(ValueError, match="prior"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        run(copy)


def test_amounts_are_lowered_and_nothing_else() -> None:
    tree = _Smaller().visit(ast.parse("fit(svi, steps=1500, seed=7, num_particles=2, every=None)"))
    assert ast.unparse(tree) == "fit(svi, steps=4, seed=7, num_particles=2, every=None)"


# commands


def commands(page: Path) -> Iterator[str]:
    """Shell lines of blocks, without comments, and inline code that is a command of ours."""
    for _, text in blocks(page, "sh"):
        for line in text.splitlines():
            yield re.split(r"\s#", line)[0].strip()
    for span in INLINE.findall(without_code(page)):
        yield " ".join(span.split())


def words(command: str) -> list[str]:
    """Split at spaces that are not quoted, quotes taken off."""
    return [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Options of each command of avrnn, as its help lists them."""
    found = {}
    for command in ("compare", "tune", "refine", "generate"):
        printed = io.StringIO()
        with redirect_stdout(printed), pytest.raises(SystemExit):
            main([command, "--help"])
        found[command] = set(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))
    return found


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_targets_of_make_exist(page: Path) -> None:
    for command in commands(page):
        given = [word for word in words(command) if "=" not in word]
        if given[:1] == ["make"]:
            assert set(given[1:]) <= targets(), command


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_options_and_rows_of_avrnn_exist(page: Path, options: dict[str, set[str]]) -> None:
    for command in commands(page):
        given = words(command)
        if given[:1] != ["avrnn"] or len(given) == 1:
            continue
        assert given[1] in options, command
        used = {word for word in given[2:] if word.startswith("--")}
        assert used <= options[given[1]], command
        rows = given[given.index("--rows") + 1 :] if "--rows" in given else []
        for row in rows:
            if row.startswith("--"):
                break
            if not row.startswith("@"):  # a file of rows
                parse(row)


def test_a_command_that_does_not_exist_is_seen(options: dict[str, set[str]]) -> None:
    assert words("avrnn compare --rows rnn 'joint:weight=0>30@0.5' --out a") == [
        *("avrnn", "compare", "--rows", "rnn", "joint:weight=0>30@0.5", "--out", "a")
    ]
    assert {"--rows", "--resume"} <= options["compare"] and "--row" in options["generate"]
    assert "--teach" not in options["compare"] and "deploy" not in targets()


# links


def anchors(page: Path) -> set[str]:
    """Of headings, as code hosts make them: lower case, no punctuation, dashes for spaces."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(without_code(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} links {target}"
        assert found.is_relative_to(ROOT), f"{name(page)} links {target}, outside the repository"
        if anchor:
            assert anchor in anchors(found), f"{name(page)} links {target}"


@pytest.mark.parametrize("page", LINKED[:-1], ids=name)
def test_scripts_that_are_named_exist(page: Path) -> None:
    for span in INLINE.findall(without_code(page)):
        for path in re.findall(r"(?:[\w.-]+/)+[\w-]+\.py\b", span):
            assert (ROOT / path).is_file(), f"{name(page)} names {path}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"({page.name})" in index, name(page)


# the README


def test_the_readme_can_be_read_to_its_end() -> None:
    assert len(PAGES[0].read_text().splitlines()) < 150


def table(page: Path) -> dict[str, list[str]]:
    """Rows of tables whose first cell is a training, by that cell; the first where several are."""
    found: dict[str, list[str]] = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and re.search(r"\d ± \d", line):
            found.setdefault(cells[0], cells[1:])
    return found


def test_the_numbers_of_the_readme_are_those_of_the_results() -> None:
    here, there = table(PAGES[0]), table(ROOT / "RESULTS.md")
    assert len(here) >= 8
    for training, cells in here.items():
        assert cells[1:] == there[training][:3], training
