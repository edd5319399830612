"""One training of a comparison: its settings, which are the options of a row."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from inference import Ramp
from inference.divergences import DIVERGENCES
from inference.matching import DISTANCES
from inference.mutual_information import ESTIMATORS
from inference.protocols import given
from pyro_avrnn.cli.options import flag_of, kind_of, option, options_of
from pyro_avrnn.cli.settings import Batching, Decay, Settings
from pyro_avrnn.critics import CRITICS, VIEWS
from pyro_avrnn.guides import GUIDES
from pyro_avrnn.implicit import IMPLICIT
from pyro_avrnn.networks import ACTIVATIONS, CELLS
from pyro_avrnn.pair_critics import Reads
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
    schedule: str  # none (the RNN), elbo, iwae, fivo, avb, refined, joint, alternating or global
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
    f_dim: int = option(16, "dsae: F, size of the latent that all steps share", "at least 1")
    normalise: bool = option(
        False,
        "dsae: z is read from x less its average over the sequence, in units of its deviation",
    )
    segment: str | None = option(
        None, "dsae: in training, f reads shares of a sequence such as 0.3-0.7, its steps shuffled"
    )
    kl_f: Weight = option(1.0, "dsae: further factor on the KL of f; kl multiplies it, too")
    match: Weight = option(0.0, "dsae: price of the MMD between aggregate and prior of f")
    alpha: Weight = option(0.0, "dsae: weight of a bonus for I(x; f), by InfoNCE")
    free_bits: float = option(
        0.0, "dsae: nats a sequence that the KL of f costs nothing", "at least 0"
    )
    information: str | None = option(
        None, "dsae: estimator of I(f; z), which a critic lowers", choices=ESTIMATORS
    )
    gamma: Weight = option(0.0, "information: price of a nat of I(f; z)")
    reads: Reads = option("path", "information: what of z the critic reads")
    detach_f: bool = option(True, "information: let the price move the guide of z alone")
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
        if self.schedule == "global":
            return bound + self._of_f
        critic = "" if self.view is None else f" - {show(self.weight)} critic"
        return bound + critic

    @property
    def _of_f(self) -> str:
        """What is added for a latent that all steps share, in words."""
        said = "" if self.kl_f == 1.0 else f", KL of f times {show(self.kl_f)}"
        said += f" + {show(self.alpha)} I(x; f)" if self.alpha != 0.0 else ""
        said += f", {self.free_bits:g} free nats of f" if self.free_bits else ""
        said += f" - {show(self.match)} MMD of f" if self.match != 0.0 else ""
        return said + (f" - {show(self.gamma)} I(f; z)" if self.information else "")

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
