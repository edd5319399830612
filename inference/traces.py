"""Step densities of any Pyro model and guide, by the model's rollout or by tracing both."""

import re
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from inference.densities import StepDensities
from inference.divergences import normal_parameters
from inference.protocols import (
    HasRollout,
    Program,
    Stepwise,
    StepwiseGuide,
    counts,
    require_programs,
)

Sites = dict[str, dict[str, Any]]  #: sites of a trace by name

_TIME = re.compile(r"(\d+)\D*$")  # the last number in a name


def step_densities(
    model: Program, guide: Program, *args: Any, num_particles: int = 1, **options: Any
) -> StepDensities:
    """Densities of every step, ``(T, K, B)``, with latents drawn from the guide.

    Args:
        model: a Pyro program. Its ``rollout`` is used if it has one that serves the guide; under
            Pyro handlers such as ``poutine.scale``, which a rollout does not see, it is traced.
        guide: a Pyro program over the same latents, reparameterised.
        args: arguments of both, data ``(B, T, X)`` and mask ``(B, T)``.
        num_particles: K.
        options: further arguments of the rollout, such as ``recompute`` and ``compile``.

    Raises:
        TypeError: model and guide are swapped.
        ValueError: a latent that the guide does not propose.
        NotImplementedError: without a rollout, a latent that is not reparameterised, sites
            outside one plate over sequences at dimension -1, or options of a rollout.
    """
    require_programs(model, guide)
    counts(1, num_particles=num_particles)
    if isinstance(guide, HasRollout) and isinstance(model, StepwiseGuide):
        raise TypeError(
            f"model and guide are swapped: got {type(model).__name__}, which proposes latents, as "
            f"model, and {type(guide).__name__}, which has a rollout, as guide"
        )
    if isinstance(model, HasRollout) and rolls(model, guide):
        return model.rollout(guide, *args, num_particles=num_particles, **options)
    if options:
        raise NotImplementedError(
            f"{', '.join(options)} needs a model with a rollout, and a guide with encode and "
            "proposal, under no Pyro handler; a program that is traced has none"
        )
    return _traced(model, guide, args, num_particles)


def rolls(model: Program, guide: Program) -> bool:
    """Whether densities come from the model's rollout; they come from traces if not."""
    if not isinstance(model, HasRollout):
        return False
    serves = isinstance(guide, StepwiseGuide) or not isinstance(model, Stepwise)
    unseen = (TraceMessenger, BlockMessenger)  # change no density
    handled = any(type(handler) not in unseen for handler in _PYRO_STACK)
    return serves and not handled and not (_draws_weights(model) or _draws_weights(guide))


def draws_alone(model: Program, guide: Program) -> dict[str, Any]:
    """The option by which a rollout leaves out the log-densities, where it has one."""
    if isinstance(model, HasRollout) and rolls(model, guide):
        if "scored" in signature(model.rollout).parameters:
            return {"scored": False}
    return {}


def _draws_weights(program: Program) -> bool:
    """Whether a module has random weights (``PyroSample``), each a site of its own."""
    parts = program.modules() if isinstance(program, nn.Module) else ()
    return any(isinstance(part, PyroModule) and part._pyro_samples for part in parts)


def time_index(name: str) -> int:
    """Step of a site, the last number in its name; 1 for a site without one, or a weight's.

    Example:
        >>> time_index("z_12"), time_index("step3_z"), time_index("f"), time_index("net.0.bias")
        (12, 3, 1, 1)
    """
    match = _TIME.search(name.rpartition(".")[2])
    return int(match.group(1)) if match else 1


def sample_sites(trace: poutine.Trace) -> Sites:
    """Sample sites of a trace, without subsamples of plates and deterministic values."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not poutine.util.site_is_subsample(site)
        and not site["infer"].get("_deterministic")
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
    if getattr(guide, "prototype_trace", False) is None:  # an autoguide learns its shapes first
        with poutine.block():
            guide(*args)
    with pyro.plate("particles", num_particles, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    sites, proposed = sample_sites(model_trace), sample_sites(guide_trace)
    scale = unscale({**sites, **{f"guide's {name}": site for name, site in proposed.items()}})
    observed = [name for name, site in sites.items() if site["is_observed"]]
    latents = [name for name, site in sites.items() if not site["is_observed"]]
    _require_roles(observed, proposed)
    _require_proposals(latents, guide_trace)
    terms = [site["log_prob"] for site in sites.values()]
    size = max((term.shape[-1] for term in terms if term.ndim), default=1)
    zeros = terms[0].new_zeros(num_particles, size)
    z, x = Columns(sites, latents, zeros), Columns(sites, observed, zeros)
    q = Columns(sites | {name: proposed[name] for name in latents}, latents, zeros)
    log_q, further = q.log_prob(), [name for name in proposed if name not in latents]
    if further:  # Pyro counts them, too: here with step 1
        extra = Columns(sites | proposed, further, zeros).joint_log_prob()
        log_q = torch.cat([(log_q[0] + extra).unsqueeze(0), log_q[1:]])
    return StepDensities(
        z=z.values(),
        h=None,
        x=x.values(),
        mask=Columns(sites, [*observed, *latents], zeros).mask(),
        log_prior=z.log_prob(),
        log_emission=x.log_prob(),
        log_proposal=log_q,
        prior=z.normal(),
        emission=x.normal(),
        proposal=q.normal(),
        scale=scale,
    )


def unscale(sites: Sites) -> float:
    """Take the scale that all sites share, as in a subsampled plate, out of their densities.

    A weight is a sequence's own; how many sequences it stands for is a matter of the loss.
    """
    found = [torch.as_tensor(site["scale"], dtype=torch.float64) for site in sites.values()]
    scales = set(torch.cat([scale.flatten().cpu() for scale in found]).tolist())
    if len(scales) != 1:
        raise NotImplementedError(
            f"sites have different scales ({', '.join(map(str, sorted(scales)))}), so that a "
            "sequence has no weight of its own; pyro.infer.Trace_ELBO takes such programs"
        )
    (scale,) = scales
    if scale != 1.0:
        for site in sites.values():
            site["log_prob"] = site["log_prob"] / scale
    return scale


def _require_roles(observed: list[str], proposed: Sites) -> None:
    """Refuse a model without data, and a guide with: two models, two guides, or both swapped."""
    if not observed or any(site["is_observed"] for site in proposed.values()):
        what = "model observes no data" if not observed else "guide observes data, as a model does"
        raise ValueError(
            f"the {what}; give a model, whose sites of x have obs=, and a guide, which proposes "
            "its latents"
        )


def _require_proposals(latents: list[str], guide_trace: poutine.Trace) -> None:
    for name in latents:
        if name not in guide_trace.nodes:
            raise ValueError(f"the guide does not propose the model's latent {name!r}")
        if not guide_trace.nodes[name]["fn"].has_rsample:
            raise NotImplementedError(
                f"latent {name!r} is not reparameterised; pyro.infer.Trace_ELBO takes such guides"
            )
