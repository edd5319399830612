"""Readers of speech: splits by reader, utterances whole or cut, levels, bits of FLAC."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_avrnn.data import (
    Dataset,
    Sequences,
    corpus_of,
    flac_bits,
    librispeech,
    load,
    mu_law,
    pcm,
    pcm_decode,
    timit,
)
from tests.unit.corpora import audio, by_folder, by_region, folder_of, libri, spoken, zip_of

soundfile = pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
SPLITS = ("train", "valid", "test")
WOMEN, MEN = (1, 2, 9, 10, 20, 30, 100, 200, 300, 1000), (3, 11, 25, 101, 999)


def speakers() -> dict[str, bytes]:
    """SPEAKERS.TXT as the corpus has it: a comment, spaces, a name."""
    lines = [";1000 | M | a comment is not read", ";ID  |SEX| SUBSET"]
    lines += [f"{reader:<5}| F{' ' * (reader % 2)}| train | 25.0 | A | B" for reader in WOMEN]
    lines += [f"{reader:<5}| M | train | 25.0 | José" for reader in MEN]
    return {"LibriSpeech/SPEAKERS.TXT": "\n".join(lines).encode()}


def readers(data: Dataset) -> list[set[int]]:
    """Readers of the three splits."""
    return [{int(name.split("-")[0]) for name in getattr(data, s).names} for s in SPLITS]


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


CORPORA: dict[str, tuple[Callable[..., Dataset], Callable[..., dict[str, bytes]], int]] = {
    "librispeech": (librispeech, by_folder, 7),
    "timit": (timit, by_region, 1),
}


# ---- splits of LibriSpeech ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_the_last_fifths_of_women_and_of_men_are_held_out(
    tmp_path: Path, known: bool, packed: bool
) -> None:
    files = libri("LibriSpeech/train-clean-100", *WOMEN, *MEN) | (speakers() if known else {})
    path = zip_of(tmp_path / "a.zip", files) if packed else folder_of(tmp_path, files)
    train, valid, test = readers(librispeech(path))
    if known:
        assert (valid, test) == ({100, 200, 101}, {300, 1000, 999})
    else:
        assert (valid, test) == ({100, 101, 200}, {300, 999, 1000})
    assert train == {*WOMEN, *MEN} - valid - test


def test_readers_that_the_list_does_not_name_are_a_group_of_their_own(tmp_path: Path) -> None:
    strangers = (4000, 4001, 4002, 4003, 4004)
    folder_of(tmp_path, libri("LibriSpeech/a", *WOMEN, *strangers) | speakers())
    _, valid, test = readers(librispeech(tmp_path))
    assert (valid, test) == ({100, 200, 4003}, {300, 1000, 4004})


def test_folders_are_the_splits_where_all_three_are_there(tmp_path: Path) -> None:
    files = by_folder() | {"SPEAKERS.TXT": speakers()["LibriSpeech/SPEAKERS.TXT"]}
    for path in (folder_of(tmp_path / "a", files), zip_of(tmp_path / "a.zip", files)):
        data = librispeech(path)
        assert readers(data) == [{7, 8}, {5}, {6}]
        assert data.train.names == ("7-7-0000", "8-7-0000") and data.name == "librispeech"
        assert "Panayotov, CC BY 4.0" in data.origin and path.name in data.origin


def test_two_folders_of_three_are_no_splits(tmp_path: Path) -> None:
    files = libri("train-clean-100", 1, 2, 3, 9) | libri("test-clean", 6)
    assert readers(librispeech(folder_of(tmp_path, files))) == [{1, 2, 3}, {6}, {9}]


def test_a_reader_in_two_splits_is_refused(tmp_path: Path) -> None:
    again = {"dev-clean/7/8/7-8-0001.flac": audio(spoken(7))}
    folder_of(tmp_path, by_folder() | again)
    refused(lambda: librispeech(tmp_path), "'7'", "train", "valid", "share no speaker")


def test_a_corpus_that_cannot_fill_the_splits_says_what_would(tmp_path: Path) -> None:
    folder_of(tmp_path / "four", libri("a", 1, 2, 3, 9))
    refused(lambda: librispeech(tmp_path / "four"), "'valid': 0", "at least five", "train-, dev-")
    few = libri("LibriSpeech/a", *WOMEN[:4], *MEN[:4]) | speakers()
    folder_of(tmp_path / "sexes", few)
    refused(lambda: librispeech(tmp_path / "sexes"), "five readers of a sex")
    folder_of(tmp_path / "none", {"a/1-2.flac": b"", "a/notes.txt": b""})
    refused(lambda: librispeech(tmp_path / "none"), "no recordings", "READER-CHAPTER-UTTERANCE")
    with pytest.raises(FileNotFoundError, match=r"no\.zip does not exist"):
        librispeech(tmp_path / "no.zip")


@pytest.mark.parametrize("kept", [0, 20, 60, 0.5, 0.99, -1])
def test_a_file_of_flac_that_is_cut_short_is_named(tmp_path: Path, kept: float) -> None:
    files = by_folder(count=20_000)
    name = "train-clean-100/8/7/8-7-0000.flac"
    length = len(files[name])
    end = int(length * kept) if 0 < kept < 1 else int(kept) % length
    folder_of(tmp_path, files | {name: files[name][:end]})
    refused(lambda: librispeech(tmp_path), "8-7-0000.flac", "16000 Hz", "FLAC", "get the file")


def test_recordings_at_another_rate_or_of_another_name_are_refused(tmp_path: Path) -> None:
    slow = {"train-clean-100/9-1-0000.flac": audio(spoken(9), rate=8000)}
    folder_of(tmp_path / "slow", by_folder() | slow)
    refused(lambda: librispeech(tmp_path / "slow"), "9-1-0000", "8000 Hz", "16000 Hz")
    folder_of(tmp_path / "twice", by_folder() | libri("train-b", 7))
    refused(lambda: librispeech(tmp_path / "twice"), "'7-7-0000' is there twice")
    folder_of(tmp_path / "short", by_folder() | libri("train-clean-100", 8, count=199))
    refused(lambda: librispeech(tmp_path / "short"), "8-7-0000", "199 samples", "frame of 200")


# ---- frames and levels ----


@pytest.mark.parametrize("corpus", CORPORA)
def test_whole_keeps_training_whole_and_cuts_the_rest(tmp_path: Path, corpus: str) -> None:
    read, files, first = CORPORA[corpus]
    folder_of(tmp_path, files(count=1090))
    cut, whole = (read(tmp_path, frame=100, segment=4, whole=w) for w in (False, True))
    uncut = read(tmp_path, frame=100, segment=None, whole=True)
    one = cut.train.names[0].split("[")[0]
    assert cut.train.names[:3] == (f"{one}[0:4]", f"{one}[4:8]", f"{one}[8:10]")
    assert whole.train.names[0] == uncut.train.names[0] == one
    assert whole.train.lengths.unique().tolist() == [10]
    assert uncut.valid.lengths.tolist() == uncut.test.lengths.tolist() == [10]
    for split in ("valid", "test"):
        assert torch.equal(getattr(whole, split).x, getattr(cut, split).x)
        assert getattr(whole, split).lengths.tolist() == [4, 4, 2]
    assert (whole.mean, whole.std) == (cut.mean, cut.std)
    raw = whole.train.sequence(0).flatten().double() * whole.std + whole.mean
    np.testing.assert_allclose(raw, spoken(first, 1000), atol=1e-3)


@pytest.mark.parametrize("bits", [6, 16])
@pytest.mark.parametrize("corpus", CORPORA)
def test_linear_levels_are_the_samples_in_units_of_their_deviation(
    tmp_path: Path, corpus: str, bits: int
) -> None:
    read, files, first = CORPORA[corpus]
    folder_of(tmp_path, files())
    data, real = read(tmp_path, frame=250, pcm=bits), read(tmp_path, frame=250)
    trained = np.concatenate([spoken(first), spoken(8)] if corpus[0] == "l" else [spoken(first)])
    assert data.std == pytest.approx(trained.std(), rel=1e-12) and real.std == data.std
    assert (data.kind, data.bits, data.mean) == ("pcm", bits, 0.0)
    assert (real.kind, real.bits) == ("real", None)
    x = data.train.sequence(0).flatten()
    np.testing.assert_allclose(x, pcm(spoken(first), bits) / data.std, rtol=1e-6)
    np.testing.assert_array_equal(data.samples(x), pcm_decode(pcm(spoken(first), bits), bits))
    if bits == 16:
        np.testing.assert_array_equal(data.samples(x), spoken(first))
    assert (data.x_dim, data.sample_rate, data.frame_seconds) == (250, 16_000, 250 / 16_000)


@pytest.mark.parametrize("corpus", CORPORA)
def test_mu_law_levels_are_not_standardised(tmp_path: Path, corpus: str) -> None:
    read, files, first = CORPORA[corpus]
    data = read(folder_of(tmp_path, files()), mu_law=8)
    assert (data.kind, data.bits, data.mean, data.std) == ("mu-law", 8, 0.0, 1.0)
    np.testing.assert_array_equal(data.train.sequence(0).flatten(), mu_law(spoken(first), 8))


@pytest.mark.parametrize("read", [timit, librispeech, load])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mu_law": 16, "pcm": 16}, "mu_law and pcm are two ways"),
        ({"pcm": 17}, "pcm must be from 1 to 16 bits, got 17"),
        ({"pcm": 0}, "pcm must be from 1 to 16 bits, got 0"),
        ({"mu_law": 8.0}, "mu_law must be from 1 to 16 bits, got 8.0"),
        ({"frame": 0}, "frame must be at least 1, got 0"),
        ({"segment": 0}, "segment must be at least 1, got 0"),
    ],
)
def test_framings_that_cannot_be_are_refused_before_a_file_is_read(
    tmp_path: Path, read: Callable[..., Dataset], options: dict[str, Any], words: str
) -> None:
    refused(lambda: read(tmp_path, **options), words)


# ---- bits of FLAC ----


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("options", [{"pcm": 16}, {"pcm": 16, "segment": None}, {"mu_law": 16}])
def test_flac_bits_are_those_of_files_of_the_recordings(
    tmp_path: Path, corpus: str, options: dict[str, Any]
) -> None:
    read, files, first = CORPORA[corpus]
    data = read(folder_of(tmp_path, files(count=2600)), frame=200, **{"segment": 5} | options)
    recorded = [first, 8] if corpus == "librispeech" else [first]
    size = sum(len(audio(spoken(reader, 2600))) for reader in recorded)
    assert flac_bits(data, "train") == 8 * size / (2600 * len(recorded))
    last = {"librispeech": 6, "timit": 8}[corpus]
    assert flac_bits(data) == 8 * len(audio(spoken(last, 2600))) / 2600


def test_flac_bits_need_samples_of_sixteen_bits(tmp_path: Path) -> None:
    folder_of(tmp_path, by_region())
    for data in (timit(tmp_path), timit(tmp_path, pcm=8)):
        refused(lambda data=data: flac_bits(data), "read it with pcm=16")
    refused(lambda: flac_bits(timit(tmp_path, pcm=16), "all"), "split", "train, valid, test")
    part = Sequences.from_list([[[0.5]]])
    music = Dataset("a", part, part, part, kind="pcm", bits=16)
    refused(lambda: flac_bits(music), "must be speech")


# ---- one door for all corpora ----


def test_a_corpus_is_known_by_its_files(tmp_path: Path) -> None:
    digits = {"0_jackson_0.wav": audio(spoken(0), "WAV", 8000)}
    for name, files in {
        "librispeech": by_folder(),
        "timit": by_region(),
        "digits": digits,
    }.items():
        assert corpus_of(folder_of(tmp_path / name, files)) == name
        for end in ("zip", "ZIP"):
            assert corpus_of(str(zip_of(tmp_path / f"{name}.{end}", files))) == name
    for other in ("", "vowels", tmp_path / "a.npz", tmp_path / "digits" / "0_jackson_0.wav"):
        assert corpus_of(other) is None
    (tmp_path / "bad.zip").write_bytes(b"hello")
    assert corpus_of(tmp_path / "bad.zip") == corpus_of(tmp_path / "no.zip") == "timit"


@pytest.mark.parametrize("corpus", CORPORA)
def test_load_reads_as_the_reader_of_the_corpus(tmp_path: Path, corpus: str) -> None:
    read, files, _ = CORPORA[corpus]
    folder_of(tmp_path, files())
    options: dict[str, Any] = {"frame": 100, "segment": 3, "whole": True, "pcm": 16}
    found, expected = load(tmp_path, **options), read(tmp_path, **options)
    assert found.name == corpus and found.std == expected.std
    for split in SPLITS:
        assert torch.equal(getattr(found, split).x, getattr(expected, split).x)


# ---- the real excerpt ----


def test_the_excerpt_has_a_hundred_readers_in_splits_of_both_sexes(data_folder: Path) -> None:
    path = data_folder / "librispeech_100spk.zip"
    if not path.exists():
        pytest.skip(f"librispeech_100spk.zip is not in {data_folder}")
    data = librispeech(path, segment=None, pcm=16)
    found = readers(data)
    with zipfile.ZipFile(path) as archive:
        text = archive.read("librispeech_100spk/SPEAKERS.TXT").decode()
        rows = [line.split("|") for line in text.splitlines() if not line.startswith(";")]
        sex = {int(row[0]): row[1].strip() for row in rows}
        names = [f"librispeech_100spk/{name}.flac" for name in data.test.names]
        recorded = [soundfile.read(archive.open(name), dtype="int16")[0] for name in names]
    assert [len(split) for split in found] == [60, 20, 20] and len(set.union(*found)) == 100
    for of_one in "FM":
        ordered = sorted(reader for reader in set.union(*found) if sex[reader] == of_one)
        parts = (ordered[:30], ordered[30:40], ordered[40:])
        assert [{r for r in split if sex[r] == of_one} for split in found] == [*map(set, parts)]
    size, count = sum(len(audio(one)) for one in recorded), sum(map(len, recorded))
    assert flac_bits(data) == pytest.approx(8 * size / count, rel=1e-3)  # a last frame is cut off
