"""Sprites: videos of 8 frames in which a character does something.

A character is made of a body, trousers, a top and hair, 6 of each: 1,296 characters. Each walks,
casts a spell or slashes, seen from the front, the left or the right: 9 actions. What is the same
in all frames, four attributes, and what changes, the action, is known exactly.

The images are the sheets of https://github.com/YingzhenLi/Sprites, from the Liberated Pixel Cup,
licences CC BY-SA 3.0 and GPL 3.0. Split of Li and Mandt (2018), https://arxiv.org/abs/1803.02991:
1,000 characters for training, of which the last hundred are for validation here, and 296 for test.
"""

import io
import re
from pathlib import Path

import numpy as np
import torch

from inference.protocols import counts
from pyro_avrnn.data._audio import entries
from pyro_avrnn.data._checks import decoding, naming, optional, reading
from pyro_avrnn.data.dataset import Dataset, groups_of_names
from pyro_avrnn.data.sequences import Sequences

ATTRIBUTES = ("body", "bottomwear", "topwear", "hair")
ACTIONS = tuple(f"{what} {side}" for what in ("walk", "spellcast", "slash") for side in "flr")
_EXPECTED = "a folder or .zip with sheets body/0.png to hair/5.png and shoes/1.png"
_FILE = re.compile(r"(?:.*/)?(body|bottomwear|topwear|hair|shoes)/([0-9]+)\.png")
_NAME = re.compile(r"([0-5])([0-5])([0-5])([0-5])_([0-8])")
_KINDS = 6  # of each attribute
_TILE, _ROWS, _COLUMNS = 64, 21, 13
_SIZE = (_TILE * _COLUMNS, _TILE * _ROWS)
_MAX_BYTES = 2**22  # of a sheet; these have less than 200 kB
#: row of the sheet, and the columns of the 8 frames, of each action
_WALK, _CAST, _SLASH = (8, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 5, 4, 6), (0, 1, 2, 3, 4, 5, 4, 0)
_FRAMES = [(row, _WALK) for row in (10, 9, 11)]
_FRAMES += [(row, _CAST) for row in (2, 1, 3)] + [(row, _SLASH) for row in (14, 13, 15)]
_SPLIT_SEED = 423  # of the paper's permutation of the characters


def sprites(
    path: str | Path, *, side: int = 64, characters: tuple[int, int, int] = (900, 100, 296)
) -> Dataset:
    """Read sprites as videos of 8 frames, X = 3 * side * side values in (0, 1).

    Args:
        path: a folder, or a ``.zip`` that is read in place.
        side: pixels of a side, 64 or a divisor of it, by averages of pixels.
        characters: how many for training, validation and test, at most 900, 100 and 296, in the
            order of the paper's split: with fewer the set is smaller. A character has 9 videos.

    Returns:
        Frames are ``(3, side, side)``, flattened; names such as "0312_7", four attributes and the
        action, which :func:`sprite_labels` reads. Values are as they are: mean 0, deviation 1.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such sheets, one is damaged or of another size, or a number is
            out of range.
        ImportError: if Pillow is not installed.
    """
    counts(1, side=side)
    if _TILE % side:
        raise ValueError(f"side must divide {_TILE}, got {side}")
    most = (900, 100, 296)
    if len(characters) != 3 or any(not 1 <= c <= m for c, m in zip(characters, most, strict=True)):
        raise ValueError(f"characters must be three numbers from 1 to {most}, got {characters}")
    with reading(path, _EXPECTED, folder=True) as where:
        sheets = _sheets(where)
        order = np.random.RandomState(_SPLIT_SEED).permutation(_KINDS ** len(ATTRIBUTES))
        starts = (0, 900, 1000)
        parts = [order[s : s + c].tolist() for s, c in zip(starts, characters, strict=True)]
        train, valid, test = (_videos(sheets, part, side) for part in parts)
    origin = f"{where.name}: Sprites, Li and Mandt (2018), CC BY-SA 3.0 and GPL 3.0"
    return Dataset("sprites", train, valid, test, origin=origin)


def holds_sprites(path: str | Path) -> bool:
    """Whether a folder or ``.zip`` has sheets named as in this data set; never raises."""
    try:
        return any(_FILE.fullmatch(file) for file, *_ in entries(Path(path)))
    except Exception:  # a damaged archive: its reader raises the right error
        return False


def sprite_labels(sequences: Sequences) -> dict[str, np.ndarray]:
    """Read the attributes and the action of each video from its name, integers (N,) each.

    Raises:
        ValueError: a name that is none.
    """
    groups = groups_of_names(sequences, _NAME, "such as '0312_7', as sprites gives them")
    table = np.array(groups, dtype=int)
    return dict(zip((*ATTRIBUTES, "action"), table.T, strict=True))


def _sheets(where: Path) -> dict[tuple[str, int], np.ndarray]:
    """Sheets (1344, 832, 4), uint8, by kind and number."""
    image = optional("PIL.Image", "examples")
    found = {}
    for file, size, read in entries(where):
        match = _FILE.fullmatch(file)
        if match is None:
            continue
        with naming(file):
            if size > _MAX_BYTES:
                raise ValueError(f"it has {size} bytes, more than {_MAX_BYTES}: no such sheet")
            with decoding("a sheet in PNG"):
                opened = image.open(io.BytesIO(read()), formats=["PNG"])
            if opened.size != _SIZE:  # before it is unpacked
                raise ValueError(f"it must have {_SIZE} pixels, got {opened.size}")
            with decoding("a sheet in PNG"):
                found[match[1], int(match[2])] = opened.convert("RGBA")
    wanted = [(kind, i) for kind in ATTRIBUTES for i in range(_KINDS)] + [("shoes", 1)]
    missing = [f"{kind}/{i}.png" for kind, i in wanted if (kind, i) not in found]
    if missing:
        raise ValueError(f"there is no {missing[0]}; expected {_EXPECTED}")
    return found


def _videos(sheets: dict[tuple[str, int], np.ndarray], numbers: list[int], side: int) -> Sequences:
    names, pixels = [], np.empty((len(numbers), len(_FRAMES), 8, 3, side, side), dtype=np.float32)
    for row, number in enumerate(numbers):
        kinds = [number // _KINDS**power % _KINDS for power in (3, 2, 1, 0)]
        pixels[row] = _character(sheets, kinds, side)
        names += [f"{''.join(map(str, kinds))}_{action}" for action in range(len(_FRAMES))]
    x = torch.from_numpy(pixels).view(len(names), 8, -1)
    return Sequences(x, torch.ones(x.shape[:2], dtype=torch.bool), tuple(names))


def _character(
    sheets: dict[tuple[str, int], np.ndarray], kinds: list[int], side: int
) -> np.ndarray:
    """All videos of a character, (9, 8, 3, side, side), in [0, 1]."""
    image = optional("PIL.Image", "examples")
    drawn = image.new("RGBA", _SIZE, "black")
    for layer in (*zip(ATTRIBUTES, kinds, strict=True), ("shoes", 1)):
        drawn = image.alpha_composite(drawn, sheets[layer])
    rgb = np.asarray(drawn)[..., :3].astype(np.float32) / 255.0
    tiles = rgb.reshape(_ROWS, _TILE, _COLUMNS, _TILE, 3).transpose(0, 2, 4, 1, 3)
    videos = np.stack([tiles[row][list(columns)] for row, columns in _FRAMES])
    pool = _TILE // side
    shape = (*videos.shape[:3], side, pool, side, pool)
    return videos.reshape(shape).mean(axis=(-3, -1))
