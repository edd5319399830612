"""What does the global latent of a DSAE hold? Spoken digits: who speaks, and which digit.

Source: the model, Li and Mandt (2018), https://arxiv.org/abs/1803.02991; the probe, Akuzawa et
al. (2021), https://doi.org/10.1007/s10994-021-06032-4: a logistic regression that reads the
speaker from f (wanted) and from z averaged over time (not wanted), and the digit from both.

    python examples/studies/global_features.py --data fsdd.zip [--guide factorised] [--kl-ramp 0.5]

The DSAE learns log-mel frames by the plain ELBO, from the first step on unless ``--kl-ramp`` is
given. Probes are fitted on codes of the training takes and scored on the official test takes,
which have the same six speakers: nothing here is about new voices. Each test recording is also
emitted with the f of another speaker saying the same digit. A probe of real frames, averaged over
time, then decides whose voice the emitted frames have. Runs with the same ``--out`` share one
table. ``--smoke`` needs no data.

Expect that the structure alone does not disentangle: the speaker is read from f with an accuracy
of 1.00 and from averaged z with 0.8 (time-averaged frames: 0.98), the digit with 0.98 and 0.8. A
swapped f takes the voice along in nine of ten recordings. The path of z may hold what its average
does not. The scale floor is 0.001 deviations. About 6 minutes a seed on an otherwise idle core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import synthetic
import torch
from common import Row, arguments, count_parameters, markdown, parse, publish
from common import train as train_by
from torch import Tensor
from torch.distributions import kl_divergence

from inference import ELBO, Ramp, evaluate, seeded
from inference.files import write_json
from inference.modes import evaluating
from inference.probes import LinearProbe, sequence_codes
from pyro_avrnn import plots, recipes
from pyro_avrnn.cli.runs import commit
from pyro_avrnn.data import Dataset, Sequences, mel_to_waveform, spoken_digits
from pyro_avrnn.data.digits import labels
from pyro_avrnn.generation import swap_f
from pyro_avrnn.media import write_wav

SETTINGS: dict[str, Any] = {
    "z_dim": 16,
    "f_dim": 32,
    "h_dim": 96,
    "batch_size": 64,
    "lr": 2e-3,  # falls to a tenth over the run
    "steps": 2500,
    "particles": 16,  # of IWAE
}
SMOKE = {"z_dim": 4, "f_dim": 4, "h_dim": 16, "steps": 60, "lr": 1e-2}
WHAT = ("speaker", "digit")
NAMES = {
    "f": "mean of f",
    "z": "mean of z, averaged over time",
    "f_draw": "a draw of f",
    "z_draw": "a draw of z, averaged over time",
    "frames": "log-mel frames, averaged over time (no model)",
}


def train(
    data: Dataset, guide: str, kl_ramp: float, seed: int, settings: dict[str, Any]
) -> tuple[recipes.Recipe, Row]:
    """Train a DSAE, stopped by the ELBO of the validation takes; also return its best step."""
    with pyro.get_param_store().scope(), seeded(seed):
        sizes = {name: settings[name] for name in ("z_dim", "h_dim", "f_dim")}
        r = recipes.dsae(x_dim=data.x_dim, **sizes, emission="normal", guide=guide)
        history = train_by(
            r,
            ELBO(kl_weight=Ramp(0, 1, over=kl_ramp) if kl_ramp else 1.0),
            data,
            **{name: settings[name] for name in ("steps", "lr", "batch_size")},
            seed=seed,
            lr_decay=True,
            num_particles=1,
            title=f"{label(guide, kl_ramp)}, seed {seed}",
        )
    return r, {
        "validation_elbo_per_frame": history.best_bound,
        "best_step": history.best_step,
        "seconds": round(history.seconds, 1),
        "parameters": count_parameters(r),
    }


def judge(r: recipes.Recipe, data: Dataset, seed: int, particles: int) -> Row:
    """Compute bounds, the rate of f and of z, and probes, all on the test takes."""
    test = data.test
    e = evaluate(r.model, r.guide, test.x, test.mask, num_particles=particles, seed=seed)
    with torch.no_grad(), seeded(seed), evaluating(r.model, r.guide):
        d = r.model.rollout(r.guide, test.x, test.mask)
        kl_f = kl_divergence(d.proposal_f, d.prior_f)  # (B,)
    codes: dict[str, dict[str, Any]] = {}
    for split in ("train", "test"):
        part = getattr(data, split)
        codes[split] = sequence_codes(r.model, r.guide, part.x, part.mask, seed=seed)._asdict()
        codes[split]["frames"] = average(part.x, part.mask)
    known, asked = answers(data.train), answers(test)
    probes = {
        name: {what: LinearProbe(codes["train"][name], known[what]) for what in WHAT}
        for name in NAMES
    }
    return {
        **e.as_dict(),
        "kl_f_per_sequence": float(kl_f.mean()),
        "kl_z_per_frame": e.closed_form_kl_per_frame - float(kl_f.sum()) / test.num_frames,
        # of a standard normal prior: Burda et al. (2016), over sequences
        "active_units_f": int((codes["test"]["f"].var(dim=0) > 0.01).sum()),
        "probes": {
            name: {w: probes[name][w].score(codes["test"][name], asked[w])._asdict() for w in WHAT}
            for name in NAMES
        },
        "swap": heard(r, test, probes["frames"], seed),
    }


def answers(part: Sequences) -> dict[str, np.ndarray]:
    """List the true speaker and digit of each recording."""
    digits, speakers = labels(part)
    return {"speaker": speakers, "digit": digits}


def heard(
    r: recipes.Recipe, test: Sequences, probes: dict[str, LinearProbe], seed: int
) -> dict[str, dict[str, float]]:
    """Score probes of real frames on emitted ones, with their own f and with another's."""
    digits, speakers = labels(test)
    random = np.random.default_rng(seed)
    alike = (digits == digits[:, None]) & (speakers != speakers[:, None])  # (B, B)
    others = np.array([random.choice(np.flatnonzero(row)) for row in alike])
    found = {}
    for name, order in (("own f", np.arange(len(test))), ("another speaker's f", others)):
        with seeded(seed):
            x = swap_f(r.model, r.guide, test.x, torch.as_tensor(order), test.mask)
        said = average(x, test.mask)
        who = probes["speaker"].predict(said)
        found[name] = {
            "speaker of f": float((who == speakers[order]).mean()),
            "speaker of z": float((who == speakers).mean()),
            "digit": float((probes["digit"].predict(said) == digits).mean()),
        }
    return found


