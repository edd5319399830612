"""Models, one paper a file."""

from pyro_avrnn.models.dmm import DMM, DMMState
from pyro_avrnn.models.dsae import DSAE, DSAEState, GlobalGuide
from pyro_avrnn.models.lgssm import LGSSM, ExactFilter, ExactSmoother, LGSSMState
from pyro_avrnn.models.pixelcnn import ConvolutionalGuide, PixelCNNState, PixelCNNVAE
from pyro_avrnn.models.rnn import RNN, RNNState
from pyro_avrnn.models.srnn import SRNN, SRNNState
from pyro_avrnn.models.storn import STORN, STORNState
from pyro_avrnn.models.vae import VAE, VAEState
from pyro_avrnn.models.vrnn import VRNN, VRNNState
from pyro_avrnn.pixels import PixelCNN

__all__ = [
    "DMM",
    "DSAE",
    "LGSSM",
    "RNN",
    "SRNN",
    "STORN",
    "VAE",
    "VRNN",
    "ConvolutionalGuide",
    "DMMState",
    "DSAEState",
    "ExactFilter",
    "ExactSmoother",
    "GlobalGuide",
    "LGSSMState",
    "PixelCNN",
    "PixelCNNState",
    "PixelCNNVAE",
    "RNNState",
    "SRNNState",
    "STORNState",
    "VAEState",
    "VRNNState",
]
