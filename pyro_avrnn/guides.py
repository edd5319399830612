"""Guides q(z_t | ...), swappable in two ways: what they read of the data, and their family.

The encoder decides what is read (without one x_t alone; with a recurrent one x up to t, from t on,
or all of x). The class decides the family: a normal, the prior's mean plus a correction, an
inverse autoregressive flow, or a normal that ignores the path of z. Any encoder goes with any
class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Size, Tensor, nn

from inference.protocols import counts
from pyro_avrnn.networks import ACTIVATIONS, NormalNetwork, RecurrentEncoder, diagonal_normal
from pyro_avrnn.refinement import Refined
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat


def require_latents(guide: SequenceGuide, model: SequenceModel) -> None:
    """Check that a model has latents for a guide to propose.

    Raises:
        ValueError: a model without latents.
    """
    if not model.z_dim:
        raise ValueError(
            f"a {type(guide).__name__} proposes latents, but {type(model).__name__} has none "
            "(z_dim 0); use NoLatents"
        )


class FilteringGuide(SequenceGuide):
    """Diagonal normal q(z_t | c_t, h_t); without an encoder it sees x_t and the past.

    Source: Chung et al. (2015), eq. 9.

    Args:
        model: the model whose latents are proposed; its features of x are borrowed.
        hidden: widths of the hidden layers.
        encoder: maps features ``(B, T, C)`` and a mask to c ``(B, T, C')``, such as
            :class:`~pyro_avrnn.networks.RecurrentEncoder`; None passes the features on. Your own
            encoder states its width as ``out_dim``, and ``smoothing = True`` if c_t depends on x
            after t.
        min_scale: floor of the proposal's scale.
        activation: of the hidden layers, a name of ``ACTIVATIONS``.

    Raises:
        ValueError: an encoder made for features of another width, or a model without latents.
    """

    reads_state = True

    def __init__(
        self,
        model: SequenceModel,
        hidden: Sequence[int] = (64,),
        *,
        encoder: nn.Module | None = None,
        min_scale: float = 1e-3,
        activation: str = "relu",
        **own: int,
    ) -> None:
        super().__init__(model)
        require_latents(self, model)
        c_dim = model.c_dim
        if encoder is not None:
            agree("the features of x", model=c_dim, encoder=getattr(encoder, "in_dim", None))
            c_dim = encoder.out_dim  # type: ignore[assignment]
        self.encoder = encoder
        self.smoothing = bool(getattr(encoder, "smoothing", False))
        in_dim = c_dim + (model.h_dim if self.reads_state else 0)
        self.network = NormalNetwork(
            in_dim, self.z_dim, hidden, min_scale=min_scale, activation=activation
        )
        self._set_up(model, **own)

    def _set_up(self, model: SequenceModel) -> None:
        """Finish a subclass's guide, given the options that only this one has."""

    def encode(self, x: Tensor, mask: Tensor, start: Any = None) -> Tensor:
        """The encoder's outputs, or the features of x, ``(B, T, C)``."""
        read: Any = self.features  # those that go on take the start
        features = read(x) if start is None else read(x, start)
        return features if self.encoder is None else self.encoder(features, mask)

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        return self.network(c_t, self.hidden(state))


class SmoothingGuide(FilteringGuide):
    """Diagonal normal q(z_t | x_{t:T}, h_t): a backward GRU reads the future of x.

    The exact posterior of a state-space model depends on the same x. Source: Krishnan et al.
    (2017), https://arxiv.org/abs/1609.09869, section 4 ("DKS"); Fraccaro et al. (2016), eq. 10.

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

    The guide starts close to the prior's path and learns the correction. Where the prior is
    refined, the mean is that of its base. Source: Fraccaro et al.
    (2016), section 3.3 ("res_q"); "using the mean from the prior" in the text on AVRNN.

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
        prior_gradient: whether the guide's gradient reaches the prior (and its inputs) through
            the prior mean (default True). False stops it: reconstruction cannot move the prior.

    Raises:
        NotImplementedError: a prior without a known mean, such as a flow.
    """

    def _set_up(self, model: SequenceModel, prior_gradient: bool = True) -> None:
        self.prior_gradient = prior_gradient
        with torch.no_grad():
            prior = self._prior(model.init(Size((1,))))
        try:
            assert prior.mean is not None
        except NotImplementedError:
            raise NotImplementedError(
                f"ResidualGuide corrects the prior's mean, which a {type(prior).__name__} of this "
                "model does not know; use FilteringGuide or FlowGuide"
            ) from None

    def _prior(self, state: Any) -> dist.Distribution:
        """The prior that has a mean: of a refined one its base."""
        prior = self.transition(state)
        return prior.base if isinstance(prior, Refined) else prior

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        with torch.set_grad_enabled(self.prior_gradient and torch.is_grad_enabled()):
            prior_mean = self._prior(state).mean
        correction, scale = self.network.parameters_of(c_t, self.hidden(state))
        return diagonal_normal(prior_mean + correction, scale)


class _Given:
    """A flow's network with its context given, as ``flow.condition`` makes it of a ``partial``.

    Attributes of a ``partial`` cannot be set where a step is traced.
    """

    def __init__(self, network: Any, context: Tensor) -> None:
        self.network, self.context = network, context
        self.permutation = network.permutation

    def __call__(self, z: Tensor) -> Any:
        return self.network(z, context=self.context)


class FlowGuide(FilteringGuide):
    """Normalising flow q(z_t | c_t, h_t): a normal, then inverse autoregressive flows.

    The flows read c_t and h_t as well. One pass a flow gives a draw and its density; the density
    of a z from elsewhere takes Z passes.
    Source: Kingma et al. (2016), https://arxiv.org/abs/1606.04934; Pyro's transforms.

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
        num_flows: number of flows (default 2); each takes z's dimensions in the reverse order of
            the one before.

    Raises:
        ValueError: fewer than two dimensions, or fewer than one flow.
    """

    def _set_up(self, model: SequenceModel, num_flows: int = 2) -> None:
        counts(2, "; use FilteringGuide instead of FlowGuide", z_dim=self.z_dim)
        counts(1, num_flows=num_flows)
        order = torch.arange(self.z_dim)
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    self.z_dim,
                    self.network.in_dim,
                    [max(width, self.z_dim) for width in self.network.hidden],
                    permutation=order.flip(0) if i % 2 else order,
                    nonlinearity=ACTIVATIONS[self.network.activation](),
                )
            )
            for i in range(num_flows)
        )

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | h_t, c_t), event shape ``(Z,)``."""
        context = broadcast_cat(c_t, self.hidden(state))
        flows: Any = self.flows
        steps = [
            transforms.AffineAutoregressive(_Given(flow.nn, context), **flow.kwargs)
            for flow in flows
        ]
        return dist.TransformedDistribution(self.network(context), steps, validate_args=False)


class MeanFieldGuide(FilteringGuide):
    """Diagonal normal q(z_t | c_t) that depends on the data alone, not on the path of z.

    Without an encoder it is q(z_t | x_t), as in a VAE; with a forward one q(z_t | x_{1:t}), as in
    STORN; with one in both directions q(z_t | x_{1:T}).

    Args:
        model, hidden, encoder, min_scale, activation: as for :class:`FilteringGuide`.
    """

    reads_state = False

    def proposal(self, state: Any, c_t: Tensor) -> dist.Distribution:
        """q(z_t | c_t), event shape ``(Z,)``."""
        return self.network(c_t, self.hidden(state)[..., :0])  # the state's leading dimensions


class NoLatents(SequenceGuide):
    """The empty guide of a model with Z = 0: no sites, log q = 0.

    Args:
        model: a model without latents.

    Raises:
        ValueError: a model with latents.
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


#: By the names that recipes and the command line take: the class, and what its encoder reads.
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
