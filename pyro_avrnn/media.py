"""Sequences as files one can hear or look at: WAV, MIDI, and pictures of rolls and spectrograms.

Every writer takes tensors or arrays, overwrites a file that is there, and puts the whole file in
its place at the end: a run that stops half way leaves the old file or none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_TICKS = 480  # of MIDI time in a step, which is written as a quarter note
_VELOCITY = 80  # mezzo-forte: a roll does not say how hard a key is struck
_WINDOW_SECONDS = 0.032  # of a spectrogram: two to four periods of a low voice
_DECIBELS = 80.0  # range of a spectrogram, from the loudest down


def write_wav(path: str | Path, samples: Any, sample_rate: int) -> Path:
    """Write a waveform as a 16-bit WAV file of one channel.

    A sample x is stored as round(32768 x), and values outside what 16 bits hold as the nearest
    they do hold, -1 or 32767 / 32768: what is too loud is clipped, never scaled, so that two files
    compare. Data in units of int16 are divided by 32768 first.

    Args:
        path: file to write; returned.
        samples: shape (S,), floating, in [-1, 1].
        sample_rate: in hertz.

    Raises:
        ValueError: if the samples are not (S,) finite numbers, or the rate is below 1.
        TypeError: if they are integers, whose scale would be a guess.
        ImportError: if soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"writing {path} needs soundfile: pip install pyro-avrnn[audio]"
        ) from error
    waveform = _array("samples", samples, ("S",))
    if waveform.dtype.kind != "f":
        raise TypeError(
            f"samples must be floating numbers in [-1, 1], got {waveform.dtype}; divide 16-bit "
            "samples by 32768"
        )
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1 hertz, got {sample_rate}")
    rounded = np.rint(waveform.astype(np.float64) * 32768)
    content = io.BytesIO()
    soundfile.write(
        content,
        np.clip(rounded, -32768, 32767).astype(np.int16),
        sample_rate,
        subtype="PCM_16",
        format="WAV",
    )
    return _replace(path, content)


def write_midi(
    path: str | Path, roll: Any, *, step_seconds: float = 0.5, first_note: int = 21
) -> Path:
    """Write a piano roll as a MIDI file, one track of piano.

    Consecutive steps of a sounding key are one held note. That is a convention: a piano roll does
    not say whether a key is held or struck again. A step is written as a quarter note.

    Args:
        path: file to write; returned.
        roll: shape (T, K) of 0 and 1, K = 88 for the keys of a piano.
        step_seconds: length of a step, at most 16; 0.5 are quarter notes at 120 a minute.
        first_note: MIDI number of column 0; 21 is A0, the lowest key of a piano.

    Raises:
        ValueError: if the roll is not (T, K) of 0 and 1, or a note or a tempo is not one of MIDI.
        ImportError: if mido is not installed.
    """
    try:
        import mido
    except ImportError as error:
        raise ImportError(f"writing {path} needs mido: pip install pyro-avrnn[music]") from error
    keys = _roll("roll", roll)
    if ((keys != 0) & (keys != 1)).any():
        raise ValueError(
            f"roll must hold only 0 and 1, got values from {keys.min():g} to {keys.max():g}; "
            "binarise it, for instance by a threshold on probabilities"
        )
    _check_notes(first_note, keys.shape[1])
    if not 1e-6 <= step_seconds <= 16:  # a tempo is 24 bits of microseconds
        raise ValueError(f"step_seconds must be from 1e-06 to 16 seconds, got {step_seconds}")
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=round(step_seconds * 1e6)))
    still = np.zeros((1, keys.shape[1]), dtype=np.int8)
    changes = np.diff(np.concatenate([still, keys.astype(np.int8), still]), axis=0)  # (T + 1, K)
    written = 0  # the step up to which the track goes
    for step, change in enumerate(changes):
        # releases first: a note that begins where another ends does not sound with it
        for kind, sign in (("note_off", -1), ("note_on", 1)):
            for key in np.flatnonzero(change == sign).tolist():
                track.append(
                    mido.Message(
                        kind,
                        note=first_note + key,
                        velocity=_VELOCITY,
                        time=_TICKS * (step - written),
                    )
                )
                written = step
    # the rest at the end of a piece belongs to it
    track.append(mido.MetaMessage("end_of_track", time=_TICKS * (len(keys) - written)))
    content = io.BytesIO()
    mido.MidiFile(type=0, ticks_per_beat=_TICKS, tracks=[track]).save(file=content)
    return _replace(path, content)


