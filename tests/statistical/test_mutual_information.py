"""Estimates of mutual information against correlated normals, whose information is known.

z = a f + b e with unit normals f and e: I(f; z) = log(1 + a^2 / b^2) / 2 a dimension. Estimates
use exact scores, so that only the formulas are on trial; a critic has to learn its scores below.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from inference import Adversarial, mmd
from inference.densities import StepDensities
from inference.global_information import GlobalInformation, GlobalMatching
from inference.mutual_information import ESTIMATORS, infonce, scores_of_pairs
from inference.pairs import Pairs
from pyro_avrnn.pair_critics import ConditionalPairCritic, PairCritic
from tests.statistical.test_divergences import exact_mmd, off

PARTS, SIZE = 80, 256


def noise_of(nats: float) -> float:
    """b, where a is 1."""
    return float(math.expm1(2 * nats)) ** -0.5


def log_joint(f: Tensor, z: Tensor, a: float, b: float) -> Tensor:
    """log q(f given z), a dimension."""
    gain = a / (a**2 + b**2)
    return Normal(gain * z, b / (a**2 + b**2) ** 0.5).log_prob(f)


def exact_scores(f: Tensor, z: Tensor, a: float, b: float, density: bool) -> Tensor:
    """Scores (B, B) of each z with each f: of a density, or a log-ratio."""
    scores = log_joint(f[None, :], z[:, None], a, b)
    return scores if density else scores - Normal(0.0, 1.0).log_prob(f)


def split(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores_of_pairs(scores, torch.ones(len(scores), dtype=torch.bool))


def estimates(
    name: str, nats: float, count: int, of: Callable[[Tensor], tuple[Tensor, Tensor]] = split
) -> tuple[Tensor, Tensor]:
    """Values and gradients by a, (PARTS,) each, of batches of so many pairs."""
    torch.manual_seed(0)
    b = noise_of(nats)
    values, gradients = [], []
    for _ in range(PARTS):
        a = torch.ones((), dtype=torch.float64, requires_grad=True)
        f, e = torch.randn(2, count, dtype=torch.float64)
        scores = exact_scores(f, a * f + b * e, 1.0, b, name in ("club", "reversal"))
        value = ESTIMATORS[name]().penalty(*of(scores))
        gradients.append(torch.autograd.grad(value, a)[0])
        values.append(value.detach())
    return torch.stack(values), torch.stack(gradients)


def truth(name: str, nats: float) -> float:
    correlation = 1.0 - math.exp(-2 * nats)  # squared
    if name == "club":
        return correlation / (1.0 - correlation)
    return nats - Normal(0.0, 1.0).entropy().item() if name == "reversal" else nats


@pytest.mark.parametrize(
    ("name", "nats"),
    [(n, i) for n in ESTIMATORS for i in (0.1, 1.0, 3.0) if (n, i) != ("nwj", 3.0)],
)
def test_values_are_exact(name: str, nats: float) -> None:
    values, _ = estimates(name, nats, SIZE)
    found = truth(name, nats)
    short = math.expm1(2 * nats) / (2 * SIZE) if name == "infonce" else 0.0  # by the finite batch
    print(f"{name}, {nats} nats: {float(values.mean()):.4f} for {found:.4f}")
    assert abs(off(values, found)) < 5 + short / float(values.std() / PARTS**0.5)
    fixed = torch.roll(torch.arange(SIZE), 1)  # planted: every third pair is left as it was
    fixed[::3] = torch.arange(SIZE)[::3]

    def leaving(scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores[torch.arange(SIZE), fixed].unsqueeze(-1), scores.diagonal()

    if name in ("nwj", "club") and nats >= 1.0:  # those that weigh the others by themselves
        assert abs(off(estimates(name, nats, SIZE, leaving)[0], found)) > 5


@pytest.mark.parametrize("name", ["density_ratio", "nwj", "infonce"])
def test_gradients_are_exact(name: str) -> None:
    _, gradients = estimates(name, 1.0, SIZE)
    b = noise_of(1.0)
    error = off(gradients, 1.0 / (1.0 + b**2))
    print(f"{name}: gradient off by {error:+.1f} s.e.")
    assert abs(error) < 5
    assert gradients.mean() > 0  # more signal, more information


def test_pairs_of_two_passes_know_nothing() -> None:
    torch.manual_seed(1)
    f, e, other = torch.randn(3, 4000, dtype=torch.float64)
    b = noise_of(1.0)
    right = infonce().penalty(*split(exact_scores(f[:500], f[:500] + b * e[:500], 1.0, b, False)))
    wrong = infonce().penalty(*split(exact_scores(other[:500], f[:500], 1.0, b, False)))
    assert right > 0.8
    assert wrong < 0.0


def test_infonce_has_a_ceiling() -> None:
    values, _ = estimates("infonce", 6.0, 16)
    print(f"6 nats among 16: {float(values.mean()):.3f} of {math.log(16):.3f}")
    assert 0.9 * math.log(16) < values.mean() <= math.log(16)


def test_the_bonus_knows_the_density_of_the_guide() -> None:
    """I(x; f) of q(f given x) = N(x, b): the same normals, no critic."""
    torch.manual_seed(2)
    b, values = noise_of(1.0), []
    for _ in range(PARTS):
        x = torch.randn(512, 1, dtype=torch.float64)
        q = torch.distributions.Independent(Normal(x, b), 1)
        d = densities(f=q.rsample()[None], prior=b, proposal=q)
        values.append(GlobalInformation().information(d))
        assert torch.isclose(GlobalInformation().penalty(d), -values[-1] * 512 / d.mask.sum())
    short = math.expm1(2.0) / 1024
    assert abs(off(torch.stack(values), 1.0 - short)) < 5 + short / float(
        torch.stack(values).std() / PARTS**0.5
    )


def densities(
    *, f: Tensor, prior: float, proposal: torch.distributions.Distribution
) -> StepDensities:
    """Densities of f alone, of sequences of three steps."""
    zeros = f.new_zeros(3, *f.shape[:2])
    terms = dict.fromkeys(("log_prior", "log_emission", "log_proposal"), zeros)
    p = torch.distributions.Independent(Normal(f.new_zeros(f.shape), 1.0), 1)
    return StepDensities(
        z=zeros.unsqueeze(-1), h=None, x=zeros[:, :1].unsqueeze(-1),
        mask=torch.ones(3, 1, f.shape[1], dtype=torch.bool), **terms, prior=None, emission=None,
        proposal=None, f=f, prior_f=p, proposal_f=proposal,
    )  # fmt: skip


def test_the_aggregate_is_matched() -> None:
    torch.manual_seed(3)
    sides = [torch.tensor([v], dtype=torch.float64) for v in (0.0, 1.0, 0.7, 0.5)]
    values = []
    for _ in range(600):
        f = 0.7 + 0.5 * torch.randn(1, 16, 1, dtype=torch.float64)
        q = torch.distributions.Independent(Normal(f[0], 0.1), 1)
        d = densities(f=f, prior=1.0, proposal=q)
        values.append(GlobalMatching(mmd(bandwidth=1.0)).penalty(d) * d.mask.sum() / 16)
    assert abs(off(torch.stack(values), float(exact_mmd(sides)))) < 5
    assert abs(off(torch.stack(values), 0.0)) > 5


def normals(nats: float, count: int, dims: int = 2) -> Pairs:
    b = noise_of(nats / dims)
    f = torch.randn(1, count, dims)
    z = (f + b * torch.randn_like(f)) / (1 + b**2) ** 0.5
    return Pairs(z[None], f, torch.ones(1, 1, count, dtype=torch.bool))


@pytest.mark.parametrize("nats", [0.1, 1.0, 3.0])
def test_a_critic_learns_the_information(nats: float) -> None:
    """Within 5 %. At 5 nats it reads 4.6 after 600 steps: pairs that far apart are rare."""
    torch.manual_seed(4)
    critic = PairCritic(2, 2, 64, reads="step")
    optim = torch.optim.Adam(critic.parameters(), lr=3e-3)
    hook = Adversarial(critic, role="information", divergence=infonce(), optim=optim)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 500)
    for _ in range(500):
        hook.learn(normals(nats, 256))
        falling.step()
    with torch.no_grad():
        found = torch.stack(
            [
                hook.divergence.penalty(*hook.role.scores(critic, p, p.mask))
                for p in (normals(nats, 512) for _ in range(60))
            ]
        )
    error = float(found.std() / len(found) ** 0.5)
    print(f"{nats} nats read as {float(found.mean()):.3f} ± {error:.3f}")
    assert abs(float(found.mean()) - nats) < 0.05 * nats + 2 * error


def test_a_density_learns_an_upper_bound() -> None:
    torch.manual_seed(5)
    critic = ConditionalPairCritic(2, 2, 32, reads="step")
    optim = torch.optim.Adam(critic.parameters(), lr=5e-3)
    hook = Adversarial(critic, role="information", divergence=ESTIMATORS["club"](), optim=optim)
    for _ in range(200):
        hook.learn(normals(1.0, 256))
    with torch.no_grad():
        p = normals(1.0, 4000)
        found = float(hook.divergence.penalty(*hook.role.scores(critic, p, p.mask)))
    expected = 2 * truth("club", 0.5)  # 3.4, where the information is 1
    print(f"CLUB: {found:.2f} for {expected:.2f}")
    assert found == pytest.approx(expected, rel=0.2)
    assert found > 1.0
