"""Which resampler's gradient can be trusted? Bias and noise, and what a proposal learns by it.

    python examples/studies/resamplers.py

The models are linear and Gaussian, so that the evidence and its gradient are known exactly.

*Gradients.* One latent, 10 steps, bootstrap filter, resampling after every step. The gradient of
log Z_hat in the transition's coefficient and deviation, against that of log p(x) by differences of
the exact evidence: bias (a part of it is that log Z_hat is not log p(x), and vanishes as K grows),
and the standard deviation of one filter's gradient.

*Proposals.* Four latents, four features, 50 steps. A proposal with a gain and a deviation of its
own, which begin as the bootstrap filter's, learns by the gradient of each resampler, in kind as
the comparison of differentiable filters by Brady et al. (2025), https://arxiv.org/abs/2510.25693.
All are judged alike: by a systematic filter with K = 100, below log p(x).
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from common import Row, arguments, by_label, in_processes, markdown, mean, parse, publish
from torch import Tensor, nn

from inference import FIVO, Bootstrap, particle_filter, seeded
from inference.differentiable import Soft, StopGradient, Transport
from inference.files import write_json
from pyro_avrnn.cli.runs import commit
from pyro_avrnn.models import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from pyro_avrnn.sequence import SequenceGuide

RESAMPLERS: dict[str, Callable[[], Any]] = {
    "multinomial": lambda: "multinomial",
    "systematic": lambda: "systematic",
    "score function": lambda: "multinomial",
    "stop-gradient": StopGradient,
    "soft, share 0.5": lambda: Soft(0.5),
    "transport, 0.05": lambda: Transport(0.05, 50),
}
NAMES = ("transition_matrix", "transition_scale_tril")


def log_evidence(model: LGSSM, x: Tensor) -> Tensor:
    """The exact log p(x), ``(B,)``."""
    found: Tensor = model.rollout(ExactSmoother(model), x).log_weight.sum(dim=(0, 1))
    return found


def estimate(model: LGSSM, guide: Any, x: Tensor, name: str, k: int) -> Tensor:
    """log Z_hat averaged over sequences, with the gradient of a resampler."""
    if name == "score function":
        loss = FIVO(
            num_particles=k, criterion="always", resampler="multinomial", score_function=True
        )
        return -loss(model, guide, x) / len(x)
    options: Any = {"num_particles": k, "criterion": "always", "paths": False}
    filtered = particle_filter(model, guide, x, resampler=RESAMPLERS[name](), **options)
    return filtered.log_evidence.mean()


def gradient_row(task: tuple[str, int], *, repeats: int, copies: int) -> list[Row]:
    """Bias and deviation of one resampler's gradients at one K."""
    name, k = task
    with seeded(0):
        model = LGSSM.scalar(r=1.0).double()
        with torch.no_grad():
            x = model(mask=torch.ones(1, 10, dtype=torch.bool))
        truth = [slope(model, x, parameter) for parameter in NAMES]
        guide, found, began = Bootstrap(model), [], time.perf_counter()
        parameters = [getattr(model, parameter) for parameter in NAMES]
        for _ in range(repeats):
            value = estimate(model, guide, x.expand(copies, -1, -1), name, k)
            made = torch.autograd.grad(value, parameters)
            found.append(torch.stack([gradient.squeeze() for gradient in made]))
        seconds = time.perf_counter() - began
    drawn = torch.stack(found)
    deviation = drawn.std(dim=0)
    return [
        {
            "row": name,
            "num_particles": k,
            "parameter": parameter,
            "exact": truth[i],
            "bias": float(drawn[:, i].mean()) - truth[i],
            "standard_error": float(deviation[i]) / math.sqrt(repeats),
            "deviation": float(deviation[i]) * math.sqrt(copies),
            "seconds": seconds / repeats / copies,
        }
        for i, parameter in enumerate(NAMES)
    ]


def slope(model: LGSSM, x: Tensor, name: str) -> float:
    """Derivative of log p(x) by central differences."""
    values, parameter = [], getattr(model, name)
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            parameter.add_(step)
            values.append(float(log_evidence(model, x)))
            parameter.sub_(step)
    return (values[0] - values[1]) / 2e-5


class Gain(SequenceGuide):
    """z_t ~ N(m + G (x_t - C m), D), m being the prior's mean; it begins as the prior.

    The best of its kind is the locally optimal proposal, but for step 1.
    """

    def __init__(self, model: LGSSM) -> None:
        super().__init__(model)
        self.gain = nn.Parameter(torch.zeros(self.z_dim, model.x_dim))
        self.factor = nn.Parameter(model.transition_scale_tril.detach().clone())
        self.emission_matrix = model.emission_matrix.detach()

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """x itself."""
        return x

    def proposal(self, state: LGSSMState, c_t: Tensor) -> dist.Distribution:
        """q(z_t given z_{t-1}, x_t)."""
        surprise = c_t - state.mean @ self.emission_matrix.t()
        lower = self.factor.tril(-1) + self.factor.diagonal().abs().clamp(min=1e-3).diag()
        loc = state.mean + surprise @ self.gain.t()
        return dist.MultivariateNormal(loc, scale_tril=lower, validate_args=False)


