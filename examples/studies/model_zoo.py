"""Which model of sequences fits best? All of them on one data set, trained and scored alike.

Sources, in the order of the table: a recurrent network without latents; VAE of every frame, Kingma
and Welling (2014), https://arxiv.org/abs/1312.6114; STORN, Bayer and Osendorfer (2014),
https://arxiv.org/abs/1411.7610; VRNN, and VRNN-I, whose prior is the standard normal, Chung et al.
(2015), https://arxiv.org/abs/1506.02216; SRNN, Fraccaro et al. (2016),
https://arxiv.org/abs/1605.07571; DMM, Krishnan et al. (2017), https://arxiv.org/abs/1609.09869;
DSAE with its full and its factorised guide, Li and Mandt (2018), https://arxiv.org/abs/1803.02991.

    python examples/model_zoo.py                                   # spoken vowels, one seed
    python examples/model_zoo.py --seeds 3 --jobs 2
    python examples/model_zoo.py --data JSB_Chorales.mat           # or TIMIT, or one's own .npz

Every model has the same widths, optimiser, annealed KL weight, number of steps and early stopping
by the validation bound; each has its paper's own guide, prior and cell, so their numbers of
parameters differ and stand in the table. The RNN's bound is its exact likelihood, the others' are
lower bounds, and only a bound above its number says that latents pay. The VAE knows nothing of
time: its distance to the others is what time is worth. IWAE-64 and FIVO-64 score the same
parameters; where they differ much, the guide is far from the posterior. Expect models
that read x and have latents at 1.5 to 1.8 (IWAE-64), the RNN at 0.5, DMM and DSAE at -3 to -5,
the VAE at -12. An advantage below the standard errors of one seed is none. With the defaults 10 to
12 minutes on one core.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from tqdm import tqdm

from inference import (
    ELBO,
    DegenerateWeightsError,
    NonFiniteLossError,
    Ramp,
    evaluate,
    fit,
    seeded,
)
from pyro_avrnn import recipes
from pyro_avrnn.cli.plots import style
from pyro_avrnn.cli.runs import commit, write_json
from pyro_avrnn.data import Batches, Dataset, independent_baseline, load

#: the recipe, and what it is called with beside the sizes
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("rnn", {}),
    "vae": ("vae", {}),
    "storn": ("storn", {}),
    "vrnn": ("vrnn", {}),
    "vrnn-i": ("vrnn", {"prior": "standard"}),
    "srnn": ("srnn", {}),
    "dmm": ("dmm", {}),
    "dsae-full": ("dsae", {"guide": "full"}),
    "dsae-factorised": ("dsae", {"guide": "factorised"}),
}
BATCH_SIZE = 64
COLUMNS = {
    "parameters": "parameters",
    "IWAE-64": "iwae_per_frame",
    "FIVO-64": "fivo_per_frame",
    "ELBO": "elbo_per_frame",
    "KL": "kl_per_frame",
    "s / epoch": "seconds_per_epoch",
    "best step": "best_step",
}


@cache
def dataset(source: str, smoke: bool) -> Dataset:
    """The data, read once a process; a few test sequences of it will do for a smoke test."""
    data = load(source)
    if not smoke:
        return data
    few = {split: getattr(data, split).select(range(8)) for split in ("valid", "test")}
    return replace(data, **few)


def assemble(name: str, data: Dataset) -> recipes.Recipe:
    """The model and its guide, parameters drawn from torch's global state."""
    recipe, options = ZOO[name]
    sizes = {"x_dim": data.x_dim, "h_dim": 64}
    if recipe != "rnn":
        sizes["z_dim"] = 8
    return recipes.RECIPES[recipe](**sizes, **options, **data.emission)


