"""Pictures as PNG files: comparisons, filters, calibration, sequences, music and sound.

A row keeps its colour in every picture drawn from the same list of rows. Only matplotlib's object
API is used: your backend, style and current figure stay as they are.
"""

from pyro_avrnn.plots.curves import critic_curves, learning_curves
from pyro_avrnn.plots.diagnostics import calibration, latent_posterior, particle_health
from pyro_avrnn.plots.gains import code_clouds, gains
from pyro_avrnn.plots.rates import rate_bars
from pyro_avrnn.plots.sequences import features, sequences
from pyro_avrnn.plots.sounds import piano_rolls, spectrograms
from pyro_avrnn.plots.style import row_styles

__all__ = [
    "calibration",
    "code_clouds",
    "critic_curves",
    "features",
    "gains",
    "latent_posterior",
    "learning_curves",
    "particle_health",
    "piano_rolls",
    "rate_bars",
    "row_styles",
    "sequences",
    "spectrograms",
]