def proposal_row(task: tuple[str, int], *, steps: int, size: int) -> Row:
    """What a proposal learns by one resampler's gradient, one seed."""
    name, seed = task
    model = LGSSM.random(4, 4, seed=0)
    with seeded(100), torch.no_grad():
        mask = torch.ones(2 * size, 50, dtype=torch.bool)
        train, test = model(mask=mask).split(size)
        exact = log_evidence(model, test)
    guide: Any = {"bootstrap": Bootstrap, "locally optimal": ExactFilter}.get(name, Gain)(model)
    model.requires_grad_(False)
    began = time.perf_counter()
    with seeded(seed):
        if isinstance(guide, Gain):
            optim = torch.optim.Adam(guide.parameters(), lr=0.01)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
            for _ in range(steps):
                loss = -estimate(model, guide, train, name, 32)
                optim.zero_grad()
                loss.backward()
                optim.step()
                falling.step()
        seconds = time.perf_counter() - began
    with seeded(0), torch.no_grad():  # the same noise for all
        copies = test.repeat(20, 1, 1)
        found = particle_filter(model, guide, copies, num_particles=100, paths=False)
        gap = found.log_evidence.view(20, size).mean(dim=0) - exact
    return {
        "row": name,
        "seed": seed,
        "log_evidence": float(exact.mean()),
        "gap": float(gap.mean()),
        "standard_error": float(gap.std()) / math.sqrt(size),
        "seconds": seconds,
    }


def gradients_table(rows: list[Row]) -> str:
    """A line for each resampler and parameter: bias and deviation by K."""
    counts = list(dict.fromkeys(row["num_particles"] for row in rows))
    head = ["resampler", "gradient in", *(f"bias, K = {k}" for k in counts)]
    head += [f"noise, K = {k}" for k in counts] + ["time a filter, ms"]
    lines = []
    for name, mine in by_label(rows).items():
        for parameter, of in by_label(mine, "parameter").items():
            line = [name, {"transition_matrix": "a", "transition_scale_tril": "q"}[parameter]]
            line += [f"{row['bias']:+.3f} ± {row['standard_error']:.3f}" for row in of]
            line += [f"{row['deviation']:.2f}" for row in of]
            lines.append([*line, ", ".join(f"{1000 * row['seconds']:.2g}" for row in of)])
    return markdown(head, lines)


def proposals_table(rows: list[Row]) -> str:
    """A line for each way of learning."""
    head = ["proposal learns by", "log Z_hat - log p(x)", "of each seed", "seconds"]
    lines = [
        [
            name,
            mean([row["gap"] for row in mine], 3),
            ", ".join(f"{row['gap']:.3f}" for row in mine),
            mean([row["seconds"] for row in mine], 0),
        ]
        for name, mine in by_label(rows).items()
    ]
    return markdown(head, lines)


def rows_of(work: Callable[[Any], Any], tasks: list[Any], jobs: int) -> Iterator[Row]:
    """Results in the order of the tasks."""
    for found in sorted(in_processes(work, tasks, jobs), key=lambda r: order(r, tasks)):
        yield from found if isinstance(found, list) else [found]


def order(found: Any, tasks: list[Any]) -> int:
    """Where the task of a result stands."""
    row = found[0] if isinstance(found, list) else found
    return tasks.index((row["row"], row.get("num_particles", row.get("seed"))))


def main() -> None:
    parser = arguments(__doc__, out="runs/resamplers", steps=300)
    parser.add_argument("--repeats", type=int, default=200, help="gradients of each estimator")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each proposal")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    args = parse(parser)
    counts, copies, size = [4, 32, 128], 20, 20
    if args.smoke:
        args.repeats, args.steps, args.seeds, args.jobs = 3, 2, 1, 1
        counts, copies, size = [2], 2, 2
    tasks = [(name, k) for name in RESAMPLERS for k in counts]
    gradients = partial(gradient_row, repeats=args.repeats, copies=copies)
    found = list(rows_of(gradients, tasks, args.jobs))
    learnt = [("bootstrap", 0)]
    learnt += [(name, seed) for name in RESAMPLERS for seed in range(args.seeds)]
    learnt += [("locally optimal", 0)]
    proposals = partial(proposal_row, steps=args.steps, size=size)
    trained = list(rows_of(proposals, learnt, args.jobs))
    record = {"commit": commit(), "gradients": found, "proposals": trained}
    write_json(args.out / "resamplers.json", record)
    known = f"log p(x) = {trained[0]['log_evidence']:.2f} nats a sequence"
    text = "\n\n".join([gradients_table(found), known, proposals_table(trained)])
    publish(args.out, "resamplers.md", text, "resamplers.json")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small
    main()
