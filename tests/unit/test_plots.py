import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from inference import to_arviz
from pyro_avrnn import plots, recipes

LONG = "conditional:weight=0>{}@0.5,standardise=true,critic=lstm"


def test_the_users_matplotlib_is_left_alone(drawn: Callable) -> None:
    before = dict(matplotlib.rcParams)
    drawn(plots.learning_curves, _metrics())
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.figs


def test_rows_are_told_apart_on_white_paper() -> None:
    names = [str(i) for i in range(28)]
    styles = plots.row_styles([*names, *names])
    assert list(styles) == names and len(set(styles.values())) == 28
    assert all(np.dot(to_rgb(s.colour), [0.3, 0.59, 0.11]) < 0.75 for s in styles.values())


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
        for step in range(1, 301, 7)
    ]


def _critic(**extra: Any) -> dict[str, Any]:
    return {"critic_loss": -0.1, "critic_distance": 0.1, "closed_form_w2": 0.4, **extra}


def _texts(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


@pytest.mark.parametrize("far", [-797.0, -1e9])
def test_a_row_off_the_scale_is_named_and_sets_no_limits(far: float, drawn: Callable) -> None:
    rows = _metrics() + _metrics(seed=1) + _metrics(0.5, "rnn") + _metrics(far, "alternating")
    figure = drawn(plots.learning_curves, rows)
    low, high = figure.axes[1].get_ylim()
    assert -40 < low < -3 and 1.0 < high < 10
    assert "off scale, ELBO at the end:\nalternating: \N{MINUS SIGN}" in _texts(figure)
    assert "loss at the end" not in _texts(figure)


def test_28_rows_with_long_labels_leave_room_for_the_curves(drawn: Callable) -> None:
    rows = [r for i in range(28) for r in _metrics(-90.0 * (i > 9), LONG.format(i))]
    figure = drawn(plots.learning_curves, rows)
    size = figure.axes[1].get_window_extent().size / figure.dpi
    assert size[0] > 4 and size[1] > 2.5  # inches
    assert all(LONG.format(i) in _texts(figure) for i in range(28))
    assert "and 12 more rows" in _texts(figure)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        _metrics()[:1],
        _metrics(math.nan),
        [{"row": "elbo", "seed": 0, "step": 1, "elbo": -math.inf, "reconstruction": 0.0}],
        [*_metrics(), {"row": "elbo", "seed": 0, "step": 301, "validation_bound": -math.inf}],
    ],
    ids=["none", "one step", "nan", "inf", "validation inf"],
)
@pytest.mark.parametrize("plot", [plots.learning_curves, plots.critic_curves])
def test_a_training_that_stopped_early_is_drawn(
    plot: Callable, rows: list[dict], drawn: Callable
) -> None:
    drawn(plot, rows)


def test_critic_columns_and_scale(drawn: Callable) -> None:
    wide = _critic(closed_form_w2=300.0, critic_penalty=1e-3)
    rows = _metrics() + _metrics(row="conditional", **_critic())
    figure = drawn(plots.critic_curves, rows + _metrics(row="alternating", **wide))
    assert [a.get_title() for a in figure.axes] == ["conditional", "alternating", "", ""]
    assert [a.get_yscale() for a in figure.axes[2:]] == ["linear", "symlog"]
    penalty = figure.axes[3].get_lines()[1].get_ydata()
    np.testing.assert_allclose(penalty, 1e-3)  # the penalty, not the distance


def test_what_is_left_out_of_the_critics_is_said(drawn: Callable) -> None:
    assert "No row of this comparison has a critic." in _texts(
        drawn(plots.critic_curves, _metrics())
    )
    rows = [{"row": str(i), "seed": 0, "step": 1, **_critic()} for i in range(8)]
    assert "first 6 of 8" in _texts(drawn(plots.critic_curves, rows))


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


def _no_split(kl: float) -> dict[str, Any]:
    unknown = {"information_at_most": None, "aggregate_mismatch_at_least": None}
    return {"kl_per_frame": kl, **unknown}


def test_bars_with_a_row_off_the_scale(drawn: Callable) -> None:
    far = {"iwae_per_frame": -712.0, "elbo_per_frame": -797.0, "kl_per_frame": 798.0}
    far |= {"information_at_most": 8.0, "aggregate_mismatch_at_least": 790.0}
    nothing = {"iwae_per_frame": math.nan, "elbo_per_frame": None}
    results = [_result("elbo"), _result("elbo", 1), _result("alternating", **far)]
    results += [
        _result("rnn", **_no_split(0.0)),
        _result("joint", **nothing | _no_split(math.nan)),
    ]
    figure = drawn(plots.rate_bars, results)
    said = [[t.get_text().strip() for t in axes.texts] for axes in figure.axes]
    minus = "\N{MINUS SIGN}"
    off = [f"{minus}712 (off scale)", f"{minus}797 (off scale)"]
    assert said[0] == ["1.25", "1.00", *off, "1.20", "1.00", "no value", "no value"]
    assert said[1] == ["0.50", "798 (off scale)", "no KL", "no value"]
    assert figure.axes[0].get_xlim()[0] > -30 and figure.axes[1].get_xlim()[1] < 5


