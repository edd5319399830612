r"""Emissions that are autoregressive over the features of a step.

:math:`p(x_t \mid z_t, h) = \prod_i p(x_{t,i} \mid x_{t,<i}, z_t, h)`: a decoder of independent
features gives the parameters of each, and a network that has read the features before it adds to
them; at the start of training it adds nothing. All features are scored in one pass, and drawn one
after the other.

Sources: Germain et al. (2015), https://arxiv.org/abs/1502.03509 (masks); Boulanger-Lewandowski et
al. (2012), https://arxiv.org/abs/1206.6392 (RNN-NADE); van den Oord et al. (2016),
https://arxiv.org/abs/1609.03499 (a causal network of samples).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from inference.protocols import counts, given
from pyro_avrnn.emissions import EMISSIONS
from pyro_avrnn.networks import ACTIVATIONS, by_size
from pyro_avrnn.shapes import broadcast_cat


class MaskedNetwork(nn.Module):
    """Perceptron whose output i has read the features before i: for features with a place each.

    Args:
        x_dim: X.
        in_dim: C, width of the context, which all outputs read.
        outputs: O, numbers a feature.
        hidden: units, of which the first read no feature and the last all but one.
        activation: a name of ``ACTIVATIONS``.
        inputs: I, numbers that stand for a feature: 1, or the classes of a one-hot code.
    """

    def __init__(
        self,
        x_dim: int,
        in_dim: int,
        outputs: int,
        hidden: int,
        activation: str,
        *,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        self.x_dim, self.outputs, read = x_dim, outputs, x_dim * inputs
        self.read, self.context = nn.Linear(read, hidden, bias=False), nn.Linear(in_dim, hidden)
        self.write = nn.Linear(hidden, x_dim * outputs, bias=False)
        self.skip = nn.Linear(read, x_dim * outputs, bias=False)
        self.activation = ACTIVATIONS[activation]()
        place, known = torch.arange(x_dim), torch.arange(hidden) * x_dim // hidden
        written = place.repeat_interleave(outputs).unsqueeze(1)  # the feature of each output
        place = place.repeat_interleave(inputs)  # and of each input
        self.mask_read = nn.Buffer(place < known.unsqueeze(1), persistent=False)
        self.mask_write = nn.Buffer(known <= written, persistent=False)
        self.mask_skip = nn.Buffer(place < written, persistent=False)
        for layer in (self.write, self.skip):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, context: Tensor, features: slice = slice(None)) -> Tensor:
        """Numbers ``(*batch, O, X)`` for x ``(*batch, X * I)`` and context ``(*batch, C)``.

        Args:
            x, context: as said.
            features: that are wanted; what stands in x from there on is not read.
        """
        hidden = F.linear(x, self.read.weight * self.mask_read) + self.context(context)
        rows = slice(*(i * self.outputs for i in features.indices(self.x_dim)[:2]))
        out = F.linear(self.activation(hidden), (self.write.weight * self.mask_write)[rows])
        out = out + F.linear(x, (self.skip.weight * self.mask_skip)[rows])
        return out.unflatten(-1, (-1, self.outputs)).transpose(-1, -2)


class CausalNetwork(nn.Module):
    """Perceptron of the last features before i, the same for all i: for the samples of a signal.

    It reads them in units of their root mean square, and the logarithm of that; what it adds to
    a location is in the same units, so that loud and quiet passages look alike to it. A
    linear prediction is added to the location of sample i, as in speech coding; its coefficients
    depend on the context.

    Args:
        x_dim: X.
        in_dim: C, width of the context.
        outputs: O, numbers a feature.
        locations: those of the O numbers that are locations.
        hidden: units of both layers.
        activation: a name of ``ACTIVATIONS``.
        lags: R, samples that are read.
    """

    def __init__(
        self,
        x_dim: int,
        in_dim: int,
        outputs: int,
        hidden: int,
        activation: str,
        *,
        locations: slice,
        lags: int = 32,
    ) -> None:
        super().__init__()
        counts(1, lags=lags)
        self.x_dim, self.outputs, self.lags = x_dim, outputs, lags
        self.read = nn.Linear(lags + 1, hidden, bias=False)
        self.context = nn.Linear(in_dim, hidden)
        self.middle, self.write = nn.Linear(hidden, hidden), nn.Linear(hidden, outputs, bias=False)
        self.predict = nn.Linear(in_dim, lags)
        self.activation = ACTIVATIONS[activation]()
        moved = torch.zeros(outputs, 1, dtype=torch.bool)
        moved[locations] = True
        self.moved = nn.Buffer(moved, persistent=False)
        for weight in (self.write.weight, self.predict.weight, self.predict.bias):
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, context: Tensor, features: slice = slice(None)) -> Tensor:
        """Numbers ``(*batch, O, X)``; arguments as for :class:`MaskedNetwork`."""
        first, last, _ = features.indices(self.x_dim)
        start = max(first - self.lags, 0)
        known = F.pad(x[..., start : last - 1], (self.lags - (first - start), 0))
        past = known.unfold(-1, self.lags, 1)  # (*batch, X, R)
        scaled, size = by_size(past)
        read = self.read(torch.cat([scaled, size.log()], dim=-1))
        hidden = self.activation(read + self.context(context).unsqueeze(-2))
        out = self.write(self.activation(self.middle(hidden))).transpose(-1, -2)
        predicted = (past @ self.predict(context).unsqueeze(-1)).transpose(-1, -2)
        size = size.transpose(-1, -2)
        return torch.where(self.moved, out * size + predicted, out)


_PARTS = ("bernoulli", "normal", "categorical", "logistic")
NETWORKS: dict[str, type[nn.Module]] = {"masked": MaskedNetwork, "causal": CausalNetwork}


class AutoregressiveEmission(nn.Module):
    """Features that depend on those before them: p(x_t | z_t, h) over ordered features.

    Args:
        in_dim, x_dim, hidden, activation: as for :class:`~pyro_avrnn.emissions.NormalEmission`.
        of: the emission of independent features that this one begins as: "bernoulli" (default),
            "normal", "categorical" or "logistic".
        network: "masked" (default) for features with places of their own, such as keys, or
            "causal" for the samples of a signal.
        width: units of its hidden layers; None for as many as ``hidden`` has at most.
        lags: samples that a causal network reads (default 32).
        own: further arguments of ``of``.

    Raises:
        ValueError: an emission or network of another name.
        NotImplementedError: classes in a causal network.
    """

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        of: str = "bernoulli",
        network: str = "masked",
        width: int | None = None,
        lags: int = 32,
        activation: str = "relu",
        **own: Any,
    ) -> None:
        super().__init__()
        for name, value, known in (("of", of, _PARTS), ("network", network, NETWORKS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        counts(1, **given(width=width))
        self.in_dim, self.x_dim = in_dim, x_dim
        base: Any = EMISSIONS[of](in_dim, x_dim, hidden, activation=activation, **own)
        self.support, self.expects = base.support, base.expects
        self.padding: float = getattr(base, "padding", 0.0)
        self.outputs: int = base.net.out_dim // x_dim
        self.base: Any = base
        sizes = (x_dim, in_dim, self.outputs, width or max(hidden, default=64), activation)
        self.num_classes: int = self.outputs if of == "categorical" else 0
        if network == "causal":
            if self.num_classes:
                raise NotImplementedError(
                    "a causal network reads numbers, not classes; use network='masked'"
                )
            third = self.outputs // 3
            shifted = {"normal": slice(0, 1), "logistic": slice(third, 2 * third)}
            own = {"locations": shifted.get(of, slice(0, 0)), "lags": lags}
            self.network: nn.Module = CausalNetwork(*sizes, **own)
        else:
            self.network = MaskedNetwork(*sizes, inputs=self.num_classes or 1)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        context = broadcast_cat(*inputs)
        return Ordered(self, context, self.base.net(context))

    def of_features(
        self, x: Tensor, context: Tensor, start: Tensor, features: slice = slice(None)
    ) -> dist.Distribution:
        """The distribution of some features given those of x before them, all independent.

        Args:
            x: ``(*batch, X)``.
            context: ``(*batch, in_dim)``.
            start: what the decoder gives, ``(*batch, O * X)``.
            features: that are wanted.
        """
        if self.num_classes:
            x = F.one_hot(x.long(), self.num_classes).to(context).flatten(-2)
        added = self.network(x, context, features)
        if self.num_classes:
            out = start.unflatten(-1, (self.x_dim, -1))[..., features, :] + added.transpose(-1, -2)
        else:
            out = start.unflatten(-1, (-1, self.x_dim))[..., features] + added
        distribution: dist.Distribution = self.base.distribution(out.flatten(-2))
        return distribution


class Ordered(dist.TorchDistribution):
    """Features ``(X,)`` of an :class:`AutoregressiveEmission`, drawn one after the other.

    Args:
        emission: with its network.
        context: ``(*batch, in_dim)``.
        start: what its decoder gives, ``(*batch, O * X)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, emission: AutoregressiveEmission, context: Tensor, start: Tensor) -> None:
        self.emission, self.context, self.start = emission, context, start
        super().__init__(context.shape[:-1], Size((emission.x_dim,)), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of every feature."""
        return constraints.independent(self.emission.support, 1)

    def expand(self, batch_shape: Sequence[int], _instance: "Ordered | None" = None) -> "Ordered":
        """The same distribution with a larger batch shape, without copying memory."""
        parts = (p.expand(*batch_shape, p.shape[-1]) for p in (self.context, self.start))
        return type(self)(self.emission, *parts)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, ``(*batch)``, of values ``(*batch, X)``; no gradient with respect to them."""
        value = value.detach()
        return self.emission.of_features(value, self.context, self.start).log_prob(value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Values ``(*sample_shape, *batch, X)``."""
        with torch.no_grad():
            wide = self.expand(Size(sample_shape) + self.batch_shape)
            x = torch.zeros(*wide.batch_shape, self.emission.x_dim).to(self.context)
            for i in range(self.emission.x_dim):
                one = slice(i, i + 1)
                x[..., one] = self.emission.of_features(x, wide.context, wide.start, one).sample()
            return x

    @property
    def mean(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an autoregressive emission does not know its mean, which depends on its own draws; "
            "average draws instead, mean=False"
        )
