"""Networks that parts are made of: perceptrons, diagonal normals, recurrent cells and encoders.

Every module broadcasts over leading dimensions: ``(*batch, features)`` in, ``(*batch, ...)`` out.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from inference.protocols import at_least, counts, of_kind, one_of
from pyro_avrnn.shapes import broadcast_cat, broadcast_leading

#: Activations by name. A ReLU whose input is negative for all data stops learning: in narrow
#: networks trained with large steps many units may die, depending on the seed. The others do not.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


_QUIET = 1e-3  # a root mean square below which a signal is silent, in units of the data


class MLP(nn.Sequential):
    """Linear layers with activations between them.

    Args:
        sizes: all widths from input to output, at least two.
        final: whether an activation follows the last layer too.
        dropout: probability of zeroing an input in training mode; the others are scaled up.
        activation: a name of ``ACTIVATIONS``.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        final: bool = False,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        one_of(ACTIVATIONS, activation=activation)
        of_kind(Real, "a number", dropout=dropout)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if len(sizes) < 2:
            raise ValueError(f"sizes must list at least input and output width, got {sizes}")
        counts(0, **{f"width {i} of a network's layers": size for i, size in enumerate(sizes)})
        layers: list[nn.Module] = []
        for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
        super().__init__(*(layers if final else layers[:-1]))
        self.in_dim, self.out_dim = sizes[0], sizes[-1]
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, sizes[0])`` to ``(*batch, sizes[-1])``."""
        return super().forward(dropped(x, self.dropout if self.training else 0.0))


def dropped(x: Tensor, p: float) -> Tensor:
    """Dropout: zero each entry of x, of any shape, with probability p; divide the others by 1 - p.

    ``F.dropout`` draws from a tensor that is made of x, so that a captured step could not draw
    for all steps together. Source: Srivastava et al. (2014), Journal of Machine Learning Research.
    """
    if not p:
        return x
    kept = torch.rand(x.shape, dtype=x.dtype, device=x.device) >= p
    return x * kept / (1.0 - p)


class Loudness(MLP):
    """An MLP that reads a piece of waveform in units of its root mean square, and its logarithm.

    Quiet and loud pieces look alike to it, so what it learns of one it knows of the other.

    Args:
        sizes: as of :class:`MLP`; the first is that of a piece.
        options: the keywords of :class:`MLP`.
    """

    def __init__(self, sizes: Sequence[int], **options: Any) -> None:
        super().__init__([sizes[0] + 1, *sizes[1:]], **options)
        self.in_dim = sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, sizes[0])`` to ``(*batch, sizes[-1])``."""
        scaled, size = by_size(x)
        return super().forward(torch.cat([scaled, size.log()], dim=-1))


