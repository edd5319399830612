"""Explicit random state at the border of the library, and draws that gradients can follow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from inference.protocols import counts


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Take draws inside from ``seed``, and restore torch's global generators afterwards.

    Args:
        seed: None leaves the global state in charge.

    Example:
        >>> with seeded(0):
        ...     a = torch.rand(())
        >>> with seeded(0):
        ...     b = torch.rand(())
        >>> bool(a == b)
        True
    """
    if seed is None:
        yield
        return
    counts(0, seed=seed)
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def draw(distribution: Any, learns: bool) -> Tensor:
    """Draw a latent from a guide's distribution, reparameterised where it can be.

    Args:
        distribution: of the guide.
        learns: whether a gradient is to reach the guide's parameters through the draw.

    Raises:
        NotImplementedError: ``learns``, and a distribution that is not reparameterised.
    """
    if learns and not distribution.has_rsample:
        raise NotImplementedError(
            f"the guide's {type(distribution).__name__} is not reparameterised, so its parameters "
            "would get a wrong gradient; pyro.infer.Trace_ELBO takes such guides, and without "
            "gradients (torch.no_grad()) so does everything here"
        )
    return distribution.rsample() if distribution.has_rsample else distribution.sample()


def learnable(guide: Any) -> bool:
    """Whether gradients are enabled and the guide has a parameter that takes one."""
    parameters: Any = getattr(guide, "parameters", tuple)()
    return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)


def random_state() -> dict[str, Any]:
    """State of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of torch's global generators, on the devices that are here."""
    torch.set_rng_state(state["cpu"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)
