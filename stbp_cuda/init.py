"""Initial weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_positive

__all__ = ["unit_norm_rows_"]


@torch.no_grad()
def unit_norm_rows_(weight: Tensor, norm: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw weights from U[-1, 1] and scale those that lead to one neuron to a common L2 norm, in place
    (arXiv:1706.02609, which has the norm 1).

    The norm has to go with the threshold: with the paper's MNIST network, norm 1 and threshold 1.5, hardly a neuron of
    the hidden layer reaches the threshold, the output stays silent, and so does the gradient. The examples of this
    package take twice the threshold for the norm.

    Args:
        weight: ``[outputs, inputs]`` of a linear layer, or ``[outputs, inputs, height, width]`` of a convolution, where
            ``inputs * height * width`` weights lead to a neuron.
        norm: the norm of ``weight[i]`` for each output i; positive and finite. Default 1.
        generator: of the random numbers, on the device of ``weight``; None for torch's default one.

    Returns:
        ``weight``.

    Raises:
        TypeError: ``weight`` is not a tensor of a floating dtype.
        ValueError: ``weight`` has fewer than two dimensions, or ``norm`` is out of range.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a tensor of a floating dtype, got {found}")
    if weight.dim() < 2:
        raise ValueError(f"weight must be of shape [outputs, inputs, ...], got {tuple(weight.shape)}")
    norm = check_positive("norm", norm)
    weight.uniform_(-1, 1, generator=generator)
    return weight.mul_(norm / torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True))
