"""Numbers of each sequence, in bounded memory: what an evaluation sums, and what is compared."""

import math
from functools import partial

import torch
from torch import Tensor

from inference.adversarial import Adversarial
from inference.batches import by_portions
from inference.bounds import analytic_kl, elbo, per_sequence, rate, reconstruction
from inference.densities import StepDensities, check_batch
from inference.divergences import normal_parameters, wasserstein2
from inference.modes import evaluating
from inference.protocols import Program, counts, require_programs
from inference.random import seeded
from inference.traces import step_densities
from inference.weights import effective_sample_size, log_mean_exp, pareto_k, require_usable, wide

_FRAMES_AT_ONCE = 80_000  # frames times particles: under half a GiB at 88 features, 32 units


def portion(each: int) -> int:
    """How many of what has so many frames, times particles, fit into memory at once."""
    return max(_FRAMES_AT_ONCE // each, 1)


@torch.no_grad()
def sequence_bounds(
    model: Program,
    guide: Program,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    num_particles: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """ELBO and IWAE of each sequence, ``(B,)``: for differences between two models.

    Args and errors are those of :func:`~inference.evaluation.evaluate`, whose numbers are sums
    of these.

    Returns:
        "iwae" and "elbo", nats.
    """
    counts(1, num_particles=num_particles)
    require_programs(model, guide)
    x, mask = check_batch(model, x, mask)
    size = min(32, portion(mask.shape[1] * num_particles))
    with seeded(seed), evaluating(model, guide):
        bounds = partial(bound_columns, model, guide, num_particles, None, None)
        columns = by_portions(bounds, x, mask, size)
    return {name: columns[name] for name in ("iwae", "elbo")}


def bound_columns(
    model: Program,
    guide: Program,
    num_particles: int,
    at_once: int | None,
    adversarial: Adversarial | None,
    x: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """Columns (B, ...) of bounds, from K particles in portions."""
    at_once = at_once or portion(mask.numel())
    columns: dict[str, Tensor] = {}
    totals = []  # of each portion, (k, B)
    summed = wide(x).new_full(mask.t().shape, -math.inf)  # log of weights up to each step, (T, B)
    for done in range(0, num_particles, at_once):
        count = min(at_once, num_particles - done)
        d = step_densities(model, guide, x, mask, num_particles=count)
        _require_mask(d, mask)
        d = d._replace(
            log_prior=wide(d.log_prior),
            log_emission=wide(d.log_emission),
            log_proposal=wide(d.log_proposal),
        )
        cumulative = d.log_weight.cumsum(dim=0)
        summed = torch.logaddexp(summed, cumulative.logsumexp(dim=1))
        totals.append(cumulative[-1])
        for name, column in _averages(d, adversarial).items():
            columns[name] = columns.get(name, 0.0) + column * (count / num_particles)
    require_usable(summed)
    total = torch.cat(totals)
    columns |= {"iwae": log_mean_exp(total, dim=0), "ess": effective_sample_size(total)}
    if d.z.shape[-1] and num_particles >= 25:
        columns["pareto_k"] = pareto_k(total)
    return columns


def _require_mask(d: StepDensities, mask: Tensor) -> None:
    """Refuse a traced program that scores steps which the mask leaves out."""
    scored = d.mask[:, 0].t()
    if scored.shape == mask.shape and not torch.equal(scored, mask):
        raise ValueError(
            "model must leave out the steps that mask leaves out, but scores them; put "
            "poutine.mask(mask=mask[:, t]) around the sites of a step"
        )


def _averages(d: StepDensities, adversarial: Adversarial | None) -> dict[str, Tensor]:
    """Columns (B, ...): sums over observed steps, averages over particles."""
    columns = {
        "elbo": elbo(d.log_weight),
        "reconstruction_per_frame": reconstruction(d),
        "kl_per_frame": rate(d),
    }
    if d.z.shape[-1] == 0:
        return columns
    try:
        (loc_q, scale_q), (loc_p, scale_p) = map(normal_parameters, (d.proposal, d.prior))
    except NotImplementedError:
        return columns
    observed = d.mask.unsqueeze(-1)
    units = adversarial is not None and adversarial.standardise  # those of the critic's number
    shift = ((loc_q - loc_p) / scale_p).where(observed, 0.0)
    values = {
        "closed_form_kl_per_frame": analytic_kl(d),
        "closed_form_w2_per_frame": wasserstein2(d, standardise=units),
        "prior_scale": scale_p.where(observed, 0.0).mean(dim=-1),
        "proposal_scale": scale_q.where(observed, 0.0).mean(dim=-1),
        "shift": shift,
        "shift_square": shift.square(),
    }
    columns |= {name: per_sequence(wide(value)) for name, value in values.items()}
    if adversarial is not None:
        count = d.mask.sum(dim=0)[0]
        distance = adversarial.distance(d) if bool(count.any()) else 0.0
        # an average over the frames of these sequences, shared out by length
        columns["critic_distance_per_frame"] = distance * count.to(d.log_prior)
    return columns
