"""Do latents pay for speech, counted in bits? RNN, VRNN, SRNN and STORN on mu-law TIMIT.

Source: Havtorn et al. (2022), https://arxiv.org/abs/2202.12707: 16-bit mu-law samples, 64 a step,
each scored by a discretised mixture of 10 logistics. Gaussian densities of waveforms depend on a
floor under the scale. Bits a sample do not, so they compare between papers that use the same
corpus; the sample of 160 utterances that NLTK distributes is a fortieth of it.

    python examples/studies/speech_in_bits.py timit.zip --seeds 2

A bound over a set is the sum over its samples divided by their number; latent models are scored
by the best of ELBO, IWAE and FIVO. Training, validation and test speakers are disjoint. The same
command continues an interrupted run. The best row speaks: WAV files and their spectrograms lie in
``generated``. ``--smoke`` needs no data.

Expect all models far below the uniform 16.00, and far above one histogram of all levels: quiet
16-bit mu-law samples take few of the levels (those of -1, 0 and 1 lie 3,000 levels apart). The
histogram knows which; logistics cannot single them out. RESULTS.md discusses the table. About 25
minutes a seed on two cores.
"""

import math
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import synthetic
from common import Row, arguments, by_label, compare, markdown, parse

#: every latent model is trained by the annealed ELBO; all share their sizes
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
#: (model, bits a sample with 64 samples a step), from the thesis; the whole corpus
PUBLISHED = [("WaveNet", 13.30), ("LSTM", 13.27), ("VRNN", 12.54), ("SRNN", 12.42)]
SOURCE = """\
Published: Havtorn, DTU thesis, full TIMIT (4,620 training utterances), latent models as upper
bounds. Ours: 120 training utterances, so numbers do not compare; the order of models may."""


def table(results: list[Row]) -> str:
    """Make the table of bits a sample by model and seed, and the published one."""
    lines = []
    for label, rows in by_label(results).items():
        bits = [row["bits_per_sample"] for row in rows]
        kl = fmean(row["kl_per_frame"] for row in rows)
        listed = ", ".join(f"{b:.3f}" for b in bits)
        lines.append((label, rows[0]["parameters"], listed, f"{fmean(bits):.3f}", f"{kl:.2f}"))
    first = results[0]
    frame = first["reader"]["frame"]
    baseline = f"{-first['baseline_per_frame'] / math.log(2.0) / frame:.3f}"
    lines.append(("one histogram of all levels", "", baseline, baseline, ""))
    head = ["model", "parameters", "bits a sample, seed by seed", "mean", "KL, nats a step"]
    published = [(name, f"{bits:.2f}") for name, bits in PUBLISHED]
    return "\n\n".join(
        [
            markdown(head, lines),
            f"{first['data']}, {first['split']} split: {first['frames'] * frame:,} samples.",
            markdown(["published, 64 samples a step", "bits"], published),
            SOURCE,
        ]
    )


def main() -> int:
    parser = arguments(__doc__, out="runs/speech")
    parser.add_argument("data", type=Path, nargs="?", help="a TIMIT folder or zip")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="SVI steps, if not those of the table")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    args = parse(parser, needed="a TIMIT folder or zip")
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or synthetic.timit(Path(folder))
        settings = SETTINGS | (SMOKE if args.smoke else {})
        settings |= {"steps": args.steps} if args.steps else {}
        settings |= {"seeds": args.seeds, "jobs": args.jobs, "data": source, "out": args.out}
        return compare(settings, [ROWS[name] for name in args.rows], "bits.md", table)


if __name__ == "__main__":
    sys.exit(main())
