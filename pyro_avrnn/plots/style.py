"""What the pictures share: a colour for each row, a bare figure, the legend below, the file.

The colours are those of Okabe and Ito (2008), told apart by colour-blind readers; a dark red
stands in for their yellow, which does not read on white.
"""

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Table = Sequence[Mapping[str, Any]]  # metrics or results: dicts with "row", "seed" and numbers
Target = str | os.PathLike[str]

BLACK, GREY, SKY, BLUE, GREEN = "#000000", "#8C8C8C", "#56B4E9", "#0072B2", "#009E73"
DASHED = (0, (4, 2))
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}  # behind text
_COLOURS = (BLACK, SKY, BLUE, "#D55E00", GREEN, "#CC79A7", "#E69F00", "#661100")
_MARKERS = "os^DvP"


class Style(NamedTuple):
    """How a row looks in every picture."""

    colour: str
    marker: str


def row_styles(rows: Iterable[str]) -> dict[str, Style]:
    """A style for each row; eight colours, then the same ones again with another marker.

    Args:
        rows: labels, in the order in which they are drawn; doubles are ignored.

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
    """A row's label on as many lines as it takes: rows may differ in their last option."""
    parts = label.replace(",", ", ").replace(":", ": ")
    lines = textwrap.wrap(parts, 30, break_on_hyphens=False)
    return "\n".join(line.replace(": ", ":") for line in lines)


def figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, outside pyplot."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    made.suptitle(title, fontweight="bold")
    return made


def line(label: str, colour: str, **look: Any) -> Line2D:
    """A line for the legend."""
    return Line2D([], [], color=colour, label=label, **{"lw": 1.5, "ms": 4} | look)


def tidy(axes: Axes, xlabel: str = "") -> None:
    """A faint grid, no frame, few ticks."""
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E3E3E3", lw=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)


def legend_below(figure: Figure, handles: Sequence[Any], note: str = "") -> None:
    """One legend for the figure, which grows by its height, in as many columns as have room."""
    inches = [0.6 + 0.075 * len(handle.get_label()) for handle in handles]  # at 9 points
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
    """Write the PNG; returns its path."""
    figure.savefig(path, dpi=130, format="png")
    return Path(path)
