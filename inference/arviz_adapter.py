"""One held-out sequence in ArviZ: posterior, prior, predictive draws, log-likelihood.

The only file that imports arviz. Works with 0.2x (``InferenceData``) and 1.x (``DataTree``).
"""

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive
from torch import Tensor
from torch.distributions import Independent

from inference.densities import StepDensities
from inference.files import atomically
from inference.modes import evaluating
from inference.protocols import Program, at_least, counts, given, of_kind, require_finite
from inference.random import seeded
from inference.traces import step_densities, time_index

_DIMS = {
    "z": ["time", "latent"],
    "f": ["global"],
    "x": ["time", "feature"],
    "log_weight": ["time"],
}


@torch.no_grad()
def to_arviz(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    draws: int = 500,
    seed: int = 0,
    frame_seconds: float | None = None,
    by_feature: bool = False,
) -> Any:
    """Collect draws of guide and model for one unpadded sequence in the format of ArviZ.

    The draws of one guide are one chain, so R-hat is meaningless here. The log-likelihood is
    log p(x_t | z_t, h_t) of each frame under draws of q, which are not exact posterior draws, and
    whose z_t has seen that frame. ``az.loo`` therefore warns of a large k-hat, rightly. Model and
    guide are in evaluation mode meanwhile.

    Args:
        model: a Pyro program that draws x when called with ``(None, mask)``.
        guide: its guide.
        x: one sequence, ``(T, X)`` or ``(1, T, X)``. Padding would give a wrong, finite LOO.
        draws: number of draws of each distribution.
        seed: seed of all draws.
        frame_seconds: length of a frame; the coordinate ``time`` is then in seconds.
        by_feature: split the log-likelihood of a frame into that of its features, in the shape
            of the data: ``az.loo`` then leaves out one feature of one frame, and ``az.loo_pit``
            and ``az.plot_loo_pit``, which need that shape, work.

    Returns:
        ``InferenceData`` or ``DataTree`` with groups posterior, prior, prior_predictive,
        posterior_predictive, log_likelihood, observed_data and sample_stats, dimensions
        (chain, draw, time, latent) and (chain, draw, time, feature); a latent that all steps
        share is the variable f, (chain, draw, global).

    Raises:
        ValueError: more than one sequence, another rank, or sites not named z_1, ..., x_1, ...
        NotImplementedError: an emission that is not one distribution over time, or, with
            ``by_feature``, one that is not an ``Independent`` of its features.
    """
    counts(1, draws=draws)
    at_least(1e-12, **given(frame_seconds=frame_seconds))
    require_finite(model=model, guide=guide)
    of_kind(Tensor, "a tensor", x=x)
    x = x.unsqueeze(0) if x.ndim == 2 else x
    if x.ndim != 3 or len(x) != 1:
        raise ValueError(
            f"x must be one sequence of shape (T, X), got {tuple(x.shape)}; slice off its padding"
        )
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    with seeded(seed), evaluating(model, guide):
        d = step_densities(model, guide, x, mask, num_particles=draws)
        if d.emission is None:
            raise NotImplementedError("the emission must be given as one distribution over time")
        predictive = d.emission.sample()
        log_likelihood = _of_features(d.emission, x) if by_feature else d.log_emission
        store = pyro.get_param_store()
        with store.scope(store.get_state()):  # discards what the model registers
            free = Predictive(model, num_samples=draws, parallel=True)(None, mask)
    times = np.arange(1, x.shape[1] + 1)
    coords = {
        "time": times * (1.0 if frame_seconds is None else frame_seconds),
        "latent": np.arange(d.z.shape[-1]),
        "global": np.arange(0 if d.f is None else d.f.shape[-1]),
        "feature": np.arange(x.shape[-1]),
    }
    groups = _groups(d, x, predictive, free)
    groups["log_likelihood"] = {"x": _draws_first(log_likelihood)}
    return _container(groups, coords, ["time", "feature"][: 1 + by_feature])


