"""Do f and z stay apart? Judges for the DSAEs of a finished ``avrnn compare``.

Source: Akuzawa et al. (2021), https://doi.org/10.1007/s10994-021-06032-4, who raise I(x; f) and
lower I(f; z) by an adversary; the model, Li and Mandt (2018), https://arxiv.org/abs/1803.02991.

    avrnn compare --data fsdd.zip --strings 3-5 --rows dsae dsae+mi dsae+adversary --out runs/f
    python examples/studies/global_features.py runs/f --data fsdd.zip

Each trained row is asked what f and z hold. A recurrent network reads the labels from draws of z,
as an average over time flatters: it hides what the order of steps says. A fresh critic estimates
I(f; z) on held-out codes. Then f is exchanged, and a judge of real data looks at what is emitted:

* **strings of digits**: the speaker is global, the digits are local. Each string is emitted with
  the f of a string by another speaker; a hit is a digit that is recognised in a string that has
  the voice of f.
* **single digits**: the digit is as global as the speaker. "same" takes f from another speaker
  saying the same digit, "different" one that says another.
* **sprites**: f is drawn from its prior and the action should stay, z is drawn from its prior and
  the four attributes should stay; what is drawn anew should be recognised by chance alone.
* **speech** (TIMIT, LibriSpeech; speakers of the test set are new): the equal error rate of
  verification by the cosine of codes of 200 ms; f should verify the speaker, z should not.

Writes global.json, global.md, and a picture of swaps of the first seed. Runs that are judged
already are kept. ``--smoke`` trains and judges synthetic digits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import synthetic
import torch
from common import Row, arguments, markdown, mean, parse, publish
from judges import JUDGES, swapped
from tqdm import tqdm

from inference.files import write_json
from pyro_avrnn import plots, recipes
from pyro_avrnn.cli import main as avrnn
from pyro_avrnn.cli.runs import commit, row_folder
from pyro_avrnn.data import Dataset, load, mel_to_waveform
from pyro_avrnn.data.sprites import ATTRIBUTES
from pyro_avrnn.media import write_wav

SMOKE = ["--z-dim", "3", "--h-dim", "12", "--steps", "40", "--validate-every", "20", "--jobs", "1"]


#: columns of the table after bound and audit, by data
ASKED = {
    "digits": ("speaker from f", "speaker from z", "digit from f", "digit from z", "same")
    + ("different",),
    "digits-strings": ("speaker from f", "speaker from z", "digit from z", "different"),
    "sprites": tuple(f"{name}, z redrawn" for name in ATTRIBUTES)
    + ("action, f redrawn", "action, z redrawn"),
    "timit": ("EER by f", "EER by z", "gap"),
    "librispeech": ("EER by f", "EER by z", "gap"),
}


def table(rows: list[Row]) -> str:
    """Make the table: mean and deviation over seeds, and the range of what is judged."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["row"], []).append(row)
    asked = [name for name in ASKED[rows[0]["data"]] if name in rows[0]]
    lines = []
    for label, group in groups.items():
        bound = mean([row["iwae_per_frame"] for row in group])
        keys = ("kl_f_per_sequence", "audit_information")
        nats = [mean([row[key] for row in group]) for key in keys]
        spans = [span([row[name] for row in group]) for name in asked]
        lines.append([f"`{label}`", bound, *nats, *spans])
    head = ("training", "IWAE, nats a frame", "KL of f", "I(f; z) ≥", *asked)
    ceiling = rows[0]["audit_ceiling"]
    real = [f"{k} {rows[0][k]:.2f}" for k in rows[0] if k.endswith("of real frames")]
    text = [markdown(head, lines)]
    text.append(
        f"Test sequences; {max(len(g) for g in groups.values())} seeds: mean ± deviation, or mean "
        f"[range]. KL of f and I(f; z): nats a sequence, I(f; z) by a fresh critic, at most "
        f"{ceiling:.2f}."
    )
    text += [f"The judges on real sequences: {', '.join(real)}."] if real else []
    return "\n\n".join(text)


