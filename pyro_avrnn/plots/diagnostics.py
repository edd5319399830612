"""Diagnostics of inference: latents over time, health of a filter, calibration of a guide."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from pyro_avrnn.data._checks import plain
from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import BLACK, BLUE, DASHED, GREEN, GREY, ORANGE, Style, Target

_BAND = 0.95  # probability of the bands


def latent_posterior(inference_data: Any, path: Target, title: str) -> Path:
    """Draw 94 % highest-density intervals of the latents over time, by ArviZ.

    Args:
        inference_data: the result of :func:`inference.to_arviz` for a model with latents:
            ``posterior["z"]`` and ``prior["z"]`` with dimensions (chain, draw, time, latent).
        path: PNG to write; returned. Of more than 8 latents it shows those whose posterior mean
            moves most over time, in posterior deviations.
        title: of the picture.
    """
    posterior, prior = (inference_data[group]["z"] for group in ("posterior", "prior"))
    mean = np.asarray(posterior.mean(dim=("chain", "draw")))  # (T, Z)
    deviation = np.asarray(posterior.std(dim=("chain", "draw"))).mean(axis=0)
    moves = mean.std(axis=0) / np.maximum(deviation, 1e-12)
    chosen, note = style.most_telling(-moves, "latents")
    times = np.asarray(posterior["time"], dtype=float)
    looks: tuple[dict[str, Any], ...] = (
        {"color": GREY, "alpha": 0.35, "lw": 0, "label": "model run freely, 94 % HDI"},
        {"color": BLUE, "alpha": 0.45, "lw": 0, "label": "posterior, 94 % HDI"},
    )
    bands = list(zip((_intervals(prior), _intervals(posterior)), looks, strict=True))
    lines, columns = style.layout(len(chosen))
    picture = style.figure(max(6.5, 0.6 + 2.7 * columns), 1.2 + 2.1 * lines, title + note)
    dots = "." if len(times) < 40 else ""
    for axes, k in zip(style.panels(picture, len(chosen)), chosen, strict=True):
        handles = [
            *(axes.fill_between(times, *band[:, k].T, **look) for band, look in bands),
            *axes.plot(times, mean[:, k], BLUE, lw=1.5, marker=dots, label="posterior mean"),
        ]
        axes.set_title(f"z[{k}]", fontsize=10)
        style.tidy(axes, "frame" if times[0] == 1.0 else "time (seconds)")
    style.legend_below(picture, handles)
    return style.save(picture, path)


def _intervals(z: Any) -> np.ndarray:
    """Ends of the 94 % highest-density intervals, (T, Z, 2), under ArviZ 0.x and 1.x."""
    az = style.arviz()
    found = az.hdi(z, **{"hdi_prob" if az.__version__.startswith("0.") else "prob": 0.94})
    return np.asarray(found[z.name] if hasattr(found, "data_vars") else found)


def particle_health(
    filtered: Any, path: Target, sequence: int = 0, *, title: str | None = None
) -> Path:
    """Draw effective sample size and surviving ancestors at every step of one sequence.

    A filter is in trouble where few particles carry all the weight, or where the last particles
    descend from few ancestors: its estimates for those steps then rest on as few draws.

    Args:
        filtered: the result of :func:`inference.particle_filter`: ``ess``, ``resampled`` and
            ``mask`` ``(T, B)``, ``log_weight`` ``(T, K, B)`` and ``unique_ancestors()``.
        path: PNG to write; returned.
        sequence: which of the B sequences, from 0; its padding is not drawn.
        title: of the picture; default: a question that names K and the sequence.

    Raises:
        ValueError: no such sequence, or one without an observed step.
    """
    observed = plain(filtered.mask)  # (T, B)
    size = observed.shape[1]
    if not 0 <= sequence < size:
        raise ValueError(f"sequence must be in 0..{size - 1}, got {sequence}")
    seen = observed[:, sequence]
    if not seen.any():
        raise ValueError(f"sequence must have an observed step, but {sequence} has none")
    particles = filtered.log_weight.shape[1]
    steps = np.flatnonzero(seen) + 1
    ess, resampled, survivors = (
        plain(values)[seen, sequence]
        for values in (filtered.ess, filtered.resampled, filtered.unique_ancestors())
    )
    title = title or f"Do the {particles} particles of the filter survive? Sequence {sequence}"
    picture = style.figure(9.0, 5.6, title)
    top, bottom = picture.subplots(2, 1, sharex=True)
    _sample_sizes(top, steps, ess, resampled, particles)
    _ancestors(bottom, steps, survivors, particles)
    bottom.set_xlim(steps[0] - 0.02 * len(steps), steps[-1] + 0.02 * len(steps))
    bottom.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    style.legend_below(picture, [*top.get_lines(), *bottom.get_lines()])
    return style.save(picture, path)


def _sample_sizes(
    axes: Axes, steps: np.ndarray, ess: np.ndarray, resampled: np.ndarray, particles: int
) -> None:
    few = len(steps) < 60
    axes.set_title("Effective sample size before resampling (higher is better)", fontsize=10)
    axes.set_ylabel("ESS (particles)")
    axes.axhline(particles / 2, color=GREY, ls=DASHED, lw=1.2, label="K / 2")
    axes.plot(steps, ess, color=BLUE, lw=1.4, marker="." if few else "", ms=6, label="ESS")
    label = f"resampled after the step ({int(resampled.sum())} times)"
    at = steps[resampled], ess[resampled]
    axes.plot(*at, color=ORANGE, marker="v", ls="", ms=6 if few else 4, label=label)
    axes.set_ylim(0.0, 1.06 * particles)
    style.tidy(axes)


def _ancestors(axes: Axes, steps: np.ndarray, survivors: np.ndarray, particles: int) -> None:
    axes.set_title("Ancestors from which the last particles descend", fontsize=10)
    axes.set_ylabel("different ancestors\n(particles, log scale)")
    axes.axhline(particles, color=GREY, ls=":", lw=1.2, label=f"K = {particles}")
    marker = "." if len(steps) < 60 else ""
    axes.plot(steps, survivors, color=GREEN, lw=1.4, marker=marker, ms=6, label="ancestors")
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.6 * particles)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if particles < 1000 else (1.0,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    style.tidy(axes, "step t (frames, from 1)")


def calibration(
    calibration: Any, path: Target, *, title: str = "Are the guide's draws calibrated?"
) -> Path:
    """Draw the ranks of simulation-based calibration, which are uniform if the guide is exact.

    Above: the empirical distribution function of the ranks minus the uniform one, with a band
    that holds the whole curve of one quantity with a probability of 95 % if the guide is exact.
    Below: histograms. A valley means a guide that is too narrow, a hill one that is too wide, a
    slope one that is biased. For log p(x, z), low ranks mean draws too close to the mode, as a
    narrow guide's are, and high ranks draws too far from it.

    Args:
        calibration: the result of :func:`inference.calibration.calibrate`.
        path: PNG to write; returned. Of more than 8 quantities it shows those with the
            smallest p-values.
        title: of the picture.

    Source: Säilynoja et al. (2022), https://arxiv.org/abs/2103.10522, for the band.
    """
    total, bins = len(calibration.names), plain(calibration.histogram()).shape[1]
    what = "quantities, those with the smallest p"
    shown, note = style.most_telling(plain(calibration.p_values), what)
    looks = style.row_styles(calibration.names[q] for q in shown)
    lines, columns = style.layout(len(shown))
    size = max(7.0, 0.8 + 2.6 * columns), 4.4 + 1.9 * lines
    picture = style.figure(*size, title + note)
    heights = (3.2, 0.4 + 1.9 * lines)
    above, below = picture.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _ecdf_differences(above.subplots(), calibration, shown, list(looks.values()))
    _histograms(below, calibration, shown, list(looks.values()))
    handles = [
        *(style.line(name, look.colour) for name, look in looks.items()),
        Patch(color=BLUE, alpha=0.2, lw=0, label="95 % band of a whole curve"),
        Patch(color=GREY, alpha=0.3, lw=0, label="95 % interval of one bin"),
    ]
    verdict = "uniform" if calibration.uniform() else "not uniform"
    note = (
        f"p by chi-square on {bins} bins; at 5 % of all {total} together the ranks are {verdict}"
    )
    style.legend_below(picture, handles, note)
    return style.save(picture, path)


def _ecdf_differences(axes: Axes, calibration: Any, shown: np.ndarray, looks: list[Style]) -> None:
    """A step curve for each quantity shown, and one band for all."""
    pit, draws = plain(calibration.pit()), calibration.num_draws
    points = np.arange(1, draws + 1) / (draws + 1)
    points = points[:: max(1, math.ceil(len(points) / 99))]  # the band takes a while
    for i, (q, look) in enumerate(zip(shown, looks, strict=True)):
        _ecdf_difference(axes, pit[:, q], points, band=i == 0, color=look.colour, lw=1.4)
    axes.axhline(0.0, color=BLACK, lw=0.6, zorder=0)
    axes.set_title(f"Ranks of {len(pit)} simulations, cumulated", fontsize=10)
    axes.set_ylabel("ECDF less uniform\n(share of simulations)")
    axes.set_xlim(0.0, 1.0)
    style.tidy(axes, f"rank of the truth among {draws} draws, as a share")


def _ecdf_difference(
    axes: Axes, pit: np.ndarray, points: np.ndarray, *, band: bool, **curve: Any
) -> None:
    """Draw by ArviZ 0.x, else here, as 1.x has no such plot."""
    az = style.arviz()
    fill: dict[str, Any] = {"color": BLUE, "alpha": 0.2, "lw": 0}
    if hasattr(az, "plot_ecdf"):
        az.plot_ecdf(
            pit.copy(),  # it sorts in place
            eval_points=points,
            cdf=lambda value: value,  # exact for ranks, at these points
            difference=True,
            confidence_bands="optimized" if band else False,
            ci_prob=_BAND,
            plot_kwargs=curve,
            fill_kwargs=fill,
            ax=axes,
            backend="matplotlib",
            show=False,
        )
        return
    ecdf = np.searchsorted(np.sort(pit), points, side="right") / len(pit)
    axes.step(points, ecdf - points, where="post", **curve)
    if band:  # of Dvoretzky, Kiefer, Wolfowitz and Massart: simultaneous, a little wide
        width = math.sqrt(math.log(2.0 / (1.0 - _BAND)) / (2 * len(pit)))
        axes.fill_between(points, -width, width, **fill)


def _histograms(
    picture: FigureBase, calibration: Any, shown: np.ndarray, looks: list[Style]
) -> None:
    """Counts of the ranks of each quantity shown, with the interval of a single bin."""
    counts, p_values = plain(calibration.histogram()), plain(calibration.p_values)
    bins = counts.shape[1]
    expected = counts[0].sum() / bins
    spread = 1.96 * math.sqrt(expected * (1.0 - 1.0 / bins))  # of a binomial count
    panels = style.panels(picture, len(shown))
    for axes, q, look in zip(panels, shown, looks, strict=True):
        axes.axhspan(max(expected - spread, 0.0), expected + spread, color=GREY, alpha=0.3)
        axes.stairs(
            counts[q], np.linspace(0.0, 1.0, bins + 1), fill=True, color=look.colour, alpha=0.55
        )
        axes.axhline(expected, color=BLACK, lw=0.8)
        p = "p < 1e-10" if p_values[q] < 1e-10 else f"p = {p_values[q]:.2g}"
        axes.set_title(f"{calibration.names[q]}: {p}", fontsize=9.5)
        style.tidy(axes)
        axes.set_xlim(0.0, 1.0)
        axes.locator_params(axis="both", nbins=4)
    for axes in panels[:: style.COLUMNS]:
        axes.set_ylabel("simulations\nper bin")
    picture.supxlabel("rank as a share", fontsize=10)
