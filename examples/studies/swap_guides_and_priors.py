"""What do another guide, another prior, another cell do? Each is one changed argument.

Sources: filtering guide and conditional prior, Chung et al. (2015),
https://arxiv.org/abs/1506.02216; residual guides, Fraccaro et al. (2016),
https://arxiv.org/abs/1605.07571; standard-normal prior and a guide of x up to t, Bayer and
Osendorfer (2014), https://arxiv.org/abs/1411.7610; gated prior and smoothing guides, Krishnan et
al. (2017), https://arxiv.org/abs/1609.09869; flows as priors, Dinh et al. (2017),
https://arxiv.org/abs/1605.08803, and as guides, Kingma et al. (2016),
https://arxiv.org/abs/1606.04934.

    python examples/studies/swap_guides_and_priors.py              # a VRNN's 5 priors x 9 guides
    python examples/studies/swap_guides_and_priors.py --cells gru lstm --jobs 2
    python examples/studies/swap_guides_and_priors.py --model dmm --guides smoothing smoothing_flow

Every cell of the grid is one training by the annealed ELBO, scored on held-out sequences. A "-"
marks parts that do not go together; a sentence below the table says why. Finished cells stay in
results.json: an interrupted run continues, and a run with more cells adds to the file.

600 steps are few, and a cell has one seed: read rows and columns, not single cells. Differences
below 0.3 nats may be noise; repeat with another --seed before you believe them, and with more
--steps before you call a slow learner bad. The defaults take about 20 minutes on one core.
"""

import argparse
import json
import math
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import arguments, in_processes, markdown, parse, publish, train_and_score
from matplotlib.axes import Axes
from tqdm import tqdm

from inference import seeded
from inference.files import write_json
from pyro_avrnn import recipes
from pyro_avrnn.data import Dataset, load
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.networks import CELLS
from pyro_avrnn.plots import style
from pyro_avrnn.priors import PRIORS

Cell = dict[str, Any]  # the parts, what all cells share and, when finished, its numbers
Key = tuple[Any, ...]
PARTS = ("prior", "guide", "cell")
SHARED = ("model", "data", "steps", "seed", "few")
COLUMNS = {  # of the table: head -> key of a cell, digits
    "IWAE-64": ("iwae_per_frame", 2),
    "± se": ("iwae_per_frame_se", 2),
    "ELBO": ("elbo_per_frame", 2),
    "KL": ("kl_per_frame", 2),
    "best step": ("best_step", 0),
    "seconds": ("seconds", 0),
}


@cache
def dataset(source: str) -> Dataset:
    """Read the data, once a process."""
    return load(source)


def assemble(cell: Cell) -> recipes.Recipe:
    """Swap the parts; parameters are drawn from torch's global state."""
    data = dataset(cell["data"])
    parts = {part: cell[part] for part in PARTS if cell[part] is not None}
    make = recipes.RECIPES[cell["model"]]
    return make(x_dim=data.x_dim, z_dim=8, h_dim=64, **data.emission, **parts)


def train(cell: Cell) -> Cell:
    """Train one cell and score it on the test split."""
    data = dataset(cell["data"])
    found = train_and_score(
        partial(assemble, cell),
        data,
        data.test if cell["few"] is None else data.test.select(range(cell["few"])),
        steps=cell["steps"],
        seed=cell["seed"],
        validations=20,
        filtered=False,
    )
    return cell | found


def why_not(cell: Cell) -> str | None:
    """Say in one sentence why these parts do not go together; None if they do."""
    try:
        with seeded(0):
            assemble(cell)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return None


def key(cell: Cell) -> Key:
    """Identify a cell by its parts and by what all cells share."""
    return tuple(cell.get(name) for name in (*PARTS, *SHARED))


def names(cell: Cell) -> list[str]:
    """List the parts; a model without a recurrent cell has two."""
    return [cell[part] for part in PARTS if cell[part] is not None]


