"""Critics: networks that score codes, high for draws of the prior, low for draws of the guide.

The critic of a refined prior, :class:`LogRatio`, scores the other way round.

A critic is called with what a view shows it: ``critic(z, context, path)``,

* ``z`` ``(T, K, B, Z)``: the code scored at each step;
* ``context`` ``(T, K, B, C)`` or None: what else is seen at that step (h_t, or h_t and x_t);
* ``path`` ``(T, K, B, Z)`` or None: codes of which those before t are seen at step t;

and returns scores ``(T, K, B)``. It never sees the future of a step, hence no padding either.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from inference.protocols import counts, one_of
from pyro_avrnn.networks import ACTIVATIONS, LSTM, MLP
from pyro_avrnn.shapes import broadcast_cat

#: a name of ``VIEWS``, or a function of step densities that shows something else
View = str | Callable[..., Any]
#: what each view shows next to z_t: (h_t, x_t, the path before t)
VIEWS: dict[str, tuple[bool, bool, bool]] = {
    "marginal": (False, False, False),
    "trajectory": (False, False, True),
    "trajectory_redrawn": (False, False, True),
    "conditional": (True, False, False),
    "joint": (True, True, False),
}


def context_dim(view: str, h_dim: int, x_dim: int) -> int:
    """Width C of the context that a view shows a critic.

    Raises:
        ValueError: an unknown view.
    """
    one_of(VIEWS, view=view)
    sees_h, sees_x, _ = VIEWS[view]
    return sees_h * h_dim + sees_x * x_dim


class GroupSort(nn.Module):
    """Sort pairs of features: an activation that keeps the gradient's norm.

    Source: Anil, Lucas and Grosse (2019), https://arxiv.org/abs/1811.05381.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(*batch, F)`` in and out, F even."""
        pairs = x.unflatten(-1, (-1, 2))
        return torch.cat([pairs.amax(dim=-1), pairs.amin(dim=-1)], dim=-1)


class LSTMCritic(nn.Module):
    """The critic of AVRNN: one LSTM layer and two fully connected layers.

    Where the view gives a path, the LSTM has read the codes before t when it scores z_t.
    Weight clipping or a gradient penalty makes it Lipschitz; spectral normalisation does not
    bound a recurrent map by one and is left to :class:`FeedForwardCritic`.

    Source: papers on AVRNN, section VI ("one layer of LSTM and two layers of fully connect
    neural networks"), https://arxiv.org/abs/2108.04496.

    Args:
        z_dim: Z.
        context_dim: C, 0 for a view without context.
        critic_dim: width of the LSTM and of the hidden layer.
        view: what it is shown, a name of ``VIEWS`` or a function; ``Adversarial`` reads it.
    """

    lipschitz: str | None = None

    def __init__(
        self, z_dim: int, context_dim: int = 0, critic_dim: int = 64, *, view: View | None = None
    ) -> None:
        super().__init__()
        counts(1, z_dim=z_dim, critic_dim=critic_dim)
        counts(0, context_dim=context_dim)
        self.view = view
        self.cell = LSTM(z_dim + context_dim, critic_dim)
        self.head = MLP([critic_dim, critic_dim, 1])

    def forward(
        self, z: Tensor, context: Tensor | None = None, path: Tensor | None = None
    ) -> Tensor:
        """Scores ``(T, K, B)``."""
        inputs = z if context is None else broadcast_cat(z, context)
        if path is z:  # each code's own path: one pass over the sequence scores every step
            return self.head(self.cell.sequence(inputs)).squeeze(-1)
        memory = self.cell.initial(Size(z.shape[1:-1]))
        if path is not None:
            seen = path if context is None else broadcast_cat(path, context)
            memories = [memory]
            for past in seen[:-1]:
                memories.append(self.cell(past, memories[-1]))
            memory = torch.stack(memories)
        return self.head(self.cell.output(self.cell(inputs, memory))).squeeze(-1)


