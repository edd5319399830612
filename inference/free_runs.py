"""Free runs of a model as step densities: what it generates, for critics and twists to look at."""

from typing import Any

import torch
from torch import Size, Tensor

from inference.densities import StepDensities
from inference.protocols import Stepwise


def free_run(model: Any, mask: Tensor, num_particles: int = 1) -> StepDensities:
    """Draw latents from the prior and data from the emission, step after step.

    Gradients follow the draws of families that allow it; other draws are constants.

    Args:
        model: with the stepwise functions.
        mask: ``(T, 1, B)`` bool: how many sequences, and how long.
        num_particles: K, runs for each.

    Returns:
        Draws with their states and priors, ``(T, K, B)``; log-densities are left at 0.

    Raises:
        NotImplementedError: a program without stepwise functions, or with a latent f that all
            steps share.
    """
    require_free_runs(model)
    state: Any = model.init(Size((num_particles, mask.shape[2])))
    states, xs, zs = [], [], []
    for _ in range(len(mask)):
        z = _draw(model.transition(state))
        x = _draw(model.emission(z, state))
        states.append(state)
        xs.append(x)
        zs.append(z)
        state = model.advance(state, z, x)
    stacked = type(state)(*map(torch.stack, zip(*states, strict=True)))
    z = torch.stack(zs)
    none = z.new_zeros(z.shape[:-1])
    program: Any = model
    return StepDensities(
        z=z,
        h=program.hidden(stacked) if hasattr(program, "hidden") else None,
        x=torch.stack(xs),
        mask=mask,
        log_prior=none,
        log_emission=none,
        log_proposal=none,
        prior=model.transition(stacked),
        emission=None,
        proposal=None,
        states=stacked,
    )


def require_free_runs(model: Any, role: str = "penalty") -> None:
    """Refuse what cannot run freely, and roles that compare draws at the same states."""
    if role != "penalty":
        raise ValueError(f"free_runs_of goes with role 'penalty', got role {role!r}")
    if not isinstance(model, Stepwise):
        raise NotImplementedError(
            "free runs need a model with the stepwise functions (init, transition, emission, "
            f"advance), got a {type(model).__name__}"
        )
    if getattr(model, "f_dim", 0):
        raise NotImplementedError(
            "free runs are of models without a latent f that all steps share"
        )


def _draw(distribution: Any) -> Tensor:
    drawn: Tensor = distribution.rsample() if distribution.has_rsample else distribution.sample()
    return drawn
