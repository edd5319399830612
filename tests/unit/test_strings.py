"""Strings of digits, sprites, log-mel frames of corpora, and the warp of mel bands."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_avrnn.data import (
    Dataset,
    MelWarp,
    Sequences,
    digit_strings,
    load,
    log_mel,
    sprites,
    timit,
)
from pyro_avrnn.data.sprites import ACTIONS, ATTRIBUTES, sprite_labels
from pyro_avrnn.data.strings import string_labels
from tests.unit.corpora import by_region, zip_of

# ---- strings ----


def recordings(speakers: int = 2, each: int = 7) -> Dataset:
    """Frames of a recording hold its digit and its take."""
    items, names = [], []
    for who in range(speakers):
        for take in range(each):
            digit = (take + who) % 10
            items.append(np.tile([[digit, take]], (2 + take % 3, 1)))
            names.append(f"{digit}_who{who}_{take}")
    part = Sequences.from_list(items, names)
    return Dataset("digits", part, part, part, frame_seconds=0.016)


def test_strings_are_recordings_of_one_speaker_each_in_one() -> None:
    data = recordings()
    joined = digit_strings(data, 2, 3, repeats=2, seed=1).train
    of = string_labels(joined)
    used = [name.split(":")[0] for string in joined.names for name in string.split("+")]
    assert max(used.count(name) for name in data.train.names) == 2  # of two repeats
    assert len(used) >= 2 * (len(data.train) - 2)  # a rest of one is left out
    frames = of.of_frames(joined.mask)
    for i, (who, digits, ends) in enumerate(zip(of.speakers, of.digits, of.ends, strict=True)):
        assert 2 <= len(digits) <= 3
        assert all(f"_{who}_" in part for part in joined.names[i].split("+"))
        assert ends[-1] == len(joined.sequence(i))
        for digit, start, end in zip(digits, [0, *ends], ends, strict=False):
            assert (joined.sequence(i)[start:end, 0] == digit).all()
            assert (frames[i, start:end] == digit).all()
        assert (frames[i, ends[-1] :] == -1).all()


def test_strings_depend_on_the_seed_alone() -> None:
    names = [digit_strings(recordings(), seed=s).train.names for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"least": 5, "most": 4}, "most must be at least as large as least"),
        ({"least": 9, "most": 9}, "train must have a speaker with 9 recordings"),
        ({"least": 0}, "least must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_strings_name_what_is_wrong(options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        digit_strings(recordings(), **options)


@pytest.mark.parametrize("name", ["3_theo_1", "3_theo_1:4+2_lucas_1:5", "3_theo_1:x"])
def test_names_that_are_no_strings(name: str) -> None:
    with pytest.raises(ValueError, match="names such as '3_theo_12:31"):
        string_labels(Sequences.from_list([[[0.0]]], [name]))


# ---- log-mel frames ----


def test_log_mel_frames_of_a_corpus_are_those_of_its_samples(tmp_path: Path) -> None:
    folder = zip_of(tmp_path / "timit.zip", by_region())
    data, waves = timit(folder, n_mels=20, segment=None), timit(folder, segment=None, frame=1)
    name = data.train.names[0]
    samples = waves.train.sequence(waves.train.names.index(name))[:, 0] * waves.std + waves.mean
    expected = log_mel(
        samples.double() / 32768.0, sample_rate=16_000, n_mels=20, window=400, hop=160
    )
    found = data.train.sequence(0) * data.std + data.mean
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert data.frame_seconds == 0.01
    frames = data.train.x[data.train.mask]
    np.testing.assert_allclose(frames.mean(dim=0), 0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_mels": 20, "pcm": 16}, "n_mels makes log-mel frames"),
        ({"n_mels": 20, "frame": 100}, "n_mels makes log-mel frames"),
        ({"warp": 0.1}, "warp is for log-mel frames"),
        ({"n_mels": 0}, "n_mels must be at least 1"),
    ],
)
def test_framing_names_what_is_wrong(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        timit(zip_of(tmp_path / "timit.zip", by_region()), **options)


def test_a_warp_moves_a_peak_and_no_warp_moves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    bands = torch.arange(40.0)
    raw = torch.exp(-((bands - 20.0) ** 2) / 8.0).expand(3, 40)
    mean, std = 0.1 * bands, 1.0 + 0.01 * bands
    piece = (raw - mean) / std
    still = MelWarp(0.0, mean, std)(piece, generator)
    torch.testing.assert_close(still, piece)
    peaks = []
    for _ in range(200):
        warped = MelWarp(0.18, mean, std)(piece, generator) * std + mean
        peaks.append(int(warped[0].argmax()))
    assert min(peaks) >= 16  # 20 / exp(0.18)
    assert max(peaks) <= 24
    assert len({*peaks}) > 5
    with pytest.raises(ValueError, match="limit must be at least 0"):
        MelWarp(-0.1, mean, std)


# ---- sprites ----


@pytest.fixture(scope="module")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sheets whose tiles tell their row and column, and a layer its kind and number."""
    path: Path = tmp_path_factory.mktemp("sprites") / "sheets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k, kind in enumerate((*ATTRIBUTES, "shoes")):
            for i in range(6):
                sheet = np.zeros((1344, 832, 4), dtype=np.uint8)
                tiles = sheet.reshape(21, 64, 13, 64, 4).transpose(0, 2, 1, 3, 4)
                stripe = slice(8 * k, 8 * k + 8)
                tiles[:, :, stripe, :32, 0] = 40 * i + 10
                tiles[:, :, stripe, :32, 1] = (10 * np.arange(21))[:, None, None, None]
                tiles[:, :, stripe, :32, 2] = (10 * np.arange(13))[:, None, None]
                tiles[:, :, stripe, :32, 3] = 255
                content = io.BytesIO()
                Image.fromarray(sheet).save(content, format="PNG")
                archive.writestr(f"sprites/{kind}/{i}.png", content.getvalue())
    return path


