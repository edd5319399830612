"""Data sets: built-in vowels, readers for speech, piano rolls, images and ``.npz``, batches."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.protocols import of_kind
from pyro_avrnn.data._speech import flac_bits
from pyro_avrnn.data.companding import mu_law, mu_law_decode, pcm, pcm_decode
from pyro_avrnn.data.dataset import Dataset, independent_baseline
from pyro_avrnn.data.digits import holds_digits, spoken_digits
from pyro_avrnn.data.images import mnist
from pyro_avrnn.data.librispeech import holds_librispeech, librispeech
from pyro_avrnn.data.mel import MelWarp, log_mel, mel_to_waveform
from pyro_avrnn.data.npz import npz
from pyro_avrnn.data.piano_rolls import piano_rolls
from pyro_avrnn.data.sequences import Batches, Sequences
from pyro_avrnn.data.sprites import holds_sprites, sprites
from pyro_avrnn.data.strings import digit_strings
from pyro_avrnn.data.timit import timit
from pyro_avrnn.data.vowels import vowels

__all__ = [
    "Batches",
    "Dataset",
    "MelWarp",
    "Sequences",
    "corpus_of",
    "digit_strings",
    "flac_bits",
    "independent_baseline",
    "librispeech",
    "load",
    "log_mel",
    "mel_to_waveform",
    "mnist",
    "mu_law",
    "mu_law_decode",
    "npz",
    "pcm",
    "pcm_decode",
    "piano_rolls",
    "spoken_digits",
    "sprites",
    "timit",
    "vowels",
]

_READERS = {".mat": piano_rolls, ".npz": npz, ".gz": mnist}
_CORPORA: dict[str, Callable[..., Dataset]] = {
    "digits": spoken_digits,
    "librispeech": librispeech,
    "sprites": sprites,
    "timit": timit,
}


def corpus_of(source: str | Path) -> str | None:
    """Name of the corpus that a folder or ``.zip`` is read as, None for any other source.

    What holds neither spoken digits, nor sprites, nor LibriSpeech is taken for TIMIT, whose reader
    says what is missing.
    """
    path = Path(source)
    if not ((str(source) and path.is_dir()) or path.suffix.lower() == ".zip"):
        return None
    if holds_digits(path):
        return "digits"
    if holds_sprites(path):
        return "sprites"
    return "librispeech" if holds_librispeech(path) else "timit"


def load(source: str | Path, **options: Any) -> Dataset:
    """Load a data set by its name or by the kind of file.

    Args:
        source: "vowels" (built in), a folder or ``.zip`` with TIMIT, LibriSpeech, the Free
            Spoken Digit Dataset or sprites, a ``.mat`` file of piano rolls, a ``.csv.gz`` of
            MNIST images, or your own ``.npz`` file.
        **options: go to the reader, such as ``segment`` for :func:`timit`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the name or extension is unknown, or the reader refuses the file.

    Example:
        >>> load("vowels").kind
        'real'
    """
    of_kind(str | os.PathLike, "the name of a data set or the path of a file", source=source)
    if source == "vowels":
        return vowels(**options)
    path = Path(source)
    if (corpus := corpus_of(source)) is not None:
        return _CORPORA[corpus](path, **options)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            "source must be 'vowels', a folder or .zip of speech (TIMIT, LibriSpeech, spoken "
            "digits) or sprites, a piano-roll .mat, a .csv.gz of MNIST or a .npz file, got "
            f"{str(source)!r}, which is neither a known name or extension nor a folder"
        )
    return reader(path, **options)
