"""A held-out bound that a training watches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor

from inference.bounds import iwae
from inference.modes import evaluating
from inference.protocols import counts, given, of_kind
from inference.random import seeded
from inference.traces import step_densities
from inference.updates import observed_frames
from inference.weights import wide

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Validation:
    """A held-out bound that ``fit`` watches, and what follows from it.

    Args:
        data: a batch ``(x, mask)`` scored by IWAE, nats a frame, always with the same random
            numbers; or a function that returns a bound, larger is better.
        every: SVI steps between validations; the last step is validated, too.
        num_particles: K of IWAE.
        patience: stop after that many validations without a better one.
        on_best: called after each improvement, with the best parameters in place; for instance
            ``lambda: recipes.save(r, "best.pt")``.

    Raises:
        ValueError: a number below 1.
    """

    data: Batch | Callable[[], float]
    every: int = 50
    num_particles: int = 16
    patience: int | None = None
    on_best: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        counts(1, every=self.every, num_particles=self.num_particles)
        counts(1, **given(patience=self.patience))
        of_kind((tuple, list, Callable), "a batch (x, mask) or a function", data=self.data)
        of_kind(Callable, "a function", **given(on_best=self.on_best))
        if not callable(self.data) and not observed_frames(tuple(self.data)):
            raise ValueError("data must observe a frame, but the mask of this batch has none")

    def score(self, svi: SVI, seed: int | None) -> float:
        """The bound now, in evaluation mode; -inf where it is not finite."""
        with torch.no_grad(), evaluating(svi.model, svi.guide):
            if callable(self.data):
                bound = self.data()
                of_kind(Real, "a number", **{"the bound of validation": bound})
                return float(bound)
            with seeded(0 if seed is None else seed):
                d = step_densities(
                    svi.model, svi.guide, *self.data, num_particles=self.num_particles
                )
        value = float(iwae(wide(d.log_weight)).sum()) / observed_frames(self.data)
        return value if math.isfinite(value) else -math.inf
