"""Convolutions for frames that are images: what reads them, and what emits them.

A frame is ``(channels, side, side)``, flattened, with values around 0 to 1.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference.protocols import at_least, counts, of_kind, one_of
from pyro_avrnn.networks import ACTIVATIONS, MLP, diagonal_normal, dropped, positive
from pyro_avrnn.shapes import broadcast_cat

_LEAST_SIDE = 4  # of the smallest maps


def image_shape(x_dim: int) -> tuple[int, int]:
    """Channels (3 or 1) and side of square images of so many values.

    Raises:
        ValueError: no such image, or a side that cannot be halved down to maps of 4 to 7.
    """
    for channels in (3, 1):
        side = math.isqrt(x_dim // channels)
        halvings = _halvings(side)
        if channels * side * side == x_dim and halvings and side % 2**halvings == 0:
            return channels, side
    raise ValueError(
        "a frame must be a square image of 1 or 3 channels whose side can be halved to 4 or a "
        f"little more, such as 3 * 32 * 32 values, got {x_dim} values"
    )


def _halvings(side: int) -> int:
    return max(int(math.log2(max(side, 1) / _LEAST_SIDE)), 0)


class ImageFeatures(nn.Module):
    """Features of an image by strided convolutions, each of which halves the side.

    Args:
        sizes: X, the values of an image, and the width of the features.
        channels: maps of the first convolution; of the others twice as many.
        final: whether an activation follows the last layer, too.
        dropout: probability of zeroing a value of x in training mode.
        activation: a name of ``ACTIVATIONS``.

    Raises:
        ValueError: values that are no image.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        channels: int = 16,
        final: bool = False,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        one_of(ACTIVATIONS, activation=activation)
        counts(1, channels=channels)
        self.in_dim, self.out_dim, self.dropout = sizes[0], sizes[-1], dropout
        self.shape = image_shape(sizes[0])
        maps, side = self.shape
        layers: list[nn.Module] = []
        for i in range(_halvings(side)):
            wider = channels if i == 0 else 2 * channels
            layers += [nn.Conv2d(maps, wider, 4, stride=2, padding=1), ACTIVATIONS[activation]()]
            maps, side = wider, side // 2
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.rest = MLP([maps * side * side, *sizes[1:]], final=final, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(*batch, X)`` to ``(*batch, features)``."""
        channels, side = self.shape
        x = dropped(x, self.dropout if self.training else 0.0)
        images = x.reshape(-1, channels, side, side)
        return self.rest(self.convolutions(images)).view(*x.shape[:-1], -1)


class ImageEmission(nn.Module):
    """Diagonal normal of an image: means by transposed convolutions, one scale for all values.

    Args:
        in_dim: width of what it is given.
        x_dim: X, the values of an image.
        hidden: widths of hidden layers before the convolutions.
        channels: maps of the last hidden layer; of those before twice as many.
        min_scale: floor of the scale, in units of the data.
        activation: of the hidden layers, a name of ``ACTIVATIONS``.

    Raises:
        ValueError: values that are no image, or a floor below 0.
    """

    support = constraints.real
    expects: ClassVar[str] = "finite real numbers"

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        hidden: Sequence[int] = (64,),
        *,
        channels: int = 16,
        min_scale: float = 1e-3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        at_least(0.0, min_scale=min_scale)
        counts(1, channels=channels)
        of_kind(list | tuple, "a list of widths", hidden=hidden)
        self.in_dim, self.x_dim, self.min_scale = in_dim, x_dim, min_scale
        colours, side = image_shape(x_dim)
        halvings = _halvings(side)
        small = side // 2**halvings
        self.first = MLP(
            [in_dim, *hidden, 2 * channels * small * small], final=True, activation=activation
        )
        self.small = (2 * channels, small, small)
        layers: list[nn.Module] = []
        maps = 2 * channels
        for i in reversed(range(halvings)):
            narrower = (colours, channels)[min(i, 1)] if i < 2 else 2 * channels
            layers.append(nn.ConvTranspose2d(maps, narrower, 4, stride=2, padding=1))
            layers += [ACTIVATIONS[activation]()] if i else []
            maps = narrower
        self.convolutions = nn.Sequential(*layers)
        self.raw_scale = nn.Parameter(torch.zeros(()))

    def forward(self, *inputs: Tensor) -> dist.Distribution:
        """The distribution given inputs of shapes ``(*batch, F_i)``; event shape ``(X,)``."""
        read = self.first(broadcast_cat(*inputs))
        images = self.convolutions(read.reshape(-1, *self.small))
        loc = images.reshape(*read.shape[:-1], self.x_dim).sigmoid()
        scale = positive(self.raw_scale, self.min_scale, bias=-1.0)
        return diagonal_normal(loc, scale.expand_as(loc))
