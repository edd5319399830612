"""What a comparison leaves: one table, metrics of all rows, a posterior, pictures."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import Bootstrap, particle_filter, seeded, to_arviz
from inference.arviz_adapter import write_arviz
from inference.files import write_csv, write_text
from inference.modes import evaluating
from inference.resampling import Selection
from pyro_avrnn import plots, recipes
from pyro_avrnn.cli import learning
from pyro_avrnn.cli.runs import Result, row_folder
from pyro_avrnn.cli.tables import cell, markdown
from pyro_avrnn.data import Dataset
from pyro_avrnn.generation import generate

SHORT = 500  # steps below which a run is called short

_COLUMNS = {
    "FIVO-{K}": "fivo_per_frame",
    "IWAE-{K}": "iwae_per_frame",
    "ELBO": "elbo_per_frame",
    "reconstruction": "reconstruction_per_frame",
    "KL": "kl_per_frame",
    "information <=": "information_at_most",
    "mismatch >=": "aggregate_mismatch_at_least",
    "W2": "closed_form_w2_per_frame",
    "critic": "critic_distance_per_frame",
    "prior scale": "prior_scale",
    "active": "active_units",
    "bits": "bits_per_sample",
    "at floor": "scales_at_floor",
    "parameters": "parameters",
    "k-hat": "pareto_k_median",
    "best step": "best_step",
    "last fifth": "rise",
    "seconds": "seconds",
}
_RARE = ("bits_per_sample", "scales_at_floor", "rise")  # columns that some comparisons lack
_NOTHING = "A row that does not beat this has learnt nothing."
_HISTOGRAM = "One histogram of the levels of all samples"
#: by kind of data: what is scored, the baseline without time or structure, what beating it means
_KINDS = {
    "real": ("densities of standardised data", "Independent normals per dimension", _NOTHING),
    "binary": ("densities of 0/1 data", "Independent Bernoullis per dimension", _NOTHING),
    "pcm": ("masses of linear levels", _HISTOGRAM, _NOTHING),
    "mu-law": (
        "masses of mu-law levels",
        _HISTOGRAM,
        "It knows which levels samples of 16 bits can reach at all, few where they are quiet; a "
        "mixture of logistics cannot single those out, and may lie below.",
    ),
}
_NO_EVIDENCE = (
    "it shows the machinery and is no evidence that one row beats another. The full tables: "
    "`make baselines`, `make adversarial`."
)
_HOW_TO_READ = (
    "The KL of z splits into information (upper bound) and aggregate mismatch (lower bound), read "
    "on held-out sequences by estimates that add up to it and may fall below 0; W2 is the closed "
    "form, an upper bound of what a one-step critic estimates; prior scale is the average "
    "deviation of p(z_t | h_t), with which distances shrink; k-hat above 0.7: the bound's own "
    "estimate is unreliable for single sequences (weights constant: they have no tail). FIVO is a "
    "particle filter's bound."
)


def write(out: Path, results: list[Result], dataset: Dataset) -> None:
    """Print and write everything that is derived from the trainings in ``out``."""
    text = table(results)
    print(text)
    write_text(out / "table.md", text + "\n")
    write_text(out / "learning.md", learning.table(results) + "\n")
    metrics = _metrics(out, results)
    write_csv(out / "metrics.csv", metrics)
    written = [
        out / "results.json",
        out / "metrics.csv",
        out / "table.md",
        out / "learning.md",
        plots.learning_curves(metrics, out / "learning_curves.png"),
        plots.critic_curves(metrics, out / "critic_curves.png"),
        plots.rate_bars(results, out / "rate.png"),
    ]
    with_latents = [r for r in results if r["model"] != "rnn" and not r["error"]]
    best = max(with_latents, key=validation_bound, default=None)
    if best is not None and validation_bound(best) > -math.inf:
        written += illustrate(out, best, dataset)
    print("\nwritten: " + ", ".join(str(path) for path in written))


def illustrate(out: Path, best: Result, dataset: Dataset) -> list[Path]:
    """Write a posterior and pictures of one held-out sequence, by the model of ``best``.

    The sequence is the one of median length in the reported split, without its padding.
    """
    recipe = recipes.load(row_folder(out, best["row"], best["seed"]) / "parameters.pt")
    split = getattr(dataset, best["split"])
    index = int(split.lengths.argsort()[len(split) // 2])
    x = split.sequence(index)
    title = f"{best['row']}, seed {best['seed']}, {best['split']} sequence {split.names[index]}"
    with evaluating(recipe.model, recipe.guide):
        posterior = to_arviz(recipe.model, recipe.guide, x, frame_seconds=dataset.frame_seconds)
        posterior.attrs["row"] = title
        write_arviz(posterior, out / "posterior.nc")
        pictures = [
            _sequences(recipe, x, dataset, out / "sequences.png", title),
            plots.latent_posterior(posterior, out / "posterior.png", title=title),
        ]
        with seeded(0), torch.no_grad():
            health = particle_filter(recipe.model, recipe.guide, x.unsqueeze(0), num_particles=128)
    title = f"Do all 128 particles survive? {title}"
    pictures.append(plots.particle_health(health, out / "filter.png", title=title))
    return [out / "posterior.nc", *pictures]


def _sequences(
    recipe: recipes.Recipe, x: Tensor, dataset: Dataset, path: Path, title: str
) -> Path:
    """Picture of a sequence, its one-step predictions, and sequences the model generates."""
    with seeded(0):
        free = generate(recipe.model, 3, len(x))
    panels = {
        "observed": x.numpy(),
        "one-step prediction": one_step_prediction(recipe, x).numpy(),
        "freely generated": free.numpy(),
    }
    return plots.sequences(
        panels,
        path,
        kind=dataset.kind,
        sample_rate=dataset.sample_rate,
        frame_seconds=dataset.frame_seconds,
        title=title,
    )


@torch.no_grad()
def one_step_prediction(
    recipe: recipes.Recipe, x: Tensor, *, draws: int = 200, seed: int = 0
) -> Tensor:
    """Draws of x_t given the steps before t, ``(draws, T, X)``, for one sequence ``(T, X)``.

    A particle filter that resamples at every step summarises the past. It follows the guide's
    proposals, or the prior's where the guide reads the future; z_t is drawn from the prior.
    """
    guide: Any = Bootstrap(recipe.model) if recipe.guide.smoothing else recipe.guide
    given: dict[str, Any] = {"num_particles": draws, "select": Selection("systematic", "always")}
    with seeded(seed):
        d = recipe.model.rollout(guide, x.unsqueeze(0), **given)
        assert d.prior is not None
        drawn = recipe.model.emission(d.prior.sample(), d.states).sample()
    return drawn[:, :, 0].transpose(0, 1)


def _metrics(out: Path, results: list[Result]) -> list[dict[str, Any]]:
    """Metrics of all trainings, as one table."""
    rows: list[dict[str, Any]] = []
    for r in results:
        path = row_folder(out, r["row"], r["seed"]) / "metrics.csv"
        for line in csv.DictReader(path.read_text().splitlines() if path.is_file() else ()):
            numbers = {name: float(value) for name, value in line.items() if value}
            numbers["step"] = int(numbers["step"])
            rows.append({"row": r["row"], "seed": r["seed"], **numbers})
    return rows


def validated_by(result: Result) -> str:
    """Bound that chose the best parameters; in older files, which do not name it, it was IWAE."""
    return result["settings"].get("validate_by", "iwae")


def validation_bound(result: Result) -> float:
    """Validation bound of the best parameters, in nats per frame; -inf if none was finite."""
    bound = result[f"validation_{validated_by(result)}_per_frame"]
    return -math.inf if bound is None else bound


def table(results: Sequence[Result]) -> str:
    """Markdown: one line a row, mean and standard deviation over seeds, nats per frame."""
    head, *lines = _lines(results)
    return markdown(head, lines) + "\n\n" + "\n".join(f"* {note}" for note in _notes(results))


def _lines(results: Sequence[Result]) -> list[list[str]]:
    """The heading and one line a row."""
    rare = {v for v in _RARE if all(r.get(v) is None for r in results)}
    columns = {k: v for k, v in _COLUMNS.items() if v not in rare}
    num_particles = results[0]["settings"]["num_particles"]
    lines = [["row", *(heading.format(K=num_particles) for heading in columns)]]
    for label in dict.fromkeys(r["row"] for r in results):
        of_row = [r for r in results if r["row"] == label and not r["error"]]
        cells = {heading: cell([r.get(key) for r in of_row]) for heading, key in columns.items()}
        if of_row and all(r.get("pareto_k_constant") == 1.0 for r in of_row):
            cells["k-hat"] = "weights constant"
        lines.append([label, *cells.values()])
    return lines


def _notes(results: Sequence[Result]) -> list[str]:
    """What was scored and how, how to read it, what failed, and how it was made."""
    first, seeds = results[0], sorted({r["seed"] for r in results})
    counted = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    floor = f", scale floor {first['min_scale']:g}" if first["min_scale"] is not None else ""
    masses, baseline, lesson = _KINDS[first.get("kind") or ("real" if floor else "binary")]
    notes = [
        f"Data {first['data']}, split {first['split']}: {first['sequences']} sequences, "
        f"{first['frames']} frames{floor}; {masses}.",
        f"Nats per frame: the sum over the set divided by its frames; mean ± standard deviation "
        f"over {counted} ({', '.join(map(str, seeds))}). Best parameters by the validation "
        f"{validated_by(first).upper()}-16 of each training.",
        f"{baseline} fitted on the training set: {first['baseline_per_frame']:.2f}. {lesson}",
        _HOW_TO_READ,
    ]
    if (steps := first["settings"]["steps"]) < SHORT:
        notes.insert(0, f"**A short run** ({steps} steps a row, {counted}): {_NO_EVIDENCE}")
    if _in_bits(results):
        bits = first["reader"].get("mu_law") or first["reader"]["pcm"]
        codec = (
            f"; FLAC, on the same files: {flac:.2f}" if (flac := first.get("flac_bits")) else ""
        )
        best = "bits: of a sample, by the best of the three bounds"
        notes.append(f"{best}; all levels alike: {bits:.2f}{codec}.")
    if any(r.get("scales_at_floor") is not None for r in results):
        notes.append(
            "at floor: the share of the emission's scales within a tenth of their floor, where a "
            "density measures the floor."
        )
    notes += learning.notes(results)
    for r in results:
        if r["error"]:
            notes.append(f"No numbers of {r['row']}, seed {r['seed']}: {r['error']}.")
    made = dict.fromkeys((r["command"], r["commit"]) for r in results)
    return notes + [f"Made by `{command}` at commit {commit}." for command, commit in made]


def _in_bits(results: Sequence[Result]) -> bool:
    return any("bits_per_sample" in r for r in results)
