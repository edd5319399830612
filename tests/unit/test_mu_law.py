"""Mu-law: levels of samples, their inverse, TIMIT as levels, the baseline of levels."""

import io
import math
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_avrnn.data import (
    Dataset,
    Sequences,
    independent_baseline,
    load,
    mu_law,
    mu_law_decode,
    timit,
)

EVERY = np.arange(-(2**15), 2**15, dtype=np.int16)


def bent(y: np.ndarray, bits: int) -> np.ndarray:
    """F, as the papers print it."""
    mu = 2**bits - 1
    return np.sign(y) * np.log(1 + mu * np.abs(y)) / np.log(1 + mu)


def unbent(level: np.ndarray, bits: int) -> np.ndarray:
    """Its inverse, in units of int16."""
    return np.sign(level) * (2.0 ** (bits * np.abs(level)) - 1) / (2**bits - 1) * 2**15


@pytest.mark.parametrize("bits", [1, 2, 8, 12, 16])
def test_every_sample_gets_the_cell_that_holds_it(bits: int) -> None:
    x = mu_law(EVERY, bits)
    assert x.dtype == np.float32 and x.shape == EVERY.shape
    exact = x.astype(float)
    numbers = ((exact + 1) * 2**bits - 1) / 2
    assert (numbers == np.round(numbers)).all()
    assert numbers.min() == 0 and numbers.max() == 2**bits - 1
    assert (np.diff(exact) >= 0).all()  # monotone
    distance = np.abs(bent(EVERY / 2**15, bits) - exact)
    assert distance.max() <= 2.0**-bits + 1e-12  # half a cell


@pytest.mark.parametrize("bits", [1, 2, 8, 12, 16])
def test_round_trip_stays_inside_the_cell(bits: int) -> None:
    x = mu_law(EVERY, bits)
    back = mu_law_decode(x, bits)
    assert back.dtype == np.int16
    low, high = (unbent(x.astype(float) + side * 2.0**-bits, bits) for side in (-1, 1))
    error = np.abs(back.astype(float) - EVERY)
    assert (error <= np.maximum(high - low, 0.5)).all()
    if bits in (8, 12):  # the bound sees a decoder with another mu
        other = np.abs(mu_law_decode(x, 16).astype(float) - EVERY)
        assert (other > high - low + 1).any()


def test_sixteen_bits_use_as_many_cells_as_the_docstring_says() -> None:
    x = mu_law(EVERY)
    used, counts = np.unique(x, return_counts=True)
    assert len(used) == 20_127 and counts.max() == 12
    shared = np.abs(EVERY[counts[np.searchsorted(used, x)] > 1].astype(int))
    assert shared.min() == 3020
    cells = (x[2**15 + np.array([0, 1])].astype(float) * 2**15 - 0.5).tolist()
    assert cells == [0, 3245]
    error = np.abs(mu_law_decode(x).astype(int) - EVERY)
    assert error[np.abs(EVERY.astype(int)) <= 3019].max() == 0 and error.max() == 6


def test_shapes_kinds_and_tensors() -> None:
    expected = mu_law(np.array([[-7, 0], [7, 32767]], dtype=np.int16), 8)
    for kind in (np.int32, np.int64, np.float32, np.float64):
        given = np.array([[-7, 0], [7, 32767]], dtype=kind)
        np.testing.assert_array_equal(mu_law(given, 8), expected)
    np.testing.assert_array_equal(mu_law(np.array([0, 7], dtype=np.uint16)), mu_law([0, 7]))
    assert mu_law(np.zeros((2, 0), dtype=np.int16)).shape == (2, 0)
    tensor = torch.from_numpy(expected.copy()).requires_grad_()
    np.testing.assert_array_equal(mu_law_decode(tensor, 8), mu_law_decode(expected, 8))
    assert mu_law_decode([-1.0, 0.0, 1.0]).tolist() == [-32768, 0, 32767]
    expected[0, 0] = 0.5  # the result is the caller's own
    assert mu_law([-7], 8)[0] != 0.5


@pytest.mark.parametrize(
    ("samples", "got"),
    [
        ([0, 32768], "32768"),
        ([-32769], "-32769"),
        ([0.5, 1.0], "0.5"),
        ([float("nan")], "nan"),
        ([float("inf")], "inf"),
        ([1 + 2j], "complex128"),
        (["a"], "<U1"),
    ],
)
def test_samples_that_are_not_int16_are_refused(samples: list, got: str) -> None:
    with pytest.raises(ValueError, match=r"^samples must be [^\n]*integers") as error:
        mu_law(samples)
    assert got in str(error.value)


