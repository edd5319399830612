"""Units in which the draws of any prior look alike: what a critic of codes reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyro_avrnn.priors import MixtureOfNormals


class Units(NamedTuple):
    """Coordinates in which draws of a distribution look alike, whatever its parameters."""

    read: Callable[[Tensor], Tensor]  # z -> u, (*batch, Z)
    write: Callable[[Tensor], Tensor]  # u -> z
    draw: Callable[[Size], Tensor]  # a sample shape -> u of draws of the distribution


def units_of(distribution: Any) -> Units:
    """Units of a distribution over vectors.

    A normal is read in units of its deviation, a flow by its noise, and a mixture in units of
    its mean and deviation. Draws are constants for gradients. In a normal and a flow they are
    noise, which no parameter moves; for a mixture this leaves out how its shape moves them.

    Raises:
        NotImplementedError: another family.
    """
    shape, like = distribution.batch_shape + distribution.event_shape, distribution
    if isinstance(distribution, dist.TransformedDistribution):
        inner, steps = units_of(distribution.base_dist), distribution.transforms

        def read(z: Tensor) -> Tensor:
            for step in reversed(steps):
                z = step.inv(z)
            return inner.read(z)

        def write(u: Tensor) -> Tensor:
            z = inner.write(u)
            for step in steps:
                z = step(z)
            return z

        return Units(read, write, inner.draw)
    while isinstance(distribution, dist.Independent | torch.distributions.Independent):
        distribution = distribution.base_dist
    if isinstance(distribution, torch.distributions.Normal):
        loc, scale = distribution.loc, distribution.scale

        def noise(sample_shape: Size) -> Tensor:
            return torch.randn(sample_shape + shape, dtype=loc.dtype, device=loc.device)

        return Units(lambda z: (z - loc) / scale, lambda u: loc + scale * u, noise)
    if isinstance(distribution, MixtureOfNormals):
        mean, deviation = distribution.mean, distribution.stddev
        return Units(
            lambda z: (z - mean) / deviation,
            lambda u: mean + deviation * u,
            lambda sample_shape: ((like.sample(sample_shape) - mean) / deviation).detach(),
        )
    raise NotImplementedError(
        f"a refined prior reads codes in units of its base, a normal, a mixture of normals or a "
        f"flow, got {type(like).__name__}"
    )
