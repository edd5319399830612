"""Generate sequences from a model: free runs, and continuations of a prefix.

Every function draws from torch's global random state, keeps no gradient, and runs in evaluation
mode (no dropout). Afterwards every part of model and guide returns to its own mode.
"""

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from inference.densities import require_steps
from inference.modes import evaluating
from inference.protocols import counts, of_kind, require_finite
from pyro_avrnn.sequence import SequenceGuide, SequenceModel, require_taken


@torch.no_grad()
def generate(
    model: SequenceModel, size: int, length: int, *, mean: bool = False, f: Tensor | None = None
) -> Tensor:
    """Generate sequences: latents come from the prior, and every observation is fed back.

    Args:
        model: any sequence model.
        size: B, number of sequences.
        length: T, steps of each.
        mean: take the emission's mean at every step, and feed it back, instead of a draw. Latents
            are still drawn. Means of binary data are not binary.
        f: the latent that all steps share, ``(B, F)``, or ``(F,)`` for all sequences; None draws
            it from its prior. Only for models that have one.

    Returns:
        ``(B, T, X)``.

    Raises:
        ValueError: a number below 1, f of another shape, or f for a model without one.
        NotImplementedError: ``mean`` with an emission that does not know its mean.

    Example:
        >>> from pyro_avrnn import recipes
        >>> generate(recipes.vrnn(x_dim=3, z_dim=2, h_dim=5).model, size=4, length=6).shape
        torch.Size([4, 6, 3])
    """
    counts(1, size=size, length=length)
    require_model(model)
    if f is not None:
        require_f("f", model)
    with evaluating(model):
        state = model.init(Size((size,)))
        if model.f_dim:
            f = model.prior_f(Size((size,))).sample() if f is None else f
            of_kind(Tensor, "a tensor (B, F)", f=f)
            if f.shape not in ((model.f_dim,), (size, model.f_dim)):
                raise ValueError(
                    f"f must have shape (B, F) = ({size}, {model.f_dim}) or ({model.f_dim},), "
                    f"got {tuple(f.shape)}"
                )
            state = model.condition(state, f.expand(size, -1))
        return _free_run(model, state, length, mean)


@torch.no_grad()
def continue_from(
    model: SequenceModel,
    guide: SequenceGuide,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    steps: int,
    num_continuations: int,
    num_particles: int = 64,
    mean: bool = False,
) -> Tensor:
    r"""Draw continuations :math:`x_{T+1}, \dots, x_{T+S}` given :math:`x_{1:T}`.

    The guide draws K paths of latents along the prefix. Each continuation takes one of them with
    probability proportional to its importance weight, and runs freely from its end. As K grows,
    the path becomes a draw of the posterior; if the guide is the posterior, any K will do.
    Source: Smith and Gelfand (1992), https://doi.org/10.1080/00031305.1992.10475856 (the weighted
    bootstrap).

    All continuations of a sequence share its K paths: if there are many more of them than K, they
    show the emission's noise rather than the uncertainty about the prefix.

    Args:
        model, guide: the model, and the guide that proposes its latents.
        x: prefixes ``(B, T, X)``.
        mask: ``(B, T)`` bool, a prefix, or None; each sequence continues from its own last step.
        steps: S, how many to add.
        num_continuations: N, of each sequence.
        num_particles: K.
        mean: as for :func:`generate`.

    Returns:
        ``(N, B, S, X)``.

    Raises:
        ValueError: a number below 1, a prefix without steps, weights that are all zero or not
            numbers, or data that the model cannot score.
        NotImplementedError: ``mean`` with an emission that does not know its mean.

    Example:
        >>> from pyro_avrnn import recipes
        >>> r = recipes.vrnn(x_dim=3, z_dim=2, h_dim=5)
        >>> x = torch.zeros(4, 6, 3)
        >>> continue_from(r.model, r.guide, x, steps=2, num_continuations=7).shape
        torch.Size([7, 4, 2, 3])
    """
    counts(1, steps=steps, num_continuations=num_continuations, num_particles=num_particles)
    require_model(model, guide)
    with evaluating(model, guide):
        x, mask = with_steps(model, x, mask)
        d = model.rollout(guide, x, mask, num_particles)
        chosen = _choose(d.log_weight.sum(dim=0), num_continuations)  # (N, B)
        sequence = torch.arange(len(x), device=x.device)
        last = mask.sum(dim=1) - 1  # (B,)
        before = type(d.states)(*(value[last, chosen, sequence] for value in d.states))
        state = model.advance(before, d.z[last, chosen, sequence], x[sequence, last])
        return _free_run(model, state, steps, mean)


def _free_run(model: SequenceModel, state: Any, steps: int, mean: bool) -> Tensor:
    """Observations ``(*batch, S, X)`` of the steps that follow a state ``(*batch, ...)``."""
    observations = []
    for _ in tqdm(range(steps), "generate", delay=2.0, leave=False, disable=None):
        z_t = model.transition(state).sample() if model.z_dim else model.hidden(state)[..., :0]
        emission = model.emission(z_t, state)
        x_t = mean_of(emission) if mean else emission.sample()
        observations.append(x_t)
        state = model.advance(state, z_t, x_t)
    return torch.stack(observations, dim=-2)


def _choose(log_weight: Tensor, count: int) -> Tensor:
    """``(N, B)`` particles of ``(K, B)``, each with probability proportional to its weight."""
    usable = log_weight.isfinite().any(dim=0) & (log_weight < torch.inf).all(dim=0)
    if not bool(usable.all()):
        raise ValueError(
            "every prefix must have a particle of positive weight to continue from, got weights "
            f"that are all zero or not numbers for sequence {int((~usable).nonzero()[0])} "
            "(counted from 0); use more particles, or a guide trained on such data"
        )
    return torch.multinomial(log_weight.t().softmax(dim=-1), count, replacement=True).t()


def mean_of(emission: Distribution) -> Tensor:
    """The mean of an emission.

    Raises:
        NotImplementedError: an emission that does not know it.
    """
    try:
        return emission.mean
    except NotImplementedError:
        raise NotImplementedError(
            f"mean=True needs an emission that knows its mean, got a {type(emission).__name__}; "
            "mean=False draws from it"
        ) from None


def require_model(model: Any, *guides: Any) -> None:
    """Refuse what is no model of this library, or cannot draw."""
    of_kind(SequenceModel, "a SequenceModel", model=model)
    for guide in guides:
        of_kind(SequenceGuide, "a SequenceGuide", guide=guide)
        require_finite(guide=guide)
    require_finite(model=model)
    require_taken("model", model)


def with_steps(model: SequenceModel, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Data and mask as the model checks them, with at least one step of every sequence."""
    if x is None:
        raise ValueError("x (B, T, X) is needed; generate makes sequences without data")
    x, mask_ = model.check(x, mask)
    require_steps(mask_)
    return x, mask_


def require_f(what: str, model: SequenceModel) -> None:
    """Raise a ValueError for a model without a latent that all steps share."""
    if not model.f_dim:
        raise ValueError(
            f"{what} needs a model with a latent that all steps share, but {type(model).__name__} "
            "has none (f_dim 0); models.DSAE (recipes.dsae) has one"
        )
