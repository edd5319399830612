"""Pictures of a comparison, each written as PNG, each with one question in its title.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; a row keeps its
colour in every picture that is drawn from the same list of rows. Only matplotlib's object API is
used: no backend, style or current figure of the user's is touched.
"""

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, SymmetricalLogLocator
from torch import Tensor

Metrics = Sequence[Mapping[str, Any]]
Target = str | os.PathLike[str]

_DPI = 130
_BLACK, _GREY = "#000000", "#8C8C8C"
_ORANGE, _SKY, _GREEN, _YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
_BLUE, _RED, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_OWN = {
    "rnn": _BLACK,
    "elbo": _SKY,
    "elbo-annealed": _BLUE,
    "alternating": _RED,
    "conditional": _GREEN,
    "conditional+kl": _PURPLE,
    "trajectory": _ORANGE,
    "trajectory+kl": _YELLOW,
}
_SPARE = (_GREEN, _PURPLE, _ORANGE, _SKY, _BLUE, _RED, _YELLOW, _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P")


class Style(NamedTuple):
    """How a row looks in every picture."""

    colour: str
    marker: str


def row_styles(rows: Iterable[str]) -> dict[str, Style]:
    """A colour for each row: the well-known rows their own, the others the first one free.

    Args:
        rows: labels, in the order in which they are drawn; doubles are ignored.

    Returns:
        Styles by label; where colours run out they come again with another marker.

    Example:
        >>> row_styles(["elbo", "conditional:kl=0.1"])["elbo"].colour
        '#56B4E9'
    """
    labels = list(dict.fromkeys(rows))
    styles = {label: Style(_OWN[label], _MARKERS[0]) for label in labels if label in _OWN}
    free = [Style(c, m) for m in _MARKERS for c in _SPARE if Style(c, m) not in styles.values()]
    others = [label for label in labels if label not in styles]
    for i, label in enumerate(others):
        styles[label] = free[i % len(free)]
    return {label: styles[label] for label in labels}


def learning_curves(rows: Metrics, path: Target) -> Path:
    """Reconstruction loss and ELBO against SVI steps: the paper's figure 2.

    Rows that end far away from the best do not set the scale; a line of text says where they are.

    Args:
        rows: metrics of all trainings, dicts with ``row``, ``seed``, ``step``,
            ``reconstruction`` and ``elbo`` (nats per frame, larger is better) and where
            validated ``validation_bound`` (nats per frame); absent, None and NaN are left out.
        path: PNG to write.

    Returns:
        The path.

    Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, figure 2.
    """
    styles = row_styles(str(row["row"]) for row in rows)
    figure = _figure(11.5, 4.8)
    figure.suptitle("Learning curves", fontweight="bold")
    left, right = figure.subplots(1, 2)
    left.set_title("Reconstruction loss, training batches (lower is better)")
    left.set_ylabel("minus reconstruction (nats per frame)")
    right.set_title("ELBO and validation bound (higher is better)")
    right.set_ylabel("bound (nats per frame)")
    loss = _curves(rows, "reconstruction", -1.0)
    bound, valid = _curves(rows, "elbo"), _curves(rows, "validation_bound")
    for axes, curves in ((left, loss), (right, bound)):
        for (label, _), (steps, values) in curves.items():
            axes.plot(steps, _smooth(values), color=styles[label].colour, lw=1.1, alpha=0.9)
    for (label, _), (steps, values) in valid.items():
        right.plot(
            steps,
            values,
            color=styles[label].colour,
            ls=(0, (4, 2)),
            lw=1.0,
            marker=styles[label].marker,
            ms=3.5,
            markevery=max(1, len(steps) // 15),
        )
    _zoom(left, [loss], "loss", -1.0, styles)
    _zoom(right, [bound, valid], "ELBO", 1.0, styles)
    for axes in (left, right):
        _tidy(axes, "SVI step")
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker if valid else "", ms=4, lw=2, label=label)
        for label, s in styles.items()
    ]
    handles.append(Line2D([], [], color=_GREY, lw=1.1, label="training batches, smoothed"))
    if valid:
        handles.append(
            Line2D(
                [], [], color=_GREY, ls=(0, (4, 2)), lw=1, marker="o", ms=3.5, label="validation"
            )
        )
    _legend_below(figure, handles)
    return _save(figure, path)


