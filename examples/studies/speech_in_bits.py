"""Do latents pay for speech, counted in bits? RNN, VRNN, SRNN and STORN on mu-law TIMIT.

Source: Havtorn et al. (2022), https://arxiv.org/abs/2202.12707: 16-bit mu-law samples, 64 a step,
each scored by a discretised mixture of 10 logistics. Bits a sample do not depend on a floor under
a scale, as Gaussian densities of waveforms do, so they compare between papers that use the same
corpus; the sample of 160 utterances that NLTK distributes is a fortieth of it.

    python examples/speech_in_bits.py timit.zip --seeds 2

A bound over a set is the sum over its samples divided by their number; latent models are scored
by the best of ELBO, IWAE and FIVO. Training, validation and test speakers are disjoint.
Interrupted, the same command goes on where it was. The best row speaks: WAV files and their
spectrograms in ``generated``. ``--smoke`` needs no data.

Expect all models far under the uniform 16.00, and far above one histogram of all levels: 16-bit
mu-law samples reach few of the levels where they are quiet (the cells of -1, 0 and 1 lie 3,000
levels apart), which the histogram knows and logistics cannot single out. The reading is in
RESULTS.md. About 25 minutes a seed on two cores.
"""

import argparse
import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import soundfile

from pyro_avrnn.cli import main as avrnn

#: every latent model by the annealed ELBO; sizes are shared, parameters are in the table
ROWS = {
    "rnn": "rnn:activation=silu",
    "storn": "elbo-annealed:model=storn,activation=silu",
    "vrnn": "elbo-annealed:model=vrnn,activation=silu",
    "srnn": "elbo-annealed:model=srnn,activation=silu",
}
SETTINGS: dict[str, Any] = {
    "frame": 64,
    "mu-law": 16,
    "segment": 100,
    "z-dim": 32,
    "h-dim": 128,
    "batch-size": 32,
    "lr": 0.002,
    "steps": 800,
    "validate-every": 100,
    "particles": 16,
}
SMOKE = {"frame": 16, "z-dim": 2, "h-dim": 4, "steps": 2, "particles": 4, "validate-every": 1}
#: (model, bits a sample with 64 samples a step), read in the thesis; the whole corpus
PUBLISHED = [("WaveNet", 13.30), ("LSTM", 13.27), ("VRNN", 12.54), ("SRNN", 12.42)]
SOURCE = """\
Published: Havtorn, DTU thesis, full TIMIT (4,620 training utterances), latent models as upper
bounds. Ours: 120 training utterances, so the two do not compare; the order of models may."""


def tones(path: Path) -> Path:
    """A few decaying tones laid out as TIMIT, for a smoke test without speech."""
    random = np.random.default_rng(0)
    time = np.arange(1600) / 16_000
    with zipfile.ZipFile(path, "w") as archive:
        for region in (1, 2, 7, 8):
            for take in range(3):
                wave = np.sin(2 * np.pi * random.uniform(100, 900) * time) * np.exp(-20 * time)
                content = io.BytesIO()
                soundfile.write(content, 0.3 * wave, 16_000, format="WAV", subtype="PCM_16")
                name = f"timit/dr{region}-fabc{region}/sx{take}.wav"
                archive.writestr(name, content.getvalue())
    return path


def table(results: list[dict[str, Any]]) -> str:
    """Bits a sample by model and seed, beside what is published."""
    lines = ["| model | parameters | bits a sample, seed by seed | mean | KL, nats a step |"]
    lines.append("|---|---|---|---|---|")
    for label in dict.fromkeys(r["row"] for r in results):
        of_row = [r for r in results if r["row"] == label and not r["error"]]
        if not of_row:
            continue
        bits = [r["bits_per_sample"] for r in of_row]
        listed = ", ".join(f"{b:.3f}" for b in bits)
        kl = fmean(r["kl_per_frame"] for r in of_row)
        parameters = of_row[0]["parameters"]
        lines.append(f"| {label} | {parameters} | {listed} | {fmean(bits):.3f} | {kl:.2f} |")
    first = results[0]
    frame = first["reader"]["frame"]
    samples = first["frames"] * frame
    baseline = -first["baseline_per_frame"] / np.log(2.0) / frame
    lines += [
        f"| one histogram of all levels | | {baseline:.3f} | {baseline:.3f} | |",
        "",
        f"{first['data']}, {first['split']} split: {samples:,} samples.",
        "",
        "| published, 64 samples a step | bits |",
        "|---|---|",
        *(f"| {name} | {bits:.2f} |" for name, bits in PUBLISHED),
        "",
        *SOURCE.splitlines(),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="a TIMIT folder or zip")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="SVI steps, if not those of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/speech"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.data is None and not args.smoke:
        parser.error("a TIMIT folder or zip is needed (or --smoke)")
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or tones(Path(folder) / "tones.zip")
        settings = SETTINGS | (SMOKE if args.smoke else {})
        settings |= {"steps": args.steps} if args.steps else {}
        settings |= {"seeds": args.seeds, "jobs": args.jobs, "data": source, "out": args.out}
        given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        rows = [ROWS[name] for name in args.rows]
        status = avrnn(["compare", *given, "--lr-decay", "--resume", "--rows", *rows])
        if status > 1:  # 1: some training stopped early
            return status
        text = table(json.loads((args.out / "results.json").read_text()))
        (args.out / "bits.md").write_text(text + "\n")
        print(f"\n{text}\n\nwritten: {args.out / 'bits.md'}")
        return max(status, avrnn(["generate", str(args.out), "--data", str(source)]))


if __name__ == "__main__":
    sys.exit(main())