def average(x: Tensor, mask: Tensor) -> Tensor:
    """Average over the frames of each sequence, (B, X)."""
    return x.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # padding is 0


def pictures(
    r: recipes.Recipe, data: Dataset, pair: list[str] | None, out: Path, name: str, seed: int
) -> None:
    """Draw two recordings of one digit by two speakers, emitted again, and with f swapped."""
    test = data.test
    if pair is None:
        digits, speakers = labels(test)
        other = np.flatnonzero((digits == digits[0]) & (speakers != speakers[0]))[0]
        pair = [test.names[0], test.names[other]]
    two = test.select([test.names.index(one) for one in pair])
    spoken = {"recorded": two.x}
    for what, order in (("own f", [0, 1]), ("f swapped", [1, 0])):
        with seeded(seed):  # the same z in both
            spoken[what] = swap_f(r.model, r.guide, two.x, order, two.mask)
    sounds = {
        f"{pair[i]}, {what}": (x[i, : int(two.lengths[i])] * data.std + data.mean).double()
        for i in (0, 1)
        for what, x in spoken.items()
    }
    title = "Log-mel frames; with f swapped, the voice should be the other's"
    path = out / f"swap-{name}.png"
    plots.spectrograms(sounds, path, frame_seconds=data.frame_seconds, title=title)
    if data.name == "digits":  # only there a frame is one of a waveform
        for what, frames in sounds.items():
            wav = out / f"swap-{name}-{what.replace(', ', '-').replace(' ', '_')}.wav"
            write_wav(wav, mel_to_waveform(frames), 8_000)


def label(guide: str, kl_ramp: float) -> str:
    """Name a training in the table."""
    return guide if not kl_ramp else f"{guide}, KL ramp {kl_ramp:g}"


