"""Which critic, and what for? Every divergence, view and role on one model.

    python examples/studies/critic_zoo.py --data vowels

A VRNN with a filtering guide, trained by the annealed ELBO, and the same with each critic: as a
penalty added to the KL (several divergences, views and pairings), in the prior, in place of the
guide's density, and as the twist of a filter. Settings are those of the tuned ELBO; weights of
penalties are the defaults of a row, the same for all that have one unit. A divergence without a
critic stands at the end of its group.

The table has the bounds, the split of the rate, the exact KL and W2 between guide and prior where
both are normal, and the time of a training with everything, over that of the ELBO's.
"""

import sys
from pathlib import Path

import synthetic
from common import Row, arguments, by_label, compare, markdown, mean, parse

from inference.divergences import DIVERGENCES
from pyro_avrnn.plots import style

TUNED = "guide=filtering,lr=0.0023,kl=0>1@0.25,clip_norm=1x,activation=silu"
PENALTY = f"{TUNED},weight=0>0.3@0.5"
GROUPS = {
    "bounds": [f"elbo-annealed:{TUNED}", f"fivo:{TUNED}"],
    "divergences, given h": [
        *(f"conditional+kl:{PENALTY},divergence={name}" for name in DIVERGENCES),
        f"conditional+kl:{PENALTY},divergence=mmd",
        f"conditional+kl:{PENALTY},divergence=sliced_wasserstein",
    ],
    "views": [f"{view}+kl:{PENALTY}" for view in ("marginal", "trajectory", "joint")],
    "free runs": [
        f"{view}+kl:{PENALTY},pairing=free_runs"
        for view in ("marginal", "trajectory_redrawn", "joint")
    ],
    "in the prior": [f"refined:{TUNED}", f"refined:{TUNED},stage=loop"],
    "for the guide's density": [
        f"avb:{TUNED.replace('filtering', 'implicit')},contrast={name}"
        for name in ("moments", "prior")
    ],
    "twist of a filter": [f"twisted:{TUNED}"],
}
COLUMNS = {
    "IWAE-64": "iwae_per_frame",
    "FIVO-64": "fivo_per_frame",
    "ELBO": "elbo_per_frame",
    "KL": "kl_per_frame",
    "information ≤": "information_at_most",
    "mismatch ≥": "aggregate_mismatch_at_least",
    "W2": "closed_form_w2_per_frame",
}


def short(label: str) -> str:
    """A row without the settings that all have."""
    for shared in (PENALTY, TUNED, TUNED.replace("filtering", "implicit")):
        label = label.replace(shared, "")
    return label.replace(":,", ":").rstrip(":")


def table(results: list[Row]) -> str:
    """A line a row, in groups; the bounds, and the gain over the ELBO seed by seed."""
    rows = by_label(results)
    base = {r["seed"]: r for r in next(iter(rows.values()))}
    lines = []
    for group, labels in GROUPS.items():
        for label in (name for name in labels if name in rows):
            mine = rows[label]
            gains = [r["iwae_per_frame"] - base[r["seed"]]["iwae_per_frame"] for r in mine]
            time = [r["seconds"] / base[r["seed"]]["seconds"] for r in mine]
            known = [[r[name] for r in mine if r[name] is not None] for name in COLUMNS.values()]
            lines.append(
                [group, f"`{short(label)}`", *(mean(values) if values else "" for values in known)]
                + [", ".join(f"{gain:+.2f}" for gain in gains), mean(time, 1)]
            )
    return markdown(["group", "row", *COLUMNS, "seed by seed", "time"], lines)


def picture(results: list[Row], path: Path) -> Path:
    """IWAE of every row, seed by seed; the line is the mean of the annealed ELBO."""
    rows = by_label(results)
    names = list(rows)
    drawn = style.figure(8.0, 1.2 + 0.26 * len(names), "IWAE, nats a frame, seed by seed")
    axes = drawn.subplots()
    for at, name in enumerate(names):
        bounds = [r["iwae_per_frame"] for r in rows[name]]
        axes.plot(bounds, [at] * len(bounds), "o", color=style.BLUE, ms=5)
    first = [r["iwae_per_frame"] for r in rows[names[0]]]
    axes.axvline(sum(first) / len(first), color=style.GREY, ls="--", lw=1)
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#E3E3E3", lw=0.6)
    return style.save(drawn, path)


def main() -> int:
    parser = arguments(__doc__, out="runs/critics", steps=1500)
    parser.add_argument("--data", default="vowels", help="what to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    args = parse(parser)
    sizes = {"z-dim": 8, "h-dim": 64, "batch-size": 64, "validate-every": 100, "patience": 10}
    if args.smoke:
        args.steps, args.data = 2, synthetic.waves(args.out)
        sizes |= {"z-dim": 2, "h-dim": 4, "validate-every": 1, "particles": 2}
    settings = {"data": args.data, "out": args.out, "steps": args.steps, "jobs": args.jobs}
    settings |= {"seeds": args.seeds, **sizes}
    rows = [row for group in GROUPS.values() for row in group]
    rows = [rows[0], rows[2], rows[-1]] if args.smoke else rows

    def shown(results: list[Row]) -> str:
        picture(results, args.out / "critics.png")
        return table(results)

    return compare(settings, rows, "critics.md", shown)


if __name__ == "__main__":
    sys.exit(main())
