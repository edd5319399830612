"""A disk that fills while a file is written: one sentence, and the old file as it was.

The limit on the size of a file stands for the disk: what lies beyond it fails in the same calls,
below every library.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI

from inference import ELBO, Checkpointing, Records, fit, to_arviz
from inference.arviz_adapter import write_arviz
from inference.files import write_csv, write_json, write_text
from pyro_avrnn import media, plots, recipes

RECIPE = partial(recipes.vrnn, 3, 2, 16)


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(path: Path, **options: Any) -> None:
    r, x = RECIPE(), torch.randn(2, 5, 3)
    with pyro.get_param_store().scope():
        svi = SVI(r.model, r.guide, pyro.optim.Adam({"lr": 1e-2}), ELBO())
        fit(svi, [(x, None)], steps=3, progress=False, **options)


def posterior(path: Path) -> None:
    r = RECIPE()
    write_arviz(to_arviz(r.model, r.guide, torch.randn(20, 3), draws=100), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: write_text(path, "table\n" * 5000),
    "json": lambda path: write_json(path, list(range(5000))),
    "csv": lambda path: write_csv(path, [{"step": i, "loss": 0.5} for i in range(5000)]),
    "parameters": lambda path: recipes.save(RECIPE(), path),
    "checkpoint": lambda path: train(path, checkpoint=Checkpointing(path)),
    "metrics": lambda path: train(path, records=Records(path, every=1)),
    "sound": lambda path: media.write_wav(path, np.zeros(50_000), 16_000),
    "music": lambda path: media.write_midi(path, np.eye(88)),
    "picture": lambda path: plots.features({"x": np.zeros((20, 3))}, path, title="features"),
    "posterior": posterior,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / {"sound": "a.wav", "music": "a.mid", "picture": "a.png"}.get(name, "a.out")
    WRITERS[name](path)
    before = path.read_bytes()
    with full_after(len(before) // 2), pytest.raises(OSError, match="make room on the disk") as e:
        WRITERS[name](path)
    assert str(e.value).startswith(f"{path} cannot be written (") and "\n" not in str(e.value)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    WRITERS[name](path)  # there is room again


def test_a_disk_with_room_is_enough(tmp_path: Path) -> None:
    """The planted fault of the tests above: their limit, where it leaves room."""
    with full_after(1_000_000):
        write_text(tmp_path / "a.out", "table\n" * 5000)
