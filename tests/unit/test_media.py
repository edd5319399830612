"""Writers: what comes back from a file is what went in; pictures show what they say."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_avrnn.media import picture_roll, picture_spectrograms, write_midi, write_wav


def sentence(error: pytest.ExceptionInfo[Exception], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"


def alone(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- WAV ----


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_a_wav_file_holds_the_samples(tmp_path: Path, kind: Callable) -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    samples = np.random.RandomState(0).uniform(-1, 1, 1001)
    samples[:2] = -1.0, 1.0
    samples = samples.astype(np.float32)  # so that all three kinds hold the same numbers
    path = write_wav(tmp_path / "a.wav", kind(samples), 8000)
    found, rate = soundfile.read(path)
    assert rate == 8000 and found.shape == (1001,) and path == tmp_path / "a.wav"
    assert soundfile.info(path).subtype == "PCM_16"
    # half a step of rounding; 1.0 itself, which 16 bits do not hold, is off by a whole step
    assert np.abs(found - samples)[2:].max() <= 0.5000001 / 32768
    np.testing.assert_array_equal(found[:2], [-1.0, 32767 / 32768])
    assert alone(tmp_path) == ["a.wav"]


def test_loud_samples_are_clipped_and_not_scaled(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    path = write_wav(tmp_path / "a.wav", np.array([0.5, 3.0, -1e30, -0.25]), 16_000)
    found, _ = soundfile.read(path, dtype="int16")
    assert found.tolist() == [16384, 32767, -32768, -8192]


@pytest.mark.parametrize(
    ("samples", "rate", "error", "words"),
    [
        ([0.0, np.nan], 8000, ValueError, ["samples", "NaN", "index 1"]),
        ([0.0, np.inf], 8000, ValueError, ["samples", "infinity"]),
        (np.zeros((2, 3)), 8000, ValueError, ["samples", "(S,)", "(2, 3)"]),
        (np.zeros(0), 8000, ValueError, ["samples", "(0,)"]),
        (np.zeros(3, np.int16), 8000, TypeError, ["samples", "int16", "divide"]),
        (np.zeros(3, complex), 8000, TypeError, ["samples", "complex128"]),
        (np.zeros(3), 0, ValueError, ["sample_rate", "got 0"]),
    ],
)
def test_write_wav_names_what_is_wrong(
    tmp_path: Path, samples: Any, rate: int, error: type[Exception], words: list[str]
) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    with pytest.raises(error) as raised:
        write_wav(tmp_path / "a.wav", samples, rate)
    sentence(raised, *words)
    assert alone(tmp_path) == []


# ---- MIDI ----


def read_midi(path: Path, keys: int, first_note: int) -> tuple[np.ndarray, int, float]:
    """Roll (T, K), number of notes struck, and seconds in all, as another program has them."""
    mido = pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    file = mido.MidiFile(path)
    (track,) = file.tracks
    steps = sum(message.time for message in track) // file.ticks_per_beat
    roll = np.zeros((steps, keys), dtype=int)
    now, struck = 0, 0
    begun: dict[int, int] = {}
    for message in track:
        now += message.time
        step, rest = divmod(now, file.ticks_per_beat)
        assert rest == 0
        if message.type == "note_on":
            assert message.note not in begun and message.velocity > 0
            begun[message.note] = step
            struck += 1
        elif message.type == "note_off":
            roll[begun.pop(message.note) : step, message.note - first_note] += 1
    assert not begun
    return roll, struck, file.length


@pytest.mark.parametrize(("keys", "first_note"), [(88, 21), (5, 0), (128, 0), (1, 127)])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_midi_file_holds_the_roll(
    tmp_path: Path, length: int, keys: int, first_note: int
) -> None:
    pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    roll = np.random.RandomState(length).uniform(size=(length, keys)) < 0.4
    roll[-1] = length != 2  # once with a rest at the end, else with notes held to it
    path = write_midi(
        tmp_path / "a.mid", torch.tensor(roll).float(), step_seconds=0.25, first_note=first_note
    )
    found, struck, seconds = read_midi(path, keys, first_note)
    np.testing.assert_array_equal(found, roll)
    before = np.concatenate([np.zeros((1, keys), dtype=bool), roll[:-1]])
    assert struck == (roll & ~before).sum()
    assert seconds == pytest.approx(0.25 * length, abs=1e-9)
    assert alone(tmp_path) == ["a.mid"]


def test_a_key_that_sounds_on_is_one_note(tmp_path: Path) -> None:
    pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    roll = np.zeros((6, 88))
    roll[[1, 2, 3, 5], 39] = 1
    found, struck, seconds = read_midi(write_midi(tmp_path / "a.mid", roll), 88, 21)
    assert struck == 2 and seconds == pytest.approx(3.0)
    np.testing.assert_array_equal(found, roll)


def test_a_silent_roll_keeps_its_length(tmp_path: Path) -> None:
    pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    found, struck, _ = read_midi(write_midi(tmp_path / "a.mid", np.zeros((4, 88))), 88, 21)
    assert struck == 0 and found.shape == (4, 88)


@pytest.mark.parametrize(
    ("roll", "options", "words"),
    [
        (np.zeros(88), {}, ["roll", "(T, K)", "(88,)"]),
        (np.zeros((0, 88)), {}, ["roll", "(0, 88)"]),
        (np.full((2, 88), 0.5), {}, ["0 and 1", "0.5", "binarise"]),
        (np.full((2, 88), 2), {}, ["0 and 1", "2"]),
        (np.full((2, 88), np.nan), {}, ["roll", "NaN", "(0, 0)"]),
        (np.zeros((2, 88)), {"first_note": 41}, ["first_note", "88 keys", "got 41"]),
        (np.zeros((2, 88)), {"first_note": -1}, ["first_note", "got -1"]),
        (np.zeros((2, 88)), {"step_seconds": 0}, ["step_seconds", "got 0"]),
        (np.zeros((2, 88)), {"step_seconds": 17.0}, ["step_seconds", "16", "got 17"]),
        (np.zeros((2, 88)), {"step_seconds": np.nan}, ["step_seconds", "nan"]),
    ],
)
def test_write_midi_names_what_is_wrong(
    tmp_path: Path, roll: np.ndarray, options: dict, words: list[str]
) -> None:
    pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    with pytest.raises(ValueError) as raised:
        write_midi(tmp_path / "a.mid", roll, **options)
    sentence(raised, *words)
    assert alone(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "write", "extra"),
    [
        ("soundfile", lambda path: write_wav(path, np.zeros(3), 8000), "audio"),
        ("mido", lambda path: write_midi(path, np.zeros((3, 88))), "music"),
    ],
)
def test_writers_say_what_to_install(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    write: Callable[[Path], Path],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as raised:
        write(tmp_path / "a")
    sentence(raised, f"pip install pyro-avrnn[{extra}]")


# ---- pictures ----


def shown(figure: Figure) -> list[Any]:
    """The images of the panels, from the top."""
    return [image for axes in figure.axes for image in axes.get_images()]


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Figure]:
    """Writes a picture, checks the file, and gives the figure behind it."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, target: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, target, **options | {"dpi": 40})

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(write: Callable[..., Path], content: Any, **options: Any) -> Figure:
        path = write(tmp_path / "a.png", content, **options)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000
        assert alone(tmp_path) == ["a.png"]
        return figures[-1]

    return draw