def span(values: list[float]) -> str:
    """Mean and range."""
    inside = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{inside}"


def pictures(r: recipes.Recipe, data: Dataset, out: Path, name: str, seed: int) -> None:
    """Draw two sequences, emitted again, and with f swapped; write digits as sound."""
    test = data.test
    who = [name.split("_")[1] if "_" in name else name for name in test.names]
    two = test.select([0, next(i for i, w in enumerate(who) if w != who[0])])
    shown = {"recorded": two.x}
    for what, order in (("own f", [0, 1]), ("f of the other", [1, 0])):
        shown[what] = swapped(r, two, np.array(order), seed)
    sounds = {
        f"{who[i]}, {what}": (x[i, : int(two.lengths[i])] * data.std + data.mean).double()
        for i in (0, 1)
        for what, x in shown.items()
    }
    path = out / f"swap-{name}.png"
    title = "Log-mel frames; with the f of the other, the voice should change alone"
    plots.spectrograms(sounds, path, frame_seconds=data.frame_seconds, title=title)
    if data.name.startswith("digits"):
        for what, frames in sounds.items():
            wav = out / f"swap-{name}-{what.replace(', ', '-').replace(' ', '_')}.wav"
            write_wav(wav, mel_to_waveform(frames), 8_000)


def main() -> None:
    parser = arguments(__doc__, out=None)
    parser.add_argument("run", type=Path, nargs="?", help="folder of an avrnn compare")
    parser.add_argument("--data", type=Path, help="data of that comparison")
    args = parse(parser)
    if args.smoke:
        args.run, args.data = _smoke(args)
    if args.run is None or args.data is None:
        parser.error("a folder of a comparison and --data are needed (or --smoke)")
    torch.set_num_threads(1)  # the matrices are small
    results = args.run / "results.json"
    if not results.is_file():
        parser.error(f"no {results}; give the folder of an avrnn compare")
    trained = [r for r in json.loads(results.read_text()) if r["model"] == "dsae"]
    trained = [r for r in trained if not r["error"]]
    if not trained or trained[0]["data"] not in JUDGES:
        parser.error(
            f"{args.run} must hold finished rows of a DSAE, trained on {', '.join(JUDGES)}; only "
            "there it is known what f and z should hold"
        )
    data = load(str(args.data), **(trained[0]["reader"] or {}))
    path = args.run / "global.json"
    judged = json.loads(path.read_text()) if path.is_file() else []
    done = {(row["row"], row["seed"]) for row in judged}
    waiting = [r for r in trained if (r["row"], r["seed"]) not in done]
    judge = JUDGES[data.name](data, args.smoke) if waiting else None
    for result in tqdm(waiting, "judging", unit="row"):
        folder = row_folder(args.run, result["row"], result["seed"])
        r = recipes.load(folder / "parameters.pt")
        keep = (
            "row",
            "seed",
            "data",
            "iwae_per_frame",
            "elbo_per_frame",
            "kl_per_frame",
            "seconds",
        )
        found = {"judged_at": commit(), **{name: result[name] for name in keep}}
        judged.append(found | judge(r, result["seed"]))  # type: ignore[misc]
        write_json(path, judged)
        if result["seed"] == trained[0]["seed"] and data.name != "sprites":
            pictures(r, data, args.run, folder.name, result["seed"])
    publish(args.run, "global.md", table(judged), "global.json")


def _smoke(args: argparse.Namespace) -> tuple[Path, Path]:
    """Train two rows for a moment on tones that stand for digits."""
    out = args.out or Path("runs/global-smoke")
    out.mkdir(parents=True, exist_ok=True)
    source = synthetic.digits(out)
    options = ["--data", str(source), *SMOKE, "--out", str(out), "--overwrite", "--rows"]
    if avrnn(["compare", *options, "dsae:f_dim=4", "dsae+adversary:f_dim=4,critic_dim=8"]):
        raise SystemExit(1)
    return out, source


if __name__ == "__main__":
    main()
