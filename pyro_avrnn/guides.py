"""Guides q(z_t | ...): what they read of the data, and the family of the proposal.

Reading is an encoder's matter (none: x_t alone; a recurrent one: x up to t, from t on, or all),
the family that of the class: normal, prior mean plus a correction, inverse autoregressive flow,
or a normal that ignores the path of z. Any encoder goes with any class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Size, Tensor, nn

from pyro_avrnn.networks import (
    ACTIVATIONS,
    NormalNetwork,
    RecurrentEncoder,
    agree,
    broadcast_cat,
    diagonal_normal,
)
from pyro_avrnn.sequence import SequenceGuide, SequenceModel


class FilteringGuide(SequenceGuide):
    """q(z_t | c_t, h_t), a diagonal normal; without an encoder it sees x_t and the past.

    Source: Chung et al. (2015), eq. 9.

    Args:
        model: the model whose latents are proposed; its features of x are borrowed.
        hidden: widths of the hidden layers.
        encoder: maps features ``(B, T, C)`` and mask to what is read of them, ``(B, T, C')``,
            such as :class:`~pyro_avrnn.networks.RecurrentEncoder`; None for the features. One
            of one's own says its width, ``out_dim``, and ``smoothing = True`` if what it says
            of step t depends on x after t.
        min_scale: floor of the proposal's scale.
        activation: of the hidden layers.

    Raises:
        ValueError: an encoder made for features of another width, or a model without latents.
    """

    def __init__(
        self,
        model: SequenceModel,
        hidden: Sequence[int] = (64,),
        *,
        encoder: nn.Module | None = None,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__(model)
        if not model.z_dim:
            raise ValueError(
                f"a {type(self).__name__} proposes latents, but {type(model).__name__} has none "
                "(z_dim 0); use NoLatents"
            )
        c_dim = model.c_dim
        if encoder is not None:
            agree(
                "the features of x",
                model=c_dim,
                encoder=getattr(encoder, "in_dim", None),
            )
            c_dim = encoder.out_dim  # type: ignore[assignment]
        self.encoder = encoder
        self.smoothing = bool(getattr(encoder, "smoothing", False))
        self.network = NormalNetwork(
            c_dim + self._state_dim(model),
            self.z_dim,
            hidden,
            min_scale=min_scale,
            activation=activation,
        )

    def _state_dim(self, model: SequenceModel) -> int:
        return model.h_dim

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """What is read of the data, ``(B, T, C)``."""
        features = self.features(x)
        return features if self.encoder is None else self.encoder(features, mask)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        return self.network(c_t, self.hidden(state))


class SmoothingGuide(FilteringGuide):
    """q(z_t | x_{t:T}, h_t): a backward GRU has read the future of x.

    What the exact posterior of a state-space model depends on. Source: Krishnan et al. (2017),
    https://arxiv.org/abs/1609.09869, section 4 ("DKS"); Fraccaro et al. (2016), eq. 10.

    Args:
        model, hidden, min_scale, activation: as for :class:`FilteringGuide`.
        rnn_dim: width of the backward GRU.
    """

    def __init__(
        self,
        model: SequenceModel,
        hidden: Sequence[int] = (64,),
        *,
        rnn_dim: int = 64,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        encoder = RecurrentEncoder(model.c_dim, rnn_dim)
        super().__init__(
            model, hidden, encoder=encoder, min_scale=min_scale, activation=activation
        )


class ResidualGuide(FilteringGuide):
    r"""Proposal mean = prior mean + correction: :math:`\mu_q = \mu_p(h_t) + r(c_t, h_t)`.

    Source: Fraccaro et al. (2016), section 3.3 ("res_q"); "using the mean from the prior" in
    the text on AVRNN. The guide starts close to the prior's path, so it learns the correction.

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
        prior_gradient: whether the guide's gradient reaches the prior (and what feeds it)
            through the prior mean. False stops it, so that reconstruction cannot move the prior.

    Raises:
        NotImplementedError: a prior that does not know its mean, such as a flow.
    """

    def __init__(
        self,
        model: SequenceModel,
        hidden: Sequence[int] = (64,),
        *,
        encoder: nn.Module | None = None,
        min_scale: float = 1e-3,
        activation: str = "relu",
        prior_gradient: bool = True,
    ) -> None:
        super().__init__(
            model, hidden, encoder=encoder, min_scale=min_scale, activation=activation
        )
        self.prior_gradient = prior_gradient
        with torch.no_grad():
            prior = model.transition(model.init(Size((1,))))
        try:
            assert prior.mean is not None
        except NotImplementedError:
            raise NotImplementedError(
                f"ResidualGuide corrects the prior's mean, which a {type(prior).__name__} of this "
                "model does not know; use FilteringGuide or FlowGuide"
            ) from None

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        with torch.set_grad_enabled(self.prior_gradient and torch.is_grad_enabled()):
            prior_mean = self.transition(state).mean
        correction, scale = self.network.parameters_of(c_t, self.hidden(state))
        return diagonal_normal(prior_mean + correction, scale)


class FlowGuide(FilteringGuide):
    """q(z_t | c_t, h_t): a normal sent through inverse autoregressive flows that read c_t and h_t.

    Draws and their own densities cost one pass a flow; the density of a z from elsewhere costs Z.
    Source: Kingma et al. (2016), https://arxiv.org/abs/1606.04934; Pyro's transforms.

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
        num_flows: the order of z's dimensions is reversed from one to the next.

    Raises:
        ValueError: fewer than two dimensions, or fewer than one flow.
    """

    def __init__(
        self,
        model: SequenceModel,
        hidden: Sequence[int] = (64,),
        *,
        encoder: nn.Module | None = None,
        min_scale: float = 1e-3,
        activation: str = "relu",
        num_flows: int = 2,
    ) -> None:
        super().__init__(
            model, hidden, encoder=encoder, min_scale=min_scale, activation=activation
        )
        if self.z_dim < 2:
            raise ValueError(
                f"z_dim must be at least 2 for FlowGuide, got {self.z_dim}; use FilteringGuide"
            )
        if num_flows < 1:
            raise ValueError(f"num_flows must be at least 1, got {num_flows}")
        order = torch.arange(self.z_dim)
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    self.z_dim,
                    self.network.in_dim,
                    [max(width, self.z_dim) for width in hidden],
                    permutation=order.flip(0) if i % 2 else order,
                    nonlinearity=ACTIVATIONS[activation](),
                )
            )
            for i in range(num_flows)
        )

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        context = broadcast_cat(c_t, self.hidden(state))
        flows: Any = self.flows
        steps = [flow.condition(context) for flow in flows]
        return dist.TransformedDistribution(self.network(context), steps, validate_args=False)


class MeanFieldGuide(FilteringGuide):
    """q(z_t | c_t): a normal that depends on the data alone, not on the path of z.

    Without an encoder q(z_t | x_t), as in a VAE; with a forward one q(z_t | x_{1:t}), as in
    STORN; with one in both directions q(z_t | x_{1:T}).

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
    """

    def _state_dim(self, model: SequenceModel) -> int:
        return 0

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | c_t), event shape ``(Z,)``."""
        return self.network(c_t, self.hidden(state)[..., :0])  # the state's leading dimensions


class NoLatents(SequenceGuide):
    """The empty guide of a model with Z = 0: no sites, log q = 0.

    Args:
        model: has no latents.

    Raises:
        ValueError: a model with latents, which nobody would propose.
    """

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        if model.z_dim:
            raise ValueError(
                f"NoLatents proposes nothing, but {type(model).__name__} has latents (z_dim "
                f"{model.z_dim}); use FilteringGuide"
            )

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """A normal over no dimensions."""
        nothing = self.hidden(state)[..., :0]
        return diagonal_normal(nothing, nothing)


#: by the names that recipes and the command line take: the class, and what its encoder reads
GUIDES: dict[str, tuple[Callable[..., FilteringGuide], str | None]] = {
    "filtering": (FilteringGuide, None),
    "residual": (ResidualGuide, None),
    "flow": (FlowGuide, None),
    "smoothing": (FilteringGuide, "backward"),
    "smoothing_residual": (ResidualGuide, "backward"),
    "smoothing_flow": (FlowGuide, "backward"),
    "mean_field": (MeanFieldGuide, "both"),
    "mean_field_forward": (MeanFieldGuide, "forward"),
    "mean_field_frame": (MeanFieldGuide, None),
}
