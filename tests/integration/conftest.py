from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyro_avrnn import data
from pyro_avrnn.cli import compare
from pyro_avrnn.cli.runs import run
from pyro_avrnn.cli.settings import Comparison, Settings


@pytest.fixture
def single() -> Iterator[None]:
    """The command line's own dtype, as a user's process has it."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def serial(single: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process: a worker process costs seconds, and is tested once below."""

    def train(
        tasks: list[compare.Task], comparison: Comparison, settings: Settings
    ) -> Iterator[dict[str, Any]]:
        loaded = data.load(comparison.data, **comparison.reader_options())
        for training, seed, folder in tasks:
            resume = comparison.resume
            yield run(training, seed, loaded, settings, folder, lambda steps: None, resume)

    monkeypatch.setattr(compare, "train", train)
