"""What can be compared: named trainings, and a short notation to vary them.

A row is a name, optionally followed by options: ``conditional:weight=0>30@0.5,kl=0``. A weight
is a number, or ``start>stop@fraction``: linear over that fraction of the run, then constant.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from inference import Ramp
from pyro_avrnn.critics import CRITICS, VIEWS
from pyro_avrnn.emissions import EMISSIONS
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.networks import ACTIVATIONS, CELLS
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.recipes import OF_DSAE, WITH_LATENTS

#: a number, or (start, stop, fraction of the run)
Weight = float | tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One training to compare; every field but the first three can be varied by an option."""

    label: str  # as the user wrote it
    schedule: str  # elbo, joint, alternating; or none for the RNN
    says: str  # one line for --help
    view: str | None = None
    kl: Weight = 1.0  # weight of the KL term
    weight: Weight = 0.0  # weight of the critic's penalty
    model: str = "vrnn"
    z_dim: int | None = None  # sizes, where they are not the comparison's
    h_dim: int | None = None
    emission: str | None = None  # None: what the data ask for
    bound: str = "elbo"  # elbo, iwae, fivo
    particles: int = 1  # K of the bound in training
    dropout: float = 0.0  # share of x's features hidden in training
    activation: str = "relu"  # of all hidden layers of model and guide
    lr: float | None = None  # Adam's, where it is not the comparison's
    weight_decay: float | None = None  # AdamW's, likewise
    guide: str | None = None  # parts, where they are not the model's own
    prior: str | None = None
    cell: str | None = None
    prior_gradient: bool = True  # residual guide: gradient through the prior mean
    critic: str = "feedforward"
    constraint: str = "spectral"  # spectral, gradient_penalty, clip
    strength: float = 10.0  # of the gradient penalty; the bound of clip
    on: str = "z"  # where the critic is Lipschitz: z, or all it sees
    standardise: bool = False  # codes in units of the prior's deviation
    critic_dim: int = 64
    critic_steps: int = 2
    critic_lr: float = 1e-3
    adversarial_lr: float = 5e-5  # alternating only: RMSProp of the adversarial step
    detach_state: bool = True  # alternating only

    @property
    def objective(self) -> str:
        """In words, for results.json."""
        if self.schedule == "none":
            return "log-likelihood"
        if self.bound == "elbo":
            bound = f"reconstruction - {show(self.kl)} KL"
        else:
            bound = f"{self.bound.upper()}-{self.particles}"
            bound += "" if self.kl == 1.0 else f" with {show(self.kl)} KL"
        critic = "" if self.view is None else f" - {show(self.weight)} critic"
        return bound + critic


_ANNEALED = (0.0, 1.0, 0.5)


def _on(view: str) -> str:
    # where the two sides have paths of their own, the critic must be Lipschitz in those too
    return "all" if view == "trajectory_redrawn" else "z"


ROWS: dict[str, Row] = {
    row.label: row
    for row in (
        Row("rnn", "none", "RNN without latents: does z help at all?", model="rnn"),
        Row("elbo", "elbo", "VRNN, the ELBO from the first step"),
        Row("elbo-annealed", "elbo", "VRNN, KL weight from 0 to 1: the row to beat", kl=_ANNEALED),
        Row("iwae", "iwae", "VRNN, the importance-weighted bound", bound="iwae", particles=4),
        Row("fivo", "fivo", "VRNN, the particle filter's bound", bound="fivo", particles=4),
        Row(
            "alternating",
            "alternating",
            "AVRNN, the paper's algorithms 1 and 2 to the letter",
            view="trajectory_redrawn",
            kl=0.0,
            guide="residual",
            prior_gradient=False,
            critic="lstm",
            constraint="clip",
            strength=0.01,
            critic_steps=5,
            critic_lr=5e-5,
        ),
        *(
            Row(
                view,
                "joint",
                f"one objective, no KL, critic seeing the view {view}",
                view=view,
                kl=0.0,
                weight=(0.0, 10.0, 0.5),
                on=_on(view),
            )
            for view in VIEWS
        ),
        *(
            Row(
                f"{view}+kl",
                "joint",
                f"annealed KL and a critic seeing the view {view}",
                view=view,
                kl=_ANNEALED,
                weight=(0.0, 1.0, 0.5),
                on=_on(view),
            )
            for view in VIEWS
        ),
    )
}


