"""How far are bounds, filters and guides from the truth, where the truth is known?

Sources: the bounds of Burda et al. (2016), https://arxiv.org/abs/1509.00519, and Maddison et al.
(2017), https://arxiv.org/abs/1705.09279; simulation-based calibration of Talts et al. (2018),
https://arxiv.org/abs/1804.06788, with a quantity that depends on the data as Modrák et al.
(2023), https://arxiv.org/abs/2211.02383, ask for.

The model is linear and Gaussian, one latent, 50 steps. With the exact smoother as guide every
particle's log-weight is log p(x), so its ELBO is already tight. Expect, in nats below log p(x):

- the transition as proposal (bootstrap): ELBO 460, IWAE-1024 70, FIVO-128 0.5: resampling earns
  what no number of particles does without it;
- p(z_t | z_{t-1}, x_t) as proposal (locally optimal): ELBO 6.3, IWAE-1024 0.2, FIVO-128 0.03;
- exact smoothing: 0.000 for ELBO and IWAE at any K. Not so FIVO, whose estimates scatter (by 0.3
  at K = 16): it resamples by weights of the past that the future would have cancelled.

The bootstrap filter with 128 particles resamples 29 times, and the last ones descend from two of
the first. Ranks are uniform for the exact guide, show a valley for one 0.7 times as wide and a
hill for one 1.3 times as wide (p < 1e-10), and are uniform in z for draws of the prior: there
log p(x, z) alone gives the guide away. 15 seconds on one core.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyro.distributions as dist
import torch
from torch import Tensor

from inference import Bootstrap, elbo, iwae, particle_filter, seeded
from inference.calibration import calibrate
from inference.files import write_csv
from pyro_avrnn.cli import plots
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from pyro_avrnn.sequence import SequenceGuide

matplotlib.use("Agg")

Row = dict[str, Any]


class Scaled(SequenceGuide):
    """The exact smoother, every proposal's deviation multiplied by a factor.

    A proposal's mean is linear in the z before, so the whole posterior is scaled about its mean.
    """

    def __init__(self, model: LGSSM, factor: float) -> None:
        super().__init__(model)
        self.exact, self.factor = ExactSmoother(model), factor

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """c_t of the exact smoother."""
        return self.exact.encode(x, mask)

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        """q(z_t | z_{t-1}, x_{t:T}), as wide as the factor says."""
        q = self.exact.proposal(state, c_t)
        scale_tril = self.factor * q.scale_tril
        return dist.MultivariateNormal(q.mean, scale_tril=scale_tril, validate_args=False)


def bounds(model: LGSSM, x: Tensor, counts: list[int], repeats: int) -> Iterator[Row]:
    """Every bound less log p(x), for every proposal and number of particles K.

    Args:
        model: the model, which all the proposals are made for.
        x: one sequence, ``(1, T, X)``.
        counts: the numbers of particles.
        repeats: independent estimates of each bound.
    """
    exact = model.rollout(ExactSmoother(model), x).log_weight.sum()
    copies = x.expand(repeats, -1, -1)  # repetitions stand where sequences do
    guides = {
        "bootstrap": Bootstrap(model),
        "locally optimal": ExactFilter(model),
        "exact smoothing": ExactSmoother(model),
    }
    for name, guide in guides.items():
        for k in counts:
            log_weight = model.rollout(guide, copies, num_particles=k).log_weight
            filtered = particle_filter(model, guide, copies, num_particles=k, paths=False)
            estimates = {
                "ELBO": elbo(log_weight),
                "IWAE": iwae(log_weight),
                "FIVO": filtered.log_evidence,
            }
            for bound, values in estimates.items():
                gap = values - exact
                yield {
                    "proposal": name,
                    "bound": bound,
                    "num_particles": k,
                    "gap": gap.mean().item(),
                    "standard_error": gap.std().item() / math.sqrt(repeats),
                    "log_evidence": exact.item(),
                }


def table(rows: list[Row], counts: list[int]) -> str:
    """Gaps with their standard errors, a line for each proposal and bound, a column for each K."""
    lines = ["".join(f"{f'K = {k}':>20}" for k in counts)]
    for at in range(0, len(rows), 3 * len(counts)):
        for i in range(3):
            cells = rows[at + i : at + 3 * len(counts) : 3]
            name = f"{cells[0]['proposal']:<16} {cells[0]['bound']}"
            text = [f"{round(c['gap'], 3) + 0.0:.3f} ± {c['standard_error']:.3f}" for c in cells]
            lines.append(name + "".join(f"{t:>20}" for t in text))
    return "\n".join([" " * 21 + lines[0], *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=50, help="steps of the sequence")
    parser.add_argument("--repeats", type=int, default=50, help="estimates of each bound")
    parser.add_argument("--simulations", type=int, default=1000, help="of the calibration")
    parser.add_argument("--out", type=Path, default=Path("runs/exact"))
    parser.add_argument("--smoke", action="store_true", help="few draws, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.simulations = 5, 200
    counts = [1, 16] if args.smoke else [1, 16, 128, 1024]
    args.out.mkdir(parents=True, exist_ok=True)
    model = LGSSM.scalar(a=0.9, q=0.7, r=0.5, s0=1.3).double()

    with seeded(0), torch.no_grad():
        x = model(mask=torch.ones(1, args.length, dtype=torch.bool))
        rows = list(bounds(model, x, counts, args.repeats))
        filtered = particle_filter(model, None, x, num_particles=128)
    print(f"log p(x) = {rows[0]['log_evidence']:.6f} nats, {args.length} steps; less that, nats:")
    print(table(rows, counts))
    write_csv(args.out / "bounds.csv", rows)
    title = "Do the bootstrap filter's 128 particles live?"
    written = [plots.particle_health(filtered, args.out / "particles.png", title=title)]

    print("\np-values of uniform ranks, by simulation-based calibration:")
    mask = torch.ones(1, 10, dtype=torch.bool)
    tests: list[Row] = []
    for name, guide in {
        "exact": ExactSmoother(model),
        "narrow": Scaled(model, 0.7),
        "wide": Scaled(model, 1.3),
        "prior": Bootstrap(model),
    }.items():
        result = calibrate(model, guide, mask, num_simulations=args.simulations)
        p_values = dict(zip(result.names, result.p_values.tolist(), strict=True))
        tests.append({"guide": name, "uniform": result.uniform(), **p_values})
        print(f"{name:>8}:" + "".join(f"  {which} {p:.2g}" for which, p in p_values.items()))
        path = args.out / f"calibration_{name}.png"
        title = f"Are the draws of the {name} guide calibrated?"
        written.append(plots.calibration(result, path, title=title))
    write_csv(args.out / "calibration.csv", tests)
    print(f"written to {args.out}: bounds.csv, calibration.csv", *(p.name for p in written))


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
