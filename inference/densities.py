"""The one record of all steps, the check of masks, and the selection of particles.

Rollouts and traces fill it; bounds, critics and diagnostics read it. T steps, K particles, B
sequences: stacked densities are ``(T, K, B)``, data ``(B, T, X)``, masks ``(B, T)``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution


class StepDensities(NamedTuple):
    """Draws and densities of every step; a padded step has log-density 0 everywhere.

    Shapes are ``(T, K, B)`` and event dimensions, unless stated. A program that is traced has no
    ``h``, ``states`` and ``c``; a distribution is None where its family cannot be stacked.
    """

    z: Tensor  # (T, K, B, Z), drawn by the guide, or given
    h: Tensor | None  # (T, K, B, H), what critics read of the state before step t
    x: Tensor  # (T, 1, B, X), or with K
    mask: Tensor  # (T, 1, B) bool
    log_prior: Tensor
    log_emission: Tensor
    log_proposal: Tensor
    prior: Distribution | None
    emission: Distribution | None
    proposal: Distribution | None
    states: Any = None  # the model's own NamedTuple, every tensor stacked
    c: Tensor | None = None  # (T, 1, B, C), what the guide's encode gave
    # of a latent that all steps share; its densities are also in those of step 1
    f: Tensor | None = None  # (K, B, F)
    prior_f: Distribution | None = None
    proposal_f: Distribution | None = None
    scale: float = 1.0  # of the loss: of a subsampled plate, or poutine.scale
    log_twist: Tensor | float = 0.0  # log r_t - log r_{t-1} of a twist; 0 without one

    @property
    def log_weight(self) -> Tensor:
        """log p(x_t, z_t | past) - log q(z_t | ...), twisted, ``(T, K, B)``, nats."""
        return self.log_prior + self.log_emission - self.log_proposal + self.log_twist


def check_mask(mask: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return the mask if it is a bool prefix mask of that shape.

    Args:
        mask: to be ``(B, T)`` bool, True for the steps a sequence has, False after its end.
        shape: the (B, T) of the data; None where the mask decides.

    Raises:
        ValueError: another shape, or a mask with a hole.
        TypeError: not bool.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of dtype bool, got {kind}; use mask.bool()")
    if mask.ndim != 2 or 0 in mask.shape or shape not in (None, mask.shape):
        expected = "(B, T), both at least 1" if shape is None else tuple(shape)
        raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if bool(holes.any()):
        raise ValueError(
            "mask must be a prefix (True for a sequence's steps, then False); sequence "
            f"{int(holes.nonzero()[0])} is observed again after a gap"
        )
    return mask


def check_batch(model: Any, x: Any, mask: Any = None) -> tuple[Tensor, Tensor]:
    """Return data ``(B, T, X)`` and a prefix mask ``(B, T)``, padding overwritten.

    Args:
        model: whose own ``check`` is asked, if it has one.
        x: the data.
        mask: bool, or None where every step is observed.

    Raises:
        TypeError: x that is not a tensor of floating point numbers, or a mask that is not bool.
        ValueError: x or mask of another shape, a mask with a hole, or data the model cannot score.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x must be a tensor of floating point numbers, got {kind}; use torch.as_tensor(x, "
            "dtype=...) with the dtype of the model"
        )
    if callable(check := getattr(model, "check", None)):
        checked: tuple[Tensor, Tensor] = check(x, mask)
        return checked
    if x.ndim != 3 or 0 in x.shape[:2]:
        hint = "; add the batch dimension" if x.ndim == 2 else ""
        raise ValueError(f"x must have shape (B, T, X), got {tuple(x.shape)}{hint}")
    if mask is None:
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)
    mask = check_mask(mask, x.shape[:2])
    return torch.where(mask.unsqueeze(-1), x, x[:, :1]), mask  # a value the program can score


def require_steps(mask: Tensor) -> None:
    """Raise a ValueError if a mask ``(B, T)`` observes no step of some sequence."""
    empty = ~mask.any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            "mask must observe a step of every sequence, but sequence "
            f"{int(empty.nonzero()[0])} (counted from 0) has none; leave it out"
        )


def select_particles(state: Any, parents: Tensor) -> Any:
    """Take the particles ``parents`` ``(K, B)`` of every tensor ``(K, B, ...)`` of a state."""
    if parents.ndim != 2 or parents.shape[1] != state[0].shape[1]:
        raise ValueError(
            f"parents must be indices (K, B) with B = {state[0].shape[1]}, got "
            f"{tuple(parents.shape)}"
        )
    particles, size = parents.shape
    flat = (parents * size + torch.arange(size, device=parents.device)).reshape(-1)
    return type(state)(
        *(
            value.reshape(particles * size, -1).index_select(0, flat).view_as(value)
            for value in state
        )
    )
