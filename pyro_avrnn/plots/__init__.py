"""Pictures as PNG files: comparisons, filters, calibration, sequences, music and sound.

A row keeps its colour in every picture drawn from the same list of rows. Only matplotlib's object
API is used: your backend, style and current figure stay as they are. It is loaded when the first
picture is drawn, which saves a second for processes that draw none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_avrnn.plots.curves import critic_curves, learning_curves
    from pyro_avrnn.plots.diagnostics import calibration, latent_posterior, particle_health
    from pyro_avrnn.plots.rates import rate_bars
    from pyro_avrnn.plots.refinement import code_clouds, gains
    from pyro_avrnn.plots.series import features, sequences
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
_MODULES = ("curves", "diagnostics", "rates", "refinement", "series", "sounds", "style")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        found = vars(import_module(f"{__name__}.{module}"))
        globals().update({known: found[known] for known in __all__ if known in found})
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
