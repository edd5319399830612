"""Feed-forward networks that return tensors or normals, and recurrent cells that look alike.

Every module broadcasts over leading dimensions: ``(*batch, features)`` in, ``(*batch, ...)`` out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F


def broadcast_cat(*tensors: Tensor) -> Tensor:
    """Concatenate along the last dimension, broadcasting all others.

    Args:
        tensors: shapes ``(*batch_i, F_i)`` whose batch shapes broadcast together.

    Returns:
        Shape ``(*batch, F_1 + F_2 + ...)``.
    """
    batch = _common(*(t.shape[:-1] for t in tensors))
    return torch.cat(
        [t if t.shape[:-1] == batch else t.expand(*batch, t.shape[-1]) for t in tensors], dim=-1
    )


def agree(what: str, **sizes: Any) -> None:
    """That parts have one width in common; a part that does not tell its own is left out.

    Args:
        what: of which the parts state the width.
        sizes: what each part says, by the part's name; None where it does not say.

    Raises:
        ValueError: naming the parts and their sizes.

    Example:
        >>> agree("h", cell=64, prior=64, decoder=None)
    """
    said = {part: size for part, size in sizes.items() if size is not None}
    if len(set(said.values())) > 1:
        listed = " and ".join(f"{part}: {size}" for part, size in said.items())
        raise ValueError(
            f"parts must agree on the width of {what}, got {listed}; build them alike"
        )


def width(name: str, *parts: Any) -> int | None:
    """The sum of a size that parts say as attribute ``name`` (or are, if numbers); or None.

    Example:
        >>> width("out_dim", MLP([2, 5]), 3), width("out_dim", nn.Identity())
        (8, None)
    """
    sizes = [part if isinstance(part, int) else getattr(part, name, None) for part in parts]
    return None if None in sizes else sum(sizes)  # type: ignore[arg-type]


def _common(*shapes: Size) -> Size:
    """``torch.broadcast_shapes``, without its cost where one shape ends in all the others."""
    longest = max(shapes, key=len)
    if all(not shape or longest[-len(shape) :] == shape for shape in shapes):
        return longest
    return torch.broadcast_shapes(*shapes)


#: A ReLU whose input is negative for all data never learns again: in narrow networks trained with
#: large steps many units may die, more or fewer by the luck of the seed. The others cannot.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MLP(nn.Sequential):
    """Linear layers with activations between them; ``sizes`` lists all widths, input to output.

    Args:
        sizes: at least two widths.
        final: whether an activation follows the last layer too.
        dropout: in training, the share of inputs set to zero, the others being scaled up.
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
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if len(sizes) < 2:
            raise ValueError(f"sizes must list at least input and output width, got {sizes}")
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            layers.append(nn.Linear(width_in, width_out))
            if final or i < len(sizes) - 2:
                layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers)
        self.in_dim, self.out_dim = sizes[0], sizes[-1]
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, sizes[0])`` in, ``(*batch, sizes[-1])`` out."""
        return super().forward(F.dropout(x, self.dropout, self.training) if self.dropout else x)


def diagonal_normal(loc: Tensor, scale: Tensor) -> dist.Distribution:
    """Independent normals, event shape ``(D,)``.

    The arguments are not validated: ``scale`` is positive by construction here, and parameters
    that stop being finite are reported, with their step, by whoever reads the density.
    """
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


class NormalNetwork(nn.Module):
    r"""Diagonal normal whose mean and scale are functions of the concatenated inputs.

    The scale is :math:`\sigma_{\min} + \mathrm{softplus}(r + b)`.

    Args:
        in_dim: width of all inputs together.
        out_dim: D, the event size.
        hidden: widths of the hidden layers.
        min_scale: the floor :math:`\sigma_{\min}`, in units of the variable.
        scale_bias: :math:`b`, added to the raw scale.
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
        if min_scale < 0:
            raise ValueError(f"min_scale must not be negative, got {min_scale}")
        self.in_dim, self.out_dim = in_dim, out_dim
        self.min_scale, self.scale_bias = min_scale, scale_bias
        self.net = MLP([in_dim, *hidden, 2 * out_dim], activation=activation)

    def parameters_of(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, each ``(*batch, D)``."""
        loc, raw = self.net(broadcast_cat(*inputs)).chunk(2, dim=-1)
        return loc, self.min_scale + F.softplus(raw + self.scale_bias)

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(D,)``."""
        return diagonal_normal(*self.parameters_of(*inputs))


class Cell(nn.Module, ABC):
    """A recurrent cell: one tensor of memory, of which ``output`` reads the visible part.

    Args:
        in_dim: width of the input.
        h_dim: H, width of the output.
    """

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__()
        self.in_dim, self.h_dim = in_dim, h_dim

    @abstractmethod
    def initial(self, batch_shape: Size) -> Tensor:
        """Memory before the first step, zeros of shape ``(*batch, M)``."""

    @abstractmethod
    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """Memory one step later, ``(*batch, M)``, from inputs ``(*batch, in_dim)``."""

    @abstractmethod
    def output(self, memory: Tensor) -> Tensor:
        """The output h, ``(*batch, H)``."""


class GRU(Cell):
    """Gated recurrent unit; its memory is its output. Source: Cho et al. (2014)."""

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__(in_dim, h_dim)
        self.cell = nn.GRUCell(in_dim, h_dim)

    def initial(self, batch_shape: Size) -> Tensor:
        """Zeros of shape ``(*batch, H)``."""
        return self.cell.weight_hh.new_zeros(*batch_shape, self.h_dim)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """One step; inputs and memory broadcast over their leading dimensions."""
        inputs, memory, batch = _flatten(inputs, memory)
        return self.cell(inputs, memory).reshape(*batch, -1)

    def output(self, memory: Tensor) -> Tensor:
        """The memory itself."""
        return memory


class LSTM(Cell):
    """Long short-term memory; its memory is output and cell, ``(*batch, 2H)``.

    Source: Hochreiter and Schmidhuber (1997).
    """

    def __init__(self, in_dim: int, h_dim: int) -> None:
        super().__init__(in_dim, h_dim)
        self.cell = nn.LSTMCell(in_dim, h_dim)

    def initial(self, batch_shape: Size) -> Tensor:
        """Zeros of shape ``(*batch, 2H)``."""
        return self.cell.weight_hh.new_zeros(*batch_shape, 2 * self.h_dim)

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """One step; inputs and memory broadcast over their leading dimensions."""
        inputs, memory, batch = _flatten(inputs, memory)
        return torch.cat(self.cell(inputs, memory.chunk(2, dim=-1)), dim=-1).reshape(*batch, -1)

    def output(self, memory: Tensor) -> Tensor:
        """The first half of the memory."""
        return memory[..., : self.h_dim]

    def sequence(self, inputs: Tensor) -> Tensor:
        """Outputs after every step of inputs ``(T, *batch, in_dim)``: ``(T, *batch, H)``."""
        length, batch = inputs.shape[0], inputs.shape[1:-1]
        flat = inputs.reshape(length, -1, self.in_dim)
        start = flat.new_zeros(1, flat.shape[1], self.h_dim)
        weights = [
            getattr(self.cell, f"{kind}_{of}")
            for kind in ("weight", "bias")
            for of in ("ih", "hh")
        ]
        outputs = torch.lstm(flat, (start, start), weights, True, 1, 0.0, False, False, False)[0]
        return outputs.reshape(length, *batch, self.h_dim)


def _flatten(inputs: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Size]:
    # torch's cells take one batch dimension
    batch = _common(inputs.shape[:-1], memory.shape[:-1])
    flat = [
        (t if t.shape[:-1] == batch else t.expand(*batch, -1)).reshape(-1, t.shape[-1])
        for t in (inputs, memory)
    ]
    return flat[0], flat[1], batch


CELLS: dict[str, type[Cell]] = {"gru": GRU, "lstm": LSTM}


#: which steps of a sequence a recurrent encoder has read when it says something of step t
DIRECTIONS = ("forward", "backward", "both")


class RecurrentEncoder(nn.Module):
    """A GRU over whole sequences: c_t from x up to t, from t on, or both side by side.

    Padding is never read: backward, each sequence is reversed within its own length.

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
        self.along = nn.GRU(in_dim, h_dim) if direction != "backward" else None
        self.against = nn.GRU(in_dim, h_dim) if direction != "forward" else None

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """``(B, T, in_dim)`` and mask ``(B, T)`` in, ``(B, T, out_dim)`` out."""
        outputs = []
        if self.along is not None:
            outputs.append(self.along(features.transpose(0, 1))[0].transpose(0, 1))
        if self.against is not None:
            turned = self.against(_reverse(features, mask).transpose(0, 1))[0]
            outputs.append(_reverse(turned.transpose(0, 1), mask))
        return torch.cat(outputs, dim=-1)

    def summary(self, features: Tensor, mask: Tensor) -> Tensor:
        """What each direction says when it has read all of its sequence, ``(B, out_dim)``."""
        outputs = self(features, mask)
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        ends = outputs[torch.arange(len(outputs), device=last.device), last]  # forward's end
        if self.against is None:
            return ends
        width = self.against.hidden_size
        return torch.cat([ends[:, :-width], outputs[:, 0, -width:]], dim=-1)


def _reverse(x: Tensor, mask: Tensor) -> Tensor:
    """``(B, T, F)`` with each sequence's own steps in reverse order, padding where it was."""
    steps = torch.arange(x.shape[1], device=x.device)
    turned = mask.sum(dim=1, keepdim=True) - 1 - steps
    return x.gather(1, torch.where(mask, turned, steps).unsqueeze(-1).expand_as(x))
