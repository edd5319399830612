"""Pictures of exact inference's stand-ins: do a filter's particles live, is a guide calibrated?"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import Target

_MOST = 8  # quantities drawn
_BAND = 0.95  # probability of the bands
_ORANGE = "#D55E00"


def particle_health(
    filtered: Any, path: Target, sequence: int = 0, *, title: str | None = None
) -> Path:
    """Effective sample size and surviving ancestors at every step of one sequence.

    A filter is in trouble where few particles carry all the weight, and where the last ones
    descend from few: what it says of those steps then rests on as many draws.

    Args:
        filtered: what :func:`inference.particle_filter` gave: ``ess``, ``resampled`` and
            ``mask`` ``(T, B)``, ``log_weight`` ``(T, K, B)`` and ``unique_ancestors()``.
        path: PNG to write; returned.
        sequence: which of the B sequences, from 0; its padding is not drawn.
        title: of the picture; default: a question that names K and the sequence.

    Raises:
        ValueError: no such sequence, or one without an observed step.
    """
    observed = _numbers(filtered.mask)  # (T, B)
    size = observed.shape[1]
    if not 0 <= sequence < size:
        raise ValueError(f"sequence must be in 0..{size - 1}, got {sequence}")
    seen = observed[:, sequence].astype(bool)
    if not seen.any():
        raise ValueError(f"sequence must have an observed step, but {sequence} has none")
    particles = filtered.log_weight.shape[1]
    steps = np.flatnonzero(seen) + 1
    ess = _numbers(filtered.ess)[seen, sequence]
    resampled = _numbers(filtered.resampled)[seen, sequence].astype(bool)
    survivors = _numbers(filtered.unique_ancestors())[seen, sequence]
    title = title or f"Do the filter's {particles} particles live? Sequence {sequence}"
    picture = style.figure(9.0, 5.6, title)
    top, bottom = picture.subplots(2, 1, sharex=True)
    few = len(steps) < 60
    look: dict[str, Any] = {"marker": "." if few else "", "lw": 1.4, "ms": 6}

    top.set_title("Effective sample size before resampling (higher is better)", fontsize=10)
    top.set_ylabel("ESS (particles)")
    top.axhline(particles / 2, color=style.GREY, ls=style.DASHED, lw=1.2)
    top.plot(steps, ess, color=style.BLUE, **look)
    marks: dict[str, Any] = {"marker": "v", "ls": "", "ms": 6 if few else 4}
    top.plot(steps[resampled], ess[resampled], color=_ORANGE, **marks)
    top.set_ylim(0.0, 1.06 * particles)

    bottom.set_title("Ancestors from which the last particles descend", fontsize=10)
    bottom.set_ylabel("different ancestors\n(particles, log scale)")
    bottom.axhline(particles, color=style.GREY, ls=":", lw=1.2)
    bottom.plot(steps, survivors, color=style.GREEN, **look)
    bottom.set_yscale("log")
    bottom.set_ylim(0.8, 1.6 * particles)
    bottom.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if particles < 1000 else (1.0,)))
    bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bottom.yaxis.set_minor_formatter(NullFormatter())
    style.tidy(top)
    style.tidy(bottom, "step t (frames, from 1)")
    bottom.set_xlim(steps[0] - 0.02 * len(steps), steps[-1] + 0.02 * len(steps))
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    handles = [
        style.line("ESS", style.BLUE),
        style.line("K / 2", style.GREY, ls=style.DASHED),
        style.line(f"resampled after the step ({int(resampled.sum())} times)", _ORANGE, **marks),
        style.line("ancestors", style.GREEN),
        style.line(f"K = {particles}", style.GREY, ls=":"),
    ]
    style.legend_below(picture, handles)
    return style.save(picture, path)


def calibration(
    calibration: Any, path: Target, *, title: str = "Are the guide's draws calibrated?"
) -> Path:
    """Ranks of simulation-based calibration: are they uniform, and if not, how do they fail?

    Above, the ranks' empirical distribution function less the uniform one, with a band that
    holds the whole curve of one quantity with a probability of 95 % if the guide is exact.
    Below, histograms: a valley is a guide that is too narrow, a hill one that is too wide, a
    slope one that is biased. Of log p(x, z), low ranks mean draws that are too close to the
    mode, as a narrow guide's are, and high ranks draws that are too far from it.

    Args:
        calibration: what :func:`inference.calibration.calibrate` gave.
        path: PNG to write; returned. Of more than 8 quantities it shows those with the
            smallest p-values.
        title: of the picture.

    Source: Säilynoja et al. (2022), https://arxiv.org/abs/2103.10522, for the band.
    """
    pit, counts = _numbers(calibration.pit()), _numbers(calibration.histogram())
    p_values = _numbers(calibration.p_values)
    size, total = pit.shape
    shown = np.sort(np.argsort(p_values, kind="stable")[:_MOST])
    if len(shown) < total:
        title += f" ({len(shown)} of {total} quantities, those with the smallest p)"
    looks = style.row_styles(calibration.names[q] for q in shown)
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    picture = style.figure(max(7.0, 0.8 + 2.6 * columns), 4.4 + 1.9 * lines, title)
    heights = (3.2, 0.4 + 1.9 * lines)
    above, below = picture.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]

    axes = above.subplots()
    points = np.arange(1, calibration.num_draws + 1) / (calibration.num_draws + 1)
    points = points[:: max(1, math.ceil(len(points) / 99))]  # the band takes a while
    for i, (q, look) in enumerate(zip(shown, looks.values(), strict=True)):
        _ecdf_difference(axes, pit[:, q], points, look.colour, band=i == 0)
    axes.axhline(0.0, color=style.BLACK, lw=0.6, zorder=0)
    axes.set_title(f"Ranks of {size} simulations, cumulated", fontsize=10)
    axes.set_ylabel("ECDF less uniform\n(share of simulations)")
    axes.set_xlim(0.0, 1.0)
    style.tidy(axes, f"rank of the truth among {calibration.num_draws} draws, as a share")

    grid = below.subplots(lines, columns, squeeze=False)
    bins = counts.shape[1]
    edges = np.linspace(0.0, 1.0, bins + 1)
    expected = size / bins
    spread = 1.96 * math.sqrt(expected * (1.0 - 1.0 / bins))  # of a binomial count
    for panel, q, look in zip(grid.ravel(), shown, looks.values(), strict=False):
        panel.axhspan(max(expected - spread, 0.0), expected + spread, color=style.GREY, alpha=0.3)
        panel.stairs(counts[q], edges, fill=True, color=look.colour, alpha=0.55)
        panel.axhline(expected, color=style.BLACK, lw=0.8)
        panel.set_title(f"{calibration.names[q]}: {_p(p_values[q])}", fontsize=9.5)
        style.tidy(panel)
        panel.set_xlim(0.0, 1.0)
        panel.locator_params(axis="both", nbins=4)
    for panel in grid.ravel()[len(shown) :]:
        panel.remove()
    for panel in grid[:, 0]:
        panel.set_ylabel("simulations\nper bin")
    below.supxlabel("rank as a share", fontsize=10)
    handles = [
        *(style.line(name, look.colour) for name, look in looks.items()),
        Patch(color=style.BLUE, alpha=0.2, lw=0, label="95 % band of a whole curve"),
        Patch(color=style.GREY, alpha=0.3, lw=0, label="95 % interval of one bin"),
    ]
    verdict = "uniform" if calibration.uniform() else "not uniform"
    note = (
        f"p by chi-square on {bins} bins; at 5 % of all {total} together the ranks are {verdict}"
    )
    style.legend_below(picture, handles, note)
    return style.save(picture, path)


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu())


def _p(value: float) -> str:
    return "p < 1e-10" if value < 1e-10 else f"p = {value:.2g}"


def _ecdf_difference(
    axes: Axes, pit: np.ndarray, points: np.ndarray, colour: str, *, band: bool
) -> None:
    """One step curve, and the band if asked for: by ArviZ 0.x, or where 1.x has no such plot."""
    with warnings.catch_warnings():  # 0.23 announces its own refactoring at every import
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    curve = {"color": colour, "lw": 1.4}
    if hasattr(az, "plot_ecdf"):
        az.plot_ecdf(
            pit.copy(),  # it sorts in place
            eval_points=points,
            cdf=lambda value: value,  # exact for ranks, at these points
            difference=True,
            confidence_bands="optimized" if band else False,
            ci_prob=_BAND,
            plot_kwargs=curve,
            fill_kwargs={"color": style.BLUE, "alpha": 0.2, "lw": 0},
            ax=axes,
            backend="matplotlib",
            show=False,
        )
        return
    ecdf = np.searchsorted(np.sort(pit), points, side="right") / len(pit)
    axes.step(points, ecdf - points, where="post", **curve)
    if band:  # of Dvoretzky, Kiefer, Wolfowitz and Massart: simultaneous, a little wide
        width = math.sqrt(math.log(2.0 / (1.0 - _BAND)) / (2 * len(pit)))
        axes.fill_between(points, -width, width, color=style.BLUE, alpha=0.2, lw=0)
