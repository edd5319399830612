"""Data: facts about the real sets, every bad input, batches, padding."""

import io
import os
import sys
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_avrnn.data import (
    Batches,
    Dataset,
    Sequences,
    independent_baseline,
    load,
    npz,
    piano_rolls,
    timit,
    vowels,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared() -> Callable[[str], Path]:
    """Path to a shared data file; skips the test where it is not there."""
    folder = Path(os.environ.get("PYRO_AVRNN_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"{name} is not in {folder}; set PYRO_AVRNN_DATA to the folder with it")
        return folder / name

    return find


@pytest.fixture(scope="module")
def speech(shared: Callable[[str], Path]) -> Dataset:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    return timit(shared("timit.zip"))


def ragged(lengths: list[int], x_dim: int = 2) -> list[torch.Tensor]:
    """Sequences whose values say where they come from: 100 * sequence + step + 1."""
    return [
        (100.0 * i + torch.arange(1, length + 1))[:, None].repeat(1, x_dim)
        for i, length in enumerate(lengths)
    ]


def sentence(error: pytest.ExceptionInfo[Exception], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"


def wav_bytes(samples: int = 1000, rate: int = 16_000, channels: int = 1, width: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        wobble = np.arange(samples * channels) * 7919 % 2001 - 1000
        file.writeframes(wobble.astype("<i2" if width == 2 else "u1").tobytes())
    return buffer.getvalue()


# ---- sequences ----


def test_from_list_pads_with_zeros_after_a_prefix_mask() -> None:
    items = ragged([3, 1, 2])
    data = Sequences.from_list([items[0], items[1].numpy(), items[2].tolist()], names="abc")
    assert data.x.dtype == torch.float32 and data.x.shape == (3, 3, 2) and len(data) == 3
    assert data.names == ("a", "b", "c") and data.num_frames == 6 and data.x_dim == 2
    assert data.lengths.tolist() == [3, 1, 2]
    assert (data.x[~data.mask] == 0).all()
    for i, item in enumerate(items):
        torch.testing.assert_close(data.sequence(i), item.float(), rtol=0, atol=0)


def test_select_cuts_to_the_longest_and_keeps_names() -> None:
    data = Sequences.from_list(ragged([5, 1, 3])).select([2, 1])
    assert data.x.shape == (2, 3, 2) and data.names == ("2", "1")
    assert data.lengths.tolist() == [3, 1] and data.x[0, 0, 0] == 201
    assert data.to(dtype=torch.float64).x.dtype == torch.float64


@pytest.mark.parametrize("indices", [[], [3], [-1]])
def test_select_refuses_indices_outside(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 2"):
        Sequences.from_list(ragged([1, 2, 3])).select(indices)


def test_select_refuses_a_mask() -> None:
    with pytest.raises(TypeError, match="integers"):
        Sequences.from_list(ragged([1, 2])).select([True, False])


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], ["at least one"]),
        ([np.zeros((2, 3)), np.zeros((2, 4))], ["sequence 1 ('1')", "4 features", "has 3"]),
        ([np.zeros((2, 3)), np.zeros((0, 3))], ["sequence 1 ('1')", "length 0"]),
        ([np.zeros(4)], ["sequence 0", "(T, X)", "(4,)"]),
        ([np.zeros((4, 0))], ["(T, X)", "(4, 0)"]),
        ([[[1.0], [1.0, 2.0]]], ["sequence 0", "unequal"]),
        ([[["a"]]], ["real numbers"]),
        ([torch.zeros(2, 2, dtype=torch.complex64)], ["real numbers", "complex64"]),
        ([np.ones((2, 2)), [[0, 0], [0, np.nan]]], ["sequence 1 ('1')", "frame 1"]),
        ([[[0.0], [0.0], [np.inf]]], ["sequence 0 ('0')", "frame 2"]),
        ([np.full((1, 1), 1e300)], ["infinity in frame 0"]),
    ],
)
def test_from_list_names_what_is_wrong(items: list, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Sequences.from_list(items)
    sentence(error, *words)


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (torch.zeros(1, 2), torch.ones(1, 2).bool(), "(N, T, X)"),
        (torch.zeros(1, 2, 1), torch.ones(1, 2), "bool"),
        (torch.zeros(1, 2, 1), torch.tensor([[False, True]]), "gap"),
        (torch.zeros(1, 2, 1), torch.tensor([[False, False]]), "first step"),
        (torch.ones(1, 2, 1), torch.tensor([[True, False]]), "padding"),
    ],
)
def test_sequences_refuses_parts_that_do_not_fit(
    x: torch.Tensor, mask: torch.Tensor, words: str
) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Sequences(x, mask, ("a",))
    sentence(error, words)
    with pytest.raises(ValueError, match="names"):
        Sequences.from_list(ragged([1, 2]), names=["a"])


# ---- batches ----


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_epoch_covers_each_sequence_exactly_once(batch_size: int, bucket: bool) -> None:
    lengths = [1 + 7 * i % 11 for i in range(50)]
    data = Sequences.from_list(ragged(lengths))
    batches = Batches(data, batch_size, bucket=bucket)
    seen = []
    for x, mask in batches:
        assert x.shape[:2] == mask.shape and mask[:, -1].any() and (x[~mask] == 0).all()
        for row, observed in zip(x, mask, strict=True):
            i = int(row[0, 0]) // 100
            seen.append(i)
            torch.testing.assert_close(row[observed], data.sequence(i), rtol=0, atol=0)
    assert sorted(seen) == list(range(50))
    assert len(batches) == len(list(batches)) == -(-50 // batch_size)


def test_buckets_save_padding() -> None:
    data = Sequences.from_list(ragged([1 + 13 * i % 29 for i in range(200)]))
    plain, bucketed = (
        sum(mask.numel() for _, mask in Batches(data, 8, bucket=b)) for b in (False, True)
    )
    assert data.num_frames <= bucketed < 0.75 * plain


def test_batches_follow_seed_and_epoch_only() -> None:
    data = Sequences.from_list(ragged(list(range(1, 41))))

    def order(batches: Batches) -> list[float]:
        return [float(v) for x, _ in batches for v in x[:, 0, 0]]

    batches = Batches(data, 4, seed=3)
    before = torch.get_rng_state()
    first, second = order(batches), order(batches)
    assert torch.equal(before, torch.get_rng_state())
    again, other = Batches(data, 4, seed=3), Batches(data, 4, seed=4)
    assert [order(again), order(again)] == [first, second]
    assert len({tuple(o) for o in (first, second, order(other), order(other))}) == 4
    again.epoch = 1
    assert order(again) == second


def test_batches_refuse_bad_arguments() -> None:
    data = Sequences.from_list(ragged([1, 2]))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(data, 0)
    with pytest.raises(ValueError, match="seed"):
        Batches(data, 1, seed=-1)


# ---- vowels ----


def test_vowels_is_the_official_set_with_every_ninth_held_out() -> None:
    data = load("vowels")
    assert (len(data.train), len(data.valid), len(data.test)) == (240, 30, 370)
    assert data.x_dim == 12 and data.kind == "real" and data.train.x.dtype == torch.float32
    assert sum(s.num_frames for s in (data.train, data.valid, data.test)) == 9961
    assert min(s.lengths.min() for s in (data.train, data.test)) == 7
    assert data.test.lengths.max() == 29
    held = [name.split("/")[0] for name in data.valid.names]
    assert [held.count(f"speaker{k}") for k in range(1, 10)] == [3, 3, 4] * 3
    names = data.train.names + data.valid.names + data.test.names
    assert len(set(names)) == 640
    assert "CC BY 4.0" in data.origin and "Kudo" in data.origin
    again = vowels()
    assert torch.equal(again.train.x, data.train.x) and again.valid.names == data.valid.names


def test_vowels_is_standardised_by_its_training_frames() -> None:
    frames = (data := vowels()).train.x[data.train.mask].double()
    torch.testing.assert_close(frames.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        frames.std(0, correction=0), torch.ones(12).double(), rtol=0, atol=1e-6
    )
    assert independent_baseline(data) == pytest.approx(-17.0939, abs=1e-4)


def test_vowels_equals_the_published_text(shared: Callable[[str], Path]) -> None:
    data = vowels()
    with zipfile.ZipFile(shared("JapaneseVowels.zip")) as archive:
        text = archive.read("JapaneseVowels/JapaneseVowels_TEST.ts").decode()
    lines = text.split("@data\n")[1].splitlines()
    assert len(lines) == len(data.test)
    for i, line in enumerate(lines):
        *dims, speaker = line.split(":")
        raw = torch.tensor([[float(v) for v in d.split(",")] for d in dims], dtype=torch.float32).T
        assert data.test.names[i].startswith(f"speaker{speaker}/")
        torch.testing.assert_close(
            data.test.sequence(i) * data.std + data.mean, raw, rtol=0, atol=1e-6
        )


# ---- TIMIT ----


def test_timit_counts_and_splits(speech: Dataset) -> None:
    splits = (speech.train, speech.valid, speech.test)
    speakers = [{name.split("/")[0] for name in s.names} for s in splits]
    assert [len(s) for s in speakers] == [12, 2, 2]
    assert not (
        speakers[0] & speakers[1] or speakers[1] & speakers[2] or speakers[0] & speakers[2]
    )
    assert [s.num_frames for s in splits] == [29_411, 5_002, 4_710]  # 39,123 frames in all
    assert speech.x_dim == 200 and speech.train.x.shape[1] == 100 and speech.sample_rate == 16_000
    assert speech.frame_seconds == 0.0125
    assert (speech.mean, speech.std) == pytest.approx((0.00608, 566.725), abs=1e-3)
    frames = speech.train.x[speech.train.mask].double()
    assert float(frames.mean()) == pytest.approx(0, abs=1e-6)
    assert float(frames.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert independent_baseline(speech) == pytest.approx(-260.937, abs=1e-2)


def test_timit_reads_the_sphere_file_and_whole_utterances(
    shared: Callable[[str], Path], speech: Dataset
) -> None:
    whole = timit(shared("timit.zip"), segment=None)
    assert len(whole.train) + len(whole.valid) + len(whole.test) == 160
    i = whole.train.names.index("dr1-fvmh0/si836")
    assert whole.train.lengths[i] == 68_813 // 200
    with zipfile.ZipFile(shared("timit.zip")) as archive:
        raw = np.frombuffer(archive.read("timit/dr1-fvmh0/si836.wav")[1024:], "<i2")
    back = whole.train.sequence(i).double() * whole.std + whole.mean
    np.testing.assert_allclose(back.reshape(-1).numpy(), raw[: len(raw) // 200 * 200], atol=1e-3)
    pieces = [
        s for s, name in enumerate(speech.train.names) if name.startswith("dr1-fvmh0/si836[")
    ]
    joined = torch.cat([speech.train.sequence(s) for s in pieces])
    assert torch.equal(joined, whole.train.sequence(i))


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def flat() -> dict[str, bytes]:
    return {f"timit/dr{r}-fabc{r}/sa1.wav": wav_bytes(1000 + r) for r in (1, 7, 8)}


@pytest.mark.parametrize("upper", [True, False])
def test_timit_reads_the_ldc_layout_from_a_folder_and_a_zip(tmp_path: Path, upper: bool) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    names = ["train/dr1/fabc0/sa1.wav", "train/dr8/mabc0/sx3.wav", "test/dr1/fxyz0/sa1.wav"]
    files = {(n.upper() if upper else n): wav_bytes(1000) for n in names}
    folder = tree(tmp_path / "corpus", files | {"train/dr1/fabc0/sa1.txt": b"words"})
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"../{name}", content)  # a hostile path is matched, never written
    for path in (folder, tmp_path / "corpus.zip"):
        data = load(path, frame=300, segment=2)
        assert data.train.names == ("dr1-fabc0/sa1[0:2]", "dr1-fabc0/sa1[2:3]")
        assert data.valid.names[0] == "dr8-mabc0/sx3[0:2]"
        assert data.test.names[0] == "dr1-fxyz0/sa1[0:2]"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "corpus.zip"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("timit/dr1-fabc1/sa2.wav", wav_bytes(rate=8000), ["sa2.wav", "8000 Hz", "16000 Hz"]),
        ("timit/dr1-fabc1/sa2.wav", wav_bytes(channels=2), ["2 channel", "mono"]),
        ("timit/dr1-fabc1/sa2.wav", wav_bytes(width=1), ["PCM_U8", "16-bit"]),
        ("timit/dr1-fabc1/sa2.wav", wav_bytes()[:900], ["sa2.wav", "cut short", 900]),
        ("timit/dr1-fabc1/sa2.wav", wav_bytes()[:30], ["sa2.wav", "not audio"]),
        ("timit/dr1-fabc1/sa2.wav", b"", ["sa2.wav", "not audio"]),
        ("timit/dr1-fabc1/sa2.wav", b"hello" * 99, ["sa2.wav", "not audio"]),
        ("timit/dr1-fabc1/sa2.wav", wav_bytes(150), ["dr1-fabc1/sa2", "150 samples", "200"]),
        ("copy/dr1-fabc1/sa1.wav", wav_bytes(), ["twice", "dr1-fabc1/sa1"]),
        ("test/dr1/fabc1/sx1.wav", wav_bytes(), ["fabc1", "share no speaker"]),
    ],
)
def test_timit_names_the_bad_file(
    tmp_path: Path, name: str, content: bytes, words: list[object]
) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    folder = tree(tmp_path / "corpus", flat() | {name: content})
    with pytest.raises(ValueError) as error:
        timit(folder)
    sentence(error, folder, *words)


def test_timit_refuses_paths_without_the_corpus(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    with pytest.raises(FileNotFoundError) as missing:
        load(tmp_path / "no.zip")
    sentence(missing, "no.zip", "does not exist")
    with pytest.raises(ValueError) as error:
        timit(tree(tmp_path / "empty", {"a.txt": b""}))
    sentence(error, "no recordings", "dr1-SPEAKER")
    with pytest.raises(ValueError) as error:
        timit(tree(tmp_path / "part", {"dr1-fabc0/sa1.wav": wav_bytes()}))
    sentence(error, "each split needs", "'valid': 0", "dialect regions")
    with pytest.raises(ValueError, match="frame must be at least 1, got 0"):
        timit(tmp_path, frame=0)
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        timit(tmp_path, segment=0)


def test_timit_refuses_damaged_zips(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in flat().items():
            archive.writestr(name, content)
    good = path.read_bytes()
    for content, words in [
        (good[:500], ["t.zip", "BadZipFile"]),
        (b"", ["t.zip", "empty file"]),
        (b"hello" * 99, ["t.zip", "BadZipFile"]),
        (good[:200] + b"\xff" * 20 + good[220:], ["dr1-fabc1/sa1.wav", "damaged"]),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            timit(path)
        sentence(error, *words)


def test_timit_says_how_to_get_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError) as error:
        timit(tree(tmp_path, flat()))
    sentence(error, "pip install pyro-avrnn[audio]")


# ---- piano rolls ----


def test_jsb_chorales_counts_and_baseline(shared: Callable[[str], Path]) -> None:
    data = load(shared("JSB_Chorales.mat"))
    assert (len(data.train), len(data.valid), len(data.test)) == (229, 76, 77)
    frames = [s.num_frames for s in (data.train, data.valid, data.test)]
    assert frames == [13_807, 4_602, 4_725] and data.x_dim == 88
    assert data.kind == "binary" and (data.mean, data.std) == (0.0, 1.0)
    assert set(data.train.x.unique().tolist()) == {0.0, 1.0}
    assert (int(data.train.lengths.min()), int(data.train.lengths.max())) == (25, 129)
    assert independent_baseline(data) == pytest.approx(-11.0614, abs=1e-4)


def cells(*rolls: np.ndarray) -> np.ndarray:
    array = np.empty((1, len(rolls)), dtype=object)
    array[0, :] = rolls
    return array


def savemat(path: Path, **changes: object) -> Path:
    from scipy.io import savemat as save

    roll = np.eye(4, dtype="uint8")
    content = {f"{k}data": cells(roll, roll[:2]) for k in ("train", "valid", "test")} | changes
    save(path, {k: v for k, v in content.items() if v is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validdata": None}, ["validdata", "found testdata, traindata"]),
        ({"validdata": np.zeros((4, 4))}, ["validdata", "cell array", "float64"]),
        ({"testdata": cells(np.eye(4), 2 * np.eye(4))}, ["testdata", "sequence 1", "0 to 2"]),
        ({"testdata": cells(np.eye(4), np.eye(3))}, ["testdata", "sequence 1", "3 features"]),
        ({"testdata": cells(np.full((2, 4), np.nan))}, ["testdata", "frame 0"]),
        ({"testdata": cells(np.zeros((0, 4)), np.eye(4))}, ["testdata", "length 0"]),
        ({"testdata": cells()}, ["testdata", "at least one"]),
        ({"testdata": cells(np.eye(3))}, ["features", "'test': 3"]),
    ],
)
def test_piano_rolls_name_what_is_wrong(
    tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    assert len(piano_rolls(savemat(tmp_path / "good.mat")).train) == 2
    path = savemat(tmp_path / "rolls.mat", **changes)
    with pytest.raises(ValueError) as error:
        piano_rolls(path)
    sentence(error, path, *words)


def test_piano_rolls_refuse_damaged_files(tmp_path: Path) -> None:
    path = savemat(tmp_path / "rolls.mat")
    good = path.read_bytes()
    for content in (b"", good[:60], good[:300], b"hello" * 99, bytes(500)):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load(path)
        sentence(error, path, "traindata")
    with pytest.raises(FileNotFoundError, match="no.mat does not exist"):
        load(tmp_path / "no.mat")


def rolls(lengths: tuple[int, ...], keys: int = 4) -> np.ndarray:
    """Rolls of 0 and 1 that differ at every step: the binary digits of a running number."""
    starts = np.cumsum([1, *lengths])
    counted = [np.arange(a, a + n)[:, None] for a, n in zip(starts, lengths, strict=False)]
    return cells(*(((number >> np.arange(keys)) & 1).astype("uint8") for number in counted))


@pytest.mark.parametrize("segment", [1, 2, 3, 4, 7, 100])
def test_training_rolls_are_cut_into_segments_and_no_others(tmp_path: Path, segment: int) -> None:
    lengths = (7, 1, 3, 4)
    path = savemat(
        tmp_path / "rolls.mat",
        traindata=rolls(lengths),
        validdata=rolls((5, 2)),
        testdata=rolls((6,)),
    )
    whole, cut = piano_rolls(path), load(path, segment=segment)
    pieces = [list(range(0, n, segment)) for n in lengths]
    assert cut.train.names == tuple(
        f"train-{i}.{j}" for i, starts in enumerate(pieces) for j in range(len(starts))
    )
    assert cut.train.lengths.tolist() == [
        min(segment, n - a) for n, starts in zip(lengths, pieces, strict=True) for a in starts
    ]
    assert cut.train.num_frames == whole.train.num_frames == sum(lengths)

    def frames(dataset: Dataset) -> torch.Tensor:
        return torch.cat([dataset.train.sequence(i) for i in range(len(dataset.train))])

    assert torch.equal(frames(cut), frames(whole))  # all of them, in their order
    for a, b in ((cut.valid, whole.valid), (cut.test, whole.test)):
        assert torch.equal(a.x, b.x) and torch.equal(a.mask, b.mask) and a.names == b.names
    assert independent_baseline(cut) == pytest.approx(independent_baseline(whole), rel=1e-6)
    assert (cut.kind, cut.name, cut.origin) == (whole.kind, whole.name, whole.origin)


def test_jsb_chorales_in_segments(shared: Callable[[str], Path]) -> None:
    data = load(shared("JSB_Chorales.mat"), segment=50)
    assert [s.num_frames for s in (data.train, data.valid, data.test)] == [13_807, 4_602, 4_725]
    assert len(data.train) > 229 and int(data.train.lengths.max()) == 50
    assert (len(data.valid), len(data.test)) == (76, 77)


@pytest.mark.parametrize("segment", [0, -5])
def test_a_segment_holds_a_step(tmp_path: Path, segment: int) -> None:
    for path in (savemat(tmp_path / "rolls.mat"), tmp_path / "no.mat"):
        with pytest.raises(ValueError) as error:
            piano_rolls(path, segment=segment)
        sentence(error, f"segment must be at least 1, got {segment}")


# ---- npz ----

REAL = np.arange(60.0).reshape(10, 3, 2)


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_standardises_by_training_and_splits_in_a_fixed_way(tmp_path: Path) -> None:
    constant = np.concatenate([REAL, np.full((10, 3, 1), 0.1)], axis=-1)
    data = load(save(tmp_path / "mine.npz", x=constant))
    assert (data.name, data.kind, data.x_dim) == ("mine", "real", 3)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [8, 1, 1]
    names = data.train.names + data.valid.names + data.test.names
    assert sorted(names) == [f"x[{i}]" for i in range(10)]
    assert data.valid.names == npz(tmp_path / "mine.npz").valid.names == ("x[2]",)
    frames = data.train.x[data.train.mask]
    assert frames.dtype == torch.float32 and (frames[:, 2] == 0).all()
    torch.testing.assert_close(frames.std(0, correction=0)[:2], torch.ones(2).float())
    assert float(data.std[2]) == 1
    with pytest.raises(ValueError, match="dimension 2 .* constant"):
        independent_baseline(data)


def test_a_channel_constant_to_round_off_has_no_baseline(tmp_path: Path) -> None:
    almost = np.full((10, 3, 1), 0.3)
    almost[0, 0] = 0.1 + 0.2
    assert (almost != 0.3).any()
    data = load(save(tmp_path / "mine.npz", x=np.concatenate([REAL, almost], axis=-1)))
    with pytest.raises(ValueError, match="dimension 2 .* constant"):
        independent_baseline(data)


def test_npz_layouts_agree(tmp_path: Path) -> None:
    lengths = np.array([3, 1, 2] + 7 * [3], dtype="uint64")
    split = np.array(["train"] * 6 + ["valid"] * 2 + ["test"] * 2)
    padded = np.where(np.arange(3)[:, None] < lengths[:, None, None], REAL, np.nan)
    joined = np.concatenate([row[: int(n)] for row, n in zip(REAL, lengths, strict=True)])
    codes = np.repeat([0, 1, 2], [6, 2, 2])
    one = npz(save(tmp_path / "a.npz", x=padded, lengths=lengths, split=split))
    two = npz(save(tmp_path / "b.npz", x=joined, lengths=lengths, split=split.astype("S")))
    three = npz(save(tmp_path / "c.npz", x=joined, lengths=lengths.astype("i2"), split=codes))
    for other in (two, three):
        for k in ("train", "valid", "test"):
            assert torch.equal(getattr(one, k).x, getattr(other, k).x)
            assert torch.equal(getattr(one, k).mask, getattr(other, k).mask)
    assert one.train.lengths.tolist() == [3, 1, 2, 3, 3, 3]


def test_npz_of_zeros_and_ones_is_binary_and_untouched(tmp_path: Path) -> None:
    x = REAL.astype(int) // 7 % 2
    data = npz(save(tmp_path / "a.npz", x=x.astype(bool)))
    assert data.kind == "binary" and data.train.x.dtype == torch.float32
    i = int(data.train.names[0][2:-1])
    assert data.train.sequence(0).tolist() == x[i].tolist()


def patched(i: int, value: float) -> np.ndarray:
    x = REAL.copy()
    x[i, 1, 0] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": REAL}, ["no array 'x'", "found y"]),
        ({"x": np.array([{}, 1], dtype=object)}, ["object array", "refused"]),
        ({"x": REAL, "split": np.array(["train", 1] * 5, dtype=object)}, ["object array"]),
        ({"x": np.array(["a"])}, ["real numbers"]),
        ({"x": REAL[0]}, ["(3, 2)", "lengths"]),
        ({"x": REAL[0, 0]}, ["(N, T, X)", "(2,)"]),
        ({"x": REAL[:2]}, ["at least 3 sequences", "got 2"]),
        ({"x": REAL[:0]}, ["at least 3 sequences", "got 0"]),
        ({"x": REAL[:, :0]}, ["length 0"]),
        ({"x": REAL[:, :, :0]}, ["(T, X)", "(3, 0)"]),
        ({"x": REAL[0], "lengths": np.array([1, 1])}, ["sum to the 3 frames", "got 2"]),
        ({"x": REAL[0], "lengths": np.zeros(0, int)}, ["sum to the 3 frames"]),
        ({"x": REAL, "lengths": np.full(10, 4)}, ["at most 3", "largest 4"]),
        ({"x": REAL, "lengths": np.full(9, 3)}, ["10 numbers", "got 9"]),
        ({"x": REAL, "lengths": np.full(10, 0)}, ["at least 1", "sequence 0"]),
        ({"x": REAL, "lengths": np.full(10, 3.0)}, ["integers", "float64"]),
        ({"x": REAL, "split": np.full(10, "dev")}, ["'dev'", "sequence 0"]),
        ({"x": REAL, "split": np.full(10, 3)}, ["got 3", "sequence 0"]),
        ({"x": REAL, "split": np.full(9, 1)}, ["(10,)", "(9,)"]),
        (
            {"x": REAL, "split": np.full(10, "train")},
            ["each split needs", "'valid': 0"],
        ),
        ({"x": patched(4, np.nan)}, ["'x[4]'", "frame 1"]),
        ({"x": patched(4, -np.inf)}, ["'x[4]'", "frame 1"]),
    ],
)
def test_npz_names_what_is_wrong(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]
) -> None:
    path = save(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError) as error:
        load(path)
    sentence(error, path, *words)


def test_npz_refuses_damaged_files(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.npz", x=REAL)
    good = path.read_bytes()
    np.save(tmp_path / "x.npy", REAL)
    bad_crc = good[:300] + b"\xff" + good[301:]
    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00hello")
    for content in (
        b"",
        b"hello" * 99,
        (tmp_path / "x.npy").read_bytes(),
        good[:200],
        bad_crc,
        foreign.getvalue(),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            npz(path)
        sentence(error, path, "expected" if content[:2] != b"PK" else "cannot be read as")
        assert "unsafely" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no.npz does not exist"):
        load(tmp_path / "no.npz")


# ---- load ----


@pytest.mark.parametrize("source", ["vowel", "data.csv", "", "no/such/folder"])
def test_load_lists_what_it_knows(source: str) -> None:
    with pytest.raises(ValueError) as error:
        load(source)
    sentence(error, "'vowels'", ".zip", ".mat", ".npz", repr(source))


def test_dataset_refuses_splits_that_differ() -> None:
    one, two = Sequences.from_list(ragged([2])), Sequences.from_list(ragged([2], x_dim=3))
    with pytest.raises(ValueError, match="same number of features"):
        Dataset("a", one, one, two, 0.0, 1.0, "real", None, None, "made up")


def test_data_are_binary_only_if_all_sequences_are(tmp_path: Path) -> None:
    x = REAL.copy()
    x[4] = 0.0  # a sequence of silence
    assert npz(save(tmp_path / "a.npz", x=x)).kind == "real"


def test_speech_is_standardised_by_its_training_samples(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    files = {f"timit/dr{r}-fabc{r}/sa1.wav": wav_bytes(500 * r) for r in (1, 7, 8)}
    data = timit(tree(tmp_path, files) / "timit", frame=250)
    raw = np.frombuffer(files["timit/dr1-fabc1/sa1.wav"][44:], "<i2").astype(float)
    assert (data.mean, data.std) == pytest.approx((raw.mean(), raw.std()), rel=1e-12)
    x = data.train.x[data.train.mask].double()
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-6)
