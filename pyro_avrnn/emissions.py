"""Emissions p(x_t | z_t, h): decoders that map (phi(z_t), h) to a distribution over x_t.

An emission states the widths of its inputs and its event (``in_dim``, ``x_dim``) and the values it
can score (``support``; in words, ``expects``), so that a model refuses other data with a sentence
instead of returning a meaningless density.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from inference.protocols import at_least, counts, of_kind
from pyro_avrnn.logistics import Cells, MixtureOfLogistics
from pyro_avrnn.networks import MLP, NormalNetwork, diagonal_normal, positive
from pyro_avrnn.shapes import broadcast_cat


class NormalEmission(NormalNetwork):
    """Diagonal normal p(x_t | z_t, h) with an explicit floor under its scale.

    The density is unbounded as the scale goes to zero, so a log-density means nothing without its
    floor: report both.

    Args:
        in_dim: width of phi(z_t) and h together.
        x_dim: X, the event size.
        hidden: widths of the hidden layers.
        min_scale: the floor, in units of the (standardised) data.
        activation: of the hidden layers, a name of ``ACTIVATIONS``.
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

    def distribution(self, out: Tensor) -> dist.Distribution:
        """The normal whose means and raw scales are ``(*batch, 2 X)``."""
        loc, raw = out.chunk(2, dim=-1)
        return diagonal_normal(loc, positive(raw, self.min_scale, self.scale_bias))


class _Decoder(nn.Module):
    """Base of the other emissions: one network gives all parameters of the distribution."""

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        activation: str = "relu",
        **own: float,
    ) -> None:
        super().__init__()
        counts(1, x_dim=x_dim)
        of_kind(list | tuple, "a list of widths", hidden=hidden)
        self.in_dim, self.x_dim = in_dim, x_dim
        outputs = self._set_up(**own)
        self.net = MLP([in_dim, *hidden, outputs], activation=activation)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        return self.distribution(self.net(broadcast_cat(*inputs)))

    def _set_up(self, *args: Any, **own: Any) -> int:
        """Keep the options that only this emission has, and return the network's output width."""
        raise NotImplementedError

    def distribution(self, out: Tensor) -> dist.Distribution:
        """The distribution with these outputs of the network, of all features or some."""
        raise NotImplementedError


class BernoulliEmission(_Decoder):
    """Independent Bernoullis p(x_t | z_t, h), for data of 0 and 1 such as piano rolls.

    Args:
        in_dim, x_dim, hidden, activation: as for :class:`NormalEmission`.
    """

    support = constraints.boolean
    expects: ClassVar[str] = "0 and 1 only"

    def _set_up(self) -> int:
        return self.x_dim

    def distribution(self, out: Tensor) -> dist.Distribution:
        """See the base."""
        return dist.Bernoulli(logits=out, validate_args=False).to_event(1)


class MixtureOfNormalsEmission(_Decoder):
    r"""Mixture of normals :math:`\sum_c \pi_c\,N(\mu_c, \mathrm{diag}\,\sigma_c^2)` with a floor.

    One component is drawn for the whole frame, so features depend on each other. As with a
    normal, the density is unbounded: report the floor.
    Source: Chung et al. (2015), https://arxiv.org/abs/1506.02216, section 4: the VRNN-GMM and
    RNN-GMM, with 20 components.

    Args:
        in_dim, x_dim, hidden, activation: as for :class:`NormalEmission`.
        num_components: C, at least 2 (default 10).
        min_scale: the floor under every scale, in units of the (standardised) data (default
            0.001).

    Raises:
        ValueError: fewer than two components, or a negative floor.
    """

    support = constraints.real
    expects: ClassVar[str] = "finite real numbers"

    def _set_up(self, num_components: int = 10, min_scale: float = 1e-3) -> int:
        counts(2, "; use NormalEmission for a single normal", num_components=num_components)
        at_least(0, min_scale=min_scale)
        self.num_components, self.min_scale = num_components, min_scale
        return num_components * (2 * self.x_dim + 1)

    def distribution(self, out: Tensor) -> dist.Distribution:
        """See the base."""
        logits, rest = out[..., : self.num_components], out[..., self.num_components :]
        loc, raw = rest.unflatten(-1, (2, self.num_components, self.x_dim)).unbind(-3)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            diagonal_normal(loc, positive(raw, self.min_scale)),
            validate_args=False,
        )


