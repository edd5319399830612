from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyro_avrnn import data
from pyro_avrnn.cli import compare
from pyro_avrnn.cli.comparison import Comparison
from pyro_avrnn.cli.runs import Task, run
from pyro_avrnn.cli.settings import Settings


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
        tasks: list[Task], comparison: Comparison, settings: Settings
    ) -> Iterator[dict[str, Any]]:
        loaded = data.load(comparison.data, **comparison.reader_options(settings))
        for task in tasks:
            yield run(task, loaded, settings, lambda steps: None, comparison.resume)

    monkeypatch.setattr(compare, "train", train)
