from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyro_avrnn import data
from pyro_avrnn.cli import compare, refine, report


@pytest.fixture
def single() -> Iterator[None]:
    """The command line's own dtype, as a user's process has it."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def serial(single: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process, without pictures of the best one.

    A worker process costs seconds, and pictures do, too; other tests look at both.
    """

    def spread(work: Any, tasks: list[Any], **options: Any) -> Iterator[Any]:
        loaded = data.load(options["source"], **options["reader"])
        for task in tasks:
            yield work(task, loaded, lambda pieces: None)

    monkeypatch.setattr(report, "illustrate", lambda *_: [])
    for module in (compare, refine):
        monkeypatch.setattr(module, "spread", spread)