class Classes(dist.Categorical):
    """Categorical over 0 .. C-1 whose values are floating-point numbers, like all data here.

    Args:
        logits: ``(*batch, C)``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, ``(*batch)``, of floating or integer values."""
        if self._validate_args:
            self._validate_sample(value)
        # torch's, as Pyro's looks at the identity of this object, and no graph can
        return torch.distributions.Categorical.log_prob(self, value.long())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Classes in the dtype of the logits."""
        return super().sample(Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All classes in the dtype of the logits, ``(C, *batch)``."""
        return super().enumerate_support(expand).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected index, ``(*batch)``, which is useful where the classes are ordered."""
        index = torch.arange(self.logits.shape[-1]).to(self.probs)
        return (self.probs * index).sum(dim=-1)

    @property
    def mode(self) -> Tensor:
        """The most probable class, ``(*batch)``."""
        return self.logits.argmax(dim=-1).to(self.logits.dtype)


class CategoricalEmission(_Decoder):
    """Independent categoricals p(x_t | z_t, h), for data of classes 0 .. C-1.

    Args:
        in_dim, x_dim, hidden, activation: as for :class:`NormalEmission`.
        num_classes: C, at least 2; has no default.

    Raises:
        ValueError: fewer than two classes.
    """

    def _set_up(self, *, num_classes: int) -> int:
        counts(2, num_classes=num_classes)
        self.num_classes = num_classes
        self.support = constraints.integer_interval(0, num_classes - 1)
        self.expects = f"integers from 0 to {num_classes - 1}"
        return self.x_dim * num_classes

    def distribution(self, out: Tensor) -> dist.Distribution:
        """See the base."""
        logits = out.unflatten(-1, (-1, self.num_classes))
        return Classes(logits=logits, validate_args=False).to_event(1)


class DiscretisedLogisticMixture(_Decoder):
    r"""Mixture of logistics p(x_t | z_t, h) for every feature, on 2^bits equal cells of (-1, 1).

    A log-mass is at most 0, and a uniform guess is worth ``-bits ln 2`` nats a feature, so numbers
    of different papers can be compared, unlike log-densities.

    The floor under the log scale still matters: the largest mass of a cell is
    :math:`\tanh(2^{-\mathrm{bits}} e^{-\mathrm{floor}} / 2)`. At the sources' floor of -7 that is
    0.97 at 8 bits and 0.0084, 6.9 bits a feature, at 16. Speech at rest uses few levels and would
    gain from narrower components. State the floor with the number.

    Source: Salimans et al. (2017), https://arxiv.org/abs/1701.05517, eq. 2; with 10 components on
    16-bit mu-law speech: Havtorn et al. (2022), https://arxiv.org/abs/2202.12707. Departures: the
    mass of a cell is exact, not approximated by the density at its middle; each feature draws its
    own component, where the code of Havtorn et al. draws one for all features of a frame.

    Args:
        in_dim, x_dim, hidden, activation: as for :class:`NormalEmission`.
        bits: from 1 to 16 (default); x holds centres of 2^bits equal cells of (-1, 1).
        num_components: C, at least 2 (default 10).
        min_log_scale: the floor, from -20 to 0 (default -7), in units of ln x.
        unit: x holds the centres divided by it (default 1): for linear levels, which networks
            read best in units of their deviation. A log-mass knows no unit.

    Raises:
        ValueError: bits, components, floor or unit outside these ranges.
    """

    def _set_up(
        self,
        bits: int = 16,
        num_components: int = 10,
        min_log_scale: float = -7.0,
        unit: float = 1.0,
    ) -> int:
        if type(bits) is not int or bits not in range(1, 17):
            raise ValueError(f"bits must be from 1 to 16, got {bits}")
        at_least(-math.inf, min_log_scale=min_log_scale)
        counts(2, "; a mixture of one is no mixture", num_components=num_components)
        if not -20.0 <= min_log_scale <= 0.0:
            raise ValueError(f"min_log_scale must be from -20 to 0, got {min_log_scale}")
        at_least(1e-6, unit=unit)
        self.bits, self.num_components, self.min_log_scale = bits, num_components, min_log_scale
        self.unit, self.support = unit, Cells(bits, unit)
        divided = "" if unit == 1.0 else f", divided by {unit:g}"
        self.expects = f"levels: centres of {2**bits:,} equal cells of (-1, 1){divided}"
        self.padding = 0.5**bits / unit  # zero itself is the border of two cells
        return 3 * num_components * self.x_dim

    def distribution(self, out: Tensor) -> dist.Distribution:
        """See the base."""
        parameters = out.unflatten(-1, (3, self.num_components, -1))
        levels = (self.bits, self.min_log_scale, self.unit)
        return MixtureOfLogistics(parameters, *levels, validate_args=False)


EMISSIONS: dict[str, type[nn.Module]] = {
    "normal": NormalEmission,
    "bernoulli": BernoulliEmission,
    "mixture": MixtureOfNormalsEmission,
    "categorical": CategoricalEmission,
    "logistic": DiscretisedLogisticMixture,
}
