"""Japanese Vowels, the data set that comes with the package.

Nine male speakers say /ae/: 640 series of 12 LPC cepstrum coefficients, a frame every 6.4 ms
(windows of 25.6 ms, audio at 10 kHz), 7 to 29 frames long.

Origin: Kudo, Toyama and Shimbo, "Multidimensional curve classification using passing-through
regions", Pattern Recognition Letters 20 (1999) 1103-1111; UCI Machine Learning Repository,
"Japanese Vowels", https://doi.org/10.24432/C5NS47.
Licence: CC BY 4.0, as offered by UCI. The numbers were taken from the copy in the Python package
aeon 1.6.0 (BSD 3-clause) and changed in form only: from text to float32, in one file.

``japanese_vowels.npz`` holds ``x`` (frames, 12) float32, ``lengths`` (640,), ``speaker`` (640,)
from 1 to 9, ``test`` (640,) bool (the official split) and the strings ``origin`` and ``licence``.
"""

from importlib import resources

import numpy as np
import torch

from pyro_avrnn.data.dataset import Dataset, by_split, standardise

_FILE = "japanese_vowels.npz"


def vowels() -> Dataset:
    """Japanese Vowels: 240 training, 30 validation and 370 test series, X = 12.

    Training and test are the official parts (270 and 370 series; the same nine speakers on other
    occasions). Every ninth of the 270 is held out for validation, 3 or 4 of each speaker. Each
    dimension is standardised by the frames of the remaining 240.

    Example:
        >>> data = vowels()
        >>> len(data.train), len(data.valid), len(data.test), data.x_dim
        (240, 30, 370, 12)
    """
    with resources.files("pyro_avrnn.data").joinpath(_FILE).open("rb") as file:
        with np.load(file, allow_pickle=False) as stored:
            x, lengths = stored["x"], stored["lengths"]
            speaker, test = stored["speaker"], stored["test"]
            origin, licence = str(stored["origin"]), str(stored["licence"])
    series = np.split(x, np.cumsum(lengths)[:-1])
    pieces = []
    for i, (speaks, held, frames) in enumerate(zip(speaker, test, series, strict=True)):
        part = "test" if held else "train"
        # the 270 training series come first
        split = "valid" if not held and i % 9 == 8 else part
        pieces.append((split, f"speaker{speaks}/{part}-{i:03d}", frames))
    splits = by_split(pieces, _FILE, torch.float64)
    origin = f"{origin} Licence: {licence}"
    return Dataset("vowels", *standardise(*splits), frame_seconds=0.0064, origin=origin)
