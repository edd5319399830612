"""The tools that keep numbers from moving between commits, and results small."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "examples" / "studies"


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_planted_fault_is_the_one_difference(tmp_path: Path) -> None:
    for package in ("inference", "pyro_avrnn"):
        shutil.copytree(ROOT / package, tmp_path / package)
    with (tmp_path / "pyro_avrnn" / "generation.py").open("a") as file:
        file.write("_plain = generate\n\n\ndef generate(*args, **options):\n")
        file.write("    return _plain(*args, **options) * (1 + 1e-9)\n")
    command = [str(STUDIES / "compare_commits.py"), str(ROOT), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, "--only", "pixelcnn_vae"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stderr[-2000:]
    assert lines[-2] == "5e-10  pixelcnn_vae  generate/free" and lines[-1].endswith(" 1 differ")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.0 + 4e-6], 1e-6),
        ([1e-30, 2.0], [0.0, 2.0], 5e-31),
        ([torch.nan, torch.inf], [torch.nan, torch.inf], 0.0),
        ([torch.nan, 1.0], [1.0, 1.0], torch.inf),
        ([0.0], [1e-300], torch.inf),
        ([1.0], [1.0, 1.0], torch.inf),
    ],
)
def test_the_difference_is_relative_to_entry_and_tensor(
    before: list[float], after: list[float], expected: float
) -> None:
    found = load("compare_commits").difference(torch.tensor(before), torch.tensor(after))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_value_that_appears_is_a_difference() -> None:
    compare = load("compare_commits").compare
    one, none = {"case": {"loss/a": torch.ones(2)}}, {"case": {"loss/a": None}}
    for before, after in ((one, {"case": {}}), ({}, one), (none, one)):
        assert compare(before, after)["case"]["loss/a"] == torch.inf
    assert compare(none, none)["case"]["loss/a"] == 0.0


def test_a_shrunk_picture_keeps_flat_colours(tmp_path: Path) -> None:
    flat = {(255, 255, 255): 0, (0, 114, 178): 40, (213, 94, 0): 70, (0, 158, 115): 72}
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80, 3)).astype(np.uint8)
    for colour, row in flat.items():
        pixels[row : row + 5] = colour
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shrink = load("shrink")
    (tmp_path / "a.png").write_bytes(shrink.shrunk_picture(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and image.size == (80, 90)
        drawn = np.asarray(image.convert("RGB"))
    for colour in ((255, 255, 255), (0, 114, 178), (0, 158, 115)):
        assert (drawn[flat[colour]] == colour).all()


def test_a_shrunk_record_has_a_line_for_each_row(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps([{"a": 1 / 3, "b": [2]}, {"a": None}]))
    content = load("shrink").shrunk_record(tmp_path / "results.json").decode()
    assert content == '[\n{"a": 0.3333333, "b": [2]},\n{"a": null}\n]\n'


def test_a_shrunk_record_leaves_out_what_its_command_says(tmp_path: Path) -> None:
    row = {
        "row": "rnn",
        "command": "avrnn compare",
        "standardisation": [1],
        "options": {},
        "seed": 0,
    }
    kept = {name: row[name] for name in ("row", "command", "seed")}
    for rows, expected in (([row], [kept]), ([{"options": 1}], [{"options": 1}])):
        (tmp_path / "results.json").write_text(json.dumps(rows))
        assert json.loads(load("shrink").shrunk_record(tmp_path / "results.json")) == expected
