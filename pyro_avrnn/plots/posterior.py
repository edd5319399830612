"""The latents of one held-out sequence: do they move, and away from what the prior would do?"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch

from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import Target

_MOST = 8  # latents drawn


def latent_posterior(inference_data: Any, path: Target, title: str) -> Path:
    """The latents of one held-out sequence: 94 % highest-density intervals over time, by ArviZ.

    Args:
        inference_data: what :func:`inference.to_arviz` gave for a model with latents:
            ``posterior["z"]`` and ``prior["z"]`` with dimensions (chain, draw, time, latent).
        path: PNG to write, returned; of more than 8 latents it shows those whose posterior mean
            moves most over time, in posterior deviations.
        title: of the picture.
    """
    posterior, prior = (inference_data[group]["z"] for group in ("posterior", "prior"))
    mean = np.asarray(posterior.mean(dim=("chain", "draw")))  # (T, Z)
    deviation = np.asarray(posterior.std(dim=("chain", "draw"))).mean(axis=0)
    moves = mean.std(axis=0) / np.maximum(deviation, 1e-12)
    chosen = np.sort(np.argsort(-moves, kind="stable")[:_MOST])
    if len(chosen) < mean.shape[1]:
        title += f" ({len(chosen)} of {mean.shape[1]} latents)"
    times = np.asarray(posterior["time"], dtype=float)
    bands = ((_intervals(prior), style.GREY, 0.35), (_intervals(posterior), style.BLUE, 0.45))
    columns = min(4, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    picture = style.figure(max(6.5, 0.6 + 2.7 * columns), 1.2 + 2.1 * lines, title)
    grid = picture.subplots(lines, columns, squeeze=False).ravel()
    for axes, k in zip(grid, chosen, strict=False):
        for band, colour, alpha in bands:
            axes.fill_between(times, *band[:, k].T, color=colour, alpha=alpha, lw=0)
        axes.plot(times, mean[:, k], style.BLUE, lw=1.5, marker="." if len(times) < 40 else "")
        axes.set_title(f"z[{k}]", fontsize=10)
        style.tidy(axes, "frame" if times[0] == 1.0 else "time (seconds)")
    for axes in grid[len(chosen) :]:
        axes.remove()
    handles = [
        style.line("posterior mean", style.BLUE),
        Patch(color=style.BLUE, alpha=0.45, lw=0, label="posterior, 94 % HDI"),
        Patch(color=style.GREY, alpha=0.35, lw=0, label="model run freely, 94 % HDI"),
    ]
    style.legend_below(picture, handles)
    return style.save(picture, path)


def _intervals(z: Any) -> np.ndarray:
    """Ends of the 94 % highest-density intervals, (T, Z, 2), under ArviZ 0.x and 1.x."""
    with warnings.catch_warnings():  # 0.23 announces its own refactoring at every import
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    found = az.hdi(z, **{"hdi_prob" if az.__version__.startswith("0.") else "prob": 0.94})
    return np.asarray(found[z.name] if hasattr(found, "data_vars") else found)
