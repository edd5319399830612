"""Step densities of any Pyro model and guide, by the model's rollout or by tracing both."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from inference.densities import StepDensities
from inference.divergences import normal_parameters
from inference.protocols import HasRollout, Program

Sites = dict[str, dict[str, Any]]  #: sites of a trace by name

_TIME = re.compile(r"_(\d+)$")


def step_densities(
    model: Program, guide: Program, *args: Any, num_particles: int = 1, **options: Any
) -> StepDensities:
    """Densities of every step, ``(T, K, B)``, with latents drawn from the guide.

    Args:
        model: a Pyro program; its ``rollout`` is used where it has one.
        guide: a Pyro program over the same latents, reparameterised.
        args: arguments of both, data ``(B, T, X)`` and mask ``(B, T)``.
        num_particles: K.
        options: further arguments of the rollout, such as ``recompute`` and ``compile``.

    Raises:
        ValueError: a latent that the guide does not propose.
        NotImplementedError: without a rollout, a latent that is not reparameterised, sites
            outside one plate over sequences at dimension -1, or options of a rollout.
    """
    if isinstance(model, HasRollout):
        return model.rollout(guide, *args, num_particles=num_particles, **options)
    if options:
        raise NotImplementedError(
            f"{', '.join(options)} needs a model with a rollout; a program that is traced has none"
        )
    return _traced(model, guide, args, num_particles)


def time_index(name: str) -> int:
    """Step of a site named ``something_t``; 1 for a site without a number.

    Example:
        >>> time_index("z_12"), time_index("f")
        (12, 1)
    """
    match = _TIME.search(name)
    return int(match.group(1)) if match else 1


def sample_sites(trace: poutine.Trace) -> Sites:
    """Sample sites of a trace, without the subsamples of plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }


class Columns:
    """Some sites of a program, such as its latents, grouped by step.

    Args:
        sites: all sites of the program, which have its steps.
        names: the chosen ones; a step may have none of them.
        zeros: ``(K, B)`` with dtype and device of the program. If it ran without particles,
            ``(B,)``; results then lack the dimension K.
    """

    def __init__(self, sites: Sites, names: Iterable[str], zeros: Tensor) -> None:
        self.zeros = zeros
        self.sites = {name: sites[name] for name in names}
        columns: dict[int, Sites] = {t: {} for t in sorted(map(time_index, sites))}
        for name, site in self.sites.items():
            columns[time_index(name)][name] = site
        self.columns = list(columns.values())

    def log_prob(self) -> Tensor:
        """Log-densities summed over the sites of each step, ``(T, K, B)``."""
        return torch.stack([self._total(column) for column in self.columns])

    def joint_log_prob(self) -> Tensor:
        """Log-densities summed over all sites, ``(K, B)``."""
        return self._total(self.sites)

    def values(self) -> Tensor:
        """Values side by side, ``(T, K, B, D)``; steps with fewer dimensions end in zeros."""
        rows = self._rows(lambda site: site["value"])
        widest = max(row.shape[-1] for row in rows)
        return torch.stack([torch.nn.functional.pad(r, (0, widest - r.shape[-1])) for r in rows])

    def normal(self) -> Distribution | None:
        """One normal of batch shape (T, K, B) if every site is a diagonal normal, else None."""
        try:
            loc = self._rows(lambda site: normal_parameters(site["fn"])[0])
            scale = self._rows(lambda site: normal_parameters(site["fn"])[1])
        except NotImplementedError:
            return None
        if not all(self.columns) or len({row.shape for row in loc}) != 1:
            return None
        normal = Normal(torch.stack(loc), torch.stack(scale), validate_args=False)
        return Independent(normal, 1, validate_args=False)

    def mask(self) -> Tensor:
        """Steps that each sequence has, ``(T, 1, B)``, by the first site of each step."""
        whole = torch.ones_like(self.zeros[:1], dtype=torch.bool)
        masks = [next(iter(column.values())).get("mask") for column in self.columns]
        return torch.stack([whole if m is None else whole & torch.as_tensor(m) for m in masks])

    def _total(self, sites: Sites) -> Tensor:
        total, size = self.zeros, self.zeros.shape[-1]
        for name, site in sites.items():
            term = site["log_prob"]
            if term.ndim > total.ndim or (size > 1 and (not term.ndim or term.shape[-1] != size)):
                raise NotImplementedError(
                    f"site {name!r} has log-density of shape {tuple(term.shape)}; step "
                    f"densities need one plate over the {size} sequences at dimension -1"
                )
            total = total + term
        return total

    def _rows(self, get: Callable[[dict[str, Any]], Tensor]) -> list[Tensor]:
        """One tensor ``(K, B, D)`` for each step, its sites' events flattened side by side."""
        batch, rows = self.zeros.shape, []
        for column in self.columns:
            parts = [
                get(site).expand(*batch, *site["fn"].event_shape).reshape(*batch, -1)
                for site in column.values()
            ]
            rows.append(torch.cat(parts or [self.zeros.new_zeros(*batch, 0)], dim=-1))
        return rows


def _traced(
    model: Program, guide: Program, args: tuple[Any, ...], num_particles: int
) -> StepDensities:
    with pyro.plate("particles", num_particles, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    sites = sample_sites(model_trace)
    observed = [name for name, site in sites.items() if site["is_observed"]]
    latents = [name for name, site in sites.items() if not site["is_observed"]]
    _require_proposals(latents, guide_trace)
    terms = [site["log_prob"] for site in sites.values()]
    size = max((term.shape[-1] for term in terms if term.ndim), default=1)
    zeros = terms[0].new_zeros(num_particles, size)
    z, x = Columns(sites, latents, zeros), Columns(sites, observed, zeros)
    q = Columns(sites | {name: guide_trace.nodes[name] for name in latents}, latents, zeros)
    return StepDensities(
        z=z.values(),
        h=None,
        x=x.values(),
        mask=Columns(sites, [*observed, *latents], zeros).mask(),
        log_prior=z.log_prob(),
        log_emission=x.log_prob(),
        log_proposal=q.log_prob(),
        prior=z.normal(),
        emission=x.normal(),
        proposal=q.normal(),
    )


def _require_proposals(latents: list[str], guide_trace: poutine.Trace) -> None:
    for name in latents:
        if name not in guide_trace.nodes:
            raise ValueError(f"the guide does not propose the model's latent {name!r}")
        if not guide_trace.nodes[name]["fn"].has_rsample:
            raise NotImplementedError(
                f"latent {name!r} is not reparameterised; pyro.infer.Trace_ELBO takes such guides"
            )
