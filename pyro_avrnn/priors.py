"""Priors p(z_t | h): modules that map h of shape (*batch, H) to a distribution over z_t.

What h is depends on the model: the cell's output in a VRNN, z_{t-1} in a deep Markov model. A
prior states its ``h_dim`` and ``z_dim``, so that a model can name parts whose sizes disagree.
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

from inference.protocols import at_least, counts
from pyro_avrnn.networks import ACTIVATIONS, MLP, NormalNetwork, diagonal_normal, positive


class StandardNormal(nn.Module):
    """Standard normal p(z_t | h) = N(0, I), whatever h is: the prior of a VAE and of STORN.

    Args:
        z_dim: Z, the event size.
    """

    h_dim: int | None = None  # any

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        zeros = h.new_zeros(*h.shape[:-1], self.z_dim)
        return diagonal_normal(zeros, zeros + 1.0)


class _ConditionalPrior(nn.Module):
    """Base of the priors that are functions of h; documented at :class:`ConditionalNormal`."""

    def __init__(
        self,
        h_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        min_scale: float = 1e-3,
        activation: str = "relu",
        **own: int,
    ) -> None:
        super().__init__()
        at_least(0, min_scale=min_scale)
        self.h_dim, self.z_dim, self.hidden = h_dim, z_dim, tuple(hidden)
        self.min_scale, self.activation = min_scale, activation
        self._set_up(**own)

    def _set_up(self, *args: Any, **own: Any) -> None:
        """Make the networks, given the options that only this prior has."""
        raise NotImplementedError

    def _mlp(self, out_dim: int) -> MLP:
        return MLP([self.h_dim, *self.hidden, out_dim], activation=self.activation)


class ConditionalNormal(_ConditionalPrior):
    """Conditional normal p(z_t | h) = N(mu(h), diag sigma(h)^2).

    Source: Chung et al. (2015), https://arxiv.org/abs/1506.02216, eq. 5.

    Args:
        h_dim: H, width of the state's summary.
        z_dim: Z, the event size.
        hidden: widths of the hidden layers.
        min_scale: floor of the scale.
        activation: of the hidden layers, a name of ``ACTIVATIONS``.
    """

    def _set_up(self) -> None:
        self.net = self._mlp(2 * self.z_dim)

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        loc, raw = self.net(h).chunk(2, dim=-1)
        return diagonal_normal(loc, positive(raw, self.min_scale))


class GatedNormal(_ConditionalPrior):
    r"""Gated transition: :math:`\mu = (1 - g) \odot W h + g \odot m`, with g and m functions of h.

    For each dimension, the gate g in (0, 1) mixes a linear and a nonlinear mean. The scale is a
    function of m. W starts as the identity where H = Z. Source: Krishnan et al. (2017),
    https://arxiv.org/abs/1609.09869, section 5, where h is z_{t-1}.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`.
    """

    def _set_up(self) -> None:
        self.gate, self.proposed = self._mlp(self.z_dim), self._mlp(self.z_dim)
        self.linear = nn.Linear(self.h_dim, self.z_dim)
        self.scale = nn.Linear(self.z_dim, self.z_dim)
        if self.h_dim == self.z_dim:
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        gate, proposed = self.gate(h).sigmoid(), self.proposed(h)
        loc = (1.0 - gate) * self.linear(h) + gate * proposed
        return diagonal_normal(loc, self.min_scale + F.softplus(self.scale(F.relu(proposed))))


class MixtureOfNormals(dist.MixtureOfDiagNormals):
    """Pyro's mixture of diagonal normals, with a mean and with implicit gradients of draws.

    As the parameters change, a draw moves so that its conditional distribution functions, one
    dimension after another, keep their values. Source: Figurnov et al. (2018),
    https://arxiv.org/abs/1805.08498, section 3. (The gradient of the weights in Pyro 1.9 is right
    only where the line through two means passes through the origin.)
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, D)``, differentiable in all parameters."""
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
            density = (weight * (-0.5 * e.square()).exp() / scale).sum(dim=-1) / math.tau**0.5
            z_i = drawn[..., i] - (below - below.detach()) / density.detach()
            moved.append(z_i)
            e = (z_i.unsqueeze(-1) - loc) / scale
            log_weight = log_weight - 0.5 * e.square() - scale.log()
        return torch.stack(moved, dim=-1)

    @property
    def mean(self) -> Tensor:
        """``(*batch, D)``."""
        return (self.probs.unsqueeze(-1) * self.locs).sum(dim=-2)

    @property
    def variance(self) -> Tensor:
        """``(*batch, D)``."""
        within, between = self.coord_scale.square(), (self.locs - self.mean.unsqueeze(-2)).square()
        return (self.probs.unsqueeze(-1) * (within + between)).sum(dim=-2)


class MixturePrior(_ConditionalPrior):
    """Mixture of diagonal normals p(z_t | h): weights, means and scales are functions of h.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`.
        num_components: at least 2 (default 5).
    """

    def _set_up(self, num_components: int = 5) -> None:
        counts(2, "; a mixture of one is ConditionalNormal", num_components=num_components)
        self.num_components = num_components
        self.weights = self._mlp(num_components)
        self.components = NormalNetwork(
            self.h_dim,
            num_components * self.z_dim,
            self.hidden,
            min_scale=self.min_scale,
            activation=self.activation,
        )

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        loc, scale = self.components.parameters_of(h)
        shape = (self.num_components, self.z_dim)
        return MixtureOfNormals(
            loc.unflatten(-1, shape), scale.unflatten(-1, shape), self.weights(h)
        )


class FlowPrior(_ConditionalPrior):
    """Normalising flow p(z_t | h): a conditional normal, then affine couplings that also read h.

    Couplings are cheap in both directions, and both are needed: one for draws, the other for the
    density of the guide's draws. Source: Dinh et al. (2017), https://arxiv.org/abs/1605.08803.

    Args:
        h_dim, z_dim, hidden, min_scale, activation: as for :class:`ConditionalNormal`; z_dim at
            least 2.
        num_flows: number of couplings (default 2); z's dimensions are reversed after each.
    """

    def _set_up(self, num_flows: int = 2) -> None:
        counts(2, "; use ConditionalNormal instead of FlowPrior", z_dim=self.z_dim)
        counts(1, num_flows=num_flows)
        self.base = ConditionalNormal(
            self.h_dim,
            self.z_dim,
            self.hidden,
            min_scale=self.min_scale,
            activation=self.activation,
        )
        half = self.z_dim // 2
        sizes = half, self.h_dim, [*self.hidden], [self.z_dim - half] * 2
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineCoupling(
                half, ConditionalDenseNN(*sizes, ACTIVATIONS[self.activation]())
            )
            for _ in range(num_flows)
        )
        self.register_buffer("turned", torch.arange(self.z_dim).flip(0))

    def forward(self, h: Tensor) -> dist.Distribution:
        """The distribution given ``h`` (*batch, H), event shape ``(Z,)``."""
        flows: Any = self.flows
        steps: list[transforms.Transform] = []
        for flow in flows:
            steps += [flow.condition(h), transforms.Permute(self.turned)]
        return dist.TransformedDistribution(self.base(h), steps, validate_args=False)


#: By the names that recipes and the command line take.
PRIORS: dict[str, type[nn.Module]] = {
    "conditional": ConditionalNormal,
    "standard": StandardNormal,
    "gated": GatedNormal,
    "mixture": MixturePrior,
    "flow": FlowPrior,
}