def critic_curves(rows: Metrics, path: Target) -> Path:
    """Critic loss and adversarial loss beside the closed-form W2: the paper's figure 3.

    W2 between the normals p(z_t | h_t) and q(z_t | x_t, h_t), averaged over frames, bounds the
    number of a 1-Lipschitz critic of single steps from above. A clipped critic has a scale of
    its own, and one that is fed redrawn paths is not bounded by it.

    Args:
        rows: as for :func:`learning_curves`, with ``critic_loss``, ``critic_penalty`` or
            ``critic_distance``, and ``closed_form_w2``; at most 6 rows with a critic are drawn.
        path: PNG to write.

    Returns:
        The path.

    Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, figure 3.
    """
    styles = row_styles(str(row["row"]) for row in rows)
    loss, penalty = _curves(rows, "critic_loss"), _curves(rows, "critic_penalty")
    number = _curves(rows, "critic_distance") | penalty
    w2 = _curves(rows, "closed_form_w2")
    critics = [s for s in styles if any(label == s for label, _ in (*loss, *number))]
    if not critics:
        return _sentence("No row of this comparison has a critic.", path)
    shown = critics[:6]
    figure = _figure(max(6.5, 1.2 + 3.1 * len(shown)), 6.0)
    more = f" (first 6 of {len(critics)} rows)" if len(critics) > 6 else ""
    figure.suptitle(f"What the critics say, beside the closed-form W2{more}", fontweight="bold")
    grid = figure.subplots(2, len(shown), squeeze=False, sharex="col")
    for column, label in enumerate(shown):
        top, bottom = grid[:, column]
        top.set_title(_shorten(label, 30), color=_ink(styles[label].colour), fontweight="bold")
        for axes, curves, colour, ls in (
            (top, loss, styles[label].colour, "-"),
            (bottom, w2, _GREY, (0, (4, 2))),
            (bottom, number, styles[label].colour, "-"),
        ):
            for steps, values in _seeds(curves, label):
                axes.plot(steps, _smooth(values), color=colour, ls=ls, lw=1.2)
        _symlog(bottom, _values(number, label), _values(w2, label))
        bottom.axhline(0.0, color=_BLACK, lw=0.6, zorder=0)
        _tidy(top, "")
        _tidy(bottom, "SVI step")
    grid[0, 0].set_ylabel("critic loss")
    grid[1, 0].set_ylabel("adversarial loss\n(distance, units of z)")
    _legend_below(
        figure,
        [
            Line2D([], [], color=_BLACK, lw=2, label="critic's number (in the row's colour)"),
            Line2D(
                [], [], color=_GREY, ls=(0, (4, 2)), lw=2, label="closed-form W2 (upper bound)"
            ),
        ],
        "W2 bounds 1-Lipschitz critics of single steps; a clipped critic has a scale of its own",
    )
    return _save(figure, path)


def sequences(
    panels: Mapping[str, Any],
    path: Target,
    *,
    kind: str,
    sample_rate: float | None = None,
    frame_seconds: float | None = None,
    title: str,
) -> Path:
    """A held-out sequence, its one-step predictions, and what the model makes up alone.

    Args:
        panels: any of ``observed`` (T, X), ``one-step prediction`` (K, T, X), draws, and
            ``freely generated`` (T, X) or (n, T, X); arrays or tensors.
        path: PNG to write.
        kind: "real": lines of the first four features, waveforms where ``sample_rate`` is given
            and X is at least 100, images where X is more than 32; "binary": piano rolls, column
            0 of 88 being MIDI note 21.
        sample_rate: of a waveform whose frames are (X,) pieces, in hertz.
        frame_seconds: time between frames, in seconds; the axis counts frames if None.
        title: of the picture.

    Returns:
        The path.

    Raises:
        ValueError: another kind, no panel, or one of another shape.
    """
    if kind not in ("real", "binary"):
        raise ValueError(f"kind must be 'real' or 'binary', got {kind!r}")
    arrays = {name: _stack(name, value) for name, value in panels.items()}
    if not arrays:
        raise ValueError(f"panels must hold at least one of {', '.join(_PANELS)}, got none")
    width = max(a.shape[-1] for a in arrays.values())
    clock = (frame_seconds, "time (seconds)") if frame_seconds else (1.0, "frame")
    if kind == "binary":
        figure = _rolls(arrays, clock)
    elif sample_rate is not None and width >= 100:
        figure = _waveforms(arrays, sample_rate)
    elif width <= 32:
        figure = _lines(arrays, clock)
    else:
        figure = _images(arrays, clock)
    figure.suptitle(title, fontweight="bold")
    return _save(figure, path)


