"""Rows of the command line for divergences, distances without a critic, and twists."""

import json
import math
from pathlib import Path

import pytest
import torch

from pyro_avrnn import recipes
from pyro_avrnn.cli import main
from pyro_avrnn.twists import FutureTwist
from tests.integration.test_cli import small_npz
from tests.integration.test_refine import SIZES

pytestmark = pytest.mark.usefixtures("serial")
ROWS = (
    "twisted",
    "conditional+kl:divergence=jensen_shannon",
    "joint+kl:divergence=kl,constraint=gradient_penalty",
    "marginal+kl:divergence=mmd",
    "conditional+kl:divergence=sliced_wasserstein,standardise=true",
    "trajectory_redrawn+kl:pairing=free_runs",
    "avb:guide=smoothing_implicit,contrast=prior",
)


def test_rows_are_trained_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(small_npz(tmp_path / "small.npz")), "--jobs", "1", *SIZES]
    given += ["--out", str(tmp_path / "run"), "--rows", *ROWS]
    assert main(["compare", *given]) == 0
    results = {r["row"]: r for r in json.loads((tmp_path / "run" / "results.json").read_text())}
    assert list(results) == list(ROWS)
    assert all(r["error"] is None and math.isfinite(r["fivo_per_frame"]) for r in results.values())
    distances = [results[row]["critic_distance_per_frame"] is not None for row in ROWS]
    assert distances == [False, True, True, False, False, True, False]
    (folder,) = (tmp_path / "run" / "rows").glob("twisted*")
    assert isinstance(recipes.load(folder / "parameters.pt").critic, FutureTwist)
    (folder,) = (tmp_path / "run" / "rows").glob("avb*")
    explicit, implicit = (recipes.load(folder / f"{n}.pt") for n in ("parameters", "implicit"))
    assert (explicit.config["guide"], implicit.config["role"]) == ("smoothing", "ratio_to_prior")
    for name, value in explicit.model.state_dict().items():  # the guide alone has learnt anew
        torch.testing.assert_close(value, implicit.model.state_dict()[name], rtol=0, atol=0)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("alternating:divergence=mmd", "alternates with a critic, which mmd has not; use a row"),
        ("alternating:pairing=free_runs", "option pairing does not go with row 'alternating:pai"),
        (
            "avb:guide=filtering",
            "needs a guide without density (implicit, smoothing_implicit)",
        ),
        ("elbo:guide=implicit", "guide implicit has no density, which row 'elbo:guide=implicit'"),
        ("elbo:twist=true", "twist=true goes with bound=fivo, got elbo"),
        ("joint:divergence=total_variation", "divergence must be one of wasserstein, log_ratio"),
        ("trajectory+kl:divergence=mmd", "view must be one of marginal, conditional, joint"),
    ],
)
def test_refused(row: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--data", "vowels", "--rows", row, "--steps", "1"]) == 2
    assert sentence in capsys.readouterr().err
