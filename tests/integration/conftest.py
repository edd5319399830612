import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_avrnn import data
from pyro_avrnn.cli.runs import row_folder, run

COMPARE = sys.modules["pyro_avrnn.cli.compare"]  # its function has the same name


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
        todo: Any,
        source: str,
        options: dict[str, Any],
        settings: Any,
        out: Path,
        jobs: int,
        resume: bool,
    ) -> Iterator[dict[str, Any]]:
        loaded = data.load(source, **options)
        for row, seed in todo:
            folder = row_folder(out, row.label, seed)
            yield run(row, seed, loaded, settings, folder, lambda steps: None, resume)

    monkeypatch.setattr(COMPARE, "_train", train)
