"""Recurrent neural network (RNN) without latents: the baseline of every comparison.

Source: the autoregressive baseline of Chung et al. (2015), https://arxiv.org/abs/1506.02216,
section 4: the same cell, encoder of x and decoder as the VRNN's, without z. Its log-likelihood is
exact, so every bound is tight.
"""

from typing import NamedTuple

import pyro.distributions as dist
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell, diagonal_normal
from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, width


class RNNState(NamedTuple):
    """What crosses from step t to t + 1."""

    memory: Tensor  # the cell's, (*batch, M); its output h is (*batch, H)


class RNN(SequenceModel):
    r"""RNN: :math:`p(x_t \mid h_t)`, with :math:`h_{t+1} = f(x_t, h_t)`; Z = 0.

    Args:
        x_dim: X, size of an observation.
        decoder: maps ``h`` of shape (*batch, H) to a distribution over ``x_t``, event shape (X,).
        cell: advances its memory by one step on ``phi(x_t)``.
        encode_x: the feature map phi.
    """

    def __init__(self, x_dim: int, *, decoder: nn.Module, cell: Cell, encode_x: nn.Module) -> None:
        super().__init__(x_dim, z_dim=0, decoder=decoder, encode_x=encode_x)
        agree("h", cell=cell.h_dim, decoder=width("in_dim", decoder))
        agree("phi(x)", cell=cell.in_dim, encode_x=width("out_dim", encode_x))
        self.decoder, self.cell, self.encode_x = decoder, cell, encode_x

    def init(self, batch_shape: Size) -> RNNState:
        """Zero memory."""
        return RNNState(self.cell.initial(batch_shape))

    def transition(self, state: RNNState) -> dist.Distribution:
        """A normal over no dimensions: log p(z_t) = 0."""
        nothing = self.hidden(state)[..., :0]
        return diagonal_normal(nothing, nothing)

    def emission(self, z_t: Tensor, state: RNNState) -> dist.Distribution:
        """p(x_t | h_t), event shape ``(X,)``; ``z_t`` has no dimensions."""
        return self.decoder(self.hidden(state))

    def advance(self, state: RNNState, z_t: Tensor, x_t: Tensor) -> RNNState:
        """h_{t+1} = f(phi(x_t), h_t)."""
        return RNNState(self.cell(self.encode_x(x_t), state.memory))

    def hidden(self, state: RNNState) -> Tensor:
        """h_t, the cell's output, ``(*batch, H)``."""
        return self.cell.output(state.memory)
