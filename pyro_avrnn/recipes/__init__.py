"""Papers by name: ``recipes.vrnn(x_dim=12, z_dim=8, h_dim=64)`` gives model and guide.

:mod:`~pyro_avrnn.recipes.papers` has a function for every paper, :mod:`~pyro_avrnn.recipes.build`
their parts by name, :mod:`~pyro_avrnn.recipes.files` writes and reads parameters.
"""

from pyro_avrnn.recipes.build import (
    EMISSIONS,
    FEATURES,
    OF_DSAE,
    OWN,
    TAKES,
    WITH_LATENTS,
    Parts,
    Recipe,
)
from pyro_avrnn.recipes.files import load, save
from pyro_avrnn.recipes.papers import (
    RECIPES,
    avrnn,
    dmm,
    dsae,
    pixelcnn,
    pixelcnn_vae,
    rnn,
    srnn,
    storn,
    vae,
    vrnn,
)
from pyro_avrnn.recipes.swaps import with_guide
from pyro_avrnn.recipes.with_critic import refined

__all__ = [
    "EMISSIONS",
    "FEATURES",
    "OF_DSAE",
    "OWN",
    "RECIPES",
    "TAKES",
    "WITH_LATENTS",
    "Parts",
    "Recipe",
    "avrnn",
    "dmm",
    "dsae",
    "load",
    "pixelcnn",
    "pixelcnn_vae",
    "refined",
    "rnn",
    "save",
    "srnn",
    "storn",
    "vae",
    "vrnn",
    "with_guide",
]
