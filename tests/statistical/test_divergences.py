"""Every divergence against its exact value and gradient.

The two sides are normals. Exact values are integrals on a grid, exact gradients their finite
differences; estimates use the exact scores, so that only the formulas are on trial. A critic that
has to learn its scores is compared with the KL below.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from inference.adversarial import Adversarial
from inference.densities import StepDensities
from inference.divergences import DIVERGENCES, Divergence, jensen_shannon, log_ratio
from inference.matching import Matching, mmd, sliced_wasserstein
from pyro_avrnn.critics import FeedForwardCritic
from tests.statistical.test_critic_calibration import pairs

PRIOR, PROPOSAL = (0.3, 1.1), (1.0, 0.7)  # location and scale
GRID = np.linspace(-14.0, 14.0, 28_001)
STEP = GRID[1] - GRID[0]
SIZE, PARTS = 400_000, 100
RATIOS = [name for name in DIVERGENCES if name != "wasserstein"]


def density(loc: float, scale: float) -> np.ndarray:
    return np.exp(-0.5 * ((GRID - loc) / scale) ** 2) / (scale * math.sqrt(math.tau))


INTEGRANDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "log_ratio": lambda p, q: q * np.log(q / p),
    "kl": lambda p, q: q * np.log(q / p),
    "reverse_kl": lambda p, q: p * np.log(p / q),
    "pearson": lambda p, q: (q - p) ** 2 / p,
    "hellinger": lambda p, q: (np.sqrt(q) - np.sqrt(p)) ** 2,
    "jensen_shannon": lambda p, q: (
        0.5 * p * np.log(2 * p / (p + q)) + 0.5 * q * np.log(2 * q / (p + q))
    ),
    "least_squares": lambda p, q: 0.25 * (p - q) ** 2 / (p + q),
}


def exact(name: str, prior: tuple[float, float], proposal: tuple[float, float]) -> float:
    p, q = (density(*side) + 1e-280 for side in (prior, proposal))
    return float(INTEGRANDS[name](p, q).sum() * STEP)


def exact_gradient(name: str) -> np.ndarray:
    """By location and scale of the prior, then of the proposal."""
    at, h = np.array([*PRIOR, *PROPOSAL]), 1e-4
    moved = [at + sign * h * np.eye(4)[i] for i in range(4) for sign in (1, -1)]
    values = [exact(name, tuple(m[:2]), tuple(m[2:])) for m in moved]
    return (np.array(values[::2]) - np.array(values[1::2])) / (2 * h)


def score(z: Tensor) -> Tensor:
    """log q / p at the given parameters, constants for gradients."""
    q, p = (torch.distributions.Normal(*side) for side in (PROPOSAL, PRIOR))
    return q.log_prob(z) - p.log_prob(z)


def estimates(divergence: Divergence, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values (PARTS,) and gradients (PARTS, 4), each of an equal part of the draws."""
    torch.manual_seed(seed)
    values, gradients = [], []
    for _ in range(PARTS):
        at = torch.tensor([*PRIOR, *PROPOSAL], dtype=torch.float64, requires_grad=True)
        noise = torch.randn(2, SIZE // PARTS, dtype=torch.float64)
        value = divergence.penalty(
            score(at[0] + at[1] * noise[0]), score(at[2] + at[3] * noise[1])
        )
        gradients.append(torch.autograd.grad(value, at)[0])
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


def off(found: Tensor, truth: np.ndarray | float) -> np.ndarray:
    """Standard errors between the mean of parts and the truth."""
    error = found.std(dim=0) / math.sqrt(len(found))
    return ((found.mean(dim=0) - torch.as_tensor(truth)) / error).numpy()


@pytest.mark.parametrize("name", RATIOS)
def test_values_and_gradients_are_exact(name: str) -> None:
    values, gradients = estimates(DIVERGENCES[name]())
    truth = exact(name, PRIOR, PROPOSAL)
    print(f"{name}: {truth:.4f}, off by {off(values, truth):+.1f} s.e.; gradients by")
    print(off(gradients, exact_gradient(name)))
    assert abs(off(values, truth)) < 5
    assert (abs(off(gradients, exact_gradient(name))) < 5).all()


@pytest.mark.parametrize("name", RATIOS)
def test_sides_that_are_swapped_are_seen(name: str) -> None:
    right = DIVERGENCES[name]()
    swapped = Divergence(
        lambda p, q: right.critic_loss(q, p), lambda p, q: right.penalty(q, p), right.constraint
    )
    values, gradients = estimates(right)
    errors = values.std() / PARTS**0.5, gradients.std(dim=0) / PARTS**0.5  # of the right one
    values, gradients = estimates(swapped)
    assert abs(values.mean() - exact(name, PRIOR, PROPOSAL)) > 5 * errors[0]
    wrong = (gradients.mean(dim=0) - torch.as_tensor(exact_gradient(name))).abs()
    assert (wrong > 5 * errors[1]).any()


@pytest.mark.parametrize("name", RATIOS)
def test_exact_scores_are_the_best(name: str) -> None:
    """Shifted or scaled scores raise the critic's loss, and lower what is certified."""
    divergence = DIVERGENCES[name]()
    torch.manual_seed(1)
    sides = [
        loc + scale * torch.randn(SIZE, dtype=torch.float64) for loc, scale in (PRIOR, PROPOSAL)
    ]
    scores = [score(z) for z in sides]
    best = divergence.critic_loss(*scores)
    for other in (lambda s: s + 0.1, lambda s: s - 0.1, lambda s: 1.15 * s, lambda s: 0.85 * s):
        assert divergence.critic_loss(*map(other, scores)) > best


def test_who_does_not_saturate_moves_both_sides_towards_each_other() -> None:
    values, gradients = estimates(jensen_shannon(saturating=False))
    mean = gradients.mean(dim=0)
    assert mean[0] < 0 < mean[2]  # the prior lies left of the proposal
    equal = torch.zeros(9)
    assert jensen_shannon(saturating=False).penalty(equal, equal) == pytest.approx(math.log(2.0))
    assert (values > values.new_tensor(0.0)).all()
    far = torch.full((9,), 30.0, requires_grad=True), torch.full((9,), -30.0, requires_grad=True)
    for saturating, moves in ((True, False), (False, True)):
        told = jensen_shannon(saturating=saturating).penalty(-far[0], -far[1])
        (gradient,) = torch.autograd.grad(told, far[1])
        assert (gradient.abs().max() > 0.01) == moves


def normals(size: int, dims: int = 3) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draws of two normals, and location and deviation of each."""
    sides = [torch.linspace(-0.5, 0.5, dims), torch.linspace(0.6, 1.2, dims)]
    sides += [torch.linspace(0.4, 0.1, dims), torch.linspace(1.0, 0.5, dims)]
    sides = [part.double() for part in sides]
    p = sides[0] + sides[1] * torch.randn(size, dims, dtype=torch.float64)
    q = sides[2] + sides[3] * torch.randn(size, dims, dtype=torch.float64)
    return p, q, sides


def exact_mmd(sides: list[Tensor], b: float = 1.0) -> Tensor:
    def kernel(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
        width = b**2 + s**2 + t**2
        return ((b / width.sqrt()) * (-((m - n) ** 2) / (2 * width)).exp()).prod()

    (m, s), (n, t) = sides[:2], sides[2:]
    return kernel(m, s, m, s) + kernel(n, t, n, t) - 2 * kernel(m, s, n, t)


def test_the_mean_discrepancy_is_unbiased() -> None:
    torch.manual_seed(2)
    values, gradients, biased = [], [], []
    for _ in range(600):
        p, q, sides = normals(16)
        q = q.requires_grad_()
        value = mmd(bandwidth=1.0)(p, q)
        (gradient,) = torch.autograd.grad(value, q)
        values.append(value.detach())
        gradients.append(gradient.sum(dim=0))
        biased.append(value.detach() * 15 / 16 + 2 / 16)  # k(x, x) = 1 among the pairs
    truth = exact_mmd(sides)
    at = sides[2].clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact_mmd([*sides[:2], at, sides[3]]), at)
    print(f"exact {float(truth):.4f}, off by {off(torch.stack(values), float(truth)):+.1f} s.e.")
    assert abs(off(torch.stack(values), float(truth))) < 5
    assert (abs(off(torch.stack(gradients), slope.numpy())) < 5).all()
    assert abs(off(torch.stack(biased), float(truth))) > 5


def test_the_bandwidth_is_the_median_distance() -> None:
    torch.manual_seed(3)
    p, q, _ = normals(40)
    rows = torch.cat([p, q])
    distance = torch.cdist(rows, rows)
    same_frame = torch.eye(40, dtype=torch.bool).repeat(2, 2)
    half = torch.ones(80, 80, dtype=torch.bool)
    half[40:, :40] = False  # each pair of the two sides once, as the others with i, j and j, i
    b = float(distance[half & ~same_frame].square().median().sqrt())
    assert float(mmd()(p, q)) == pytest.approx(float(mmd(bandwidth=b)(p, q)), rel=1e-6)
    two = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    k = {d: 1 / (1 + d**2 / 2) for d in (1, 2, 4)}
    expected = k[1] + k[2] - (k[4] + k[1])  # of the sides; of (0, 4) and (1, 2)
    assert float(mmd("multiquadric", 1.0)(*two)) == pytest.approx(expected, rel=1e-6)


def test_slices_are_exact_along_directions() -> None:
    torch.manual_seed(4)
    p, q, (m, s, n, t) = normals(20_000)
    found = torch.stack([sliced_wasserstein(8)(p, q) for _ in range(60)])
    unit = torch.randn(200_000, 3, dtype=torch.float64)
    unit = unit / unit.norm(dim=1, keepdim=True)
    deviations = ((unit * s).norm(dim=1), (unit * t).norm(dim=1))
    truth = ((unit @ (m - n)) ** 2 + (deviations[0] - deviations[1]) ** 2).mean()
    print(f"exact {float(truth):.4f}, off by {off(found, float(truth)):+.1f} s.e.")
    assert abs(off(found, float(truth))) < 5
    assert abs(off(found, float(((m - n) ** 2 + (s - t) ** 2).sum()))) > 5  # W2 of the whole


def test_matching_reads_observed_frames_of_its_view() -> None:
    torch.manual_seed(5)
    h = 2.0 * torch.randint(2, (1, 1, 4000, 1)).double() - 1.0
    d = pairs(h, -h, h)  # marginals agree, conditionals do not
    blind = Matching(mmd(bandwidth=1.0)).penalty(d)
    seeing = Matching(mmd(bandwidth=1.0), view="conditional").penalty(d)
    assert abs(float(blind)) < 0.01 < 0.1 < float(seeing)
    mask = torch.arange(4000) < 1500
    spoilt = d._replace(mask=mask.expand(1, 1, -1), z=d.z.where(mask.unsqueeze(-1), 1e6))
    assert abs(float(Matching(mmd(bandwidth=1.0), most=4000).penalty(spoilt))) < 0.01


def shifted(size: int, dims: int, nats: float) -> StepDensities:
    zeros = torch.zeros(1, 1, size, dims)
    return pairs(zeros, zeros + math.sqrt(2 * nats / dims), zeros[..., :1])


@pytest.mark.parametrize(("dims", "nats"), [(4, 0.5), (4, 2.0)])
def test_a_critic_learns_the_kl(dims: int, nats: float) -> None:
    """More of this table, and where it fails: examples/studies/critic_zoo.py."""
    torch.manual_seed(6)
    critic = FeedForwardCritic(dims, 0, 64, view="marginal", activation="silu").double()
    optim = torch.optim.Adam(critic.parameters(), lr=5e-3)
    adversarial = Adversarial(critic, divergence=log_ratio(), optim=optim)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 400)
    for _ in range(400):
        adversarial.improve(shifted(1024, dims, nats))
        falling.step()
    found = adversarial.distance(shifted(200_000, dims, nats))
    print(f"{dims} dimensions: {nats} nats read as {found:.3f}")
    assert found == pytest.approx(nats, rel=0.03)
