"""What one does with a Pyro model and guide: bounds, adversarial training, diagnostics.

Nothing here knows the models of ``pyro_avrnn``: every verb works on a user's own Pyro program.
"""

from inference.adversarial import Adversarial, Alternating
from inference.arviz_adapter import to_arviz
from inference.calibration import Calibration, calibrate
from inference.divergences import clip, gradient_penalty, spectral, wasserstein
from inference.evaluation import Evaluation, evaluate
from inference.files import load_parameters
from inference.information import rate_split
from inference.objectives import ELBO, FIVO, IWAE, RegularisedELBO, elbo, iwae
from inference.particles import Bootstrap, ess_below, fivo, particle_filter
from inference.probes import LinearProbe, sequence_codes
from inference.random import seeded
from inference.schedules import Clock, Ramp
from inference.traces import step_densities
from inference.training import NonFiniteLossError, fit
from inference.weights import DegenerateWeightsError

__all__ = [
    "ELBO",
    "FIVO",
    "IWAE",
    "LinearProbe",
    "Adversarial",
    "Alternating",
    "Bootstrap",
    "Calibration",
    "Clock",
    "DegenerateWeightsError",
    "Evaluation",
    "NonFiniteLossError",
    "Ramp",
    "RegularisedELBO",
    "calibrate",
    "clip",
    "elbo",
    "ess_below",
    "evaluate",
    "fit",
    "fivo",
    "gradient_penalty",
    "iwae",
    "load_parameters",
    "particle_filter",
    "rate_split",
    "seeded",
    "sequence_codes",
    "spectral",
    "step_densities",
    "to_arviz",
    "wasserstein",
]
