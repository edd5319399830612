"""``evaluate``: held-out bounds with standard errors, and what a bound alone does not say."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from inference.adversarial import Adversarial
from inference.divergences import normal_parameters, wasserstein2
from inference.information import RateSplit, rate_split
from inference.objectives import analytic_kl, elbo, iwae, rate, reconstruction
from inference.random import seeded
from inference.traces import step_densities
from inference.weights import effective_sample_size, pareto_k


@dataclass(frozen=True)
class Evaluation:
    """Held-out numbers in nats; ``_per_frame`` is the sum over the set divided by its frames.

    All bounds come from the same draws. Standard errors (``_se``) are over sequences, treating
    the set as a sample of them; ``_per_sequence`` averages sequences. Absent parts are None.
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
    model: Any,
    guide: Any,
    x: Tensor,
    mask: Tensor,
    *,
    num_particles: int = 64,
    batch_size: int = 32,
    seed: int = 0,
    adversarial: Adversarial | None = None,
    train: tuple[Tensor, Tensor] | None = None,
    active_above: float = 0.01,
) -> Evaluation:
    """Score a model and guide on held-out sequences.

    Args:
        model, guide: Pyro programs, best with a rollout.
        x: ``(B, T, X)``.
        mask: ``(B, T)`` bool, a prefix.
        num_particles: K of the importance-weighted bound; k-hat needs 25.
        batch_size: sequences scored at once, which bounds memory.
        seed: of all draws.
        adversarial: its critic's distance is put beside the closed forms, W2 in its units.
        train: x and mask the models were trained on; with them the rate is split into
            information and aggregate mismatch, as bounds.
        active_above: a latent dimension is active where the posterior mean's shift from the
            prior mean, in prior deviations, has more than this variance over frames (Burda et
            al. 2016 with the prior's own location and scale taken out, which depend on h here).

    Raises:
        ValueError: from the model, for data it cannot score.
    """
    parts: dict[str, list[Tensor]] = {}
    with seeded(seed):
        for i in range(0, len(x), batch_size):
            xs, masks = x[i : i + batch_size], mask[i : i + batch_size]
            masks = masks[:, : max(int(masks.sum(dim=1).max()), 1)]
            d = step_densities(
                model, guide, xs[:, : masks.shape[1]], masks, num_particles=num_particles
            )
            for name, value in _pieces(d, adversarial).items():
                parts.setdefault(name, []).append(value)
    columns = {name: torch.cat(values) for name, values in parts.items()}
    lengths = mask.sum(dim=1).to(x)
    frames = float(lengths.sum())

    def per_frame(values: Tensor) -> tuple[float, float]:
        ratio = float(values.sum()) / frames
        count = len(values)
        residual = (values - ratio * lengths).square().sum().sqrt()
        return ratio, float(residual) / frames * (count / max(count - 1, 1)) ** 0.5

    def per_sequence(values: Tensor) -> tuple[float, float]:
        error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(torch.nan)
        return float(values.mean()), float(error)

    numbers: dict[str, Any] = {}
    for name in ("iwae", "elbo"):
        for suffix, average in (("frame", per_frame), ("sequence", per_sequence)):
            mean_and_error = average(columns[name])
            numbers[f"{name}_per_{suffix}"], numbers[f"{name}_per_{suffix}_se"] = mean_and_error
    for name, column in (
        ("reconstruction_per_frame", "reconstruction"),
        ("kl_per_frame", "kl"),
        ("closed_form_kl_per_frame", "closed_form_kl"),
        ("closed_form_w2_per_frame", "closed_form_w2"),
        ("critic_distance_per_frame", "critic"),
        ("prior_scale", "prior_scale"),
        ("proposal_scale", "proposal_scale"),
    ):
        if column in columns:
            numbers[name] = per_frame(columns[column])[0]
    if "pareto_k" in columns:
        finite = columns["pareto_k"][~columns["pareto_k"].isnan()]
        if len(finite):
            numbers["pareto_k_median"] = float(finite.median())
            numbers["pareto_k_above_07"] = float((finite > 0.7).double().mean())
    if "shift" in columns:
        mean = columns["shift"].sum(dim=0) / frames
        variance = columns["shift_square"].sum(dim=0) / frames - mean.square()
        numbers["active_units"] = int((variance > active_above).sum())
    if train is not None and "prior_scale" in columns:
        with torch.enable_grad():
            split: RateSplit = rate_split(model, guide, train, (x, mask), seed=seed)
        numbers["aggregate_mismatch_at_least"] = split.aggregate_mismatch_at_least
        numbers["aggregate_mismatch_se"] = split.aggregate_mismatch_se
        numbers["information_at_most"] = split.information_at_most
    return Evaluation(
        num_particles=num_particles,
        frames=int(frames),
        sequences=len(x),
        effective_sample_size=float(columns["ess"].mean()),
        **numbers,
    )


def _pieces(d: Any, adversarial: Adversarial | None) -> dict[str, Tensor]:
    """Per sequence (B, ...): sums over observed steps, averages over particles."""
    total = d.log_weight.sum(dim=0)
    pieces = {
        "iwae": iwae(d.log_weight),
        "elbo": elbo(d.log_weight),
        "reconstruction": reconstruction(d),
        "kl": rate(d),
        "ess": effective_sample_size(total),
    }
    if d.z.shape[-1] == 0:
        return pieces
    if total.shape[0] >= 25:
        pieces["pareto_k"] = pareto_k(total)
    try:
        (loc_q, scale_q), (loc_p, scale_p) = map(normal_parameters, (d.proposal, d.prior))
    except NotImplementedError:
        return pieces
    observed = d.mask.unsqueeze(-1)
    units = adversarial is not None and adversarial.standardise  # those of the critic's number
    shift = ((loc_q - loc_p) / scale_p).where(observed, 0.0)
    pieces |= {
        "closed_form_kl": analytic_kl(d).sum(dim=0).mean(dim=0),
        "closed_form_w2": wasserstein2(d, standardise=units).sum(dim=0).mean(dim=0),
        "prior_scale": scale_p.where(observed, 0.0).mean(dim=-1).sum(dim=0).mean(dim=0),
        "proposal_scale": scale_q.where(observed, 0.0).mean(dim=-1).sum(dim=0).mean(dim=0),
        "shift": shift.sum(dim=0).mean(dim=0),
        "shift_square": shift.square().sum(dim=0).mean(dim=0),
    }
    if adversarial is not None:
        count = d.mask.sum(dim=0)[0]
        # an average over this batch's frames, shared out by length
        pieces["critic"] = adversarial.distance(d) * count.to(total)
    return pieces
