"""How fast is a training step, next to plain torch, JAX and the arithmetic; what costs how much?

Four parts. contenders: one step (forward, backward, Adam) of one VRNN, written in several ways.
They run in turn, each in its own process; the time of the matrix products alone is the yardstick.
ratios: FIVO over ELBO and IWAE, an adversarial step over an ELBO step. growth: time and memory as
sizes double. memory: an evaluation with 1,024 particles, and a long series with one state in 100
kept. Expect rollout to be 4 to 10 times as fast as the markov loop, and jax to lead where steps
are small. All of it takes 8 minutes. "at ... products" is the step's share of that library's rate
of products.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor as Process
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate, product
from pathlib import Path
from statistics import median
from typing import Any

import contenders
import numpy as np
import torch
from common import Row, arguments, parse
from matplotlib.figure import Figure
from problem import SIZES, Size, data, operations, recipe, start
from scipy.stats import linregress
from tqdm import tqdm

from inference import ELBO, FIVO, IWAE, Adversarial, constraints, evaluate
from inference.divergences import wasserstein
from inference.files import write_csv, write_json
from pyro_avrnn import recipes
from pyro_avrnn.cli.runs import commit

PARTS = ("contenders", "ratios", "growth", "memory")
SPAWN = multiprocessing.get_context("spawn")
BUILT: dict[str, contenders.Contender] = {}  # in a contender's own process
TINY = SIZES["tiny"]


def timed(step: Callable[[], Any], least: float, device: str = "cpu") -> float:
    """Average the seconds of a step, over steps that take ``least`` seconds together."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < least:
        step()
        wait()
        steps += 1
    return (time.perf_counter() - started) / steps


def build(name: str, size: Size, weights: Any, threads: int, device: str) -> tuple[float, float]:
    """Make a contender in its own process; return its first loss and gradient norm."""
    if "jax" in name:  # it takes as many threads as it sees processors
        os.environ["NPROC"] = str(threads)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    BUILT["here"] = contenders.make(name, size, weights, device)
    return BUILT["here"].loss, BUILT["here"].norm


def go(least: float, device: str) -> float:
    """Run one round of the contender built in this process."""
    return timed(BUILT["here"].step, least, device)


