"""Variational auto-encoder (VAE) of single frames, without any dependence on time.

Source: Kingma and Welling (2014), https://arxiv.org/abs/1312.6114.

Departures: the recognition network is a guide (the paper's is
:class:`~pyro_avrnn.guides.MeanFieldGuide`), and any prior fits; it reads h = 1.
"""

from typing import NamedTuple

import pyro.distributions as dist
from torch import Size, Tensor, nn

from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, width


class VAEState(NamedTuple):
    """Nothing crosses from step to step; a tensor of width 0 carries the leading dimensions."""

    nothing: Tensor  # (*batch, 0)


class VAE(SequenceModel):
    r"""VAE of each frame: :math:`p(z_t)\,p(x_t \mid z_t)`, steps independent.

    Args:
        x_dim, z_dim: X and Z, sizes of an observation and of a latent.
        prior: maps a constant ``h``, ones (*batch, 1), to a distribution over ``z_t``.
        decoder: maps ``z_t`` to a distribution over ``x_t``, event shape (X,).
        encode_x: the feature map phi that guides borrow.
    """

    def __init__(
        self, x_dim: int, z_dim: int, *, prior: nn.Module, decoder: nn.Module, encode_x: nn.Module
    ) -> None:
        super().__init__(x_dim, z_dim, decoder=decoder, encode_x=encode_x)
        agree("z", model=z_dim, prior=width("z_dim", prior), decoder=width("in_dim", decoder))
        agree("h, a constant 1,", model=1, prior=width("h_dim", prior))
        self.prior, self.decoder, self.encode_x = prior, decoder, encode_x

    def init(self, batch_shape: Size) -> VAEState:
        """The empty state."""
        return VAEState(next(self.decoder.parameters()).new_zeros(*batch_shape, 0))

    def transition(self, state: VAEState) -> dist.Distribution:
        """p(z_t), event shape ``(Z,)``."""
        return self.prior(state.nothing.new_ones(*state.nothing.shape[:-1], 1))

    def emission(self, z_t: Tensor, state: VAEState) -> dist.Distribution:
        """p(x_t | z_t), event shape ``(X,)``."""
        return self.decoder(z_t)

    def advance(self, state: VAEState, z_t: Tensor, x_t: Tensor) -> VAEState:
        """The empty state, with the leading dimensions of ``z_t``."""
        return VAEState(z_t[..., :0])

    def features(self, x: Tensor) -> Tensor:
        """phi(x), ``(*batch, C)``."""
        return self.encode_x(x)
