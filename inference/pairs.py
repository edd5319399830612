"""Codes for a critic of pairs: an f with the z of its own sequence, and of another."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.densities import StepDensities
from inference.mutual_information import scores_of_pairs


class Pairs(NamedTuple):
    """What a critic of pairs is shown; it scores each z with each f, ``(1 or T, K, B, B)``."""

    z: Tensor  # (T, K, B, Z), of a sequence
    f: Tensor  # (K, B, F)
    mask: Tensor  # (T, 1, B), or with K


def scores_of_sequences(critic: Any, codes: Pairs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of others and of pairs, for each observed step that the critic scores."""
    scores = critic(*codes)
    seen = codes.mask if len(scores) > 1 else codes.mask.any(dim=0, keepdim=True)
    return scores_of_pairs(scores, seen.expand(scores.shape[:-1]))


def pairs_of_f(densities: StepDensities, posterior: Tensor, *_: Any) -> Pairs:
    """f and z of each sequence."""
    if densities.f is None:
        raise NotImplementedError(
            "role 'information' needs a model with a latent f that all steps share, such as a "
            "DSAE, and whole sequences (no truncate)"
        )
    return Pairs(posterior, densities.f, densities.mask)


def pairs_of_z(*args: Any) -> Pairs:
    """The same; f is a constant where the critic sees it."""
    pairs = pairs_of_f(*args)
    return pairs._replace(f=pairs.f.detach())


def pairs_of_past(densities: StepDensities, posterior: Tensor, *_: Any) -> Pairs:
    """The latent of an image, and its rows up to a random one."""
    side = math.isqrt(densities.x.shape[-1])
    if len(posterior) != 1 or side**2 != densities.x.shape[-1] or side < 2:
        raise NotImplementedError(
            "role 'information_of_past' needs square images as sequences of one step, as a "
            f"PixelCNN-VAE has them, got {len(posterior)} steps of {densities.x.shape[-1]} values"
        )
    rows = densities.x[0].unflatten(-1, (side, side)).movedim(-2, 0)  # (side, 1, B, side)
    seen = torch.randint(1, side, rows.shape[1:-1], device=rows.device)
    mask = torch.arange(side, device=rows.device)[:, None, None] < seen
    return Pairs(rows.expand(side, *posterior.shape[1:-1], side), posterior[0], mask)
