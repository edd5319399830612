"""Guides q(z_t | x_t, state): filtering, residual, and the empty guide of a model without z."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avrnn.networks import NormalNetwork, diagonal_normal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel


class FilteringGuide(SequenceGuide):
    """q(z_t | x_t, h_t): sees the past and the present, not the future.

    Source: Chung et al. (2015), eq. 9.

    Args:
        model: the model whose latents are proposed; its features of x are borrowed.
        c_dim: C, width of the model's features of x.
        h_dim: H, width of the state's summary.
        hidden: widths of the hidden layers.
        min_scale: floor of the proposal's scale.
        activation: of the hidden layers.
    """

    def __init__(
        self,
        model: SequenceModel,
        c_dim: int,
        h_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__(model)
        self.network = NormalNetwork(
            c_dim + h_dim, self.z_dim, hidden, min_scale=min_scale, activation=activation
        )

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        return self.network(c_t, self.hidden(state))


class ResidualGuide(FilteringGuide):
    r"""Proposal mean = prior mean + correction: :math:`\mu_q = \mu_p(h_t) + r(x_t, h_t)`.

    Source: Fraccaro et al. (2016), section 3.3 ("res_q"); "using the mean from the prior" in
    the text on AVRNN. The guide starts close to the prior's path, so it learns the correction.

    Args:
        model, c_dim, h_dim, hidden, min_scale, activation: as for :class:`FilteringGuide`.
        prior_gradient: whether the guide's gradient reaches the prior (and what feeds it)
            through the prior mean. False stops it, so that reconstruction cannot move the prior.
    """

    def __init__(
        self,
        model: SequenceModel,
        c_dim: int,
        h_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        min_scale: float = 1e-3,
        activation: str = "relu",
        prior_gradient: bool = True,
    ) -> None:
        super().__init__(model, c_dim, h_dim, hidden, min_scale=min_scale, activation=activation)
        self.prior_gradient = prior_gradient

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        with torch.set_grad_enabled(self.prior_gradient and torch.is_grad_enabled()):
            prior_mean = self.transition(state).mean
        correction, scale = self.network.parameters_of(c_t, self.hidden(state))
        return diagonal_normal(prior_mean + correction, scale)


class NoLatents(SequenceGuide):
    """The empty guide of a model with Z = 0: no sites, log q = 0."""

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """A normal over no dimensions."""
        nothing = self.hidden(state)[..., :0]
        return diagonal_normal(nothing, nothing)


GUIDES: dict[str, type[FilteringGuide]] = {"filtering": FilteringGuide, "residual": ResidualGuide}
