"""Metrics against SVI steps: learning curves and critics' curves."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import BLACK, DASHED, GREY, PAPER, Table, Target

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
Curves = dict[str, list[Curve]]  # by row, one for each seed

_MOST_CRITICS = 6  # more columns are too narrow to read
_MOST_NOTES = 6  # rows off the scale that are named


def learning_curves(rows: Table, path: Target) -> Path:
    """Draw reconstruction loss and ELBO against SVI steps: the paper's figure 2.

    Rows that end far from the best do not set the scale; a line of text gives their values.

    Args:
        rows: metrics of all trainings, dicts with ``row``, ``seed``, ``step``,
            ``reconstruction`` and ``elbo`` (nats per frame, larger is better) and, at validated
            steps, ``validation_bound`` (nats per frame); values that are not finite are left out.
        path: PNG to write; returned.

    Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, figure 2.
    """
    styles = style.row_styles(row["row"] for row in rows)
    picture = style.figure(11.5, 4.5, "Learning curves")
    left, right = picture.subplots(1, 2)
    left.set_title("Reconstruction loss, training batches (lower is better)")
    left.set_ylabel("minus reconstruction (nats per frame)")
    right.set_title("ELBO and validation bound (higher is better)")
    right.set_ylabel("bound (nats per frame)")
    loss = _curves(rows, "reconstruction", -1.0)
    bound, valid = _curves(rows, "elbo"), _curves(rows, "validation_bound")
    for axes, curves, dashes in ((left, loss, "-"), (right, bound, "-"), (right, valid, DASHED)):
        for label, look in styles.items():
            _mean_and_seeds(axes, curves.get(label, []), look, dashes)
    _zoom(left, loss, {}, "loss", -1.0)
    _zoom(right, bound, valid, "ELBO", 1.0)
    for axes in (left, right):
        style.tidy(axes, "SVI step")
    handles = [
        *(style.line(label, look.colour, marker=look.marker) for label, look in styles.items()),
        style.line("training batches", GREY),
        style.line("validation", GREY, ls=DASHED),
    ]
    many = any(len(seeds) > 1 for seeds in loss.values())
    note = "mean over seeds, each seed faint; " if many else ""
    style.legend_below(picture, handles, f"{note}moving averages over a twentieth of the run")
    return style.save(picture, path)


def critic_curves(rows: Table, path: Target) -> Path:
    """Draw critic loss, adversarial loss and the closed-form W2: the paper's figure 3.

    W2 between the normals p(z_t | h_t) and q(z_t | x_t, h_t), averaged over frames, bounds the
    number of a 1-Lipschitz critic of single steps from above. It does not bound a clipped critic,
    whose scale is arbitrary, nor one that sees redrawn paths.

    Args:
        rows: as for :func:`learning_curves`, with ``critic_loss``, ``critic_penalty`` or
            ``critic_distance``, and ``closed_form_w2``; the first 6 rows with a critic are drawn.
        path: PNG to write; returned.

    Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, figure 3.
    """
    styles = style.row_styles(row["row"] for row in rows)
    loss, w2 = _curves(rows, "critic_loss"), _curves(rows, "closed_form_w2")
    number = _curves(rows, "critic_distance") | _curves(rows, "critic_penalty")
    critics = [label for label in styles if label in loss]
    if not critics:
        return style.save(style.figure(6.5, 0.6, "No row of this comparison has a critic."), path)
    shown = critics[:_MOST_CRITICS]
    more = f" (first {len(shown)} of {len(critics)} rows)" if len(critics) > len(shown) else ""
    title = f"Distances by the critics, and the closed-form W2{more}"
    picture = style.figure(max(6.5, 1.2 + 3.1 * len(shown)), 5.8, title)
    grid = picture.subplots(2, len(shown), squeeze=False, sharex="col")
    for (top, bottom), label in zip(grid.T, shown, strict=True):
        colour = styles[label].colour
        top.set_title(style.fold(label), color=colour, fontsize=10, fontweight="bold")
        for steps, values in loss[label]:
            top.plot(steps, values, color=colour, lw=1.2)
        for curves, look in ((w2, {"color": GREY, "ls": DASHED}), (number, {"color": colour})):
            for steps, values in curves.get(label, []):
                bottom.plot(steps, values, lw=1.2, **look)
        _symlog(bottom, number.get(label, []) + w2.get(label, []))
        bottom.axhline(0.0, color=BLACK, lw=0.6, zorder=0)
        style.tidy(top)
        style.tidy(bottom, "SVI step")
    grid[0, 0].set_ylabel("critic loss")
    grid[1, 0].set_ylabel("adversarial loss\n(distance, units of z)")
    handles = [
        style.line("critic's number (in the row's colour)", BLACK),
        style.line("closed-form W2 (upper bound)", GREY, ls=DASHED),
    ]
    note = "W2 bounds 1-Lipschitz critics of single steps; a clipped critic's scale is arbitrary"
    style.legend_below(picture, handles, note)
    return style.save(picture, path)


def _mean_and_seeds(axes: Axes, seeds: list[Curve], look: style.Style, dashes: Any) -> None:
    """One row's curve, the mean over its seeds; each seed faint where there are several."""
    if not seeds:
        return
    line: dict[str, Any] = {"color": look.colour, "ls": dashes}
    for steps, values in seeds if len(seeds) > 1 else []:
        axes.plot(steps, values, lw=0.5, alpha=0.3, **line)
    shared = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in seeds)))
    mean = np.mean([values[np.isin(steps, shared)] for steps, values in seeds], axis=0)
    marks: dict[str, Any] = {"marker": look.marker, "markevery": max(1, len(shared) // 10)}
    axes.plot(shared, mean, lw=1.5, ms=4, **marks, **line)


def _curves(rows: Table, key: str, sign: float = 1.0) -> Curves:
    """Moving averages of the finite values times ``sign``, in order of step."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if not math.isnan(value := style.finite(row.get(key))):
            seeds = points.setdefault(row["row"], {})
            seeds.setdefault(row["seed"], []).append((row["step"], sign * value))
    curves: Curves = {label: [] for label in points}
    for label, seeds in points.items():
        for found in seeds.values():
            steps, values = np.array(sorted(found)).T
            curves[label].append((steps, _smooth(values)))
    return curves


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the curve, shorter at its ends."""
    window = np.ones(1 + 2 * (len(values) // 40))
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def _zoom(axes: Axes, curves: Curves, valid: Curves, what: str, sign: float) -> None:
    """Set limits by the rows that end near the best, and note where each of the others ends.

    ``sign`` is 1 where larger is better, else -1; multiplied by it, larger is always better.
    """
    ends, starts = {}, {}
    for label, seeds in curves.items():
        ends[label] = sign * fmean(v[-max(1, len(v) // 20) :].mean() for _, v in seeds)
        starts[label] = min(np.quantile(sign * v, 0.08) for _, v in seeds)
    if not ends:
        return
    best = max(ends, key=lambda label: ends[label])
    floor = ends[best] - 1.5 * max(ends[best] - starts[best], 1.0)
    near = [label for label in ends if ends[label] >= floor]
    notes = [f"{k}: {style.show(sign * end)}" for k, end in ends.items() if k not in near]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"and {len(notes) - _MOST_NOTES} more rows"]
    if notes:
        notes.insert(0, f"off scale, {what} at the end:")
    drawn = [v for group in (curves, valid) for label in near for _, v in group.get(label, [])]
    low = max(floor, min(starts[label] for label in near))
    high = max((sign * v).max() for v in drawn)
    room = max(high - low, 1e-3)
    low, high = low - room * (0.05 + 0.06 * len(notes)), high + 0.05 * room
    axes.set_ylim(*sorted((sign * low, sign * high)))
    y, side = (0.02, "bottom") if sign > 0 else (0.98, "top")
    text = axes.text(0.985, y, "\n".join(notes), ha="right", va=side, transform=axes.transAxes)
    text.set(fontsize=8.5, bbox=PAPER, zorder=5)


def _symlog(axes: Axes, seeds: list[Curve]) -> None:
    """A symmetric logarithmic y axis where the curves are of very different size."""
    sizes = [s for _, values in seeds if (s := float(np.median(np.abs(values)))) > 0]
    if sizes and max(sizes) >= 30 * min(sizes):
        axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(min(sizes))))
