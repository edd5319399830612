"""The paper's experiment: AVRNN on TIMIT speech by its own algorithms, beside the joint schedule.

Source: Huang and Xiao (2021), https://arxiv.org/abs/2108.04496, section VI, figures 2 and 3.

Waveforms at 16 kHz, 200 samples a frame, standardised; segments of 100 frames; speakers of
training, validation and test are disjoint. ``--data`` is a TIMIT folder or zip; the sample that
NLTK distributes will do (``python -m nltk.downloader timit``). Gaussian densities of waveforms
are unbounded, so nothing here compares with other papers' numbers, and the floor of the
emission's scale, 0.01 deviations, belongs to every number.

Draws reconstruction loss and ELBO against steps (Fig. 2), and critic and adversarial loss with
the closed-form distance beside them (Fig. 3). Expect the reconstruction loss to fall and the
adversarial loss to go to 0, as the paper says, while the ELBO falls far below the annealed
ELBO's and the closed-form W2 does not go to 0: a clipped critic cannot see the distance.
About 10 minutes on two cores with the defaults. Without ``--data`` a synthetic chirp set of the
same shape stands in for speech (with ``--smoke`` only).
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from pyro_avrnn.cli import main as avrnn

ROWS = ["rnn", "elbo-annealed", "alternating", "conditional", "conditional+kl"]


def chirps(folder: Path) -> Path:
    """A few noisy chirps as an ``.npz`` of frames, for a smoke test without speech."""
    random = np.random.default_rng(0)
    time = np.linspace(0.0, 1.0, 2000)
    waves = [np.sin(40 * f * time * (1 + time)) for f in random.uniform(1, 5, size=20)]
    x = np.stack(waves).reshape(20, 10, 200) + 0.05 * random.normal(size=(20, 10, 200))
    path = folder / "chirps.npz"
    np.savez(path, x=x.astype("float32"))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="TIMIT folder or zip")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/timit"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.data is None and not args.smoke:
        parser.error("--data is needed: a TIMIT folder or zip (or --smoke)")
    with tempfile.TemporaryDirectory() as folder:
        source = args.data or chirps(Path(folder))
        size = ["--steps", "6", "--validate-every", "3", "--h-dim", "16", "--particles", "25"]
        return avrnn(
            ["compare", "--data", str(source), "--out", str(args.out), "--rows", *ROWS]
            + ["--z-dim", "16", "--batch-size", "32", "--lr", "0.001"]
            + (size if args.smoke else ["--steps", str(args.steps), "--seeds", str(args.seeds)])
        )


if __name__ == "__main__":
    sys.exit(main())