def latent_posterior(inference_data: Any, path: Target, title: str) -> Path:
    """The latents of one held-out sequence: 94 % highest-density intervals over time, by ArviZ.

    Args:
        inference_data: what :func:`inference.to_arviz` gave, ``InferenceData`` of arviz 0.x or
            ``DataTree`` of 1.x; ``posterior["z"]`` with dimensions (chain, draw, time, latent),
            and if present ``prior["z"]``.
        path: PNG to write; of more than 8 latents it shows those whose posterior mean moves
            most over time, in posterior deviations.
        title: of the picture.

    Returns:
        The path.
    """
    posterior, prior = (_latents(inference_data, group) for group in ("posterior", "prior"))
    if posterior is None:
        return _sentence("This model has no latents.", path)
    with warnings.catch_warnings():  # 0.23 announces its own refactoring at every import
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    asked = {"hdi_prob" if az.__version__.startswith("0.") else "prob": 0.94}

    def interval(z: Any) -> np.ndarray:
        found = az.hdi(z, **asked)
        return np.asarray(found[z.name] if hasattr(found, "data_vars") else found)

    mean = np.asarray(posterior.mean(dim=("chain", "draw")))  # (T, Z)
    deviation = np.asarray(posterior.std(dim=("chain", "draw"))).mean(axis=0)
    moves = mean.std(axis=0) / np.maximum(deviation, 1e-12)
    chosen = np.sort(np.argsort(-moves, kind="stable")[:8])
    times = np.asarray(posterior["time"].values, dtype=float)
    bands = [(interval(posterior), _BLUE, 0.45)]
    if prior is not None:
        bands.insert(0, (interval(prior), _GREY, 0.35))
    columns = min(4, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = _figure(max(6.0, 0.6 + 2.7 * columns), 1.4 + 2.1 * lines)
    more = f" ({len(chosen)} of {mean.shape[1]} latents)" if mean.shape[1] > 8 else ""
    figure.suptitle(title + more, fontweight="bold")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for axes, k in zip(grid.flat, chosen, strict=False):
        for band, colour, alpha in bands:
            around = times if len(times) > 1 else times[[0, 0]] + np.array([-0.4, 0.4])
            low, high = (np.broadcast_to(band[:, k, side], around.shape) for side in (0, 1))
            axes.fill_between(around, low, high, color=colour, alpha=alpha, lw=0)
        axes.plot(times, mean[:, k], color=_BLUE, lw=1.5, marker="." if len(times) < 40 else "")
        axes.set_title(f"z[{k}]", fontsize=10)
        _tidy(axes, "")
    unused = list(grid.flat)[len(chosen) :]
    for axes in unused:
        axes.set_visible(False)
    for i, axes in enumerate(list(grid.flat)[: len(chosen)]):
        if i + columns >= len(chosen):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("frame" if times[0] == 1.0 else "time (seconds)")
    handles: list[Any] = [
        Line2D([], [], color=_BLUE, lw=1.5, marker=".", label="posterior mean"),
        Patch(color=_BLUE, alpha=0.45, lw=0, label="posterior, 94 % HDI"),
    ]
    if prior is not None:
        handles.append(Patch(color=_GREY, alpha=0.35, lw=0, label="model run freely, 94 % HDI"))
    _legend_below(figure, handles)
    return _save(figure, path)


def rate_bars(results: Metrics, path: Target) -> Path:
    """Held-out bounds of every row, and what their KL rate is spent on.

    A row's values are means over its seeds, with the standard deviation over seeds as error bar.
    Bars of the bounds start at the baseline of independent normals if it is given, else at 0.

    Args:
        results: dicts with ``row`` and ``seed``, and in nats per frame ``iwae_per_frame``,
            ``elbo_per_frame``, ``kl_per_frame``, ``information_at_most``,
            ``aggregate_mismatch_at_least`` and ``baseline_per_frame``; absent, None and NaN
            are left out.
        path: PNG to write.

    Returns:
        The path.
    """
    styles = row_styles(str(result["row"]) for result in results)
    if not styles:
        return _sentence("There are no results to show.", path)
    baselines = [v for r in results if math.isfinite(v := _number(r.get("baseline_per_frame")))]
    baseline = baselines[0] if baselines else None
    figure = _figure(12.0, 2.3 + 0.62 * len(styles))
    figure.suptitle("Held-out bounds, and where the KL goes", fontweight="bold")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_title("Bounds on the log-likelihood (further right is better)")
    left.set_xlabel("nats per frame")
    right.set_title("KL rate: information and aggregate mismatch")
    right.set_xlabel("nats per frame")
    places = {label: float(i) for i, label in enumerate(styles)}
    bounds = {
        key: {label: _over_seeds(results, label, key) for label in styles}
        for key in ("iwae_per_frame", "elbo_per_frame")
    }
    _bound_bars(left, bounds, places, styles, baseline)
    parts = ("information_at_most", "aggregate_mismatch_at_least", "kl_per_frame")
    rates = {key: {label: _over_seeds(results, label, key) for label in styles} for key in parts}
    split = _rate_stack(right, rates, places, styles)
    left.set_yticks(list(places.values()), [_shorten(label, 34) for label in places])
    left.set_ylim(len(places) - 0.5, -0.5)
    for axes in (left, right):
        _tidy(axes, axes.get_xlabel())
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    handles: list[Any] = [
        Patch(facecolor=_GREY, edgecolor=_GREY, label="left: IWAE"),
        Patch(facecolor=_pale(_GREY), edgecolor=_GREY, label="left: ELBO"),
    ]
    if baseline is not None:
        handles.append(
            Line2D([], [], color=_BLACK, ls="--", lw=1, label="left: independent dimensions")
        )
    if split:
        handles += [
            Patch(facecolor=_GREY, edgecolor=_GREY, label="right: information (at most)"),
            Patch(
                facecolor=_pale(_GREY),
                edgecolor=_GREY,
                hatch="////",
                label="right: aggregate mismatch (at least)",
            ),
        ]
    seeds = max(
        np.unique([str(r.get("seed")) for r in results if r["row"] == s]).size for s in styles
    )
    _legend_below(
        figure, handles, "error bars: standard deviation over seeds" if seeds > 1 else ""
    )
    return _save(figure, path)


# metrics ---------------------------------------------------------------------------------------

Curves = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def _number(value: Any) -> float:
    """A float; NaN for None, an empty cell of a CSV file, or anything not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _curves(rows: Metrics, key: str, sign: float = 1.0) -> Curves:
    """Steps and finite values by (row, seed), in order of step."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        step, value = _number(row.get("step")), _number(row.get(key))
        if not math.isnan(step + value):
            place = (str(row["row"]), str(row.get("seed")))
            points.setdefault(place, []).append((step, sign * value))
    columns = {place: np.array(sorted(found)) for place, found in points.items()}
    return {place: (found[:, 0], found[:, 1]) for place, found in columns.items()}


def _seeds(curves: Curves, label: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [curve for (row, _), curve in curves.items() if row == label]


def _values(curves: Curves, label: str) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(values for _, values in _seeds(curves, label))])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the curve, shorter at its ends."""
    reach = len(values) // 40
    if reach == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first, after = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (total[after] - total[first]) / (after - first)


def _over_seeds(results: Metrics, label: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation (0 for one seed) of the finite values; NaN without any."""
    found = [_number(r.get(key)) for r in results if str(r["row"]) == label]
    values = np.array([v for v in found if not math.isnan(v)])
    if not len(values):
        return math.nan, 0.0
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


