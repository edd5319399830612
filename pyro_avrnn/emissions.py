"""Emissions p(x_t | z_t, h): decoders that map (phi(z_t), h) to a distribution over x_t.

An emission says how wide its inputs and its event are (``in_dim``, ``x_dim``) and which values it
can score (``support``), in words too (``expects``), so that a model refuses other data with one
sentence instead of returning a density that means nothing.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_avrnn.logistics import Cells, MixtureOfLogistics
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
        self.x_dim = x_dim


class _Decoder(nn.Module):
    """What the other emissions share: their sizes, and one network for all their parameters."""

    def __init__(
        self, in_dim: int, x_dim: int, hidden: Sequence[int], outputs: int, activation: str
    ) -> None:
        super().__init__()
        self.in_dim, self.x_dim = in_dim, x_dim
        self.net = MLP([in_dim, *hidden, outputs], activation=activation)


class BernoulliEmission(_Decoder):
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
        super().__init__(in_dim, x_dim, hidden, x_dim, activation)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        logits = self.net(broadcast_cat(*inputs))
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)


class MixtureOfNormalsEmission(_Decoder):
    r"""p(x_t | z_t, h) = :math:`\sum_c \pi_c\,N(\mu_c, \mathrm{diag}\,\sigma_c^2)`, with a floor.

    One component is drawn for the whole frame, so that features depend on each other.
    Source: Chung et al. (2015), https://arxiv.org/abs/1506.02216, section 4: the VRNN-GMM and
    RNN-GMM, with 20 components. Like a normal's, the density is unbounded: report the floor.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        num_components: C, at least 2.
        min_scale: the floor under every sigma, in units of the (standardised) data.
        activation: of the hidden layers.

    Raises:
        ValueError: fewer than two components, or a negative floor.
    """

    support = constraints.real
    expects: ClassVar[str] = "finite real numbers"

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        num_components: int = 10,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        if num_components < 2:
            raise ValueError(
                f"num_components must be at least 2, got {num_components}; use NormalEmission "
                "for a single normal"
            )
        if min_scale < 0:
            raise ValueError(f"min_scale must not be negative, got {min_scale}")
        super().__init__(in_dim, x_dim, hidden, num_components * (2 * x_dim + 1), activation)
        self.num_components, self.min_scale = num_components, min_scale

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        out = self.net(broadcast_cat(*inputs))
        logits, rest = out[..., : self.num_components], out[..., self.num_components :]
        loc, raw = rest.unflatten(-1, (2, self.num_components, self.x_dim)).unbind(-3)
        scale = self.min_scale + F.softplus(raw + 0.5)  # the bias is NormalNetwork's
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            dist.Normal(loc, scale, validate_args=False).to_event(1),
            validate_args=False,
        )


class Classes(dist.Categorical):
    """Categorical over 0 .. C-1 whose values are floating, as all data here are.

    Args:
        logits: ``(*batch, C)``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, ``(*batch)``, of floating or integer values."""
        if self._validate_args:
            self._validate_sample(value)
        return super().log_prob(value.long())

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Classes in the dtype of the logits."""
        return super().sample(Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All classes in the dtype of the logits, ``(C, *batch)``."""
        return super().enumerate_support(expand).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected index, ``(*batch)``: of use where the classes are ordered."""
        index = torch.arange(self.logits.shape[-1]).to(self.probs)
        return (self.probs * index).sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest class, ``(*batch)``."""
        return self.logits.argmax(dim=-1).to(self.logits.dtype)


class CategoricalEmission(_Decoder):
    """p(x_t | z_t, h): independent categoricals, for data of classes 0 .. C-1.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        num_classes: C, at least 2.
        activation: of the hidden layers.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        num_classes: int,
        activation: str = "relu",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        super().__init__(in_dim, x_dim, hidden, x_dim * num_classes, activation)
        self.num_classes = num_classes
        self.support = constraints.integer_interval(0, num_classes - 1)
        self.expects = f"integers from 0 to {num_classes - 1}"

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        logits = self.net(broadcast_cat(*inputs)).unflatten(-1, (self.x_dim, self.num_classes))
        return Classes(logits=logits, validate_args=False).to_event(1)


class DiscretisedLogisticMixture(_Decoder):
    r"""p(x_t | z_t, h): every feature a mixture of logistics over 2^bits levels of (-1, 1).

    A log-mass is at most 0, and a uniform guess is worth ``-bits ln 2`` nats a feature, so that
    numbers of different papers can be compared, unlike densities.

    The floor under the log scale matters all the same: a cell's largest mass is
    :math:`\tanh(2^{-\mathrm{bits}} e^{-\mathrm{floor}} / 2)`. At the sources' floor of -7 that is
    0.97 at 8 bits and 0.0084, 6.9 bits a feature, at 16. Levels of speech at rest, of which few
    are used, would pay for narrower components; state the floor with the number.

    Source: Salimans et al. (2017), https://arxiv.org/abs/1701.05517, eq. 2; with 10 components on
    16-bit mu-law speech: Havtorn et al. (2022), https://arxiv.org/abs/2202.12707. Departures: no
    density at the middle of a cell stands in for its mass, and each feature draws a component of
    its own, where the code of Havtorn et al. draws one for all features of a frame.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        bits: from 1 to 16; x holds centres of 2^bits equal cells of (-1, 1).
        num_components: C, at least 2.
        min_log_scale: the floor, from -20 to 0, in units of ln x.
        activation: of the hidden layers.

    Raises:
        ValueError: bits, components or floor outside these ranges.
    """

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        bits: int = 16,
        num_components: int = 10,
        min_log_scale: float = -7.0,
        activation: str = "relu",
    ) -> None:
        if bits not in range(1, 17):
            raise ValueError(f"bits must be from 1 to 16, got {bits}")
        if num_components < 2:
            raise ValueError(
                f"num_components must be at least 2, got {num_components}; a mixture of one is no "
                "mixture"
            )
        if not -20.0 <= min_log_scale <= 0.0:
            raise ValueError(f"min_log_scale must be from -20 to 0, got {min_log_scale}")
        super().__init__(in_dim, x_dim, hidden, 3 * num_components * x_dim, activation)
        self.bits, self.num_components, self.min_log_scale = bits, num_components, min_log_scale
        self.support = Cells(bits)
        self.expects = f"mu-law levels: centres of {2**bits:,} equal cells of (-1, 1)"
        self.padding = 0.5**bits  # zero itself is the border of two cells

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        out = self.net(broadcast_cat(*inputs))
        parameters = out.unflatten(-1, (3, self.num_components, self.x_dim))
        return MixtureOfLogistics(parameters, self.bits, self.min_log_scale, validate_args=False)


EMISSIONS: dict[str, type[nn.Module]] = {
    "normal": NormalEmission,
    "bernoulli": BernoulliEmission,
    "mixture": MixtureOfNormalsEmission,
    "categorical": CategoricalEmission,
    "logistic": DiscretisedLogisticMixture,
}
