"""Deep Markov model (DMM), also known as deep Kalman filter: a state-space model with networks.

Source: Krishnan et al. (2017), https://arxiv.org/abs/1609.09869; Krishnan et al. (2015),
https://arxiv.org/abs/1511.05121.

Departures: the structured inference network is a guide (the paper's "DKS" is
:class:`~pyro_avrnn.guides.SmoothingGuide`, with a perceptron on (c_t, z_{t-1}) where the paper
averages c_t with a layer on z_{t-1}); z_0 is learnt and shared with the guide.
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from pyro_avrnn.sequence import SequenceModel
from pyro_avrnn.shapes import agree, width


class DMMState(NamedTuple):
    """What crosses from step t to t + 1."""

    z: Tensor  # z_{t-1}, (*batch, Z)


class DMM(SequenceModel):
    r"""Deep Markov model: :math:`p(z_t \mid z_{t-1})\,p(x_t \mid z_t)`.

    Args:
        x_dim, z_dim: X and Z, sizes of an observation and of a latent.
        prior: maps ``z_{t-1}`` (*batch, Z) to a distribution over ``z_t``; the paper's is
            :class:`~pyro_avrnn.priors.GatedNormal`.
        decoder: maps ``z_t`` to a distribution over ``x_t``, event shape (X,).
        encode_x: the feature map phi of x, borrowed by guides.
    """

    def __init__(
        self, x_dim: int, z_dim: int, *, prior: nn.Module, decoder: nn.Module, encode_x: nn.Module
    ) -> None:
        super().__init__(x_dim, z_dim, decoder=decoder, encode_x=encode_x)
        agree("z", model=z_dim, prior=width("z_dim", prior), decoder=width("in_dim", decoder))
        agree("h, which is z_{t-1},", model=z_dim, prior=width("h_dim", prior))
        self.prior, self.decoder, self.encode_x = prior, decoder, encode_x
        self.z_0 = nn.Parameter(torch.zeros(z_dim))

    def init(self, batch_shape: Size) -> DMMState:
        """The learnt z_0."""
        return DMMState(self.z_0.expand(*batch_shape, -1))

    def transition(self, state: DMMState) -> dist.Distribution:
        """p(z_t | z_{t-1}), event shape ``(Z,)``. Source: eq. 4."""
        return self.prior(state.z)

    def emission(self, z_t: Tensor, state: DMMState) -> dist.Distribution:
        """p(x_t | z_t), event shape ``(X,)``. Source: eq. 5."""
        return self.decoder(z_t)

    def advance(self, state: DMMState, z_t: Tensor, x_t: Tensor) -> DMMState:
        """z_t."""
        return DMMState(z_t)

    def features(self, x: Tensor) -> Tensor:
        """phi(x), ``(*batch, C)``."""
        return self.encode_x(x)
