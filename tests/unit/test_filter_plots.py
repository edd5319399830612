"""Pictures of filters and of calibration: what they show, and that they are files one can open."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from inference.calibration import Calibration
from inference.particles import Filtered, particle_filter
from pyro_avrnn import plots
from pyro_avrnn.models import LGSSM
from tests.unit.table import prefix_mask


def _texts(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def _filtered(lengths: tuple[int, ...], particles: int = 16, **options: Any) -> Filtered:
    model, mask = LGSSM.scalar(), prefix_mask(lengths)
    x = model(mask=mask)  # gradients and all
    return particle_filter(model, None, x, mask, num_particles=particles, **options)


def _calibration(quantities: int = 4, size: int = 200, **extra: Any) -> Calibration:
    names = tuple(f"z[{i}] last" for i in range(quantities))
    return Calibration(torch.randint(20, (size, quantities)), names, 19, 10)._replace(**extra)


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_filters_lines_are_its_numbers(sequence: int, drawn: Callable) -> None:
    filtered, length = _filtered((12, 5)), (12, 5)[sequence]
    top, bottom = drawn(plots.particle_health, filtered, sequence=sequence).axes
    half, ess, marks = top.get_lines()
    assert half.get_ydata()[0] == 8.0
    np.testing.assert_array_equal(ess.get_xdata(), np.arange(1, length + 1))
    np.testing.assert_allclose(ess.get_ydata(), filtered.ess[:length, sequence].detach())
    due = filtered.resampled[:length, sequence]
    assert bool(due.any())
    np.testing.assert_array_equal(marks.get_xdata(), 1 + due.nonzero()[:, 0])
    whole, survivors = bottom.get_lines()
    assert whole.get_ydata()[0] == 16 and bottom.get_yscale() == "log"
    expected = filtered.unique_ancestors()[:length, sequence]
    np.testing.assert_array_equal(survivors.get_ydata(), expected)


def test_a_filters_axes_say_what_they_measure(drawn: Callable) -> None:
    figure = drawn(plots.particle_health, _filtered((12, 5)), sequence=1)
    said = {*_texts(figure).split("\n")}
    assert {"ESS (particles)", "step t (frames, from 1)", "K / 2", "K = 16"} <= said
    assert "Do the 16 particles of the filter survive? Sequence 1" in said
    assert "mine" in _texts(drawn(plots.particle_health, _filtered((3,)), title="mine"))


@pytest.mark.parametrize("lengths", [(1,), (100,)])
@pytest.mark.parametrize("particles", [1, 3000])
def test_short_and_long_filters_are_drawn(
    lengths: tuple[int, ...], particles: int, drawn: Callable
) -> None:
    drawn(plots.particle_health, _filtered(lengths, particles, paths=False))
    drawn(plots.particle_health, _filtered(lengths, particles, criterion="never"))


@pytest.mark.parametrize("sequence", [-1, 2])
def test_a_sequence_that_is_not_there_is_refused(sequence: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"sequence must be in 0\.\.1, got {sequence}"):
        plots.particle_health(_filtered((3, 2)), tmp_path / "a.png", sequence)


def test_a_sequence_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sequence must have an observed step, but 1 has none"):
        plots.particle_health(_filtered((3, 0)), tmp_path / "a.png", 1)


@pytest.mark.parametrize("arviz", ["0.x", "1.x"])
def test_curves_and_bars_are_the_ranks(
    arviz: str, drawn: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arviz == "1.x":  # has no such plot
        monkeypatch.delattr(az, "plot_ecdf", raising=False)
    result = _calibration()
    before = result.ranks.clone()
    figure = drawn(plots.calibration, result)
    assert torch.equal(result.ranks, before)
    curves, *bars = figure.axes
    shares = np.arange(1, 20) / 20
    for q in range(4):
        expected = (result.pit()[:, q, None].numpy() < shares).mean(axis=0) - shares
        x, y = curves.get_lines()[q].get_data()
        np.testing.assert_allclose(y[np.searchsorted(x, shares - 1e-9)], expected, atol=1e-12)
        heights = bars[q].patches[-1].get_data().values
        np.testing.assert_array_equal(heights, result.histogram()[q])
    band = curves.collections[0].get_paths()[0].vertices[:, 1]
    assert 0.05 < band.max() < 0.12 and band.min() == pytest.approx(-band.max(), abs=0.01)
    assert all(f"p = {p:.2g}" in _texts(figure) for p in result.p_values.tolist())
    assert "together the ranks are uniform" in _texts(figure)


def test_a_guide_that_fails_is_called_so(drawn: Callable) -> None:
    ranks = torch.randint(10, (200, 1))
    figure = drawn(plots.calibration, _calibration(1, ranks=ranks), title="mine")
    assert {"mine", "z[0] last: p < 1e-10"} <= {*_texts(figure).split("\n")}
    assert "together the ranks are not uniform" in _texts(figure)


def test_of_many_quantities_the_worst_are_shown(drawn: Callable) -> None:
    result = _calibration(30, num_bins=20)
    result.ranks[:, 17] = 3
    figure = drawn(plots.calibration, result)
    assert len(figure.axes) == 9 and "(8 of 30 quantities" in _texts(figure)
    assert "z[17] last: p < 1e-10" in _texts(figure)


def test_the_users_matplotlib_is_left_alone(drawn: Callable) -> None:
    before = dict(matplotlib.rcParams)
    drawn(plots.calibration, _calibration())
    drawn(plots.particle_health, _filtered((4,)))
    assert dict(matplotlib.rcParams) == before
    assert not matplotlib._pylab_helpers.Gcf.figs
