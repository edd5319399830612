"""One SVI step, with a look at loss and gradient between the backward pass and the update."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroLRScheduler
from torch import Tensor

from inference.clipping import Clipper
from inference.protocols import said
from inference.weights import DegenerateWeightsError


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient stopped being finite; the parameters before that are kept."""


def svi_step(
    svi: SVI,
    batch: tuple[Any, ...],
    step: int,
    clipper: Clipper,
    lr_factor: float | None,
    *,
    by_part: bool = False,
    **given: Any,
) -> dict[str, float]:
    """Take one step as ``SVI.step`` does, unless loss or gradient are not finite.

    Args:
        svi: model, guide, optimiser and loss.
        batch: what model and guide are called with.
        step: its number, for the error.
        clipper: bounds the norm of the gradient of the loss a frame, and remembers what it cut.
        lr_factor: on the optimiser's learning rate.
        by_part: return the norms of the gradients of guide, prior and other parts, too.
        given: what else the loss takes.

    Returns:
        Loss, its terms and the norm of its gradient, all a frame, and the share of the last steps
        whose gradient was cut; of a step that was not taken no norm; steps not taken so far.

    Raises:
        NonFiniteLossError: nothing was updated.
    """
    frames = observed_frames(batch)
    if not frames:
        raise ValueError(
            f"every batch must have an observed frame; that of step {step} has none, leave it out"
        )
    loss, captured = _loss_and_gradients(svi, batch, step, given)
    parameters = list(dict.fromkeys(captured.values()))
    terms = {name: float(value) for name, value in getattr(svi.loss, "terms", {}).items()}
    row = {"loss": torch_item(loss) / frames, **terms}
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _norm(gradients, frames)
    if _finite(row) and clipper.skips(norm):
        zero_grads(parameters)
        return row | {"clipped_share": clipper.share, "skipped": float(clipper.skipped)}
    _require_finite(row, norm, step, parameters)
    row |= _norms_by_part(captured, frames) if by_part else {}
    clipper.clip_in_place(norm, gradients)
    if lr_factor is not None:
        _scale_lr(svi, parameters, lr_factor)
    svi.optim(parameters)
    if isinstance(svi.optim, PyroLRScheduler):
        svi.optim.step()
    zero_grads(parameters)
    row |= {"gradient_norm": norm, "clipped_share": clipper.share}
    return row | ({"skipped": float(clipper.skipped)} if clipper.skipped else {})


def _loss_and_gradients(
    svi: SVI, batch: tuple[Any, ...], step: int, given: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """The loss, and parameters by name, whose gradients are there."""
    try:
        with poutine.trace(param_only=True) as capture:
            loss = svi.loss_and_grads(svi.model, svi.guide, *batch, **given)
    except DegenerateWeightsError as error:
        zero_grads(_captured(capture).values())
        raise NonFiniteLossError(
            f"training stopped at step {step}: {error}; the best parameters before it are kept. "
            "Where it had gone well till then, try a smaller learning rate or gradient clipping "
            "(clip_norm)"
        ) from error
    return loss, _captured(capture)


def observed_frames(batch: tuple[Any, ...]) -> float:
    """Observed frames of a batch ``(x, mask)``, or B * T of x alone."""
    if not batch or not isinstance(batch[0], Tensor) or batch[0].ndim < 2:
        raise TypeError(
            "a batch must be a tuple whose first is x (B, T, X), got "
            f"{said(batch[0]) if batch else 'an empty one'}"
        )
    if len(batch) > 1 and isinstance(batch[1], Tensor) and batch[1].dtype == torch.bool:
        return float(batch[1].sum())
    return float(math.prod(batch[0].shape[:2]))


def _finite(row: dict[str, float]) -> bool:
    return all(map(math.isfinite, row.values()))


def _require_finite(
    row: dict[str, float], norm: float, step: int, parameters: list[Tensor]
) -> None:
    terms = {name: value for name, value in row.items() if name != "loss"}  # say more than it
    for name, value in (*terms.items(), ("loss", row["loss"]), ("the gradient", norm)):
        if not math.isfinite(value):
            zero_grads(parameters)
            raise NonFiniteLossError(
                f"training stopped at step {step}: {name} is {value}; the best parameters before "
                "it are kept. Try a smaller learning rate, gradient clipping (clip_norm), or a "
                "larger floor under the scales (min_scale)"
            )


def _captured(capture: Any) -> dict[str, Tensor]:
    # in the order of the sites: a set's order, hence a norm's last bit, would differ by run
    return {name: s["value"].unconstrained() for name, s in capture.trace.nodes.items()}


def _norms_by_part(parameters: dict[str, Tensor], frames: float) -> dict[str, float]:
    """Norms of the gradients a frame of the guide and of each part of the model."""
    parts: dict[str, list[Tensor]] = {}
    for name, p in parameters.items():
        program, _, path = name.partition("$$$")  # as pyro.module names them
        part = program if program == "guide" or not path else path.split(".")[0]
        if p.grad is not None:
            parts.setdefault(f"gradient_norm_{part}", []).append(p.grad)
    return {part: _norm(gradients, frames) for part, gradients in parts.items()}


def _norm(gradients: list[Tensor], frames: float) -> float:
    return torch.nn.utils.get_total_norm(gradients).item() / frames


def _scale_lr(svi: SVI, parameters: Iterable[Tensor], factor: float) -> None:
    new = {p: p.grad for p in parameters if p not in svi.optim.optim_objs}
    for p in new:
        p.grad = None
    svi.optim(list(new))  # without gradients this makes the optimisers and moves nothing
    for p, gradient in new.items():
        p.grad = gradient
    for p in parameters:
        optim = svi.optim.optim_objs.get(p)
        for group in getattr(optim, "param_groups", ()):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
