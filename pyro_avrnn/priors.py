"""Priors p(z_t | h): modules that map h of shape (*batch, H) to a distribution over z_t."""

from collections.abc import Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_avrnn.networks import NormalNetwork, diagonal_normal


class StandardNormal(nn.Module):
    """p(z_t | h) = N(0, I), whatever h is (the prior of a VAE and of STORN).

    Args:
        z_dim: Z, the event size.
    """

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution, batch shape that of ``h`` (*batch, H), event shape ``(Z,)``."""
        zeros = h.new_zeros(*h.shape[:-1], self.z_dim)
        return diagonal_normal(zeros, zeros + 1.0)


class ConditionalNormal(NormalNetwork):
    """p(z_t | h) = N(mu(h), diag sigma(h)^2), learnt. Source: Chung et al. (2015), eq. 5.

    Args:
        h_dim: H, width of the state's summary.
        z_dim: Z, the event size.
        hidden: widths of the hidden layers.
        min_scale: floor of the scale.
        activation: of the hidden layers.
    """

    def __init__(
        self,
        h_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__(h_dim, z_dim, hidden, min_scale=min_scale, activation=activation)
