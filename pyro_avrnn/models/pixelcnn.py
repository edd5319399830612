r"""PixelCNN-VAE: a latent for the whole image, a decoder autoregressive over its pixels.

.. math:: p(z)\,\prod_i p(x_i \mid x_{<i}, z), \qquad i \text{ in raster order.}

An image is a sequence of one step, x of shape (B, 1, side * side); at T > 1 the images of a
sequence are independent. The decoder sees the local part of the image, its past pixels, so z is
left with what is global - or with nothing, as the decoder can do without it (posterior collapse).
With Z = 0 this is a PixelCNN, whose likelihood is exact.

Sources: Gulrajani et al. (2017), https://arxiv.org/abs/1611.05013, and Chen et al. (2017),
https://arxiv.org/abs/1611.02731, for the latent, and why a small receptive field makes it used.
Departure: the prior has no flow.
"""

from itertools import pairwise
from typing import NamedTuple

from pyro.distributions import Distribution
from torch import Size, Tensor, nn

from pyro_avrnn.guides import require_latents
from pyro_avrnn.networks import NormalNetwork
from pyro_avrnn.pixels import PixelCNN, side_of
from pyro_avrnn.priors import StandardNormal
from pyro_avrnn.sequence import SequenceGuide, SequenceModel
from pyro_avrnn.shapes import agree, broadcast_cat, width


class PixelCNNState(NamedTuple):
    """Nothing crosses from image to image; a tensor of width 0 carries the leading dimensions."""

    nothing: Tensor  # (*batch, 0)


class PixelCNNVAE(SequenceModel):
    r"""PixelCNN-VAE: :math:`p(z_t)\,\prod_i p(x_{t,i} \mid x_{t,<i}, z_t)`, images independent.

    Args:
        x_dim: X, pixels of an image, side * side.
        z_dim: Z, size of a latent; 0 for a PixelCNN, whose guide is ``NoLatents``.
        decoder: maps ``z_t`` to a distribution over ``x_t``, event shape (X,).
        prior: maps an empty ``h`` (*batch, 0) to a distribution over ``z_t``, event shape (Z,);
            None for the standard normal.
    """

    def __init__(
        self, x_dim: int, z_dim: int, *, decoder: PixelCNN, prior: nn.Module | None = None
    ) -> None:
        super().__init__(x_dim, z_dim, decoder=decoder)
        prior = StandardNormal(z_dim) if prior is None else prior
        agree("z", model=z_dim, prior=width("z_dim", prior), decoder=width("in_dim", decoder))
        agree("h, of which this model has none", model=0, prior=width("h_dim", prior))
        self.prior, self.decoder = prior, decoder

    def init(self, batch_shape: Size) -> PixelCNNState:
        """The empty state."""
        return PixelCNNState(next(self.decoder.parameters()).new_zeros(*batch_shape, 0))

    def transition(self, state: PixelCNNState) -> Distribution:
        """p(z_t), event shape ``(Z,)``."""
        return self.prior(state.nothing)

    def emission(self, z_t: Tensor, state: PixelCNNState) -> Distribution:
        """p(x_t | z_t), event shape ``(X,)``."""
        return self.decoder(z_t)

    def advance(self, state: PixelCNNState, z_t: Tensor, x_t: Tensor) -> PixelCNNState:
        """The empty state, as it was."""
        return state


class ConvolutionalGuide(SequenceGuide):
    """Diagonal normal q(z_t | x_t) after strided convolutions over each image.

    Args:
        model: the model whose latents are proposed; its observations are square images.
        channels: maps of the first convolution; twice as many of the second.
        c_dim: C, width of the convolutions' summary of an image.
        min_scale: floor of the proposal's scale.

    Raises:
        ValueError: a model without latents, or whose observations are not square.
    """

    def __init__(
        self,
        model: SequenceModel,
        channels: int = 16,
        c_dim: int = 128,
        *,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(model)
        require_latents(self, model)
        self.side = side_of(model.c_dim)
        sizes = (1, channels, 2 * channels)
        convolutions: list[nn.Module] = []
        for maps_in, maps_out in pairwise(sizes):
            convolutions += [nn.Conv2d(maps_in, maps_out, 3, stride=2, padding=1), nn.ReLU()]
        quarter = -(-self.side // 4)  # each convolution halves a side, rounding up
        self.reader = nn.Sequential(
            *convolutions,
            nn.Flatten(),
            nn.Linear(sizes[-1] * quarter * quarter, c_dim),
            nn.ReLU(),
        )
        self.network = NormalNetwork(c_dim, self.z_dim, (), min_scale=min_scale)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """The summary of each image, ``(B, T, C)``."""
        images = self.features(x)
        flat = 2.0 * images.reshape(-1, 1, self.side, self.side) - 1.0
        return self.reader(flat).reshape(*images.shape[:-1], -1)

    def proposal(self, state: PixelCNNState, c_t: Tensor) -> Distribution:
        """q(z_t | x_t), event shape ``(Z,)``."""
        return self.network(broadcast_cat(c_t, self.hidden(state)[..., :0]))
