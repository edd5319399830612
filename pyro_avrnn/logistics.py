"""Mixtures of logistics on discrete levels: exact masses, stable in float32, fast on speech."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn import functional as F


class Cells(constraints.Constraint):
    """The centres ``(2k + 1) / 2^bits - 1`` of 2^bits equal cells of (-1, 1), in some unit.

    A value may differ from the centre by 1/64 of a cell: centres are exact in float32, but not
    every way of computing them is.

    Args:
        bits: from 1 to 16.
        unit: that the centres are divided by.
    """

    is_discrete = True

    def __init__(self, bits: int, unit: float = 1.0) -> None:
        self.bits, self.unit = bits, unit
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """True where the value is a centre."""
        cell = value * (2 ** (self.bits - 1) * self.unit) - 0.5
        nearest = cell.round()
        half = 2 ** (self.bits - 1)
        return ((cell - nearest).abs() <= 1 / 64) & (nearest >= -half) & (nearest < half)


#: Scales of exp(50) serve no purpose; beyond, float32 rounds a cell's mass to 0, its log to -inf.
_MAX_LOG_SCALE = 50.0


class MixtureOfLogistics(dist.TorchDistribution):
    r"""Independent features, each a mixture of logistics on 2^bits levels; event shape ``(X,)``.

    A level has the mass of its cell; the first and last cell include the tails. For an inner cell
    from a to b, in units of the scale about the location, of width :math:`2w = b - a`,

    .. math:: \sigma(b) - \sigma(a) = \sigma(b)\,\sigma(-a)\,(1 - e^{-2w}),

    where nothing cancels, as w is known directly. Masses are therefore exact to round-off and sum
    to 1 for components of any width, and log-masses and their gradients are finite.

    Args:
        parameters: ``(*batch, 3, C, X)``: logits, locations and log scales of C components.
        bits: from 1 to 16.
        min_log_scale: log scales below it are raised to it, and get no gradient.
        unit: of levels, locations and scales: levels are the cells' centres divided by it.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        parameters: Tensor,
        bits: int = 16,
        min_log_scale: float = -7.0,
        unit: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        self.parameters, self.bits = parameters, bits
        self.min_log_scale, self.unit = min_log_scale, unit
        super().__init__(parameters.shape[:-3], parameters.shape[-1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Centres of cells."""
        return constraints.independent(Cells(self.bits, self.unit), 1)

    def expand(
        self, batch_shape: Sequence[int], _instance: "MixtureOfLogistics | None" = None
    ) -> "MixtureOfLogistics":
        """The same distribution with a larger batch shape, without copying memory."""
        parameters = self.parameters.expand(*batch_shape, *self.parameters.shape[-3:])
        levels = (self.bits, self.min_log_scale, self.unit)
        return type(self)(parameters, *levels, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, ``(*batch)``, of values ``(*batch, X)``; no gradient with respect to them."""
        if self._validate_args:
            self._validate_sample(value)
        parts = self.parameters.shape[-3:]
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        parameters = self.parameters.expand(*batch, *parts).reshape(batch.numel(), *parts)
        flat = value.to(parameters).expand(*batch, -1).reshape(batch.numel(), 1, parts[-1])
        levels = (self.bits, self.min_log_scale, self.unit)
        out: Tensor = _LogMass.apply(parameters, flat, *levels)
        return out.reshape(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Levels, ``(*sample_shape, *batch, X)``."""
        with torch.no_grad():
            logits, loc, scale = self._components()
            shape = Size(sample_shape)
            u = torch.rand_like(logits[..., :1, :].expand(*shape, *logits[..., :1, :].shape))
            shares = logits.softmax(dim=-2).cumsum(dim=-2)[..., :-1, :]
            drawn = (shares <= u).sum(dim=-2, keepdim=True)
            loc, scale = (
                p.expand(*shape, *p.shape).gather(-2, drawn).squeeze(-2) for p in (loc, scale)
            )
            u = torch.rand_like(loc)  # may be 0, never 1; the end cell takes what is infinite
            half = 2 ** (self.bits - 1)
            cell = ((loc + scale * (u.log() - (-u).log1p())) * (half * self.unit)).floor()
            return (cell.clamp(-half, half - 1) + 0.5) / (half * self.unit)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture truncated to the cells, within half a cell of the levels' mean."""
        logits, loc, scale = self._components()
        end = 1 / self.unit
        width, low = 2 * end / scale, (loc - end) / scale
        # the integral of a logistic cdf over the cells, in the form that cancels nothing
        wide = (low.sigmoid() * width.clamp(max=1.0).expm1()).log1p()
        narrow = F.softplus(low + width) - F.softplus(low)
        inside = scale * torch.where(width > 1, narrow, wide)
        return (logits.softmax(dim=-2) * (inside - end)).sum(dim=-2)

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and scales, each ``(*batch, C, X)``."""
        logits, loc, log_scale = self.parameters.unbind(-3)
        return logits, loc, log_scale.clamp(self.min_log_scale, _MAX_LOG_SCALE).exp()


class _LogMass(torch.autograd.Function):
    """Log-mass of levels, summed over features; parameters ``(N, 3, C, X)``, values ``(N, 1, X)``.

    Training on speech spends its time here. Autograd would keep some thirty intermediate tensors
    of the parameters' size, and memory, not arithmetic, limits the speed. Rows therefore pass in
    blocks that fit the processor's cache, nothing is kept between forward and backward, and the
    gradient, known in closed form, is written once.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, parameters: Tensor, value: Tensor, bits: int, min_log_scale: float, unit: float
    ) -> Tensor:
        ctx.save_for_backward(parameters, value)
        ctx.levels = levels = (bits, min_log_scale, unit)
        out = parameters.new_empty(len(parameters))
        for rows in _blocks(parameters):
            logits = parameters[rows, 0]
            terms = _Terms(parameters[rows], value[rows], *levels)
            total = terms.joint.logsumexp(dim=1) - logits.logsumexp(dim=1)
            torch.sum(total, dim=1, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: D102
        parameters, value = ctx.saved_tensors
        out = torch.empty_like(parameters)
        for rows in _blocks(parameters):
            weight = grad[rows, None, None]
            _Terms(parameters[rows], value[rows], *ctx.levels).gradient(weight, out[rows])
        return out, None, None, None, None


class _Terms:
    """Cells of N values under N times C components, tensors ``(N, C, X)``, computed in place.

    Args:
        parameters: ``(N, 3, C, X)``.
        value: ``(N, 1, X)``.
        bits, min_log_scale, unit: as of :class:`MixtureOfLogistics`.
    """

    def __init__(
        self, parameters: Tensor, value: Tensor, bits: int, min_log_scale: float, unit: float
    ) -> None:
        self.logits, loc, self.log_scale = parameters.unbind(1)
        self.floor, half_cell, end = min_log_scale, 0.5**bits / unit, 1 / unit
        first, last = value < 2 * half_cell - end, value > end - 2 * half_cell
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
    """Slices of rows: half a megabyte a tensor, which fits a cache; more on other devices."""
    most = 2**17 if parameters.device.type == "cpu" else 2**25
    step = max(1, most // max(1, parameters[0, 0].numel())) if len(parameters) else 1
    return [slice(i, i + step) for i in range(0, len(parameters), step)]