def test_bars_end_at_the_means(drawn: Callable) -> None:
    left, right = drawn(plots.rate_bars, [_result("elbo"), _result("elbo", 1)]).axes
    ends = [[p.get_x() + p.get_width() for p in axes.patches] for axes in (left, right)]
    np.testing.assert_allclose(ends[0], [1.25, 1.0])
    np.testing.assert_allclose(ends[1], [0.3, 0.5])


def test_a_mismatch_below_zero_leaves_a_bar_as_long_as_the_kl(drawn: Callable) -> None:
    parts = {"information_at_most": 0.6, "aggregate_mismatch_at_least": -0.1}
    right = drawn(plots.rate_bars, [_result("elbo", **parts)]).axes[1]
    np.testing.assert_allclose([p.get_x() for p in right.patches], [0.0, 0.5])
    np.testing.assert_allclose([p.get_width() for p in right.patches], [0.5, 0.0], atol=1e-12)
    assert right.texts[0].get_text().strip() == "0.50"


TUNED = ",lr=0.0015,kl=0>1@0.25,clip_norm=1x,dropout=0.1,activation=silu,adversarial_lr=0.0005"


@pytest.mark.parametrize("more", ["", TUNED])
def test_long_labels_of_bars_neither_overlap_nor_lose_an_option(
    drawn: Callable, more: str
) -> None:
    figure = drawn(plots.rate_bars, [_result(LONG.format(i) + more) for i in range(28)])
    labels = figure.axes[0].get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(not a.overlaps(b) for a, b in zip(boxes, boxes[1:], strict=False))
    assert all("critic=lstm" in label.get_text() for label in labels)


def _panels(length: int, width: int) -> dict[str, np.ndarray]:
    return {
        "observed": torch.randn(length, width).numpy(),
        "one-step prediction": torch.randn(20, length, width).numpy(),
        "freely generated": torch.randn(3, length, width).numpy(),
    }


@pytest.mark.parametrize(
    ("width", "options", "labels"),
    [
        (12, {"kind": "real"}, ("feature 3", "frame")),
        (1, {"kind": "real", "frame_seconds": 0.0064}, ("feature 0", "time (seconds)")),
        (200, {"kind": "real", "sample_rate": 16000}, ("amplitude", "time (seconds)")),
        (88, {"kind": "binary"}, ("key", "C4", "step")),
        (5, {"kind": "binary", "frame_seconds": 0.5}, ("feature", "time (seconds)")),
    ],
)
@pytest.mark.parametrize("length", [1, 30])
def test_sequences_of_every_kind(
    width: int, options: dict[str, Any], labels: tuple[str, ...], length: int, drawn: Callable
) -> None:
    panels = _panels(length, width)
    if options["kind"] == "binary":
        panels = {name: x > 0 for name, x in panels.items()}
    figure = drawn(plots.sequences, panels, title="a title", **options)
    assert {*labels, "a title"} <= {*_texts(figure).split("\n")}


@pytest.mark.parametrize("rate", [None, 16000])
def test_a_diverging_model_leaves_the_data_readable(rate: int | None, drawn: Callable) -> None:
    panels = _panels(10, 3)
    panels["freely generated"] *= 1e4
    panels["freely generated"][0, 3:] = 1e20
    panels["freely generated"][1, 2] = np.inf
    panels["one-step prediction"][:, 4] = math.nan
    figure = drawn(plots.sequences, panels, kind="real", sample_rate=rate, title="")
    assert np.ptp(figure.axes[0].get_ylim()) < 40


@pytest.mark.parametrize(("z_dim", "seconds"), [(3, None), (10, 0.01)])
def test_the_band_is_the_hdi(z_dim: int, seconds: float | None, drawn: Callable) -> None:
    recipe = recipes.vrnn(x_dim=2, z_dim=z_dim, h_dim=4)
    x = torch.randn(4, 2)
    data = to_arviz(recipe.model, recipe.guide, x, draws=200, frame_seconds=seconds)
    figure = drawn(plots.latent_posterior, data, title="latents")
    assert len(figure.axes) == min(z_dim, 8)
    assert ("8 of 10 latents" in _texts(figure)) == (z_dim == 10)
    assert ("frame" in _texts(figure)) == (seconds is None)
    for axes in figure.axes:
        latent = int(axes.get_title().strip("z[]"))
        draws = np.sort(data["posterior"]["z"].values[0, :, 2, latent])
        inside = int(0.94 * len(draws))
        start = int(np.argmin(draws[inside:] - draws[: len(draws) - inside]))
        band = axes.collections[1].get_paths()[0].vertices
        at = band[np.isclose(band[:, 0], 3.0 * (seconds or 1.0)), 1]
        np.testing.assert_allclose([at.min(), at.max()], [draws[start], draws[start + inside]])


def test_matplotlib_is_loaded_with_the_first_picture() -> None:
    program = (
        "import sys, pyro_avrnn.cli\n"
        "from pyro_avrnn import plots\n"
        "print('matplotlib' in sys.modules, callable(plots.gains), 'matplotlib' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False True True\n"
    assert {*plots.__all__} <= {*dir(plots)}
    with pytest.raises(AttributeError, match="has no attribute 'pictures'"):
        plots.pictures  # noqa: B018
