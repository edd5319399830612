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


def _traced(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], particles: int
) -> StepDensities:
    with pyro.plate("particles", particles, dim=-2):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    latents: dict[int, list[str]] = {}
    observed: dict[int, list[str]] = {}
    for name, site in model_trace.nodes.items():
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
            group = observed if site["is_observed"] else latents
            group.setdefault(time_index(name), []).append(name)
    for name in [name for names in latents.values() for name in names]:
        if name not in guide_trace.nodes:
            raise ValueError(f"the guide does not propose the model's latent {name!r}")
        if not guide_trace.nodes[name]["fn"].has_rsample:
            raise NotImplementedError(
                f"latent {name!r} is not reparameterised; pyro.infer.Trace_ELBO takes such guides"
            )
    steps = sorted(set(latents) | set(observed))
    size = max(
        (site["log_prob"].shape[-1] for site in _sites(model_trace) if site["log_prob"].ndim),
        default=1,
    )
    shape = torch.Size((particles, size))
    example = next(site["log_prob"] for site in _sites(model_trace))

    def log_prob(trace: poutine.Trace, groups: dict[int, list[str]]) -> Tensor:
        columns = []
        for t in steps:
            total = example.new_zeros(shape)
            for name in groups.get(t, []):
                term = trace.nodes[name]["log_prob"]
                if term.ndim > 2 or (size > 1 and (term.ndim == 0 or term.shape[-1] != size)):
                    raise NotImplementedError(
                        f"site {name!r} has log-density of shape {tuple(term.shape)}; step "
                        f"densities need one plate over the {size} sequences at dimension -1"
                    )
                total = total + term
            columns.append(total)
        return torch.stack(columns)

    def values(groups: dict[int, list[str]]) -> Tensor:
        columns = []
        for t in steps:
            flat = [
                model_trace.nodes[name]["value"]
                .expand(*shape, *model_trace.nodes[name]["fn"].event_shape)
                .reshape(*shape, -1)
                for name in groups.get(t, [])
            ]
            columns.append(torch.cat(flat, dim=-1) if flat else example.new_zeros(*shape, 0))
        widest = max(column.shape[-1] for column in columns)
        return torch.stack(
            [torch.nn.functional.pad(c, (0, widest - c.shape[-1])) for c in columns]
        )

    masks = []
    for t in steps:
        site = model_trace.nodes[(observed.get(t) or latents[t])[0]]
        mask = site.get("mask")
        whole = torch.ones(1, size, dtype=torch.bool, device=example.device)
        masks.append(whole if mask is None else whole & torch.as_tensor(mask))
    return StepDensities(
        z=values(latents),
        h=None,
        x=values(observed),
        mask=torch.stack(masks),
        log_prior=log_prob(model_trace, latents),
        log_emission=log_prob(model_trace, observed),
        log_proposal=log_prob(guide_trace, latents),
        prior=_stack_normals(model_trace, latents, steps, shape),
        emission=_stack_normals(model_trace, observed, steps, shape),
        proposal=_stack_normals(guide_trace, latents, steps, shape),
    )


def _sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    ]


def _stack_normals(
    trace: poutine.Trace, groups: dict[int, list[str]], steps: list[int], shape: torch.Size
) -> Distribution | None:
    """One normal of batch shape (T, K, B) where every site is a diagonal normal, else None."""
    columns = []
    for t in steps:
        pieces = []
        for name in groups.get(t, []):
            fn = trace.nodes[name]["fn"]
            event = fn.event_shape
            while isinstance(fn, Independent):
                fn = fn.base_dist
            if not isinstance(fn, Normal):
                return None
            pieces.append(
                [p.expand(*shape, *event).reshape(*shape, -1) for p in (fn.loc, fn.scale)]
            )
        if not pieces:
            return None
        columns.append([torch.cat(parts, dim=-1) for parts in zip(*pieces, strict=True)])
    if len({loc.shape for loc, _ in columns}) != 1:
        return None
    loc, scale = (torch.stack(parts) for parts in zip(*columns, strict=True))
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
