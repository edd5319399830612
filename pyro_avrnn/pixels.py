r"""PixelCNN: binary images :math:`\prod_i p(x_i \mid x_{<i}, z)`, pixel by pixel in raster order.

Sources: van den Oord, Kalchbrenner, Kavukcuoglu (2016), https://arxiv.org/abs/1601.06759, masked
convolutions; van den Oord et al. (2016), https://arxiv.org/abs/1606.05328, the gated stacks
without a blind spot (fig. 2) and the conditional gate (eq. 4).

Departures: where a mask would zero weights, the kernel is cut and the image shifted; the vertical
stack enters the horizontal one after its gate (C maps, not 2C), which is cheaper; the map from z
to places (section 2.3 there) is linear and coarse, not deconvolved; pixels are 0 and 1 instead of
256 levels.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Self, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from inference.protocols import counts

# without gradients: 0.1 GiB at 32 channels of 28 x 28, and fewer cache misses than all at once
_IMAGES_AT_ONCE = 128


class GatedLayer(nn.Module):
    r"""One layer of both stacks: :math:`\tanh(W_f * x + V_f z) \odot \sigma(W_g * x + V_g z)`.

    At a pixel, the vertical stack has seen the rows above, and the horizontal one the pixels to
    the left and, through the vertical stack, those rows. The two convolutions take inputs with
    their margins, so that a whole image, a row and a pixel go through the same code.

    Args:
        in_dim: channels of the input.
        channels: C of the output.
        kernel: side of the square whose upper half is seen; odd.
        first: whether the input is the image, of which the current row (vertical) or pixel
            (horizontal) must stay hidden: mask A. Later layers may read both stacks there: mask B.
    """

    def __init__(self, in_dim: int, channels: int, kernel: int, *, first: bool) -> None:
        super().__init__()
        self.in_dim, self.reach, self.first = in_dim, kernel // 2, first
        self.seen = self.reach if first else self.reach + 1
        self.vertical = nn.Conv2d(in_dim, 2 * channels, (self.seen, kernel))
        self.horizontal = nn.Conv2d(in_dim, 2 * channels, (1, self.seen))
        self.down = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def read(self, above: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Both convolutions of inputs ``(N, in_dim, side, side)``: 2C maps each."""
        r = self.reach
        if self.first:
            above, left = above[:, :, :-1], left[..., :-1]
        return self.vertical(F.pad(above, (r, r, r, 0))), self.horizontal(F.pad(left, (r, 0)))

    def blank(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """Zeros with margins left and right, ``(N, in_dim, rows, columns + 2 * reach)``."""
        return like.new_zeros(len(like), self.in_dim, rows, columns + 2 * self.reach)

    def right(self, maps: Tensor, down: Tensor) -> Tensor:
        """The layer's addition to the horizontal stack, from the 2C maps of both stacks."""
        return self.out(gate(maps + down))


def gate(maps: Tensor) -> Tensor:
    """Gate half of 2C maps ``(N, 2C, ...)`` by the other half."""
    signal, openness = maps.chunk(2, dim=1)
    return signal.tanh() * openness.sigmoid()


class PixelCNN(nn.Module):
    """Decoder: maps z to a distribution over binary images, autoregressive in raster order.

    A pixel sees ``first_kernel // 2 + (layers - 1) * (kernel // 2)`` rows above and columns to
    each side; anything farther away can only come through z. z enters as a bias of every gate,
    linear in z, with its own values in every cell of the image, so that z can encode places.

    Args:
        x_dim: X, pixels of an image, a square number.
        z_dim: Z, size of the latent; 0 for none, the biases are then learnt constants.
        channels: C, maps of each of the two stacks.
        layers: number of gated layers, including the first.
        kernel: side of the kernels, odd.
        first_kernel: side of the kernel of the first layer, which reads the image.
        maps: numbers a cell, from which the biases of all gates there are computed.
        cell: side of a cell in pixels; as large as the image for the same bias everywhere.

    Raises:
        ValueError: an image that is not square, an even kernel, or a size below 1.
    """

    support = constraints.boolean
    expects: ClassVar[str] = "0 and 1 only"

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        channels: int = 32,
        layers: int = 5,
        kernel: int = 3,
        first_kernel: int = 7,
        maps: int = 16,
        cell: int = 4,
    ) -> None:
        super().__init__()
        counts(0, z_dim=z_dim)
        counts(1, x_dim=x_dim, channels=channels, layers=layers, maps=maps, cell=cell)
        for name, value in {"kernel": kernel, "first_kernel": first_kernel}.items():
            if value < 3 or value % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 3, got {value}")
        self.side = side_of(x_dim)
        self.x_dim, self.z_dim, self.in_dim = x_dim, z_dim, z_dim
        self.channels, self.cell = channels, min(cell, self.side)
        cells = -(-self.side // self.cell)
        self.layers = nn.ModuleList([GatedLayer(1, channels, first_kernel, first=True)])
        for _ in range(layers - 1):
            self.layers.append(GatedLayer(channels, channels, kernel, first=False))
        self.everywhere = nn.Parameter(torch.zeros(maps, cells, cells))
        self.of_z = nn.Linear(z_dim, maps * cells * cells, bias=False) if z_dim else None
        # V of all layers and both stacks in one
        self.gates = nn.Conv2d(maps, layers * 4 * channels, 1, bias=False)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )

    def forward(self, z: Tensor) -> "AutoregressivePixels":
        """The distribution given ``z`` (*batch, Z); event shape ``(X,)``."""
        return AutoregressivePixels(self, z)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Log-odds of every pixel given those before it, in one pass.

        Args:
            x: images ``(*batch, X)`` of 0 and 1.
            z: ``(*batch, Z)``; the leading dimensions broadcast.

        Returns:
            ``(*batch, X)``; without z, only the leading dimensions of ``x``.
        """
        images = 2.0 * x.reshape(-1, 1, self.side, self.side) - 1.0  # 0 is what lies outside
        batch, index, maps = x.shape[:-1], None, None
        if self.of_z is not None:
            batch = torch.broadcast_shapes(batch, z.shape[:-1])
            if batch != x.shape[:-1]:  # the image of the n-th pair of image and z
                index = torch.arange(len(images), device=x.device).reshape(x.shape[:-1])
                index = index.expand(batch).reshape(-1)
            maps = self.of_z(z)
            maps = maps.expand(*batch, -1).reshape(-1, maps.shape[-1])
        read = self._stack[0].read(images, images)  # once an image, whatever z is
        count = batch.numel()
        portion = count if torch.is_grad_enabled() else _IMAGES_AT_ONCE
        pieces = []
        for start in range(0, count, portion):
            rows = slice(start, start + portion)
            vertical, horizontal = (m[rows if index is None else index[rows]] for m in read)
            biases = self._biases(None if maps is None else maps[rows])
            pieces.append(self._finish(vertical, horizontal, biases))
        return torch.cat(pieces).reshape(*batch, self.x_dim)

    @property
    def _stack(self) -> list[GatedLayer]:
        return cast(list[GatedLayer], list(self.layers))

    def _biases(self, maps: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Biases of each layer's vertical and horizontal gate, ``(N, 2C, cells, cells)``."""
        total = self.everywhere.unsqueeze(0)
        if maps is not None:
            total = total + maps.reshape(-1, *self.everywhere.shape)
        parts = self.gates(total).split(2 * self.channels, dim=1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _spread(self, bias: Tensor) -> Tensor:
        """From cells to pixels, ``(N, 2C, side, side)``."""
        return F.interpolate(bias, scale_factor=self.cell)[..., : self.side, : self.side]

    def _finish(
        self, vertical: Tensor, horizontal: Tensor, biases: list[tuple[Tensor, ...]]
    ) -> Tensor:
        """``(N, 1, side, side)`` from the first layer's convolutions."""
        first, *others = self._stack
        of_v, of_h = map(self._spread, biases[0])
        above = gate(vertical + of_v)
        left = first.right(horizontal + of_h, first.down(above))
        for layer, pair in zip(others, biases[1:], strict=True):
            of_v, of_h = map(self._spread, pair)
            vertical, horizontal = layer.read(above, left)
            above = gate(vertical + of_v)
            left = left + layer.right(horizontal + of_h, layer.down(above))
        return self.head(left)

    @torch.no_grad()
    def draw(self, z: Tensor) -> Tensor:
        """Draw an image for each z, pixel by pixel.

        The outputs of both stacks at earlier pixels are kept, so that all pixels together cost
        about one pass, in many small steps.

        Args:
            z: ``(N, Z)``; the images are ``(N, X)`` of 0 and 1.
        """
        side, stack = self.side, self._stack
        biases = self._biases(None if self.of_z is None else self.of_z(z))
        x = z.new_zeros(len(z), side, side)
        # the input of each layer and the margins around it: every row of the vertical stack
        rows = [layer.blank(z, layer.reach + side, side) for layer in stack]
        for i in range(side):
            cells = slice(i // self.cell, i // self.cell + 1)
            of_row = [[self._spread(b[:, :, cells])[:, :, :1] for b in pair] for pair in biases]
            down = []
            for k, layer in enumerate(stack):
                seen = rows[k][:, :, i : i + layer.seen]
                above = gate(layer.vertical(seen) + of_row[k][0])
                down.append(layer.down(above))
                if k + 1 < len(stack):
                    r = stack[k + 1].reach
                    rows[k + 1][:, :, r + i, r : r + side] = above[:, :, 0]
            # ... and row i alone of the horizontal one
            row = [layer.blank(z, 1, side) for layer in stack]
            for j in range(side):
                left: Tensor | float = 0.0
                for k, layer in enumerate(stack):
                    seen = row[k][..., j : j + layer.seen]
                    maps = layer.horizontal(seen) + of_row[k][1][..., j : j + 1]
                    left = left + layer.right(maps, down[k][..., j : j + 1])
                    if k + 1 < len(stack):
                        row[k + 1][..., stack[k + 1].reach + j] = left[..., 0]
                probability = self.head(left).reshape(-1).sigmoid()
                x[:, i, j] = (torch.rand_like(probability) < probability).to(x)
                row[0][:, 0, 0, stack[0].reach + j] = 2.0 * x[:, i, j] - 1.0
            r = stack[0].reach
            rows[0][:, 0, r + i, r : r + side] = 2.0 * x[:, i] - 1.0
        return x.reshape(len(z), self.x_dim)


class AutoregressivePixels(TorchDistribution):
    """Binary images whose pixels depend on those before them in raster order, given z.

    A density costs one pass of the network; a draw goes pixel by pixel. Copies made by ``expand``
    are not computed again, and the first layer reads an image that many z share only once.

    Args:
        network: gives the log-odds, and draws.
        z: ``(*batch, Z)``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = False

    def __init__(self, network: PixelCNN, z: Tensor) -> None:
        self.network, self.z = network, z
        super().__init__(z.shape[:-1], Size((network.x_dim,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same with another batch shape; z stays as it is."""
        new = self._get_checked_instance(AutoregressivePixels, _instance)
        new.network, new.z = self.network, self.z
        super(AutoregressivePixels, new).__init__(
            Size(batch_shape), self.event_shape, validate_args=False
        )
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over the pixels of ``value`` (*batch, X), nats; leading dimensions broadcast."""
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        logits = self.network.logits(value, self.z)
        return (value * logits - F.softplus(logits)).sum(dim=-1).expand(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Images ``(*sample_shape, *batch, X)``."""
        shape = Size(sample_shape) + self.batch_shape
        z = self.z.expand(*shape, -1)
        return self.network.draw(z.reshape(shape.numel(), z.shape[-1])).reshape(*shape, -1)


def side_of(x_dim: int) -> int:
    """The side of a square image of X pixels.

    Raises:
        ValueError: not a square; the nearest ones are named.

    Example:
        >>> side_of(784)
        28
    """
    side = math.isqrt(x_dim)
    if side * side != x_dim:
        raise ValueError(
            f"images must be square: x_dim must be side * side, got {x_dim}; the nearest squares "
            f"are {side * side} = {side} * {side} and {(side + 1) ** 2} = {side + 1} * {side + 1}"
        )
    return side
