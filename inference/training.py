"""``fit``, the one training loop: SVI steps, hooks between them, and what a long run needs."""

import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from inference.adversarial import Adversarial
from inference.alternating import Alternating
from inference.averages import Average
from inference.batches import Cycle, Windows
from inference.checkpoints import Best, Checkpoint, Checkpointing
from inference.clipping import AdaptiveClip, Clipper
from inference.files import file_path, write_csv
from inference.modes import learning
from inference.objectives import Objective
from inference.protocols import (
    HasRollout,
    Hook,
    Stepwise,
    at_least,
    counts,
    given,
    of_kind,
    require_programs,
)
from inference.random import seeded
from inference.schedules import Clock, Schedule
from inference.updates import NonFiniteLossError, svi_step
from inference.validation import Batch, Validation


@dataclass(frozen=True)
class Records:
    """Rows of metrics that ``fit`` keeps, and the file it writes them to.

    Args:
        path: CSV file, written at every validation and at the end; None writes none.
        every: SVI steps between rows; the first, the last and validated steps have one, too.

    Raises:
        ValueError: ``every`` below 1.
    """

    path: str | os.PathLike[str] | None = None
    every: int = 10

    def __post_init__(self) -> None:
        counts(1, every=self.every)
        if self.path is not None:
            file_path(self.path)


