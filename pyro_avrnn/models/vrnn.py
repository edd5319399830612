"""Variational recurrent neural network (VRNN).

Source: Chung et al. (2015), https://arxiv.org/abs/1506.02216. Our ``h_t`` summarises the
steps before t; the paper writes it ``h_{t-1}``.

Departure: the proposal is a guide, which can be swapped; see :mod:`pyro_avrnn.guides`.
"""

from typing import NamedTuple

import pyro.distributions as dist
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell
from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width


class VRNNState(NamedTuple):
    """What crosses from step t to t + 1."""

    memory: Tensor  # the cell's, (*batch, M); its output h is (*batch, H)


class VRNN(SequenceModel):
    r"""VRNN: :math:`p(z_t \mid h_t)\,p(x_t \mid z_t, h_t)`, :math:`h_{t+1} = f(x_t, z_t, h_t)`.

    Args:
        x_dim, z_dim: X and Z, sizes of an observation and of a latent.
        prior: maps ``h`` of shape (*batch, H) to a distribution over ``z_t``, event shape (Z,).
        decoder: maps ``(phi(z_t), h)`` to a distribution over ``x_t``, event shape (X,).
        cell: advances its memory by one step on ``[phi(x_t), phi(z_t)]``.
        encode_x, encode_z: the feature maps phi, owned by the model; a guide borrows the first.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        prior: nn.Module,
        decoder: nn.Module,
        cell: Cell,
        encode_x: nn.Module,
        encode_z: nn.Module,
    ) -> None:
        super().__init__(x_dim, z_dim, decoder=decoder, encode_x=encode_x)
        agree("z", model=z_dim, prior=width("z_dim", prior), encode_z=width("in_dim", encode_z))
        agree("h", cell=cell.h_dim, prior=width("h_dim", prior))
        features = width("out_dim", encode_x, encode_z)
        agree("phi(x) and phi(z) together", cell=cell.in_dim, features=features)
        read = width("out_dim", encode_z, cell.h_dim)
        agree("phi(z) and h together", decoder=width("in_dim", decoder), features=read)
        self.prior, self.decoder, self.cell = prior, decoder, cell
        self.encode_x, self.encode_z = encode_x, encode_z

    def init(self, batch_shape: Size) -> VRNNState:
        """Zero memory."""
        return VRNNState(self.cell.initial(batch_shape))

    def transition(self, state: VRNNState) -> dist.Distribution:
        """p(z_t | h_t), event shape ``(Z,)``. Source: eq. 5."""
        return self.prior(self.cell.output(state.memory))

    def emission(self, z_t: Tensor, state: VRNNState) -> dist.Distribution:
        """p(x_t | z_t, h_t), event shape ``(X,)``. Source: eq. 6."""
        return self.decoder(self.encode_z(z_t), self.cell.output(state.memory))

    def advance(self, state: VRNNState, z_t: Tensor, x_t: Tensor) -> VRNNState:
        """h_{t+1} = f(phi(x_t), phi(z_t), h_t). Source: eq. 7."""
        return VRNNState(
            self.cell(broadcast_cat(self.encode_x(x_t), self.encode_z(z_t)), state.memory)
        )

    def hidden(self, state: VRNNState) -> Tensor:
        """h_t, the cell's output, ``(*batch, H)``."""
        return self.cell.output(state.memory)

    def features(self, x: Tensor) -> Tensor:
        """phi(x), ``(*batch, C)``."""
        return self.encode_x(x)
