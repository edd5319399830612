"""A look at a training from outside: did it come to its end, and what held it back?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inference.modes import evaluating
from inference.protocols import of_kind
from inference.random import seeded
from inference.traces import step_densities

Row = Mapping[str, Any]  #: of metrics, as ``fit`` keeps and writes them
#: least and largest output of the units of a layer, by part, path and width
_Ranges = dict[tuple[str, str, int], tuple[Tensor, Tensor]]


def rise(rows: Sequence[Row]) -> float:
    """How much the best validation bound gained in the last fifth of the steps, nats a frame.

    A training that was ended by its number of steps while this is large is not at its end.

    Args:
        rows: of metrics, with a "validation_bound" here and there.

    Returns:
        At least 0; NaN where no step before the last fifth was validated.

    Example:
        >>> bounds = ((40, 1.0), (80, 2.0), (100, 2.5))
        >>> rise([{"step": step, "validation_bound": bound} for step, bound in bounds])
        0.5
    """
    bounds = _bounds(rows)
    last = max((step for step, _ in bounds), default=0)
    before = [bound for step, bound in bounds if step <= 0.8 * last]
    if not before:
        return math.nan
    return max(max(bound for _, bound in bounds) - max(before), 0.0)


def still_rising(rows: Sequence[Row], share: float = 0.01) -> bool:
    """Whether the last fifth of the steps brought more than a hundredth of all that was gained."""
    bounds = [bound for _, bound in _bounds(rows)]
    gained = rise(rows)
    return not gained <= share * (max(bounds, default=0.0) - min(bounds, default=0.0))


def _bounds(rows: Sequence[Row]) -> list[tuple[float, float]]:
    found = [(r["step"], r["validation_bound"]) for r in rows if "validation_bound" in r]
    return [(step, bound) for step, bound in found if math.isfinite(bound)]


def dead_units(
    model: Any, guide: Any, x: Tensor, mask: Tensor | None = None, *, seed: int | None = 0
) -> dict[str, tuple[int, int]]:
    """Hidden units whose output is the same on all frames: they compute nothing, and learn little.

    ReLUs die so, by steps that were too large; a unit of a smooth activation hardly can.

    Args:
        model, guide: a pair; their activations are modules of ``torch.nn``. A program that is
            not a module itself shows none.
        x: ``(B, T, X)``, enough frames for a unit to show itself.
        mask: ``(B, T)``, True = observed; None for all. Padding counts as a frame.
        seed: of the draws of z.

    Returns:
        Dead units and all units by part: "guide", and the model's own, such as "prior".
    """
    of_kind(Tensor, "a tensor (B, T, X)", x=x)
    ranges: _Ranges = {}
    with torch.no_grad(), evaluating(model, guide), seeded(seed), _watching(model, guide, ranges):
        step_densities(model, guide, x, mask)
    counts: dict[str, tuple[int, int]] = {}
    for (part, *_), (low, high) in ranges.items():
        dead, units = counts.get(part, (0, 0))
        counts[part] = dead + int((low == high).sum()), units + low.numel()
    return counts


def scales_at_floor(
    model: Any,
    guide: Any,
    x: Tensor,
    mask: Tensor | None = None,
    *,
    floor: float,
    seed: int | None = 0,
) -> float | None:
    """Share of the emission's scales, over frames and features, within a tenth of their floor.

    A density without a bound grows as its scale falls: where many scales are at the floor, a
    log-density measures the floor.

    Args:
        model, guide: a pair.
        x, mask: ``(B, T, X)`` and ``(B, T)``, True = observed; None for all.
        floor: the floor, in units of x.
        seed: of the draws of z.

    Returns:
        From 0 to 1; None for an emission that is neither normal nor a mixture of normals.
    """
    with torch.no_grad(), evaluating(model, guide), seeded(seed):
        d = step_densities(model, guide, x, mask)
    scale = getattr(_normal(d.emission), "scale", None)
    if scale is None:
        return None
    near = (scale <= 1.1 * floor).double().flatten(3).mean(dim=-1)  # (T, K, B)
    return float(near[d.mask.expand(near.shape)].mean())


def _normal(emission: Any) -> Any:
    """The normal inside an emission, or the emission."""
    emission = getattr(emission, "component_distribution", emission)
    return getattr(emission, "base_dist", emission)


@contextmanager
def _watching(model: Any, guide: Any, ranges: _Ranges) -> Iterator[None]:
    """Note the least and largest output of every hidden unit."""

    def watch(part: str, path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            key = part, path, out.shape[-1]  # one module may serve layers of several widths
            low, high = out.reshape(-1, out.shape[-1]).aminmax(dim=0)
            if key in ranges:
                low, high = low.minimum(ranges[key][0]), high.maximum(ranges[key][1])
            ranges[key] = low, high

        return hook

    with ExitStack() as stack:
        for root, name in ((model, "model"), (guide, "guide")):
            for path, module in root.named_modules() if isinstance(root, nn.Module) else ():
                if type(module).__module__ == "torch.nn.modules.activation":
                    part = path.split(".")[0] if name == "model" else name
                    handle = module.register_forward_hook(watch(part, f"{name}.{path}"))
                    stack.callback(handle.remove)
        yield
