"""Step densities of any Pyro model and guide: by the model's rollout, or by tracing both."""

import re
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from inference.densities import StepDensities
from inference.protocols import HasRollout

_TIME = re.compile(r"_(\d+)$")


def step_densities(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1,
    **options: Any,
) -> StepDensities:
    """Densities of every step, ``(T, K, B)``, with latents drawn from the guide.

    Args:
        model: a Pyro program; its ``rollout`` is used where it has one.
        guide: a Pyro program over the same latents, reparameterised.
        args: what both are called with, data ``(B, T, X)`` and mask ``(B, T)``.
        num_particles: K.
        options: what else the rollout takes, such as ``recompute`` and ``compile``.

    Raises:
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
    """The step of a site named ``something_t``; 1 for a site without a number.

    Example:
        >>> time_index("z_12"), time_index("f")
        (12, 1)
    """
    match = _TIME.search(name)
    return int(match.group(1)) if match else 1


def sample_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Sample sites of a trace by name, without the subsamples of plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }


def _traced(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], particles: int
) -> StepDensities:
    with pyro.plate("particles", particles, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    sites = sample_sites(model_trace)
    latents = [name for name, site in sites.items() if not site["is_observed"]]
    observed = [name for name, site in sites.items() if site["is_observed"]]
    _require_proposals(latents, guide_trace)
    terms = [site["log_prob"] for site in sites.values()]
    size = max((term.shape[-1] for term in terms if term.ndim), default=1)
    zeros = terms[0].new_zeros(particles, size)
    steps = sorted({time_index(name) for name in sites})
    z = _Columns(model_trace, latents, steps, zeros)
    x = _Columns(model_trace, observed, steps, zeros)
    q = _Columns(guide_trace, latents, steps, zeros)
    return StepDensities(
        z=z.values(),
        h=None,
        x=x.values(),
        mask=_masks(z, x),
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


class _Columns:
    """Sites of one kind, such as all latents, in columns by step.

    Args:
        trace: where they stand.
        names: of the sites.
        steps: of the program, in order; a step may have none of these sites.
        zeros: ``(K, B)``, with the program's dtype and device.
    """

    def __init__(
        self, trace: poutine.Trace, names: list[str], steps: list[int], zeros: Tensor
    ) -> None:
        self.zeros = zeros
        self.columns = [
            {name: trace.nodes[name] for name in names if time_index(name) == t} for t in steps
        ]

    def log_prob(self) -> Tensor:
        """Summed over the sites of each step, ``(T, K, B)``."""
        return torch.stack([sum(map(self._term, c, c.values()), self.zeros) for c in self.columns])

    def values(self) -> Tensor:
        """Side by side, ``(T, K, B, D)``, steps with fewer dimensions padded by zeros."""
        rows = [
            torch.cat(
                [self._flat(site["value"], site["fn"].event_shape) for site in column.values()],
                dim=-1,
            )
            if column
            else self.zeros.new_zeros(*self.zeros.shape, 0)
            for column in self.columns
        ]
        widest = max(row.shape[-1] for row in rows)
        return torch.stack([torch.nn.functional.pad(r, (0, widest - r.shape[-1])) for r in rows])

    def normal(self) -> Distribution | None:
        """One normal of batch shape (T, K, B) where every site is a diagonal normal, else None."""
        rows = [self._normal_of(column) for column in self.columns]
        parameters = [row for row in rows if row is not None]
        if len(parameters) < len(rows) or len({loc.shape for loc, _ in parameters}) != 1:
            return None
        loc, scale = (torch.stack(parts) for parts in zip(*parameters, strict=True))
        return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def _term(self, name: str, site: dict[str, Any]) -> Tensor:
        term, size = site["log_prob"], self.zeros.shape[-1]
        if term.ndim > 2 or (size > 1 and (term.ndim == 0 or term.shape[-1] != size)):
            raise NotImplementedError(
                f"site {name!r} has log-density of shape {tuple(term.shape)}; step "
                f"densities need one plate over the {size} sequences at dimension -1"
            )
        return term

    def _normal_of(self, column: dict[str, dict[str, Any]]) -> tuple[Tensor, Tensor] | None:
        """Mean and scale ``(K, B, D)`` of a step's sites, None if there are none or others."""
        pieces = []
        for site in column.values():
            fn, event = site["fn"], site["fn"].event_shape
            while isinstance(fn, Independent):
                fn = fn.base_dist
            if not isinstance(fn, Normal):
                return None
            pieces.append([self._flat(p, event) for p in (fn.loc, fn.scale)])
        if not pieces:
            return None
        loc, scale = (torch.cat(parts, dim=-1) for parts in zip(*pieces, strict=True))
        return loc, scale

    def _flat(self, value: Tensor, event: torch.Size) -> Tensor:
        return value.expand(*self.zeros.shape, *event).reshape(*self.zeros.shape, -1)


def _masks(latents: _Columns, observed: _Columns) -> Tensor:
    """Which steps each sequence has, ``(T, 1, B)``, by the first observed site, or latent."""
    whole = torch.ones_like(latents.zeros[:1], dtype=torch.bool)
    rows = []
    for z, x in zip(latents.columns, observed.columns, strict=True):
        mask = next(iter((x or z).values())).get("mask")
        rows.append(whole if mask is None else whole & torch.as_tensor(mask))
    return torch.stack(rows)
