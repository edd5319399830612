"""What does the global latent of a DSAE hold? Spoken digits: who speaks, and which digit.

Source: the model, Li and Mandt (2018), https://arxiv.org/abs/1803.02991; the probe, Akuzawa et
al. (2021), https://doi.org/10.1007/s10994-021-06032-4: a logistic regression that reads the
speaker from f (wanted) and from z averaged over time (not wanted), and the digit from both.

    python examples/global_features.py --data fsdd.zip [--guide factorised] [--kl-ramp 0.5]

The DSAE is trained by the plain ELBO of log-mel frames, from the first step on unless
``--kl-ramp`` says otherwise. Probes are fitted on codes of the training takes and judged on the
official test takes, which have the same six speakers: nothing here is about new voices. ``swap``
gives every test recording the f of another speaker saying the same digit; a probe of real frames,
averaged over time, then says whose voice the emitted frames have. Runs with the same ``--out``
share one table. ``--smoke`` needs no data.

Expect the structure alone not to disentangle: the speaker is read from f with an accuracy of 1.00
and from averaged z with 0.8 (time-averaged frames: 0.98), the digit with 0.98 and 0.8; a swapped f
takes the voice along in nine of ten recordings. What the *average* of z does not hold may be in
its path. The scale floor is 0.001 deviations. About 6 minutes a seed on a core of its own.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from torch.distributions import kl_divergence

from inference import ELBO, Ramp, evaluate, fit, seeded
from inference.modes import evaluating
from inference.probes import LinearProbe, sequence_codes
from pyro_avrnn import recipes
from pyro_avrnn.cli.runs import commit, write_json
from pyro_avrnn.data import Batches, Dataset, Sequences
from pyro_avrnn.data.digits import labels, mel_to_waveform, spoken_digits
from pyro_avrnn.generation import swap_f
from pyro_avrnn.media import picture_spectrograms, write_wav

SETTINGS: dict[str, Any] = {
    "z_dim": 16,
    "f_dim": 32,
    "h_dim": 96,
    "batch_size": 64,
    "lr": 2e-3,  # falls to a tenth over the run
    "clip_norm": 5.0,
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


def tones(n_mels: int = 12) -> Dataset:
    """Sequences whose offset is the speaker and whose modulation the digit, for a smoke test."""
    random = np.random.default_rng(0)
    voices, spectra = random.normal(size=(3, n_mels)), random.normal(size=(3, n_mels))
    frames: dict[str, list[np.ndarray]] = {"train": [], "valid": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for digit in range(3):
        for who, speaker in enumerate(("ada", "ben", "cleo")):
            for take in range(20):
                time = np.linspace(0, 1, random.integers(8, 14))[:, None]
                wave = np.sin(2 * np.pi * (digit + 1) * time) * spectra[digit]
                split = "test" if take < 5 else "valid" if take < 10 else "train"
                frames[split].append(voices[who] + wave + 0.1 * random.normal(size=wave.shape))
                names[split].append(f"{digit}_{speaker}_{take}")
    splits = [Sequences.from_list(frames[k], names[k]) for k in frames]
    return Dataset("tones", *splits, 0.0, 1.0, "real", 0.016, None, "synthetic")


def train(
    data: Dataset, guide: str, kl_ramp: float, seed: int, settings: dict[str, Any]
) -> tuple[recipes.Recipe, dict[str, Any]]:
    """A DSAE, best by the ELBO of the validation takes, and what the training says of itself."""
    with pyro.get_param_store().scope(), seeded(seed):
        sizes = {name: settings[name] for name in ("z_dim", "h_dim", "f_dim")}
        r = recipes.dsae(x_dim=data.x_dim, **sizes, emission="normal", guide=guide)
        loss = ELBO(kl_weight=Ramp(0, 1, over=kl_ramp) if kl_ramp else 1.0)
        history = fit(
            SVI(r.model, r.guide, pyro.optim.Adam({"lr": settings["lr"]}), loss),
            Batches(data.train, settings["batch_size"], seed=seed),
            steps=settings["steps"],
            validation=(data.valid.x, data.valid.mask),
            validate_every=max(settings["steps"] // 20, 1),
            num_particles=1,
            clip_norm=settings["clip_norm"],
            lr_schedule=lambda at: 1.0 - 0.9 * at,
            seed=seed,
            description=f"{label(guide, kl_ramp)}, seed {seed}",
        )
    return r, {
        "validation_elbo_per_frame": history.best_bound,
        "best_step": history.best_step,
        "seconds": round(history.seconds, 1),
        "parameters": sum(p.numel() for m in (r.model, r.guide) for p in m.parameters()),
    }


def judge(r: recipes.Recipe, data: Dataset, seed: int, particles: int) -> dict[str, Any]:
    """Bounds, the rate of f and of z, and probes, all on the test takes."""
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
    digits, speakers = zip(*(labels(part) for part in (data.train, test)), strict=True)
    probes: dict[tuple[str, str], LinearProbe] = {}
    found: dict[str, Any] = {}
    for name in NAMES:
        for what, (known, asked) in (("speaker", speakers), ("digit", digits)):
            probes[name, what] = LinearProbe(codes["train"][name], known)
            score = probes[name, what].score(codes["test"][name], asked)
            found.setdefault(name, {})[what] = score._asdict()
    return {
        **e.as_dict(),
        "kl_f_per_sequence": float(kl_f.mean()),
        "kl_z_per_frame": e.closed_form_kl_per_frame - float(kl_f.sum()) / test.num_frames,
        # of a standard normal prior: Burda et al. (2016), over sequences
        "active_units_f": int((codes["test"]["f"].var(dim=0) > 0.01).sum()),
        "probes": found,
        "swap": heard(r, test, {w: probes["frames", w] for w in WHAT}, seed),
    }


def heard(
    r: recipes.Recipe, test: Sequences, probes: dict[str, LinearProbe], seed: int
) -> dict[str, dict[str, float]]:
    """What probes of real frames find in emitted ones, with their own f and with another's."""
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


