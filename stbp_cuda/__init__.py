"""Fused kernels for spiking neural networks trained with spatio-temporal backpropagation (STBP)."""

from . import encoding, functional, init, losses, surrogate
from .layers import LIFLayer, LILayer, NeuNorm, NeuNormLIF, PLIFLayer
from .modules import Dropout, TimeDistributed, Voting
from .network import Network, network
from .ops import VERSION, build_info

__version__ = VERSION
__all__ = [
    "Dropout",
    "LIFLayer",
    "LILayer",
    "Network",
    "NeuNorm",
    "NeuNormLIF",
    "PLIFLayer",
    "TimeDistributed",
    "Voting",
    "__version__",
    "build_info",
    "encoding",
    "functional",
    "init",
    "losses",
    "network",
    "surrogate",
]