def picture_roll(
    path: str | Path,
    rolls: Mapping[str, Any],
    *,
    step_seconds: float | None = None,
    first_note: int = 21,
    title: str = "",
) -> Path:
    """Draw piano rolls above each other, on one time axis, as a PNG.

    Args:
        path: file to write; returned.
        rolls: by their title, shape (T, K): 0 and 1, or probabilities; T may differ.
        step_seconds: length of a step, in seconds; the axis counts steps from 0 if None.
        first_note: MIDI number of column 0. The C of each octave is labelled, C4 being note 60.
        title: of the picture.

    Raises:
        ValueError: if there is no roll, one is not (T, K) from 0 to 1, or they differ in K.
    """
    images = {name: _roll(f"rolls[{name!r}]", roll) for name, roll in _panels("rolls", rolls)}
    for name, image in images.items():
        if image.min() < 0 or image.max() > 1:
            raise ValueError(
                f"rolls[{name!r}] must hold values from 0 to 1, got {image.min():g} to "
                f"{image.max():g}"
            )
    _same("rolls", {name: image.shape[1] for name, image in images.items()}, "keys")
    keys = next(iter(images.values())).shape[1]
    _check_notes(first_note, keys)
    _check_seconds("step_seconds", step_seconds)
    step = step_seconds or 1.0
    figure, stacked = _stacked(images, 1.9, title)
    for axes, image in zip(stacked, images.values(), strict=True):
        shown = axes.imshow(
            image.T,
            extent=(0, step * len(image), first_note - 0.5, first_note + keys - 0.5),
            cmap="Blues",
            vmin=0,
            vmax=1,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        axes.set_yticks(range(0, 128, 12), [f"C{octave}" for octave in range(-1, 10)])
        axes.set_ylabel("key")
        for note in range(0, 128, 12):  # between B and C, so that no key is crossed out
            axes.axhline(note - 0.5, color="#C8C8C8", lw=0.6)
    sounding = np.flatnonzero(np.any([image.any(axis=0) for image in images.values()], axis=0))
    low, high = (sounding[0], sounding[-1]) if len(sounding) else (0, keys - 1)
    stacked[0].set_ylim(first_note + low - 6, first_note + high + 6)  # one C, at least, is in view
    stacked[0].set_xlim(0, step * max(map(len, images.values())))
    stacked[-1].set_xlabel("time (seconds)" if step_seconds else "step")
    if any(((image != 0) & (image != 1)).any() for image in images.values()):
        figure.colorbar(shown, ax=stacked, label="probability", shrink=0.7, pad=0.01)
    return _save(figure, path)


def picture_spectrograms(
    path: str | Path,
    sounds: Mapping[str, Any],
    *,
    sample_rate: int | None = None,
    frame_seconds: float | None = None,
    title: str = "",
) -> Path:
    """Draw spectrograms above each other, on one time axis and one scale of loudness, as a PNG.

    Waveforms (S,) are drawn in decibels below the loudest point of them all, down to -80, with a
    Hann window of 32 ms every 8 ms, against seconds and hertz. Log-mel frames (T, M) are drawn as
    they are, against seconds and the number of the band.

    Args:
        path: file to write; returned.
        sounds: by their title, either all waveforms or all log-mel frames.
        sample_rate: of the waveforms, in hertz; needed for these.
        frame_seconds: time between log-mel frames; needed for these.
        title: of the picture.

    Raises:
        ValueError: if there is no sound, the two kinds are mixed, one is not finite, log-mel
            frames differ in M, or what their kind needs is missing.
    """
    ranks = {name: np.ndim(_plain(sound)) for name, sound in _panels("sounds", sounds)}
    _same("sounds", ranks, "dimensions, 1 for waveforms (S,) and 2 for log-mel frames (T, M)")
    if set(ranks.values()) == {1}:
        if sample_rate is None or sample_rate < 1:
            raise ValueError(
                f"sample_rate must be at least 1 hertz for waveforms (S,), got {sample_rate}"
            )
        images, seconds = _spectra(sounds, sample_rate)
        top = sample_rate / 2
        half = top / (len(next(iter(images.values()))) - 1) / 2  # pixels are centred on 0 .. top
        edges, limits = (-half, top + half), (0.0, top)
        ylabel, label = "frequency (Hz)", "dB from the loudest"
        loudest = max(float(image.max()) for image in images.values())
        low, high = -_DECIBELS, 0.0
        images = {name: image - loudest for name, image in images.items()}
    else:
        if frame_seconds is None:
            raise ValueError(
                "frame_seconds must be the time between log-mel frames (T, M), got None"
            )
        _check_seconds("frame_seconds", frame_seconds)
        images = {k: _array(f"sounds[{k!r}]", v, ("T", "M")).T for k, v in sounds.items()}
        _same("sounds", {name: len(image) for name, image in images.items()}, "mel bands")
        seconds, bands = frame_seconds, len(next(iter(images.values())))
        edges = limits = (-0.5, bands - 0.5)
        ylabel, label = "mel band", "log-mel power"
        low = min(float(image.min()) for image in images.values())
        high = max(float(image.max()) for image in images.values())
    figure, stacked = _stacked(images, 1.9, title)
    for axes, image in zip(stacked, images.values(), strict=True):
        shown = axes.imshow(
            image,
            extent=(0, seconds * image.shape[1], *edges),
            cmap="magma",
            vmin=low,
            vmax=high,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        axes.set_ylabel(ylabel)
    stacked[0].set_xlim(0, seconds * max(image.shape[1] for image in images.values()))
    stacked[-1].set_xlabel("time (seconds)")
    stacked[0].set_ylim(*limits)
    figure.colorbar(shown, ax=stacked, label=label, shrink=0.7, pad=0.01)
    return _save(figure, path)


def _spectra(sounds: Mapping[str, Any], sample_rate: int) -> tuple[dict[str, np.ndarray], float]:
    """Power in decibels (F, frames) of each waveform, and the seconds between frames."""
    hop = max(1, round(sample_rate * _WINDOW_SECONDS / 4))
    window = 4 * hop
    weights = np.hanning(window + 1)[:-1]
    images = {}
    for name, sound in sounds.items():
        waveform = _array(f"sounds[{name!r}]", sound, ("S",)).astype(np.float64)
        # frame i is centred on sample hop * (i + 1/2), the middle of its pixel
        padded = np.pad(waveform, (window // 2 - hop // 2, window))
        starts = hop * np.arange(-(-len(waveform) // hop))
        frames = np.lib.stride_tricks.sliding_window_view(padded, window)[starts]
        power = np.abs(np.fft.rfft(frames * weights, axis=-1)) ** 2
        images[name] = 10 * np.log10(np.maximum(power, 1e-30)).T
    return images, hop / sample_rate


def _stacked(
    images: Mapping[str, Any], inches: float, title: str
) -> tuple[Figure, Sequence[Axes]]:
    """A figure outside pyplot with one axes for each image, sharing both axes."""
    figure = Figure(
        figsize=(9.0, 0.9 + inches * len(images)), layout="constrained", facecolor="white"
    )
    if title:
        figure.suptitle(title, fontweight="bold")
    stacked = figure.subplots(len(images), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, name in zip(stacked, images, strict=True):
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(stacked)


def _save(figure: Figure, path: str | Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    return _replace(path, content)


def _replace(path: str | Path, content: io.BytesIO) -> Path:
    """Put the whole content in place of the file, or leave what is there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: its folder does not exist; make it")
    if path.is_dir():
        raise ValueError(f"path must be the file to write, got the folder {path}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def _array(argument: str, value: Any, letters: tuple[str, ...]) -> np.ndarray:
    """A tensor or an array as finite numbers, with one dimension for each of ``letters``."""
    array = np.asarray(_plain(value))
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{argument} must hold real numbers, got an array of {array.dtype}")
    if array.ndim != len(letters) or 0 in array.shape:
        expected = ", ".join(letters) + ("," if len(letters) == 1 else "")
        raise ValueError(f"{argument} must have shape ({expected}), not empty, got {array.shape}")
    if not np.isfinite(array).all():
        first = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ValueError(
            f"{argument} must be finite, got a NaN or an infinity at index "
            f"{first[0] if len(first) == 1 else first}; leave that part out"
        )
    return array


def _roll(argument: str, value: Any) -> np.ndarray:
    return _array(argument, value, ("T", "K")).astype(np.float64)


def _panels(argument: str, panels: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not panels:
        raise ValueError(f"{argument} must hold at least one array by its title, got none")
    return list(panels.items())


def _same(argument: str, sizes: Mapping[str, int], what: str) -> None:
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{argument} must all have the same number of {what}, got {dict(sizes)}")


def _check_seconds(argument: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"{argument} must be positive and finite, in seconds, got {seconds}")


def _check_notes(first_note: int, keys: int) -> None:
    if first_note < 0 or first_note + keys > 128:
        raise ValueError(
            f"first_note must leave {keys} keys within the MIDI notes 0 to 127, got {first_note}"
        )