def parse(text: str) -> Row:
    """A row from its notation.

    Example:
        >>> parse("conditional:weight=0>30@0.5,critic=lstm").weight
        (0.0, 30.0, 0.5)

    Raises:
        ValueError: an unknown row or option, listing the known ones, or a value of another kind.
    """
    name, _, options = text.partition(":")
    if name not in ROWS:
        raise ValueError(f"a row must be one of {', '.join(ROWS)}, got {name!r}")
    known = {f.name: f for f in fields(Row)[3:]}
    values: dict[str, Any] = {"label": text}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"an option of row {name!r} must be one of {', '.join(known)}, written "
                f"key=value, got {option!r}"
            )
        values[key] = _value(key, known[key].type, value)
    row = replace(ROWS[name], **values)
    for key, allowed in (
        ("view", [None, *VIEWS]),
        ("model", ["rnn"] if row.schedule == "none" else [*WITH_LATENTS]),
        ("emission", [None, *(e for e in EMISSIONS if e != "categorical")]),  # needs its classes
        ("guide", [None, *GUIDES, *OF_DSAE]),
        ("prior", [None, *PRIORS]),
        ("cell", [None, *CELLS]),
        ("critic", [*CRITICS]),
        ("constraint", ["spectral", "gradient_penalty", "clip"]),
        ("on", ["z", "all"]),
        ("bound", ["elbo", "iwae", "fivo"]),
        ("activation", [*ACTIVATIONS]),
    ):
        if getattr(row, key) not in allowed:
            listed = ", ".join(str(a) for a in allowed if a)
            raise ValueError(f"{key} must be one of {listed}, got {getattr(row, key)!r}")
    for key, fits, wanted in (
        ("lr", row.lr is None or row.lr > 0.0, "more than 0"),
        ("weight_decay", row.weight_decay is None or row.weight_decay >= 0.0, "at least 0"),
        ("particles", row.particles >= 1, "at least 1"),
        ("z_dim", row.z_dim is None or row.z_dim >= 1, "at least 1"),
        ("h_dim", row.h_dim is None or row.h_dim >= 1, "at least 1"),
        ("dropout", 0.0 <= row.dropout < 1.0, "in [0, 1)"),
    ):
        if not fits:
            raise ValueError(f"option {key} must be {wanted}, got {getattr(row, key):g}")
    return row


def schedule(weight: Weight) -> Any:
    """What an objective takes: the number, or a ramp over the run."""
    return Ramp(weight[0], weight[1], over=weight[2]) if isinstance(weight, tuple) else weight


def show(weight: Weight) -> str:
    """A weight as the notation has it."""
    if isinstance(weight, tuple):
        return f"{weight[0]:g}>{weight[1]:g}@{weight[2]:g}"
    return f"{weight:g}"


def _value(key: str, kind: Any, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int or kind is float:
            return kind(text)
        if kind == float | None:
            return float(text)
        if kind == int | None:
            return int(text)
        if kind is Weight or kind == Weight:
            start, arrow, rest = text.partition(">")
            stop, _, over = rest.partition("@")
            return (float(start), float(stop), float(over or 1.0)) if arrow else float(start)
    except (KeyError, ValueError):
        wanted = "weight such as 0.5 or 0>1@0.5" if kind == Weight else "number"
        if kind in (bool, int):
            wanted = kind.__name__
        raise ValueError(f"option {key} must be of kind {wanted}, got {text!r}") from None
    return text
