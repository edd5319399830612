"""Rows of a comparison: named trainings, and a short notation that varies them.

A row is written as a name, with options if it is to differ: ``conditional:weight=0>30@0.5,kl=0``.
A weight is a number, or ``start>stop@fraction``: linear over that fraction of the run, then
constant.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from inference import Ramp
from inference.divergences import DIVERGENCES
from inference.matching import DISTANCES
from inference.protocols import given
from pyro_avrnn.cli.needs import lacking
from pyro_avrnn.cli.options import check, flag_of, kind_of, option, options_of
from pyro_avrnn.cli.settings import Batching, Decay, Settings
from pyro_avrnn.critics import CRITICS, VIEWS
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.implicit import IMPLICIT
from pyro_avrnn.networks import ACTIVATIONS, CELLS
from pyro_avrnn.priors import PRIORS
from pyro_avrnn.recipes import EMISSIONS, FEATURES, OF_DSAE, WITH_LATENTS

#: a number, or (start, stop, fraction of the run)
Weight = float | tuple[float, float, float]
_EMISSIONS = [name for name in EMISSIONS if name != "categorical"]  # which needs its classes


def _own(name: str) -> Any:
    """An option of a row that stands in place of one that all rows share."""
    shared = options_of(Settings)[name]
    flag = f"in place of {flag_of(shared)}"
    return option(None, flag, shared.metadata["within"], choices=kind_of(shared)[1])


@dataclass(frozen=True)
class Training:
    """Settings of one training; all but the first three fields are options of a row."""

    label: str  # as the user wrote the row
    schedule: str  # none (the RNN), elbo, iwae, fivo, avb, refined, joint or alternating
    summary: str  # one line for --help
    view: str | None = option(None, "what the critic sees", choices=VIEWS)
    kl: Weight = option(1.0, "weight of the KL term: a number, or start>stop@fraction of the run")
    weight: Weight = option(0.0, "weight of the critic's penalty, likewise")
    model: str = option("vrnn", "model", choices=WITH_LATENTS)
    z_dim: int | None = _own("z_dim")
    h_dim: int | None = _own("h_dim")
    emission: str | None = option(
        None, "distribution of x_t, if not the one that suits the data", choices=_EMISSIONS
    )
    bound: Literal["elbo", "iwae", "fivo"] = option("elbo", "bound on log p(x) that is maximised")
    particles: int = option(1, "particles of this bound", "at least 1")
    twist: bool = option(False, "bound=fivo: choose particles by the future, too")
    dropout: float = option(
        0.0, "share of x's features hidden from recurrence and guide in training", "in [0, 1)"
    )
    activation: str = option(
        "relu", "activation of all hidden layers of model and guide", choices=ACTIVATIONS
    )
    width: int | None = option(
        None, "autoregressive: hidden units of its network (default: H)", "at least 1"
    )
    lags: int = option(32, "the same, of speech: samples that one is predicted from", "at least 1")
    components: int | None = option(
        None, "logistics of a level of speech (default: 10)", "at least 2"
    )
    batch_size: int | None = _own("batch_size")
    batches: Batching | None = _own("batches")
    lr: float | None = _own("lr")
    lr_decay: Decay | None = _own("lr_decay")
    weight_decay: float | None = _own("weight_decay")
    clip_norm: str | None = _own("clip_norm")
    average: float | None = _own("average")
    guide: str | None = option(
        None,
        "guide, if not the model's own; full and factorised go with dsae, implicit ones with avb",
        choices=(*GUIDES, *OF_DSAE, *IMPLICIT),
    )
    prior: str | None = option(None, "prior, if not the model's own", choices=PRIORS)
    cell: str | None = option(None, "recurrent cell, if not the model's own", choices=CELLS)
    features: str = option("mlp", "what x is read by; loudness is for waveforms", choices=FEATURES)
    prior_gradient: bool = option(True, "residual guide: let its gradient reach the prior")
    critic: str = option("feedforward", "network of the critic", choices=CRITICS)
    divergence: str = option(
        "wasserstein",
        "what the penalty measures; the last two have no critic",
        choices=(*DIVERGENCES, *DISTANCES),
    )
    constraint: Literal["spectral", "gradient_penalty", "clip"] | None = option(
        None,
        "what makes the critic Lipschitz (default: spectral for wasserstein, else nothing); an "
        "lstm cannot be spectral",
    )
    strength: float = option(10.0, "weight of gradient_penalty, or the limit of clip")
    on: Literal["z", "all"] = option("z", "what the critic is Lipschitz in, z or all it sees")
    standardise: bool = option(False, "scale codes by the prior's deviation")
    pairing: Literal["states", "free_runs"] = option(
        "states", "the posterior's codes against draws at the same states, or against free runs"
    )
    watch: bool = option(
        False, "record the critic's accuracy and the slope of its penalty in metrics.csv"
    )
    critic_dim: int = option(64, "width of the critic's layers")
    critic_steps: int = option(2, "steps of the critic per SVI step")
    critic_lr: float = option(1e-3, "learning rate of the critic")
    candidates: int = option(
        16, "refined: draws of the prior among which the critic chooses", "at least 2"
    )
    refine_steps: int = option(2500, "refined: steps of the critic after training", "at least 1")
    stage: Literal["after", "loop"] = option(
        "after", "refined: the critic learns after the training, or also in it"
    )
    begin: float = option(0.0, "stage=loop: fraction of the run before it", "in [0, 1)")
    contrast: Literal["moments", "prior"] = option(
        "moments", "avb: tell the guide's codes from a normal of their moments, or from the prior"
    )
    adversarial_lr: float = option(5e-5, "alternating: learning rate of the adversarial step")
    detach_state: bool = option(True, "alternating: keep its gradient out of the state")

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
        if self.schedule == "refined":
            return f"{bound}; prior refined {'in' if self.stage == 'loop' else 'after'} training"
        if self.schedule == "avb":
            return f"{bound}, the guide's density by a critic; scored by a guide fitted afterwards"
        if self.twist:
            bound += ", twisted"
        critic = "" if self.view is None else f" - {show(self.weight)} critic"
        return bound + critic

    def settings(self, shared: Settings) -> Settings:
        """How this row is trained: as all are, but for what it says itself."""
        return replace(
            shared, **given(**{n: getattr(self, n, None) for n in options_of(Settings)})
        )


def show(weight: Weight) -> str:
    """A weight in the notation."""
    if isinstance(weight, tuple):
        return f"{weight[0]:g}>{weight[1]:g}@{weight[2]:g}"
    return f"{weight:g}"


def ramp(weight: Weight) -> float | Ramp:
    """A weight as an objective takes it: the number, or a ramp over the run."""
    return Ramp(weight[0], weight[1], over=weight[2]) if isinstance(weight, tuple) else weight


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
