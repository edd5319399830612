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
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn import functional as F

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


class _Cells(constraints.Constraint):
    """The centres ``(2k + 1) / 2^bits - 1`` of 2^bits equal cells of (-1, 1).

    A value may be off its centre by 1/64 of a cell: centres are exact in float32, but not every
    way of computing them is.

    Args:
        bits: from 1 to 16.
    """

    is_discrete = True

    def __init__(self, bits: int) -> None:
        self.bits = bits
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """True where the value is a centre."""
        cell = value * 2 ** (self.bits - 1) - 0.5
        nearest = cell.round()
        half = 2 ** (self.bits - 1)
        return ((cell - nearest).abs() <= 1 / 64) & (nearest >= -half) & (nearest < half)


#: exp(50) is wider than any use; beyond it float32 would round a cell's mass to 0, its log to -inf
_MAX_LOG_SCALE = 50.0


class MixtureOfLogistics(dist.TorchDistribution):
    r"""Independent features, each a mixture of logistics on 2^bits levels; event shape ``(X,)``.

    A level's mass is that of its cell, the first and last cell taking the tails. For an inner
    cell from a to b, in units of the scale about the location, of width :math:`2w = b - a`,

    .. math:: \sigma(b) - \sigma(a) = \sigma(b)\,\sigma(-a)\,(1 - e^{-2w}),

    which has nothing to cancel, for w is known by itself. So masses are exact to round-off and
    sum to 1, however narrow or wide a component is, and log-masses and their gradients are finite.

    Args:
        parameters: ``(*batch, 3, C, X)``: logits, locations and log scales of C components.
        bits: from 1 to 16.
        min_log_scale: log scales below it are raised to it (and there get no gradient).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        parameters: Tensor,
        bits: int = 16,
        min_log_scale: float = -7.0,
        validate_args: bool | None = None,
    ) -> None:
        self.parameters, self.bits, self.min_log_scale = parameters, bits, min_log_scale
        super().__init__(parameters.shape[:-3], parameters.shape[-1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Centres of cells."""
        return constraints.independent(_Cells(self.bits), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixtureOfLogistics":
        """The same with a larger batch shape; no memory is copied."""
        parameters = self.parameters.expand(*batch_shape, *self.parameters.shape[-3:])
        return type(self)(parameters, self.bits, self.min_log_scale, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, ``(*batch)``, of values ``(*batch, X)``; no gradient with respect to them."""
        if self._validate_args:
            self._validate_sample(value)
        parts = self.parameters.shape[-3:]
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        parameters = self.parameters.expand(*batch, *parts).reshape(batch.numel(), *parts)
        flat = value.to(parameters).expand(*batch, -1).reshape(batch.numel(), 1, parts[-1])
        out: Tensor = _LogMass.apply(parameters, flat, self.bits, self.min_log_scale)
        return out.reshape(batch)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Levels, ``(*sample_shape, *batch, X)``."""
        with torch.no_grad():
            logits, loc, scale = (p.mT for p in self._components())  # X, C
            shape = Size(sample_shape)
            drawn = dist.Categorical(logits=logits, validate_args=False).sample(shape)
            loc, scale = (
                p.expand(*shape, *p.shape).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
                for p in (loc, scale)
            )
            u = torch.rand_like(loc)  # may be 0, never 1; the end cell takes what is infinite
            half = 2 ** (self.bits - 1)
            cell = ((loc + scale * (u.log() - (-u).log1p())) * half).floor()
            return (cell.clamp(-half, half - 1) + 0.5) / half

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, cut off at -1 and 1; within half a cell of the levels' mean."""
        logits, loc, scale = self._components()
        width, low = 2 / scale, (loc - 1) / scale
        # the integral of a logistic cdf over (-1, 1), in the form that cancels nothing
        wide = (low.sigmoid() * width.clamp(max=1.0).expm1()).log1p()
        narrow = F.softplus(low + width) - F.softplus(low)
        inside = scale * torch.where(width > 1, narrow, wide)
        return (logits.softmax(dim=-2) * (inside - 1)).sum(dim=-2)

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and scales, each ``(*batch, C, X)``."""
        logits, loc, log_scale = self.parameters.unbind(-3)
        return logits, loc, log_scale.clamp(self.min_log_scale, _MAX_LOG_SCALE).exp()


class _LogMass(torch.autograd.Function):
    """Log-mass of levels, summed over features; parameters ``(N, 3, C, X)``, values ``(N, 1, X)``.

    This is where training on speech spends its time. Left to autograd, some thirty intermediate
    tensors of the parameters' size would be kept, and memory, not arithmetic, sets the pace. So
    rows go through in blocks that stay in the processor's cache, nothing is kept between forward
    and backward, and the gradient, known in closed form, is written once.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, parameters: Tensor, value: Tensor, bits: int, min_log_scale: float
    ) -> Tensor:
        ctx.save_for_backward(parameters, value)
        ctx.bits, ctx.min_log_scale = bits, min_log_scale
        out = parameters.new_empty(len(parameters))
        for rows in _blocks(parameters):
            logits = parameters[rows, 0]
            terms = _Terms(parameters[rows], value[rows], bits, min_log_scale)
            total = terms.joint.logsumexp(dim=1) - logits.logsumexp(dim=1)
            torch.sum(total, dim=1, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        parameters, value = ctx.saved_tensors
        out = torch.empty_like(parameters)
        for rows in _blocks(parameters):
            weight = grad[rows, None, None]
            _Terms(parameters[rows], value[rows], ctx.bits, ctx.min_log_scale).gradient(
                weight, out[rows]
            )
        return out, None, None, None


class _Terms:
    """_Cells of N values under N times C components, tensors ``(N, C, X)``; worked on in place.

    Args:
        parameters: ``(N, 3, C, X)``.
        value: ``(N, 1, X)``.
        bits, min_log_scale: as of :class:`MixtureOfLogistics`.
    """

    def __init__(self, parameters: Tensor, value: Tensor, bits: int, min_log_scale: float) -> None:
        self.logits, loc, self.log_scale = parameters.unbind(1)
        self.floor, half_cell = min_log_scale, 0.5**bits
        first, last = value < 2 * half_cell - 1, value > 1 - 2 * half_cell
        self.precision = self.log_scale.clamp(min_log_scale, _MAX_LOG_SCALE).neg_().exp_()
        centre = (value - loc).mul_(self.precision)
        self.w = self.precision * half_cell
        # a border at 1e4 scales is one at infinity: the exponentials below are exactly 0
        self.b = (centre + self.w).masked_fill_(last, 1e4)
        self.a = centre.sub_(self.w).masked_fill_(first, -1e4)
        self.exp_b, self.exp_a = self.b.abs().neg_().exp_(), self.a.abs().neg_().exp_()
        self.inner = torch.expm1(-2 * self.w).neg_().masked_fill_(first | last, 1.0)
        # sigma(y) is exp(min(y, 0)) / (1 + exp(-|y|)): three logarithms become one
        log_mass = (self.inner / (1 + self.exp_b)).div_(1 + self.exp_a).log_()
        self.joint = log_mass.add_(self.b.clamp(max=0)).sub_(self.a.clamp(min=0)).add_(self.logits)

    def gradient(self, weight: Tensor, out: Tensor) -> None:
        """Write ``weight`` ``(N, 1, 1)`` times the gradient of the log-mass to ``out``."""
        share = self.joint.softmax(dim=1).mul_(weight)  # of the component in the mass
        torch.addcmul(share, self.logits.softmax(dim=1), weight, value=-1, out=out[:, 0])
        by_b = torch.where(self.b < 0, 1.0, self.exp_b).div_(1 + self.exp_b)  # sigma(-b)
        by_a = torch.where(self.a > 0, 1.0, self.exp_a).div_(1 + self.exp_a)  # sigma(a)
        # w times the derivative of log(1 - e^{-2w}), which is 1 at w = 0, and 0 in the end cells
        by_w = (1 - self.inner).div_(self.inner).mul_(self.w).mul_(2)
        torch.mul(self.precision.mul_(by_a - by_b), share, out=out[:, 1])
        by_log_scale = by_a.mul_(self.a).sub_(by_b.mul_(self.b)).sub_(by_w).mul_(share)
        free = (self.log_scale >= self.floor) & (self.log_scale <= _MAX_LOG_SCALE)
        torch.mul(by_log_scale, free, out=out[:, 2])


def _blocks(parameters: Tensor) -> list[slice]:
    """Rows taken together: half a megabyte a tensor, which caches hold; on other devices more."""
    most = 2**17 if parameters.device.type == "cpu" else 2**25
    step = max(1, most // max(1, parameters[0, 0].numel())) if len(parameters) else 1
    return [slice(i, i + step) for i in range(0, len(parameters), step)]


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
        self.support = _Cells(bits)
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
