"""Training and evaluation mode of programs that are modules (dropout, spectral normalisation)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Put programs into evaluation mode inside; every part then returns to its own mode.

    Recurrent layers of torch without dropout stay in training mode: cuDNN has no gradient for them
    in the other, and for them the two are the same.

    Args:
        programs: models, guides, critics; a program that is not a module has no mode.
    """
    yield from _in_mode(False, programs)


@contextmanager
def learning(*programs: Any) -> Iterator[None]:
    """Put programs into training mode inside; otherwise as :func:`evaluating`."""
    yield from _in_mode(True, programs)


def _in_mode(training: bool, programs: tuple[Any, ...]) -> Iterator[None]:
    modules = [program for program in programs if isinstance(program, nn.Module)]
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.train(training)
    for part, _ in before:
        if isinstance(part, nn.RNNBase) and not part.dropout:
            part.training = True
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode
