"""One training of a comparison: build the row's parts, train, evaluate, write its folder."""

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from inference import (
    ELBO,
    FIVO,
    IWAE,
    Adversarial,
    Alternating,
    DegenerateWeightsError,
    NonFiniteLossError,
    clip,
    evaluate,
    fit,
    gradient_penalty,
    particle_filter,
    seeded,
    spectral,
    wasserstein,
)
from inference.objectives import Objective
from pyro_avrnn import recipes
from pyro_avrnn.cli.rows import Row, schedule
from pyro_avrnn.data import Batches, Dataset, Sequences


@dataclass(frozen=True)
class Settings:
    """What all rows of a comparison share."""

    steps: int = 1500
    batch_size: int = 64
    z_dim: int = 8
    h_dim: int = 64
    min_scale: float = 1e-3
    lr: float = 2e-3
    weight_decay: float = 0.0
    lr_decay: bool = False  # linear to a tenth over the run
    clip_norm: float = 5.0
    validate_every: int = 50
    patience: int | None = None
    num_particles: int = 64
    validate_by: str = "iwae"  # or fivo, with 16 particles
    split: str = "test"
    truncate: int | None = None  # steps of a window of truncated back-propagation
    recompute: int | None = None  # the objective's segment
    compile: bool = False


BOUNDS: dict[str, type[Objective]] = {"elbo": ELBO, "iwae": IWAE, "fivo": FIVO}


@dataclass
class Trained:
    """A row's parts: what its SVI needs and the hooks between its steps."""

    recipe: recipes.Recipe
    objective: Objective
    hooks: list[Callable[..., dict[str, float]]]
    adversarial: Adversarial | None = None


def build(row: Row, data: Dataset, settings: Settings) -> Trained:
    """Parts of a row, parameters drawn from torch's global state.

    Raises:
        ValueError: parts that do not go together.
    """
    make, own = recipes.RECIPES[row.model], recipes.OWN[row.model]
    emission = row.emission or data.emission["emission"]
    if data.kind == "mu-law" and emission != "logistic":
        raise ValueError(
            f"mu-law levels are scored by emission=logistic, got {emission!r}, whose densities "
            "are no bits"
        )
    given: dict[str, Any] = {
        "x_dim": data.x_dim,
        "h_dim": row.h_dim or settings.h_dim,
        "emission": emission,
        "min_scale": settings.min_scale,
        "dropout": row.dropout,
    }
    if row.schedule != "none":
        given |= {"z_dim": row.z_dim or settings.z_dim, "prior_gradient": row.prior_gradient}
    if emission == data.emission["emission"]:
        given |= data.emission
    for part in ("guide", "prior", "cell"):
        chosen = getattr(row, part)
        if part in own:
            given[part] = chosen or own[part]
        elif chosen is not None:
            raise ValueError(f"{part} is no part of the model {row.model!r}, got {chosen!r}")
    if settings.truncate is not None and row.schedule == "alternating":
        raise NotImplementedError(
            f"row {row.label!r} cannot be truncated, as its adversarial step starts from the "
            "model's own initial state; leave it out, as --schedules elbo joint does, or use a "
            "joint row"
        )
    terms: dict[str, Any] = {
        "kl_weight": schedule(row.kl),
        "num_particles": row.particles,
        "segment": settings.recompute,
        "compile": settings.compile,
    }
    if row.view is None:
        return Trained(make(**given, activation=row.activation), BOUNDS[row.bound](**terms), [])
    normalised = row.constraint == "spectral"
    recipe = recipes.avrnn(
        **given,
        base=row.model,
        hidden_activation=row.activation,
        view=row.view,
        critic=row.critic,
        critic_dim=row.critic_dim,
        lipschitz=row.on if normalised else None,
        activation="groupsort" if normalised else "relu",
    )
    assert recipe.critic is not None
    constraint = {
        "spectral": spectral,
        "gradient_penalty": lambda: gradient_penalty(row.strength, on=row.on),
        "clip": lambda: clip(row.strength),
    }[row.constraint]()
    critic_parameters = recipe.critic.parameters()
    adversarial = Adversarial(
        recipe.critic,
        view=row.view,
        divergence=wasserstein(constraint),
        optim=(
            torch.optim.RMSprop(critic_parameters, lr=row.critic_lr)
            if row.constraint == "clip"
            else torch.optim.Adam(critic_parameters, lr=row.critic_lr, betas=(0.5, 0.9))
        ),
        critic_steps=row.critic_steps,
        weight=schedule(row.weight),
        standardise=row.standardise,
    )
    if row.schedule == "joint":
        objective = BOUNDS[row.bound](**terms, regularisers=[adversarial])
        return Trained(recipe, objective, [adversarial.update], adversarial)
    alternating = Alternating(
        adversarial,
        recipe.model.prior.parameters(),  # type: ignore[union-attr]
        recipe.guide.parameters(),
        lr=row.adversarial_lr,
        detach_state=row.detach_state,
    )
    objective = BOUNDS[row.bound](**terms)
    return Trained(recipe, objective, [alternating.update], adversarial)


def run(
    row: Row,
    seed: int,
    data: Dataset,
    settings: Settings,
    folder: Path,
    progress: Callable[[int], None],
    resume: bool = False,
) -> dict[str, Any]:
    """Train and evaluate one row with one seed inside a parameter store of its own.

    Args:
        row: what to train.
        seed: of initial weights, batches and draws.
        data: all three splits; training, validation and the split to report are used.
        settings: shared by all rows.
        folder: for ``parameters.pt`` (the best by the validation bound), ``metrics.csv``.
        progress: called with the number of steps done since the last call.
        resume: go on with a training that was interrupted in this folder.

    Returns:
        A row of results.json; ``error`` says in one sentence why training stopped early, if so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scored = getattr(data, settings.split)
    with pyro.get_param_store().scope(), seeded(seed):
        parts = build(row, data, settings)
        lr = settings.lr if row.lr is None else row.lr
        decay = settings.weight_decay if row.weight_decay is None else row.weight_decay
        optim = (
            pyro.optim.AdamW({"lr": lr, "weight_decay": decay})
            if decay
            else pyro.optim.Adam({"lr": lr})
        )
        model, guide = parts.recipe.model, parts.recipe.guide
        error, checkpoint = None, folder / "checkpoint.pt"
        if not (resume and checkpoint.is_file()):  # else the best so far lie there
            recipes.save(parts.recipe, folder / "parameters.pt")
        try:
            history = fit(
                SVI(model, guide, optim, parts.objective),
                Batches(data.train, settings.batch_size, seed=seed),
                steps=settings.steps,
                truncate=settings.truncate,
                hooks=parts.hooks,
                validation=_validation(model, guide, data.valid, settings, seed),
                validate_every=settings.validate_every,
                patience=settings.patience,
                clip_norm=settings.clip_norm,
                lr_schedule=(lambda at: 1.0 - 0.9 * at) if settings.lr_decay else None,
                keep=[] if parts.recipe.critic is None else [parts.recipe.critic],
                seed=seed,
                log_every=max(settings.steps // 50, 1),
                metrics=folder / "metrics.csv",
                checkpoint=checkpoint,
                resume=resume,
                progress=progress,
            )
            found = {
                "best_step": history.best_step,
                f"validation_{settings.validate_by}_per_frame": history.best_bound,
                "steps": history.steps,
                "seconds": round(history.seconds, 1),
            }
        except NonFiniteLossError as failure:
            error, found = str(failure), {}
        finally:
            recipes.save(parts.recipe, folder / "parameters.pt")
        particles = settings.num_particles if model.z_dim else 1  # without z one is exact
        try:
            numbers = evaluate(
                model,
                guide,
                scored.x,
                scored.mask,
                num_particles=particles,
                fivo_particles=particles,
                seed=seed,
                adversarial=parts.adversarial,
                train=(data.train.x, data.train.mask) if model.z_dim else None,
            ).as_dict()
        except DegenerateWeightsError as failure:
            error = error or f"evaluation stopped: {failure}"
            numbers = {
                **dict.fromkeys(("elbo_per_frame", "iwae_per_frame", "fivo_per_frame")),
                **dict.fromkeys(("reconstruction_per_frame", "kl_per_frame")),
                "num_particles": particles,
                "frames": scored.num_frames,
                "sequences": len(scored),
            }
    checkpoint.unlink(missing_ok=True)
    bounds: list[Any] = [numbers[f"{name}_per_frame"] for name in ("elbo", "iwae", "fivo")]
    if data.kind == "mu-law" and None not in bounds:  # of one sample, by the best bound
        found["bits_per_sample"] = -max(bounds) / (data.x_dim * math.log(2.0))
    return {
        "row": row.label,
        "model": row.model,
        "objective": row.objective,
        "view": row.view,
        "schedule": row.schedule,
        "seed": seed,
        "data": data.name,
        "split": settings.split,
        "commit": commit(),
        **numbers,
        **found,
        "error": error,
        "parameters": sum(p.numel() for p in [*model.parameters(), *guide.parameters()]),
        "settings": asdict(settings),
        "options": {k: v for k, v in asdict(row).items() if k not in ("label", "says")},
    }


def _validation(model: Any, guide: Any, data: Sequences, settings: Settings, seed: int) -> Any:
    """What ``fit`` scores: the batch, for IWAE-16, or a function that gives FIVO-16."""
    if settings.validate_by == "iwae":
        return data.x, data.mask

    @torch.no_grad()
    def score() -> float:
        with seeded(seed):
            filtered = particle_filter(
                model, guide, data.x, data.mask, num_particles=16, paths=False
            )
        return float(filtered.log_evidence.sum()) / data.num_frames

    return score


def row_folder(out: Path, label: str, seed: int) -> Path:
    """Where a training's parameters and metrics lie."""
    safe = "".join(c if c.isalnum() or c in "+-_=." else "_" for c in label)
    return out / "rows" / f"{safe}-seed{seed}"


def commit() -> str | None:
    """The commit this code was run from, "-dirty" if it was changed since; None if unknown.

    Code is what counts: results that lie in the same checkout may change.
    """
    here = Path(__file__).parents[2]
    code = ["pyro_avrnn", "inference"]
    try:
        head, changed = (
            subprocess.run(["git", *what], cwd=here, capture_output=True, text=True, check=True)
            for what in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", *code],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def write_json(path: Path, content: Any) -> None:
    """JSON with indentation; numbers that are not finite become null, as JSON has none."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
