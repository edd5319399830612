"""Particles that go on from a step, and the gradients that go back to them."""

import torch
from torch import Tensor


def gather(state: Tensor, parents: Tensor | None, out: Tensor) -> None:
    """The particles ``parents`` (K, B) of a state ``(K, B, ...)``, or all as they are."""
    if parents is None:
        out.copy_(state)
    else:
        out.copy_(state.gather(0, _index(parents, state)))


def give_back(gradient: Tensor, parents: Tensor | None) -> None:
    """Turn the gradient of ``gather``'s result into that of its input, in place."""
    if parents is not None:
        whole = torch.zeros_like(gradient).scatter_add_(0, _index(parents, gradient), gradient)
        gradient.copy_(whole)


def _index(parents: Tensor, state: Tensor) -> Tensor:
    return parents.reshape(*parents.shape, *[1] * (state.ndim - 2)).expand_as(state)