# scales ----------------------------------------------------------------------------------------


def _zoom(
    axes: Axes, groups: Sequence[Curves], name: str, sign: float, styles: Mapping[str, Style]
) -> None:
    """Limits from the rows that end near the best; a note for each of the others.

    ``sign`` is 1 where larger is better, -1 where smaller is.
    """
    ends: dict[str, float] = {}  # larger is better
    early: dict[str, float] = {}
    for label in styles:
        curves = [c for c in _seeds(groups[0], label)]
        if curves:
            ends[label] = float(
                np.mean([sign * v[-max(1, len(v) // 20) :].mean() for _, v in curves])
            )
            early[label] = min(float(np.quantile(sign * v, 0.08)) for _, v in curves)
    if not ends:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=_GREY)
        return
    best = max(ends, key=lambda label: ends[label])
    reach = 1.5 * max(ends[best] - early[best], 1.0)
    near = [label for label in ends if ends[label] >= ends[best] - reach]
    low = max(min(early[label] for label in near), ends[best] - reach)
    seen = [sign * _values(group, label) for group in groups for label in near]
    high = max(float(s.max()) for s in seen if len(s))
    room = max(high - low, 1e-3 * max(1.0, abs(high)))
    far = [label for label in ends if label not in near]
    low, high = low - room * (0.05 + 0.075 * len(far)), high + 0.05 * room
    axes.set_ylim(*((low, high) if sign > 0 else (-high, -low)))
    for i, label in enumerate(far):
        axes.text(
            0.985,
            0.02 + 0.062 * i if sign > 0 else 0.98 - 0.062 * i,
            f"{_shorten(label, 34)}: {name} {_show(sign * ends[label])} at the end (off scale)",
            transform=axes.transAxes,
            ha="right",
            va="bottom" if sign > 0 else "top",
            fontsize=9,
            color=_ink(styles[label].colour),
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.5},
            zorder=5,
        )


def _symlog(axes: Axes, *groups: np.ndarray) -> None:
    """A symmetric logarithmic y axis where the curves are of very different size."""
    sizes = [float(np.median(np.abs(g))) for g in groups if len(g) and np.abs(g).max() > 0]
    sizes = [s for s in sizes if s > 0]
    if len(sizes) < 2 or max(sizes) < 30 * min(sizes):
        return
    threshold = 10.0 ** math.floor(math.log10(min(sizes)))
    axes.set_yscale("symlog", linthresh=threshold)
    locator = SymmetricalLogLocator(base=10, linthresh=threshold)
    locator.set_params(numticks=6)
    axes.yaxis.set_major_locator(locator)


def _far_below(values: Iterable[float], anchor: float | None) -> float:
    """The value under which a bound is off the scale set by the better rows."""
    finite = sorted((v for v in values if not math.isnan(v)), reverse=True)
    if not finite:
        return -math.inf
    upper = finite[: (len(finite) + 1) // 2]
    spread = max(finite[0] - upper[-1], 1.0, 0.2 * abs(finite[0]))
    if anchor is not None:
        spread = max(spread, 0.2 * (finite[0] - anchor))
    return finite[0] - 10.0 * spread


def _show(value: float) -> str:
    """A number for a label, with the minus sign of the axes."""
    size = abs(value)
    text = f"{value:.1e}" if size >= 1e5 else f"{value:.0f}" if size >= 100 else f"{value:.2f}"
    return text.replace("-", "\N{MINUS SIGN}").replace("e+0", "e").replace("e+", "e")


def _shorten(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "\N{HORIZONTAL ELLIPSIS}"


# bars ------------------------------------------------------------------------------------------

Bars = Mapping[str, Mapping[str, tuple[float, float]]]


def _bound_bars(
    axes: Axes,
    bounds: Bars,
    places: Mapping[str, float],
    styles: Mapping[str, Style],
    baseline: float | None,
) -> None:
    means = [mean for column in bounds.values() for mean, _ in column.values()]
    floor = _far_below(means, baseline)
    anchor = 0.0 if baseline is None else baseline
    inside = [m for m in means if m >= floor] + [anchor]
    low, high = min(inside), max(inside)
    room = max(high - low, 1e-3)
    off = any(m < floor for m in means)
    low, high = low - room * (0.3 if off or low < anchor else 0.04), high + 0.2 * room
    for (key, column), shift in zip(bounds.items(), (-0.19, 0.19), strict=True):
        for label, (mean, error) in column.items():
            colour = styles[label].colour
            place = places[label] + shift
            if math.isnan(mean):
                if key == "iwae_per_frame":
                    _note(axes, anchor, places[label], "no value", _GREY, low, high)
                continue
            face = colour if key == "iwae_per_frame" else _pale(colour)
            end = max(mean, low)
            axes.barh(place, end - anchor, 0.34, left=anchor, color=face, edgecolor=colour, lw=0.8)
            if mean < floor:
                # inside the bar that runs out of the panel
                text = f"\N{BLACK LEFT-POINTING TRIANGLE} {_show(mean)} (off scale)"
                axes.text(anchor + 0.015 * (high - low), place, text, va="center", fontsize=8.5)
                continue
            if error:
                axes.errorbar(mean, place, xerr=error, color=_BLACK, lw=1, capsize=2)
            _note(axes, end, place, _show(mean), _BLACK, low, high, error, end < anchor)
    axes.set_xlim(low, high)
    if baseline is not None:
        axes.axvline(baseline, color=_BLACK, ls="--", lw=1)


def _rate_stack(
    axes: Axes, rates: Bars, places: Mapping[str, float], styles: Mapping[str, Style]
) -> bool:
    """Stacked bars of the split rate, or pale ones of the rate alone; whether any was split."""
    information, mismatch, whole = rates.values()
    totals = {}
    for label in places:
        both = information[label][0] + mismatch[label][0]
        totals[label] = whole[label][0] if math.isnan(both) else both
    ceiling = -_far_below((-t for t in totals.values()), None)
    high = max([t for t in totals.values() if t <= ceiling], default=1.0)
    high = 1.3 * max(high, 1e-3)
    split = False
    for label, place in places.items():
        colour, total = styles[label].colour, totals[label]
        if math.isnan(total) or total == 0.0:
            _note(axes, 0.0, place, "no KL", _GREY, 0.0, high)
            continue
        parts = [(information[label], colour, ""), (mismatch[label], _pale(colour), "////")]
        if math.isnan(parts[0][0][0] + parts[1][0][0]):
            parts = [(whole[label], _pale(colour), "")]
        else:
            split = True
        start = 0.0
        for (mean, _), face, hatch in parts:
            shown = mean * min(1.0, high / total) if total > ceiling else mean
            axes.barh(
                place, shown, 0.6, left=start, color=face, edgecolor=colour, hatch=hatch, lw=0.8
            )
            start += shown
        error = whole[label][1]
        if total > ceiling:
            text = f"{_show(total)} (off scale) \N{BLACK RIGHT-POINTING TRIANGLE}"
            axes.text(
                0.985 * high,
                place,
                text,
                ha="right",
                va="center",
                fontsize=8.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.5},
            )
            continue
        if error:
            axes.errorbar(total, place, xerr=error, color=_BLACK, lw=1, capsize=2)
        text = _show(total) if len(parts) == 2 else f"{_show(total)} (not split)"
        _note(axes, start, place, text, _BLACK, 0.0, high, error)
    axes.set_xlim(0.0, high)
    return split


def _note(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    low: float,
    high: float,
    error: float = 0.0,
    leftwards: bool = False,
) -> None:
    """Text just beyond the end of a bar and of its error bar."""
    gap = error + 0.012 * (high - low)
    side = "right" if leftwards else "left"
    x = x - gap if leftwards else x + gap
    axes.text(x, y, text, ha=side, va="center", fontsize=8.5, color=colour)


def _pale(colour: str) -> tuple[float, float, float]:
    red, green, blue = (1 - 0.35 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _ink(colour: str) -> str:
    """The colour for letters on white: black instead of yellow."""
    return _BLACK if colour == _YELLOW else colour


# sequences -------------------------------------------------------------------------------------

_PANELS = ("observed", "one-step prediction", "freely generated")
_COLOURS = {"observed": _BLACK, "one-step prediction": _BLUE, "freely generated": _GREEN}
_MAPS = {"observed": "Greys", "one-step prediction": "Blues", "freely generated": "Greens"}
Clock = tuple[float, str]  # length of a frame, label of the axis


def _stack(name: str, value: Any) -> np.ndarray:
    """An array (n, T, X) of floats."""
    if name not in _PANELS:
        raise ValueError(f"panels may hold {', '.join(_PANELS)}, got {name!r}")
    array = np.array(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=float)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(
            f"panel {name!r} must have shape (T, X) or (n, T, X), got {array.shape}; a model "
            "without this panel leaves it out"
        )
    with np.errstate(invalid="ignore"):
        array[~(np.abs(array) < 1e6)] = np.nan  # diverged: left out of the picture
    return array


def _lines(arrays: Mapping[str, np.ndarray], clock: Clock) -> Figure:
    """Up to four features: data and prediction on the left, generated on the right."""
    seen = [name for name in _PANELS[:2] if name in arrays]
    made = arrays.get("freely generated")
    features = min(4, max(a.shape[-1] for a in arrays.values()))
    sides = int(bool(seen)) + int(made is not None)
    figure = _figure(5.6 * sides if sides > 1 else 7.0, 1.5 + 1.55 * features)
    grid = figure.subplots(features, sides, squeeze=False, sharex="col", sharey="row")
    handles: list[Any] = []
    if seen:
        grid[0, 0].set_title("held-out sequence, predicted one step ahead")
        for k, axes in enumerate(grid[:, 0]):
            handles = _with_band(axes, arrays, seen, k, clock)
    if made is not None:
        count = min(len(made), 5)
        grid[0, -1].set_title("freely generated")
        for k, axes in enumerate(grid[:, -1]):
            for i in range(count):
                axes.plot(
                    _times(made, clock), made[i, :, k], color=_GREEN, lw=1.2, alpha=1 - 0.15 * i
                )
        label = "generated" if count == 1 else f"generated, {count} sequences"
        handles.append(Line2D([], [], color=_GREEN, lw=1.2, label=label))
    for k in range(features):
        grid[k, 0].set_ylabel(f"feature {k}")
        _keep_scale(grid[k, 0], {name: array[..., k] for name, array in arrays.items()})
        for axes in grid[k]:
            _tidy(axes, clock[1] if k + 1 == features else "")
    figure.align_ylabels()
    _legend_below(figure, handles)
    return figure


def _with_band(
    axes: Axes, arrays: Mapping[str, np.ndarray], names: Sequence[str], k: int, clock: Clock
) -> list[Any]:
    """The observed line over median and 5-95 % band of the draws; the legend's handles."""
    handles: list[Any] = []
    for name in names:
        array, colour = arrays[name], _COLOURS[name]
        times = _times(array, clock)
        if name == "observed":
            dots = "." if len(times) < 60 else ""
            (line,) = axes.plot(times, array[0, :, k], color=colour, lw=1.3, marker=dots, zorder=3)
            line.set_label(name)
            handles.append(line)
            continue
        low, middle, high = _quantiles(array)
        handles += axes.plot(
            times, middle[:, k], color=colour, lw=1.3, label="predicted, median of draws"
        )
        band = axes.fill_between(
            times, low[:, k], high[:, k], color=colour, alpha=0.25, lw=0, label="predicted, 5-95 %"
        )
        handles.append(band)
    return handles


def _keep_scale(axes: Axes, arrays: Mapping[str, np.ndarray]) -> None:
    """Limits by the other panels where one, as of a diverging model, is far off the observed."""
    finite = {name: array[np.isfinite(array)] for name, array in arrays.items()}
    if len(seen := finite.get("observed", np.zeros(0))) == 0:
        return
    middle, room = (seen.min() + seen.max()) / 2, max(float(np.ptp(seen)), 1e-6)
    sizes = {name: float(np.abs(v - middle).max(initial=0.0)) for name, v in finite.items()}
    near = [finite[name] for name, size in sizes.items() if size <= 5 * room]
    if len(near) < len(finite):
        low, high = (
            min(float(v.min()) for v in near if len(v)),
            max(float(v.max()) for v in near if len(v)),
        )
        axes.set_ylim(low - 0.3 * room, high + 0.3 * room)


def _waveforms(arrays: Mapping[str, np.ndarray], sample_rate: float) -> Figure:
    """Frames put end to end, (T * X,), one axis a panel."""
    names = [name for name in _PANELS if name in arrays]
    figure = _figure(10.5, 1.2 + 1.8 * len(names))
    stacked = figure.subplots(len(names), 1, squeeze=False, sharex=True, sharey=True)[
        :, 0
    ].tolist()
    for axes, name in zip(stacked, names, strict=True):
        array = arrays[name]
        seconds = np.arange(array[0].size) / sample_rate
        if name == "one-step prediction":
            low, middle, high = (q.reshape(-1) for q in _quantiles(array))
            axes.fill_between(seconds, low, high, color=_SKY, alpha=0.6, lw=0)
            axes.plot(seconds, middle, color=_BLUE, lw=0.7)
            axes.set_title("predicted one frame ahead: median (line), 5-95 % (band)", fontsize=10)
        else:
            axes.plot(seconds, array[0].reshape(-1), color=_COLOURS[name], lw=0.7)
            axes.set_title(name, fontsize=10)
        axes.margins(x=0)
        _tidy(axes, "time (seconds)" if axes is stacked[-1] else "")
        axes.set_ylabel("amplitude")
    _keep_scale(stacked[0], arrays)
    return figure


def _rolls(arrays: Mapping[str, np.ndarray], clock: Clock) -> Figure:
    """Three images of notes over time; the prediction as probability, the mean of its draws."""
    columns = max(a.shape[-1] for a in arrays.values())
    first, label = (21, "MIDI note") if columns == 88 else (0, "feature")
    sounding = np.zeros(columns, dtype=bool)
    for name, array in arrays.items():
        if name != "one-step prediction":
            sounding[: array.shape[-1]] |= (array[0] > 0.5).any(axis=0)
    used = np.flatnonzero(sounding) if sounding.any() else np.array([0, columns - 1])
    limits = (max(used[0] - 3.5, -0.5) + first, min(used[-1] + 3.5, columns - 0.5) + first)
    names = [name for name in _PANELS if name in arrays]
    figure = _figure(10.5, 1.3 + 2.2 * len(names))
    stacked = figure.subplots(len(names), 1, squeeze=False, sharey=True)[:, 0].tolist()
    for axes, name in zip(stacked, names, strict=True):
        image = arrays[name].mean(axis=0) if name == "one-step prediction" else arrays[name][0]
        shown = _show_image(axes, image, clock, first, _MAPS[name])
        shown.set_clim(0.0, 1.0)
        axes.set_ylim(*limits)
        title = "predicted one step ahead" if name == "one-step prediction" else name
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(label)
        if name == "one-step prediction":
            figure.colorbar(shown, ax=stacked, label="probability", shrink=0.6, pad=0.01)
    _common_times(stacked, clock)
    return figure


def _images(arrays: Mapping[str, np.ndarray], clock: Clock) -> Figure:
    """Many real features: images over time with one scale of colour."""
    names = [name for name in _PANELS if name in arrays]
    figure = _figure(10.5, 1.3 + 2.2 * len(names))
    stacked = figure.subplots(len(names), 1, squeeze=False)[:, 0].tolist()
    images = [_quantiles(arrays[n])[1] if n == _PANELS[1] else arrays[n][0] for n in names]
    finite = [np.abs(image[np.isfinite(image)]) for image in images[:2]]
    size = max((float(np.quantile(f, 0.99)) for f in finite if len(f)), default=1.0) or 1.0
    for axes, name, image in zip(stacked, names, images, strict=True):
        shown = _show_image(axes, image, clock, 0, "RdBu_r")
        shown.set_clim(-size, size)
        title = "predicted one step ahead, median" if name == "one-step prediction" else name
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("feature")
    figure.colorbar(shown, ax=stacked, label="value", shrink=0.6, pad=0.01)
    _common_times(stacked, clock)
    return figure


def _show_image(axes: Axes, image: np.ndarray, clock: Clock, first: int, colours: str) -> Any:
    """(T, X) with time to the right; pixel t is centred on the time of frame t."""
    length, width = image.shape
    step = clock[0]
    extent = (0.5 * step, (length + 0.5) * step, first - 0.5, first + width - 0.5)
    return axes.imshow(
        image.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=colours,
        extent=extent,
    )


def _common_times(stacked: Sequence[Axes], clock: Clock) -> None:
    latest = max(axes.get_xlim()[1] for axes in stacked)
    for axes in stacked:
        axes.set_xlim(0.5 * clock[0], latest)
        if axes is not stacked[-1]:
            axes.tick_params(labelbottom=False)
    stacked[-1].set_xlabel("time step" if clock[1] == "frame" else clock[1])


def _times(array: np.ndarray, clock: Clock) -> np.ndarray:
    """Frame t, counted from 1, in frames or seconds, (T,)."""
    return clock[0] * np.arange(1, array.shape[-2] + 1)


def _quantiles(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """5 %, 50 % and 95 % over the draws, each (T, X)."""
    low, middle, high = np.quantile(array, [0.05, 0.5, 0.95], axis=0)
    return low, middle, high


def _latents(inference_data: Any, group: str) -> Any:
    """``z`` of a group, or None where the group or its latents are absent."""
    try:
        z = inference_data[group]["z"]
    except (KeyError, AttributeError):
        return None
    return z if z.size else None


# figures ---------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E3E3E3", lw=0.6)
    axes.set_axisbelow(True)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _legend_below(figure: Figure, handles: Sequence[Any], note: str = "") -> None:
    inches = [0.6 + 0.075 * len(str(handle.get_label())) for handle in handles]
    width = figure.get_figwidth() - 0.4
    fitting = len(handles) if sum(inches) <= width else int(width / max(inches))
    columns = max(1, min(len(handles), fitting))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=note or None,
        title_fontproperties={"size": 9, "style": "italic"},
    )


def _sentence(text: str, path: Target) -> Path:
    """A picture that says why there is none."""
    figure = _figure(6.5, 1.6)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, color="#444444")
    return _save(figure, path)


def _save(figure: Figure, path: Target) -> Path:
    target = Path(path)
    figure.savefig(target, dpi=_DPI, format="png")
    return target
