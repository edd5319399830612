"""Operations as C expressions, for :mod:`~pyro_avrnn.engine.native`."""

import math
from collections.abc import Callable
from typing import Any

from pyro_avrnn.engine.capture import aten


class Unsupported(Exception):
    """An operation that the C writer does not know; the Python loop does."""


def number(x: Any) -> str:
    """Format a number as a C literal."""
    if isinstance(x, bool | int) or math.isfinite(x):
        return f"(REAL){float(x)!r}"
    return "(REAL)NAN" if x != x else "(REAL)INFINITY" if x > 0 else "(REAL)-INFINITY"


def _power(x: str, exponent: Any) -> str:
    if exponent in (2, 3):
        return "(" + " * ".join([x] * int(exponent)) + ")"
    return f"pow({x}, {number(exponent)})"


def _elu(x: str, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> str:
    a, s, i = map(number, (alpha, scale, input_scale))
    return f"({x} > 0 ? {s} * {x} : {s} * {a} * (exp_({i} * {x}) - 1))"


def _elu_backward(g: str, a: Any, s: Any, i: Any, of_result: bool, x: str) -> str:
    a, s, i = map(number, (a, s, i))
    slope = f"{i} * ({x} + {s} * {a})" if of_result else f"{s} * {a} * {i} * exp_({i} * {x})"
    return f"({g} * ({x} > 0 ? {s} : {slope}))"


def _softplus(x: str, beta: Any = 1.0, threshold: Any = 20.0) -> str:
    b, limit = number(beta), number(threshold)
    return f"({b} * {x} > {limit} ? {x} : softplus_({b} * {x}) / {b})"


def _clamp(x: str, low: Any = None, high: Any = None) -> str:
    made = x if low is None else f"({x} < {_scalar(low)} ? {_scalar(low)} : {x})"
    return made if high is None else f"({made} > {_scalar(high)} ? {_scalar(high)} : {made})"


def _scalar(x: Any) -> str:
    return x if isinstance(x, str) else number(x)


def _scaled(x: Any, alpha: Any) -> str:
    return _scalar(x) if alpha == 1 else f"{number(alpha)} * {_scalar(x)}"


#: operations of each element, as C expressions of those of the arguments
EACH: dict[Any, Callable[..., str]] = {
    aten.add.Tensor: lambda a, b, alpha=1: f"({_scalar(a)} + {_scaled(b, alpha)})",
    aten.sub.Tensor: lambda a, b, alpha=1: f"({_scalar(a)} - {_scaled(b, alpha)})",
    aten.rsub.Scalar: lambda a, b, alpha=1: f"({_scalar(b)} - {_scaled(a, alpha)})",
    aten.mul.Tensor: lambda a, b: f"({_scalar(a)} * {_scalar(b)})",
    aten.div.Tensor: lambda a, b: f"({_scalar(a)} / {_scalar(b)})",
    aten.addcmul.default: lambda a, b, c, value=1: f"({a} + {_scaled(b, value)} * {c})",
    aten.neg.default: lambda a: f"(-{a})",
    aten.exp.default: lambda a: f"exp_({a})",
    aten.log.default: lambda a: f"log({a})",
    aten.sqrt.default: lambda a: f"sqrt({a})",
    aten.abs.default: lambda a: f"({a} < 0 ? -{a} : {a})",
    aten.reciprocal.default: lambda a: f"(1 / {a})",
    aten.pow.Tensor_Scalar: _power,
    aten.sigmoid.default: lambda a: f"sigmoid_({a})",
    aten.tanh.default: lambda a: f"tanh_({a})",
    aten.relu.default: lambda a: f"MAX({a}, 0)",
    aten.silu.default: lambda a: f"({a} * sigmoid_({a}))",
    aten.elu.default: _elu,
    aten.softplus.default: _softplus,
    aten.leaky_relu.default: lambda a, slope=0.01: f"({a} > 0 ? {a} : {number(slope)} * {a})",
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda a, high: _clamp(a, None, high),
    aten.where.self: lambda c, a, b: f"({c} ? {_scalar(a)} : {_scalar(b)})",
    aten.gt.Scalar: lambda a, b: f"({a} > {number(b)})",
    aten.ge.Scalar: lambda a, b: f"({a} >= {number(b)})",
    aten.lt.Scalar: lambda a, b: f"({a} < {number(b)})",
    aten.le.Scalar: lambda a, b: f"({a} <= {number(b)})",
    aten.detach.default: lambda a: a,
    aten.fill.Scalar: lambda a, x: number(x),
    aten.clone.default: lambda a, memory_format=None: a,
    aten.sigmoid_backward.default: lambda g, y: f"({g} * (1 - {y}) * {y})",
    aten.tanh_backward.default: lambda g, y: f"({g} * (1 - {y} * {y}))",
    aten.threshold_backward.default: lambda g, x, t: f"({x} <= {number(t)} ? 0 : {g})",
    aten.silu_backward.default: lambda g, x: (
        f"({g} * sigmoid_({x}) * (1 + {x} * (1 - sigmoid_({x}))))"
    ),
    aten.softplus_backward.default: lambda g, x, b, t: (
        f"({number(b)} * {x} > {number(t)} ? {g} : {g} * sigmoid_({number(b)} * {x}))"
    ),
    aten.elu_backward.default: _elu_backward,
    aten.leaky_relu_backward.default: lambda g, x, slope, of_result: (
        f"({x} > 0 ? {g} : {number(slope)} * {g})"
    ),
}
EACH |= {
    getattr(aten, name).Scalar: EACH[getattr(aten, name).Tensor]
    for name in ("add", "sub", "mul", "div")
}
#: what fills a tensor, by the arguments of the operation
FILLED: dict[Any, Callable[..., Any]] = {
    aten.empty_like.default: lambda *given: 0,
    aten.zeros_like.default: lambda *given: 0,
    aten.new_zeros.default: lambda *given: 0,
    aten.zeros.default: lambda *given: 0,
    aten.ones_like.default: lambda *given: 1,
    aten.new_ones.default: lambda *given: 1,
    aten.ones.default: lambda *given: 1,
    aten.scalar_tensor.default: lambda value: value,
    aten.full.default: lambda size, value: value,
    aten.full_like.default: lambda like, value: value,
}
#: sums along dimensions: what is added, and what becomes of the sum
REDUCED: dict[Any, tuple[str, str]] = {
    aten.sum.default: ("x", ""),
    aten.sum.dim_IntList: ("x", ""),
    aten.mean.dim: ("x", "x / {count}"),
    aten.logsumexp.default: ("exp_(x - m)", "log(x) + m"),
}
MOST = "{0} = MAX({0}, {1});"
