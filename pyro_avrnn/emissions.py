"""Emissions p(x_t | z_t, h): decoders that map (phi(z_t), h) to a distribution over x_t.

An emission says which values it can score (``support``), in words too (``expects``), so that a
model refuses other data with one sentence instead of returning a density that means nothing.
"""

from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_avrnn.networks import MLP, NormalNetwork, broadcast_cat


class NormalEmission(NormalNetwork):
    """p(x_t | z_t, h) = N(mu, diag sigma^2) with an explicit floor under sigma.

    The density is unbounded as sigma goes to zero, so a number without its floor means nothing:
    report both.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        min_scale: the floor, in units of the (standardised) data.
        activation: of the hidden layers.
    """

    support = constraints.real
    expects: ClassVar[str] = "finite real numbers"

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__(in_dim, x_dim, hidden, min_scale=min_scale, activation=activation)


class BernoulliEmission(nn.Module):
    """p(x_t | z_t, h): independent Bernoullis, for data of 0 and 1 such as piano rolls.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
    """

    support = constraints.boolean
    expects: ClassVar[str] = "0 and 1 only"

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.net = MLP([in_dim, *hidden, x_dim], activation=activation)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        logits = self.net(broadcast_cat(*inputs))
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)


EMISSIONS: dict[str, type[NormalEmission] | type[BernoulliEmission]] = {
    "normal": NormalEmission,
    "bernoulli": BernoulliEmission,
}
