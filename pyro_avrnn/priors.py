"""Priors p(z_t | h): modules that map h of shape (*batch, H) to a distribution over z_t.

What h is depends on the model: the cell's output in a VRNN, z_{t-1} in a deep Markov model. A
prior says ``h_dim`` and ``z_dim``, so that a model can name parts whose sizes disagree.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalDenseNN
from torch import Size, Tensor, nn
from torch.nn import functional as F

from pyro_avrnn.networks import ACTIVATIONS, MLP, NormalNetwork, diagonal_normal


class StandardNormal(nn.Module):
    """p(z_t | h) = N(0, I), whatever h is (the prior of a VAE and of STORN).

    Args:
        z_dim: Z, the event size.
    """

    h_dim: int | None = None  # any

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
        self.h_dim, self.z_dim = h_dim, z_dim


class GatedNormal(nn.Module):
    r"""Gated transition: :math:`\mu = (1 - g) \odot W h + g \odot m`, with g and m functions of h.

    The gate g in (0, 1) chooses for each dimension between a linear and a nonlinear mean; the
    scale is a function of m. W starts as the identity where H = Z. Source: Krishnan et al.
    (2017), https://arxiv.org/abs/1609.09869, section 5, where h is z_{t-1}.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`.
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
        super().__init__()
        self.h_dim, self.z_dim, self.min_scale = h_dim, z_dim, min_scale
        self.gate = MLP([h_dim, *hidden, z_dim], activation=activation)
        self.proposed = MLP([h_dim, *hidden, z_dim], activation=activation)
        self.linear, self.scale = nn.Linear(h_dim, z_dim), nn.Linear(z_dim, z_dim)
        if h_dim == z_dim:
            with torch.no_grad():
                self.linear.weight.copy_(torch.eye(z_dim))
                self.linear.bias.zero_()

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        gate, proposed = self.gate(h).sigmoid(), self.proposed(h)
        loc = (1.0 - gate) * self.linear(h) + gate * proposed
        return diagonal_normal(loc, self.min_scale + F.softplus(self.scale(F.relu(proposed))))


class MixtureOfNormals(dist.MixtureOfDiagNormals):
    """Pyro's mixture of diagonal normals, with its mean, and with other pathwise gradients.

    A draw moves with the parameters as its conditional distribution functions, one dimension
    after another, stay where they are. Source: Figurnov et al. (2018),
    https://arxiv.org/abs/1805.08498, section 3. (Pyro 1.9's own gradient of the weights is right
    only where the line through two means passes through the origin.)
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``(*sample_shape, *batch, D)``, differentiable in all parameters."""
        with torch.no_grad():
            which = self.categorical.sample(Size(sample_shape))  # (*sample_shape, *batch)
            index = which[..., None, None].expand(*which.shape, 1, self.dim)
            loc, scale = (
                p.expand(*which.shape, *p.shape[-2:]).gather(-2, index).squeeze(-2)
                for p in (self.locs, self.coord_scale)
            )
            drawn = loc + scale * torch.randn_like(loc)
        if not torch.is_grad_enabled():
            return drawn
        log_weight, moved = self.categorical.logits, []  # of components given earlier dimensions
        for i in range(self.dim):
            loc, scale = self.locs[..., i], self.coord_scale[..., i]  # (*batch, K)
            weight = log_weight.softmax(dim=-1)
            e = (drawn[..., i : i + 1] - loc) / scale
            below = (weight * torch.special.ndtr(e)).sum(dim=-1)
            density = (weight * (-0.5 * e.square()).exp() / scale).sum(dim=-1) / math.sqrt(
                math.tau
            )
            z_i = drawn[..., i] - (below - below.detach()) / density.detach()
            moved.append(z_i)
            e = (z_i.unsqueeze(-1) - loc) / scale
            log_weight = log_weight - 0.5 * e.square() - scale.log()
        return torch.stack(moved, dim=-1)

    @property
    def mean(self) -> Tensor:
        """``(*batch, D)``."""
        return (self.probs.unsqueeze(-1) * self.locs).sum(dim=-2)


class MixturePrior(nn.Module):
    """p(z_t | h): a mixture of diagonal normals, all of it a function of h.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`.
        num_components: of the mixture, at least 2.
    """

    def __init__(
        self,
        h_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        num_components: int = 5,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if num_components < 2:
            raise ValueError(
                f"num_components must be at least 2, got {num_components}; a mixture of one is "
                "ConditionalNormal"
            )
        self.h_dim, self.z_dim, self.num_components = h_dim, z_dim, num_components
        self.weights = MLP([h_dim, *hidden, num_components], activation=activation)
        self.components = NormalNetwork(
            h_dim, num_components * z_dim, hidden, min_scale=min_scale, activation=activation
        )

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        loc, scale = self.components.parameters_of(h)
        shape = (self.num_components, self.z_dim)
        return MixtureOfNormals(
            loc.unflatten(-1, shape), scale.unflatten(-1, shape), self.weights(h)
        )


class FlowPrior(nn.Module):
    """p(z_t | h): a conditional normal sent through affine couplings that read h, too.

    Couplings, as both directions are needed: draws in one, densities of the guide's draws in the
    other. Source: Dinh et al. (2017), https://arxiv.org/abs/1605.08803; Pyro's transforms.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`; z_dim at
            least 2.
        num_flows: couplings, the order of z's dimensions reversed after each.
    """

    def __init__(
        self,
        h_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        num_flows: int = 2,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if z_dim < 2:
            raise ValueError(
                f"z_dim must be at least 2 for FlowPrior, got {z_dim}; use ConditionalNormal"
            )
        if num_flows < 1:
            raise ValueError(f"num_flows must be at least 1, got {num_flows}")
        self.h_dim, self.z_dim = h_dim, z_dim
        self.base = ConditionalNormal(
            h_dim, z_dim, hidden, min_scale=min_scale, activation=activation
        )
        half = z_dim // 2
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineCoupling(
                half,
                ConditionalDenseNN(
                    half, h_dim, [*hidden], [z_dim - half] * 2, ACTIVATIONS[activation]()
                ),
            )
            for _ in range(num_flows)
        )
        self.register_buffer("turned", torch.arange(z_dim).flip(0))

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        flows: Any = self.flows
        steps: list[transforms.Transform] = []
        for flow in flows:
            steps += [flow.condition(h), transforms.Permute(self.turned)]
        return dist.TransformedDistribution(self.base(h), steps, validate_args=False)


#: by the names that recipes and the command line take
PRIORS: dict[str, type[nn.Module]] = {
    "conditional": ConditionalNormal,
    "standard": StandardNormal,
    "gated": GatedNormal,
    "mixture": MixturePrior,
    "flow": FlowPrior,
}
