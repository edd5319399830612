"""What is a twist worth? A drift seen only at its end, and stochastic volatility.

    python examples/studies/twisted_filters.py

*Drift*, as in the first example of Lawson et al. (2022), https://arxiv.org/abs/2206.05952: z_t =
z_{t-1} + drift + noise, and x shows z at the last step alone; all else is noise. The evidence is
exact. A filter that proposes blindly learns at the last step that its particles are in the wrong
place; a twist tells it before. Gaps of FIVO to log p(x), at several lengths.

*Stochastic volatility* (Taylor 1982): z_t = m + a (z_{t-1} - m) + s e_t, x_t = exp(z_t / 2) u_t.
Series are drawn from the model with known parameters, which then are learnt by FIVO, by FIVO with
a learnt proposal, and by twisted FIVO. Deviations of the estimates are in their standard errors,
by the outer product of the scores of single series. Bounds are of other series, and next to them
that of the true parameters.
"""

import math
import time
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from common import Row, arguments, by_label, in_processes, markdown, mean, parse, publish
from pyro.infer import SVI
from torch import Size, Tensor, nn

from inference import FIVO, Bootstrap, LearningRate, fit, particle_filter, seeded
from inference.differentiable import StopGradient
from inference.files import write_json
from inference.twists import TwistLearning
from pyro_avrnn.cli.runs import commit
from pyro_avrnn.networks import NormalNetwork, diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.twists import FutureTwist

DRIFT, NOISE, SEEN = 0.4, 0.6, 0.5
TRUTH = {"m": -1.0, "a": 0.95, "s": 0.3}


class State(NamedTuple):
    """Before a step."""

    z: Tensor  # (*batch, 1)
    t: Tensor  # (*batch, 1), steps that are done, as a part of the length


class Drift(SequenceModel):
    """x before the last step is standard normal noise."""

    def __init__(self, length: int) -> None:
        super().__init__(1, 1)
        self.length = length

    def init(self, batch_shape: Size) -> State:
        """At 0."""
        return State(torch.zeros(*batch_shape, 1), torch.zeros(*batch_shape, 1))

    def transition(self, state: State) -> dist.Distribution:
        """The drift."""
        return diagonal_normal(state.z + DRIFT, torch.full_like(state.z, NOISE))

    def emission(self, z_t: Tensor, state: State) -> dist.Distribution:
        """Noise, and the latent at the end."""
        last = (state.t > 1 - 1.5 / self.length).expand_as(z_t)
        return diagonal_normal(torch.where(last, z_t, 0.0), torch.where(last, SEEN, 1.0))

    def advance(self, state: State, z_t: Tensor, x_t: Tensor) -> State:
        """One step on."""
        return State(z_t, (state.t + 1 / self.length).expand_as(z_t))


class Volatility(SequenceModel):
    """One series; parameters begin away from the truth."""

    def __init__(self, m: float = 0.0, a: float = 0.5, s: float = 0.7) -> None:
        super().__init__(1, 1)
        self.m = nn.Parameter(torch.tensor(m))
        self.raw_a = nn.Parameter(torch.tensor(a).atanh())
        self.log_s = nn.Parameter(torch.tensor(s).log())

    @property
    def values(self) -> dict[str, Tensor]:
        """Parameters in their own units."""
        return {"m": self.m, "a": self.raw_a.tanh(), "s": self.log_s.exp()}

    def init(self, batch_shape: Size) -> State:
        """Nothing has begun."""
        return State(torch.zeros(*batch_shape, 1), torch.zeros(*batch_shape, 1))

    def transition(self, state: State) -> dist.Distribution:
        """Stationary from the first step on."""
        m, a, s = self.values.values()
        begun = state.t > 0
        loc = torch.where(begun, m + a * (state.z - m), m)
        scale = torch.where(begun, s, s / (1 - a**2).sqrt())
        return diagonal_normal(loc, scale.expand_as(loc))

    def emission(self, z_t: Tensor, state: State) -> dist.Distribution:
        """A normal whose log-variance is z."""
        return diagonal_normal(torch.zeros_like(z_t), (z_t / 2).exp())

    def advance(self, state: State, z_t: Tensor, x_t: Tensor) -> State:
        """One step on."""
        return State(z_t, torch.ones_like(state.t).expand_as(z_t))


