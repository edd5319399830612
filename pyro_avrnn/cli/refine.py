"""``avrnn refine``: a critic put into the priors of trained rows, and what that gains."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import refine, seeded, sequence_bounds
from inference.divergences import RATIO_LOSSES
from inference.files import write_json, write_text
from inference.modes import evaluating
from pyro_avrnn import data, plots, recipes
from pyro_avrnn.cli.folder import check_writable, owned
from pyro_avrnn.cli.options import option
from pyro_avrnn.cli.runs import Result, commit, row_folder
from pyro_avrnn.cli.tables import cell, markdown
from pyro_avrnn.cli.workers import Progress, spread
from pyro_avrnn.data import Dataset, Sequences

#: what is independent of what else in a set of this name: the speaker, if not the sequence
_SPEAKERS: dict[str, Callable[[str], str]] = {
    "timit": lambda name: name.partition("/")[0],
    "librispeech": lambda name: name.partition("-")[0],
    "digits": lambda name: name.split("_")[1],
}


@dataclass(frozen=True)
class Refining:
    """Options of ``avrnn refine``."""

    run: Path = option(MISSING, "folder of an avrnn compare")
    data: str = option("vowels", "data of that comparison")
    rows: tuple[str, ...] = option((), "rows of its table (default: all that have latents)")
    candidates: tuple[int, ...] = option(
        (16,), "S, draws of the prior among which the critic chooses; several are scored in turn"
    )
    critic_dim: int = option(64, "width of the critic's layers", "at least 1")
    steps: int = option(2500, "steps of the critic", "at least 1")
    loss: str = option("log_ratio", "what the critic learns by", choices=RATIO_LOSSES)
    particles: int | None = option(
        None, "K of the bounds (default: that of the comparison)", "at least 1"
    )
    out: Path | None = option(None, "folder to write (default: RUN/refined)")
    jobs: int = option(
        min(os.cpu_count() or 1, 4), "rows at the same time, one thread each", "at least 1"
    )
    resume: bool = option(False, "keep what is finished in --out")


def refine_rows(options: Refining, command: str) -> int:
    """Refine the prior of each trained row, score it before and after, write table and picture.

    Raises:
        FileNotFoundError: no such run, or one whose parameters are gone.
        ValueError: an unknown row, other data, or fewer than 2 candidates.
    """
    if min(options.candidates) < 2:
        raise ValueError(
            f"--candidates must be at least 2, got {min(options.candidates)}; a choice needs two"
        )
    chosen = _chosen(options)
    dataset = data.load(options.data, **(chosen[0].get("reader") or {}))
    if dataset.name != chosen[0]["data"]:
        raise ValueError(
            f"--data must be the data of the comparison, {chosen[0]['data']}, got "
            f"{options.data!r}, which is {dataset.name}"
        )
    out = options.run / "refined" if options.out is None else options.out
    check_writable(out)
    with owned(out):
        path = out / "refined.json"
        found: list[Result] = []
        if options.resume and path.is_file():
            found = json.loads(path.read_text())
        done = {(r["row"], r["seed"]) for r in found}
        places = {(r["row"], r["seed"]): i for i, r in enumerate(chosen)}
        waiting = [r for r in chosen if (r["row"], r["seed"]) not in done]
        for result in _each(waiting, options, out):
            found.append(result | {"command": command})
            found.sort(key=lambda r: places.get((r["row"], r["seed"]), -1))
            write_json(path, found)
        text = table(found)
        print(text)
        write_text(out / "table.md", text + "\n")
        plots.gains(found, out / "gain.png")
        print(f"\nwritten: {path}, {out / 'table.md'}, {out / 'gain.png'}")
    return 0


def _each(waiting: list[Result], options: Refining, out: Path) -> Iterator[Result]:
    """Refine each row; yield what it gained as soon as it is known."""
    if waiting:
        yield from spread(
            partial(_refined, options=options, out=out),
            waiting,
            jobs=options.jobs,
            source=options.data,
            reader=waiting[0].get("reader") or {},
            pieces=1,
            bar="refining priors",
            unit="row",
            summary=lambda r: f"{r['row']} seed {r['seed']}",
        )


def _chosen(options: Refining) -> list[Result]:
    """Finished trainings with latents, of the rows that are asked for."""
    path = options.run / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give the folder of an avrnn compare")
    results = [r for r in json.loads(path.read_text()) if not r["error"]]
    known = list(dict.fromkeys(r["row"] for r in results if r["schedule"] != "none"))
    for row in options.rows:
        if row not in known:
            raise ValueError(f"--rows must be among {'; '.join(known)}, got {row!r}")
    chosen = [r for r in results if r["row"] in (options.rows or known)]
    if not chosen:
        raise ValueError(f"{path} has no finished row with latents")
    for r in chosen:
        if not (file := row_folder(options.run, r["row"], r["seed"]) / "parameters.pt").is_file():
            raise FileNotFoundError(
                f"no {file}; run the comparison again with --resume, which writes it"
            )
    return chosen


def _refined(
    result: Result, dataset: Dataset, _: Progress, *, options: Refining, out: Path
) -> Result:
    """One row and seed: bounds before and after, and what the critic says of itself."""
    recipe = recipes.load(row_folder(options.run, result["row"], result["seed"]) / "parameters.pt")
    split: Sequences = getattr(dataset, result["split"])
    particles = options.particles or result["settings"]["num_particles"]
    score = partial(
        sequence_bounds, recipe.model, recipe.guide, split.x, split.mask, num_particles=particles
    )
    before = score()
    recipe = recipes.refined(
        recipe, num_candidates=options.candidates[0], critic_dim=options.critic_dim
    )
    sets = ((part.x, part.mask) for part in (dataset.train, dataset.valid))
    model: Any = recipe.model
    told = refine(
        *(model, recipe.guide, *sets), steps=options.steps, loss=options.loss, seed=result["seed"]
    )
    folder = row_folder(out, result["row"], result["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    recipes.save(recipe, folder / "parameters.pt")
    title = f"{result['row']}, seed {result['seed']}"
    plots.code_clouds(_codes(recipe, split), folder / "codes.png", title=title)
    unit = _SPEAKERS.get(dataset.name, str)
    groups = [unit(name) for name in split.names]
    after = {}
    for s in options.candidates:
        model.prior.num_candidates = s
        after[str(s)] = {
            name: paired(value - before[name], split.mask, groups)
            for name, value in score().items()
        }
    frames = float(split.mask.sum())
    return {
        **{name: result[name] for name in ("row", "seed", "data", "split", "model", "reader")},
        "commit": commit(),
        "trained_at": result["commit"],
        "aggregate_mismatch_at_least": result["aggregate_mismatch_at_least"],
        **{f"{name}_per_frame": float(value.sum()) / frames for name, value in before.items()},
        **{f"refinement_{name}": value for name, value in told._asdict().items()},
        "num_particles": particles,
        "after": after,
        "independent": len(set(groups)),
    }


@torch.no_grad()
def _codes(recipe: recipes.Recipe, split: Sequences) -> dict[str, np.ndarray]:
    """Codes of base, refined prior and guide on the same paths, in units of the base."""
    some = split.select(range(min(len(split), 64)))
    with seeded(0), evaluating(recipe.model, recipe.guide):
        d = recipe.model.rollout(recipe.guide, some.x, some.mask)
        prior: Any = d.prior
        base, own, _ = prior.codes(d.z)
        chosen = prior.units.read(prior.sample())
    keep = d.mask[:, 0]
    named = {"base prior": base, "refined prior": chosen, "guide, aggregated": own}
    return {name: u[:, 0][keep].double().numpy() for name, u in named.items()}


def paired(difference: Tensor, mask: Tensor, groups: list[str]) -> dict[str, float]:
    """Mean difference a frame, and its standard error over independent groups of sequences.

    Args:
        difference: nats of each sequence, ``(B,)``.
        mask: ``(B, T)``.
        groups: the group of each sequence, such as its speaker.
    """
    lengths = mask.sum(dim=1).to(difference)
    mean = float(difference.sum() / lengths.sum())
    names = list(dict.fromkeys(groups))
    index = torch.tensor([names.index(group) for group in groups])
    residual = difference - mean * lengths
    residual = residual.new_zeros(len(names)).index_add(0, index, residual)
    error, count = float(residual.square().sum().sqrt() / lengths.sum()), len(names)
    return {
        "gain": mean,
        "gain_se": error * math.sqrt(count / (count - 1)) if count > 1 else math.nan,
    }


def table(results: list[Result]) -> str:
    """Rows over seeds: the bound before, what is certified, and the gain with each S."""
    sizes = list(dict.fromkeys(s for r in results for s in r["after"]))
    particles = results[0]["num_particles"]
    head = ["row", f"IWAE-{particles}", "ELBO", "certified", "accuracy", "candidates that count"]
    head += [f"gain, S = {s}" for s in sizes] + ["of each seed", "standard error"]
    lines = []
    for row in dict.fromkeys(r["row"] for r in results):
        mine = [r for r in results if r["row"] == row]
        gains = [[r["after"][s]["iwae"]["gain"] for r in mine if s in r["after"]] for s in sizes]
        first = [r["after"][sizes[0]]["iwae"] for r in mine]
        lines.append(
            (
                f"`{row}`",
                cell([r["iwae_per_frame"] for r in mine]),
                cell([r["elbo_per_frame"] for r in mine]),
                cell([r["refinement_certified"] for r in mine]),
                cell([r["refinement_accuracy"] for r in mine]),
                cell([r["refinement_effective_candidates"] for r in mine]),
                *map(cell, gains),
                ", ".join(f"{one['gain']:+.2f}" for one in first),
                cell([one["gain_se"] for one in first]).partition(" ")[0],
            )
        )
    r = results[0]
    notes = (
        f"Data {r['data']}, split {r['split']}, nats a frame; mean ± standard deviation over "
        "seeds. Gain: IWAE with the refined prior less IWAE with its base, all else the same.",
        "certified: E_q[r] - E_p[exp r] + 1 on the validation sequences, which the critic was "
        "chosen by; what can be gained with many candidates.",
        f"Standard error: of one seed's gain with S = {sizes[0]}, over {r['independent']} "
        "independent speakers, or sequences where speakers are not known.",
        f"Made by `{r['command']}` at commit {r['commit']}, from trainings at {r['trained_at']}.",
    )
    return markdown(head, lines) + "\n\n" + "\n".join(f"* {note}" for note in notes)
