"""Pictures of a comparison and of filters, each written as PNG, with one question in its title.

A row keeps its colour in every picture that is drawn from the same list of rows. Only matplotlib's
object API is used: no backend, style or current figure of the user's is touched.
"""

from pyro_avrnn.plots.curves import critic_curves, learning_curves
from pyro_avrnn.plots.filters import calibration, particle_health
from pyro_avrnn.plots.posterior import latent_posterior
from pyro_avrnn.plots.rates import rate_bars
from pyro_avrnn.plots.sequences import made, sequences
from pyro_avrnn.plots.style import row_styles

__all__ = [
    "calibration",
    "critic_curves",
    "latent_posterior",
    "learning_curves",
    "made",
    "particle_health",
    "rate_bars",
    "row_styles",
    "sequences",
]
