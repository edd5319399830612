"""Critics of pairs: how well does an f go with a path z_{1:T}?

A critic of pairs is called with ``z`` ``(T, K, B, Z)``, ``f`` ``(K, B, F)`` and a prefix mask
``(T, 1, B)`` or ``(T, K, B)``, and returns a score for the z of each sequence i with the f of each
sequence j, ``(S, K, B, B)``: S is 1 where it reads whole paths, T where it reads single steps.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from inference.protocols import counts, one_of
from pyro_avrnn.networks import MLP, NormalNetwork, RecurrentEncoder

Reads = Literal["path", "step"]
READS = ("path", "step")


class PathReader(nn.Module):
    """What a critic knows of z: a summary of the path, or of each of its steps.

    Args:
        z_dim: Z.
        width: of the summary.
        reads: "path", by a GRU in both directions, or "step", each z_t by itself: it sees what
            one step tells of f, I(f; z_t), which is at most I(f; z_{1:T}), and costs less.
    """

    def __init__(self, z_dim: int, width: int, reads: Reads = "path") -> None:
        super().__init__()
        one_of(READS, reads=reads)
        counts(1, z_dim=z_dim, width=width)
        self.encoder = RecurrentEncoder(z_dim, width, "both") if reads == "path" else None
        entered = z_dim if self.encoder is None else self.encoder.out_dim
        self.rest = MLP([entered, width, width], activation="silu")

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """Summaries ``(S, K, B, width)`` of z ``(T, K, B, Z)``."""
        if self.encoder is None:
            return self.rest(z)
        rows = z.flatten(1, 2).transpose(0, 1)  # (K * B, T, Z)
        seen = mask.expand(z.shape[:-1]).flatten(1, 2).t()
        return self.rest(self.encoder.summary(rows, seen)).unflatten(0, z.shape[1:3])[None]


class PairCritic(nn.Module):
    """Scores of pairs by an inner product, or by a network that reads both summaries.

    Args:
        z_dim, f_dim: Z and F.
        critic_dim: width of the summaries and of all hidden layers.
        reads: what of z is read, see :class:`PathReader`.
        joint: let a network read both summaries, B * B pairs of them, instead of an inner product
            of theirs: for a whole path alone.

    Raises:
        ValueError: a size below 1, an unknown ``reads``, or ``joint`` with single steps.
    """

    conditional = False

    def __init__(
        self,
        z_dim: int,
        f_dim: int,
        critic_dim: int = 64,
        *,
        reads: Reads = "path",
        joint: bool = False,
    ) -> None:
        super().__init__()
        counts(1, f_dim=f_dim, critic_dim=critic_dim)
        if joint and reads == "step":
            raise ValueError("joint=True reads whole paths, T * B * B pairs are too many")
        self.of_z = PathReader(z_dim, critic_dim, reads)
        self.of_f = MLP([f_dim, critic_dim, critic_dim], activation="silu")
        self.of_both = MLP([2 * critic_dim, critic_dim, 1], activation="silu") if joint else None

    def forward(self, z: Tensor, f: Tensor, mask: Tensor) -> Tensor:
        """Scores ``(S, K, B, B)``."""
        read, known = self.of_z(z, mask), self.of_f(f)
        if self.of_both is None:
            return read @ known.mT / read.shape[-1] ** 0.5
        count = f.shape[-2]
        sides = (  # z of the row, f of the column
            read.unsqueeze(-2).expand(*read.shape[:-1], count, -1),
            known.unsqueeze(-3).expand(*read.shape[:-1], count, -1),
        )
        return self.of_both(torch.cat(sides, dim=-1)).squeeze(-1)


class ConditionalPairCritic(nn.Module):
    """The log-density of f given z, a diagonal normal: for the estimators club and reversal.

    Args:
        z_dim, f_dim, critic_dim, reads: as for :class:`PairCritic`.
        min_scale: floor of the normal's scale.
    """

    conditional = True

    def __init__(
        self,
        z_dim: int,
        f_dim: int,
        critic_dim: int = 64,
        *,
        reads: Reads = "path",
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        counts(1, f_dim=f_dim)
        self.of_z = PathReader(z_dim, critic_dim, reads)
        self.density = NormalNetwork(critic_dim, f_dim, (critic_dim,), min_scale=min_scale)

    def forward(self, z: Tensor, f: Tensor, mask: Tensor) -> Tensor:
        """Log-densities ``(S, K, B, B)``, nats."""
        read = self.of_z(z, mask).unsqueeze(-2)  # (S, K, B, 1, W)
        return self.density(read).log_prob(f.unsqueeze(-3))
