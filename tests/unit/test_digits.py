"""Spoken digits: log-mel frames against a hand-written transform, splits, every bad input."""

import io
import sys
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_avrnn.data import Sequences, log_mel, mel_to_waveform, spoken_digits
from pyro_avrnn.data.strings import labels

pytest.importorskip("librosa", reason="needs pyro-avrnn[audio]")
TAKES = (0, 4, 5, 9, 10, 49)


def tone(count: int, hertz: float = 440.0, amplitude: float = 0.3) -> np.ndarray:
    """A sine with a little of its third harmonic, and noise that keeps all bands alive."""
    t = np.arange(count) / 8000
    wave_ = np.sin(2 * np.pi * hertz * t) + 0.2 * np.sin(6 * np.pi * hertz * t)
    return amplitude * wave_ + 1e-3 * np.random.RandomState(7).standard_normal(count)


def int16(samples: np.ndarray) -> np.ndarray:
    return np.rint(samples * 32768).astype("<i2")


def wav(samples: np.ndarray, rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def recordings() -> dict[str, bytes]:
    """Two digits, two speakers, six takes, each of its own length and pitch."""
    return {
        f"fsdd/recordings/{digit}_{speaker}_{take}.wav": wav(
            int16(tone(700 + 90 * take + 13 * digit, 200.0 + 40 * digit + 3 * take))
        )
        for digit in (3, 8)
        for speaker in ("ann", "bob")
        for take in TAKES
    }


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def slaney_bands(n_mels: int, n_fft: int, rate: int) -> np.ndarray:
    """Triangles of unit area: linear to 1 kHz (200 / 3 Hz a mel), then 27 mels a factor 6.4."""

    def hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    edges = [hertz(mel) for mel in np.linspace(0, top, n_mels + 2)]
    bands = np.zeros((n_mels, n_fft // 2 + 1))
    for m in range(n_mels):
        left, centre, right = edges[m : m + 3]
        for k in range(n_fft // 2 + 1):
            f = k * rate / n_fft
            if left < f <= centre:
                bands[m, k] = (f - left) / (centre - left) * 2 / (right - left)
            elif centre < f < right:
                bands[m, k] = (right - f) / (right - centre) * 2 / (right - left)
    return bands


def reference(
    samples: np.ndarray, n_mels: int = 40, window: int = 256, hop: int = 128, rate: int = 8000
) -> np.ndarray:
    """The definition: each frame by itself, its Fourier sum as a matrix product."""
    n = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(window // 2 + 1), n) / window)
    bands = slaney_bands(n_mels, window, rate)
    frames = []
    for centre in range(0, len(samples) + 1, hop):
        where = centre - window // 2 + n
        inside = (where >= 0) & (where < len(samples))
        piece = np.where(inside, samples[np.clip(where, 0, len(samples) - 1)], 0.0)
        frames.append(np.log(bands @ np.abs(fourier @ (hann * piece)) ** 2 + 1e-8))
    return np.array(frames)


def sentence(error: pytest.ExceptionInfo[Exception], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"


# ---- waveforms ----


def test_frames_of_waveform_are_the_samples(tmp_path: Path) -> None:
    files = recordings()
    d = spoken_digits(archive(tmp_path / "fsdd.zip", files), frame=100)
    assert (d.kind, d.sample_rate, d.frame_seconds) == ("real", 8000, 100 / 8000)
    trained = [name for name in files if int(name.split("_")[-1][:-4]) >= 10]
    assert sorted(d.train.names) == sorted(Path(name).stem for name in trained)
    for i, name in enumerate(d.train.names):
        content = files[f"fsdd/recordings/{name}.wav"]
        samples = np.frombuffer(content[44:], "<i2")
        frames = samples[: len(samples) // 100 * 100].reshape(-1, 100)
        found = d.train.sequence(i).double().numpy() * d.std + d.mean
        np.testing.assert_allclose(found, frames, atol=0.01)
    every = np.concatenate([d.train.sequence(i).numpy().ravel() for i in range(len(d.train))])
    assert abs(every.mean()) < 1e-3 and abs(every.std() - 1) < 1e-3


def test_frames_longer_than_a_recording(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3_ann_0 has 739 samples, fewer than one frame of 800"):
        spoken_digits(archive(tmp_path / "fsdd.zip", recordings()), frame=800)


# ---- frames ----


@pytest.mark.parametrize("count", [1, 127, 128, 200, 256, 1000])
def test_frames_are_those_of_the_definition(count: int) -> None:
    samples = tone(count)
    frames = log_mel(samples)
    assert frames.shape == (1 + count // 128, 40)
    np.testing.assert_allclose(frames, reference(samples), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n_mels", "window", "hop"), [(20, 256, 100), (13, 512, 300)])
def test_frames_of_other_sizes_and_rates(n_mels: int, window: int, hop: int) -> None:
    samples = tone(2000)
    sizes = {"n_mels": n_mels, "window": window, "hop": hop}
    frames = log_mel(torch.tensor(samples), sample_rate=16_000, **sizes)
    expected = reference(samples, **sizes, rate=16_000)
    np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-5)


def test_silence_is_the_floor() -> None:
    np.testing.assert_allclose(log_mel(np.zeros(300)), np.log(1e-8), rtol=1e-12)


@pytest.mark.parametrize(
    ("samples", "options", "error", "words"),
    [
        (np.zeros((2, 3)), {}, ValueError, ["samples", "(S,)", "(2, 3)"]),
        (np.zeros(0), {}, ValueError, ["samples", "(0,)"]),
        ([0.0, np.nan], {}, ValueError, ["samples", "NaN"]),
        (["a"], {}, TypeError, ["samples", "real numbers"]),
        (np.zeros(9), {"n_mels": 160}, ValueError, ["n_mels", "160 bands", "5 are empty"]),
        (np.zeros(9), {"n_mels": 0}, ValueError, ["n_mels must be at least 1", "got 0"]),
        (np.zeros(9), {"window": 255}, ValueError, ["window", "even", "255"]),
        (np.zeros(9), {"hop": 0}, ValueError, ["hop must be at least 1", "got 0"]),
        (np.zeros(9), {"sample_rate": 0}, ValueError, ["sample_rate", "got 0"]),
    ],
)
def test_log_mel_names_what_is_wrong(
    samples: object, options: dict, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        log_mel(samples, **options)
    sentence(raised, *words)


# ---- back to sound ----


def test_a_waveform_has_nearly_the_frames_it_was_made_from() -> None:
    frames = log_mel(np.concatenate([tone(1536, 300.0), tone(1536, 1500.0)]))
    made = mel_to_waveform(torch.tensor(frames))
    assert made.dtype == np.float32 and made.shape == (128 * (len(frames) - 1),)
    loud = frames > frames.max() - 8  # 35 dB: what leaks between bands is softer
    loud[[0, -1]] = False  # these reach over the ends

    def off(waveform: np.ndarray) -> tuple[float, float]:
        error = (log_mel(waveform) - frames)[loud]
        return float(np.abs(np.median(error))), float(np.abs(error).mean())

    middle, mean = off(made)
    assert middle < 0.1 and mean < 1
    assert off(2 * made)[0] > 1  # planted: twice the amplitude, 2 log 2 in log power
    assert off(mel_to_waveform(frames[::-1]))[1] > 3  # planted: time runs backwards


def test_the_waveform_follows_its_seed_and_not_the_global_one() -> None:
    frames = log_mel(tone(600))
    before = np.random.get_state()[1].copy()
    first = mel_to_waveform(frames, seed=1, iterations=2)
    np.testing.assert_array_equal(first, mel_to_waveform(frames, seed=1, iterations=2))
    assert np.abs(first - mel_to_waveform(frames, seed=2, iterations=2)).max() > 1e-3
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_silent_and_overflowing_frames_give_finite_sound() -> None:
    assert not mel_to_waveform(np.full((5, 40), np.log(1e-8))).any()
    assert not mel_to_waveform(np.full((5, 40), -1e6)).any()
    wild = mel_to_waveform(np.full((5, 40), 1e6), iterations=2)
    assert np.isfinite(wild).all() and wild.any()


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (np.zeros(40), {}, ["frames", "(T, M)", "(40,)"]),
        (np.zeros((1, 40)), {}, ["at least 2 frames", "(1, 40)"]),
        (np.full((3, 40), np.inf), {}, ["frames", "finite"]),
        (np.zeros((3, 40)), {"hop": 200}, ["hop", "half the window of 256", "200"]),
        (np.zeros((3, 40)), {"iterations": 0}, ["iterations", "got 0"]),
        (np.zeros((3, 40)), {"seed": -1}, ["seed", "got -1"]),
        (np.zeros((3, 160)), {}, ["n_mels", "160 bands"]),
    ],
)
def test_mel_to_waveform_names_what_is_wrong(
    frames: np.ndarray, options: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError) as raised:
        mel_to_waveform(frames, **options)
    sentence(raised, *words)


# ---- the reader ----


def test_splits_names_and_standardised_frames(tmp_path: Path) -> None:
    files = recordings()
    data = spoken_digits(archive(tmp_path / "a.zip", files))
    assert data.kind == "real" and data.frame_seconds == 0.016 and data.sample_rate is None
    assert "CC BY-SA 4.0" in data.origin and data.x_dim == 40
    takes = {"train": {10, 49}, "valid": {5, 9}, "test": {0, 4}}
    frames = {}
    for split, expected in takes.items():
        part = getattr(data, split)
        digits, speakers = labels(part)
        assert len(part) == 8 and {int(n.split("_")[2]) for n in part.names} == expected
        assert digits.tolist() == [3] * 4 + [8] * 4 and set(speakers) == {"ann", "bob"}
        for i, name in enumerate(part.names):
            content = files[f"fsdd/recordings/{name}.wav"]
            raw = reference(np.frombuffer(content[44:], "<i2") / 32768)
            frames[split, name] = raw
            assert part.sequence(i).shape == raw.shape
            found = part.sequence(i) * data.std + data.mean
            np.testing.assert_allclose(found, raw, rtol=0, atol=1e-5)
    train = np.concatenate([raw for (split, _), raw in frames.items() if split == "train"])
    np.testing.assert_allclose(data.mean, train.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(data.std, train.std(axis=0), rtol=1e-5)


def test_a_folder_is_read_as_its_archive(tmp_path: Path) -> None:
    files = recordings()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fsdd" / "recordings" / "._3_ann_0.wav").write_bytes(b"no audio, and no matter")
    first = spoken_digits(archive(tmp_path / "a.zip", files), n_mels=20, window=512, hop=200)
    second = spoken_digits(tmp_path / "fsdd" / "recordings", n_mels=20, window=512, hop=200)
    assert first.frame_seconds == 0.025 and first.test.names == second.test.names
    torch.testing.assert_close(first.test.x, second.test.x, rtol=0, atol=0)


def test_the_whole_set(data_folder: Path) -> None:
    path = data_folder / "fsdd.zip"
    if not path.exists():
        pytest.skip(f"fsdd.zip is not in {data_folder}")
    data = spoken_digits(path)
    assert (len(data.train), len(data.valid), len(data.test)) == (2400, 300, 300)
    frames = sum(part.num_frames for part in (data.train, data.valid, data.test))
    # the sum of 1 + S // 128 lies between S / 128 and S / 128 + N
    assert 10_498_424 / 128 < frames <= 10_498_424 / 128 + 3000
    observed = data.train.x[data.train.mask].double()
    torch.testing.assert_close(observed.mean(dim=0), torch.zeros(40), rtol=0, atol=1e-5)
    torch.testing.assert_close(observed.std(dim=0), torch.ones(40), rtol=1e-4, atol=0)
    for part, takes in ((data.train, 40), (data.valid, 5), (data.test, 5)):
        digits, speakers = labels(part)
        assert np.bincount(digits).tolist() == [6 * takes] * 10
        assert np.unique(speakers, return_counts=True)[1].tolist() == [10 * takes] * 6


def test_labels_refuse_other_names() -> None:
    with pytest.raises(ValueError) as raised:
        labels(Sequences.from_list([[[0.0]]], ["theo_7"]))
    sentence(raised, "DIGIT_SPEAKER_TAKE", "'theo_7'")


SAMPLES = int16(tone(500))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not audio", "16-bit"]),
        (b"RIFFxxxx", ["not audio", "16-bit"]),
        (wav(SAMPLES)[:30], ["not audio"]),
        (wav(SAMPLES)[:-100], ["cut short", "944 bytes", "declares 1044"]),
        (wav(SAMPLES, rate=16_000), ["16000 Hz", "expected 16-bit", "8000"]),
        (wav(SAMPLES, channels=2), ["2 channel(s)"]),
        (wav(SAMPLES, width=1), ["PCM_U8", "expected 16-bit"]),
        (wav(SAMPLES[:0]), ["no samples"]),
        (wav(np.zeros(2**20, "<i2")), ["2097196 bytes", "more than 1048576"]),
    ],
)
def test_the_reader_names_the_bad_recording(
    tmp_path: Path, content: bytes, words: list[str]
) -> None:
    name = "recordings/3_ann_4.wav"
    with pytest.raises(ValueError) as raised:
        spoken_digits(archive(tmp_path / "a.zip", {name: content}))
    sentence(raised, "a.zip", name, *words)
    (tmp_path / "recordings").mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        spoken_digits(tmp_path)
    sentence(raised, name, *words)


def no_such(path: Path) -> Path:
    return path / "none.zip"


def text(path: Path) -> Path:
    (path / "a.zip").write_text("not a zip")
    return path / "a.zip"


def empty(path: Path) -> Path:
    (path / "a.zip").write_bytes(b"")
    return path / "a.zip"


def nothing(path: Path) -> Path:
    return path


def other(path: Path) -> Path:
    return archive(path / "a.zip", {"recordings/readme.wav": wav(SAMPLES)})


def one_split(path: Path) -> Path:
    return archive(path / "a.zip", {"3_ann_4.wav": wav(SAMPLES), "3_ann_14.wav": wav(SAMPLES)})


def twice(path: Path) -> Path:
    return archive(path / "a.zip", {"a/3_ann_4.wav": wav(SAMPLES), "b/3_ann_4.wav": wav(SAMPLES)})


def damaged(path: Path) -> Path:
    made = archive(path / "a.zip", {"3_ann_4.wav": wav(SAMPLES)})
    content = bytearray(made.read_bytes())
    content[200:260] = bytes(60)
    made.write_bytes(content)
    return made


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (no_such, FileNotFoundError, ["none.zip does not exist", "recordings/DIGIT_SPEAKER"]),
        (text, ValueError, ["a.zip", "cannot be read as a .zip archive"]),
        (empty, ValueError, ["a.zip is an empty file"]),
        (nothing, ValueError, ["no recordings", "recordings/DIGIT_SPEAKER_TAKE.wav"]),
        (other, ValueError, ["no recordings"]),
        (one_split, ValueError, ["each split needs", "'train': 1, 'valid': 0"]),
        (twice, ValueError, ["'3_ann_4' is there twice"]),
        (damaged, ValueError, ["3_ann_4.wav", "cannot be read as a file"]),
    ],
)
def test_the_reader_refuses_other_files(
    tmp_path: Path, make: Callable[[Path], Path], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        spoken_digits(make(tmp_path))
    sentence(raised, *words)


def test_the_reader_says_how_to_get_librosa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ImportError) as raised:
        spoken_digits(archive(tmp_path / "a.zip", recordings()))
    sentence(raised, "pip install pyro-avrnn[audio]")
