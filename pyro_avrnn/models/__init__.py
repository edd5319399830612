"""Models, one paper a file."""

from pyro_avrnn.models.rnn import RNN, RNNState
from pyro_avrnn.models.vrnn import VRNN, VRNNState

__all__ = ["RNN", "VRNN", "RNNState", "VRNNState"]
