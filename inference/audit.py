"""I(f; z) asked again: a fresh critic, fitted to codes of a trained model, judged on others.

A critic in training chases a guide that runs away from it; that it reports 0 may mean that it is
behind. Here the guide stands still, the critic learns until it no longer improves on codes kept
aside, and the estimate is taken on sequences that neither has seen: a lower bound in expectation.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.adversarial import Adversarial
from inference.mutual_information import infonce
from inference.pairs import Pairs
from inference.protocols import counts
from inference.random import seeded
from inference.recurrent_probes import Paths


class Audit(NamedTuple):
    """I(f; z_{1:T}) of held-out sequences, nats."""

    information: float  # InfoNCE, a lower bound in expectation
    standard_error: float  # over groups of sequences
    ceiling: float  # the largest value it can have, log of the group
    steps: int  # of the critic, to its best


def audit(
    critic: nn.Module,
    fitting: tuple[Paths, Tensor],
    heldout: tuple[Paths, Tensor],
    *,
    steps: int = 1000,
    batch_size: int = 128,
    group: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
) -> Audit:
    """Fit a critic of pairs by InfoNCE, and estimate I(f; z) on held-out sequences.

    Args:
        critic: untrained, of pairs, ``critic(z, f, mask) -> (S, K, B, B)``.
        fitting: codes, as :func:`~inference.recurrent_probes.sequence_paths` draws them in one
            pass, with their mask ``(N, T)``; a fifth of them is kept to stop the critic.
        heldout: the same of sequences that the model was not trained on.
        steps: of the critic at most.
        batch_size: sequences whose codes are told apart while it learns.
        group: sequences whose codes are told apart in the estimate; its log is the ceiling.
        lr: learning rate, which falls linearly to 0.
        seed: of batches and groups.

    Raises:
        ValueError: codes without f, or fewer sequences than it takes.
    """
    counts(1, steps=steps)
    counts(2, batch_size=batch_size, group=group)
    for name, (paths, mask) in (("fitting", fitting), ("heldout", heldout)):
        if paths.f is None:
            raise ValueError(f"{name} must hold f, which all steps share; this model has none")
        if len(mask) < 10:
            raise ValueError(f"{name} must hold at least ten sequences, got {len(mask)}")
    optim = torch.optim.Adam(critic.parameters(), lr=lr)
    hook = Adversarial(critic, role="information", divergence=infonce(), optim=optim)
    with seeded(seed):
        order = torch.randperm(len(fitting[1]))
        aside, fitted = order[: len(order) // 5], order[len(order) // 5 :]
        best, most, at = critic.state_dict(), -float("inf"), 0
        for i in range(steps):
            if i % 25 == 0:
                value = _estimates(hook, fitting, aside.split(group)).mean()
                if value > most:
                    most, at = float(value), i
                    best = {k: v.clone() for k, v in critic.state_dict().items()}
            optim.param_groups[0]["lr"] = lr * (1.0 - i / steps)
            chosen = fitted[torch.randperm(len(fitted))[:batch_size]]
            hook.learn(_pairs(*fitting, chosen))
        critic.load_state_dict(best)
        groups = torch.randperm(len(heldout[1])).split(group)
        groups = groups if len(groups) == 1 else [g for g in groups if len(g) == group]
        found = _estimates(hook, heldout, groups)
    error = found.std() / len(found) ** 0.5 if len(found) > 1 else found.new_tensor(float("nan"))
    ceiling = torch.tensor(float(len(groups[0]))).log()
    return Audit(float(found.mean()), float(error), float(ceiling), at)


def _pairs(paths: Paths, mask: Tensor, chosen: Tensor) -> Pairs:
    assert paths.f is not None
    z = paths.z[chosen].transpose(0, 1).unsqueeze(1)  # (T, 1, B, Z)
    return Pairs(z, paths.f[chosen].unsqueeze(0), mask[chosen].t().unsqueeze(1))


@torch.no_grad()
def _estimates(hook: Adversarial, codes: tuple[Paths, Tensor], groups: list[Tensor]) -> Tensor:
    """InfoNCE of each group of sequences."""
    values = []
    for chosen in groups:
        if len(chosen) > 1:
            scores = hook.role.scores(hook.critic, pairs := _pairs(*codes, chosen), pairs.mask)
            values.append(hook.divergence.penalty(*scores))
    return torch.stack(values)
