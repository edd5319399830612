"""Options of ``avrnn compare`` that say how all of it is trained and scored."""

from dataclasses import dataclass
from typing import Literal

from pyro_avrnn.cli.options import option

Batching = Literal["shuffled", "sorted", "shuffled-rest", "sorted-rest"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison share."""

    steps: int = option(1500, "SVI steps of each training, at most", "at least 1")
    batch_size: int = option(64, "sequences in a batch", "at least 1")
    batches: Batching = option(
        "shuffled",
        "order of training sequences; sorted by length in groups, batches save padding, but a "
        "training may lose by it; with -rest the last one is a small rest, not all alike in size",
    )
    window: int | None = option(
        None,
        "for training, cut longer sequences into windows of about this many frames, anew in each "
        "epoch (default: no windows)",
        "at least 1",
    )
    z_dim: int = option(8, "Z, size of the latent of a step", "at least 1")
    h_dim: int = option(64, "H, width of the state and of hidden layers", "at least 1")
    min_scale: float = option(
        1e-3,
        "floor of a normal's scale; standardised data have scale 1 (default: 0.001; speech: 0.01)",
        "at least 0",
    )
    lr: float = option(2e-3, "learning rate of Adam", "more than 0")
    weight_decay: float = option(0.0, "weight decay; above 0, AdamW replaces Adam", "at least 0")
    lr_decay: Decay = option("constant", "how the learning rate falls, to a hundredth at the end")
    lr_warmup: float = option(0.0, "fraction of the steps in which it rises from 0", "in [0, 1)")
    average: float = option(
        0.0, "decay of averaged parameters, such as 0.999, which are scored (0: none)", "in [0, 1)"
    )
    clip_norm: str = option(
        "10x",
        "limit on the norm of the gradient, per frame: a number, a multiple of its running median "
        "such as 10x, or none",
    )
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
        "run training steps in C, a quarter to a half faster; needs a C compiler, and half a "
        "second once",
    )
