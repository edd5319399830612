"""What do another guide, another prior, another cell do? Each is one changed argument.

Sources: filtering guide and conditional prior, Chung et al. (2015),
https://arxiv.org/abs/1506.02216; residual guides, Fraccaro et al. (2016),
https://arxiv.org/abs/1605.07571; standard-normal prior and a guide of x up to t, Bayer and
Osendorfer (2014), https://arxiv.org/abs/1411.7610; gated prior and smoothing guides, Krishnan et
al. (2017), https://arxiv.org/abs/1609.09869; flows as priors, Dinh et al. (2017),
https://arxiv.org/abs/1605.08803, and as guides, Kingma et al. (2016),
https://arxiv.org/abs/1606.04934.

    python examples/swap_guides_and_priors.py                # a VRNN's 5 priors x 9 guides
    python examples/swap_guides_and_priors.py --cells gru lstm --jobs 2
    python examples/swap_guides_and_priors.py --model dmm --guides smoothing smoothing_flow

Every cell of the grid is one training by the annealed ELBO, scored on held-out sequences; a "-" is
a pair that may not meet, and the sentence below the table says why. Finished cells are kept in
results.json: a run that was interrupted goes on, and one with more cells adds to it.

600 steps are few, and a cell has one seed: read rows and columns, not single cells. Differences
below 0.3 nats may well be noise; repeat with another --seed before believing them, and with more
--steps before calling a slow learner bad. About 20 minutes on one core with the defaults.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.axes import Axes
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
from pyro_avrnn.data import Batches, Dataset, load
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.networks import CELLS
from pyro_avrnn.priors import PRIORS

Cell = dict[str, Any]  # what is swapped, then what all cells share; finished, also its numbers
PARTS = ("prior", "guide", "cell")
SHARED = ("model", "data", "steps", "seed", "few")


@cache
def dataset(source: str) -> Dataset:
    """The data, read once a process."""
    return load(source)


def assemble(cell: Cell, data: Dataset) -> recipes.Recipe:
    """The swap itself; parameters are drawn from torch's global state."""
    parts = {part: cell[part] for part in PARTS if cell[part] is not None}
    make = recipes.RECIPES[cell["model"]]
    return make(x_dim=data.x_dim, z_dim=8, h_dim=64, **data.emission, **parts)


