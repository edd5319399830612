import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from inference import to_arviz
from pyro_avrnn import recipes
from pyro_avrnn.cli import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure written in a test."""
    written: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Any) -> Path:
        written.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return written


@pytest.fixture(autouse=True)
def _global_state_stays() -> Any:
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def _metrics(end: float = 1.0, row: str = "elbo", seed: int = 0, **extra: Any) -> list[dict]:
    return [
        {
            "row": row,
            "seed": seed,
            "step": step,
            "reconstruction": 1.0 - 18.0 * math.exp(-step / 40),
            "elbo": end - 18.0 * math.exp(-step / 40),
            **({"validation_bound": end - 0.1} if step % 50 == 0 else {}),
            **extra,
        }
        for step in range(1, 301)
    ]


def _critic(**extra: Any) -> dict[str, Any]:
    return {"critic_loss": -0.1, "critic_distance": 0.1, "closed_form_w2": 0.4, **extra}


def _texts(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def _is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == PNG


@pytest.mark.parametrize("far", [-797.0, -1e9])
def test_a_row_off_the_scale_is_named_and_sets_no_limits(
    far: float, figures: list[Figure], tmp_path: Path
) -> None:
    rows = _metrics() + _metrics(seed=1) + _metrics(0.5, "rnn") + _metrics(far, "alternating")
    assert _is_png(plots.learning_curves(rows, tmp_path / "a.png"))
    low, high = figures[0].axes[1].get_ylim()
    assert -40 < low < -3 and 1.0 < high < 10
    assert "alternating: ELBO \N{MINUS SIGN}" in _texts(figures[0])
    assert "off scale" in _texts(figures[0])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        _metrics(),
        _metrics()[:1],
        _metrics(math.nan),
        [{"row": "elbo", "seed": 0, "step": 1}],
        [{"row": "elbo", "seed": 0, "step": 1, "elbo": None, "reconstruction": ""}],
        [{"row": "elbo", "seed": 0, "step": 1, "elbo": -math.inf, "reconstruction": 0.0}],
        [*_metrics(), {"row": "elbo", "seed": 0, "step": 301, "validation_bound": -math.inf}],
    ],
    ids=["none", "one", "one step", "nan", "missing", "empty", "inf", "validation inf"],
)
@pytest.mark.parametrize("draw", [plots.learning_curves, plots.critic_curves])
def test_incomplete_metrics_are_drawn(draw: Callable, rows: list[dict], tmp_path: Path) -> None:
    assert _is_png(draw(rows, tmp_path / "a.png"))


def test_critic_columns_and_scale(figures: list[Figure], tmp_path: Path) -> None:
    wide = _critic(closed_form_w2=300.0, critic_penalty=1e-3)
    rows = _metrics() + _metrics(row="conditional", **_critic())
    rows += _metrics(row="alternating", **wide)
    plots.critic_curves(rows, tmp_path / "a.png")
    figure = figures[0]
    assert len(figure.axes) == 4
    assert [a.get_title() for a in figure.axes[:2]] == ["conditional", "alternating"]
    assert [a.get_yscale() for a in figure.axes[2:]] == ["linear", "symlog"]
    penalty = figure.axes[3].get_lines()[1].get_ydata()
    np.testing.assert_allclose(penalty, 1e-3)  # the penalty, not the distance


def test_no_critic_is_said(figures: list[Figure], tmp_path: Path) -> None:
    plots.critic_curves(_metrics(), tmp_path / "a.png")
    assert "No row of this comparison has a critic." in _texts(figures[0])


def test_at_most_six_critics(figures: list[Figure], tmp_path: Path) -> None:
    rows = [r for i in range(8) for r in _metrics(row=f"marginal:kl={i}", **_critic())]
    plots.critic_curves(rows, tmp_path / "a.png")
    assert len(figures[0].axes) == 12 and "first 6 of 8" in _texts(figures[0])


def test_rows_keep_their_colours_and_differ() -> None:
    names = ["marginal", "elbo", "rnn", "conditional:kl=0.1", "alternating", *map(str, range(20))]
    styles = plots.row_styles(names)
    assert list(styles) == names
    assert len(set(styles.values())) == len(names)
    assert styles["elbo"] == plots.row_styles(["rnn", "elbo"])["elbo"]


def _result(row: str, seed: int = 0, **extra: Any) -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "iwae_per_frame": 1.2 + 0.1 * seed,
        "elbo_per_frame": 1.0,
        "kl_per_frame": 0.5,
        "information_at_most": 0.3,
        "aggregate_mismatch_at_least": 0.2,
        "baseline_per_frame": -17.0,
        **extra,
    }


@pytest.mark.parametrize("baseline", [-17.0, None])
def test_bars_with_a_row_off_the_scale(
    baseline: float | None, figures: list[Figure], tmp_path: Path
) -> None:
    results = [
        _result("elbo"),
        _result("elbo", 1),
        _result("alternating", iwae_per_frame=-712.0, elbo_per_frame=-797.0, kl_per_frame=798.0)
        | {"information_at_most": 8.0, "aggregate_mismatch_at_least": 790.0},
        _result("rnn", information_at_most=None, aggregate_mismatch_at_least=None, kl_per_frame=0),
        {"row": "joint", "seed": 0, "iwae_per_frame": math.nan},
    ]
    results = [{**r, "baseline_per_frame": baseline} for r in results]
    assert _is_png(plots.rate_bars(results, tmp_path / "a.png"))
    texts = _texts(figures[0])
    for words in ("\N{MINUS SIGN}797 (off scale)", "798 (off scale)", "no KL", "no value", "1.25"):
        assert words in texts
    assert figures[0].axes[0].get_xlim()[0] > -30
    assert figures[0].axes[1].get_xlim()[1] < 5


@pytest.mark.parametrize(
    "results", [[], [_result("elbo")], [{"row": "elbo", "seed": 0}]], ids=["none", "one", "empty"]
)
def test_incomplete_results_are_drawn(results: list[dict], tmp_path: Path) -> None:
    assert _is_png(plots.rate_bars(results, tmp_path / "a.png"))


def _panels(length: int, width: int, draws: int = 20) -> dict[str, Any]:
    return {
        "observed": torch.randn(length, width),
        "one-step prediction": torch.randn(draws, length, width),
        "freely generated": torch.randn(3, length, width).numpy(),
    }


@pytest.mark.parametrize(
    ("width", "options", "axes"),
    [
        (12, {"kind": "real"}, 8),
        (12, {"kind": "real", "frame_seconds": 0.0064}, 8),
        (1, {"kind": "real"}, 2),
        (64, {"kind": "real"}, 4),
        (200, {"kind": "real", "sample_rate": 16000}, 3),
        (88, {"kind": "binary"}, 4),
        (5, {"kind": "binary", "frame_seconds": 0.5}, 4),
    ],
)
@pytest.mark.parametrize("length", [1, 30])
def test_sequences_of_every_kind(
    width: int,
    options: dict[str, Any],
    axes: int,
    length: int,
    figures: list[Figure],
    tmp_path: Path,
) -> None:
    panels = _panels(length, width)
    if options["kind"] == "binary":
        panels = {name: x > 0 for name, x in panels.items()}
    assert _is_png(plots.sequences(panels, tmp_path / "a.png", title="a title", **options))
    assert len(figures[0].axes) == axes
    assert "a title" in _texts(figures[0])
    assert ("MIDI note" in _texts(figures[0])) == (width == 88)


@pytest.mark.parametrize("width", [3, 64, 200])
@pytest.mark.parametrize("only", [None, "observed", "one-step prediction", "freely generated"])
def test_diverging_and_missing_panels(width: int, only: str | None, tmp_path: Path) -> None:
    panels = _panels(10, width)
    panels["freely generated"][0, 3:] = 1e20
    panels["freely generated"][1, 2] = np.inf
    panels["one-step prediction"][:, 4] = math.nan
    panels = {name: x for name, x in panels.items() if only in (None, name)}
    rate = 16000 if width == 200 else None
    path = plots.sequences(panels, tmp_path / "a.png", kind="real", sample_rate=rate, title="")
    assert _is_png(path)


def test_a_diverging_model_leaves_the_data_readable(figures: list[Figure], tmp_path: Path) -> None:
    panels = _panels(10, 1)
    panels["freely generated"] = 1e4 * panels["freely generated"]
    plots.sequences(panels, tmp_path / "a.png", kind="real", title="")
    assert np.ptp(figures[0].axes[0].get_ylim()) < 30


@pytest.mark.parametrize(
    ("panels", "kind", "words"),
    [
        ({"observed": np.zeros((3, 2))}, "speech", "kind must be"),
        ({}, "real", "at least one"),
        ({"observed": np.zeros(3)}, "real", "must have shape"),
        ({"seen": np.zeros((3, 2))}, "real", "panels may hold"),
    ],
)
def test_wrong_panels_are_refused(panels: dict, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        plots.sequences(panels, tmp_path / "a.png", kind=kind, title="")


@pytest.mark.parametrize(("length", "z_dim"), [(1, 1), (6, 3), (6, 10)])
@pytest.mark.parametrize("seconds", [None, 0.01])
def test_latent_posterior(
    length: int, z_dim: int, seconds: float | None, figures: list[Figure], tmp_path: Path
) -> None:
    recipe = recipes.vrnn(x_dim=2, z_dim=z_dim, h_dim=4)
    data = to_arviz(
        recipe.model, recipe.guide, torch.randn(length, 2), draws=50, frame_seconds=seconds
    )
    assert _is_png(plots.latent_posterior(data, tmp_path / "a.png", "latents"))
    shown = [a.get_title() for a in figures[0].axes if a.get_visible()]
    assert len(shown) == min(z_dim, 8) and all(s.startswith("z[") for s in shown)
    assert ("of 10 latents" in _texts(figures[0])) == (z_dim == 10)
    assert ("frame" in _texts(figures[0])) == (seconds is None)


def test_the_band_is_the_hdi(figures: list[Figure], tmp_path: Path) -> None:
    recipe = recipes.vrnn(x_dim=2, z_dim=2, h_dim=4)
    data = to_arviz(recipe.model, recipe.guide, torch.randn(4, 2), draws=200)
    plots.latent_posterior(data, tmp_path / "a.png", "latents")
    band = figures[0].axes[1].collections[1].get_paths()[0].vertices  # posterior, z[1]
    draws = np.sort(data["posterior"]["z"].values[0, :, 2, 1])
    inside = int(0.94 * len(draws))
    start = int(np.argmin(draws[inside:] - draws[: len(draws) - inside]))
    at = band[band[:, 0] == 3.0, 1]
    np.testing.assert_allclose([at.min(), at.max()], [draws[start], draws[start + inside]])


def test_no_latents_are_said(figures: list[Figure], tmp_path: Path) -> None:
    recipe = recipes.rnn(x_dim=2, h_dim=4)
    data = to_arviz(recipe.model, recipe.guide, torch.randn(4, 2), draws=20)
    plots.latent_posterior(data, tmp_path / "a.png", "latents")
    assert "no latents" in _texts(figures[0])
