"""Held-out bounds with standard errors, and diagnostics that a bound alone does not give."""

import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.adversarial import Adversarial
from inference.batches import by_portions
from inference.columns import bound_columns, portion
from inference.densities import check_batch
from inference.information import rate_split
from inference.modes import evaluating
from inference.particles import particle_filter
from inference.protocols import Program, at_least, counts, given, of_kind, require_programs
from inference.random import seeded
from inference.resampling import Criterion, Resampler
from inference.traces import rolls

_FILTERED_AT_ONCE = 4_000_000  # in a filter, which keeps a few numbers of each


@dataclass(frozen=True)
class Evaluation:
    """Held-out numbers in nats; ``_per_frame`` is the sum over the set divided by its frames.

    ELBO and IWAE come from the same draws, FIVO from a particle filter's own. Standard errors
    (``_se``) are over sequences, treating the set as a sample of them; ``_per_sequence``
    averages sequences. Parts that were not computed are None.

    ``pareto_k_constant`` is the share of sequences whose weights are constant, so that there is
    no tail to fit (the guide is the posterior there, or z plays no role); the other k-hats leave
    them out. ``filter_ess`` is averaged over frames; ``filter_first_ancestors`` is the number of
    particles of step 1 that the last ones descend from.
    """

    iwae_per_frame: float
    iwae_per_frame_se: float
    elbo_per_frame: float
    elbo_per_frame_se: float
    reconstruction_per_frame: float
    kl_per_frame: float
    iwae_per_sequence: float
    iwae_per_sequence_se: float
    elbo_per_sequence: float
    elbo_per_sequence_se: float
    num_particles: int
    frames: int
    sequences: int
    effective_sample_size: float
    pareto_k_median: float | None = None
    pareto_k_above_07: float | None = None
    pareto_k_constant: float | None = None
    fivo_per_frame: float | None = None
    fivo_per_frame_se: float | None = None
    fivo_per_sequence: float | None = None
    fivo_per_sequence_se: float | None = None
    fivo_particles: int | None = None
    filter_ess: float | None = None
    filter_first_ancestors: float | None = None
    closed_form_kl_per_frame: float | None = None
    closed_form_w2_per_frame: float | None = None
    critic_distance_per_frame: float | None = None
    prior_scale: float | None = None
    proposal_scale: float | None = None
    active_units: int | None = None
    aggregate_mismatch_at_least: float | None = None
    aggregate_mismatch_se: float | None = None
    information_at_most: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain values by name, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Program,
    guide: Program,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    num_particles: int = 64,
    batch_size: int = 32,
    particles_at_once: int | None = None,
    fivo_particles: int | None = None,
    resampler: str | Resampler = "systematic",
    criterion: str | Criterion = "ess",
    twist: Any = None,
    seed: int = 0,
    adversarial: Adversarial | None = None,
    train: tuple[Tensor, Tensor | None] | None = None,
    active_above: float = 0.01,
) -> Evaluation:
    """Score a model and guide on held-out sequences, in evaluation mode and bounded memory.

    Args:
        model, guide: Pyro programs, best with a rollout.
        x, mask: ``(B, T, X)``, and ``(B, T)`` bool, a prefix, or None.
        num_particles: K of the importance-weighted bound; k-hat needs 25.
        batch_size: sequences scored at once, fewer where they are long.
        particles_at_once: how many of the K to draw at once, by default chosen by the length of
            the sequences. This and ``batch_size`` change the draws, not what they estimate.
        fivo_particles: K of a particle filter, for models with single steps, all drawn at once;
            None leaves its bound out.
        resampler, criterion, twist: as for :func:`~inference.particles.particle_filter`.
        seed: seed of all draws.
        adversarial: report the distance of its critic, and W2 in the units of that critic.
        train: x and mask the model was trained on, for the rate split of
            :func:`~inference.information.rate_split`.
        active_above: a latent dimension is active if the posterior mean's shift from the prior
            mean, in prior deviations, has a larger variance over frames (Burda et al. 2016, but
            relative to the prior, which depends on h here).

    Raises:
        ValueError: a number below 1, a mask without frames, or data the model cannot score.
        TypeError: data or a mask of another kind, or a filter's bound of a model or guide without
            single steps; what is missing is named.
        DegenerateWeightsError: all weights of a step of a sequence are zero, or not numbers.
    """
    counts(1, num_particles=num_particles, batch_size=batch_size)
    counts(1, **given(particles_at_once=particles_at_once, fivo_particles=fivo_particles))
    at_least(0.0, active_above=active_above)
    require_programs(model, guide)
    of_kind(Adversarial, "an Adversarial", **given(adversarial=adversarial))
    if adversarial is not None and adversarial.role.of_sequences:
        raise ValueError(
            f"adversarial must compare codes of frames, got role {adversarial.role.name!r}; "
            "inference.audit.audit estimates the information of f and z"
        )
    x, mask = check_batch(model, x, mask)
    if not bool(mask.any()):
        raise ValueError(f"mask must observe a frame, got {tuple(mask.shape)} with none")
    longest = int(mask.sum(dim=1).max())
    together = min(num_particles, particles_at_once or num_particles)
    with seeded(seed), evaluating(model, guide):
        size = min(batch_size, portion(longest * together))
        bounds = partial(
            bound_columns, model, guide, num_particles, particles_at_once, adversarial
        )
        columns = by_portions(bounds, x, mask, size)
        if fivo_particles is not None:
            size = min(batch_size, max(_FILTERED_AT_ONCE // (longest * fivo_particles), 1))
            options: dict[str, Any] = {"num_particles": fivo_particles, "resampler": resampler}
            options |= {"criterion": criterion, "twist": twist}
            filtered = partial(_filtered, model, guide, options)
            columns |= by_portions(filtered, x, mask, size)
        numbers = _summary(columns, mask, active_above)
        latents = "prior_scale" in columns or bool((columns["kl_per_frame"] != 0).any())
        if train is not None and latents and rolls(model, guide):
            with torch.enable_grad():
                split = rate_split(model, guide, train, (x, mask), seed=seed)._asdict()
            numbers |= {name: value for name, value in split.items() if name != "rate"}
    return Evaluation(num_particles=num_particles, fivo_particles=fivo_particles, **numbers)


def _summary(columns: dict[str, Tensor], mask: Tensor, active_above: float) -> dict[str, Any]:
    """Numbers of the set from columns ``(B, ...)``, sums over the frames of each sequence."""
    lengths = mask.sum(dim=1).to(columns["elbo"])
    frames = float(lengths.sum())
    numbers: dict[str, Any] = {"frames": int(mask.sum()), "sequences": len(mask)}
    for name in {field.name for field in fields(Evaluation)} & columns.keys():
        numbers[name] = float(columns[name].sum()) / frames
    for name in {"iwae", "elbo", "fivo"} & columns.keys():
        values = columns[name]
        numbers[f"{name}_per_frame"] = float(values.sum()) / frames
        numbers[f"{name}_per_frame_se"] = _ratio_error(values, lengths)
        numbers[f"{name}_per_sequence"] = float(values.mean())
        error = values.std() / len(values) ** 0.5 if len(values) > 1 else math.nan
        numbers[f"{name}_per_sequence_se"] = float(error)
    some = mask.any(dim=1)  # a sequence without frames says nothing about the weights
    numbers["effective_sample_size"] = float(columns["ess"][some].mean())
    if "pareto_k" in columns:
        finite = columns["pareto_k"][some & ~columns["pareto_k"].isnan()]
        numbers["pareto_k_constant"] = 1.0 - len(finite) / int(some.sum())
        if len(finite):
            numbers["pareto_k_median"] = float(finite.median())
            numbers["pareto_k_above_07"] = float((finite > 0.7).double().mean())
    if "first_ancestors" in columns:
        numbers["filter_first_ancestors"] = float(columns["first_ancestors"][some].mean())
    if "shift" in columns:
        mean = columns["shift"].sum(dim=0) / frames
        variance = columns["shift_square"].sum(dim=0) / frames - mean.square()
        numbers["active_units"] = int((variance > active_above).sum())
    return numbers


def _ratio_error(values: Tensor, lengths: Tensor) -> float:
    """Standard error over sequences of sum(values) / sum(lengths); NaN of a single one."""
    frames, count = float(lengths.sum()), len(values)
    if count < 2:
        return math.nan
    residual = (values - float(values.sum()) / frames * lengths).square().sum().sqrt()
    return float(residual) / frames * (count / (count - 1)) ** 0.5


def _filtered(
    model: Any, guide: Any, options: dict[str, Any], x: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Columns (B,) of a particle filter."""
    found = particle_filter(model, guide, x, mask, paths=False, **options)
    return {
        "fivo": found.log_evidence,
        "filter_ess": torch.where(found.mask, found.ess, 0.0).sum(dim=0),
        "first_ancestors": found.unique_ancestors()[0].to(found.ess),
    }
