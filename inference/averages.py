"""Averaged parameters: a run trains its own, and is judged by their moving average."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor


class Average:
    """Exponential moving average of the parameters in Pyro's store, over the steps of a run.

    The first steps weigh no more than later ones: step n counts with max(1 - decay, 9 / (10 + n)),
    as TensorFlow's ``ExponentialMovingAverage`` has it.

    Args:
        decay: of the weight of a step, such as 0.999; None averages nothing.

    Raises:
        ValueError: a decay outside (0, 1).
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not 0.0 < decay < 1.0:
            raise ValueError(
                f"average must be a decay between 0 and 1, such as 0.999, got {decay}"
            )
        self.decay = decay
        self.steps = 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Count a step."""
        if self.decay is None:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, p in pyro.get_param_store().named_parameters():
            if name in self.values:
                self.values[name] = self.values[name].to(p.device)  # a file is read onto the CPU
                self.values[name].lerp_(p, 1.0 - decay)
            else:
                self.values[name] = p.detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the store, and what is trained back in it afterwards."""
        trained = {} if self.decay is None else self._exchange(self.values)
        try:
            yield
        finally:
            self._exchange(trained)

    @staticmethod
    @torch.no_grad()
    def _exchange(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put values into the store; return those that were there."""
        before: dict[str, Tensor] = {}
        for name, p in pyro.get_param_store().named_parameters():
            if name in values:
                before[name] = p.detach().clone()
                p.copy_(values[name])
        return before

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.steps, self.values = state["steps"], state["values"]
