"""Stochastic recurrent network (STORN).

Source: Bayer and Osendorfer (2014), https://arxiv.org/abs/1411.7610.

Departures: the recognition network is a guide (the paper's, a separate recurrent network over
x_{1:t}, is :class:`~pyro_avrnn.guides.MeanFieldGuide` with a forward encoder), the prior may be
conditional on the past, and the recurrence is gated.
"""

from typing import NamedTuple

import pyro.distributions as dist
from torch import Size, Tensor, nn

from pyro_avrnn.networks import Cell
from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width


class STORNState(NamedTuple):
    """What crosses from step t to t + 1."""

    memory: Tensor  # the cell's, before it reads z_t, (*batch, M)
    seen: Tensor  # phi(x_{t-1}), (*batch, C); zeros at t = 1


class STORN(SequenceModel):
    r"""STORN: :math:`p(z_t)\,p(x_t \mid h_t)` with :math:`h_t = f(x_{t-1}, z_t, h_{t-1})`.

    Args:
        x_dim, z_dim: X and Z, sizes of an observation and of a latent.
        prior: maps ``h_{t-1}`` (*batch, H) to a distribution over ``z_t``, event shape (Z,); the
            paper's is the standard normal, whatever h is.
        decoder: maps ``h_t``, which has read ``z_t``, to a distribution over ``x_t``.
        cell: advances its memory by one step on ``[phi(x_{t-1}), phi(z_t)]``.
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
        h_dims = {"prior": width("h_dim", prior), "decoder": width("in_dim", decoder)}
        agree("h", cell=cell.h_dim, **h_dims)
        features = width("out_dim", encode_x, encode_z)
        agree("phi(x) and phi(z) together", cell=cell.in_dim, features=features)
        self.prior, self.decoder, self.cell = prior, decoder, cell
        self.encode_x, self.encode_z = encode_x, encode_z
        self.seen_dim = self.c_dim

    def init(self, batch_shape: Size) -> STORNState:
        """Zero memory, and zeros for the features of x before the first."""
        memory = self.cell.initial(batch_shape)
        return STORNState(memory, memory.new_zeros(*batch_shape, self.seen_dim))

    def transition(self, state: STORNState) -> dist.Distribution:
        """p(z_t), event shape ``(Z,)``. Source: section 3.1."""
        return self.prior(self.cell.output(state.memory))

    def emission(self, z_t: Tensor, state: STORNState) -> dist.Distribution:
        """p(x_t | x_{<t}, z_{1:t}), event shape ``(X,)``. Source: eq. 6."""
        return self.decoder(self.cell.output(self._read(state, z_t)))

    def advance(self, state: STORNState, z_t: Tensor, x_t: Tensor) -> STORNState:
        """h_t and phi(x_t)."""
        memory, seen = self._read(state, z_t), self.encode_x(x_t)
        return STORNState(memory, seen.expand(*memory.shape[:-1], -1))

    def _read(self, state: STORNState, z_t: Tensor) -> Tensor:
        return self.cell(broadcast_cat(state.seen, self.encode_z(z_t)), state.memory)

    def hidden(self, state: STORNState) -> Tensor:
        """h_{t-1} and phi(x_{t-1}), ``(*batch, H + C)``."""
        return broadcast_cat(self.cell.output(state.memory), state.seen)

    def features(self, x: Tensor) -> Tensor:
        """phi(x), ``(*batch, C)``."""
        return self.encode_x(x)
