"""A guide that only samples: noise goes through a network."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from inference.protocols import counts, of_kind
from pyro_avrnn.guides import FilteringGuide
from pyro_avrnn.networks import MLP, diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel


class Implicit(dist.TorchDistribution):
    """z = loc + scale (e + net(e, context)), e standard normal: no density, gradients by draws.

    Args:
        loc, scale: ``(*batch, Z)``.
        context: ``(*batch, C)``.
        net: maps e and context, ``(*batch, Z + C)``, to ``(*batch, Z)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale: Tensor, context: Tensor, net: nn.Module) -> None:
        self.loc, self.scale, self.context, self.net = loc, scale, context, net
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Implicit":
        """The same distribution with a larger batch shape."""
        loc, scale, context = (
            p.expand(*batch_shape, p.shape[-1]) for p in (self.loc, self.scale, self.context)
        )
        return type(self)(loc, scale, context, self.net)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch, Z)``."""
        shape = Size(sample_shape) + self.loc.shape
        e = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        context = self.context.expand(*shape[:-1], self.context.shape[-1])
        return self.loc + self.scale * (e + self.net(torch.cat([e, context], dim=-1)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Refuse with a NotImplementedError."""
        raise NotImplementedError(
            "an implicit guide has no density; train it with AVB(critic=...), and score its model "
            "with a guide of normals that is fitted to it, or with particle_filter(model, None, x)"
        )


class ImplicitGuide(FilteringGuide):
    """q(z_t | c_t, h_t) that only samples, for :class:`inference.AVB`; it begins as a normal.

    Args:
        model, hidden, encoder, min_scale, activation: as for
            :class:`~pyro_avrnn.guides.FilteringGuide`.
    """

    def _set_up(self, model: SequenceModel) -> None:
        sizes = [self.z_dim + self.network.in_dim, *self.network.hidden, self.z_dim]
        self.warp = MLP(sizes, activation=self.network.activation)
        for parameter in self.warp[-1].parameters():
            nn.init.zeros_(parameter)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        h = self.hidden(state)
        loc, scale = self.network.parameters_of(c_t, h)
        context = torch.cat([c_t.expand(*h.shape[:-1], c_t.shape[-1]), h], dim=-1)
        return Implicit(loc, scale, context, self.warp)


class MomentGuide(SequenceGuide):
    """The normal of mean and deviation of an implicit guide's draws, drawn anew each time.

    Given these draws it is an ordinary proposal, so that ELBO, IWAE and FIVO by it are bounds; no
    critic takes part.

    Args:
        model: that the implicit guide belongs to.
        guide: the implicit guide.
        draws: that mean and deviation are taken from.
    """

    def __init__(self, model: SequenceModel, guide: ImplicitGuide, draws: int = 32) -> None:
        super().__init__(model)
        of_kind(ImplicitGuide, "an ImplicitGuide", guide=guide)
        counts(2, draws=draws)
        self.guide, self.draws = guide, draws

    def encode(self, x: Tensor, mask: Tensor, start: Any = None) -> Tensor:
        """As the implicit guide reads x."""
        return self.guide.encode(x, mask, start)

    @torch.no_grad()
    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        drawn = self.guide.proposal(state, c_t).sample(Size((self.draws,)))
        return diagonal_normal(drawn.mean(dim=0), drawn.std(dim=0).clamp(min=1e-3))


#: by name: what makes the guide, and what its encoder reads
IMPLICIT: dict[str, tuple[Callable[..., FilteringGuide], str | None]] = {
    "implicit": (ImplicitGuide, None),
    "smoothing_implicit": (ImplicitGuide, "backward"),
}
