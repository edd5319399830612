"""One held-out sequence in ArviZ: posterior, prior, predictive draws, log-likelihood.

The only file that imports arviz; made for 0.2x (``InferenceData``) and 1.x (``DataTree``).
"""

import inspect
import warnings
from functools import cache
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive
from torch import Tensor

from inference.random import seeded
from inference.traces import step_densities, time_index


@torch.no_grad()
def to_arviz(
    model: Any,
    guide: Any,
    x: Tensor,
    *,
    draws: int = 500,
    seed: int = 0,
    frame_seconds: float | None = None,
) -> Any:
    """Draws of guide and model for one unpadded sequence, as ArviZ wants them.

    The draws of one guide are one chain: R-hat says nothing here and is not to be reported.
    The log-likelihood is log p(x_t | z_t, h_t) a frame under draws of q, which are no exact
    posterior draws, and a frame's own z_t has seen that frame: ``az.loo`` then warns by a large
    k-hat, and rightly.

    Args:
        model: a Pyro program that draws x when called with ``(None, mask)``.
        guide: its guide.
        x: one sequence, ``(T, X)`` or ``(1, T, X)``, without padding (padding would give a
            wrong, finite LOO).
        draws: of posterior, prior and predictive distributions.
        seed: of all of them.
        frame_seconds: length of a frame; the coordinate ``time`` is then in seconds.

    Returns:
        ``InferenceData`` or ``DataTree`` with groups posterior, prior, prior_predictive,
        posterior_predictive, log_likelihood, observed_data and sample_stats, dimensions
        (chain, draw, time, latent) and (chain, draw, time, feature); a latent that all steps
        share is the variable f, (chain, draw, global).

    Raises:
        ValueError: more than one sequence, or another rank.
    """
    x = x.unsqueeze(0) if x.ndim == 2 else x
    if x.ndim != 3 or len(x) != 1:
        raise ValueError(
            f"x must be one sequence of shape (T, X), got {tuple(x.shape)}; slice off its padding"
        )
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    with seeded(seed):
        d: Any = step_densities(model, guide, x, mask, num_particles=draws)
        if d.emission is None:
            raise NotImplementedError("the emission must be given as one distribution over time")
        predictive = d.emission.sample()
        store = pyro.get_param_store()
        with store.scope(store.get_state()):  # what the model registers here is not to stay
            free = Predictive(model, num_samples=draws, parallel=True)(None, mask)
    length = x.shape[1]
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {"z": _draws_first(d.z)},
        "posterior_predictive": {"x": _draws_first(predictive)},
        "log_likelihood": {"x": _draws_first(d.log_emission)},
        "prior": {"z": _sites(free, "z", length)},
        "prior_predictive": {"x": _sites(free, "x", length)},
        "sample_stats": {
            "lp": _draws_first(d.log_prior + d.log_emission).sum(axis=-1),
            "log_q": _draws_first(d.log_proposal).sum(axis=-1),
            "log_weight": _draws_first(d.log_weight),
        },
        "observed_data": {"x": x[0].cpu().numpy()},
    }
    f = getattr(d, "f", None)  # a latent that all steps share
    if f is not None:
        groups["posterior"]["f"] = f[:, 0].unsqueeze(0).cpu().numpy()
        groups["prior"]["f"] = free["f"][:, 0].unsqueeze(0).cpu().numpy()
    if d.z.shape[-1] == 0:
        del groups["posterior"]["z"], groups["prior"]["z"]
    groups = {name: group for name, group in groups.items() if group}
    times = np.arange(1, length + 1) * (1.0 if frame_seconds is None else frame_seconds)
    coords = {
        "time": times,
        "latent": np.arange(d.z.shape[-1]),
        "global": np.arange(0 if f is None else f.shape[-1]),
        "feature": np.arange(x.shape[-1]),
    }
    dims = {
        "z": ["time", "latent"],
        "f": ["global"],
        "x": ["time", "feature"],
        "log_weight": ["time"],
    }
    return _container(groups, coords, dims)


@cache
def _arviz() -> Any:
    """The package, imported when it is first needed: it takes longer than all others."""
    with warnings.catch_warnings():  # 0.23 announces its own refactoring
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _container(
    groups: dict[str, dict[str, np.ndarray]],
    coords: dict[str, np.ndarray],
    dims: dict[str, list[str]],
) -> Any:
    az = _arviz()
    likelihood = {"log_likelihood": groups.pop("log_likelihood")}
    one_dict = "data" in inspect.signature(az.from_dict).parameters  # arviz 1.x

    def build(parts: dict[str, Any], names: dict[str, list[str]]) -> Any:
        if one_dict:
            return az.from_dict(parts, coords=coords, dims=names)
        return az.from_dict(**parts, coords=coords, dims=names)

    data = build(groups, dims)
    # the same variable name with the feature dimension summed out
    scored = build(likelihood, {"x": ["time"]})
    if one_dict:
        data["log_likelihood"] = scored["log_likelihood"]
    else:
        data.extend(scored)
    return data


def _draws_first(values: Tensor) -> np.ndarray:
    """(T, K, 1, ...) to (chain 1, draw K, T, ...)."""
    return values[:, :, 0].transpose(0, 1).unsqueeze(0).cpu().numpy()


def _sites(samples: dict[str, Tensor], prefix: str, length: int) -> np.ndarray:
    """Sites prefix_1..prefix_T of shape (draws, 1, D) to (1, draws, T, D)."""
    named = sorted((time_index(name), name) for name in samples if name.startswith(f"{prefix}_"))
    columns = [samples[name][:, 0] for _, name in named]
    if not columns:
        return np.zeros((1, 0, length, 0))
    return torch.stack(columns, dim=1).unsqueeze(0).cpu().numpy()
