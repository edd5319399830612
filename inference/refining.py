"""Refine the prior of a trained model: teach its critic, all else fixed, and say what it gained.

With p~(z | h) proportional to p(z | h) exp r(z, h) in place of p, the ELBO rises by
E_q[r] - E_h[log E_p exp r], which is at least E_q[r] - E_p[exp r] + 1: the bound on the aggregate
mismatch that :func:`~inference.information.rate_split` reports is a gain certified in advance.
What "draw S, keep one" gives of it is measured by its own density.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from inference.densities import check_batch
from inference.divergences import RATIO_LOSSES, Divergence
from inference.modes import evaluating
from inference.protocols import Program, at_least, counts, of_kind, one_of, require_programs
from inference.random import seeded
from inference.roles import Refinable
from inference.traces import step_densities


class Refinement(NamedTuple):
    """What a refined prior gained on held-out sequences, nats a frame, with standard errors.

    Errors are those of an average over sequences.
    """

    certified: float  # E_q[r] - E_p[exp r] + 1, what can be gained with enough candidates
    certified_se: float
    gained: float  # E_q of log p~ - log p with S candidates: what the ELBO rises by
    gained_se: float
    accuracy: float  # of telling codes of guide and base apart; 0.5: nothing is left to refine
    effective_candidates: float  # 1 / sum of squared shares, in [1, S]
    num_candidates: int
    best_step: int  # 0 where nothing certified more than what the critic knew before


def refine(
    model: Program,
    guide: Program,
    train: tuple[Tensor, Tensor | None],
    heldout: tuple[Tensor, Tensor | None],
    *,
    steps: int = 2500,
    batch_frames: int = 1024,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    loss: str = "log_ratio",
    seed: int = 0,
    progress: bool = False,
) -> Refinement:
    """Teach the critic of a model's refined prior on codes of the guide and draws of the base.

    Model and guide are constants, in evaluation mode. Codes of the guide are drawn anew ten
    times. The critic ends with the parameters that certify most on ``heldout``; r = 0, the base
    prior, is among them.

    Args:
        model: whose prior is a ``RefinedPrior``, as ``recipes.refined(recipe)`` makes it.
        guide: its guide.
        train: x ``(B, T, X)`` and mask ``(B, T)`` that the critic learns from.
        heldout: x and mask that choose the step, and that the report is about. A gain on other
            sequences is what ``evaluate`` shows before and after.
        steps: of AdamW.
        batch_frames: frames in a step.
        lr, weight_decay: of AdamW; the rate falls to 0 along a cosine.
        loss: a name of ``RATIO_LOSSES``, such as log_ratio (logistic regression), kl or pearson.
        seed: of draws and batches.
        progress: show a bar.

    Raises:
        NotImplementedError: a model whose prior is not refined.
        ValueError: a number out of range, an unknown loss, or data as ``evaluate`` refuses them.
    """
    counts(1, steps=steps, batch_frames=batch_frames)
    at_least(0.0, lr=lr, weight_decay=weight_decay)
    one_of(RATIO_LOSSES, loss=loss)
    require_programs(model, guide)
    of_kind(list | tuple, "(x, mask)", train=train, heldout=heldout)
    fitting, judging = (check_batch(model, *part) for part in (train, heldout))
    with seeded(seed), evaluating(model, guide):
        told = _codes(model, guide, *judging)
        critic = _critic(model, guide, *judging)
        best = _Best(critic, told)
        optim = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=weight_decay)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
        bar = tqdm(range(1, steps + 1), "refining the prior", disable=not progress)
        for i in bar:
            if (i - 1) % max(steps // 10, 1) == 0:
                known = _codes(model, guide, *fitting)
                if i == 1 and hasattr(critic, "scale_to"):
                    critic.scale_to(known.h)
            _learn(critic, known.some(batch_frames), optim, RATIO_LOSSES[loss]())
            falling.step()
            if i % max(steps // 50, 1) == 0 or i == steps:
                best.look(i)
                bar.set_postfix_str(f"certified {best.certified:.3f} nats")
        best.restore()
        return _report(critic, _codes(model, guide, *judging), best.step)


class _Told(NamedTuple):
    """Observed frames as rows, in units of the base prior."""

    base: Tensor  # (N, Z), draws of the base
    guide: Tensor  # (N, Z), of the guide
    h: Tensor  # (N, H)
    log_share: Tensor  # (N,), log p~ - log p at the guide's code
    effective: Tensor  # (N,), candidates that count
    sequence: Tensor  # (N,)
    num_candidates: int

    def some(self, count: int) -> "_Told":
        """Rows at random."""
        index = torch.randint(len(self.h), (min(count, len(self.h)),), device=self.h.device)
        return self._replace(base=self.base[index], guide=self.guide[index], h=self.h[index])


class _Best:
    """The critic that certifies most on held-out codes; r = 0 is among them, where it knows it."""

    def __init__(self, critic: Any, told: _Told) -> None:
        self.critic, self.told, self.step, self.certified = critic, told, 0, 0.0
        self.first, self.state = self._now(), dict[str, Tensor]()
        self.look(0)

    def _now(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.critic.state_dict().items()}

    def look(self, step: int) -> None:
        """Keep the critic as it is now, if it is the best."""
        certified = float(_certified(self.critic, self.told).mean())
        if certified > self.certified:
            self.step, self.certified, self.state = step, certified, self._now()

    def restore(self) -> None:
        """Give the critic the best parameters."""
        self.critic.load_state_dict(self.state or self.first)
        if not self.state and hasattr(self.critic, "reset"):
            self.critic.reset()


@torch.no_grad()
def _codes(model: Any, guide: Any, x: Tensor, mask: Tensor) -> _Told:
    rows: list[tuple[Tensor, ...]] = []
    num_candidates = 0
    for index in torch.arange(len(x), device=x.device).split(64):
        d = step_densities(model, guide, x[index], mask[index])
        prior: Any = _refined(d.prior)
        base, own, h = prior.codes(d.z)
        log_share = prior.log_prob(d.z) - prior.base.log_prob(d.z)
        made = (base, own, h, log_share, prior.effective_candidates(d.z))
        keep, num_candidates = d.mask[:, 0], prior.num_candidates
        rows.append((*(c[:, 0][keep] for c in made), index.expand_as(keep)[keep]))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return _Told._make([*columns, num_candidates])


def _refined(prior: Any) -> Refinable:
    if not isinstance(prior, Refinable):
        raise NotImplementedError(
            f"refine needs a model with a refined prior, got a {type(prior).__name__}; make one "
            "by recipes.refined(recipe), or by RefinedPrior(base)"
        )
    return prior


def _critic(model: Any, guide: Any, x: Tensor, mask: Tensor) -> Any:
    with torch.no_grad():
        return _refined(step_densities(model, guide, x[:1], mask[:1]).prior).critic


def _learn(critic: nn.Module, rows: _Told, optim: torch.optim.Optimizer, loss: Divergence) -> None:
    """One step; the critic, a constant for the model, learns here alone."""
    critic.train().requires_grad_(True)
    try:
        value = loss.critic_loss(critic(rows.base, rows.h), critic(rows.guide, rows.h))
        optim.zero_grad(set_to_none=True)
        value.backward()
        optim.step()
        optim.zero_grad(set_to_none=True)
    finally:
        critic.eval().requires_grad_(False)


@torch.no_grad()
def _certified(critic: nn.Module, rows: _Told) -> Tensor:
    """Terms (N,) whose mean bounds the mismatch from below."""
    terms: Tensor = 1.0 + critic(rows.guide, rows.h) - critic(rows.base, rows.h).exp()
    return terms


def _report(critic: nn.Module, rows: _Told, best_step: int) -> Refinement:
    certified = _certified(critic, rows)
    with torch.no_grad():
        right = (critic(rows.guide, rows.h) > 0).double() + (
            critic(rows.base, rows.h) <= 0
        ).double()
    return Refinement(
        *_mean(certified, rows.sequence),
        *_mean(rows.log_share, rows.sequence),
        accuracy=float(right.mean()) / 2,
        effective_candidates=float(rows.effective.mean()),
        num_candidates=rows.num_candidates,
        best_step=best_step,
    )


def _mean(terms: Tensor, sequence: Tensor) -> tuple[float, float]:
    """Mean over frames, and its standard error, sequences being independent."""
    mean = terms.mean()
    sums = terms.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, terms - mean)
    return float(mean), float(sums.square().sum().sqrt()) / len(terms)
