"""One held-out sequence: does the model predict the next step, and what does it make up alone?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import Target

Array = np.ndarray
Clock = tuple[Array, str]  # times of the frames, label of the axis

_PANELS = ("observed", "one-step prediction", "freely generated")
_FEATURES = 4  # of many real ones, the first are drawn


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
        panels: arrays ``observed`` (T, X), ``one-step prediction`` (K, T, X), draws, and
            ``freely generated`` (n, T, X); values that are not finite leave a gap.
        path: PNG to write; returned.
        kind: "real": lines of the first four features, or waveforms where ``sample_rate`` is
            given; "binary": piano rolls, column 0 of 88 being MIDI note 21.
        sample_rate: of a waveform whose frames are (X,) pieces, in hertz.
        frame_seconds: time between frames, in seconds; the axis counts frames if None.
        title: of the picture.
    """
    observed, predicted, generated = (_gaps(np.asarray(panels[name], float)) for name in _PANELS)
    times = np.arange(1, len(observed) + 1) * (frame_seconds or 1.0)
    clock = (times, "time (seconds)" if frame_seconds else "frame")
    if kind == "binary":
        picture = _rolls([observed, predicted.mean(axis=0), generated[0]], clock, title)
    else:
        band = np.quantile(predicted, [0.05, 0.5, 0.95], axis=0)
        if sample_rate is None:
            picture = _lines(observed, band, generated, clock, title)
        else:
            picture = _waveforms(observed, band, generated[0], sample_rate, title)
    return style.save(picture, path)


def made(
    numbers: Mapping[str, Any], path: Target, *, frame_seconds: float | None = None, title: str
) -> Path:
    """Sequences of numbers by name, (T, X), the first four features above each other.

    Args:
        numbers: the first is observed; names may say "begun" or "free".
        path: PNG to write; returned.
        frame_seconds: time between frames; the axis counts frames if None.
        title: of the picture.
    """
    first = np.asarray(next(iter(numbers.values())), float)
    features = min(_FEATURES, first.shape[-1])
    picture = style.figure(9.0, 1.2 + 1.55 * features, title)
    stacked = picture.subplots(features, 1, squeeze=False, sharex=True)[:, 0]
    colours = {"observed": style.BLACK, "begun": style.BLUE, "free": style.GREEN}
    for k, axes in enumerate(stacked):
        for name, values in numbers.items():
            column = _gaps(np.asarray(values, float))[:, k]
            times = np.arange(1, len(column) + 1) * (frame_seconds or 1.0)
            colour = next((c for word, c in colours.items() if name.startswith(word)), style.BLUE)
            axes.plot(times, column, colour, lw=1.2, label=name)
        axes.set_ylabel(f"feature {k}")
        _keep_scale(axes, first[:, k])
        last = "time (seconds)" if frame_seconds else "frame"
        style.tidy(axes, last if axes is stacked[-1] else "")
    style.legend_below(picture, stacked[0].get_lines())
    return style.save(picture, path)


def _gaps(array: Array) -> Array:
    """NaN, which is not drawn, instead of what a diverging model makes."""
    return np.where(np.abs(array) < 1e6, array, np.nan)


def _lines(observed: Array, band: Array, generated: Array, clock: Clock, title: str) -> Figure:
    """A line of axes for each feature: data and prediction on the left, generated on the right."""
    times, xlabel = clock
    features = min(_FEATURES, observed.shape[-1])
    picture = style.figure(11.2, 1.2 + 1.55 * features, title)
    grid = picture.subplots(features, 2, squeeze=False, sharex="col", sharey="row")
    grid[0, 0].set_title("held-out sequence, predicted one step ahead")
    grid[0, 1].set_title("freely generated")
    for k, (left, right) in enumerate(grid):
        low, middle, high = band[..., k]
        pale = (style.BLUE, 0.25)
        dots = "." if len(times) < 60 else ""
        handles = [
            *left.plot(times, observed[:, k], style.BLACK, lw=1.3, marker=dots, label="observed"),
            *left.plot(times, middle, style.BLUE, lw=1.3, label="predicted, median"),
            left.fill_between(times, low, high, color=pale, lw=0, label="predicted, 5-95 %"),
            style.line(f"generated, {len(generated)} sequences", style.GREEN),
        ]
        for i, drawn in enumerate(generated):
            right.plot(times, drawn[:, k], style.GREEN, lw=1.2, alpha=1 - 0.7 * i / len(generated))
        left.set_ylabel(f"feature {k}")
        _keep_scale(left, observed[:, k])
        for axes in (left, right):
            style.tidy(axes, xlabel if k + 1 == features else "")
    picture.align_ylabels()
    style.legend_below(picture, handles)
    return picture


def _waveforms(
    observed: Array, band: Array, generated: Array, sample_rate: float, title: str
) -> Figure:
    """Frames put end to end, (T * X,), one axis a panel."""
    predicted = "predicted one frame ahead: median (line), 5-95 % (band)"
    picture, stacked = _stacked(title, predicted, "time (seconds)", "amplitude")
    seconds = np.arange(observed.size) / sample_rate
    low, middle, high = band.reshape(3, -1)
    stacked[0].plot(seconds, observed.ravel(), style.BLACK, lw=0.7)
    stacked[1].fill_between(seconds, low, high, color=style.SKY, alpha=0.6, lw=0)
    stacked[1].plot(seconds, middle, style.BLUE, lw=0.7)
    stacked[2].plot(seconds, generated.ravel(), style.GREEN, lw=0.7)
    stacked[0].margins(x=0)
    _keep_scale(stacked[0], observed)
    return picture


def _rolls(images: list[Array], clock: Clock, title: str) -> Figure:
    """Three images of notes over time; the prediction as probability, the mean of its draws."""
    times, xlabel = clock
    columns = images[0].shape[1]
    first, ylabel = (21, "MIDI note") if columns == 88 else (0, "feature")
    sounding = np.flatnonzero((images[0] + images[2] > 0).any(axis=0))
    used = sounding if len(sounding) else np.array([0, columns - 1])
    picture, stacked = _stacked(title, "predicted one step ahead", xlabel, ylabel)
    half = times[0] / 2  # pixel t is centred on the time of frame t
    extent = (half, times[-1] + half, first - 0.5, first + columns - 0.5)
    look: Any = {"cmap": "Blues", "vmin": 0, "vmax": 1, "aspect": "auto", "origin": "lower"}
    for axes, image in zip(stacked, images, strict=True):
        shown = axes.imshow(image.T, extent=extent, zorder=1, **look)
    axes.set_ylim(first + used[0] - 3, first + used[-1] + 3)
    picture.colorbar(shown, ax=stacked, label="probability", shrink=0.6, pad=0.01)
    return picture


def _stacked(title: str, predicted: str, xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    """Three axes, one a panel."""
    picture = style.figure(10.5, 7.2, title)
    stacked = picture.subplots(3, 1, sharex=True, sharey=True)
    for axes, name in zip(stacked, ("observed", predicted, "freely generated"), strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(ylabel)
        style.tidy(axes, xlabel if axes is stacked[-1] else "")
    return picture, stacked


def _keep_scale(axes: Axes, observed: Array) -> None:
    """Limits never far off the data, which is standardised: a model may diverge."""
    reach = 2 * max(float(np.ptp(observed)), 1.0)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, observed.min() - reach), min(high, observed.max() + reach))
