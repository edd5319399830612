"""What does resampling cost, and how much memory does an evaluation with 1,024 particles take?

Times whole training steps (forward, backward, Adam) of FIVO-8 and IWAE-8 in turn, in one process,
and gives medians and the ratio with its spread over rounds; then scores the same data with 1,024
particles in a process of its own and gives that process's peak of memory.

Expect FIVO-8 to cost about 1.5 times IWAE-8 at the size of the music data, and about 1.1 times
at 256 units, where arithmetic dominates; evaluation to stay below 2 GiB. About 4 minutes.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from inference import FIVO, IWAE, evaluate
from inference.files import write_csv
from pyro_avrnn import recipes

MUSIC = {"B": 16, "T": 160, "X": 88, "Z": 32, "H": 32}
SIZES: dict[str, dict[str, int]] = {"music": MUSIC, "music, 256 units": {**MUSIC, "H": 256}}


def rolls(size: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Random piano rolls with about four notes a step, all of full length."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size["B"], size["T"], size["X"], generator=generator) < 4 / size["X"]
    return x.float(), torch.ones(size["B"], size["T"], dtype=torch.bool)


def step(size: dict[str, int], loss: Any) -> Callable[[], None]:
    """One training step of a VRNN of that size."""
    torch.manual_seed(0)
    r = recipes.vrnn(size["X"], size["Z"], size["H"], "bernoulli")
    optim = torch.optim.Adam([*r.model.parameters(), *r.guide.parameters()], lr=1e-3)
    data = rolls(size)

    def run() -> None:
        optim.zero_grad()
        loss(r.model, r.guide, *data).backward()
        optim.step()

    return run


def ratio(name: str, size: dict[str, int], rounds: int) -> dict[str, Any]:
    """FIVO-8 beside IWAE-8, in turn."""
    contenders = {
        "iwae": step(size, IWAE(num_particles=8)),
        "fivo": step(size, FIVO(num_particles=8)),
        "fivo, always": step(size, FIVO(num_particles=8, criterion="always")),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for i in range(rounds + 1):
        for key, run in contenders.items():
            started = time.perf_counter()
            run()
            if i:  # the first round warms up
                seconds[key].append(time.perf_counter() - started)
    row: dict[str, Any] = {"what": name, **size}
    row |= {f"{key}_seconds": round(median(values), 4) for key, values in seconds.items()}
    for key in ("fivo", "fivo, always"):
        ratios = sorted(f / i for f, i in zip(seconds[key], seconds["iwae"], strict=True))
        row[f"{key}_ratio"] = round(median(ratios), 2)
        row[f"{key}_ratio_spread"] = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return row


def peak(num_particles: int, size: dict[str, int], threads: int) -> float:
    """GiB of a process that does nothing but evaluate; run in one of its own."""
    torch.set_num_threads(threads)
    r = recipes.vrnn(size["X"], size["Z"], size["H"], "bernoulli")
    x, mask = rolls(size)
    kept = {"num_particles": num_particles, "fivo_particles": num_particles}
    evaluate(r.model, r.guide, x, mask, **kept)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.smoke else args.threads)
    small = {"B": 2, "T": 5, "X": 8, "Z": 2, "H": 4}
    sizes = {"small": small} if args.smoke else SIZES
    rows = [ratio(name, size, 2 if args.smoke else args.rounds) for name, size in sizes.items()]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        name, size = next(iter(sizes.items()))
        particles = 30 if args.smoke else 1024
        memory = pool.apply(peak, (particles, size, args.threads))
        rows.append({"what": f"evaluate-{particles}, {name}", **size})
        rows[-1]["peak_gib"] = round(memory, 2)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "benchmark.csv", rows)
    print(f"written: {args.out / 'benchmark.csv'}")


if __name__ == "__main__":
    main()
