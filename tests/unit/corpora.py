"""Small corpora of made-up speech, in the layouts of LibriSpeech and of TIMIT."""

import io
import zipfile
from pathlib import Path

import numpy as np


def spoken(reader: int, count: int = 1000) -> np.ndarray:
    """Samples that tell one reader from another."""
    return (np.arange(count) * (7919 + 2 * reader) % 4001 - 2000).astype(np.int16)


def audio(samples: np.ndarray, kind: str = "FLAC", rate: int = 16_000) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype="PCM_16")
    return file.getvalue()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def libri(folder: str, *readers: int, count: int = 1000) -> dict[str, bytes]:
    """An utterance of each reader, in the layout of OpenSLR."""
    return {
        f"{folder}/{reader}/7/{reader}-7-0000.flac": audio(spoken(reader, count))
        for reader in readers
    }


def by_folder(**options: int) -> dict[str, bytes]:
    return (
        libri("train-clean-100", 7, 8, **options)
        | libri("DEV-other", 5, **options)
        | libri("test-clean", 6, **options)
    )


def by_region(*, count: int = 1000) -> dict[str, bytes]:
    """TIMIT with a speaker in each split; region 1 is for training, 7 and 8 for the others."""
    return {
        f"dr{region}-fabc{region}/sa1.wav": audio(spoken(region, count), "WAV")
        for region in (1, 7, 8)
    }
