"""Models, one paper a file."""

from pyro_avrnn.models.lgssm import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from pyro_avrnn.models.rnn import RNN, RNNState
from pyro_avrnn.models.vrnn import VRNN, VRNNState

__all__ = [
    "LGSSM",
    "RNN",
    "VRNN",
    "ExactFilter",
    "ExactSmoother",
    "LGSSMState",
    "RNNState",
    "VRNNState",
]
