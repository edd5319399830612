"""What a comparison leaves: one table, metrics of all rows, a posterior, pictures."""

import csv
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from inference import Bootstrap, particle_filter, seeded, to_arviz
from inference.files import write_csv
from inference.particles import Selection
from pyro_avrnn import plots, recipes
from pyro_avrnn.cli.runs import row_folder
from pyro_avrnn.data import Dataset
from pyro_avrnn.generation import generate

SHORT = 500  # steps below which a run is called short

_COLUMNS = (
    ("FIVO-{K}", "fivo_per_frame"),
    ("IWAE-{K}", "iwae_per_frame"),
    ("ELBO", "elbo_per_frame"),
    ("reconstruction", "reconstruction_per_frame"),
    ("KL", "kl_per_frame"),
    ("information <=", "information_at_most"),
    ("mismatch >=", "aggregate_mismatch_at_least"),
    ("W2", "closed_form_w2_per_frame"),
    ("critic", "critic_distance_per_frame"),
    ("prior scale", "prior_scale"),
    ("active", "active_units"),
    ("bits", "bits_per_sample"),
    ("parameters", "parameters"),
    ("k-hat", "pareto_k_median"),
    ("best step", "best_step"),
    ("seconds", "seconds"),
)
_NOTHING = "A row that does not beat this has learnt nothing."
#: of the data, by kind: what is scored, the baseline without time or structure, what it says
_KINDS = {
    "real": ("densities of standardised data", "Independent normals per dimension", _NOTHING),
    "binary": ("densities of 0/1 data", "Independent Bernoullis per dimension", _NOTHING),
    "mu-law": (
        "masses of mu-law levels",
        "One histogram of the levels of all samples",
        "It knows which levels samples of 16 bits can reach at all, few where they are quiet; a "
        "mixture of logistics cannot single those out, and may lie below.",
    ),
}