def test_sprites_are_composed_of_their_layers(sheets: Path) -> None:
    data = load(sheets, side=32, characters=(3, 1, 1))
    assert data.name == "sprites"
    assert data.train.x.shape == (27, 8, 3 * 32 * 32)
    of = sprite_labels(data.train)
    videos = data.train.x.view(27, 8, 3, 32, 32) * 255
    for k, kind in enumerate(ATTRIBUTES):
        shown = videos[:, 0, 0, 4 * k + 1, 1]
        torch.testing.assert_close(shown, torch.as_tensor(40.0 * of[kind] + 10).to(shown))
    shoes = videos[:, 0, 0, 4 * 4 + 1, 1]
    torch.testing.assert_close(shoes, torch.full_like(shoes, 50.0))  # number 1 of them
    walk = videos[0, :, 1:, 1, 1]  # rows and columns of the sheet
    assert walk[:, 0].tolist() == [100.0] * 8
    assert walk[:, 1].tolist() == [80.0, 10, 20, 30, 40, 50, 60, 70]
    rows = videos[:9, 0, 1, 1, 1] / 10
    assert rows.tolist() == [10.0, 9, 11, 2, 1, 3, 14, 13, 15]
    columns = videos[[3, 8], :, 2, 1, 1] / 10
    assert columns.tolist() == [[0.0, 1, 2, 3, 4, 5, 4, 6], [0.0, 1, 2, 3, 4, 5, 4, 0]]
    assert of["action"].tolist() == [*range(9)] * 3
    assert len(ACTIONS) == 9
    order = np.random.RandomState(423).permutation(1296)
    assert data.train.names[0] == "".join(str(order[0] // 6**p % 6) for p in (3, 2, 1, 0)) + "_0"
    assert data.test.names[0][:4] == "".join(str(order[1000] // 6**p % 6) for p in (3, 2, 1, 0))


def test_sprites_name_what_is_wrong(sheets: Path, tmp_path: Path) -> None:
    for options, says in (
        ({"side": 48}, "side must divide 64"),
        ({"characters": (1000, 1, 1)}, "characters must be three numbers"),
    ):
        with pytest.raises(ValueError, match=says):
            sprites(sheets, **options)  # type: ignore[arg-type]
    small, missing = tmp_path / "small.zip", tmp_path / "missing.zip"
    with zipfile.ZipFile(sheets) as archive, zipfile.ZipFile(missing, "w") as left:
        for name in archive.namelist():
            if "hair/3" not in name:
                left.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match=r"there is no hair/3\.png"):
        sprites(missing)
    content = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(content, format="PNG")
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("body/0.png", content.getvalue())
    with pytest.raises(ValueError, match="it must have .* pixels"):
        sprites(small)
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("body/0.png", b"no picture")
    with pytest.raises(ValueError, match="cannot be read as a sheet in PNG"):
        sprites(small)
    with pytest.raises(ValueError, match="names such as '0312_7'"):
        sprite_labels(Sequences.from_list([[[0.0]]], ["x"]))
