"""Sequences over time: data, one-step predictions, and what a model generates."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.protocols import one_of
from pyro_avrnn.data._checks import Numbers
from pyro_avrnn.plots import style
from pyro_avrnn.plots.sounds import draw_rolls
from pyro_avrnn.plots.style import BLACK, BLUE, GREEN, SKY, Target

Array = np.ndarray

_PANELS = ("observed", "one-step prediction", "freely generated")
_FEATURES = 4  # of many real ones, the first are drawn


def sequences(
    panels: Mapping[str, Numbers],
    path: Target,
    *,
    kind: str,
    sample_rate: float | None = None,
    frame_seconds: float | None = None,
    title: str,
) -> Path:
    """Draw a held-out sequence, its one-step predictions, and free runs of the model.

    Args:
        panels: arrays ``observed`` (T, X), ``one-step prediction`` (K, T, X), draws, and
            ``freely generated`` (n, T, X); values that are not finite leave a gap.
        path: PNG to write; returned.
        kind: "real": lines of the first four features, or waveforms where ``sample_rate`` is
            given; "binary": piano rolls, where column 0 of 88 is MIDI note 21.
        sample_rate: of a waveform whose frames are (X,) pieces, in hertz.
        frame_seconds: time between frames, in seconds; the axis counts frames if None.
        title: of the picture.
    """
    one_of(("real", "binary", "mu-law", "pcm"), kind=kind)
    observed, predicted, generated = (_gaps(panels[name]) for name in _PANELS)
    if kind == "binary":
        rolls = observed, predicted.mean(axis=0), generated[0]
        titles = "observed", "predicted one step ahead", "freely generated"
        first_note = 21 if observed.shape[1] == 88 else None
        named = dict(zip(titles, rolls, strict=True))
        picture = draw_rolls(named, frame_seconds, first_note, title)
    else:
        band = np.quantile(predicted, [0.05, 0.5, 0.95], axis=0)
        if sample_rate is None:
            clock = style.clock(len(observed), frame_seconds)
            picture = _lines(observed, band, generated, clock, title)
        else:
            picture = _waveforms(observed, band, generated[0], sample_rate, title)
    return style.save(picture, path)


def features(
    numbers: Mapping[str, Numbers], path: Target, *, frame_seconds: float | None = None, title: str
) -> Path:
    """Draw the first four features of sequences of numbers above each other.

    Args:
        numbers: the sequences by name, (T, X), the observed one first. Names that begin with
            "observed", "begun" or "free" have their own colours.
        path: PNG to write; returned.
        frame_seconds: time between frames; the axis counts frames if None.
        title: of the picture.
    """
    drawn = {name: _gaps(values) for name, values in numbers.items()}
    first = next(iter(drawn.values()))
    count = min(_FEATURES, first.shape[-1])
    picture = style.figure(9.0, 1.2 + 1.55 * count, title)
    stacked = picture.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    colours = {"observed": BLACK, "begun": BLUE, "free": GREEN}
    for k, axes in enumerate(stacked):
        for name, values in drawn.items():
            times, xlabel = style.clock(len(values), frame_seconds)
            colour = next((c for word, c in colours.items() if name.startswith(word)), BLUE)
            axes.plot(times, values[:, k], colour, lw=1.2, label=name)
        axes.set_ylabel(f"feature {k}")
        _keep_scale(axes, first[:, k])
        style.tidy(axes, xlabel if axes is stacked[-1] else "")
    style.legend_below(picture, stacked[0].get_lines())
    return style.save(picture, path)


def _gaps(values: Numbers) -> Array:
    """The values as floats, with NaN, which is not drawn, where a model has diverged."""
    array = np.asarray(values, float)
    return np.where(np.abs(array) < 1e6, array, np.nan)


def _lines(
    observed: Array, band: Array, generated: Array, clock: tuple[Array, str], title: str
) -> Figure:
    """A line of axes for each feature: data and prediction on the left, generated on the right."""
    times, xlabel = clock
    count = min(_FEATURES, observed.shape[-1])
    picture = style.figure(11.2, 1.2 + 1.55 * count, title)
    grid = picture.subplots(count, 2, squeeze=False, sharex="col", sharey="row")
    grid[0, 0].set_title("held-out sequence, predicted one step ahead")
    grid[0, 1].set_title("freely generated")
    for k, (left, right) in enumerate(grid):
        low, middle, high = band[..., k]
        pale = (BLUE, 0.25)
        dots = "." if len(times) < 60 else ""
        handles = [
            *left.plot(times, observed[:, k], BLACK, lw=1.3, marker=dots, label="observed"),
            *left.plot(times, middle, BLUE, lw=1.3, label="predicted, median"),
            left.fill_between(times, low, high, color=pale, lw=0, label="predicted, 5-95 %"),
            style.line(f"generated, {len(generated)} sequences", GREEN),
        ]
        for i, drawn in enumerate(generated):
            right.plot(times, drawn[:, k], GREEN, lw=1.2, alpha=1 - 0.7 * i / len(generated))
        left.set_ylabel(f"feature {k}")
        _keep_scale(left, observed[:, k])
        for axes in (left, right):
            style.tidy(axes, xlabel if k + 1 == count else "")
    picture.align_ylabels()
    style.legend_below(picture, handles)
    return picture


def _waveforms(
    observed: Array, band: Array, generated: Array, sample_rate: float, title: str
) -> Figure:
    """Frames put end to end, (T * X,), one axis a panel."""
    predicted = "predicted one frame ahead: median (line), 5-95 % (band)"
    titles = ("observed", predicted, "freely generated")
    picture, stacked = style.stacked(titles, title, "time (seconds)", "amplitude")
    seconds = np.arange(observed.size) / sample_rate
    low, middle, high = band.reshape(3, -1)
    stacked[0].plot(seconds, observed.ravel(), BLACK, lw=0.7)
    stacked[1].fill_between(seconds, low, high, color=SKY, alpha=0.6, lw=0)
    stacked[1].plot(seconds, middle, BLUE, lw=0.7)
    stacked[2].plot(seconds, generated.ravel(), GREEN, lw=0.7)
    stacked[0].margins(x=0)
    _keep_scale(stacked[0], observed)
    return picture


def _keep_scale(axes: Axes, observed: Array) -> None:
    """Limits near the data, which are standardised: a diverging model does not set the scale."""
    reach = 2 * max(float(np.ptp(observed)), 1.0)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, observed.min() - reach), min(high, observed.max() + reach))
