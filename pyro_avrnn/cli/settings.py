"""Options of ``avrnn compare``: what is compared, and how all of it is trained."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pyro_avrnn.cli.options import option
from pyro_avrnn.cli.rows import Training, parse
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
        "frames in a segment: TIMIT is cut everywhere (default: 100), piano rolls for training "
        "only (default: no cuts)",
    )
    frame: int | None = option(None, "TIMIT: samples in a frame (default: 200)")
    mu_law: int | None = option(
        None, "TIMIT: code samples in this many bits of mu-law, as papers do (default: densities)"
    )
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
    def is_timit(self) -> bool:
        """Whether the data are read as TIMIT."""
        archive = Path(self.data).is_dir() or self.data.lower().endswith(".zip")
        return archive and not holds_digits(self.data)

    def trainings(self) -> list[Training]:
        """The trainings to compare; a row that does not exist raises ``ValueError``."""
        names = {
            "elbo": ["elbo", "elbo-annealed"],
            "alternating": ["alternating"],
            "joint": [f"{view}{suffix}" for view in self.views for suffix in ("", "+kl")],
        }
        chosen = [row for kind in names if kind in self.schedules for row in names[kind]]
        return [parse(row) for row in dict.fromkeys(self.rows or ["rnn", *chosen])]

    def reader_options(self) -> dict[str, int]:
        """What ``data.load`` takes; an option of other data raises ``ValueError``."""
        options = {"segment": self.segment, "frame": self.frame, "mu_law": self.mu_law}
        given = {name: value for name, value in options.items() if value is not None}
        if self.is_timit:
            return {"segment": 100} | given
        kinds = {"frame": "TIMIT", "mu_law": "TIMIT", "segment": "TIMIT and piano rolls (.mat)"}
        allowed = ["segment"] if self.data.lower().endswith(".mat") else []
        for name in given:
            if name not in allowed:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for {kinds[name]}, got --data {self.data}")
        return given


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison share."""

    steps: int = option(1500, "SVI steps of each training", "at least 1")
    batch_size: int = option(64, "sequences in a batch", "at least 1")
    z_dim: int = option(8, "Z, size of the latent of a step", "at least 1")
    h_dim: int = option(64, "H, width of the state and of hidden layers", "at least 1")
    min_scale: float = option(
        1e-3,
        "floor of a normal's scale; standardised data have scale 1 (default: 0.001; TIMIT: 0.01)",
        "at least 0",
    )
    lr: float = option(2e-3, "learning rate of Adam", "more than 0")
    weight_decay: float = option(0.0, "weight decay; above 0, AdamW replaces Adam", "at least 0")
    lr_decay: bool = option(False, "lower the learning rate linearly, to a tenth at the end")
    clip_norm: float = option(5.0, "limit on the norm of the gradient, per frame", "more than 0")
    validate_every: int = option(50, "SVI steps between validations", "at least 1")
    patience: int | None = option(
        None, "stop after this many validations without a better bound", "at least 1"
    )
    num_particles: int = option(64, "K of the table's IWAE and FIVO", "at least 1")
    validate_by: Literal["iwae", "fivo"] = option(
        "iwae", "bound, with 16 particles, that chooses the best parameters"
    )
    split: Literal["test", "valid"] = option("test", "sequences that are scored")
    truncate: int | None = option(
        None,
        "for long sequences: take an SVI step after each window of this many time steps; the next "
        "window starts from the state of the last, without its gradient (default: no windows)",
        "at least 1",
    )
    recompute: int | None = option(
        None,
        "for long sequences, to save memory: keep the state only every so many time steps, and "
        "compute the others twice; the numbers stay the same (default: keep all)",
        "at least 1",
    )
    compile: bool = option(
        False,
        "compile the recurrence: faster where single steps are small; needs a C++ compiler, and "
        "half a minute once",
    )