def table(results: list[Row]) -> str:
    """Make the tables of bounds, probes and swaps; a cell lists the seeds of a training."""
    trainings: dict[tuple[str, str, int], list[Row]] = {}
    for r in results:
        trainings.setdefault((r["data"], r["row"], r["settings"]["steps"]), []).append(r)
    lines = []
    for at, rows in trainings.items():
        bounds = [listed(rows, f"{bound}_per_frame", digits=2) for bound in ("elbo", "iwae")]
        kl_f, kl_z = listed(rows, "kl_f_per_sequence", digits=1), listed(rows, "kl_z_per_frame")
        active = listed(rows, "active_units_f", digits=0)
        lines.append([*at, listed(rows, "seed", digits=0), *bounds, kl_f, active, kl_z])
    heads = "data", "guide", "steps", "seeds", "ELBO", "IWAE", "KL of f", "active f", "KL of z"
    parts = [markdown(heads, lines)]
    parts.append("Nats a frame; KL of f: nats a sequence. All numbers are of the test takes.")
    for (data, name, steps), rows in trainings.items():
        parts.append(f"**{data}, {name}, {steps} steps**: accuracy of a logistic regression")
        parts += [read(rows), swapped(rows)]
    return "\n\n".join(parts)


def read(rows: list[Row]) -> str:
    """Make the table of what can be read from each code."""
    lines = [
        [says, *(listed(rows, "probes", code, what, "accuracy") for what in WHAT)]
        for code, says in NAMES.items()
    ]
    for says, key in (("chance", "chance"), ("the largest class", "largest_class")):
        lines.append([says, *(listed(rows[:1], "probes", "f", what, key) for what in WHAT)])
    return markdown(["read from", *WHAT], lines)


def swapped(rows: list[Row]) -> str:
    """Make the table of what probes of frames find in emitted frames."""
    found = rows[0]["swap"]
    lines = [
        [whose, *(listed(rows, "swap", whose, key) for key in found[whose])] for whose in found
    ]
    heads = ["probes of frames, on frames emitted with", "speaker of f", "speaker of z", "digit"]
    return markdown(heads, lines)


def listed(rows: list[Row], *path: str, digits: int = 3) -> str:
    """List what lies at that path in each row."""
    values: list[Any] = rows
    for key in path:
        values = [value[key] for value in values]
    return ", ".join(f"{value:.{digits}f}" for value in values)


def read_arguments() -> tuple[argparse.Namespace, Dataset, dict[str, Any]]:
    """Read the command line, the data and the settings of a training."""
    parser = arguments(__doc__, out="runs/global")
    parser.add_argument("--data", type=Path, help="FSDD: a folder or zip with its recordings")
    parser.add_argument("--guide", choices=["full", "factorised"], default="full")
    parser.add_argument(
        "--kl-ramp", type=float, default=0.0, help="share of the run in which the KL weight rises"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="SVI steps, if not those of the table")
    parser.add_argument(
        "--pair", nargs=2, metavar="DIGIT_SPEAKER_TAKE", help="test recordings to swap f between"
    )
    args = parse(parser, needed="--data, a folder or zip of FSDD,")
    settings = SETTINGS | (SMOKE if args.smoke else {})
    settings |= {"steps": args.steps} if args.steps else {}
    data = spoken_digits(args.data) if args.data else synthetic.digits()
    if args.pair and not {*args.pair} <= {*data.test.names}:
        parser.error(f"--pair must name two test recordings, such as {data.test.names[0]}")
    return args, data, settings


def main() -> None:
    args, data, settings = read_arguments()
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    named = f"--data {args.data.name}" if args.data else "--smoke"  # not where it lies
    command = f"python examples/studies/global_features.py {named} --guide {args.guide}"
    command += f" --kl-ramp {args.kl_ramp:g} --seeds {args.seeds} --steps {settings['steps']}"
    for seed in range(args.seeds):
        r, training = train(data, args.guide, args.kl_ramp, seed, settings)
        row = {
            "row": label(args.guide, args.kl_ramp),
            "model": "dsae",
            "objective": "ELBO",
            "guide": args.guide,
            "kl_ramp": args.kl_ramp,
            "seed": seed,
            "data": data.name,
            "split": "test",
            "commit": commit(),
            "command": command,
            "settings": settings,
            **training,
            **judge(r, data, seed, settings["particles"]),
        }
        same = ("data", "row", "seed")
        results = [old for old in results if any(old[k] != row[k] for k in same)] + [row]
        write_json(path, results)
        name = f"{row['row'].replace(', ', '-').replace(' ', '_')}-seed{seed}"
        recipes.save(r, args.out / f"{name}.pt")
        if seed == 0:
            pictures(r, data, args.pair, args.out, name, seed)
    publish(args.out, "global.md", table(results), "results.json")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