@pytest.mark.parametrize("x", [[1.001], [-2.0], [float("nan")]])
def test_levels_outside_are_refused(x: list[float]) -> None:
    with pytest.raises(ValueError, match=rf"^x must hold levels in \[-1, 1\], got {x[0]}"):
        mu_law_decode(x)


@pytest.mark.parametrize("bits", [0, 17, 8.5])
def test_bits_have_a_range(bits: int, tmp_path: Path) -> None:
    for call in (lambda: mu_law([0], bits), lambda: mu_law_decode([0.0], bits)):
        with pytest.raises(ValueError, match=f"^bits must be from 1 to 16 bits, got {bits}"):
            call()
    with pytest.raises(ValueError, match=f"^mu_law must be from 1 to 16 bits, got {bits}"):
        timit(tmp_path, mu_law=bits)


# ---- data sets ----


def wav_bytes(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("bits", [8, 16])
def test_timit_as_levels(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    samples = {r: np.arange(r, 1000 + r) * 7919 % 65536 - 32768 for r in (1, 7, 8)}
    for region, values in samples.items():
        folder = tmp_path / f"dr{region}-fabc{region}"
        folder.mkdir()
        (folder / "sa1.wav").write_bytes(wav_bytes(values))
    data = load(tmp_path, frame=300, segment=2, mu_law=bits)
    assert (data.kind, data.bits, data.mean, data.std) == ("mu-law", bits, 0.0, 1.0)
    assert data.train.lengths.tolist() == [2, 1] and data.train.x.dtype == torch.float32
    joined = torch.cat([data.train.sequence(i) for i in range(2)]).flatten().numpy()
    np.testing.assert_array_equal(joined, mu_law(samples[1][:900], bits))
    assert timit(tmp_path).bits is None


def test_real_speech_as_levels(data_folder: Path) -> None:
    pytest.importorskip("soundfile", reason="needs pyro-avrnn[audio]")
    path = data_folder / "timit.zip"
    if not path.exists():
        pytest.skip(f"timit.zip is not in {data_folder}")
    real, data = timit(path), timit(path, mu_law=16)
    assert (data.kind, data.bits) == ("mu-law", 16)
    assert torch.equal(data.train.mask, real.train.mask) and data.train.names == real.train.names
    raw = (real.test.x * real.std + real.mean)[real.test.mask].round().numpy()
    decoded = mu_law_decode(data.test.x[data.test.mask])
    quiet = np.abs(raw) <= 3000
    np.testing.assert_array_equal(decoded[quiet], raw[quiet])
    # a model without structure, in bits: below the 16 of a uniform guess, above nothing at all
    bits = -independent_baseline(data) / math.log(2) / data.x_dim
    assert 8 < bits < 11


def test_baseline_of_levels_counted_by_hand() -> None:
    train = [[[-0.75, 0.25], [0.25, 0.25]], [[0.75, -0.75]]]  # bits = 2: levels -3/4 .. 3/4
    test = [[[-0.25, 0.25]], [[0.75, 0.25], [-0.75, -0.75]]]
    parts = (Sequences.from_list(train), Sequences.from_list(train), Sequences.from_list(test))
    data = Dataset("hand", *parts, 0.0, 1.0, "mu-law", None, None, "", bits=2)
    counts = Counter({-0.75: 2, -0.25: 0, 0.25: 3, 0.75: 1})
    expected = sum(
        math.log((counts[value] + 1) / (6 + 4)) for s in test for frame in s for value in frame
    )
    assert independent_baseline(data) == pytest.approx(expected / 3, rel=1e-12)
    torch.set_default_dtype(torch.float32)  # the sum is in float64 whatever the default
    assert independent_baseline(data) == pytest.approx(expected / 3, rel=1e-12)
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    ("kind", "bits", "words"),
    [
        ("mu-law", None, "bits must be from 1 to 16 for levels ('mu-law', 'pcm')"),
        ("mu-law", 17, "got 17 for kind 'mu-law'"),
        ("real", 16, "None for others, got 16 for kind 'real'"),
        ("binary", 8, "None for others, got 8 for kind 'binary'"),
        ("mulaw", 8, "kind must be one of real, binary, mu-law, pcm, got 'mulaw'"),
    ],
)
def test_bits_go_with_levels_and_with_nothing_else(
    kind: str, bits: int | None, words: str
) -> None:
    part = Sequences.from_list([[[0.5]]])
    with pytest.raises(ValueError) as error:
        Dataset("a", part, part, part, 0.0, 1.0, kind, None, None, "", bits=bits)
    assert words in str(error.value) and "\n" not in str(error.value)
