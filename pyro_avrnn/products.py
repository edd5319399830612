"""Matrix products by the faster of the two libraries that torch carries.

For float32 torch asks MKL, which on AMD processors leaves half of their AVX-512 units idle: 0.20
against oneDNN's 0.43 TFLOP/s on two cores of an EPYC. Which of them is asked depends on processor
and sizes alone, never on a measurement, so that a run can be repeated bit for bit.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: multiplications below which a call's overhead decides
LEAST = 2**21
#: and the width below which oneDNN is the slower one
NARROWEST = 128


@cache
def onednn() -> Any:
    """oneDNN's ``(x, weight, bias, "none", [], "") -> x weight' + bias``; None if not faster."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return None
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")
    if not amd or "AVX512" not in backends.cpu.get_cpu_capability():
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise
        x, weight = torch.arange(12.0).reshape(4, 3), torch.arange(6.0).reshape(2, 3)
        with torch.no_grad():
            right = torch.equal(product(x, weight, None, "none", [], ""), x @ weight.t())
    except (AttributeError, RuntimeError, TypeError):  # torch's own name, and not promised
        return None
    return product if right else None


def pays(rows: int, weight: Tensor) -> bool:
    """Whether a product of so many rows with this matrix goes to oneDNN."""
    if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "meta"):
        return False
    large = rows * weight.numel() >= LEAST and min(weight.shape) >= NARROWEST
    return large and onednn() is not None


def dense(x: Tensor) -> Tensor:
    """A matrix without gaps, rows or columns together: of others oneDNN makes a slow case."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight' + bias``, x ``(rows, in)``, weight ``(out, in)``; no gradients."""
    if pays(len(x), weight):
        return onednn()(dense(x), dense(weight), bias, "none", [], "")
    made = torch.mm(x, weight.t())
    return made if bias is None else made + bias


class _Linear(torch.autograd.Function):
    """``x weight' + bias`` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a second derivative is wanted
            return g @ weight, g.t() @ x if of_weight else None, g.sum(0) if of_bias else None
        return (
            times(g, weight.t()) if of_x else None,
            times(g.t(), x.t()) if of_weight else None,
            g.sum(dim=0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by the faster library."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not pays(rows, weight) or x.dtype != weight.dtype or x.device != weight.device:
        return F.linear(x, weight, bias)
    made = _Linear.apply(x.reshape(rows, x.shape[-1]), weight, bias)
    return made.reshape(*x.shape[:-1], len(weight))


class Faster(TorchFunctionMode):
    """``F.linear``, also of a user's networks, goes through :func:`linear` in here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and type(args[0]) is Tensor:
            return linear(*args)
        return func(*args, **(kwargs or {}))
