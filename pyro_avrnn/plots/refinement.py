"""Refined priors: what they gained against what was certified, and where their codes lie."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import BLACK, Table, Target


def gains(results: Table, path: Target) -> Path:
    """Draw the gain of each row and seed on the scored split against what its critic certified.

    Points on the dashed line gained all of it. Bars are two standard errors over speakers, or
    sequences.

    Args:
        results: dicts with ``row``, ``refinement_certified`` and ``after``, as ``avrnn refine``
            writes them.
        path: PNG to write; returned.
    """
    styles = style.row_styles(result["row"] for result in results)
    picture = style.figure(7.5, 6.0, "Gain of refined priors, nats a frame")
    axes = picture.subplots()
    ends = [0.0]
    for label, (colour, marker) in styles.items():
        mine = [r for r in results if r["row"] == label]
        size = next(iter(mine[0]["after"]))
        x = [r["refinement_certified"] for r in mine]
        y = [r["after"][size]["iwae"]["gain"] for r in mine]
        error = [2 * style.finite(r["after"][size]["iwae"]["gain_se"]) for r in mine]
        axes.errorbar(x, y, error, fmt=marker, color=colour, capsize=2, label=style.fold(label))
        ends += [*x, *y]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=BLACK, ls="--", lw=1)
    axes.axhline(0.0, color=BLACK, lw=0.6)
    axes.set_xlabel("certified on validation sequences")
    axes.set_ylabel(f"gained, S = {size}, by IWAE")
    axes.legend(fontsize=8)
    return style.save(picture, path)


def code_clouds(codes: Mapping[str, np.ndarray], path: Target, *, title: str = "") -> Path:
    """Draw codes of several origins in the two directions in which the last vary most.

    Args:
        codes: ``(N, Z)`` by origin, such as base prior, refined prior and guide, in one unit.
        path: PNG to write; returned.
        title: of the picture.
    """
    *_, last = codes.values()
    centre = last.mean(axis=0)
    directions = np.linalg.svd(last - centre, full_matrices=False)[2][:2]
    flat = {name: (rows - centre) @ directions.T for name, rows in codes.items()}
    flat = {name: np.pad(rows, ((0, 0), (0, 2 - rows.shape[1]))) for name, rows in flat.items()}
    low, high = np.quantile(np.concatenate(list(flat.values())), [0.002, 0.998], axis=0)
    edges = [np.linspace(a, b + 1e-6, 61) for a, b in zip(low, high, strict=True)]
    picture = style.figure(3.6 * len(flat), 3.9, title)
    for axes, (name, rows) in zip(style.panels(picture, len(flat)), flat.items(), strict=False):
        density, *_ = np.histogram2d(rows[:, 0], rows[:, 1], bins=edges, density=True)
        axes.pcolormesh(*edges, np.sqrt(density.T), cmap="Blues", rasterized=True)
        axes.set_title(name, fontsize=10)
        style.tidy(axes, "first direction")
    picture.axes[0].set_ylabel("second direction")
    return style.save(picture, path)
