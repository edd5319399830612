"""TIMIT speech as frames of raw waveform.

The corpus has one of two layouts: the sample that NLTK distributes (``timit/dr1-fvmh0/sa1.wav``,
16 speakers) or the full corpus of the LDC (``TRAIN/DR1/FVMH0/SA1.WAV``; upper or lower case).
Frames of 200 samples and the global standardisation follow Chung et al. (2015),
https://arxiv.org/abs/1506.02216; segments are ours. Mu-law levels follow Havtorn et al. (2022),
https://arxiv.org/abs/2202.12707.

The splits share no speaker. In the first layout dialect regions 1 to 6 are for training, 7 for
validation, 8 for test. In the LDC's, TEST is for test, region 8 of TRAIN for validation, the rest
of TRAIN for training. Every speaker reads the sentences ``sa1`` and ``sa2``: all splits have them.
"""

import re
from pathlib import Path
from typing import Any

from pyro_avrnn.data._checks import reading
from pyro_avrnn.data._speech import Corpus, Framing
from pyro_avrnn.data.dataset import Dataset

_EXPECTED = (
    "a folder or .zip with files dr1-SPEAKER/SENTENCE.wav or TRAIN/DR1/SPEAKER/SENTENCE.WAV"
)
_FLAT = re.compile(r"(?:.*/)?dr([1-8])-([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)
_LDC = re.compile(r"(?:.*/)?(train|test)/dr([1-8])/([a-z0-9]+)/([a-z0-9]+)\.wav", re.IGNORECASE)


def timit(path: str | Path, **framing: Any) -> Dataset:
    """Read TIMIT; X = ``frame`` samples of waveform, standardised by one mean and deviation.

    Args:
        path: a folder, or a ``.zip`` that is read in place.
        framing: keywords; ``frame`` (default 200), samples in a frame, where the remainder of an
            utterance is dropped; ``segment`` (default 100), utterances are cut into segments of at
            most so many frames, and None keeps them whole; ``whole`` (default False) keeps those
            for training whole, for ``Batches(window=...)``, which cuts them anew in each epoch;
            ``mu_law``, bits from 1 to 16: samples become the levels of
            :func:`~.companding.mu_law`, not standardised, and the data are of kind "mu-law";
            ``pcm``, bits from 1 to 16: samples become linear levels, in units of the deviation,
            and the data are of kind "pcm"; ``n_mels``: X is that many log-mel values of 25 ms,
            every 10 ms, each standardised by the training frames; ``warp``: the limit of a
            :class:`~.mel.MelWarp` of these, for ``augment`` of batches.

    Returns:
        ``mean`` and ``std`` are numbers in int16 units, over all training frames; 0 and 1 for
        mu-law levels; 0 and the deviation for linear ones.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it holds no such files, a split is empty, two splits share a speaker, or a
            file is damaged or not 16-bit mono audio at 16 kHz.
        ImportError: if soundfile is not installed.
    """
    framed = Framing(**framing)
    with reading(path, _EXPECTED, folder=True) as corpus:
        return framed.read(corpus, _CORPUS)


def _parse(file: str) -> tuple[str, str] | None:
    """Split and name of an utterance, by its path."""
    if match := _LDC.fullmatch(file):
        part, region, speaker, sentence = (group.lower() for group in match.groups())
        split = "test" if part == "test" else "valid" if region == "8" else "train"
    elif match := _FLAT.fullmatch(file):
        region, speaker, sentence = (group.lower() for group in match.groups())
        split = {"7": "valid", "8": "test"}.get(region, "train")
    else:
        return None
    return split, f"dr{region}-{speaker}/{sentence}"


_CORPUS = Corpus(
    "timit",
    _parse,
    re.compile(r"dr[1-8]-([a-z0-9]+)/"),
    f"{_EXPECTED}, all dialect regions",
    "TIMIT acoustic-phonetic corpus, (c) 1993 Linguistic Data Consortium",
)