class FeedForwardCritic(nn.Module):
    """Fully connected critic, on demand 1-Lipschitz by spectral normalisation.

    With ``lipschitz="z"`` every layer that z passes is normalised, while the context enters
    through a network of its own that shifts the first layer: the critic is then 1-Lipschitz in
    z for each context, which is what measures the average over h of W1 given h. ``"all"``
    normalises in context and z together.

    Source: Miyato et al. (2018), https://arxiv.org/abs/1802.05957, for the normalisation.

    Args:
        z_dim, context_dim, view: as for :class:`LSTMCritic`.
        critic_dim: width of the hidden layers, even.
        depth: number of hidden layers.
        activation: a name of ``ACTIVATIONS``, or "groupsort", with which the bound of one can be
            reached.
        lipschitz: None, "z" or "all".
        window: how many codes of a path before z_t are seen; 0 for views without a path.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        z_dim: int,
        context_dim: int = 0,
        critic_dim: int = 64,
        *,
        view: View | None = None,
        depth: int = 2,
        activation: str = "relu",
        lipschitz: str | None = None,
        window: int = 0,
    ) -> None:
        super().__init__()
        activations = {**ACTIVATIONS, "groupsort": GroupSort}
        one_of(activations, activation=activation)
        if lipschitz is not None and lipschitz not in ("z", "all"):
            raise ValueError(f"lipschitz must be None, 'z' or 'all', got {lipschitz!r}")
        counts(1, z_dim=z_dim, critic_dim=critic_dim, depth=depth)
        counts(0, context_dim=context_dim, window=window)
        if critic_dim % 2:
            raise ValueError(f"critic_dim must be even, got {critic_dim}")
        self.view, self.lipschitz, self.window = view, lipschitz, window
        context_dim += window * z_dim
        together = lipschitz == "all"

        def linear(width_in: int, width_out: int) -> nn.Module:
            layer = nn.Linear(width_in, width_out)
            return spectral_norm(layer) if lipschitz else layer

        self.first = linear(z_dim + together * context_dim, critic_dim)
        self.condition: nn.Module | None = None
        if context_dim and not together:
            self.condition = MLP([context_dim, critic_dim, critic_dim])
        layers: list[nn.Module] = [activations[activation]()]
        for _ in range(depth - 1):
            layers += [linear(critic_dim, critic_dim), activations[activation]()]
        self.rest = nn.Sequential(*layers, linear(critic_dim, 1))

    def forward(
        self, z: Tensor, context: Tensor | None = None, path: Tensor | None = None
    ) -> Tensor:
        """Scores ``(T, K, B)``."""
        seen = [] if context is None else [context]
        if self.window and path is None:
            raise ValueError("this critic has a window, so its view must show a path")
        if path is not None:
            if not self.window:
                raise ValueError("a view with a path needs a critic with window > 0, or an LSTM")
            for lag in range(1, self.window + 1):  # the code lag steps ago, zero before the start
                past = torch.zeros_like(path)
                past[lag:] = path[: max(len(path) - lag, 0)]
                seen.append(past)
        if self.condition is None:
            return self.rest(self.first(broadcast_cat(z, *seen))).squeeze(-1)
        return self.rest(self.first(z) + self.condition(broadcast_cat(*seen))).squeeze(-1)


class LogRatio(nn.Module):
    r"""Critic of a refined prior: r(u, h), within a bound, 0 everywhere before it is trained.

    Args:
        z_dim: Z.
        h_dim: H, what the prior reads.
        critic_dim: width of the hidden layers.
        depth: number of hidden layers.
        bound: the largest size of r, reached smoothly: :math:`b \tanh(r / b)`.
        dropout: probability of zeroing a hidden unit while the critic learns.
    """

    view = "refine"

    def __init__(
        self,
        z_dim: int,
        h_dim: int,
        critic_dim: int = 64,
        *,
        depth: int = 2,
        bound: float = 8.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        counts(1, z_dim=z_dim, h_dim=h_dim, critic_dim=critic_dim, depth=depth)
        self.z_dim, self.h_dim, self.bound = z_dim, h_dim, bound
        self.read, self.condition = nn.Linear(z_dim, critic_dim), nn.Linear(h_dim, critic_dim)
        layers: list[nn.Module] = []
        for _ in range(depth - 1):
            layers += [nn.SiLU(), nn.Dropout(dropout), nn.Linear(critic_dim, critic_dim)]
        self.rest = nn.Sequential(*layers, nn.SiLU(), nn.Dropout(dropout))
        self.last = nn.Linear(critic_dim, 1)
        self.reset()
        self.shift, self.spread = nn.Buffer(torch.zeros(h_dim)), nn.Buffer(torch.ones(h_dim))

    @torch.no_grad()
    def reset(self) -> None:
        """Set r to 0 everywhere, so that the prior is its base."""
        self.last.weight.zero_()
        self.last.bias.zero_()

    @torch.no_grad()
    def scale_to(self, h: Tensor) -> None:
        """Read h in units of the mean and deviation of these rows ``(N, H)``."""
        self.shift.copy_(h.mean(dim=0))
        self.spread.copy_(h.std(dim=0) + 1e-6)

    def forward(self, u: Tensor, h: Tensor, path: Tensor | None = None) -> Tensor:
        """r ``(*shape, *batch)`` of u ``(*shape, *batch, Z)``, given h ``(*batch, H)``."""
        read = self.read(u) + self.condition((h - self.shift) / self.spread)
        raw = self.last(self.rest(read)).squeeze(-1)
        return self.bound * torch.tanh(raw / self.bound)


CRITICS = ("lstm", "feedforward")
