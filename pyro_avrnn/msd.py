"""A trained DSAE as the MSD benchmark asks for a model: six methods over one tensor of latents.

The benchmark of multi-factor sequential disentanglement, https://github.com/azencot-group/
MSD-Benchmark, explores which channels of a latent hold which factor, exchanges or redraws them,
and judges what is decoded. It is not needed here; where it is installed, derive a class from its
``AbstractModel`` and this one.

The latent of a sequence is ``(B, T, F + Z)``: f, the same at every step, and z_t.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor, nn

from inference.modes import evaluating
from inference.protocols import of_kind
from pyro_avrnn.exchange import latents_from_prior
from pyro_avrnn.recipes import Recipe


class MSDModel(nn.Module):
    """The six methods, and ``forward``, of a model with a latent that all steps share.

    Sequences are ``(B, T, ...)``, all of one length; what follows T is flattened to X features.

    Args:
        recipe: a trained model and guide.

    Raises:
        ValueError: a model without f.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        of_kind(Recipe, "a recipe of this package", recipe=recipe)
        if not recipe.model.f_dim:
            raise ValueError(
                "recipe must be of a model with a latent f that all steps share, such as "
                f"recipes.dsae, got a {type(recipe.model).__name__}"
            )
        self.model, self.guide = recipe.model, recipe.guide

    def latent_dim(self) -> int:
        """F + Z."""
        return self.model.f_dim + self.model.z_dim

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Draw the latents of sequences from the guide, ``(B, T, F + Z)``."""
        with evaluating(self.model, self.guide):
            d = self.model.rollout(self.guide, x.flatten(2))
        assert d.f is not None
        z = d.z[:, 0].transpose(0, 1)
        return torch.cat([d.f[0].unsqueeze(1).expand(*z.shape[:2], -1), z], dim=-1)

    def latent_vector(self, x: Tensor) -> Tensor:
        """One vector a sequence, ``(B, F + Z)``: the average over its steps."""
        return self.encode(x).mean(dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Means of the emission, ``(B, T, X)``; f is the average over steps of its channels."""
        f, z = latents.split([self.model.f_dim, self.model.z_dim], dim=-1)
        model: Any = self.model
        with evaluating(model):
            state = model.condition(model.init(Size(latents.shape[:1])), f.mean(dim=1))
            observations = []
            for z_t in z.unbind(dim=1):
                emission = model.emission(z_t, state)
                observations.append(emission.mean)
                state = model.advance(state, z_t, observations[-1])
        return torch.stack(observations, dim=1)

    @torch.no_grad()
    def sample(self, latents: Tensor) -> Tensor:
        """Latents from the prior, of the shape of those given."""
        f, z = latents_from_prior(self.model, latents.shape[0], latents.shape[1])
        return torch.cat([f.unsqueeze(1).expand(*z.shape[:2], -1), z], dim=-1)

    def swap_channels(
        self, first: Tensor, second: Tensor, channels: Iterable[int]
    ) -> tuple[Tensor, Tensor]:
        """Both latents, with these channels exchanged."""
        chosen = list(channels)
        one, other = first.clone(), second.clone()
        one[..., chosen], other[..., chosen] = second[..., chosen], first[..., chosen]
        return one, other

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct sequences, in their shape."""
        return self.decode(self.encode(x)).view_as(x)
