"""MNIST: binarisation, splits, every bad input."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_avrnn.data import images
from pyro_avrnn.data.images import digits_of, mnist
from pyro_avrnn.data.sequences import Sequences


def table(per_digit: int = 10, digits: tuple[int, ...] = (2, 7)) -> np.ndarray:
    """Random grey levels, with a corner of black and one of white."""
    stream = np.random.RandomState(3)
    rows = stream.randint(0, 256, (per_digit * len(digits), 785))
    rows[:, :5], rows[:, 5:10] = 0, 255
    rows[:, 784] = np.repeat(digits, per_digit)
    return rows


def save(path: Path, rows: np.ndarray) -> Path:
    with gzip.open(path, "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    return path


def sentence(error: pytest.ExceptionInfo[Exception], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"


@pytest.mark.parametrize("shuffled", [False, True])
def test_splits_and_threshold(tmp_path: Path, shuffled: bool) -> None:
    rows = table(20)
    if shuffled:
        rows = np.random.RandomState(0).permutation(rows)
    data = mnist(save(tmp_path / "a.csv.gz", rows), binarise="threshold")
    assert data.kind == "binary" and data.train.x.shape == (32, 1, 784)
    assert data.train.x.dtype == torch.float32 and data.train.mask.all()
    assert data.frame_seconds is None and "threshold" in data.origin
    for part, indices in (
        (data.train, range(16)),
        (data.valid, range(16, 18)),
        (data.test, range(18, 20)),
    ):
        assert part.names == tuple(f"{digit}_{i}" for digit in (2, 7) for i in indices)
        digits = digits_of(part)
        for x, digit, name in zip(part.x[:, 0], digits, part.names, strict=True):
            levels = rows[rows[:, 784] == digit][int(name[2:]), :784]
            np.testing.assert_array_equal(x, levels >= 128)


def deviation(x: np.ndarray, p: np.ndarray) -> float:
    """How many standard errors the number of ones lies from its mean, grouped by p."""
    groups = np.digitize(p, np.linspace(0.1, 0.9, 9))
    return max(
        abs((x - p)[groups == g].sum()) / (p * (1 - p))[groups == g].sum() ** 0.5
        for g in range(10)
    )


def test_a_pixel_is_one_with_the_probability_of_its_level(tmp_path: Path) -> None:
    rows = table(50)
    path = save(tmp_path / "a.csv.gz", rows)
    levels = np.concatenate([rows[:40, :784], rows[50:90, :784]])  # 62,720 training pixels
    drawn = mnist(path).train.x[:, 0].numpy()
    assert not drawn[levels == 0].any() and drawn[levels == 255].all()
    assert deviation(drawn, levels / 255) < 5
    by_threshold = mnist(path, binarise="threshold").train.x[:, 0].numpy()
    assert deviation(by_threshold, levels / 255) > 5  # the planted fault


def test_the_draw_follows_its_seed_and_no_global_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv.gz", table())
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = mnist(path), mnist(path), mnist(path, seed=1)
    assert "seed 0" in first.origin
    torch.testing.assert_close(first.train.x, again.train.x, rtol=0, atol=0)
    assert (first.train.x != other.train.x).any()
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])
    assert (before[1] == torch.get_rng_state()).all()


def test_the_excerpt(data_folder: Path) -> None:
    path = data_folder / "mnist_5k.csv.gz"
    if not path.exists():
        pytest.skip(f"mnist_5k.csv.gz is not in {data_folder}")
    data = mnist(path)
    for part, count in ((data.train, 400), (data.valid, 50), (data.test, 50)):
        assert np.bincount(digits_of(part)).tolist() == [count] * 10
    assert data.test.names[0] == "0_450" and data.test.names[-1] == "9_499"
    assert 0.12 < data.train.x.mean() < 0.14  # the mean level of MNIST is 0.131 of 255
    assert not data.train.x[:, 0, :28].any()  # the top row is margin


def test_digits_of_refuses_other_names() -> None:
    with pytest.raises(ValueError) as raised:
        digits_of(Sequences.from_list([[[0.0]]], ["7_theo_1"]))
    sentence(raised, "DIGIT_INDEX", "'7_theo_1'")


def changed(row: int, column: int, value: int) -> np.ndarray:
    rows = table()
    rows[row, column] = value
    return rows


def packed(content: bytes) -> bytes:
    """Without the time of day, which would give each process other names of tests."""
    return gzip.compress(content, mtime=0)


GOOD = b"\n".join(b",".join(b"%d" % v for v in row) for row in table())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty file"]),
        (GOOD, ["cannot be read", "gzip"]),
        (packed(GOOD)[:500], ["cannot be read", "cut short"]),
        (packed(GOOD)[:1000] + bytes(200) + packed(GOOD)[1200:], ["cannot be read"]),
        (packed(b""), ["no lines"]),
        (packed(b"\n\n"), ["no lines"]),
        (packed(b"1,2,3\n4,5,6"), ["785 numbers", "got 3"]),
        (packed(GOOD + b"\n1,2,3"), ["cannot be read", "columns"]),
        (packed(GOOD.replace(b",", b";")), ["cannot be read"]),
        (packed(GOOD.replace(b"255", b"0.5")), ["cannot be read", "0.5"]),
        (packed(GOOD.replace(b"255", b"99999999")), ["cannot be read"]),
        (packed(GOOD.replace(b"255", b"#")), ["cannot be read"]),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        mnist(path)
    sentence(raised, "a.csv.gz", *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (lambda: changed(4, 9, 256), ["grey levels", "0 to 255", "256 in line 5"]),
        (lambda: changed(0, 9, -1), ["grey levels", "-1 in line 1"]),
        (lambda: changed(19, 784, 10), ["digits", "0 to 9", "10 in line 20"]),
        (lambda: table()[:, 1:], ["785 numbers", "got 784"]),
        (lambda: table(3), ["each split needs", "'valid': 0", "at least 10"]),
    ],
)
def test_wrong_tables_are_refused(
    tmp_path: Path, rows: Callable[[], np.ndarray], words: list[str]
) -> None:
    with pytest.raises(ValueError) as raised:
        mnist(save(tmp_path / "a.csv.gz", rows()))
    sentence(raised, "a.csv.gz", *words)


def test_a_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_MAX_BYTES", 10_000)
    (tmp_path / "a.csv.gz").write_bytes(packed(b"0" * 10**7))
    with pytest.raises(ValueError) as raised:
        mnist(tmp_path / "a.csv.gz")
    sentence(raised, "a.csv.gz", "more than 10000 bytes")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mnist(tmp_path / "none.csv.gz")
    with pytest.raises(ValueError, match="is not a file"):
        mnist(tmp_path)
    path = save(tmp_path / "a.csv.gz", table())
    with pytest.raises(ValueError, match="binarise must be .* got 'no'"):
        mnist(path, binarise="no")
    with pytest.raises(ValueError, match="seed must be from 0"):
        mnist(path, seed=-1)