def write(out: Path, results: list[dict[str, Any]], dataset: Dataset) -> None:
    """Print and write everything that is derived from the trainings in ``out``."""
    text = table(results)
    print(text)
    (out / "table.md").write_text(text + "\n")
    metrics = _metrics(out, results)
    write_csv(out / "metrics.csv", metrics)
    written = [out / "results.json", out / "metrics.csv", out / "table.md"]
    written.append(plots.learning_curves(metrics, out / "learning_curves.png"))
    written.append(plots.critic_curves(metrics, out / "critic_curves.png"))
    written.append(plots.rate_bars(results, out / "rate.png"))
    best = max(
        (
            r
            for r in results  # null: no validation was finite
            if r["model"] != "rnn" and not r["error"] and _validation(r) is not None
        ),
        key=_validation,
        default=None,
    )
    if best is not None:
        written += look(out, best, dataset)
    print("\nwritten: " + ", ".join(str(path) for path in written))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one line a row, mean and standard deviation over seeds, nats per frame."""
    first = results[0]
    settings = first["settings"]
    counted = any("bits_per_sample" in r for r in results)
    columns = [c for c in _COLUMNS if c[1] != "bits_per_sample" or counted]
    head = [name.format(K=settings["num_particles"]) for name, _ in columns]
    lines = [["row", *head]]
    for label in dict.fromkeys(r["row"] for r in results):
        of_row = [r for r in results if r["row"] == label and not r["error"]]
        cells = [_cell([r.get(key) for r in of_row]) for _, key in columns]
        if of_row and all(r.get("pareto_k_constant") == 1.0 for r in of_row):
            cells[head.index("k-hat")] = "weights constant"
        lines.append([label, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    seeds = sorted({r["seed"] for r in results})
    made = dict.fromkeys((r["command"], r["commit"]) for r in results)
    floor = f", scale floor {first['min_scale']:g}" if first["min_scale"] is not None else ""
    kind = first.get("kind") or ("real" if floor else "binary")
    masses, baseline, lesson = _KINDS[kind]
    notes = [
        f"Data {first['data']}, split {first['split']}: {first['sequences']} sequences, "
        f"{first['frames']} frames{floor}; {masses}.",
        f"Nats per frame: the sum over the set divided by its frames; mean ± standard deviation "
        f"over {len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))}). "
        f"Best parameters by the validation {settings.get('validate_by', 'iwae').upper()}-16 of "
        "each training.",
        f"{baseline} fitted on the training set: {first['baseline_per_frame']:.2f}. {lesson}",
        "KL splits into information (upper bound) and aggregate mismatch (lower bound), read on "
        "held-out sequences; W2 is the closed form, an upper bound of what a one-step critic "
        "estimates; prior scale is the average deviation of p(z_t | h_t), with which distances "
        "shrink; k-hat above 0.7: the bound's own estimate is unreliable for single sequences "
        "(weights constant: they have no tail). FIVO is a particle filter's bound.",
        *(
            [
                "bits: of a sample, by the best of the three bounds; all levels alike: "
                f"{first['reader']['mu_law']:.2f}."
            ]
            if counted
            else []
        ),
        *(
            f"No numbers of {r['row']}, seed {r['seed']}: {r['error']}."
            for r in results
            if r["error"]
        ),
        *(f"Made by `{command}` at commit {commit}." for command, commit in made),
    ]
    if settings["steps"] < SHORT:
        notes.insert(
            0,
            f"**A short run** ({settings['steps']} steps a row, {len(seeds)} seed"
            f"{'s' if len(seeds) > 1 else ''}): it shows the machinery and is no evidence that "
            "one row beats another. The full tables: `make vowels`, `make timit`.",
        )
    body = "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
    return body + "\n\n" + "\n".join(f"* {note}" for note in notes)


def look(out: Path, best: dict[str, Any], dataset: Dataset) -> list[Path]:
    """Posterior and pictures of one held-out sequence under the best row with latents.

    The sequence is the one of median length in the reported split, without its padding.
    """
    recipe = recipes.load(row_folder(out, best["row"], best["seed"]) / "parameters.pt")
    recipe.model.eval()
    recipe.guide.eval()
    split = getattr(dataset, best["split"])
    index = int(split.lengths.argsort()[len(split) // 2])
    x = split.sequence(index)
    name = f"{best['row']}, seed {best['seed']}, {best['split']} sequence {split.names[index]}"
    frame_seconds = dataset.frame_seconds
    posterior = to_arviz(recipe.model, recipe.guide, x, frame_seconds=frame_seconds)
    posterior.attrs["row"] = name
    path = out / "posterior.nc"
    posterior.to_netcdf(str(path))
    with seeded(0):
        free = generate(recipe.model, 3, len(x))
    panels = {
        "observed": x.numpy(),
        "one-step prediction": one_step_prediction(recipe, x).numpy(),
        "freely generated": free.numpy(),
    }
    pictures = [
        plots.sequences(
            panels,
            out / "sequences.png",
            kind=dataset.kind,
            sample_rate=dataset.sample_rate,
            frame_seconds=frame_seconds,
            title=name,
        ),
        plots.latent_posterior(posterior, out / "posterior.png", title=name),
    ]
    with seeded(0), torch.no_grad():
        filtered = particle_filter(recipe.model, recipe.guide, x.unsqueeze(0), num_particles=128)
    pictures.append(
        plots.particle_health(filtered, out / "filter.png", title=f"Do 128 particles live? {name}")
    )
    return [path, *pictures]


@torch.no_grad()
def one_step_prediction(
    recipe: recipes.Recipe, x: Tensor, *, draws: int = 200, seed: int = 0
) -> Tensor:
    """Draws of x_t given the steps before t, ``(draws, T, X)``, for one sequence ``(T, X)``.

    The past is summarised by a particle filter that resamples at every step, along the guide's
    proposals, or the prior's where the guide has read the future; z_t is drawn from the prior.
    """
    guide: Any = Bootstrap(recipe.model) if recipe.guide.smoothing else recipe.guide
    given: dict[str, Any] = {"num_particles": draws, "select": Selection("systematic", "always")}
    with seeded(seed):
        d = recipe.model.rollout(guide, x.unsqueeze(0), **given)
        drawn = recipe.model.emission(d.prior.sample(), d.states).sample()
    return drawn[:, :, 0].transpose(0, 1)


def _validation(result: dict[str, Any]) -> Any:
    """Bound of the best parameters on the validation split, nats a frame; None if not finite."""
    return result[f"validation_{result['settings'].get('validate_by', 'iwae')}_per_frame"]


def _cell(values: list[Any]) -> str:
    numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        return "-"
    digits = 0 if abs(fmean(numbers)) >= 100 else 2
    mean = f"{fmean(numbers):.{digits}f}".replace("-0.00", "0.00")
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {stdev(numbers):.{digits}f}"


def _metrics(out: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for r in results:
        path = row_folder(out, r["row"], r["seed"]) / "metrics.csv"
        if path.is_file():
            with path.open(newline="") as file:
                for line in csv.DictReader(file):
                    numbers = {k: float(v) for k, v in line.items() if v}
                    numbers["step"] = int(numbers["step"])
                    rows.append({"row": r["row"], "seed": r["seed"], **numbers})
    return rows
