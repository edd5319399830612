"""Held-out bounds as bars, and what the KL rate is spent on."""

import math
from pathlib import Path
from statistics import fmean, median_high, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import BLACK, GREY, PAPER, Table, Target

Parts = list[tuple[float, dict[str, Any]]]  # lengths, NaN if unknown, and looks

_KEYS = (
    "iwae_per_frame",
    "elbo_per_frame",
    "kl_per_frame",
    "information_at_most",
    "aggregate_mismatch_at_least",
)


def rate_bars(results: Table, path: Target) -> Path:
    """Draw held-out bounds of every row, and what their KL rate is spent on.

    A row's values are means over its seeds, with the standard deviation over seeds as error bar.
    Bars of the bounds start at the baseline of independent dimensions. Rows far worse than the
    others run out of the panel, with their value as text.

    Args:
        results: dicts with ``row``, ``seed``, ``baseline_per_frame``, ``iwae_per_frame``,
            ``elbo_per_frame``, ``kl_per_frame``, ``information_at_most`` and
            ``aggregate_mismatch_at_least``, in nats per frame; values that are not finite are
            left out.
        path: PNG to write; returned.
    """
    styles = style.row_styles(result["row"] for result in results)
    values = {key: [_over_seeds(results, label, key) for label in styles] for key in _KEYS}
    iwae, elbo, kl, information, mismatch = values.values()
    baseline = results[0]["baseline_per_frame"]
    title = "Held-out bounds, and where the KL goes"
    labels = [style.fold(label) for label in styles]
    tall = max(0.62, 0.16 * max(len(label.splitlines()) for label in labels))  # of a row, inches
    picture = style.figure(12.0, 1.6 + tall * len(styles), title)
    left, right = picture.subplots(1, 2, sharey=True)
    left.set_title("Bounds on the log-likelihood (further right is better)")
    right.set_title("KL rate: information and aggregate mismatch")
    _zoom(left, [mean for mean, _ in iwae + elbo], baseline, 1.0)
    _zoom(right, [mean for mean, _ in kl], 0.0, -1.0)
    for i, (colour, _) in enumerate(styles.values()):
        full, pale, hatched = _looks(colour)
        _bar(left, i - 0.19, baseline, [(iwae[i][0] - baseline, full)], iwae[i][1])
        _bar(left, i + 0.19, baseline, [(elbo[i][0] - baseline, pale)], elbo[i][1])
        # both add up to the KL, also where the estimate of the mismatch errs below zero
        below, above = min(mismatch[i][0], 0.0), max(mismatch[i][0], 0.0)
        parts = [(information[i][0] + below, full), (above, hatched)]
        _bar(right, i, 0.0, parts, kl[i][1], "no KL" if kl[i][0] == 0 else "no value")
    left.axvline(baseline, color=BLACK, ls="--", lw=1)
    _label(left, right, labels)
    full, pale, hatched = _looks(GREY)
    handles = [
        Patch(**full, label="left: IWAE"),
        Patch(**pale, label="left: ELBO"),
        style.line("left: independent dimensions", BLACK, ls="--", lw=1),
        Patch(**full, label="right: information (at most)"),
        Patch(**hatched, label="right: aggregate mismatch (at least)"),
    ]
    several = len({result["seed"] for result in results}) > 1
    note = "error bars: standard deviation over seeds" if several else ""
    style.legend_below(picture, handles, note)
    return style.save(picture, path)


def _label(left: Axes, right: Axes, labels: list[str]) -> None:
    """Name the rows at the left, and the unit below both panels."""
    left.set_yticks(range(len(labels)), labels, fontsize=8.5)
    left.set_ylim(len(labels) - 0.5, -0.5)
    for axes in (left, right):
        style.tidy(axes, "nats per frame")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)


def _over_seeds(results: Table, label: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation of the finite values; NaN without any, 0 for a single one."""
    found = [style.finite(r.get(key)) for r in results if r["row"] == label]
    values = [value for value in found if not math.isnan(value)]
    return fmean(values) if values else math.nan, stdev(values) if len(values) > 1 else 0.0


def _looks(colour: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Full, pale, and pale with hatches."""
    full = {"facecolor": colour, "edgecolor": colour, "lw": 0.8}
    pale = full | {"facecolor": [1 - 0.35 * (1 - part) for part in to_rgb(colour)]}
    return full, pale, pale | {"hatch": "////"}


def _zoom(axes: Axes, ends: list[float], anchor: float, sign: float) -> None:
    """Set limits by the bars not far worse than the better half; ``sign`` 1: larger is better."""
    scores = [sign * end for end in ends if not math.isnan(end)] or [sign * anchor]
    best = max(scores)
    spread = max(best - median_high(scores), 0.2 * abs(best - sign * anchor), 1.0)
    near = [anchor, *(sign * score for score in scores if score >= best - 10.0 * spread)]
    room = max(max(near) - min(near), 1e-3)
    before = 0.3 if min(sign * score for score in scores) < anchor else 0.02
    axes.set_xlim(min(near) - before * room, max(near) + 0.2 * room)


def _bar(
    axes: Axes, y: float, anchor: float, parts: Parts, error: float, otherwise: str = "no value"
) -> None:
    """Draw parts end to end, cut at the limits, and their total right of them or the anchor."""
    low, high = axes.get_xlim()
    end = start = anchor
    for length, look in parts:
        end += length
        stop = min(max(end, low), high)
        axes.barh(y, stop - start, 0.68 / (3 - len(parts)), left=start, **look)
        start = stop
    text = otherwise if math.isnan(end) else style.show(end)
    if end < low or end > high:
        text += " (off scale)"
    elif error:
        axes.errorbar(end, y, xerr=error, color=BLACK, lw=1, capsize=2)
    side, box = ("right", PAPER) if end > high else ("left", None)
    at = min(max(anchor, end + error), high)  # the anchor where the end is NaN
    axes.text(at, y, f" {text} ", ha=side, va="center", fontsize=8.5, bbox=box)