def by_size(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signals ``(*batch, D)`` over their root mean square, and that, ``(*batch, 1)``."""
    size = x.square().mean(dim=-1, keepdim=True).add(_QUIET**2).sqrt()
    return x / size, size


def diagonal_normal(loc: Tensor, scale: Tensor) -> dist.Distribution:
    """Independent normals, event shape ``(D,)``.

    The arguments are not validated: every scale here is positive by construction, and whoever
    reads the density reports parameters that are no longer finite, with their step.
    """
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def positive(raw: Tensor, floor: float, bias: float = 0.5) -> Tensor:
    """Scales above a floor: ``floor + softplus(raw + bias)``."""
    return floor + F.softplus(raw + bias)


class NormalNetwork(nn.Module):
    r"""Diagonal normal whose mean and scale are functions of the concatenated inputs.

    The scale is :math:`\sigma_{\min} + \mathrm{softplus}(r + b)`.

    Args:
        in_dim: width of all inputs together.
        out_dim: D, the event size.
        hidden: widths of the hidden layers.
        min_scale: the floor :math:`\sigma_{\min}`, in units of the variable.
        scale_bias: :math:`b`, added to the raw scale r.
        activation: of the hidden layers, a name of ``ACTIVATIONS``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int],
        *,
        min_scale: float = 0.0,
        scale_bias: float = 0.5,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        at_least(0, min_scale=min_scale)
        of_kind(list | tuple, "a list of widths", hidden=hidden)
        self.in_dim, self.out_dim = in_dim, out_dim
        self.hidden, self.activation = tuple(hidden), activation
        self.min_scale, self.scale_bias = min_scale, scale_bias
        self.net = MLP([in_dim, *hidden, 2 * out_dim], activation=activation)

    def parameters_of(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, each ``(*batch, D)``."""
        loc, raw = self.net(broadcast_cat(*inputs)).chunk(2, dim=-1)
        return loc, positive(raw, self.min_scale, self.scale_bias)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(D,)``."""
        return diagonal_normal(*self.parameters_of(*inputs))


class Cell(nn.Module):
    """A recurrent cell: one tensor of memory, and ``output``, which reads h from it.

    Args:
        in_dim: width of the input.
        h_dim: H, width of the output.
        memory_dim: M, width of the memory, which starts with h; None for H.
    """

    def __init__(self, in_dim: int, h_dim: int, memory_dim: int | None = None) -> None:
        super().__init__()
        self.in_dim, self.h_dim = in_dim, h_dim
        self.memory_dim = h_dim if memory_dim is None else memory_dim

    def initial(self, batch_shape: Size) -> Tensor:
        """Memory before the first step, zeros of shape ``(*batch, M)``."""
        return next(self.parameters()).new_zeros(*batch_shape, self.memory_dim)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Memory one step later, ``(*batch, M)``, from inputs ``(*batch, in_dim)``."""
        raise NotImplementedError

    def output(self, memory: Tensor) -> Tensor:
        """The output h, ``(*batch, H)``."""
        return memory if self.memory_dim == self.h_dim else memory[..., : self.h_dim]


class GRU(Cell):
    """Gated recurrent unit; its memory is its output. Source: Cho et al. (2014)."""

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__(in_dim, h_dim)
        self.cell = nn.GRUCell(int(in_dim), int(h_dim))

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Memory one step later; inputs and memory broadcast over their leading dimensions."""
        inputs, memory, batch = _flatten(inputs, memory)
        return self.cell(inputs, memory).reshape(*batch, -1)


class LSTM(Cell):
    """Long short-term memory; its memory is output and cell, ``(*batch, 2H)``.

    Source: Hochreiter and Schmidhuber (1997).
    """

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__(in_dim, h_dim, 2 * h_dim)
        self.cell = nn.LSTMCell(int(in_dim), int(h_dim))

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Memory one step later; inputs and memory broadcast over their leading dimensions."""
        inputs, memory, batch = _flatten(inputs, memory)
        return torch.cat(self.cell(inputs, memory.chunk(2, dim=-1)), dim=-1).reshape(*batch, -1)

    def sequence(self, inputs: Tensor) -> Tensor:
        """Outputs after every step of inputs ``(T, *batch, in_dim)``: ``(T, *batch, H)``."""
        flat = inputs.reshape(len(inputs), -1, self.in_dim)
        start = flat.new_zeros(1, flat.shape[1], self.h_dim)
        cell = self.cell
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        outputs = torch.lstm(flat, (start, start), weights, True, 1, 0.0, False, False, False)[0]
        return outputs.reshape(*inputs.shape[:-1], self.h_dim)


def _flatten(inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Size]:
    """Both with one batch dimension, as torch's cells need, and the shape that it stands for."""
    inputs, memory = broadcast_leading(inputs, memory)
    flat = [t.reshape(-1, t.shape[-1]) for t in (inputs, memory)]
    return flat[0], flat[1], inputs.shape[:-1]


CELLS: dict[str, type[Cell]] = {"gru": GRU, "lstm": LSTM}
FEATURES: dict[str, type[MLP]] = {"mlp": MLP, "loudness": Loudness}
#: Which steps of a sequence a recurrent encoder has read for its output at step t.
DIRECTIONS = ("forward", "backward", "both")


class RecurrentEncoder(nn.Module):
    """A GRU over whole sequences: c_t has read x up to t, x from t on, or all of x.

    Padding is never read: the backward direction reverses each sequence within its own length.

    Args:
        in_dim: width of the features of x.
        h_dim: width of each direction's output.
        direction: "forward", "backward" or "both".
    """

    def __init__(self, in_dim: int, h_dim: int, direction: str = "backward") -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(
                f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}"
            )
        self.in_dim, self.out_dim = in_dim, h_dim * (2 if direction == "both" else 1)
        self.smoothing = direction != "forward"  # whether c_t depends on x after t
        self.along = nn.GRU(int(in_dim), int(h_dim)) if direction != "backward" else None
        self.against = nn.GRU(int(in_dim), int(h_dim)) if direction != "forward" else None

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Map ``(B, T, in_dim)`` and a mask ``(B, T)`` to ``(B, T, out_dim)``."""
        outputs = []
        if self.along is not None:
            outputs.append(self.along(features.transpose(0, 1))[0].transpose(0, 1))
        if self.against is not None:
            turned = self.against(_reverse(features, mask).transpose(0, 1))[0]
            outputs.append(_reverse(turned.transpose(0, 1), mask))
        return torch.cat(outputs, dim=-1)

    def summary(self, features: Tensor, mask: Tensor) -> Tensor:
        """The output of each direction after it has read the whole sequence, ``(B, out_dim)``."""
        outputs = self(features, mask)
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        ends = outputs[torch.arange(len(outputs), device=last.device), last]  # forward's end
        if self.against is None:
            return ends
        width = self.against.hidden_size
        return torch.cat([ends[:, :-width], outputs[:, 0, -width:]], dim=-1)


def _reverse(x: Tensor, mask: Tensor) -> Tensor:
    """``(B, T, F)`` with the steps of each sequence in reverse order, padding where it was."""
    steps = torch.arange(x.shape[1], device=x.device)
    turned = mask.sum(dim=1, keepdim=True) - 1 - steps
    return x.gather(1, torch.where(mask, turned, steps).unsqueeze(-1).expand_as(x))