def test_rolls_are_drawn_in_seconds_and_octaves(picture: Callable[..., Figure]) -> None:
    first, second = np.zeros((10, 88)), np.zeros((6, 88))
    first[2, 39] = 1  # C4, the note 60
    second[:, 50] = 1
    figure = picture(
        picture_roll, {"data": torch.tensor(first), "model": second}, step_seconds=0.5
    )
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


def test_rolls_of_probabilities_have_a_colour_bar(picture: Callable[..., Figure]) -> None:
    figure = picture(picture_roll, {"model": np.full((4, 88), 0.3)}, title="rolls")
    assert len(figure.axes) == 2 and figure.axes[1].get_ylabel() == "probability"
    assert figure.axes[0].get_xlabel() == "step"
    picture(picture_roll, {"silence": np.zeros((4, 88))})


@pytest.mark.parametrize("hertz", [500.0, 1000.0])
def test_a_tone_is_drawn_at_its_frequency_and_time(
    picture: Callable[..., Figure], hertz: float
) -> None:
    t = np.arange(8000) / 8000
    sounds = {
        "late": np.where(t >= 0.5, np.sin(2 * np.pi * hertz * t), 0.0),
        "softer": torch.tensor(0.01 * np.sin(2 * np.pi * hertz * t)),
    }
    figure = picture(picture_spectrograms, sounds, sample_rate=8000)
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
def test_short_and_silent_waveforms_are_drawn(picture: Callable[..., Figure], count: int) -> None:
    picture(picture_spectrograms, {"short": np.ones(count)}, sample_rate=8000)
    picture(picture_spectrograms, {"silent": np.zeros(count)}, sample_rate=16_000)


