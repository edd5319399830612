"""Options of ``avrnn compare``: what is compared, and how all of it is trained."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pyro_avrnn.cli.options import AT_LEAST_0, AT_LEAST_1, MORE_THAN_0, option
from pyro_avrnn.cli.rows import Training, default_rows, parse
from pyro_avrnn.data import holds_digits


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which data, and where the results go."""

    data: str = option(
        "vowels",
        "vowels (built in), a folder or .zip of TIMIT or of spoken digits (FSDD), a piano-roll "
        ".mat, or your own .npz",
    )
    segment: int | None = option(
        None,
        "frames in a segment; TIMIT: all utterances are cut (default: 100); piano rolls: "
        "training pieces are cut, the others stay whole (default: no cuts)",
    )
    frame: int | None = option(None, "TIMIT: samples in a frame (default: 200)")
    mu_law: int | None = option(
        None,
        "TIMIT: code each sample in this many bits of mu-law and score it by a discretised "
        "mixture of logistics; bits per sample can be compared between papers (default: "
        "densities)",
    )
    rows: tuple[str, ...] = option((), "rows of the table by name, see below")
    schedules: tuple[Literal["elbo", "alternating", "joint"], ...] = option(
        ("elbo", "alternating", "joint"),
        "without --rows: kinds of training to compare; the RNN is always there",
    )
    views: tuple[str, ...] = option(
        ("conditional", "joint"),
        "without --rows: views of the critics, as in the option view below",
    )
    seeds: int = option(1, "number of seeds for each row", AT_LEAST_1)
    first_seed: int = option(0, "the first seed", AT_LEAST_0)
    out: Path = option(Path("runs/compare"), "output folder")
    jobs: int = option(
        min(os.cpu_count() or 1, 4), "trainings at the same time, one thread each", AT_LEAST_1
    )
    resume: bool = option(False, "keep what is finished in --out and train what is missing")

    @cached_property
    def is_timit(self) -> bool:
        """Whether the data are read as TIMIT."""
        archive = Path(self.data).is_dir() or self.data.lower().endswith(".zip")
        return archive and not holds_digits(self.data)

    def trainings(self) -> list[Training]:
        """The trainings to compare; a row that does not exist raises ``ValueError``."""
        rows = self.rows or default_rows(self.schedules, self.views)
        return [parse(text) for text in dict.fromkeys(rows)]

    def reader_options(self) -> dict[str, int]:
        """What ``data.load`` takes; an option of other data raises ``ValueError``."""
        options = {"segment": self.segment, "frame": self.frame, "mu_law": self.mu_law}
        given = {name: value for name, value in options.items() if value is not None}
        if self.is_timit:
            return {"segment": 100} | given
        for name in given:
            if name != "segment":
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for TIMIT, got --data {self.data}")
            if not self.data.lower().endswith(".mat"):
                raise ValueError(
                    f"--segment is for TIMIT and piano rolls (.mat), got --data {self.data}"
                )
        return given


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison share."""

    steps: int = option(1500, "SVI steps of each training", AT_LEAST_1)
    batch_size: int = option(64, "sequences in a batch", AT_LEAST_1)
    z_dim: int = option(8, "Z, size of the latent of a step", AT_LEAST_1)
    h_dim: int = option(64, "H, width of the state and of hidden layers", AT_LEAST_1)
    min_scale: float = option(
        1e-3,
        "smallest scale of a normal emission, in standard deviations of the data (default: "
        "0.001; 0.01 for TIMIT)",
        AT_LEAST_0,
    )
    lr: float = option(2e-3, "learning rate of Adam", MORE_THAN_0)
    weight_decay: float = option(0.0, "weight decay; above 0, AdamW replaces Adam", AT_LEAST_0)
    lr_decay: bool = option(False, "lower the learning rate linearly, to a tenth at the end")
    clip_norm: float = option(5.0, "limit on the norm of the gradient, per frame", MORE_THAN_0)
    validate_every: int = option(50, "SVI steps between validations", AT_LEAST_1)
    patience: int | None = option(
        None, "stop after this many validations without a better bound", AT_LEAST_1
    )
    num_particles: int = option(64, "K of the table's IWAE and FIVO", AT_LEAST_1, flag="particles")
    validate_by: Literal["iwae", "fivo"] = option(
        "iwae", "bound, with 16 particles, that chooses the best parameters"
    )
    split: Literal["test", "valid"] = option("test", "sequences that are scored")
    truncate: int | None = option(
        None,
        "for long sequences: cut each batch into windows of this many time steps and take one "
        "SVI step per window; the state passes from window to window, the gradient does not "
        "(default: whole sequences)",
        AT_LEAST_1,
    )
    recompute: int | None = option(
        None,
        "for long sequences, to save memory: keep the state only every so many time steps and "
        "compute those between a second time in the backward pass; the numbers stay the same "
        "(default: keep all states)",
        AT_LEAST_1,
    )
    compile: bool = option(
        False,
        "run the recurrence in compiled chunks: faster where single steps are small; needs a C++ "
        "compiler, and half a minute once",
    )
