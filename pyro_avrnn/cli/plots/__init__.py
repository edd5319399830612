"""Pictures of a comparison, each written as PNG, each with one question in its title.

A row keeps its colour in every picture that is drawn from the same list of rows. Only matplotlib's
object API is used: no backend, style or current figure of the user's is touched.
"""

from pyro_avrnn.cli.plots.curves import critic_curves, learning_curves
from pyro_avrnn.cli.plots.posterior import latent_posterior
from pyro_avrnn.cli.plots.rates import rate_bars
from pyro_avrnn.cli.plots.sequences import sequences
from pyro_avrnn.cli.plots.style import row_styles

__all__ = [
    "critic_curves",
    "latent_posterior",
    "learning_curves",
    "rate_bars",
    "row_styles",
    "sequences",
]
