"""Rows of a comparison: named trainings, and a short notation that varies them.

A row is written as a name, with options if it is to differ: ``conditional:weight=0>30@0.5,kl=0``.
A weight is a number, or ``start>stop@fraction``: linear over that fraction of the run, then
constant.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_avrnn.cli.needs import lacking
from pyro_avrnn.cli.options import check, kind_of, options_of
from pyro_avrnn.cli.training import Training, Weight
from pyro_avrnn.critics import VIEWS


def _weight(text: str) -> Weight:
    start, arrow, rest = text.partition(">")
    stop, _, over = rest.partition("@")
    return (float(start), float(stop), float(over or 1.0)) if arrow else float(start)


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("bool", lambda text: {"true": True, "false": False}[text.lower()]),
    int: ("int", int),
    float: ("number", float),
    Weight: ("weight such as 0.5 or 0>1@0.5", _weight),
    str: ("text", str),
}


def vary(training: Training, options: str) -> Training:
    """The training with other options, given in the notation."""
    known, values = options_of(Training), dict[str, Any]()
    for pair in filter(None, options.split(",")):
        key, equals, text = pair.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"an option of row {training.label!r} must be one of {', '.join(known)}, written "
                f"key=value, got {pair!r}"
            )
        wanted, reader = _READERS[kind_of(known[key])[0]]
        try:
            values[key] = reader(text)
        except (KeyError, ValueError):
            raise ValueError(f"option {key} must be of kind {wanted}, got {text!r}") from None
        only = ("rnn",) if key == "model" and training.schedule == "none" else ()
        check(f"option {key}", known[key], values[key], only)
    return replace(training, **values)


#: schedule, summary and options of a row, by its name
_NAMED = {
    "rnn": ("none", "RNN without latents: does z help at all?", "model=rnn"),
    "elbo": ("elbo", "VRNN, the ELBO from the first step", ""),
    "elbo-annealed": ("elbo", "VRNN, KL weight from 0 to 1: the row to beat", "kl=0>1@0.5"),
    "iwae": ("iwae", "VRNN, the importance-weighted bound", "bound=iwae,particles=4"),
    "fivo": ("fivo", "VRNN, the particle filter's bound", "bound=fivo,particles=4"),
    "twisted": (
        "fivo",
        "the same, particles chosen by the future as well",
        "bound=fivo,particles=4,twist=true",
    ),
    "refined": (
        "refined",
        "VRNN by the annealed ELBO, then a critic in its prior",
        "kl=0>1@0.5",
    ),
    "avb": (
        "avb",
        "VRNN, a guide without density, by adversarial variational Bayes",
        "guide=implicit,kl=0>1@0.5",
    ),
    "alternating": (
        "alternating",
        "AVRNN, the paper's algorithms 1 and 2 to the letter",
        "view=trajectory_redrawn,kl=0,guide=residual,prior_gradient=false,critic=lstm,"
        "constraint=clip,strength=0.01,critic_steps=5,critic_lr=5e-5",
    ),
}
# where the two sides have paths of their own, the critic must be Lipschitz in these, too
_SEES = {v: f"view={v},on={'all' if v == 'trajectory_redrawn' else 'z'}" for v in VIEWS}
_OF_F = {  # what is done for a latent that all steps share
    "": ("by the annealed ELBO", ""),
    "+mi": ("and a bonus for I(x; f)", ",alpha=1"),
    "+adversary": ("and a critic against I(f; z)", ",information=infonce,gamma=0>100@0.4"),
    "+structure": (
        "z from x normalised, f from shuffled pieces",
        ",normalise=true,segment=0.3-0.7",
    ),
}
_NAMED |= {
    f"dsae{name}": ("global", f"DSAE, {summary}", f"model=dsae,f_dim=32,kl=0>1@0.25{options}")
    for name, (summary, options) in _OF_F.items()
}
_NAMED |= {
    v: ("joint", f"VRNN, no KL, critic of view {v}", f"{sees},kl=0,weight=0>10@0.5")
    for v, sees in _SEES.items()
}
_NAMED |= {
    f"{v}+kl": (
        "joint",
        f"VRNN, annealed KL, critic of view {v}",
        f"{sees},kl=0>1@0.5,weight=0>1@0.5",
    )
    for v, sees in _SEES.items()
}
#: trainings by the name of their row
ROWS = {
    name: vary(Training(name, schedule, summary), options)
    for name, (schedule, summary, options) in _NAMED.items()
}


def parse(text: str) -> Training:
    """A training from the notation of its row.

    Example:
        >>> parse("conditional:weight=0>30@0.5,critic=lstm").weight
        (0.0, 30.0, 0.5)

    Raises:
        ValueError: an unknown row or option, listing the known ones, a value that the option
            does not accept, or an option that does not go with this row.
    """
    name, _, options = text.partition(":")
    if name not in ROWS:
        raise ValueError(f"a row must be one of {', '.join(ROWS)}, got {name!r}")
    row = replace(vary(ROWS[name], options), label=text)
    for option_given in set_by(row):
        if wanted := lacking(row, option_given):
            raise ValueError(
                f"option {option_given} does not go with row {text!r}: it needs {wanted}; leave "
                "it out"
            )
    return row


def set_by(row: Training) -> list[str]:
    """Options that the row sets itself, in its label."""
    pairs = filter(None, row.label.partition(":")[2].split(","))
    return [pair.partition("=")[0] for pair in pairs]