def report(cells: list[Cell], done: dict[Key, Cell], refused: dict[Key, str]) -> str:
    """Make the table of all cells, followed by the reasons for missing ones."""
    rows = [done.get(key(cell), {}) for cell in cells]
    lines = [
        [cell[part] or "" for part in PARTS] + [show(row, *what) for what in COLUMNS.values()]
        for cell, row in zip(cells, rows, strict=True)
    ]
    reasons: dict[str, list[str]] = {}
    for cell, row in zip(cells, rows, strict=True):
        if reason := refused.get(key(cell)) or row.get("error"):
            reasons.setdefault(reason, []).append(" x ".join(names(cell)))
    first = cells[0]
    commits = sorted({row["commit"] or "unknown" for row in rows if row})
    return "\n".join(
        [
            markdown([*PARTS, *COLUMNS], lines),
            "",
            f"{first['model']} on {first['data']}, {first['steps']} steps, seed {first['seed']}; "
            "nats per frame of the test split, se: standard error over its sequences. Commit "
            f"{', '.join(commits)}.",
            "",
            *(f"- {', '.join(pairs)}: {reason}." for reason, pairs in reasons.items()),
        ]
    )


def show(row: Cell, name: str, digits: int) -> str:
    """Write a number of the cell; "-" if it has none."""
    value = row.get(name)
    return "-" if value is None else f"{value:.{digits}f}"


def heat_map(cells: list[Cell], done: dict[Key, Cell], path: Path) -> None:
    """Draw IWAE-64 of priors x guides, one panel for each recurrent cell."""
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
    """Write each value into its cell, "-" where there is none."""
    for (i, row), j in product(enumerate(grid), range(len(grid[0]))):
        value = row[j]
        text = "-" if value is None else style.show(value)
        colour = "black" if value is None or value > middle else "white"  # on yellow, on blue
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)


def read_arguments() -> argparse.Namespace:
    """Read the command line; ``--smoke`` runs a corner of the grid with one refused pair."""
    parser = arguments(__doc__, out=None, steps=600)
    known = [*GUIDES, *recipes.OF_DSAE]
    parser.add_argument("--model", choices=recipes.WITH_LATENTS, default="vrnn")
    parser.add_argument("--priors", nargs="+", choices=[*PRIORS], default=[*PRIORS])
    parser.add_argument("--guides", nargs="+", choices=known, help="default: all of the model")
    parser.add_argument("--cells", nargs="+", choices=[*CELLS], default=["gru"])
    parser.add_argument("--data", default="vowels", help="vowels, TIMIT, .mat or .npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    args = parse(parser)
    args.guides = args.guides or known[: None if args.model == "dsae" else len(GUIDES)]
    args.few = None
    if args.smoke:
        args.priors, args.guides = ["conditional", "flow"], ["filtering", "residual"]
        args.steps, args.few = 5, 40
    if "cell" not in recipes.OWN[args.model]:
        args.cells = [None]
    return args


def main() -> None:
    args = read_arguments()
    shared = {name: getattr(args, name) for name in SHARED}
    grid = product(args.priors, args.guides, args.cells)
    cells = [dict(zip(PARTS, parts, strict=True)) | shared for parts in grid]
    out = args.out or Path(f"runs/swap-{args.model}")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    earlier = json.loads(results.read_text()) if results.is_file() else []
    done = {key(cell): cell for cell in earlier}
    todo = [cell for cell in cells if key(cell) not in done]
    refused = {key(cell): reason for cell in todo if (reason := why_not(cell))}
    todo = [cell for cell in todo if key(cell) not in refused]
    with tqdm(in_processes(train, todo, args.jobs), desc="cells", total=len(todo)) as bar:
        for cell in bar:
            done[key(cell)] = cell
            write_json(results, [*done.values()])
            bar.set_postfix_str(" ".join(names(cell)))
    heat_map(cells, done, out / "swap.png")
    publish(out, "table.md", report(cells, done, refused), "results.json", "swap.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
