"""What one does with a Pyro model and guide: bounds, adversarial training, diagnostics.

Nothing here knows the models of ``pyro_avrnn``: every verb works on a user's own Pyro program.
"""

from typing import Any

from inference.adversarial import Adversarial
from inference.alternating import Alternating
from inference.arviz_adapter import to_arviz
from inference.avb import AVB
from inference.bounds import elbo, fivo, iwae
from inference.calibration import Calibration, calibrate
from inference.checkpoints import Checkpointing
from inference.clipping import AdaptiveClip
from inference.columns import sequence_bounds
from inference.constraints import clip, gradient_penalty, spectral
from inference.densities import StepDensities
from inference.divergences import DIVERGENCES, jensen_shannon, log_ratio, wasserstein
from inference.evaluation import Evaluation, evaluate
from inference.information import rate_split
from inference.learning import dead_units, rise, scales_at_floor, still_rising
from inference.matching import Matching, mmd, sliced_wasserstein
from inference.objectives import ELBO, FIVO, IWAE
from inference.particles import Bootstrap, particle_filter
from inference.probes import LinearProbe, sequence_codes
from inference.random import seeded
from inference.refining import Refinement, refine
from inference.resampling import ess_below
from inference.schedules import Clock, LearningRate, Ramp
from inference.traces import step_densities
from inference.training import History, Records, fit
from inference.updates import NonFiniteLossError
from inference.validation import Validation
from inference.weights import DegenerateWeightsError

__all__ = [
    "AVB",
    "DIVERGENCES",
    "ELBO",
    "FIVO",
    "IWAE",
    "AdaptiveClip",
    "Adversarial",
    "Alternating",
    "Bootstrap",
    "Calibration",
    "Checkpointing",
    "Clock",
    "DegenerateWeightsError",
    "Evaluation",
    "History",
    "LearningRate",
    "LinearProbe",
    "Matching",
    "NonFiniteLossError",
    "Ramp",
    "Records",
    "Refinement",
    "StepDensities",
    "Validation",
    "calibrate",
    "clip",
    "dead_units",
    "elbo",
    "ess_below",
    "evaluate",
    "fit",
    "fivo",
    "gradient_penalty",
    "iwae",
    "jensen_shannon",
    "log_ratio",
    "mmd",
    "particle_filter",
    "rate_split",
    "refine",
    "rise",
    "scales_at_floor",
    "seeded",
    "sliced_wasserstein",
    "sequence_bounds",
    "sequence_codes",
    "spectral",
    "step_densities",
    "still_rising",
    "to_arviz",
    "wasserstein",
]

_REMOVED = {  # names of 0.1, and what to write instead
    "RegularisedELBO": "ELBO(penalties=[...])",
    "load_parameters": "pyro_avrnn.recipes.load(path)",
}


def __getattr__(name: str) -> Any:
    if name in _REMOVED:
        raise ImportError(f"inference.{name} was removed in 0.2; use {_REMOVED[name]}")
    raise AttributeError(f"module 'inference' has no attribute {name!r}")
