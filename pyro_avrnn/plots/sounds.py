"""Pictures of music and sound: piano rolls and spectrograms."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pyro_avrnn.data._checks import Numbers, numbers, plain
from pyro_avrnn.media import check_notes
from pyro_avrnn.plots import style
from pyro_avrnn.plots.style import Target

_WINDOW_SECONDS = 0.032  # two to four periods of a low voice
_DECIBELS = 80.0  # range of a spectrogram, from the loudest down


def piano_rolls(
    rolls: Mapping[str, Numbers],
    path: Target,
    *,
    step_seconds: float | None = None,
    first_note: int = 21,
    title: str = "",
) -> Path:
    """Draw piano rolls above each other, on one time axis.

    Args:
        rolls: by their title, shape (T, K): 0 and 1, or probabilities; T may differ.
        path: PNG to write; returned.
        step_seconds: length of a step, in seconds; the axis counts steps from 0 if None.
        first_note: MIDI number of column 0. The C of each octave is labelled, C4 being note 60.
        title: of the picture.

    Raises:
        ValueError: if there is no roll, one is not (T, K) from 0 to 1, or they differ in K.
    """
    images = {k: numbers(f"rolls[{k!r}]", v, "TK").astype(float) for k, v in rolls.items()}
    for name, image in images.items():
        if image.min() < 0 or image.max() > 1:
            raise ValueError(
                f"rolls[{name!r}] must hold values from 0 to 1, got {image.min():g} to "
                f"{image.max():g}"
            )
    keys = _same("rolls", {name: image.shape[1] for name, image in images.items()}, "keys")
    check_notes(first_note, keys)
    _check_seconds("step_seconds", step_seconds)
    return style.save(draw_rolls(images, step_seconds, first_note, title), path)


def draw_rolls(
    rolls: Mapping[str, np.ndarray], step_seconds: float | None, first_note: int | None, title: str
) -> Figure:
    """Draw rolls (T, K), 0 to 1, by their title; the y axis counts columns if no note is given."""
    images, first = list(rolls.values()), first_note or 0
    xlabel = "time (seconds)" if step_seconds else "step"
    ylabel = "feature" if first_note is None else "key"
    picture, stacked = style.stacked(rolls, title, xlabel, ylabel)
    ends = [(step_seconds or 1.0) * len(image) for image in images]
    extents = [(0, end, first - 0.5, first + images[0].shape[1] - 0.5) for end in ends]
    transposed = [image.T for image in images]
    shown = style.images(stacked, transposed, extents, cmap="Blues", vmin=0, vmax=1)
    if first_note is not None:
        stacked[0].set_yticks(range(0, 128, 12), [f"C{octave}" for octave in range(-1, 10)])
        for axes in stacked:
            for note in range(0, 128, 12):  # between B and C, so that no key is crossed out
                axes.axhline(note - 0.5, color="#C8C8C8", lw=0.6)
    # a probability may be above 0 everywhere, so these are the keys that sound rather than not
    heard = np.flatnonzero(np.max([image.max(axis=0) for image in images], axis=0) > 0.5)
    low, high = (heard[0], heard[-1]) if len(heard) else (0, images[0].shape[1] - 1)
    room = 1 if first_note is None else 6  # one C, at least, is in view
    stacked[0].set_ylim(first + low - room, first + high + room)
    stacked[0].set_xlim(0, max(ends))
    if any(((image != 0) & (image != 1)).any() for image in images):
        picture.colorbar(shown, ax=stacked, label="probability", **style.BAR)
    return picture


def spectrograms(
    sounds: Mapping[str, Numbers],
    path: Target,
    *,
    sample_rate: int | None = None,
    frame_seconds: float | None = None,
    title: str = "",
) -> Path:
    """Draw spectrograms above each other, on one time axis and one scale of loudness.

    Waveforms (S,) are drawn in decibels below their common loudest point, down to -80, with a
    Hann window of 32 ms every 8 ms, against seconds and hertz. Log-mel frames (T, M) are drawn as
    they are, against seconds and the number of the band.

    Args:
        sounds: by their title, either all waveforms or all log-mel frames.
        path: PNG to write; returned.
        sample_rate: of the waveforms, in hertz; needed for these.
        frame_seconds: time between log-mel frames; needed for these.
        title: of the picture.

    Raises:
        ValueError: if there is no sound, the two kinds are mixed, one is not finite, log-mel
            frames differ in M, or what their kind needs is missing.
    """
    ranks = {name: plain(sound).ndim for name, sound in sounds.items()}
    kinds = "dimensions, 1 for waveforms (S,) and 2 for log-mel frames (T, M)"
    if _same("sounds", ranks, kinds) == 1:
        images, seconds, top = _spectra(sounds, sample_rate)
        half = top / (len(images[0]) - 1) / 2  # pixels are centred on 0 .. top
        edges, limits, low, high = (-half, top + half), (0.0, top), -_DECIBELS, 0.0
        ylabel, label = "frequency (Hz)", "dB from the loudest"
    else:
        images, seconds = _mel_frames(sounds, frame_seconds)
        edges = limits = (-0.5, len(images[0]) - 0.5)
        low, high = min(image.min() for image in images), max(image.max() for image in images)
        ylabel, label = "mel band", "log-mel power"
    picture, stacked = style.stacked(sounds, title, "time (seconds)", ylabel)
    ends = [seconds * image.shape[1] for image in images]
    extents = [(0, end, *edges) for end in ends]
    shown = style.images(stacked, images, extents, cmap="magma", vmin=low, vmax=high)
    stacked[0].set_xlim(0, max(ends))
    stacked[0].set_ylim(*limits)
    picture.colorbar(shown, ax=stacked, label=label, **style.BAR)
    return style.save(picture, path)


def _mel_frames(
    sounds: Mapping[str, Numbers], frame_seconds: float | None
) -> tuple[list[np.ndarray], float]:
    """Log-mel frames as images (M, T), and the seconds between them."""
    if frame_seconds is None:
        raise ValueError("frame_seconds must be the time between log-mel frames (T, M), got None")
    _check_seconds("frame_seconds", frame_seconds)
    images = {k: numbers(f"sounds[{k!r}]", v, "TM").T for k, v in sounds.items()}
    _same("sounds", {name: len(image) for name, image in images.items()}, "mel bands")
    return list(images.values()), frame_seconds


def _spectra(
    sounds: Mapping[str, Numbers], sample_rate: int | None
) -> tuple[list[np.ndarray], float, float]:
    """Decibels (F, frames) from the loudest point, the seconds between frames, the top hertz."""
    if sample_rate is None or sample_rate < 1:
        raise ValueError(
            f"sample_rate must be at least 1 hertz for waveforms (S,), got {sample_rate}"
        )
    hop = max(1, round(sample_rate * _WINDOW_SECONDS / 4))
    window = 4 * hop
    weights = np.hanning(window + 1)[:-1]
    images = []
    for name, sound in sounds.items():
        waveform = numbers(f"sounds[{name!r}]", sound, "S").astype(np.float64)
        # frame i is centred on sample hop * (i + 1/2), the middle of its pixel
        padded = np.pad(waveform, (window // 2 - hop // 2, window))
        starts = hop * np.arange(-(-len(waveform) // hop))
        frames = np.lib.stride_tricks.sliding_window_view(padded, window)[starts]
        power = np.abs(np.fft.rfft(frames * weights, axis=-1)) ** 2
        images.append(10 * np.log10(np.maximum(power, 1e-30)).T)
    loudest = max(image.max() for image in images)
    return [image - loudest for image in images], hop / sample_rate, sample_rate / 2


def _same(argument: str, sizes: Mapping[str, int], what: str) -> int:
    """The size that all arrays share."""
    if not sizes:
        raise ValueError(f"{argument} must hold at least one array by its title, got none")
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{argument} must all have the same number of {what}, got {dict(sizes)}")
    return next(iter(sizes.values()))


def _check_seconds(argument: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ValueError(f"{argument} must be positive and finite, in seconds, got {seconds}")
