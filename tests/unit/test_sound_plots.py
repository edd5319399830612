"""Pictures of music and sound: they show what they say, and name what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_avrnn.plots import piano_rolls, spectrograms


def shown(figure: Figure) -> list[Any]:
    """The images of the panels, from the top."""
    return [image for axes in figure.axes for image in axes.get_images()]


def test_rolls_are_drawn_in_seconds_and_octaves(drawn: Callable[..., Figure]) -> None:
    first, second = np.zeros((10, 88)), np.zeros((6, 88))
    first[2, 39] = 1  # C4, the note 60
    second[:, 50] = 1
    figure = drawn(piano_rolls, {"data": torch.tensor(first), "model": second}, step_seconds=0.5)
    top, bottom = figure.axes  # no colour bar: all values are 0 or 1
    assert top.get_title() == "data" and bottom.get_title() == "model"
    assert bottom.get_xlabel() == "time (seconds)" and top.get_xlim() == (0, 5.0)
    names = dict(zip(top.get_yticks(), (t.get_text() for t in top.get_yticklabels()), strict=True))
    assert names[60] == "C4" and names[24] == "C1"
    low, high = top.get_ylim()
    assert low < 60 < 71 < high and high - low < 30
    image, _ = shown(figure)
    np.testing.assert_array_equal(image.get_array(), first.T)
    assert image.get_extent() == [0, 5.0, 20.5, 108.5]


def test_rolls_of_probabilities_have_a_colour_bar(drawn: Callable[..., Figure]) -> None:
    figure = drawn(piano_rolls, {"model": np.full((4, 88), 0.3)}, title="rolls")
    assert len(figure.axes) == 2 and figure.axes[1].get_ylabel() == "probability"
    assert figure.axes[0].get_xlabel() == "step"
    drawn(piano_rolls, {"silence": np.zeros((4, 88))})


@pytest.mark.parametrize("hertz", [500.0, 1000.0])
def test_a_tone_is_drawn_at_its_frequency_and_time(
    drawn: Callable[..., Figure], hertz: float
) -> None:
    t = np.arange(8000) / 8000
    sounds = {
        "late": np.where(t >= 0.5, np.sin(2 * np.pi * hertz * t), 0.0),
        "softer": torch.tensor(0.01 * np.sin(2 * np.pi * hertz * t)),
    }
    figure = drawn(spectrograms, sounds, sample_rate=8000)
    late, softer = shown(figure)
    power = np.asarray(late.get_array())
    left, right, bottom, top = late.get_extent()
    assert left == 0 and right == pytest.approx(1.0)
    frequencies = bottom + (np.arange(len(power)) + 0.5) * (top - bottom) / len(power)
    times = left + (np.arange(power.shape[1]) + 0.5) * (right - left) / power.shape[1]
    row, column = np.unravel_index(power.argmax(), power.shape)
    assert frequencies[row] == pytest.approx(hertz) and power.max() == 0
    sounding = (times > 0.52) & (times < 0.98)
    assert (power[row, sounding] > -0.1).all() and (power[:, times < 0.48] < -80).all()
    # a hundredth of the amplitude is 40 decibels less
    steady = np.asarray(softer.get_array())[row, 5:-5]
    np.testing.assert_allclose(steady, -40, atol=0.1)
    assert late.get_clim() == softer.get_clim() == (-80, 0)
    axes = figure.axes[0]
    assert axes.get_ylim() == (0, 4000) and axes.get_ylabel() == "frequency (Hz)"
    assert figure.axes[1].get_xlabel() == "time (seconds)"


@pytest.mark.parametrize("count", [1, 10, 300])
def test_short_and_silent_waveforms_are_drawn(drawn: Callable[..., Figure], count: int) -> None:
    drawn(spectrograms, {"short": np.ones(count)}, sample_rate=8000)
    drawn(spectrograms, {"silent": np.zeros(count)}, sample_rate=16_000)


def test_log_mel_frames_are_drawn_as_they_are(drawn: Callable[..., Figure]) -> None:
    frames = np.random.RandomState(0).standard_normal((7, 40))
    figure = drawn(spectrograms, {"data": frames, "model": 2 * frames[:3]}, frame_seconds=0.016)
    first, second = shown(figure)
    np.testing.assert_array_equal(first.get_array(), frames.T)
    assert first.get_clim() == second.get_clim()
    assert figure.axes[0].get_ylabel() == "mel band"
    assert figure.axes[0].get_xlim() == pytest.approx((0, 7 * 0.016))


@pytest.mark.parametrize(
    ("plot", "content", "options", "words"),
    [
        (piano_rolls, {}, {}, ["rolls", "at least one"]),
        (piano_rolls, {"a": np.zeros(8)}, {}, ["rolls['a']", "(T, K)", "(8,)"]),
        (piano_rolls, {"a": np.full((2, 8), -1)}, {}, ["rolls['a']", "0 to 1", "-1"]),
        (
            piano_rolls,
            {"a": np.zeros((2, 8)), "b": np.zeros((2, 9))},
            {},
            ["keys", "{'a': 8, 'b': 9}"],
        ),
        (piano_rolls, {"a": np.zeros((2, 8))}, {"first_note": 121}, ["first_note", "121"]),
        (piano_rolls, {"a": np.zeros((2, 8))}, {"step_seconds": -1}, ["step_seconds", "-1"]),
        (spectrograms, {}, {}, ["sounds", "at least one"]),
        (spectrograms, {"a": np.zeros(8)}, {}, ["sample_rate", "None"]),
        (spectrograms, {"a": np.zeros(8)}, {"sample_rate": 0}, ["sample_rate", "got 0"]),
        (spectrograms, {"a": np.zeros((8, 2))}, {}, ["frame_seconds", "None"]),
        (
            spectrograms,
            {"a": np.zeros((8, 2))},
            {"frame_seconds": 0.0},
            ["frame_seconds", "positive"],
        ),
        (
            spectrograms,
            {"a": np.zeros(8), "b": np.zeros((8, 2))},
            {"sample_rate": 8000},
            ["sounds", "waveforms", "log-mel", "'b': 2"],
        ),
        (
            spectrograms,
            {"a": np.zeros((8, 3)), "b": np.zeros((8, 2))},
            {"frame_seconds": 1.0},
            ["mel bands", "'b': 2"],
        ),
        (
            spectrograms,
            {"a": np.full(8, np.nan)},
            {"sample_rate": 8000},
            ["sounds['a']", "finite"],
        ),
    ],
)
def test_pictures_name_what_is_wrong(
    tmp_path: Path, plot: Callable, content: dict, options: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError) as raised:
        plot(content, tmp_path / "a.png", **options)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_picture_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    roll = {"a": np.zeros((2, 88))}
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        piano_rolls(roll, tmp_path / "no" / "a.png")
    with pytest.raises(ValueError, match="path must be the file to write"):
        piano_rolls(roll, tmp_path)
    (tmp_path / "a.png").write_text("old")
    assert piano_rolls(roll, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