@dataclass
class History:
    """Result of a run: metrics by step, the best step, and the state to go on from.

    ``best_step`` is 0 and ``best_bound`` -inf where nothing was validated; ``carried`` is the
    state ``(K, B, ...)`` before the next window, where ``fit`` cut a batch and stopped inside.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_bound: float = -math.inf
    steps: int = 0
    seconds: float = 0.0
    stopped: str = "all steps done"
    carried: Any = None


def fit(
    svi: SVI,
    batches: Iterable[Batch],
    *,
    steps: int,
    truncate: int | None = None,
    hooks: Sequence[Hook] = (),
    validation: Validation | Batch | None = None,
    clip_norm: float | AdaptiveClip | None = None,
    lr_schedule: Schedule | None = None,
    average: float | None = None,
    keep: Sequence[torch.nn.Module] = (),
    seed: int | None = None,
    checkpoint: Checkpointing | None = None,
    records: Records | None = None,
    progress: bool | str | Callable[[int], Any] = True,
) -> History:
    """Train by SVI steps with hooks between them; end with the best parameters in place.

    With ``truncate=100`` each batch is cut into windows of 100 steps, and each window is one SVI
    step (truncated back-propagation through time). The state after a window enters the next one
    of the batch as a constant: the gradient ends there, the memory does not. Draws of an ``ELBO``
    go on; particles of ``IWAE`` and ``FIVO`` are resampled at the end of a window, so that the
    windows' bounds add up to one that is still below log p(x) in expectation. A guide with an
    encoder and a critic of paths read their window alone. A latent that all steps share is drawn
    and counted in the first window. Validation is not cut.

    Args:
        svi: model, guide, optimiser and loss. Weight decay is the optimiser's, for instance
            ``pyro.optim.AdamW``; a ``PyroLRScheduler`` is stepped once an SVI step.
        batches: tuples the model is called with, ``(x, mask)``; iterated again when exhausted.
        steps: SVI steps; schedules of the loss are fractions of it.
        truncate: steps of a window, or None for whole sequences. Needs an objective of this
            package, and a model with a rollout from a given state.
        hooks: called after every SVI step with (model, guide, *batch); with the window where
            batches are cut, and there with ``start=``, the state before it, but for the first.
        validation: a held-out batch, or a :class:`Validation` with more to say.
        clip_norm: bound on the norm of the gradient of the loss a frame (the loss divided by
            the number of observed frames), all parameters together: a number, or
            :class:`AdaptiveClip`. A warning says when most steps are cut.
        lr_schedule: factor on the optimiser's learning rate, by fraction of the run, such as
            ``LearningRate("cosine", warmup=0.02)``.
        average: decay of a moving average of the parameters, such as 0.999: validation scores
            the average, and the run ends with it in place.
        keep: further modules, critics, that go back to the best step with the parameters.
        seed: of every draw in here; None uses torch's global state.
        checkpoint: keeps the whole run in a file, so that it can be resumed.
        records: of metrics; a row every 10 steps and no file by default.
        progress: a bar (True, or its title), none (False), or a function called with the number
            of steps just done, at first with those done before resuming.

    Returns:
        Metrics and the best step. Interrupting the run keeps files and best parameters too.

    Raises:
        ValueError: no batches, a number out of range, a file in a folder that does not exist, two
            owners of the learning rate, a critic that no hook trains, or a checkpoint that is
            damaged or of another run.
        TypeError: the state of a hook, loss or module to be written holds more than tensors and
            plain values; or a loss or model that cannot carry a state, with ``truncate``.
        NotImplementedError: with ``truncate``, a hook that takes no ``start``; or the scheduler
            ``ReduceLROnPlateau``.
        NonFiniteLossError: naming step and term; the best parameters are in place.
    """
    counts(1, steps=steps, **given(truncate=truncate))
    clipper = Clipper(clip_norm)
    _require_kinds(svi, hooks, keep, lr_schedule)
    _require_files(checkpoint, records)
    _require_one_schedule(svi, lr_schedule)
    _require_hooks(svi, hooks)
    if truncate is not None:
        _require_carrying(svi, hooks)
    clock = getattr(svi.loss, "clock", None)
    if isinstance(clock, Clock):
        clock.start(steps)
    if validation is not None and not isinstance(validation, Validation):
        validation = Validation(validation)
    run = _Run(
        svi=svi,
        windows=Windows(Cycle(batches), truncate, svi.model),
        steps=steps,
        hooks=hooks,
        validation=validation,
        clipper=clipper,
        lr_schedule=lr_schedule,
        average=Average(average),
        best=Best(keep, (svi.model, svi.guide)),
        seed=seed,
        checkpoint=checkpoint,
        records=records or Records(),
    )
    shown = progress is True or isinstance(progress, str)
    title = progress if isinstance(progress, str) else "fit"
    with tqdm(total=steps, desc=title, leave=False, disable=not shown) as bar:
        try:
            run.go(bar, progress if callable(progress) else bar.update)
        except KeyboardInterrupt:
            run.history.stopped = "interrupted"
            raise
        finally:
            run.finish()
    return run.history


@dataclass
class _Run:
    """One call of ``fit``: what its steps share, and how far it is."""

    svi: SVI
    windows: Windows
    steps: int
    hooks: Sequence[Hook]
    validation: Validation | None
    clipper: Clipper
    lr_schedule: Schedule | None
    average: Average
    best: Best
    seed: int | None
    checkpoint: Checkpointing | None
    records: Records
    history: History = field(default_factory=History)
    stale: int = 0  # validations since the best one

    @property
    def impatient(self) -> bool:
        """Whether there were more validations in vain than patience allows."""
        patience = None if self.validation is None else self.validation.patience
        return patience is not None and self.stale >= patience

    @property
    def done(self) -> bool:
        return self.history.steps >= self.steps or self.impatient

    def go(self, bar: tqdm, advance: Callable[[int], Any]) -> None:
        """Take all steps, after those of an interrupted run."""
        history, saved = self.history, self._checkpoint()
        with seeded(self.seed), learning(self.svi.model, self.svi.guide):
            if saved is not None and saved.resume and saved.path.exists():
                self.resume(saved)
                advance(history.steps)
            started = time.monotonic() - history.seconds
            while not self.done:
                row = self.step()
                history.seconds = time.monotonic() - started
                if saved is not None and (history.steps % saved.every == 0 or self.done):
                    saved.write()
                if "validation_bound" in row:
                    bound, best = row["validation_bound"], history.best_bound
                    bar.set_postfix(bound=f"{bound:.3f}", best=f"{best:.3f}")
                advance(1)

    def resume(self, saved: Checkpoint) -> None:
        """Go on from a file."""
        saved.read()
        history = self.history
        self.stale = sum(
            "validation_bound" in row and row["step"] > history.best_step for row in history.rows
        )
        if not self.impatient:  # it may have been, with less patience
            history.stopped = History.stopped

    def _checkpoint(self) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        run = {"steps": self.steps, "seed": self.seed, "truncate": self.windows.length}
        states: dict[str, Any] = {f"hooks[{i}]": hook for i, hook in enumerate(self.hooks)}
        states |= {f"keep[{i}]": module for i, module in enumerate(self.best.modules)}
        states |= {"best": self.best, "clipping": self.clipper, "average": self.average}
        return Checkpoint(
            self.checkpoint, self.svi, self.windows, self.history, run=run, states=states
        )

    def step(self) -> dict[str, float]:
        """One SVI step, hooks, and validation where it is due; returns its metrics."""
        svi, windows, step = self.svi, self.windows, self.history.steps + 1
        batch = next(windows)
        factor = None if self.lr_schedule is None else self.lr_schedule((step - 1) / self.steps)
        if factor is not None:
            at_least(0.0, **{"the factor of lr_schedule": factor})
        past: dict[str, Any] = {} if windows.start is None else {"start": windows.start}
        given = past | ({"carry": True} if windows.more else {})
        due = self.validation is not None and step % self.validation.every == 0
        recorded = due or step % self.records.every == 0 or step in (1, self.steps)
        row = svi_step(svi, batch, step, self.clipper, factor, by_part=recorded, **given)
        if self.hooks and not self.history.best_step:
            self.best.take()  # a hook may break what nobody has kept yet
        for hook in self.hooks:
            row |= _metrics(hook(svi.model, svi.guide, *batch, **past), row, hook)
        windows.start = svi.loss.after if windows.more else None
        self.history.steps = step
        _check_metrics(row, step)
        self.average.update()
        if self.validation and (due or step == self.steps):
            with self.average.in_place():
                row["validation_bound"] = self.validate(self.validation)
        if recorded:
            self.history.rows.append({"step": step, **row})
        if "validation_bound" in row:
            self.write_records()
        return row

    def validate(self, validation: Validation) -> float:
        """The bound now; the parameters are kept if it is the best so far."""
        bound = validation.score(self.svi, self.seed)
        if bound > self.history.best_bound:
            self.history.best_bound, self.history.best_step = bound, self.history.steps
            self.stale = 0
            self.best.take()
            if validation.on_best is not None:
                validation.on_best()
        else:
            self.stale += 1
        if self.impatient:
            self.history.stopped = f"no better bound in {validation.patience} validations"
        return bound

    def write_records(self) -> None:
        if self.records.path is not None and self.history.rows:
            write_csv(self.records.path, self.history.rows)

    def finish(self) -> None:
        """Put the best parameters in place, or keep the last where nothing was validated."""
        if not self.history.best_step and self.history.steps and self.best.all_finite():
            with self.average.in_place():
                self.best.take()
        self.best.restore()
        self.history.carried = self.windows.start
        self.write_records()


def _require_files(checkpoint: Any, records: Any) -> None:
    """Refuse files that cannot be written, or that would overwrite each other."""
    of_kind(Checkpointing, "a Checkpointing", **given(checkpoint=checkpoint))
    of_kind(Records, "Records", **given(records=records))
    files = [Path(f.path) for f in (checkpoint, records) if f and f.path is not None]
    for path in files:
        if not path.parent.is_dir():
            raise ValueError(f"{path} is in a folder that does not exist; make it first")
    if len({*files}) < len(files):
        raise ValueError(f"checkpoint and records must have files of their own, got {files[0]}")


def _require_kinds(svi: Any, hooks: Any, keep: Any, lr_schedule: Any) -> None:
    """Refuse what would fail at its first use, or after all the training."""
    of_kind(SVI, "a pyro.infer.SVI", svi=svi)
    require_programs(svi.model, svi.guide)
    of_kind(Callable, "a loss such as ELBO()", loss=svi.loss)
    of_kind(list | tuple, "a list of functions", hooks=hooks)
    for i, hook in enumerate(hooks):
        use = "; give its update" if isinstance(hook, Adversarial | Alternating) else ""
        of_kind(Callable, f"a function{use}", **{f"hooks[{i}]": hook})
    of_kind(list | tuple, "a list of modules", keep=keep)
    for i, module in enumerate(keep):
        of_kind(torch.nn.Module, "a torch module", **{f"keep[{i}]": module})
    of_kind(Callable, "a function of the fraction done", **given(lr_schedule=lr_schedule))


def _require_carrying(svi: SVI, hooks: Sequence[Hook]) -> None:
    """Refuse a loss, model or hook that a state cannot be carried through."""
    if not isinstance(svi.loss, Objective):
        raise TypeError(
            "truncate needs a loss that carries the state from window to window, ELBO, IWAE or "
            f"FIVO of this package, got {_named(getattr(svi.loss, '__self__', svi.loss))}; use "
            "one of these, or leave truncate out"
        )
    if not (isinstance(svi.model, HasRollout) and isinstance(svi.model, Stepwise)):
        raise TypeError(
            "truncate needs a model with rollout(guide, x, mask, start=) and advance, which "
            f"{_named(svi.model)} lacks; cut the series beforehand, or leave truncate out"
        )
    for i, hook in enumerate(hooks):
        try:
            inspect.signature(hook).bind_partial(start=None)
        except (TypeError, ValueError) as error:  # the latter where a signature is not known
            raise NotImplementedError(
                "truncate needs hooks that take start=, the state before a window, but "
                f"{_named(getattr(hook, '__self__', hook))} (hooks[{i}]) would start every window "
                "from the initial state, and so train on other states than the objective's; use "
                "Adversarial.update, or leave truncate out"
            ) from error


def _require_one_schedule(svi: SVI, lr_schedule: Schedule | None) -> None:
    """Refuse what would set the learning rate twice, or needs a loss at each of its steps."""
    scheduler = isinstance(svi.optim, PyroLRScheduler)
    kind = getattr(svi.optim, "pt_scheduler_constructor", None)
    if isinstance(kind, type) and issubclass(kind, ReduceLROnPlateau):
        raise NotImplementedError(
            "ReduceLROnPlateau asks for a loss at each of its steps, which fit does not give it; "
            "use lr_schedule=, or a scheduler of the number of steps such as ExponentialLR"
        )
    if lr_schedule is None:
        return
    if scheduler:
        raise ValueError(
            "lr_schedule and a PyroLRScheduler would both set the learning rate; give one of them"
        )
    arguments = getattr(svi.optim, "pt_optim_args", None)
    if isinstance(arguments, dict) and arguments.get("lrd", 1.0) != 1.0:
        raise ValueError(
            "lr_schedule and lrd= of the optimiser would both set the learning rate; give one of "
            "them"
        )


def _require_hooks(svi: SVI, hooks: Sequence[Hook]) -> None:
    """Refuse a critic that nothing trains, whose penalty would be that of random weights."""
    owners = [getattr(hook, "__self__", hook) for hook in hooks]
    trained = {id(owner) for owner in owners}  # or what such an object holds
    trained |= {id(part) for owner in owners for part in getattr(owner, "__dict__", {}).values()}
    for penalty in getattr(svi.loss, "penalties", ()):
        if callable(getattr(penalty, "update", None)) and id(penalty) not in trained:
            if all(getattr(hook, "__self__", None) is not None for hook in hooks):
                raise ValueError(
                    f"the penalty {penalty.name!r} has a critic that no hook trains; give "
                    "hooks=[penalty.update], where penalty is that object"
                )


def _named(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _metrics(found: Any, row: dict[str, float], hook: Hook) -> dict[str, float]:
    """What a hook gave, if it may be among the metrics."""
    of_kind(Mapping, "a dict of numbers", **{f"the result of the hook {_named(hook)}": found})
    for name, value in found.items():
        if name in row or name in ("step", "validation_bound"):
            raise ValueError(f"metric {name!r} is there already; have the hook name its own")
        at_least(-math.inf, **{f"metric {name!r}": value}) if value == value else None
    return dict(found)


def _check_metrics(row: dict[str, float], step: int) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"training stopped at step {step}: {name} is {value} after the hooks; the best "
                "parameters before it are kept. Try a smaller learning rate of the critic"
            )
