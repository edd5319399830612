"""Does the paper's experiment repeat? AVRNN on TIMIT by its own algorithms and by a joint loss.

Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, section VI, figures 2 and 3.

Waveforms at 16 kHz, 200 samples a frame, standardised; segments of 100 frames; speakers of
training, validation and test are disjoint. ``--data`` is a TIMIT folder or zip; the sample that
NLTK distributes will do (``python -m nltk.downloader timit``). Gaussian densities of waveforms
are unbounded, so nothing here compares with other papers' numbers, and every number depends on the
floor of the emission's scale, 0.01 deviations.

The pictures show reconstruction loss and ELBO against steps (Fig. 2), and critic and adversarial
loss with the closed-form distance (Fig. 3). Expect the reconstruction loss to fall and the
adversarial loss to go to 0, as the paper says. But the ELBO falls far below the annealed ELBO's,
and the closed-form W2 does not go to 0: a clipped critic cannot see the distance. The defaults
take about 10 minutes on two cores. ``--smoke`` needs no data: synthetic chirps of the same shape
stand in for speech.
"""

import sys
import tempfile
from pathlib import Path

import synthetic
from common import arguments, parse

from pyro_avrnn.cli import main as avrnn

ROWS = ["rnn", "elbo-annealed", "alternating", "conditional", "conditional+kl"]


def main() -> int:
    parser = arguments(__doc__, out="runs/timit", steps=600)
    parser.add_argument("--data", type=Path, help="TIMIT folder or zip")
    parser.add_argument("--seeds", type=int, default=1)
    args = parse(parser, needed="--data, a TIMIT folder or zip,")
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or synthetic.frames(Path(folder))
        size = ["--steps", "6", "--validate-every", "3", "--h-dim", "16", "--particles", "25"]
        return avrnn(
            ["compare", "--data", str(source), "--out", str(args.out), "--rows", *ROWS]
            + ["--z-dim", "16", "--batch-size", "32", "--lr", "0.001"]
            + (size if args.smoke else ["--steps", str(args.steps), "--seeds", str(args.seeds)])
        )


if __name__ == "__main__":
    sys.exit(main())
