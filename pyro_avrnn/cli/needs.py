"""What an option of a row needs, so that none is given in vain."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from inference.matching import DISTANCES
from pyro_avrnn.recipes import OWN, TAKES

if TYPE_CHECKING:
    from pyro_avrnn.cli.training import Training

Condition = tuple[str, "Callable[[Training], bool]"]


def _has_critic(row: "Training") -> bool:
    return row.view is not None and row.divergence not in DISTANCES


def _learns(row: "Training") -> bool:
    in_loop = row.schedule == "refined" and row.stage == "loop"
    adversary = row.schedule == "avb" or row.information is not None
    return _has_critic(row) or adversary or row.twist or in_loop


def _constrained(row: "Training") -> bool:
    spectral = row.constraint is None and row.divergence == "wasserstein"
    return _has_critic(row) and (spectral or row.constraint in ("spectral", "gradient_penalty"))


def _is_residual(row: "Training") -> bool:
    guide = row.guide or OWN[row.model].get("guide", "")
    return "prior_gradient" in TAKES["guide"].get(guide, ())


# in words that complete "it needs ..."
_LATENTS: Condition = "a model with latents", lambda row: row.schedule != "none"
_RESIDUAL: Condition = "guide=residual or smoothing_residual", _is_residual
_AGAINST: Condition = (
    "a row that compares codes with draws of the prior, such as conditional",
    lambda row: row.schedule in ("joint", "alternating"),
)
_PENALTY: Condition = (
    "a row with a penalty, such as conditional",
    lambda row: row.schedule == "joint",
)
_CRITIC: Condition = "a row with a critic, such as conditional", _has_critic
_WATCHED: Condition = (
    "a row with a critic whose score is a price, such as conditional",
    lambda row: _has_critic(row) or row.information is not None,
)
_LEARNS: Condition = "a critic that learns in the training", _learns
_CONSTRAINED: Condition = "a critic with constraint=spectral or gradient_penalty", _constrained
_CAPPED: Condition = (
    "constraint=gradient_penalty or clip",
    lambda row: _has_critic(row) and row.constraint in ("gradient_penalty", "clip"),
)
_ANY_CRITIC: Condition = (
    "a row with a critic, such as conditional or refined",
    lambda row: _learns(row) or row.schedule == "refined",
)
_REFINED: Condition = "the row refined", lambda row: row.schedule == "refined"
_LOOP: Condition = (
    "the row refined with stage=loop",
    lambda row: row.schedule == "refined" and row.stage == "loop",
)
_AVB: Condition = "the row avb", lambda row: row.schedule == "avb"
_ALTERNATING: Condition = "the row alternating", lambda row: row.schedule == "alternating"
_AUTOREGRESSIVE: Condition = (
    "emission=autoregressive",
    lambda row: row.emission == "autoregressive",
)
_DSAE: Condition = ("a row such as dsae, with model=dsae", lambda row: row.schedule == "global")
_ESTIMATED: Condition = (
    "a row such as dsae, with information=infonce or another estimator",
    lambda row: row.information is not None,
)
_LEVELS: Condition = (
    "emission=logistic or autoregressive",
    lambda row: row.emission in (None, "logistic", "autoregressive"),
)

_NEEDS: dict[str, Condition] = {
    **dict.fromkeys(("kl", "z_dim", "guide", "prior", "bound", "particles", "twist"), _LATENTS),
    "prior_gradient": _RESIDUAL,
    **dict.fromkeys(("view", "divergence", "standardise"), _AGAINST),
    **dict.fromkeys(("weight", "pairing"), _PENALTY),
    **dict.fromkeys(("critic", "constraint"), _CRITIC),
    "watch": _WATCHED,
    **dict.fromkeys(("critic_steps", "critic_lr"), _LEARNS),
    "on": _CONSTRAINED,
    "strength": _CAPPED,
    "critic_dim": _ANY_CRITIC,
    **dict.fromkeys(("candidates", "refine_steps", "stage"), _REFINED),
    "begin": _LOOP,
    "contrast": _AVB,
    **dict.fromkeys(("adversarial_lr", "detach_state"), _ALTERNATING),
    **dict.fromkeys(("width", "lags"), _AUTOREGRESSIVE),
    "components": _LEVELS,
    "f_dim": ("model=dsae", lambda row: row.model == "dsae"),
    **dict.fromkeys(("normalise", "segment"), ("model=dsae", lambda row: row.model == "dsae")),
    **dict.fromkeys(("kl_f", "match", "alpha", "free_bits", "information"), _DSAE),
    **dict.fromkeys(("gamma", "reads", "detach_f"), _ESTIMATED),
}


def lacking(row: "Training", option: str) -> str | None:
    """What the row lacks for the option to have an effect, in words; None if it has one.

    Args:
        row: with all its options set.
        option: name of a field of ``Training``.
    """
    words, holds = _NEEDS.get(option, ("", lambda row: True))
    return None if holds(row) else words
