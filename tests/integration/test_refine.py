"""``avrnn refine``, and rows whose prior a critic refines."""

import json
import math
from pathlib import Path

import pytest
import torch

from inference import sequence_bounds
from pyro_avrnn import data, recipes
from pyro_avrnn.cli import main
from pyro_avrnn.cli.critics import From
from pyro_avrnn.cli.refine import paired
from pyro_avrnn.refinement import RefinedPrior
from tests.integration.test_cli import small_npz

pytestmark = pytest.mark.usefixtures("serial")
SIZES = [
    "--steps",
    "6",
    "--validate-every",
    "3",
    "--z-dim",
    "2",
    "--h-dim",
    "4",
    "--particles",
    "4",
]


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    return ["--data", str(small_npz(tmp_path / "small.npz"))]


@pytest.fixture
def trained(tmp_path: Path, small: list[str]) -> Path:
    out = tmp_path / "run"
    rows = ["--rows", "rnn", "elbo-annealed", "elbo-annealed:prior=mixture"]
    assert main(["compare", "--out", str(out), "--jobs", "1", *small, *SIZES, *rows]) == 0
    return out


def test_priors_of_trained_rows(
    trained: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*small, "--steps", "20", "--candidates", "4", "8"]
    assert main(["refine", str(trained), *options]) == 0
    out = trained / "refined"
    found = json.loads((out / "refined.json").read_text())
    assert [r["row"] for r in found] == ["elbo-annealed", "elbo-annealed:prior=mixture"]
    for r in found:
        assert set(r["after"]) == {"4", "8"} and math.isfinite(r["after"]["4"]["iwae"]["gain"])
        before = json.loads((trained / "results.json").read_text())
        (same,) = [b for b in before if b["row"] == r["row"]]
        assert abs(same["iwae_per_frame"] - r["iwae_per_frame"]) < 0.02
    assert "`elbo-annealed:prior=mixture`" in (out / "table.md").read_text()
    assert (out / "gain.png").stat().st_size > 5_000
    recipe = recipes.load(next((out / "rows").glob("*mixture*")) / "parameters.pt")
    assert isinstance(recipe.model.prior, RefinedPrior)
    test = data.load(small[1]).test
    bounds = sequence_bounds(recipe.model, recipe.guide, test.x, test.mask, num_particles=4)
    after = float(bounds["iwae"].sum()) / test.num_frames
    assert found[1]["after"]["4"]["iwae"]["gain"] == pytest.approx(
        after - found[1]["iwae_per_frame"], abs=1e-4
    )
    stamp = (out / "refined.json").read_text()
    assert main(["refine", str(trained), *options, "--resume"]) == 0
    assert json.loads((out / "refined.json").read_text()) == json.loads(stamp)
    capsys.readouterr()


def test_rows_of_a_comparison(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few, out = "candidates=4,refine_steps=20", tmp_path / "run"
    rows = [f"refined:{few}", f"refined:stage=loop,begin=0.5,{few}"]
    assert (
        main(["compare", "--out", str(out), "--jobs", "1", *small, *SIZES, "--rows", *rows]) == 0
    )
    for r in json.loads((out / "results.json").read_text()):
        assert r["refinement_num_candidates"] == 4 and r["error"] is None
    assert main(["generate", str(out), *small, "--count", "1", "--length", "4"]) == 0
    capsys.readouterr()


REFUSED = [
    (["--candidates", "1"], "--candidates must be at least 2, got 1; a choice needs two"),
    (["--rows", "elbo"], "--rows must be among elbo-annealed; elbo-annealed:prior=mixture"),
    (["--rows", "rnn"], "--rows must be among"),
    (["--data", "nofile.npz"], "nofile.npz"),
    (["--data", "vowels"], "--data must be the data of the comparison, small, got 'vowels'"),
]


def test_refused(trained: Path, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in REFUSED:  # one training will do for all
        assert main(["refine", str(trained), *small, *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1] and error[-1].startswith("avrnn: error")


def test_refused_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["refine", str(tmp_path)]) == 2
    assert "give the folder of an avrnn compare" in capsys.readouterr().err


def test_errors_are_over_speakers() -> None:
    """Ten sequences of two speakers that gain 1 and 3 nats a frame: 2, give or take 1."""
    mask = torch.ones(10, 4, dtype=torch.bool)
    difference = torch.tensor([4.0] * 5 + [12.0] * 5)
    told = paired(difference, mask, ["a"] * 5 + ["b"] * 5)
    assert told["gain"] == pytest.approx(2.0) and told["gain_se"] == pytest.approx(1.0)
    assert math.isnan(paired(difference, mask, ["a"] * 10)["gain_se"])


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def update(self) -> dict[str, float]:
        self.calls += 1
        return {"critic_loss": 1.0}

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_a_critic_that_begins_later_begins_once() -> None:
    first, told = From(Counting(), 3), []  # type: ignore[arg-type]
    for _ in range(4):
        told.append(first.update())
    assert told == [{}, {}, {}, {"critic_loss": 1.0}]
    again = From(Counting(), 3)  # type: ignore[arg-type]
    again.load_state_dict(first.state_dict())
    again.update()
    assert again.adversarial.calls == 2  # type: ignore[attr-defined]
