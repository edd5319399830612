"""Sequential latent-variable models as Pyro programs: what a model is.

A model is four pure functions, a guide two; Pyro programs, fast rollouts, training and
diagnostics derive from them. What one does with a model is in the package ``inference``.
"""

from inference.densities import StepDensities
from pyro_avrnn import data, generation, models, recipes
from pyro_avrnn.sequence import SequenceGuide, SequenceModel

__version__ = "0.2.0"
__all__ = [
    "SequenceGuide",
    "SequenceModel",
    "StepDensities",
    "data",
    "generation",
    "models",
    "recipes",
]
