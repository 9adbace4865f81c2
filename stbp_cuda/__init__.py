"""Fused kernels for spiking neural networks trained with spatio-temporal backpropagation (STBP)."""

import importlib.metadata

from . import functional, surrogate
from .layers import LIFLayer
from .ops import build_info

__version__ = importlib.metadata.version("stbp_cuda")
__all__ = ["LIFLayer", "__version__", "build_info", "functional", "surrogate"]
