"""Pieces of music moved to other keys, and the batches that move them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_avrnn.data import Batches, Sequences, load, piano_rolls
from pyro_avrnn.data.piano_rolls import Transpose

K, MOST = 20, 3
LENGTHS = (6, 1, 4, 9, 2)
Notes = set[tuple[int, int]]  # step and key


def notes_of(roll: Tensor) -> Notes:
    return {(t, key) for t, key in roll.nonzero().tolist()}


def shift_between(before: Notes, after: Notes) -> int:
    """The one number of keys between two sets of notes, which differ by nothing else."""
    shift = min(key for _, key in after) - min(key for _, key in before)
    assert after == {(t, key + shift) for t, key in before}
    return shift


def roll_of(*keys: int, steps: int = 2) -> Tensor:
    """The keys one after the other, again and again."""
    roll = torch.zeros(steps * len(keys), K)
    for t in range(len(roll)):
        roll[t, keys[t % len(keys)]] = 1.0
    return roll


def pieces() -> Sequences:
    """Pieces that differ in the middle of the keyboard."""
    random = torch.Generator().manual_seed(3)
    middle = [torch.rand(length, K - 8, generator=random) < 0.4 for length in LENGTHS]
    for roll in middle:
        roll[0, [0, -1]] = True
    return Sequences.from_list([torch.nn.functional.pad(m.float(), (4, 4)) for m in middle])


def moved(most: int, roll: Tensor, seed: int = 0) -> Tensor:
    return Transpose(most)(roll, torch.Generator().manual_seed(seed))


# ---- one piece ----


@settings(max_examples=80, deadline=None)
@given(
    notes=st.sets(st.tuples(st.integers(0, 7), st.integers(0, K - 1)), min_size=1),
    most=st.integers(1, 2 * K),
    seed=st.integers(0, 999),
)
def test_all_notes_move_alike_and_stay_on_the_keyboard(notes: Notes, most: int, seed: int) -> None:
    roll = torch.zeros(8, K)
    roll[tuple(zip(*notes, strict=True))] = 1.0
    before = roll.clone()
    found = moved(most, roll, seed)
    assert found.shape == roll.shape and found.dtype == roll.dtype
    assert torch.equal(roll, before)  # the data are as they were
    assert -most <= shift_between(notes, notes_of(found)) <= most
    assert int(found.sum()) == len(notes)


@pytest.mark.parametrize(
    ("keys", "reached"),
    [
        ((8, 11), {-3, -2, -1, 0, 1, 2, 3}),
        ((3, 16), {-3, -2, -1, 0, 1, 2, 3}),  # to the last keys and no farther
        ((1, 9), {-1, 0, 1, 2, 3}),
        ((0, 17), {0, 1, 2}),
        ((19, 18), {-3, -2, -1, 0}),
        ((0, 19), {0}),
    ],
)
def test_all_shifts_occur_that_the_keyboard_has_room_for(
    keys: tuple[int, ...], reached: set[int]
) -> None:
    roll = roll_of(*keys)
    found = Counter(
        shift_between(notes_of(roll), notes_of(moved(MOST, roll, seed))) for seed in range(200)
    )
    assert found.keys() == reached


@pytest.mark.parametrize("fault", [False, True])
def test_all_shifts_are_alike_in_probability(fault: bool) -> None:
    generator, roll, n = torch.Generator().manual_seed(0), roll_of(8, 11), 3000
    move = Transpose(MOST)
    shifts = [shift_between(notes_of(roll), notes_of(move(roll, generator))) for _ in range(n)]
    if fault:  # the highest is drawn too seldom
        shifts = [min(s, MOST - 1) if i % 4 == 0 else s for i, s in enumerate(shifts)]
    share, p = torch.tensor([shifts.count(s) / n for s in range(-MOST, MOST + 1)]), 1 / 7
    off = ((share - p) / (p * (1 - p) / n) ** 0.5).abs().max()
    assert (float(off) < 5) is not fault


def test_a_rest_stays_a_rest() -> None:
    assert torch.equal(moved(MOST, torch.zeros(4, K)), torch.zeros(4, K))
    assert moved(MOST, torch.zeros(0, K)).shape == (0, K)


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_a_transposition_has_a_whole_number_of_semitones(most: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="^most must be "):
        Transpose(most)


# ---- the reader ----


def music(path: Path) -> Path:
    """A ``.mat`` file of the pieces, in each split in another key."""
    from scipy.io import savemat

    content = {}
    for k, split in enumerate(("train", "valid", "test")):
        cells = np.empty((1, len(LENGTHS)), dtype=object)
        for i in range(len(LENGTHS)):
            cells[0, i] = pieces().sequence(i).roll(k, dims=1).numpy().astype("uint8")
        content[f"{split}data"] = cells
    savemat(path, content)
    return path


@pytest.mark.parametrize("read", [piano_rolls, load])
def test_a_reader_moves_nothing_itself(tmp_path: Path, read: Callable[..., Any]) -> None:
    path = music(tmp_path / "a.mat")
    plain, data = read(path), read(path, transpose=MOST)
    assert plain.augment is None and data.augment == Transpose(MOST)
    for split in ("train", "valid", "test"):
        before, after = getattr(plain, split), getattr(data, split)
        assert torch.equal(before.x, after.x) and before.names == after.names
    epoch = [x.clone() for x, _ in Batches(data.train, 2, augment=data.augment)]
    assert any(
        not torch.equal(a, b[0]) for a, b in zip(epoch, Batches(data.train, 2), strict=True)
    )
    assert torch.equal(data.train.x, plain.train.x) and torch.equal(data.test.x, plain.test.x)
    cut = read(path, transpose=MOST, segment=2)
    assert cut.augment == Transpose(MOST) and int(cut.train.lengths.max()) == 2


@pytest.mark.parametrize("transpose", [0, -2, 1.5])
def test_a_reader_refuses_other_numbers_before_it_reads(tmp_path: Path, transpose: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="^transpose must be "):
        piano_rolls(tmp_path / "no.mat", transpose=transpose)


# ---- batches ----


def shifts(batches: Batches) -> dict[int, int]:
    """The shift of each piece in an epoch, the pieces known by what does not move."""
    data = batches.data
    own = {_outline(data.sequence(i)): i for i in range(len(data))}
    assert len(own) == len(data)
    found = {}
    for x, mask in batches:
        assert not bool(x[~mask].any())  # padding
        for row, observed in zip(x, mask, strict=True):
            i = own[_outline(row[observed])]
            found[i] = shift_between(notes_of(data.sequence(i)), notes_of(row[observed]))
    assert found.keys() == set(range(len(data)))
    return found


def _outline(roll: Tensor) -> str:
    """Steps and intervals of a piece, whatever its key."""
    keys = roll.any(dim=0).nonzero().flatten()
    return str(roll[:, int(keys[0]) : int(keys[-1]) + 1].tolist())


@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_moves_each_piece_by_a_shift_of_its_own(bucket: bool) -> None:
    data, before = pieces(), pieces().x
    batches = Batches(data, 2, seed=5, bucket=bucket, augment=Transpose(MOST))
    epochs = [shifts(batches) for _ in range(30)]
    for i in range(len(data)):
        assert {epoch[i] for epoch in epochs} == set(range(-MOST, MOST + 1))
    assert any(len(set(epoch.values())) > 2 for epoch in epochs)  # pieces go their own ways
    assert torch.equal(data.x, before)


def test_seed_and_epoch_are_all_that_shifts_depend_on() -> None:
    def epoch(seed: int, number: int) -> list[Tensor]:
        batches = Batches(pieces(), 2, seed, augment=Transpose(MOST))
        batches.epoch = number
        return [part for batch in batches for part in batch]

    state = torch.get_rng_state()
    first = epoch(1, 4)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(1, 4), strict=True))
    torch.manual_seed(0)
    epoch(1, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert shifts(Batches(pieces(), 2, 1, augment=Transpose(9))) != shifts(
        Batches(pieces(), 2, 2, augment=Transpose(9))
    )


def test_a_change_is_given_whole_pieces_without_padding() -> None:
    seen: list[Tensor] = []

    def louder(piece: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(piece.clone())
        return piece + 1.0

    data = pieces()
    for x, mask in Batches(data, 3, augment=louder):
        assert not bool(x[~mask].any()) and float(x[mask].min()) == 1.0
    assert sorted(len(piece) for piece in seen) == sorted(LENGTHS)
    assert sum(float(piece.sum()) for piece in seen) == float(data.x.sum())
    seen.clear()
    list(Batches(data, 3, window=3, augment=louder))
    assert len(seen) == sum(-(-length // 3) for length in LENGTHS)
    with pytest.raises(TypeError, match="^augment must be a function of a piece"):
        Batches(data, 3, augment=3)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=25),
    batch_size=st.integers(1, 8),
    bucket=st.booleans(),
    even=st.booleans(),
    window=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_batches_are_even_or_full_with_a_rest(
    lengths: list[int],
    batch_size: int,
    bucket: bool,
    even: bool,
    window: int | None,
    seed: int,
) -> None:
    frames = [100.0 * i + torch.arange(1.0, n + 1.0)[:, None] for i, n in enumerate(lengths)]
    batches = Batches(
        Sequences.from_list(frames), batch_size, seed, bucket, even=even, window=window
    )
    count = len(batches)
    epoch = list(batches)
    sizes = sorted(len(x) for x, _ in epoch)
    total = sum(1 if window is None else -(-n // window) for n in lengths)
    assert sum(sizes) == total and len(sizes) == count == -(-total // batch_size)
    if even:
        assert sizes[-1] - sizes[0] <= 1 and sizes[-1] <= batch_size
    else:
        assert sizes[1:] == [batch_size] * (count - 1)
        assert sizes[0] == total - batch_size * (count - 1)
    seen = Counter[float]()
    for x, mask in epoch:
        seen.update(x[mask].flatten().tolist())
        assert not bool(x[~mask].any())
    assert seen == Counter(torch.cat(frames).flatten().tolist())
