"""How far are bounds, filters and guides from the truth, where the truth is known?

Sources: the bounds of Burda et al. (2016), https://arxiv.org/abs/1509.00519, and Maddison et al.
(2017), https://arxiv.org/abs/1705.09279; simulation-based calibration of Talts et al. (2018),
https://arxiv.org/abs/1804.06788, with a quantity that depends on the data as Modrák et al.
(2023), https://arxiv.org/abs/2211.02383, ask for.

The model is linear and Gaussian, one latent, 50 steps. With the exact smoother as guide every
particle's log-weight is log p(x), so its ELBO is already tight. Expect, in nats below log p(x):

- the transition as proposal (bootstrap): ELBO 460, IWAE-1024 70, FIVO-128 0.5: resampling does
  what no number of particles does without it;
- p(z_t | z_{t-1}, x_t) as proposal (locally optimal): ELBO 6.3, IWAE-1024 0.2, FIVO-128 0.03;
- exact smoothing: 0.000 for ELBO and IWAE at any K. FIVO's estimates scatter (by 0.3 at K = 16),
  because it resamples by past weights that future ones would have cancelled.

The bootstrap filter with 128 particles resamples 29 times, and the last ones descend from two of
the first. Ranks are uniform for the exact guide. They show a valley for a guide 0.7 times as wide
and a hill for one 1.3 times as wide (p < 1e-10). For draws of the prior they are uniform in z, and
only log p(x, z) reveals the fault. 15 seconds on one core.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pyro.distributions as dist
import torch
from common import Row, arguments, markdown, parse
from torch import Tensor

from inference import Bootstrap, elbo, iwae, particle_filter, seeded
from inference.calibration import calibrate
from inference.files import write_csv
from pyro_avrnn import plots
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother, LGSSMState


class Scaled(ExactSmoother):
    """The exact smoother with the deviation of every proposal multiplied by a factor.

    A proposal's mean is linear in the previous z, so this scales the posterior about its mean.
    """

    def __init__(self, model: LGSSM, factor: float) -> None:
        super().__init__(model)
        self.factor = factor

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        """q(z_t | z_{t-1}, x_{t:T}), as wide as the factor says."""
        q = super().proposal(state, c_t)
        scale_tril = self.factor * q.scale_tril
        return dist.MultivariateNormal(q.mean, scale_tril=scale_tril, validate_args=False)


def bounds(model: LGSSM, x: Tensor, counts: list[int], repeats: int) -> Iterator[Row]:
    """Compute every bound less log p(x), for every proposal and number of particles K.

    Args:
        model: the model that all proposals are made for.
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


def table(rows: list[Row]) -> str:
    """Make the table of gaps and standard errors: rows are proposals and bounds, columns K."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        text = f"{round(row['gap'], 3) + 0.0:.3f} ± {row['standard_error']:.3f}"
        lines.setdefault((row["proposal"], row["bound"]), []).append(text)
    counts = dict.fromkeys(f"K = {row['num_particles']}" for row in rows)
    return markdown(["proposal", "bound", *counts], [[*at, *cells] for at, cells in lines.items()])


def compare_bounds(model: LGSSM, length: int, repeats: int, counts: list[int], out: Path) -> None:
    """Print and write the bounds of one sequence, and draw the health of a filter's particles."""
    with seeded(0), torch.no_grad():
        x = model(mask=torch.ones(1, length, dtype=torch.bool))
        rows = list(bounds(model, x, counts, repeats))
        filtered = particle_filter(model, None, x, num_particles=128)
    print(f"log p(x) = {rows[0]['log_evidence']:.6f} nats, {length} steps; less that, nats:")
    print(table(rows))
    write_csv(out / "bounds.csv", rows)
    title = "Do the bootstrap filter's 128 particles live?"
    plots.particle_health(filtered, out / "particles.png", title=title)


def check_calibration(model: LGSSM, simulations: int, out: Path) -> None:
    """Print, write and draw whether the draws of four guides have uniform ranks."""
    print("\np-values of uniform ranks, by simulation-based calibration:")
    mask = torch.ones(1, 10, dtype=torch.bool)
    tests: list[Row] = []
    for name, guide in {
        "exact": ExactSmoother(model),
        "narrow": Scaled(model, 0.7),
        "wide": Scaled(model, 1.3),
        "prior": Bootstrap(model),
    }.items():
        result = calibrate(model, guide, mask, num_simulations=simulations)
        p_values = dict(zip(result.names, result.p_values.tolist(), strict=True))
        tests.append({"guide": name, "uniform": result.uniform(), **p_values})
        print(f"{name:>8}:" + "".join(f"  {which} {p:.2g}" for which, p in p_values.items()))
        path = out / f"calibration_{name}.png"
        plots.calibration(result, path, title=f"Are the draws of the {name} guide calibrated?")
    write_csv(out / "calibration.csv", tests)


def main() -> None:
    parser = arguments(__doc__, out="runs/exact")
    parser.add_argument("--length", type=int, default=50, help="steps of the sequence")
    parser.add_argument("--repeats", type=int, default=50, help="estimates of each bound")
    parser.add_argument("--simulations", type=int, default=1000, help="of the calibration")
    args = parse(parser)
    counts = [1, 16, 128, 1024]
    if args.smoke:
        args.repeats, args.simulations, counts = 5, 200, [1, 16]
    model = LGSSM.scalar(a=0.9, q=0.7, r=0.5, s0=1.3).double()
    compare_bounds(model, args.length, args.repeats, counts, args.out)
    check_calibration(model, args.simulations, args.out)
    print(f"written to {args.out}: bounds.csv, calibration.csv, particles.png, calibration_*.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
