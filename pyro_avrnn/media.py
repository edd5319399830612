"""Sequences as files to listen to: WAV and MIDI.

The writers take tensors or arrays and overwrite a file that is there. A run that stops half way
leaves the old file or none.
"""

from pathlib import Path

import numpy as np

from inference.files import atomically
from inference.protocols import at_least, counts
from pyro_avrnn.data._checks import Numbers, numbers, optional, waveform, writable

_TICKS = 480  # of MIDI time in a step, which is written as a quarter note
_VELOCITY = 80  # mezzo-forte: a roll does not say how hard a key is struck


def write_wav(path: str | Path, samples: Numbers, sample_rate: int) -> Path:
    """Write a waveform as a 16-bit WAV file of one channel.

    A sample x is stored as round(32768 x). Values outside the range of 16 bits become the nearest
    value inside it, -1 or 32767 / 32768: loud sounds are clipped, never scaled, so that two files
    compare. Divide data in units of int16 by 32768 first.

    Args:
        path: file to write; returned.
        samples: shape (S,), floating, in [-1, 1].
        sample_rate: in hertz.

    Raises:
        ValueError: if the samples are not (S,) finite numbers, or the rate is below 1.
        TypeError: if they are integers, whose scale would be a guess.
        ImportError: if soundfile is not installed.
    """
    soundfile = optional("soundfile", "audio")
    found = waveform(samples)
    counts(1, sample_rate=sample_rate)
    if sample_rate >= 2**31:
        raise ValueError(f"sample_rate must be below 2**31 hertz, got {sample_rate}")
    rounded = np.rint(found * 32768)
    content = np.clip(rounded, -32768, 32767).astype(np.int16)
    return atomically(
        writable(path),
        lambda file: soundfile.write(file, content, sample_rate, subtype="PCM_16", format="WAV"),
    )


def write_midi(
    path: str | Path, roll: Numbers, *, step_seconds: float = 0.5, first_note: int = 21
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
    mido = optional("mido", "music")
    keys = numbers("roll", roll, "TK").astype(np.float64)
    if ((keys != 0) & (keys != 1)).any():
        raise ValueError(
            f"roll must hold only 0 and 1, got values from {keys.min():g} to {keys.max():g}; "
            "binarise it, for instance by a threshold on probabilities"
        )
    at_least(0.0, step_seconds=step_seconds)
    check_notes(first_note, keys.shape[1])
    if not 1e-6 <= step_seconds <= 16:  # a tempo is 24 bits of microseconds
        raise ValueError(f"step_seconds must be from 1e-06 to 16 seconds, got {step_seconds}")
    track = mido.MidiTrack()
    track.append(mido.MetaMessage("set_tempo", tempo=round(step_seconds * 1e6)))
    written = 0  # the step up to which the track goes
    for step, kind, key in _strikes(keys.astype(np.int8)):
        time = _TICKS * (step - written)
        track.append(mido.Message(kind, note=first_note + key, velocity=_VELOCITY, time=time))
        written = step
    # the rest at the end of a piece belongs to it
    track.append(mido.MetaMessage("end_of_track", time=_TICKS * (len(keys) - written)))
    file = mido.MidiFile(type=0, ticks_per_beat=_TICKS, tracks=[track])
    return atomically(writable(path), file.save)


def _strikes(keys: np.ndarray) -> list[tuple[int, str, int]]:
    """Step, kind of message and column of every note that begins or ends in a roll (T, K)."""
    still = np.zeros((1, keys.shape[1]), dtype=np.int8)
    changes = np.diff(np.concatenate([still, keys, still]), axis=0)  # (T + 1, K)
    return [
        (step, kind, key)
        for step, change in enumerate(changes)
        # releases first: a note that begins where another ends does not sound with it
        for kind, sign in (("note_off", -1), ("note_on", 1))
        for key in np.flatnonzero(change == sign).tolist()
    ]


def check_notes(first_note: int, keys: int) -> None:
    """Refuse a first note with which some of the keys are no MIDI notes."""
    counts(0, first_note=first_note)
    if first_note < 0 or first_note + keys > 128:
        raise ValueError(
            f"first_note must leave {keys} keys within the MIDI notes 0 to 127, got {first_note}"
        )
