"""``fit``, the one training loop: SVI steps, hooks between them, and what a long run needs."""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroLRScheduler
from torch import Tensor
from tqdm.auto import tqdm

from inference.checkpoints import Checkpoint, Cycle, Windows
from inference.files import save_parameters, write_csv
from inference.modes import evaluating, learning
from inference.objectives import Objective, iwae
from inference.protocols import HasRollout, Hook, Stepwise
from inference.random import seeded
from inference.schedules import Clock, Schedule
from inference.traces import step_densities
from inference.weights import DegenerateWeightsError

Batch = tuple[Tensor, ...]


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient stopped being finite; the parameters before that are kept."""


@dataclass
class History:
    """What a run left: metrics by step, and where it was best.

    ``best_step`` is 0 and ``best_bound`` -inf where nothing was validated.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_bound: float = -math.inf
    steps: int = 0
    seconds: float = 0.0
    stopped: str = "all steps done"


def fit(
    svi: SVI,
    batches: Iterable[Batch],
    *,
    steps: int,
    truncate: int | None = None,
    hooks: Sequence[Hook] = (),
    validation: Batch | Callable[[], float] | None = None,
    validate_every: int = 50,
    num_particles: int = 16,
    patience: int | None = None,
    clip_norm: float | None = None,
    lr_schedule: Schedule | None = None,
    keep: Sequence[torch.nn.Module] = (),
    seed: int | None = None,
    log_every: int = 10,
    metrics: str | os.PathLike[str] | None = None,
    save_to: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    progress: bool | Callable[[int], None] = True,
    description: str = "fit",
) -> History:
    """Train by SVI steps with hooks between them; ends with the best parameters in place.

    With ``truncate=100`` each batch is cut into windows of 100 steps, and each window is one SVI
    step (truncated back-propagation through time). The state after a window is carried into the
    next one of the batch as a constant: the gradient ends there, the memory does not; a new batch
    starts from the model's own initial state. Then

    - the draws of an ``ELBO`` go on; particles of ``IWAE`` and ``FIVO``, whose weights no window
      hands on, are resampled by them at its end. At fixed parameters the windows' ELBOs add up
      to that of the whole, and their weighted bounds to that of a particle filter that resamples
      at all window ends: still below log p(x) in expectation;
    - what reads more than a step reads its window: a guide with an encoder, a critic of paths;
    - a latent that all steps share is drawn and counted in the first window, from what that
      window shows, and goes on as a constant;
    - validation is not cut.

    Args:
        svi: model, guide, optimiser and loss. Weight decay is the optimiser's, for instance
            ``pyro.optim.AdamW``; a ``PyroLRScheduler`` is stepped once an SVI step.
        batches: tuples the model is called with, ``(x, mask)``; iterated again when exhausted.
        steps: SVI steps; schedules of the loss are fractions of it.
        truncate: steps of a window, or None for whole sequences. Needs an objective of this
            package, and a model with a rollout from a given state.
        hooks: called after every SVI step with (model, guide, *batch); with the window where
            batches are cut, and with ``start=``, the state before it, where it begins none.
        validation: a batch scored by IWAE with ``num_particles``, nats a frame, always with the
            same random numbers; or a function that gives a bound, larger is better.
        validate_every: SVI steps between validations.
        num_particles: of the validation bound.
        patience: stop after that many validations without a better one.
        clip_norm: bound on the norm of the gradient of the loss a frame (the loss divided by
            the number of observed frames), all parameters together.
        lr_schedule: factor on the optimiser's learning rate, by fraction of the run.
        keep: further modules, critics, that go back to the best step with the parameters.
        seed: of every draw in here; None uses torch's global state.
        log_every: SVI steps between rows of metrics.
        metrics: CSV file for the rows.
        save_to: file for the best parameters, written atomically at every improvement;
            :func:`~inference.files.load_parameters` reads it.
        checkpoint: file for the whole run, written atomically every ``checkpoint_every`` steps
            and when the run ends; what an interrupted run did since the last time is done again.
        checkpoint_every: SVI steps between writing it; ``validate_every`` if None.
        resume: go on from ``checkpoint`` where that file exists, and start anew where it does
            not. With the same arguments, on a CPU, the run then ends as if never interrupted,
            bit for bit; a finished one returns at once. What the checkpoint knows of hooks and
            loss is the ``state_dict`` of them or of the object whose method they are, and of
            torch's generators only; a plain function's modules with buffers belong in ``keep``.
        about: plain values stored beside the best parameters.
        progress: a bar (True), none (False), or a function called with the number of steps
            just done, at first with those done before resuming.
        description: of the bar.

    Returns:
        Metrics and the best step. Interrupting the run keeps files and best parameters too.

    Raises:
        ValueError: no batches, a number out of range, or a checkpoint that is damaged or of
            another run.
        TypeError: the state of a hook, loss or module to be written holds more than tensors and
            plain values; or a loss or model that cannot carry a state, with ``truncate``.
        NotImplementedError: with ``truncate``, a hook that takes no ``start``.
        NonFiniteLossError: naming step and term; the best parameters are in place.
    """
    for name, value in (
        ("steps", steps),
        ("truncate", truncate),
        ("validate_every", validate_every),
        ("log_every", log_every),
        ("patience", patience),
        ("checkpoint_every", checkpoint_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if clip_norm is not None and not clip_norm > 0.0:
        raise ValueError(f"clip_norm must be larger than 0, got {clip_norm}")
    if lr_schedule is not None and isinstance(svi.optim, PyroLRScheduler):
        raise ValueError(
            "lr_schedule and a PyroLRScheduler would both set the learning rate; give one of them"
        )
    if checkpoint is None and (resume or checkpoint_every is not None):
        raise ValueError("resume and checkpoint_every need checkpoint, the file to go on from")
    if truncate is not None:
        _require_carrying(svi, hooks)
    history, windows, stale = History(), Windows(Cycle(batches), truncate, svi.model), 0
    clock = getattr(svi.loss, "clock", None)
    if isinstance(clock, Clock) and clock.total is None:
        clock.total = steps
    score = _scorer(svi, validation, num_particles, seed)
    best = _Keeper(keep, save_to, about)
    saved, every = None, checkpoint_every or validate_every
    if checkpoint is not None:
        run = {"steps": steps, "seed": seed, "truncate": truncate}
        states: dict[str, Any] = {f"hooks[{i}]": hook for i, hook in enumerate(hooks)}
        states |= {f"keep[{i}]": module for i, module in enumerate(keep)}
        states["best"] = best
        saved = Checkpoint(checkpoint, svi, windows, history, run=run, states=states)
    bar = tqdm(total=steps, desc=description, leave=False, disable=progress is not True)
    advance = progress if callable(progress) else bar.update

    def enough() -> bool:
        return patience is not None and stale >= patience

    try:
        with seeded(seed), learning(svi.model, svi.guide):
            if saved is not None and resume and saved.path.exists():
                saved.read()
                stale = sum(
                    "validation_bound" in row and row["step"] > history.best_step
                    for row in history.rows
                )
                if not enough():  # it may have been, with less patience
                    history.stopped = History.stopped
                if history.best_step:
                    best.write()
                advance(history.steps)
            started = time.monotonic() - history.seconds
            while history.steps < steps and not enough():
                step, batch = history.steps + 1, next(windows)
                factor = None if lr_schedule is None else lr_schedule((step - 1) / steps)
                past: dict[str, Any] = {} if windows.start is None else {"start": windows.start}
                given = past | ({"carry": True} if windows.more else {})
                row = _svi_step(svi, batch, step, clip_norm, factor, **given)
                if hooks and not history.best_step:  # a hook may break what nobody has kept yet
                    best.take()
                for hook in hooks:
                    row |= hook(svi.model, svi.guide, *batch, **past)
                windows.start = svi.loss.after if windows.more else None
                history.steps = step
                _check_metrics(row, step)
                if score is not None and (step % validate_every == 0 or step == steps):
                    bound = row["validation_bound"] = score()
                    if bound > history.best_bound:
                        history.best_bound, history.best_step, stale = bound, step, 0
                        best.take()
                        best.write()
                    else:
                        stale += 1
                    bar.set_postfix(bound=f"{bound:.3f}", best=f"{history.best_bound:.3f}")
                if step % log_every == 0 or step in (1, steps) or "validation_bound" in row:
                    history.rows.append({"step": step, **row})
                if "validation_bound" in row and metrics is not None:
                    write_csv(metrics, history.rows)
                history.seconds = time.monotonic() - started
                if enough():
                    history.stopped = f"no better bound in {patience} validations"
                if saved is not None and (step % every == 0 or step == steps or enough()):
                    saved.write()
                advance(1)
    except KeyboardInterrupt:
        history.stopped = "interrupted"
        raise
    finally:
        bar.close()
        if not history.best_step and history.steps:  # the last parameters are all there is
            if best.all_finite():
                best.take()
            best.write()
        best.restore()
        if metrics is not None and history.rows:
            write_csv(metrics, history.rows)
    return history


def _require_carrying(svi: SVI, hooks: Sequence[Hook]) -> None:
    """That a state can be carried from window to window, and reaches all that need it."""
    if not isinstance(svi.loss, Objective):
        kind = getattr(svi.loss, "__self__", svi.loss)
        raise TypeError(
            "truncate needs a loss that carries the state from window to window, ELBO, IWAE or "
            f"FIVO of this package, got {getattr(kind, '__name__', type(kind).__name__)}; use one "
            "of these, or leave truncate out"
        )
    if not (isinstance(svi.model, HasRollout) and isinstance(svi.model, Stepwise)):
        kind = svi.model
        raise TypeError(
            "truncate needs a model with rollout(guide, x, mask, start=) and advance, which "
            f"{getattr(kind, '__name__', type(kind).__name__)} lacks; cut the series beforehand, "
            "or leave truncate out"
        )
    for i, hook in enumerate(hooks):
        try:
            inspect.signature(hook).bind_partial(start=None)
        except (TypeError, ValueError) as error:  # the latter where a signature is not known
            owner = getattr(hook, "__self__", hook)
            kind = getattr(owner, "__name__", type(owner).__name__)
            raise NotImplementedError(
                f"truncate needs hooks that take start=, the state before a window, but {kind} "
                f"(hooks[{i}]) would start every window from the initial state, and so train on "
                "other states than the objective's; use Adversarial.update, or leave truncate out"
            ) from error


def _svi_step(
    svi: SVI,
    batch: Batch,
    step: int,
    clip_norm: float | None,
    lr_factor: float | None,
    **given: Any,
) -> dict[str, float]:
    """``SVI.step`` with a look at loss and gradient between backward pass and update."""
    try:
        with poutine.trace(param_only=True) as capture:
            loss = svi.loss_and_grads(svi.model, svi.guide, *batch, **given)
    except DegenerateWeightsError as error:
        zero_grads(_captured(capture))
        raise NonFiniteLossError(
            f"training stopped at step {step}: {error}; the best parameters before it are kept. "
            "Where it had gone well till then, try a smaller learning rate or gradient clipping "
            "(clip_norm)"
        ) from error
    parameters = _captured(capture)
    frames = _frames(batch)
    terms = {name: float(value) for name, value in getattr(svi.loss, "terms", {}).items()}
    row = {"loss": torch_item(loss) / frames, **terms}
    norm = (
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        / frames
    )
    bad = [
        name for name, value in {**terms, "loss": row["loss"]}.items() if not math.isfinite(value)
    ]
    if bad or not math.isfinite(norm):
        zero_grads(parameters)
        raise NonFiniteLossError(
            f"training stopped at step {step}: {bad[0] if bad else 'the gradient'} is "
            f"{row[bad[0]] if bad else norm}; the best parameters before it "
            "are kept. Try a smaller learning rate, gradient clipping (clip_norm), or a larger "
            "floor under the scales (min_scale)"
        )
    if clip_norm is not None and norm > clip_norm:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(clip_norm / norm)
    if lr_factor is not None:
        _scale_lr(svi, parameters, lr_factor)
    svi.optim(parameters)
    if isinstance(svi.optim, PyroLRScheduler):
        svi.optim.step()
    zero_grads(parameters)
    row["gradient_norm"] = norm
    return row


def _captured(capture: Any) -> list[Tensor]:
    # in the order of the sites: a set's order, hence a norm's last bit, would differ by run
    sites = capture.trace.nodes.values()
    return list(dict.fromkeys(site["value"].unconstrained() for site in sites))


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


def _scorer(
    svi: SVI, validation: Batch | Callable[[], float] | None, particles: int, seed: int | None
) -> Callable[[], float] | None:
    if validation is None:
        return None

    @torch.no_grad()
    def importance_weighted(batch: Batch) -> float:
        with seeded(0 if seed is None else seed):
            densities = step_densities(svi.model, svi.guide, *batch, num_particles=particles)
        value = float(iwae(densities.log_weight).sum()) / _frames(batch)
        return value if math.isfinite(value) else -math.inf

    def score() -> float:
        with evaluating(svi.model, svi.guide):
            return validation() if callable(validation) else importance_weighted(validation)

    return score


def _frames(batch: Batch) -> float:
    """Observed frames of a batch ``(x, mask)``, or B * T of x alone."""
    if len(batch) > 1 and isinstance(batch[1], Tensor) and batch[1].dtype == torch.bool:
        return float(batch[1].sum())
    return float(math.prod(batch[0].shape[:2]))


def _check_metrics(row: dict[str, float], step: int) -> None:
    for name, value in row.items():
        if name != "validation_bound" and not math.isfinite(value):
            raise NonFiniteLossError(
                f"training stopped at step {step}: {name} is {value} after the hooks; the best "
                "parameters before it are kept. Try a smaller learning rate of the critic"
            )


class _Keeper:
    """The best parameters so far, of the store and of further modules; a file of the former."""

    def __init__(
        self,
        modules: Sequence[torch.nn.Module],
        save_to: str | os.PathLike[str] | None,
        about: dict[str, Any] | None,
    ) -> None:
        self.modules, self.save_to, self.about = modules, save_to, about
        self.parameters: dict[str, Tensor] = {}
        self.states: list[dict[str, Tensor]] = []

    def take(self) -> None:
        """Keep what is there now."""
        self.parameters = _copy(dict(pyro.get_param_store().named_parameters()))
        self.states = [_copy(module.state_dict()) for module in self.modules]

    def write(self) -> None:
        """Write what was kept to the file, if there is to be one."""
        if self.save_to is not None and self.parameters:
            save_parameters(self.save_to, self.parameters, self.about)

    @torch.no_grad()
    def restore(self) -> None:
        """Put what was kept back in place."""
        for name, p in pyro.get_param_store().named_parameters():
            if name in self.parameters:
                p.copy_(self.parameters[name])
        for module, state in zip(self.modules, self.states, strict=False):
            module.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, for a checkpoint."""
        return {"parameters": self.parameters, "modules": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what a checkpoint has."""
        self.parameters, self.states = state["parameters"], state["modules"]

    def all_finite(self) -> bool:
        """Whether the parameters there now are numbers."""
        stored = [p for _, p in pyro.get_param_store().named_parameters()]
        further = [p for module in self.modules for p in module.parameters()]
        return all(bool(p.isfinite().all()) for p in [*stored, *further])


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
