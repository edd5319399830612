"""Sizes of tensors and parts: broadcasting, widths that must agree, and lower limits."""

import torch
from torch import Size, Tensor, nn


def broadcast_cat(*tensors: Tensor) -> Tensor:
    """Concatenate along the last dimension, broadcasting all others.

    Args:
        tensors: shapes ``(*batch_i, F_i)`` whose batch shapes broadcast together.

    Returns:
        Shape ``(*batch, F_1 + F_2 + ...)``.
    """
    return torch.cat(broadcast_leading(*tensors), dim=-1)


def broadcast_leading(*tensors: Tensor) -> list[Tensor]:
    """Broadcast all dimensions but the last; shapes ``(*batch, F_i)``."""
    batch = _common(*(t.shape[:-1] for t in tensors))
    return [t if t.shape[:-1] == batch else t.expand(*batch, -1) for t in tensors]


def _common(*shapes: Size) -> Size:
    """``torch.broadcast_shapes``, without its cost where one shape ends in all the others."""
    longest = max(shapes, key=len)
    if all(not shape or longest[-len(shape) :] == shape for shape in shapes):
        return longest
    return torch.broadcast_shapes(*shapes)


def agree(what: str, /, **sizes: int | None) -> None:
    """Check that parts have a width in common, leaving out parts that do not state theirs.

    Args:
        what: the quantity whose width is compared.
        sizes: its width in each part, under the part's name; None where a part does not state it.

    Raises:
        ValueError: widths that differ; the message names the parts.

    Example:
        >>> agree("h", cell=64, prior=64, decoder=None)
    """
    stated = {part: size for part, size in sizes.items() if size is not None}
    if len(set(stated.values())) > 1:
        listed = " and ".join(f"{part}: {size}" for part, size in stated.items())
        raise ValueError(
            f"parts must agree on the width of {what}, got {listed}; build them alike"
        )


def width(name: str, *parts: nn.Module | int | None) -> int | None:
    """Add up the widths of parts: numbers, or modules that state theirs as attribute ``name``.

    Returns:
        The sum, or None if a part does not state its width.

    Example:
        >>> width("out_features", nn.Linear(2, 5), 3), width("out_features", nn.Identity())
        (8, None)
    """
    sizes = [part if isinstance(part, int) else getattr(part, name, None) for part in parts]
    return None if None in sizes else sum(sizes)  # type: ignore[arg-type]


def at_least(least: float, hint: str = "", /, **numbers: float) -> None:
    """Check numbers, named as the arguments they are, against a lower limit.

    Raises:
        ValueError: a number below the limit; ``hint`` ends the message.
    """
    for name, value in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}{hint}")
