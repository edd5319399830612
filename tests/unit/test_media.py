"""Writers: what comes back from a file is what went in."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_avrnn.media import write_midi, write_wav


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
        ([0.0, np.nan], 8000, ValueError, ["samples", "NaN", "(1,)"]),
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


def test_a_file_is_written_into_a_folder_that_is_there(tmp_path: Path) -> None:
    pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    roll = np.zeros((2, 88))
    with pytest.raises(FileNotFoundError) as raised:
        write_midi(tmp_path / "no" / "a.mid", roll)
    sentence(raised, "its folder does not exist")
    with pytest.raises(ValueError) as error:
        write_midi(tmp_path, roll)
    sentence(error, "path must be the file to write")
    (tmp_path / "a.mid").write_text("old")
    assert write_midi(tmp_path / "a.mid", roll).read_bytes().startswith(b"MThd")
    assert alone(tmp_path) == ["a.mid"]


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


def test_at_a_step_keys_are_released_before_others_are_struck(tmp_path: Path) -> None:
    mido = pytest.importorskip("mido", reason="needs pyro-avrnn[music]")
    (track,) = mido.MidiFile(write_midi(tmp_path / "a.mid", np.eye(3))).tracks
    found = [(m.type, m.note - 21) for m in track if not m.is_meta]
    assert found == [(kind, key) for key in range(3) for kind in ("note_on", "note_off")]
