r"""Twists: let a particle filter choose particles by the future as well.

A twist estimates :math:`\log r_t(x_{t+1:T} \mid s_{t+1})`, how likely the observations to come are
from a state, up to terms that are the same for all particles of a sequence. The weight of step t
is multiplied by :math:`r_t / r_{t-1}`, with :math:`r_0 = r_T = 1`. The product over steps is that
of plain weights, so that the estimate of the evidence stays unbiased for any twist, and log Z_hat
a lower bound. With the exact :math:`r_t` and the proposal :math:`p(z_t \mid s_t, x_{t:T})` it is
the evidence.

A plain filter ends with particles that explain the past; if an observation comes much later than
what it depends on, resampling has lost them by then.

The classifier learns from the model alone: from sequences drawn from it, whose true states are
draws of p(s | x_{1:T}), against states of a plain filter on the same sequences, draws of
p(s | x_{1:t}) in the limit of many particles. The ratio of both is p(x_{t+1:T} | s) over a term
that is the same for all states.

Sources: Lawson et al. (2022), https://arxiv.org/abs/2206.05952 (SIXO; the twist by classification,
where states of other sequences stand on the other side); Guarniero et al. (2017),
https://arxiv.org/abs/1511.06286 (twists as such).
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inference.densities import check_batch
from inference.free_runs import free_run
from inference.protocols import Program, counts, of_kind, require_stepwise
from inference.resampling import Selection


@runtime_checkable
class Twist(Protocol):
    """What reads the future and compares states with it."""

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Codes ``(B, T, C)`` of data ``(B, T, X)``, that of step t of x_t .. x_T."""
        ...

    def __call__(self, h: Tensor, code: Tensor) -> Tensor:
        """log r ``(K, B)`` of states h ``(K, B, H)`` before step t and its codes ``(B, C)``."""
        ...


class Foresight(NamedTuple):
    """A twist that has read a batch."""

    twist: Any
    codes: Tensor  # (T, B, C)
    mask: Tensor  # (T, B) bool

    @classmethod
    def of(cls, twist: Any, x: Tensor, mask: Tensor) -> "Foresight":
        """Read x ``(B, T, X)``."""
        codes = twist.encode(x, mask)
        of_kind(Tensor, "codes (B, T, C)", **{"what twist.encode gives": codes})
        if codes.ndim != 3 or codes.shape[:2] != mask.shape:
            raise ValueError(
                f"twist.encode must give codes (B, T, C) with (B, T) = {tuple(mask.shape)}, got "
                f"{tuple(codes.shape)}"
            )
        return cls(twist, codes.transpose(0, 1), mask.t())

    def before(self, h: Tensor, t: int) -> Tensor:
        """log r ``(K, B)`` of states h ``(K, B, H)`` before step t, from 0; 0 at both ends."""
        if t in (0, len(self.codes)):
            return h.new_zeros(h.shape[:-1])
        return torch.where(self.mask[t], self._score(h, self.codes[t]), 0.0)

    def all_before(self, h: Tensor, start: int = 0) -> Tensor:
        """The same ``(T, K, B)`` for the states of some steps ``(T, K, B, H)``, from ``start``."""
        end = min(start + len(h), len(self.codes))
        steps = torch.arange(start, start + len(h), device=h.device)
        inner = ((steps > 0) & (steps < len(self.codes)))[:, None, None]
        pad = start + len(h) - end
        codes = F.pad(self.codes[start:end], (0, 0, 0, 0, 0, pad)).unsqueeze(1)
        mask = F.pad(self.mask[start:end], (0, 0, 0, pad)).unsqueeze(1)
        return torch.where(mask & inner, self._score(h, codes), 0.0)

    def _score(self, h: Tensor, codes: Tensor) -> Tensor:
        found: Tensor = self.twist(h, codes)
        if found.shape != h.shape[:-1]:
            raise ValueError(
                f"twist must give log r of shape {tuple(h.shape[:-1])}, got {tuple(found.shape)}"
            )
        return found


class TwistLearning:
    """The hook that trains a twist between SVI steps, on sequences drawn from the model.

    Args:
        twist: a module, such as ``pyro_avrnn.twists.FutureTwist``.
        optim: a torch optimiser over its parameters alone; Adam(1e-3) if None.
        num_particles: K of the filter whose states the true ones are told from.
        steps: updates per SVI step, each on new sequences.
        name: prefix of its metrics.
    """

    def __init__(
        self,
        twist: nn.Module,
        *,
        optim: torch.optim.Optimizer | None = None,
        num_particles: int = 16,
        steps: int = 1,
        name: str = "twist",
    ) -> None:
        of_kind(Twist, "a module with encode(x, mask)", twist=twist)
        counts(1, steps=steps)
        counts(2, num_particles=num_particles)
        self.twist, self.num_particles, self.steps, self.name = twist, num_particles, steps, name
        self.optim = optim or torch.optim.Adam(twist.parameters(), lr=1e-3)
        moved = {id(p) for group in self.optim.param_groups for p in group["params"]}
        if moved != {id(p) for p in twist.parameters()}:
            raise ValueError(
                "optim must hold the twist's parameters and no others; make it with "
                "twist.parameters()"
            )
        twist.eval().requires_grad_(False)  # a constant for SVI

    def update(
        self, model: Program, guide: Program, *args: Any, start: Any = None
    ) -> dict[str, float]:
        """Learn from sequences as many and as long as those of the SVI step before.

        Args:
            model, guide, args: of that step; model and guide are constants here.
            start: the state it started from; drawn sequences start anew.

        Returns:
            The loss, and the share of states that it tells right.
        """
        require_stepwise(model, guide)
        _, mask = check_batch(model, *args)
        metrics: dict[str, float] = {}
        for _ in range(self.steps):
            metrics = self._learn(model, guide, mask)
        return metrics

    def _learn(self, model: Any, guide: Any, mask: Tensor) -> dict[str, float]:
        true, filtered, x, mask = self.states(model, guide, mask)
        self.twist.train().requires_grad_(True)
        sight = Foresight.of(self.twist, x, mask)
        keep = mask.t().unsqueeze(1).clone()
        keep[0] = False  # nothing is known before step 1
        scores = [sight.all_before(h)[keep.expand(h.shape[:-1])] for h in (true, filtered)]
        if not len(scores[0]):
            return {}  # series of one step have no future
        loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        self.optim.zero_grad(set_to_none=True)
        loss.backward()
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)
        self.twist.eval().requires_grad_(False)
        right = ((scores[0] > 0).double().mean() + (scores[1] <= 0).double().mean()) / 2
        return {f"{self.name}_loss": loss.item(), f"{self.name}_accuracy": right.item()}

    @torch.no_grad()
    def states(
        self, model: Any, guide: Any, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """True states ``(T, 1, B, H)`` of drawn sequences, those of a filter, x and mask."""
        true = free_run(model, mask.t().unsqueeze(1))
        x, mask = check_batch(model, true.x[:, 0].transpose(0, 1), mask)
        chosen = Selection("multinomial", "always", mask)
        filtered = model.rollout(guide, x, mask, num_particles=self.num_particles, select=chosen)
        assert true.h is not None and filtered.h is not None
        return true.h, filtered.h, x, mask

    def state_dict(self) -> dict[str, Any]:
        """The twist and its optimiser."""
        return {"twist": self.twist.state_dict(), "optim": self.optim.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.twist.load_state_dict(state["twist"])
        self.optim.load_state_dict(state["optim"])
