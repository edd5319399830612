"""Training and evaluation mode of programs that are modules (dropout, spectral normalisation)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """In evaluation mode inside; each module, and every part of it, goes back to its own mode.

    Args:
        programs: models, guides, critics; what is no module has no mode.
    """
    yield from _in_mode(False, programs)


@contextmanager
def learning(*programs: Any) -> Iterator[None]:
    """In training mode inside; as :func:`evaluating`."""
    yield from _in_mode(True, programs)


def _in_mode(training: bool, programs: tuple[Any, ...]) -> Iterator[None]:
    modules = [program for program in programs if isinstance(program, nn.Module)]
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