def write_arviz(data: Any, path: str | os.PathLike[str]) -> Path:
    """Write what :func:`to_arviz` gave as netCDF, whole or not at all, for ``az.from_netcdf``.

    It is made in memory: where a disk fills under it, HDF5 takes the process down with it.

    Raises:
        OSError: it cannot be written.
    """
    tree = data.to_datatree() if hasattr(data, "to_datatree") else data
    content = tree.to_netcdf(engine="h5netcdf")
    return atomically(path, lambda file: file.write_bytes(content))


def _of_features(emission: Any, x: Tensor) -> Tensor:
    """Log-densities of each feature of x ``(1, T, X)``, ``(T, K, 1, X)``."""
    single = isinstance(emission, Independent) and emission.reinterpreted_batch_ndims == 1
    if not single or emission.base_dist.event_shape:
        raise NotImplementedError(
            "by_feature=True needs an emission that is an Independent of one distribution a "
            f"feature, got {type(emission).__name__}; use by_feature=False"
        )
    return emission.base_dist.log_prob(x[0, :, None, None])


def _groups(
    d: StepDensities, x: Tensor, predictive: Tensor, free: dict[str, Tensor]
) -> dict[str, dict[str, np.ndarray]]:
    """Arrays by group and variable; predictive draws of x given z, and free ones of all sites."""
    posterior, prior = {}, {}
    if d.z.shape[-1]:
        posterior["z"], prior["z"] = _draws_first(d.z), _sites(free, "z")
    if d.f is not None:
        posterior["f"], prior["f"] = (f[:, 0].unsqueeze(0).cpu().numpy() for f in (d.f, free["f"]))
    groups = {
        "posterior": posterior,
        "posterior_predictive": {"x": _draws_first(predictive)},
        "prior": prior,
        "prior_predictive": {"x": _sites(free, "x")},
        "sample_stats": {
            "lp": _draws_first(d.log_prior + d.log_emission).sum(axis=-1),
            "log_q": _draws_first(d.log_proposal).sum(axis=-1),
            "log_weight": _draws_first(d.log_weight),
        },
        "observed_data": {"x": x[0].cpu().numpy()},
    }
    return {name: group for name, group in groups.items() if group}


def _container(
    groups: dict[str, dict[str, np.ndarray]], coords: dict[str, np.ndarray], scored_by: list[str]
) -> Any:
    with warnings.catch_warnings():  # 0.23 announces its own refactoring
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az  # here, because importing it takes longer than all the rest
    one_dict = "data" in inspect.signature(az.from_dict).parameters  # arviz 1.x

    def build(parts: dict[str, Any], dims: dict[str, list[str]]) -> Any:
        if one_dict:
            return az.from_dict(parts, coords=coords, dims=dims)
        return az.from_dict(**parts, coords=coords, dims=dims)

    # the same variable name, as a rule with the feature dimension summed out
    scored = build({"log_likelihood": groups.pop("log_likelihood")}, {"x": scored_by})
    data = build(groups, _DIMS)
    if one_dict:
        data["log_likelihood"] = scored["log_likelihood"]
    else:
        data.extend(scored)
    return data


def _draws_first(values: Tensor) -> np.ndarray:
    """(T, K, 1, ...) to (chain 1, draw K, T, ...)."""
    return values[:, :, 0].transpose(0, 1).unsqueeze(0).cpu().numpy()


def _sites(samples: dict[str, Tensor], prefix: str) -> np.ndarray:
    """Sites prefix_1..prefix_T of shape (draws, 1, D) to (1, draws, T, D)."""
    named = sorted((time_index(name), name) for name in samples if name.startswith(f"{prefix}_"))
    if not named:
        raise ValueError(f"model must name its sites {prefix}_1, {prefix}_2, ..., but has none")
    return (
        torch.stack([samples[name][:, 0] for _, name in named], dim=1).unsqueeze(0).cpu().numpy()
    )
