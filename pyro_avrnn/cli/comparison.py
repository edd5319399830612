"""Options of ``avrnn compare``: what is compared, on which data, and where the results go."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from inference.protocols import given
from pyro_avrnn.cli.options import option
from pyro_avrnn.cli.rows import parse
from pyro_avrnn.cli.settings import Settings
from pyro_avrnn.cli.training import Training
from pyro_avrnn.data import corpus_of


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which data, and where the results go."""

    data: str = option(
        "vowels",
        "vowels (built in), a folder or .zip of TIMIT, LibriSpeech or spoken digits (FSDD), a "
        "piano-roll .mat, or your own .npz",
    )
    segment: int | None = option(
        None,
        "frames in a segment: speech is cut everywhere (default: 100), but not for training with "
        "--window or --truncate; piano rolls for training only (default: no cuts)",
    )
    transpose: int | None = option(
        None,
        "piano rolls: move each training piece by up to this many semitones, anew in each epoch",
        "at least 1",
    )
    frame: int | None = option(
        None, "speech: samples in a frame (default: 200; digits are read as log-mel frames)"
    )
    pcm: int | None = option(
        None, "speech: score samples as linear levels of this many bits (default: densities)"
    )
    mu_law: int | None = option(None, "the same with levels of mu-law, as papers do")
    n_mels: int | None = option(
        None, "speech: log-mel frames of so many bands (default: waveforms; digits: 40)"
    )
    warp: float | None = option(
        None, "log-mel frames: warp the mel axis of training pieces by up to exp(warp), anew each"
    )
    strings: str | None = option(
        None, "digits: join recordings of a speaker to strings of so many, such as 3-5"
    )
    side: int | None = option(None, "sprites: pixels of a side (default: 64)", "at least 1")
    rows: tuple[str, ...] = option((), "rows of the table, see below")
    schedules: tuple[Literal["elbo", "alternating", "joint"], ...] = option(
        ("elbo", "alternating", "joint"),
        "without --rows: kinds of training to compare; the RNN is always there",
    )
    views: tuple[str, ...] = option(
        ("conditional", "joint"),
        "without --rows: views of the critics, listed below under view",
    )
    seeds: int = option(1, "number of seeds for each row", "at least 1")
    first_seed: int = option(0, "the first seed", "at least 0")
    out: Path = option(Path("runs/compare"), "output folder")
    jobs: int = option(
        min(os.cpu_count() or 1, 4), "trainings at the same time, one thread each", "at least 1"
    )
    resume: bool = option(False, "keep what is finished in --out and train what is missing")
    overwrite: bool = option(False, "start anew in an --out that holds results")

    @cached_property
    def is_speech(self) -> bool:
        """Whether the data are recordings of sentences."""
        return corpus_of(self.data) in ("timit", "librispeech")

    def trainings(self) -> list[Training]:
        """The trainings to compare; a row that does not exist raises ``ValueError``."""
        names = {
            "elbo": ["elbo", "elbo-annealed"],
            "alternating": ["alternating"],
            "joint": [f"{view}{suffix}" for view in self.views for suffix in ("", "+kl")],
        }
        chosen = [row for kind in names if kind in self.schedules for row in names[kind]]
        return [parse(row) for row in dict.fromkeys(self.rows or ["rnn", *chosen])]

    def reader_options(self, settings: Settings) -> dict[str, Any]:
        """What ``data.load`` takes; an option of other data raises ``ValueError``."""
        speech, rolls, digits = "speech (TIMIT, LibriSpeech)", "piano rolls (.mat)", "digits"
        both = f"{speech} and spoken {digits}"
        kinds = dict.fromkeys(("pcm", "mu_law"), speech)
        kinds |= {"segment": f"{speech} and {rolls}", "transpose": rolls, "strings": digits}
        kinds |= dict.fromkeys(("frame", "n_mels", "warp"), both) | {"side": "sprites"}
        chosen = given(**{name: getattr(self, name) for name in kinds})
        found = speech if self.is_speech else rolls if self.data.lower().endswith(".mat") else "-"
        corpus = corpus_of(self.data)
        found = corpus if corpus in ("digits", "sprites") else found
        for name in chosen:
            if found not in kinds[name]:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for {kinds[name]}, got --data {self.data}")
        if not self.is_speech:
            return chosen
        uncut = settings.window is not None or settings.truncate is not None
        return {"segment": 100, **({"whole": True} if uncut else {}), **chosen}