class Correction(SequenceGuide):
    """The transition, moved by a network of its mean and x_t; it begins as the transition."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self.network = NormalNetwork(3, 1, (16,), activation="silu")
        self.transition = model.transition
        self.gate = nn.Parameter(torch.zeros(2))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """What is told of x: itself, and its size."""
        return torch.cat([x, (x.square() + 1e-3).log()], dim=-1)

    def proposal(self, state: State, c_t: Tensor) -> dist.Distribution:
        """q(z_t given z_{t-1}, x_t)."""
        base: Any = self.transition(state)
        loc, scale = base.base_dist.loc, base.base_dist.scale
        move, width = self.network.parameters_of(c_t, loc)
        loc = loc + self.gate[0] * move * scale
        return diagonal_normal(loc, scale * width.pow(self.gate[1]))


def learn_twist(model: Any, twist: FutureTwist, x: Tensor, steps: int, guide: Any) -> None:
    """Train a twist alone, the model being fixed."""
    optim = torch.optim.Adam(twist.parameters(), lr=5e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    learning = TwistLearning(twist, optim=optim, num_particles=8)
    for _ in range(steps):
        learning.update(model, guide, x)
        falling.step()


def drift_row(task: tuple[int, int], *, steps: int, k: int = 16) -> Row:
    """Gaps at one length, one seed."""
    length, seed = task
    with seeded(seed):
        model = Drift(length)
        guide, twist = Bootstrap(model), FutureTwist(model, 32)
        learn_twist(model, twist, torch.zeros(64, length, 1), steps, guide)
        # series that end where the drift alone would seldom lead them
        end = DRIFT * length + 2.0 * NOISE * length**0.5
        x = torch.zeros(400, length, 1)
        x[:, -1] = end
        scale = (length * NOISE**2 + SEEN**2) ** 0.5
        exact = dist.Normal(DRIFT * length, scale).log_prob(torch.tensor(end))
        exact = float(exact) - 0.5 * math.log(math.tau) * (length - 1)
        options: dict[str, Any] = {"num_particles": k, "criterion": "ess", "paths": False}
        gaps = {}
        with torch.no_grad():
            for name, chosen in (("FIVO", None), ("twisted", twist)):
                found = particle_filter(model, guide, x, twist=chosen, **options)
                gaps[name] = float(found.log_evidence.mean()) - exact
    closed = 1 - gaps["twisted"] / gaps["FIVO"]
    row: Row = {"row": f"{length} steps", "length": length, "seed": seed, "closed": closed}
    return row | {"log_evidence": exact, **gaps}


ROWS = ("FIVO-4", "FIVO-4, learnt proposal", "twisted FIVO-4", "twisted, learnt proposal")


def volatility_row(task: tuple[str, int], *, steps: int, size: int, length: int) -> Row:
    """Learn the parameters in one way, one seed of data and training."""
    name, seed = task
    with seeded(1000 + seed), torch.no_grad():
        truth = Volatility(**TRUTH)
        train, test = truth(mask=torch.ones(2 * size, length, dtype=torch.bool)).split(size)
    with seeded(seed), pyro.get_param_store().scope():
        model = Volatility()
        guide: Any = Correction(model) if "proposal" in name else Bootstrap(model)
        twist = FutureTwist(model, 32) if name.startswith("twisted") else None
        hooks = [] if twist is None else [TwistLearning(twist, num_particles=4).update]
        loss = FIVO(num_particles=4, twist=twist, resampler="systematic")
        began = time.perf_counter()
        optimiser = pyro.optim.Adam({"lr": 0.01})
        fit(
            SVI(model, guide, optimiser, loss),
            [(train,)],
            steps=steps,
            hooks=hooks,
            lr_schedule=LearningRate("cosine"),
            progress=False,
        )
        seconds = time.perf_counter() - began
        row: Row = {"row": name, "seed": seed, "seconds": seconds}
        with torch.no_grad():
            for k in (4, 128):
                options: dict[str, Any] = {"num_particles": k, "paths": False}
                found = particle_filter(model, guide, test, twist=twist, **options)
                row[f"FIVO-{k}"] = float(found.log_evidence.mean())
            known = particle_filter(truth, None, test, num_particles=1024, paths=False)
            row["truth"] = float(known.log_evidence.mean())
        errors = standard_errors(truth, train)
        for parameter, value in model.values.items():
            row[parameter] = value.item()
            row[f"{parameter}_off"] = (value.item() - TRUTH[parameter]) / errors[parameter]
    return row


def standard_errors(model: Volatility, x: Tensor) -> dict[str, float]:
    """Of an estimate by maximum likelihood, at the true parameters; delta method for a and s."""
    options: dict[str, Any] = {"num_particles": 256, "criterion": "always", "paths": False}
    found = particle_filter(model, None, x, resampler=StopGradient("systematic"), **options)
    parameters = list(model.parameters())
    scores = [
        torch.stack(torch.autograd.grad(one, parameters, retain_graph=True))
        for one in found.log_evidence
    ]
    rows = torch.stack(scores)
    covariance = torch.linalg.inv(rows.t() @ rows)
    slopes = torch.stack([torch.ones(()), 1 - model.raw_a.tanh() ** 2, model.log_s.exp()])
    errors = covariance.diagonal().sqrt() * slopes.detach()
    return dict(zip(TRUTH, errors.tolist(), strict=True))


def drift_table(rows: list[Row]) -> str:
    """Gaps by length."""
    head = ["length", "log p(x)", "FIVO-16 less it", "twisted", "closed", "seed by seed"]
    lines = [
        [name, f"{mine[0]['log_evidence']:.2f}"]
        + [mean([row[key] for row in mine]) for key in ("FIVO", "twisted", "closed")]
        + [", ".join(f"{row['closed']:.0%}" for row in mine)]
        for name, mine in by_label(rows).items()
    ]
    return markdown(head, lines)


def volatility_table(rows: list[Row]) -> str:
    """Bounds and parameters by way of learning."""
    head = ["trained by", "FIVO-4", "FIVO-128", *TRUTH, "off by, in standard errors", "seconds"]
    lines = []
    for name, mine in by_label(rows).items():
        off = "; ".join(" ".join(f"{row[f'{p}_off']:+.1f}" for p in TRUTH) for row in mine)
        bounds = [mean([r[key] for r in mine]) for key in ("FIVO-4", "FIVO-128")]
        values = [mean([r[p] for r in mine]) for p in TRUTH]
        lines.append([name, *bounds, *values, off, mean([r["seconds"] for r in mine], 0)])
    known = mean([row["truth"] for row in next(iter(by_label(rows).values()))])
    truth = [f"{value:g}" for value in TRUTH.values()]
    lines.append(["the truth (FIVO-1024)", "", known, *truth, "", ""])
    return markdown(head, lines)


def main() -> None:
    parser = arguments(__doc__, out="runs/twists", steps=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    args = parse(parser)
    lengths, size, length = [10, 20, 50], 100, 100
    if args.smoke:
        args.steps, args.seeds, args.jobs, lengths, size, length = 2, 1, 1, [3], 4, 5
    drifts = partial(drift_row, steps=args.steps)
    tasks = [(n, seed) for n in lengths for seed in range(args.seeds)]
    found = sorted(in_processes(drifts, tasks, args.jobs), key=lambda r: (r["length"], r["seed"]))
    volatile = partial(volatility_row, steps=args.steps, size=size, length=length)
    learnt = [(name, seed) for name in ROWS for seed in range(args.seeds)]
    done = list(in_processes(volatile, learnt, args.jobs))
    done.sort(key=lambda r: (ROWS.index(r["row"]), r["seed"]))
    write_json(args.out / "twists.json", {"commit": commit(), "drift": found, "volatility": done})
    text = f"{drift_table(found)}\n\n{volatility_table(done)}"
    publish(args.out, "twists.md", text, "twists.json")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
