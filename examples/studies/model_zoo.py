"""Which model of sequences fits best? All of them on one data set, trained and scored alike.

Sources, in the order of the table: a recurrent network without latents; VAE of every frame, Kingma
and Welling (2014), https://arxiv.org/abs/1312.6114; STORN, Bayer and Osendorfer (2014),
https://arxiv.org/abs/1411.7610; VRNN, and VRNN-I, whose prior is the standard normal, Chung et al.
(2015), https://arxiv.org/abs/1506.02216; SRNN, Fraccaro et al. (2016),
https://arxiv.org/abs/1605.07571; DMM, Krishnan et al. (2017), https://arxiv.org/abs/1609.09869;
DSAE with its full and its factorised guide, Li and Mandt (2018), https://arxiv.org/abs/1803.02991.

    python examples/studies/model_zoo.py                           # spoken vowels, one seed
    python examples/studies/model_zoo.py --seeds 3 --jobs 2
    python examples/studies/model_zoo.py --data JSB_Chorales.mat   # or TIMIT, or your own .npz

All models share widths, optimiser, annealed KL weight, number of steps, and early stopping by the
validation bound. Each has the guide, prior and cell of its own paper, so the numbers of parameters
differ; the table lists them. The RNN's bound is its exact likelihood. The other bounds lie below
the likelihood, so latents pay only where a bound exceeds the RNN's. The VAE knows nothing of time:
its distance to the others is what time is worth. IWAE-64 and FIVO-64 score the same parameters;
where they differ much, the guide is far from the posterior.

Expect 1.5 to 1.8 (IWAE-64) from models that read x and have latents, 0.5 from the RNN, -3 to -5
from DMM and DSAE, -12 from the VAE. Ignore differences below the standard errors of one seed. The
defaults take 10 to 12 minutes on one core.
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import (
    Row,
    arguments,
    by_label,
    in_processes,
    markdown,
    mean,
    parse,
    publish,
    train_and_score,
)
from tqdm import tqdm

from inference.files import write_json
from pyro_avrnn import recipes
from pyro_avrnn.data import Batches, Dataset, independent_baseline, load
from pyro_avrnn.plots import style

#: the recipe, and its arguments other than sizes
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
COLUMNS = {
    "parameters": "parameters",
    "IWAE-64": "iwae_per_frame",
    "FIVO-64": "fivo_per_frame",
    "ELBO": "elbo_per_frame",
    "KL": "kl_per_frame",
    "s / epoch": "seconds_per_epoch",
    "best step": "best_step",
}
LOOKS = {
    "iwae": ("IWAE-64", style.BLUE, "o"),
    "fivo": ("FIVO-64", style.GREEN, "D"),
    "elbo": ("ELBO", style.GREY, "s"),
}


@cache
def dataset(source: str, smoke: bool) -> Dataset:
    """Read the data, once a process; keep few held-out sequences for a smoke test."""
    data = load(source)
    if not smoke:
        return data
    few = {split: getattr(data, split).select(range(8)) for split in ("valid", "test")}
    return replace(data, **few)


def assemble(name: str, data: Dataset) -> recipes.Recipe:
    """Make model and guide, with parameters drawn from torch's global state."""
    recipe, options = ZOO[name]
    sizes = {"x_dim": data.x_dim, "h_dim": 64}
    if recipe != "rnn":
        sizes["z_dim"] = 8
    return recipes.RECIPES[recipe](**sizes, **options, **data.emission)


def train(source: str, steps: int, smoke: bool, task: tuple[str, int]) -> Row:
    """Train one model with one seed and score it on the test split."""
    data, (name, seed) = dataset(source, smoke), task
    found = train_and_score(
        partial(assemble, name, data),
        data,
        data.test,
        steps=steps,
        seed=seed,
        validations=30,
        filtered=True,
    )
    if "seconds" in found:
        found["seconds_per_epoch"] = found["seconds"] * len(Batches(data.train, 64)) / steps
    return {"model": name, "seed": seed, "data": data.name, "steps": steps, **found}


def table(rows: list[Row], baseline: float) -> str:
    """Make the table, one line per model, and the notes below it."""
    groups = by_label(rows, "model")
    lines = [
        [name, *(cell(groups.get(name, []), key) for key in COLUMNS.values())]
        for name in dict.fromkeys(row["model"] for row in rows)
    ]
    seeds = sorted({row["seed"] for row in rows})
    spread = "deviation over seeds" if len(seeds) > 1 else "standard error over sequences"
    first = rows[0]
    return "\n".join(
        [
            markdown(["model", *COLUMNS], lines),
            "",
            f"Data {first['data']}, test split, nats per frame (± {spread}); {first['steps']} "
            f"steps, seed {', '.join(map(str, seeds))}, commit {first['commit']}. Independent "
            f"dimensions: {baseline:.2f}. The bounds of rnn, which has no latents, are its exact "
            "likelihood. Seconds are those of training, validations included.",
            *(f"{r['model']}, seed {r['seed']}: {r['error']}" for r in rows if r["error"]),
        ]
    )


def cell(rows: list[Row], key: str) -> str:
    """Write the mean over seeds with its spread; "-" where training failed."""
    if not rows:
        return "-"
    values = [row[key] for row in rows]
    if key in ("parameters", "best_step"):
        return f"{sum(values) / len(values):.0f}"
    return mean(values, spread=rows[0].get(f"{key}_se"))


def picture(rows: list[Row], path: Path) -> None:
    """Draw the three bounds of every model and seed, and the numbers of parameters."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = style.figure(10.0, 1.4 + 0.45 * len(names), "Models of sequences, trained alike")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    good = [row for row in rows if not row["error"]]
    for i, (bound, (_, colour, marker)) in enumerate(LOOKS.items()):
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
    handles = [style.line(label, colour, marker=m, ls="") for label, colour, m in LOOKS.values()]
    style.legend_below(figure, handles, "one mark a seed; bars: standard error over sequences")
    style.save(figure, path)


def main() -> None:
    parser = arguments(__doc__, out="runs/zoo", steps=2500)
    parser.add_argument("--data", default="vowels", help="vowels, TIMIT, .mat or .npz")
    parser.add_argument("--models", nargs="+", choices=[*ZOO], default=[*ZOO])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    args = parse(parser)
    steps = 4 if args.smoke else args.steps
    models = args.models[::4] if args.smoke else args.models
    tasks = [(name, seed) for name in models for seed in range(args.seeds)]
    rows: list[Row] = []
    one = partial(train, args.data, steps, args.smoke)
    with tqdm(in_processes(one, tasks, args.jobs), desc="models", total=len(tasks)) as bar:
        for row in bar:
            rows.append(row)
            rows.sort(key=lambda r: tasks.index((r["model"], r["seed"])))
            write_json(args.out / "results.json", rows)
            bar.set_postfix_str(row["model"])
    text = table(rows, independent_baseline(dataset(args.data, args.smoke)))
    picture(rows, args.out / "zoo.png")
    publish(args.out, "table.md", text, "results.json", "zoo.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
