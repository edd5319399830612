"""Small data sets that stand in for real ones with ``--smoke``."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch

from pyro_avrnn.data import Dataset, Sequences


def digits(folder: Path) -> Path:
    """Write "spoken digits": the speaker is the pitch of a tone, the digit its modulation."""
    import soundfile  # an extra that only speech needs

    random = np.random.default_rng(0)
    path = folder / "digits.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for digit in range(3):
            for who, speaker in enumerate(("ada", "ben", "cleo")):
                for take in range(20):
                    time = np.arange(random.integers(1200, 1800)) / 8_000
                    tone = np.sin(2 * np.pi * (300 + 400 * who) * time)
                    loud = 0.6 + 0.4 * np.sin(2 * np.pi * (5 + 10 * digit) * time)
                    content = io.BytesIO()
                    wave = 0.3 * tone * loud + 0.01 * random.normal(size=len(time))
                    soundfile.write(content, wave, 8_000, format="WAV", subtype="PCM_16")
                    name = f"recordings/{digit}_{speaker}_{take}.wav"
                    archive.writestr(name, content.getvalue())
    return path


def images(count: int, side: int = 8) -> Dataset:
    """Draw noisy horizontal or vertical bars, ``count`` of them for training."""

    def split(size: int, seed: int) -> Sequences:
        generator = torch.Generator().manual_seed(seed)
        where = torch.randint(side, (size, 1, 1), generator=generator)
        grid = torch.arange(side).expand(size, side, side)
        upright = torch.rand(size, 1, 1, generator=generator) < 0.5
        bar = torch.where(upright, grid, grid.mT) == where
        noise = torch.rand(size, side, side, generator=generator) < 0.05
        names = [f"{int(kind)}_{i}" for i, kind in enumerate(upright.flatten())]
        return Sequences.from_list((bar ^ noise).float().reshape(size, 1, -1), names)

    splits = (split(size, seed) for seed, size in enumerate((count, 8, 12)))
    return Dataset("bars", *splits, 0.0, 1.0, "binary", None, None, "drawn here")


def waves(folder: Path) -> Path:
    """Write a few random walks as an ``.npz`` file."""
    x = np.random.default_rng(0).normal(size=(24, 8, 2)).cumsum(axis=1)
    np.savez(folder / "waves.npz", x=x)
    return folder / "waves.npz"


def music(folder: Path) -> Path:
    """Write a few arpeggios as a ``.mat`` file of piano rolls."""
    random = np.random.default_rng(0)
    content: dict[str, Any] = {}
    for split, count in (("train", 12), ("valid", 3), ("test", 4)):
        cells = np.empty((1, count), dtype=object)
        for i in range(count):
            roll = np.zeros((int(random.integers(8, 20)), 88), dtype="uint8")
            steps = np.arange(len(roll))
            roll[steps, 30 + random.integers(12) + 4 * (steps % 3)] = 1
            cells[0, i] = roll
        content[f"{split}data"] = cells
    path = folder / "arpeggios.mat"
    scipy.io.savemat(path, content)
    return path


def timit(folder: Path) -> Path:
    """Write a few decaying tones as a zip laid out like TIMIT."""
    import soundfile  # an extra that only speech needs

    random = np.random.default_rng(0)
    time = np.arange(1600) / 16_000
    path = folder / "tones.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for region in (1, 2, 7, 8):
            for take in range(3):
                wave = np.sin(2 * np.pi * random.uniform(100, 900) * time) * np.exp(-20 * time)
                content = io.BytesIO()
                soundfile.write(content, 0.3 * wave, 16_000, format="WAV", subtype="PCM_16")
                name = f"timit/dr{region}-fabc{region}/sx{take}.wav"
                archive.writestr(name, content.getvalue())
    return path


def frames(folder: Path) -> Path:
    """Write a few noisy chirps as an ``.npz`` of frames of 200 samples."""
    random = np.random.default_rng(0)
    time = np.linspace(0.0, 1.0, 2000)
    waves = [np.sin(40 * f * time * (1 + time)) for f in random.uniform(1, 5, size=20)]
    x = np.stack(waves).reshape(20, 10, 200) + 0.05 * random.normal(size=(20, 10, 200))
    path = folder / "chirps.npz"
    np.savez(path, x=x.astype("float32"))
    return path
