"""Stochastic recurrent neural network (SRNN): a deterministic layer below, a Markov z above.

Source: Fraccaro et al. (2016), https://arxiv.org/abs/1605.07571. Our ``d_t`` has read x_{1:t-1},
as theirs has read the inputs u_{1:t} = x_{0:t-1}.

Departures: the proposal is a guide (the paper's: :class:`~pyro_avrnn.guides.ResidualGuide` with a
backward encoder, which reads [d_t, x_t] as in eq. 10) that sees d_t as well as a_t and z_{t-1};
z_0 and d_1 are zero.
"""

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell
from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width


class SRNNState(NamedTuple):
    """What crosses from step t to t + 1."""

    memory: Tensor  # the cell's, (*batch, M); its output is d_t
    z: Tensor  # z_{t-1}, (*batch, Z)


class SRNN(SequenceModel):
    r"""SRNN: :math:`p(z_t \mid z_{t-1}, d_t)\,p(x_t \mid z_t, d_t)`, and :math:`d_t` without z.

    The recurrence :math:`d_{t+1} = f(x_t, d_t)` sees no latent.

    Args:
        x_dim, z_dim: X and Z, sizes of an observation and of a latent.
        prior: maps ``[d_t, z_{t-1}]`` (*batch, H + Z) to a distribution over ``z_t``.
        decoder: maps ``(z_t, d_t)`` to a distribution over ``x_t``, event shape (X,).
        cell: advances its memory by one step on ``phi(x_t)``; never sees a latent.
        encode_x: the feature map phi of x, owned by the model.
    """

    features_go_on = True

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        prior: nn.Module,
        decoder: nn.Module,
        cell: Cell,
        encode_x: nn.Module,
    ) -> None:
        super().__init__(x_dim, z_dim, decoder=decoder, encode_x=encode_x)
        agree("z", model=z_dim, prior=width("z_dim", prior))
        agree("phi(x)", cell=cell.in_dim, encode_x=width("out_dim", encode_x))
        state = cell.h_dim + z_dim
        agree("d and z together", prior=width("h_dim", prior), cell_and_z=state)
        agree("z and d together", decoder=width("in_dim", decoder), cell_and_z=state)
        self.prior, self.decoder, self.cell, self.encode_x = prior, decoder, cell, encode_x

    def init(self, batch_shape: Size) -> SRNNState:
        """Zeros."""
        memory = self.cell.initial(batch_shape)
        return SRNNState(memory, memory.new_zeros(*batch_shape, self.z_dim))

    def transition(self, state: SRNNState) -> dist.Distribution:
        """p(z_t | z_{t-1}, d_t), event shape ``(Z,)``. Source: eq. 3."""
        return self.prior(self.hidden(state))

    def emission(self, z_t: Tensor, state: SRNNState) -> dist.Distribution:
        """p(x_t | z_t, d_t), event shape ``(X,)``. Source: eq. 4."""
        return self.decoder(z_t, self.cell.output(state.memory))

    def advance(self, state: SRNNState, z_t: Tensor, x_t: Tensor) -> SRNNState:
        """d_{t+1} = f(phi(x_t), d_t), and z_t."""
        return SRNNState(self.cell(self.encode_x(x_t), state.memory), z_t)

    def hidden(self, state: SRNNState) -> Tensor:
        """d_t and z_{t-1}, ``(*batch, H + Z)``."""
        return broadcast_cat(self.cell.output(state.memory), state.z)

    def features(self, x: Tensor, start: Any = None) -> Tensor:
        """d_t and phi(x_t) of every step, ``(*batch, T, H + C)``, for backward encoders."""
        phi = self.encode_x(x)
        # all particles of a sequence have read the same x, hence have the same d
        memories = [self.cell.initial(x.shape[:-2]) if start is None else start.memory[0]]
        for t in range(x.shape[-2] - 1):
            memories.append(self.cell(phi[..., t, :], memories[-1]))
        return torch.cat([self.cell.output(torch.stack(memories, dim=-2)), phi], dim=-1)
