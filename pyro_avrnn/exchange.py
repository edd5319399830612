"""Emit sequences again, with the latent of the whole sequence exchanged or drawn anew.

Every function draws from torch's global random state, keeps no gradient, and runs in evaluation
mode. Afterwards every part of model and guide returns to its own mode.
"""

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from inference.densities import StepDensities
from inference.modes import evaluating
from inference.protocols import counts, one_of
from pyro_avrnn.generation import generate, mean_of, require_f, with_steps
from pyro_avrnn.sequence import SequenceGuide, SequenceModel


@torch.no_grad()
def swap_f(
    model: SequenceModel,
    guide: SequenceGuide,
    x: Tensor,
    order: Sequence[int] | Tensor,
    mask: Tensor | None = None,
    *,
    mean: bool = True,
) -> Tensor:
    """Emit sequences again, each with its own z_{1:T} and the f of another sequence.

    If f holds what is constant along a sequence (who speaks) and z what changes (what is said),
    the result says the same in another voice. Source: Li and Mandt (2018),
    https://arxiv.org/abs/1803.02991, section 4.

    Latents are one draw of the guide. A model whose recurrence reads x reads the data here.

    Args:
        model, guide: a model with a latent f that all steps share, and its guide.
        x: ``(B, T, X)``.
        order: B indices, counted from 0: sequence b gets the f of sequence ``order[b]``.
        mask: ``(B, T)`` bool, a prefix, or None.
        mean: the emission's means, or draws from it.

    Returns:
        ``(B, T, X)``, zero on padding.

    Raises:
        ValueError: a model without f, an order that is not B indices, a sequence without steps,
            or data that the model cannot score.
        NotImplementedError: ``mean`` with an emission that does not know its mean.
    """
    require_f("swap_f", model)
    with evaluating(model, guide):
        x, mask = with_steps(model, x, mask)
        taken = _indices(order, x)
        own = model.rollout(guide, x, mask)
        assert own.f is not None  # f_dim > 0
        return _emitted(model.rollout(guide, x, mask, z=own.z, f=own.f[:, taken]), mask, mean)


@torch.no_grad()
def redraw(
    model: SequenceModel,
    guide: SequenceGuide,
    x: Tensor,
    what: str,
    mask: Tensor | None = None,
    *,
    mean: bool = True,
) -> Tensor:
    """Emit sequences again, with f or the path of z from its prior, the other kept.

    What is kept should be recognised, what is drawn anew should not. Source: the protocol of Li
    and Mandt (2018), https://arxiv.org/abs/1803.02991, section 4.1.

    Args:
        model, guide: a model with a latent f that all steps share, and its guide.
        x: ``(B, T, X)``.
        what: "f" or "z", which of them is drawn from its prior. A model whose recurrence reads x
            reads the data where z is kept, and what it has emitted where z is drawn.
        mask: ``(B, T)`` bool, a prefix, or None.
        mean: the emission's means, or draws from it.

    Returns:
        ``(B, T, X)``, zero on padding.

    Raises:
        ValueError: a model without f, another ``what``, a sequence without steps, or data that
            the model cannot score.
        NotImplementedError: ``mean`` with an emission that does not know its mean.
    """
    require_f("redraw", model)
    one_of(("f", "z"), what=what)
    with evaluating(model, guide):
        x, mask = with_steps(model, x, mask)
        own = model.rollout(guide, x, mask)
        assert own.f is not None  # f_dim > 0
        if what == "z":
            emitted = generate(model, len(x), mask.shape[1], mean=mean, f=own.f[0])
            return torch.where(mask.unsqueeze(-1), emitted, 0.0)
        drawn = model.prior_f(Size((1, len(x)))).sample()
        return _emitted(model.rollout(guide, x, mask, z=own.z, f=drawn), mask, mean)


def _emitted(d: StepDensities, mask: Tensor, mean: bool) -> Tensor:
    """Means or draws of the emission, ``(B, T, X)``, zero on padding."""
    assert d.emission is not None
    emitted = mean_of(d.emission) if mean else d.emission.sample()  # (T, 1, B, X)
    return torch.where(mask.unsqueeze(-1), emitted.squeeze(1).transpose(0, 1), 0.0)


@torch.no_grad()
def latents_from_prior(model: SequenceModel, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Draw f ``(B, F)`` and z ``(B, T, Z)`` of free runs, which feed back means of emissions.

    Raises:
        ValueError: a number below 1, or a model without f.
    """
    counts(1, size=size, length=length)
    require_f("latents_from_prior", model)
    with evaluating(model):
        f = model.prior_f(Size((size,))).sample()
        state, path = model.condition(model.init(Size((size,))), f), []
        for _ in range(length):
            path.append(model.transition(state).sample())
            emission = model.emission(path[-1], state)
            state = model.advance(state, path[-1], mean_of(emission))
        return f, torch.stack(path, dim=1)


def _indices(order: Sequence[int] | Tensor, x: Tensor) -> Tensor:
    """``order`` as B indices, ``(B,)``."""
    given = torch.as_tensor(order, device=x.device)
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    known = whole and bool(((given >= 0) & (given < len(x))).all())
    if not known or given.shape != x.shape[:1]:
        raise ValueError(
            f"order must hold an index from 0 to {len(x) - 1} for each of the {len(x)} sequences, "
            f"got {given.tolist()}"
        )
    return given.long()
