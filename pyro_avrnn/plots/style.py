"""Shared by all pictures: colours of rows, figures and axes, the legend below, the file.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. A dark
red replaces their yellow, which is hard to read on white.
"""

import math
import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from inference.files import atomically
from pyro_avrnn.data._checks import writable

Table = Sequence[Mapping[str, Any]]  # metrics or results: dicts with "row", "seed" and numbers
Target = str | os.PathLike[str]

BLACK, GREY, SKY, BLUE, GREEN = "#000000", "#8C8C8C", "#56B4E9", "#0072B2", "#009E73"
ORANGE = "#D55E00"
DASHED = (0, (4, 2))
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}  # behind text
BAR: dict[str, Any] = {"shrink": 0.7, "pad": 0.01}  # of colours, next to images
_COLOURS = (BLACK, SKY, BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#661100")
_MARKERS = "os^DvP"
_MOST = 8  # panels of a picture
COLUMNS = 4  # panels side by side


class Style(NamedTuple):
    """How a row looks in every picture."""

    colour: str
    marker: str


def row_styles(rows: Iterable[str]) -> dict[str, Style]:
    """A style for each row; eight colours, then the same ones again with another marker.

    Args:
        rows: labels, in the order in which they are drawn; duplicates are ignored.

    Example:
        >>> row_styles(["rnn", "rnn", "elbo"])["elbo"]
        Style(colour='#56B4E9', marker='o')
    """
    styles = cycle(Style(colour, marker) for marker, colour in product(_MARKERS, _COLOURS))
    return dict(zip(dict.fromkeys(rows), styles, strict=False))


def finite(value: float | None) -> float:
    """The number; NaN for one that is absent or infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def show(value: float) -> str:
    """A number for a label, with the minus sign of the axes."""
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def fold(label: str) -> str:
    """A row's label, wrapped in full, since rows may differ in their last option only."""
    parts = label.replace(",", ", ").replace(":", ": ")
    lines = textwrap.wrap(parts, 30, break_on_hyphens=False)
    return "\n".join(line.replace(": ", ":") for line in lines)


def clock(length: int, frame_seconds: float | None) -> tuple[np.ndarray, str]:
    """Times of the frames, counted from 1, and the label of their axis."""
    label = "time (seconds)" if frame_seconds else "frame"
    return np.arange(1, length + 1) * (frame_seconds or 1.0), label


def figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, outside pyplot."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        made.suptitle(title, fontweight="bold")
    return made


def stacked(
    titles: Iterable[str], title: str, xlabel: str, ylabel: str
) -> tuple[Figure, list[Axes]]:
    """A figure with axes above each other, one for each of ``titles``, which share both axes."""
    titles = list(titles)
    picture = figure(10.5, 0.9 + 2.1 * len(titles), title)
    column = picture.subplots(len(titles), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, name in zip(column, titles, strict=True):
        axes.set_title(name, fontsize=10)
        axes.set_ylabel(ylabel)
        tidy(axes, xlabel if axes is column[-1] else "")
    return picture, list(column)


def most_telling(keys: np.ndarray, what: str) -> tuple[np.ndarray, str]:
    """Indices of the 8 smallest keys, in their order, and a note where these are not all."""
    chosen = np.sort(np.argsort(keys, kind="stable")[:_MOST])
    note = f" ({len(chosen)} of {len(keys)} {what})" if len(chosen) < len(keys) else ""
    return chosen, note


def layout(count: int) -> tuple[int, int]:
    """Lines and columns of ``count`` panels."""
    columns = min(COLUMNS, count)
    return math.ceil(count / columns), columns


def panels(picture: FigureBase, count: int) -> list[Axes]:
    """Axes laid out as :func:`layout` has it."""
    grid = picture.subplots(*layout(count), squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    return list(grid[:count])


def line(label: str, colour: str, **look: Any) -> Line2D:
    """A line for the legend."""
    return Line2D([], [], color=colour, label=label, **{"lw": 1.5, "ms": 4} | look)


def images(
    stacked: Iterable[Axes],
    matrices: Iterable[np.ndarray],
    extents: Iterable[tuple[float, float, float, float]],
    **look: Any,
) -> AxesImage:
    """Draw a matrix (rows, frames) in each axes, row 0 at the bottom; return the last image."""
    look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"} | look
    for axes, matrix, extent in zip(stacked, matrices, extents, strict=True):
        shown = axes.imshow(matrix, extent=extent, zorder=1, **look)  # above the grid
    return shown


def tidy(axes: Axes, xlabel: str = "") -> None:
    """A faint grid, no frame, few ticks."""
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E3E3E3", lw=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)


def legend_below(figure: Figure, handles: Sequence[Artist], note: str = "") -> None:
    """One legend for the figure, which grows by its height, in as many columns as have room."""
    inches = [0.6 + 0.075 * len(str(handle.get_label())) for handle in handles]  # at 9 points
    width = figure.get_figwidth()
    columns = len(handles) if sum(inches) <= width else max(1, int(width / max(inches)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=note,
        title_fontsize=9,
    )


def save(figure: Figure, path: Target) -> Path:
    """Write the PNG, whole or not at all; return its path."""
    return atomically(writable(path), lambda file: figure.savefig(file, dpi=130, format="png"))


def arviz() -> ModuleType:
    """Import ArviZ, without the notice of 0.23 about its refactoring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
