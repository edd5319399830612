"""One training of a comparison: build its parts, train, evaluate, write its folder."""

import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI

from inference import (
    ELBO,
    DegenerateWeightsError,
    LearningRate,
    NonFiniteLossError,
    dead_units,
    evaluate,
    particle_filter,
    refine,
    rise,
    scales_at_floor,
    seeded,
    still_rising,
)
from inference.checkpoints import Checkpointing
from inference.information import LEAST_SEQUENCES
from inference.training import History, Records, fit
from inference.validation import Validation
from pyro_avrnn import recipes
from pyro_avrnn.cli.parts import Parts, build, optimiser, refined
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training
from pyro_avrnn.data import Batches, Dataset, Sequences
from pyro_avrnn.implicit import ImplicitGuide, MomentGuide

_LOOKED_AT = 64  # sequences in which a hidden unit may show that it is alive
Progress = Callable[[int], None]  #: called with the steps done since the last call
Result = dict[str, Any]  #: an entry of results.json


class Task(NamedTuple):
    """One training with one seed, and the folder for its files."""

    training: Training
    seed: int
    folder: Path


def run(
    task: Task, data: Dataset, settings: Settings, progress: Progress, resume: bool = False
) -> Result:
    """Train and evaluate once, with a parameter store of its own.

    Args:
        task: what to train. The seed is that of initial weights, batches and draws; the folder
            gets ``parameters.pt`` (the best by the validation bound) and ``metrics.csv``.
        data: all three splits; training, validation and the split to report are used.
        settings: shared by all trainings.
        progress: called with the number of steps done since the last call.
        resume: go on with a training that was interrupted in this folder.

    Returns:
        An entry of results.json; once it is written, the caller may delete the checkpoint.
        ``error`` is one sentence about why training stopped early, if it did.
    """
    training, seed, folder = task
    settings = training.settings(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with pyro.get_param_store().scope(), seeded(seed):
        parts = build(training, data, settings)
        trained, error = _train(parts, task, data, settings, progress, resume)
        if training.schedule == "refined" and not error:
            parts = parts._replace(recipe=refined(training, parts.recipe))
            trained |= _refine(parts.recipe, task, data)
        if training.schedule == "avb" and not error:
            recipe, told = _refit(parts, task, data, settings)
            parts = parts._replace(recipe=recipe, adversarial=None)
            trained |= told
        twist = _twist(training, parts.recipe)
        numbers, failure = _evaluate(parts, data, settings, seed, twist)
        if not (error or failure):
            trained |= _look(parts.recipe, getattr(data, settings.split), settings)
    modules = (parts.recipe.model, parts.recipe.guide)
    return {
        "row": training.label,
        **{name: getattr(training, name) for name in ("model", "objective", "view", "schedule")},
        "seed": seed,
        "data": data.name,
        "split": settings.split,
        "commit": commit(),
        **numbers,
        **trained,
        "error": error or failure,
        "parameters": sum(p.numel() for module in modules for p in module.parameters()),
        "settings": asdict(settings),
        "options": {k: v for k, v in asdict(training).items() if k not in ("label", "summary")},
    }


def row_folder(out: Path, label: str, seed: int) -> Path:
    """Folder of the parameters and metrics of one training."""
    safe = "".join(c if c.isalnum() or c in "+-_=." else "_" for c in label)
    return out / "rows" / f"{safe}-seed{seed}"


def commit() -> str | None:
    """Commit of the code that runs, with "-dirty" if the code was changed since; None if unknown.

    Changed results in the same checkout do not count, nor does a repository of the user's in
    which this package is installed.
    """
    try:
        _git("ls-files", "--error-unmatch", "pyro_avrnn/cli/runs.py")
        head = _git("rev-parse", "--short=12", "HEAD")
        untouched = ("--porcelain", "--untracked-files=no", "--", "pyro_avrnn", "inference")
        return head + ("-dirty" if _git("status", *untouched) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*command: str) -> str:
    here = Path(__file__).parents[2]
    done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _train(
    parts: Parts, task: Task, data: Dataset, settings: Settings, progress: Progress, resume: bool
) -> tuple[dict[str, Any], str | None]:
    """Train and save the best parameters; what came of it, and the error if it stopped early."""
    _, seed, folder = task
    recipe, checkpoint = parts.recipe, folder / "checkpoint.pt"
    twist = _twist(task.training, recipe)
    if not (resume and checkpoint.is_file()):  # else the best so far are saved there already
        recipes.save(recipe, folder / "parameters.pt")
    try:
        history = fit(
            SVI(recipe.model, recipe.guide, parts.optimiser, parts.objective),
            _batches(data, settings, seed),
            steps=settings.steps,
            truncate=settings.truncate,
            hooks=parts.hooks,
            validation=_validation(recipe, data.valid, settings, seed, twist),
            clip_norm=parts.clip_norm,
            lr_schedule=LearningRate(settings.lr_decay, settings.lr_warmup),
            average=settings.average or None,
            keep=[] if recipe.critic is None else [recipe.critic],
            seed=seed,
            checkpoint=Checkpointing(checkpoint, settings.validate_every, resume),
            records=Records(folder / "metrics.csv", every=max(settings.steps // 50, 1)),
            progress=progress,
        )
    except NonFiniteLossError as error:
        return {}, str(error)
    finally:
        recipes.save(recipe, folder / "parameters.pt")
    return {
        "best_step": history.best_step,
        f"validation_{settings.validate_by}_per_frame": history.best_bound,
        "steps": history.steps,
        "seconds": round(history.seconds, 1),
        **_learning(history, settings),
    }, None


def _refine(recipe: recipes.Recipe, task: Task, data: Dataset) -> dict[str, Any]:
    """Teach the critic in the prior, and save it; what it says of itself."""
    train, valid = ((part.x, part.mask) for part in (data.train, data.valid))
    steps = task.training.refine_steps
    told = refine(recipe.model, recipe.guide, train, valid, steps=steps, seed=task.seed)
    recipes.save(recipe, task.folder / "parameters.pt")
    return {f"refinement_{name}": value for name, value in told._asdict().items()}


def _refit(
    parts: Parts, task: Task, data: Dataset, settings: Settings
) -> tuple[recipes.Recipe, dict[str, Any]]:
    """Fit a guide with a density to the trained model, which stays as it is, and save both."""
    training, seed, folder = task
    (folder / "parameters.pt").replace(folder / "implicit.pt")
    explicit = "smoothing" if str(training.guide).startswith("smoothing") else "filtering"
    recipe = recipes.with_guide(parts.recipe, explicit)
    recipe.model.requires_grad_(False)
    with pyro.get_param_store().scope():
        history = fit(
            SVI(recipe.model, recipe.guide, optimiser(settings), ELBO()),
            _batches(data, settings, seed),
            steps=settings.steps,
            validation=_validation(recipe, data.valid, settings, seed, None),
            clip_norm=parts.clip_norm,
            lr_schedule=LearningRate(settings.lr_decay, settings.lr_warmup),
            seed=seed,
            progress=False,
        )
    recipes.save(recipe, folder / "parameters.pt")
    return recipe, {"refit_best_step": history.best_step, "refit_seconds": history.seconds}


def _batches(data: Dataset, settings: Settings, seed: int) -> Batches:
    return Batches(
        data.train,
        settings.batch_size,
        seed,
        bucket=settings.batches.startswith("sorted"),
        window=settings.window,
        even=not settings.batches.endswith("rest"),
        augment=data.augment,
    )


def _learning(history: History, settings: Settings) -> dict[str, Any]:
    """Whether the training came to its end, and what held it back."""
    rows = history.rows
    norms = dict.fromkeys(n for row in rows for n in row if n.startswith("gradient_norm_"))
    return {
        "rise": rise(rows),
        "still_rising": history.steps == settings.steps and still_rising(rows),
        "clipped_share": fmean(row["clipped_share"] for row in rows),
        "skipped": int(rows[-1].get("skipped", 0)),
        "gradient_norms": {
            name.removeprefix("gradient_norm_"): median(row[name] for row in rows if name in row)
            for name in ("gradient_norm", *norms)
        },
    }


def _look(recipe: recipes.Recipe, scored: Sequences, settings: Settings) -> dict[str, Any]:
    """Hidden units that are dead, and scales at their floor."""
    some = scored.select(range(min(len(scored), _LOOKED_AT)))
    pair = (recipe.model, recipe.guide, some.x, some.mask)
    floor = scales_at_floor(*pair, floor=settings.min_scale)
    return {"dead_units": dead_units(*pair), "scales_at_floor": floor}


def _twist(training: Training, recipe: recipes.Recipe) -> Any:
    """The twist of the filters that score a row, if it has one."""
    return recipe.critic if training.twist else None


def _validation(
    recipe: recipes.Recipe, data: Sequences, settings: Settings, seed: int, twist: Any
) -> Validation:
    """Validation with 16 particles, by the IWAE of ``fit`` or by a particle filter."""
    scoring: Any = recipe.guide
    if isinstance(scoring, ImplicitGuide):
        scoring = MomentGuide(recipe.model, scoring)
    iwae = settings.validate_by == "iwae"  # a filter that never resamples

    @torch.no_grad()
    def bound_per_frame() -> float:
        batch = (recipe.model, scoring, data.x, data.mask)
        options: dict[str, Any] = {"twist": twist, "criterion": "never" if iwae else "ess"}
        with seeded(seed):
            filtered = particle_filter(*batch, num_particles=16, paths=False, **options)
        return float(filtered.log_evidence.sum()) / data.num_frames

    return Validation(
        (data.x, data.mask) if iwae and scoring is recipe.guide else bound_per_frame,
        every=settings.validate_every,
        num_particles=16 if recipe.model.z_dim else 1,  # without z one is exact
        patience=settings.patience,
    )


def _evaluate(
    parts: Parts, data: Dataset, settings: Settings, seed: int, twist: Any
) -> tuple[dict[str, Any], str | None]:
    """Score the reported split; the numbers, and the error if there are none."""
    model, guide = parts.recipe.model, parts.recipe.guide
    scored: Sequences = getattr(data, settings.split)
    particles = settings.num_particles if model.z_dim else 1  # without z one is exact
    critic = parts.adversarial  # a critic of pairs says nothing of a frame
    critic = None if critic is not None and critic.role.of_sequences else critic
    split = model.z_dim and len(data.train) >= LEAST_SEQUENCES  # of the rate, by a classifier
    try:
        numbers: dict[str, Any] = evaluate(
            model,
            guide,
            scored.x,
            scored.mask,
            num_particles=particles,
            fivo_particles=particles,
            twist=twist,
            seed=seed,
            adversarial=critic,
            train=(data.train.x, data.train.mask) if split else None,
        ).as_dict()
    except DegenerateWeightsError as error:
        absent = ("elbo", "iwae", "fivo", "reconstruction", "kl")
        numbers = dict.fromkeys(f"{name}_per_frame" for name in absent)
        numbers |= {"num_particles": particles, "frames": scored.num_frames}
        return numbers | {"sequences": len(scored)}, f"evaluation stopped: {error}"
    if data.in_levels:  # by the best bound
        best = max(numbers[f"{name}_per_frame"] for name in ("elbo", "iwae", "fivo"))
        numbers["bits_per_sample"] = -best / (data.x_dim * math.log(2.0))
    return numbers, None
