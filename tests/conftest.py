import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import pytest
import torch
from matplotlib.figure import Figure

from pyro_avrnn.engine.scanning import switched

matplotlib.use("Agg")
# which tells pytest of every step of every trace
logging.getLogger("torch.__trace").propagate = False
# the matrices here are small, and two threads on busy cores wait for each other many times over
torch.set_num_threads(1)
GLOBALS = {
    "default dtype": torch.get_default_dtype,
    "grad mode": torch.is_grad_enabled,
    "threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "default device": torch.get_default_device,
}


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    """float64, seed 0, an empty parameter store; no test may change torch's global defaults."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    before = {name: read() for name, read in GLOBALS.items()}
    yield
    changed = [name for name, read in GLOBALS.items() if read() != before[name]]
    torch.set_default_dtype(torch.float32)
    assert not changed, f"a test changed torch's {', '.join(changed)}"


@pytest.fixture(autouse=True)
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps run as written, here and in processes of a test's own, but in tests of the fast path.

    To capture a step takes a second, and five more in a new process.
    """
    fast = request.node.get_closest_marker("fast_path") is not None
    if not fast:
        monkeypatch.setenv("PYRO_AVRNN_PLAIN_LOOP", "1")
    with switched(fast):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, or a skip that says so."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PYRO_AVRNN_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set PYRO_AVRNN_DATA")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """Draws a picture, checks that a PNG was written, and gives the figure behind it."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, path: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, path, **options | {"dpi": 40})

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(plot: Callable, content: Any, **options: Any) -> Figure:
        path = plot(content, tmp_path / "a.png", **options)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000
        return figures[-1]

    return draw