def average(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Over the frames a sequence has, (B, X)."""
    return x.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # padding is 0


def pictures(
    r: recipes.Recipe, data: Dataset, pair: list[str] | None, out: Path, name: str, seed: int
) -> None:
    """Two recordings of one digit by two speakers, emitted again, and with f swapped."""
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
    picture_spectrograms(
        out / f"swap-{name}.png", sounds, frame_seconds=data.frame_seconds, title=title
    )
    if data.name == "digits":  # only there a frame is one of a waveform
        for what, frames in sounds.items():
            wav = out / f"swap-{name}-{what.replace(', ', '-').replace(' ', '_')}.wav"
            write_wav(wav, mel_to_waveform(frames), 8_000)


def label(guide: str, kl_ramp: float) -> str:
    return guide if not kl_ramp else f"{guide}, KL ramp {kl_ramp:g}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: bounds, probes and swaps of every training, its seeds beside each other."""
    trainings: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for r in results:
        trainings.setdefault((r["data"], r["row"], r["settings"]["steps"]), []).append(r)
    lines = ["| data | guide | steps | seeds | ELBO | IWAE | KL of f | active f | KL of z |"]
    lines.append("|" + "---|" * 9)
    for (data, name, steps), rows in trainings.items():
        cells = [data, name, str(steps), listed(rows, "seed", digits=0)]
        cells += [listed(rows, f"{bound}_per_frame", digits=2) for bound in ("elbo", "iwae")]
        cells += [listed(rows, "kl_f_per_sequence", digits=1)]
        cells += [listed(rows, "active_units_f", digits=0), listed(rows, "kl_z_per_frame")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Nats a frame, but KL of f: nats a sequence. Test takes throughout."]
    for (data, name, steps), rows in trainings.items():
        lines += ["", f"**{data}, {name}, {steps} steps**: accuracy of a logistic regression", ""]
        lines += ["| read from | speaker | digit |", "|---|---|---|"]
        for code, says in NAMES.items():
            both = [listed(rows, "probes", code, what, "accuracy") for what in WHAT]
            lines.append(f"| {says} | {' | '.join(both)} |")
        for says, key in (("chance", "chance"), ("the largest class", "largest_class")):
            both = [f"{rows[0]['probes']['f'][what][key]:.3f}" for what in WHAT]
            lines.append(f"| {says} | {' | '.join(both)} |")
        lines += ["", "| probes of frames, on frames emitted with | speaker of f | speaker of z |"]
        lines[-1] += " digit |\n|---|---|---|---|"
        for order, by in rows[0]["swap"].items():
            cells = [listed(rows, "swap", order, key) for key in by]
            lines.append(f"| {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(rows: list[dict[str, Any]], *path: str, digits: int = 3) -> str:
    """What lies at that path in each row."""
    values: list[Any] = rows
    for key in path:
        values = [value[key] for value in values]
    return ", ".join(f"{value:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="FSDD: a folder or zip with its recordings")
    parser.add_argument("--guide", choices=["full", "factorised"], default="full")
    parser.add_argument(
        "--kl-ramp", type=float, default=0.0, help="share of the run the KL's weight rises over"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="SVI steps, if not those of the table")
    parser.add_argument(
        "--pair", nargs=2, metavar="DIGIT_SPEAKER_TAKE", help="test recordings to swap f between"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/global"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.data is None and not args.smoke:
        parser.error("--data is needed: a folder or zip of FSDD (or --smoke)")
    settings = SETTINGS | (SMOKE if args.smoke else {})
    settings |= {"steps": args.steps} if args.steps else {}
    data = spoken_digits(args.data) if args.data else tones()
    if args.pair and not {*args.pair} <= {*data.test.names}:
        parser.error(f"--pair must name two test recordings, such as {data.test.names[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    named = f"--data {args.data.name}" if args.data else "--smoke"  # not where it lies
    command = f"python examples/global_features.py {named} --guide {args.guide}"
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
    text = table(results)
    (args.out / "global.md").write_text(text + "\n")
    print(f"{text}\n\nwritten: {args.out}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
