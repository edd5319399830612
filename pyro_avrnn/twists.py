"""Twists of the library's models: a network that reads the future."""

from typing import Any

import torch
from torch import Tensor, nn

from inference.protocols import counts
from pyro_avrnn.networks import MLP, RecurrentEncoder


class FutureTwist(nn.Module):
    r"""log r(x_{t:T} | s_t): a backward GRU reads x, a perceptron compares it with the state.

    0 everywhere before it is trained, so that a filter is a plain one.

    Args:
        model: whose states are compared; its ``x_dim`` and ``h_dim`` are read.
        twist_dim: width of the GRU and of two hidden layers.
        bound: the largest size of log r, reached smoothly.
        activation: a name of ``ACTIVATIONS``.

    Raises:
        ValueError: a model without latents in each step, or with one that all steps share.
    """

    def __init__(
        self, model: Any, twist_dim: int = 64, *, bound: float = 30.0, activation: str = "silu"
    ) -> None:
        super().__init__()
        counts(1, twist_dim=twist_dim)
        if not model.z_dim or model.f_dim:
            raise ValueError(
                f"model must have latents in each step and none that all steps share, got a "
                f"{type(model).__name__} with z_dim {model.z_dim}, f_dim {model.f_dim}"
            )
        self.h_dim, self.bound = model.h_dim, bound
        self.future = RecurrentEncoder(model.x_dim, twist_dim)
        sizes = [self.h_dim + twist_dim, twist_dim, twist_dim, 1]
        self.compare = MLP(sizes, activation=activation)
        for parameter in self.compare[-1].parameters():
            nn.init.zeros_(parameter)
        self.eval()

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """Codes ``(B, T, C)``, that of step t of x_t .. x_T."""
        found: Tensor = self.future(x, mask)
        return found

    def forward(self, h: Tensor, code: Tensor) -> Tensor:
        """log r ``(*batch,)`` of states ``(*batch, H)`` and codes that broadcast to them."""
        code = code.expand(*h.shape[:-1], code.shape[-1])
        raw: Tensor = self.compare(torch.cat([h, code], dim=-1)).squeeze(-1)
        return self.bound * torch.tanh(raw / self.bound)