def test_log_mel_frames_are_drawn_as_they_are(picture: Callable[..., Figure]) -> None:
    frames = np.random.RandomState(0).standard_normal((7, 40))
    figure = picture(
        picture_spectrograms, {"data": frames, "model": 2 * frames[:3]}, frame_seconds=0.016
    )
    first, second = shown(figure)
    np.testing.assert_array_equal(first.get_array(), frames.T)
    assert first.get_clim() == second.get_clim()
    assert figure.axes[0].get_ylabel() == "mel band"
    assert figure.axes[0].get_xlim() == pytest.approx((0, 7 * 0.016))


@pytest.mark.parametrize(
    ("write", "content", "options", "words"),
    [
        (picture_roll, {}, {}, ["rolls", "at least one"]),
        (picture_roll, {"a": np.zeros(8)}, {}, ["rolls['a']", "(T, K)", "(8,)"]),
        (picture_roll, {"a": np.full((2, 8), -1)}, {}, ["rolls['a']", "0 to 1", "-1"]),
        (
            picture_roll,
            {"a": np.zeros((2, 8)), "b": np.zeros((2, 9))},
            {},
            ["keys", "{'a': 8, 'b': 9}"],
        ),
        (picture_roll, {"a": np.zeros((2, 8))}, {"first_note": 121}, ["first_note", "121"]),
        (picture_roll, {"a": np.zeros((2, 8))}, {"step_seconds": -1}, ["step_seconds", "-1"]),
        (picture_spectrograms, {}, {}, ["sounds", "at least one"]),
        (picture_spectrograms, {"a": np.zeros(8)}, {}, ["sample_rate", "None"]),
        (picture_spectrograms, {"a": np.zeros(8)}, {"sample_rate": 0}, ["sample_rate", "got 0"]),
        (picture_spectrograms, {"a": np.zeros((8, 2))}, {}, ["frame_seconds", "None"]),
        (
            picture_spectrograms,
            {"a": np.zeros((8, 2))},
            {"frame_seconds": 0.0},
            ["frame_seconds", "positive"],
        ),
        (
            picture_spectrograms,
            {"a": np.zeros(8), "b": np.zeros((8, 2))},
            {"sample_rate": 8000},
            ["sounds", "waveforms", "log-mel", "'b': 2"],
        ),
        (
            picture_spectrograms,
            {"a": np.zeros((8, 3)), "b": np.zeros((8, 2))},
            {"frame_seconds": 1.0},
            ["mel bands", "'b': 2"],
        ),
        (
            picture_spectrograms,
            {"a": np.full(8, np.nan)},
            {"sample_rate": 8000},
            ["sounds['a']", "finite"],
        ),
    ],
)
def test_pictures_name_what_is_wrong(
    tmp_path: Path, write: Callable, content: dict, options: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError) as raised:
        write(tmp_path / "a.png", content, **options)
    sentence(raised, *words)
    assert alone(tmp_path) == []


def test_a_file_is_written_into_a_folder_that_is_there(tmp_path: Path) -> None:
    roll = {"a": np.zeros((2, 88))}
    with pytest.raises(FileNotFoundError) as raised:
        picture_roll(tmp_path / "no" / "a.png", roll)
    sentence(raised, "its folder does not exist")
    with pytest.raises(ValueError) as error:
        picture_roll(tmp_path, roll)
    sentence(error, "path must be the file to write")
    (tmp_path / "a.png").write_text("old")
    picture_roll(tmp_path / "a.png", roll)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
