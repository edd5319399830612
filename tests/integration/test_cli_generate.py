"""``avrnn generate``: files other programs open, in the data's own units; bad input."""

import io
import zipfile
from pathlib import Path

import mido
import numpy as np
import pytest
import scipy.io
import soundfile

from pyro_avrnn.cli import main

TRAIN = ["--steps", "2", "--h-dim", "4", "--z-dim", "2", "--particles", "4", "--jobs", "1"]


def compare(source: Path, out: Path, *more: str) -> Path:
    given = ["compare", "--data", str(source), "--out", str(out), *TRAIN, *more]
    assert main(given) == 0
    return out


def music(folder: Path) -> Path:
    random = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 6), ("valid", 3), ("test", 3)):
        cells = np.empty((1, count), dtype=object)
        for i in range(count):
            cells[0, i] = (random.random((8, 88)) < 0.05).astype("uint8")
        content[f"{split}data"] = cells
    path = folder / "noise.mat"
    scipy.io.savemat(path, content)
    return path


def speech(folder: Path) -> Path:
    path = folder / "tones.zip"
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for region in (1, 2, 7, 8):
            for take in range(3):
                content = io.BytesIO()
                wave = (3000 * random.standard_normal(400)).astype("int16")
                soundfile.write(content, wave, 16_000, format="WAV", subtype="PCM_16")
                archive.writestr(f"timit/dr{region}-fabc{region}/sx{take}.wav", content.getvalue())
    return path


@pytest.mark.usefixtures("serial")
def test_music_is_midi_and_a_picture(tmp_path: Path) -> None:
    source = music(tmp_path)
    run = compare(source, tmp_path / "run", "--rows", "elbo:model=srnn")
    assert (
        main(["generate", str(run), "--data", str(source), "--count", "1", "--prefix", "3"]) == 0
    )
    made = run / "generated"
    assert {p.suffix for p in made.iterdir()} == {".mid", ".png"}
    files = sorted(made.glob("*.mid"))
    assert [f.stem.split("_")[0] for f in files] == ["begun", "free", "observed"]
    observed = scipy.io.loadmat(source)["testdata"][0]
    notes = {m.note for m in mido.MidiFile(files[2]) if m.type == "note_on" and m.velocity}
    assert any(notes == set(np.flatnonzero(roll.any(axis=0)) + 21) for roll in observed)


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("more", [[], ["--mu-law", "16"]])
def test_speech_is_sound_in_its_own_units(tmp_path: Path, more: list[str]) -> None:
    source = speech(tmp_path)
    run = compare(source, tmp_path / "run", "--rows", "elbo", "--frame", "20", *more)
    assert main(["generate", str(run), "--data", str(source), "--length", "10"]) == 0
    waves = {p.stem: soundfile.read(p, dtype="int16") for p in (run / "generated").glob("*.wav")}
    assert len(waves) == 5 and (run / "generated" / "spectrograms.png").is_file()
    known = []
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            known.append(soundfile.read(io.BytesIO(archive.read(name)), dtype="int16")[0])
    observed, rate = next(v for k, v in waves.items() if k.startswith("observed"))
    assert rate == 16_000 and len(observed) == 200
    off = min(np.abs(observed.astype(int) - k[:200]).max() for k in known)
    assert off <= (6 if more else 1)  # the companding rounds; so does float32
    begun = next(v for k, v in waves.items() if k.startswith("begun"))[0]
    np.testing.assert_array_equal(begun[:40], observed[:40])
    assert (begun[40:] != observed[40:]).any()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A user's .npz, and the folder of a comparison on it."""
    folder = tmp_path_factory.mktemp("own")
    x = np.random.default_rng(0).normal(5.0, 2.0, size=(20, 9, 3)).astype("float32")
    np.savez(folder / "own.npz", x=x)
    return folder / "own.npz", compare(folder / "own.npz", folder / "run", "--rows", "elbo")


@pytest.mark.usefixtures("single")
def test_other_data_are_numbers(own: tuple[Path, Path], tmp_path: Path) -> None:
    source, run = own
    given = ["generate", str(run), "--data", str(source), "--out", str(tmp_path / "made")]
    assert main(given) == 0
    observed = np.loadtxt(next((tmp_path / "made").glob("observed*.csv")), delimiter=",")
    assert min(np.abs(observed - series).max() for series in np.load(source)["x"]) < 1e-4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--row", "rnn"], "--row must be one of elbo, got 'rnn'"),
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--length", "0"], "--length must be at least 1, got 0"),
        (["--prefix", "9"], "--prefix must be below --length, 9, got 9"),
        (["--length", "60", "--prefix", "50"], "--prefix must fit into a test sequence, got 50"),
        (["--data", "vowels"], "--data must be the data of the comparison, own, got 'vowels'"),
    ],
)
def test_bad_arguments_are_one_sentence(
    own: tuple[Path, Path], capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    source, run = own
    assert main(["generate", str(run), "--data", str(source), *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (run / "generated").exists()


def test_a_folder_without_a_run_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path)]) == 2
    assert "give the folder of an avrnn compare" in capsys.readouterr().err