def alternate(runs: dict[str, Callable[[], float]], rounds: int, what: str) -> dict[str, Any]:
    """Call all in turn, once a round; list what each returns. The first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i, name in tqdm([(i, name) for i in range(rounds + 1) for name in runs], desc=what):
        value = runs[name]()
        seconds[name] += [value] if i else []
    return seconds


def compare(seconds: dict[str, list[float]], *bases: str, **common: Any) -> list[Row]:
    """Make one row per contender: medians, and ratios of medians with their range."""
    rows = []
    for name, mine in seconds.items():
        middle, least, most = (float(f"{of(mine):.4g}") for of in (median, min, max))
        row = {**common, "contender": name, "seconds": middle, "fastest": least, "slowest": most}
        for base in bases:
            each = [a / b for a, b in zip(mine, seconds[base], strict=True)]
            row[f"over_{base}"] = round(median(mine) / median(seconds[base]), 3)
            row[f"over_{base}_range"] = f"{min(each):.3g} to {max(each):.3g}"
        rows.append(row)
    return rows


def contest(label: str, size: Size, device: str, args: argparse.Namespace) -> list[Row]:
    """Time one training step of all contenders, which must first agree on loss and gradient."""
    names = contenders.contenders(device, label)
    yards = [f"{name} product" for name in ("torch", "jax") if name in names]
    given = (size, start(size), args.threads, device)
    with ExitStack() as stack:
        own = {name: stack.enter_context(Process(1, SPAWN)) for name in [*names, *yards]}
        [process.submit(os.getpid) for process in own.values()]  # all import at once
        found = {name: own[name].submit(build, name, *given).result() for name in tqdm(own)}
        for name in names:
            if not np.allclose(found[name], found["torch"], rtol=1e-4):
                raise RuntimeError(f"{name} starts at {found[name]}, torch at {found['torch']}")
        print("{}: all start at loss {:.6g}, gradient norm {:.6g}".format(label, *found["torch"]))
        runs = {n: lambda p=p: p.submit(go, args.least, device).result() for n, p in own.items()}
        seconds = alternate(runs, args.rounds, f"{label}, {device}")
    product = 2 * contenders.SIDE[device] ** 3  # operations
    rates = {f"{name}s": product / median(seconds.pop(name)) for name in yards}
    common = {"what": f"step, {label}", "device": device, **size._asdict()}
    rows = compare(seconds, *(b for b in ("torch", "jax") if b in names), **common)
    for row in rows:
        for name, rate in rates.items():
            row[f"gflops of {name}"] = round(rate / 1e9, 1)
            row[f"at {name}"] = round(operations(size) / rate / row["seconds"], 4)
    return rows


def trainer(size: Size, loss: Any, critic: Row | None = None) -> Callable[[], float]:
    """Make a function that times a training step of our VRNN, with a critic if one is given."""
    x, mask = data(size)
    r = recipe(size, recipes.avrnn, guide="filtering", **(critic or {}))
    if critic:
        kind = constraints.spectral if "lipschitz" in critic else constraints.gradient_penalty
        adversarial = Adversarial(r.critic, divergence=wasserstein(kind()))
        loss = ELBO(penalties=[adversarial], kl_weight=0.0)
    parameters = [*r.model.parameters(), *r.guide.parameters()]
    descend = contenders.descent(parameters, lambda: loss(r.model, r.guide, x, mask))

    def step() -> None:
        descend()
        if critic:
            adversarial.update(r.model, r.guide, x, mask)

    return lambda: timed(step, 0.0)


def ratios(args: argparse.Namespace) -> list[Row]:
    """Time what resampling costs, and what a critic costs."""
    medium, music = (TINY, TINY) if args.smoke else (SIZES["medium"], SIZES["music"])
    forward = {"view": "conditional", "critic": "feedforward", "lipschitz": "z"}
    runs = {  # the first two are the bases
        "elbo": trainer(medium, ELBO()),
        "elbo, compiled": trainer(medium, ELBO(compile=True)),
        "fivo-4": trainer(medium, FIVO(num_particles=4)),
        "fivo-4, compiled": trainer(medium, FIVO(num_particles=4, compile=True)),
        "critic, spectral": trainer(medium, None, forward),
        "critic, LSTM": trainer(medium, None, {"view": "trajectory", "critic": "lstm"}),
    }
    rows = compare(alternate(runs, args.rounds, "medium"), *[*runs][:2], what="ratio, medium")
    for label, size in (("music", music), ("music, 256 units", music._replace(H=256))):
        runs = {
            "iwae-8": trainer(size, IWAE(num_particles=8)),
            "fivo-8": trainer(size, FIVO(num_particles=8)),
            "fivo-8, always": trainer(size, FIVO(num_particles=8, criterion="always")),
        }
        rows += compare(alternate(runs, args.rounds, label), "iwae-8", what=f"ratio, {label}")
    return rows


def tensors(size: Size, options: Row) -> float:
    """Measure the peak of all tensors in forward and backward, in MiB, by allocator events."""
    r, (x, mask) = recipe(size), data(size)
    own, loss = [*r.model.parameters(), *r.guide.parameters()], ELBO(**options)
    for _ in range(2):  # the first pass also makes what is made only once
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(loss(r.model, r.guide, x, mask), own)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return round(max(accumulate(e.nbytes() for e in changes)) / 2**20, 3)


def measured(points: Row, args: argparse.Namespace, *bases: str, what: str) -> list[Row]:
    """Time ELBO steps, and measure their tensors without data, weights and optimiser."""
    runs = {name: trainer(size, ELBO(**options)) for name, (size, options) in points.items()}
    rows = compare(alternate(runs, (args.rounds + 1) // 2, what), *bases, what=what)
    for row, (size, options) in zip(rows, tqdm(points.values(), desc="memory"), strict=True):
        row |= {"mib": tensors(size, options), **size._asdict(), **options}
    return rows


def growth(args: argparse.Namespace) -> list[Row]:
    """Time an ELBO step as one size doubles, the others at their base; slopes on log-log axes."""
    base, particles = (TINY, 2) if args.smoke else (Size(16, 50, 50, 32, 128), 4)
    doublings = [0.5, 1, 2] if args.smoke else [0.5, 1, 2, 4, 8]
    middles = {"T": base.T, "B": base.B, "K": particles, "H": base.H}
    grids = {name: [int(one * by) for by in doublings] for name, one in middles.items()}
    points = {}
    for name, grid in grids.items():
        for value in grid:
            size = base._replace(**{name: value} if name in Size._fields else {})
            options = {"num_particles": value if name == "K" else particles}
            points[f"{name} = {value}"] = (size, options)
    rows = measured(points, args, what="growth")
    return rows + slopes(rows, grids, doublings, args.out / "growth.png")


def slopes(
    rows: list[Row], grids: dict[str, list[int]], doublings: list[float], path: Path
) -> list[Row]:
    """Fit and draw how time and memory grow with each size."""
    found = []
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    labels = {"seconds": "time of a step [s]", "mib": "peak of its tensors [MiB]"}
    for (key, label), panel in zip(labels.items(), figure.subplots(1, 2), strict=True):
        for name, grid in grids.items():
            own = [row[key] for row in rows if row["contender"].startswith(name)]
            fit = linregress(np.log2(grid), np.log2(own))
            slope = {"slope": round(fit.slope, 3), "standard_error": round(fit.stderr, 3)}
            found.append({"what": f"slope of {key}", "contender": f"in {name}", **slope})
            words = f"{name}, base {grid[1]}: slope {fit.slope:.2f} ± {fit.stderr:.2f}"
            panel.semilogx(doublings, own, "o-", base=2, label=words)
        multiples = "multiple of T steps, B series, K particles, H units"
        panel.set(xlabel=multiples, ylabel=label, yscale="log")
        panel.legend()
    figure.savefig(path, dpi=150)
    return found


def peak(particles: int, size: Size, threads: int) -> float:
    """Measure the GiB of a process that does nothing but evaluate; call it in a new one."""
    torch.set_num_threads(threads)
    r, (x, mask) = recipe(size), data(size)
    evaluate(r.model, r.guide, x, mask, num_particles=particles, fivo_particles=particles)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def memory(args: argparse.Namespace) -> list[Row]:
    """Measure an evaluation with many particles, and a long series with few states kept."""
    size, particles = (TINY, 30) if args.smoke else (SIZES["music"], 1024)
    with Process(1, SPAWN) as process:
        gib = round(process.submit(peak, particles, size, args.threads).result(), 2)
    row = {"what": f"evaluate-{particles}, music", **size._asdict(), "peak_gib": gib}
    size, every = (TINY, 2) if args.smoke else (Size(8, 2000, 88, 32, 128), 100)
    ways = {"all": (size, {}), f"one in {every}": (size, {"recompute": every})}
    return [row, *measured(ways, args, "all", what=f"states kept, T = {size.T}")]


def machine(threads: int) -> Row:
    """Describe the processor and the versions behind the numbers."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    cpu = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    about = {"cpu": [*cpu, platform.processor()][0], "cores": os.cpu_count(), "threads": threads}
    about["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for name, module in {"torch": "torch", "pyro-ppl": "pyro", "jax": "jax"}.items():
        about[name] = version(name) if find_spec(module) else None
    return about | {"commit": commit()}


def read_arguments() -> argparse.Namespace:
    """Read the command line; ``--smoke`` takes tiny sizes and two rounds."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = arguments(__doc__, out="runs/benchmark")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=[*SIZES][1:])
    parser.add_argument("--device", choices=devices, nargs="+", default=devices)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parse(parser)
    args.least = 0.5  # seconds of a contender's round
    if args.smoke:
        args.least, args.rounds, args.threads, args.sizes = 0.0, 2, 1, ["tiny"]
    return args


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps torch's profiler silent
    rows = []
    if "contenders" in args.only:
        for device, label in product(args.device, args.sizes):
            rows += contest(label, SIZES[label], device, args)
        print(*contenders.missing(), sep="\n")
    for part in (ratios, growth, memory):
        rows += part(args) if part.__name__ in args.only else []
    for row in rows:
        rest = [f"{k}={v}" for k, v in row.items() if k not in (*Size._fields, "contender")]
        print(f"{row.get('contender', ''):18}", *rest)
    write_csv(args.out / "benchmark.csv", rows)
    write_json(args.out / "benchmark.json", {"machine": machine(args.threads), "rows": rows})
    print(f"written: {args.out / 'benchmark.csv'}")


if __name__ == "__main__":
    main()
