"""Fused kernels for spiking neural networks trained with spatio-temporal backpropagation (STBP)."""

import importlib.metadata

from . import functional, surrogate
from .layers import LIFLayer
from .ops import build_info, empty_cpu_cache

__version__ = importlib.metadata.version("stbp_cuda")
__all__ = ["LIFLayer", "__version__", "build_info", "empty_cpu_cache", "functional", "surrogate"]