def train(source: str, steps: int, smoke: bool, name: str, seed: int) -> dict[str, Any]:
    """One training by the annealed ELBO, with the best parameters scored on the test split."""
    data = dataset(source, smoke)
    row: dict[str, Any] = {"model": name, "seed": seed, "data": data.name, "steps": steps}
    row["commit"] = commit()
    batches = Batches(data.train, BATCH_SIZE, seed=seed)
    with pyro.get_param_store().scope(), seeded(seed):
        r = assemble(name, data)
        row["parameters"] = sum(p.numel() for m in (r.model, r.guide) for p in m.parameters())
        particles = 64 if r.model.z_dim else 1  # without latents one is exact
        try:
            history = fit(
                SVI(
                    r.model,
                    r.guide,
                    pyro.optim.Adam({"lr": 2e-3}),
                    ELBO(kl_weight=Ramp(0, 1, over=0.5)),
                ),
                batches,
                steps=steps,
                validation=(data.valid.x, data.valid.mask),
                validate_every=max(steps // 30, 1),
                clip_norm=5.0,
                seed=seed,
                progress=False,
            )
            row["best_step"] = history.best_step
            row["seconds_per_epoch"] = history.seconds * len(batches) / history.steps
            test = data.test
            found = evaluate(
                r.model,
                r.guide,
                test.x,
                test.mask,
                num_particles=particles,
                fivo_particles=particles,
                seed=seed,
            )
        except (NonFiniteLossError, DegenerateWeightsError) as error:
            return row | {"error": str(error)}
    return row | found.as_dict() | {"error": None}


def table(rows: list[dict[str, Any]], baseline: float) -> str:
    """Markdown: one line a model, with what the numbers are."""
    several = len({row["seed"] for row in rows}) > 1
    lines = [["model", *COLUMNS]]
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        lines.append([name, *(cell(of_model, key) for key in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    spread = "deviation over seeds" if several else "standard error over sequences"
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    first = rows[0]
    text += [
        "",
        f"Data {first['data']}, test split, nats per frame (± {spread}); {first['steps']} steps, "
        f"seed {seeds}, commit {first['commit']}. Independent dimensions: {baseline:.2f}. The "
        "bounds of rnn, which has no latents, are its exact likelihood. Seconds are those of "
        "training, validations included.",
        *(f"{row['model']}, seed {row['seed']}: {row['error']}" for row in rows if row["error"]),
    ]
    return "\n".join(text)


def cell(rows: list[dict[str, Any]], key: str) -> str:
    """The mean over seeds, with its spread where that is known; "-" where training failed."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return "-"
    if key in ("parameters", "best_step"):
        return f"{fmean(values):.0f}"
    spread = stdev(values) if len(values) > 1 else rows[0].get(f"{key}_se")
    return f"{fmean(values):.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Left, the three bounds of every model and seed with standard errors; right, parameters."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = style.figure(10.0, 1.4 + 0.45 * len(names), "Models of sequences, trained alike")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    looks = {
        "iwae": ("IWAE-64", style.BLUE, "o"),
        "fivo": ("FIVO-64", style.GREEN, "D"),
        "elbo": ("ELBO", style.GREY, "s"),
    }
    for i, (bound, (_, colour, marker)) in enumerate(looks.items()):
        good = [row for row in rows if not row["error"]]
        left.errorbar(
            [row[f"{bound}_per_frame"] for row in good],
            [names.index(row["model"]) + 0.2 * (i - 1) for row in good],
            xerr=[row[f"{bound}_per_frame_se"] for row in good],
            fmt=marker,
            color=colour,
            ms=4,
            capsize=2,
        )
    sizes = {row["model"]: row["parameters"] for row in rows}
    right.barh(range(len(names)), [sizes[name] / 1000 for name in names], 0.6, color=style.SKY)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    style.tidy(left, "nats per held-out frame (further right is better)")
    style.tidy(right, "parameters, thousands")
    handles = [style.line(label, colour, marker=m, ls="") for label, colour, m in looks.values()]
    style.legend_below(figure, handles, "one mark a seed; bars: standard error over sequences")
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="vowels", help="vowels, TIMIT, .mat or .npz")
    parser.add_argument("--models", nargs="+", choices=[*ZOO], default=[*ZOO])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps = 4 if args.smoke else args.steps
    tasks = [(name, seed) for name in args.models for seed in range(args.seeds)]
    args.out.mkdir(parents=True, exist_ok=True)
    one = partial(train, args.data, steps, args.smoke)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(tasks), desc="models") as bar:

        def finished(row: dict[str, Any]) -> None:
            rows.append(row)
            rows.sort(key=lambda r: tasks.index((r["model"], r["seed"])))
            write_json(args.out / "results.json", rows)
            bar.set_postfix_str(f"{row['model']}: IWAE-64 {cell([row], 'iwae_per_frame')}")
            bar.update()

        if args.jobs == 1:
            for task in tasks:
                finished(one(*task))
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,)) as pool:
                for future in as_completed([pool.submit(one, *task) for task in tasks]):
                    finished(future.result())
    text = table(rows, independent_baseline(dataset(args.data, args.smoke)))
    (args.out / "table.md").write_text(text + "\n")
    picture(rows, args.out / "zoo.png")
    print(f"\n{text}\n\nwritten: {args.out}/results.json, table.md, zoo.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