def train(cell: Cell) -> Cell:
    """One training by the annealed ELBO; the best parameters scored on test sequences."""
    data = dataset(cell["data"])
    steps, seed = cell["steps"], cell["seed"]
    test = data.test
    if cell["few"] is not None:
        test = test.select(range(cell["few"]))
    with pyro.get_param_store().scope(), seeded(seed):
        r = assemble(cell, data)
        loss = ELBO(kl_weight=Ramp(0, 1, over=0.5))
        try:
            history = fit(
                SVI(r.model, r.guide, pyro.optim.Adam({"lr": 2e-3}), loss),
                Batches(data.train, batch_size=64, seed=seed),
                steps=steps,
                validation=(data.valid.x, data.valid.mask),
                validate_every=max(steps // 20, 1),
                clip_norm=5.0,
                seed=seed,
                progress=False,
            )
            found = evaluate(r.model, r.guide, test.x, test.mask, seed=seed)
        except (NonFiniteLossError, DegenerateWeightsError) as error:
            return cell | {"commit": commit(), "error": str(error)}
    numbers = {"best_step": history.best_step, "seconds": history.seconds, **found.as_dict()}
    return cell | {"commit": commit(), "error": None, **numbers}


def why_not(cell: Cell) -> str | None:
    """Why these parts may not meet, in one sentence; None if they may."""
    try:
        with seeded(0):
            assemble(cell, dataset(cell["data"]))
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None


def trained(todo: list[Cell], jobs: int) -> Iterator[Cell]:
    """Cells as they are finished, in processes of one thread each."""
    if jobs == 1:
        yield from map(train, todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        try:
            for future in as_completed([pool.submit(train, cell) for cell in todo]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def key(cell: Cell) -> tuple[Any, ...]:
    """What makes a finished cell the one that is asked for."""
    return tuple(cell.get(name) for name in (*PARTS, *SHARED))


def report(cells: list[Cell], done: dict[tuple[Any, ...], Cell], refused: dict[Any, str]) -> str:
    """Markdown: a table of all cells, then why some are missing."""
    lines = ["| prior | guide | cell | IWAE-64 | ± se | ELBO | KL | best step | seconds |"]
    lines.append("|---" * 9 + "|")
    whys: dict[str, list[str]] = {}
    for cell in cells:
        row = done.get(key(cell), {})
        numbers = [
            show(row, name, digits)
            for name, digits in (
                ("iwae_per_frame", 2),
                ("iwae_per_frame_se", 2),
                ("elbo_per_frame", 2),
                ("kl_per_frame", 2),
                ("best_step", 0),
                ("seconds", 0),
            )
        ]
        names = [cell[part] or "" for part in PARTS]
        lines.append("| " + " | ".join([*names, *numbers]) + " |")
        reason = refused.get(key(cell)) or row.get("error")
        if reason:
            whys.setdefault(reason, []).append(" x ".join(filter(None, names)))
    first = cells[0]
    commits = sorted({row["commit"] or "unknown" for row in map(done.get, map(key, cells)) if row})
    lines += [
        "",
        f"{first['model']} on {first['data']}, {first['steps']} steps, seed {first['seed']}; nats "
        "per frame of the test split, se: standard error over its sequences. Commit "
        f"{', '.join(commits)}.",
        "",
        *(f"- {', '.join(pairs)}: {reason}." for reason, pairs in whys.items()),
    ]
    return "\n".join(lines)


def show(row: Cell, name: str, digits: int) -> str:
    value = row.get(name)
    return "-" if value is None else f"{value:.{digits}f}"


def heat_map(cells: list[Cell], done: dict[tuple[Any, ...], Cell], path: Path) -> None:
    """IWAE-64 of priors x guides, one panel for each recurrent cell; "-" where there is none."""
    priors, guides, kinds = ([*dict.fromkeys(cell[part] for cell in cells)] for part in PARTS)
    values = {
        tuple(cell[part] for part in PARTS): done.get(key(cell), {}).get("iwae_per_frame")
        for cell in cells
    }
    known = [value for value in values.values() if value is not None] or [0.0]
    first = cells[0]
    figure = style.figure(
        2.4 + 0.95 * len(guides),
        1.2 + len(kinds) * (1.3 + 0.5 * len(priors)),
        f"IWAE-64 of {first['model']}, {first['steps']} steps, one seed",
    )
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        grid = [[values[prior, guide, kind] for guide in guides] for prior in priors]
        shades = [[math.nan if value is None else value for value in row] for row in grid]
        image = axes.imshow(shades, vmin=min(known), vmax=max(known), aspect="auto")
        write_numbers(axes, grid, (min(known) + max(known)) / 2)
        axes.set_xticks(range(len(guides)), [g.replace("_", "\n") for g in guides], fontsize=8)
        axes.set_yticks(range(len(priors)), priors)
        axes.set(ylabel="prior", xlabel="guide", title=kind or "")
    figure.colorbar(image, ax=panels, label="nats per held-out frame")
    style.save(figure, path)


def write_numbers(axes: Axes, grid: list[list[float | None]], middle: float) -> None:
    for (i, row), j in product(enumerate(grid), range(len(grid[0]))):
        value = row[j]
        text = "-" if value is None else style.show(value)
        colour = "black" if value is None or value > middle else "white"  # on yellow, on blue
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=recipes.WITH_LATENTS, default="vrnn")
    parser.add_argument("--priors", nargs="+", choices=[*PRIORS], default=[*PRIORS])
    known = [*GUIDES, *recipes.OF_DSAE]
    parser.add_argument("--guides", nargs="+", choices=known, help="default: all of the model")
    parser.add_argument("--cells", nargs="+", choices=[*CELLS], default=["gru"])
    parser.add_argument("--data", default="vowels", help="vowels, TIMIT, .mat or .npz")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--out", type=Path, help="default: runs/swap-MODEL")
    parser.add_argument("--smoke", action="store_true", help="a corner of it, in a few steps")
    args = parser.parse_args()
    guides = args.guides or known[: None if args.model == "dsae" else len(GUIDES)]
    priors, steps, sequences = args.priors, args.steps, None
    if args.smoke:  # with one pair that may not meet
        priors, guides, steps, sequences = (
            ["conditional", "flow"],
            ["filtering", "residual"],
            5,
            40,
        )
    has_cell = "cell" in recipes.OWN[args.model]
    kinds = args.cells if has_cell else [None]
    shared = (args.model, args.data, steps, args.seed, sequences)
    cells = [
        dict(zip((*PARTS, *SHARED), (*parts, *shared), strict=True))
        for parts in product(priors, guides, kinds)
    ]
    out = args.out or Path(f"runs/swap-{args.model}")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    earlier = json.loads(results.read_text()) if results.is_file() else []
    done = {key(cell): cell for cell in earlier}
    todo = [cell for cell in cells if key(cell) not in done]
    refused = {key(cell): reason for cell in todo if (reason := why_not(cell))}
    todo = [cell for cell in todo if key(cell) not in refused]
    with tqdm(total=len(todo), desc="cells") as bar:
        for cell in trained(todo, args.jobs):
            done[key(cell)] = cell
            write_json(results, [*done.values()])
            bar.set_postfix_str(" ".join([*filter(None, (cell[part] for part in PARTS))]))
            bar.update()
    text = report(cells, done, refused)
    (out / "table.md").write_text(text + "\n")
    heat_map(cells, done, out / "swap.png")
    print(f"{text}\n\nwritten: {out}/results.json, table.md, swap.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
