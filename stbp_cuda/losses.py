"""Losses on firing rates: the outputs ``[T, B, classes]`` of a network, averaged over time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_positive

__all__ = ["rate_cross_entropy", "rate_mse"]


def _rates(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over time ``[B, classes]``, in float32 at least."""
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not outputs.is_floating_point():
        raise TypeError(f"outputs must be of a floating dtype, got {outputs.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be class numbers of dtype torch.int64, got {targets.dtype}")
    if outputs.dim() != 3 or 0 in outputs.shape:
        raise ValueError(f"outputs must be of shape [T, B, classes], none of them 0, got {tuple(outputs.shape)}")
    if targets.shape != outputs.shape[1:2]:
        raise ValueError(
            f"targets must be of shape [B] = ({outputs.shape[1]},) for outputs of shape {tuple(outputs.shape)}, "
            f"got {tuple(targets.shape)}"
        )
    return outputs.mean(0, dtype=torch.promote_types(outputs.dtype, torch.float32))


def rate_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error of the firing rates (arXiv:1706.02609, Eq. 9)::

        L = 1/(2 S) * sum_s || y_s - (1/T) sum_t o_s[t] ||^2

    with S samples, outputs ``o`` and one-hot ``y``: the neuron of the class should fire at every step, the others at
    none. The loss of arXiv:1809.05793, whose ``o`` is the vote of each class's population, lacks the factor 1/2, and is
    ``2 * rate_mse(...)``. Mind such factors with SGD, where they act as one on the learning rate: the public code of
    the authors takes the mean over the classes, too, which is ``2 / classes * rate_mse(...)``.

    Args:
        outputs: ``[T, B, classes]``: spikes, or the votes of :class:`stbp_cuda.Voting`; any floating dtype.
        targets: the numbers of the classes ``[B]``, int64, each from 0 to classes - 1. torch checks their values, with
            errors of its own; on a GPU the host would have to wait for them.

    Returns:
        The loss, a scalar in float32 (float64 for float64 outputs).

    Raises:
        TypeError, ValueError: a dtype or shape does not fit.
    """
    rates = _rates(outputs, targets)
    wanted = functional.one_hot(targets, rates.shape[1]).to(rates.dtype)
    return (wanted - rates).square().sum(1).mean() / 2


def rate_cross_entropy(outputs: Tensor, targets: Tensor, scale: float = 10.0) -> Tensor:
    """The cross-entropy of a softmax over the firing rates::

        L = -(1/S) * sum_s log softmax(scale * (1/T) sum_t o_s[t])[class of s]

    Rates end at 0 and 1: with a scale of 1, a class that fires at every step and nine that never do would still be
    given a probability of no more than e / (e + 9) = 0.23. With the default of 10 it is 0.9996, whatever T is; a scale
    of T makes the numbers of spikes the logits.

    Args:
        outputs: ``[T, B, classes]``: spikes, or the votes of :class:`stbp_cuda.Voting`; any floating dtype.
        targets: the numbers of the classes ``[B]``, int64, each from 0 to classes - 1. torch checks their values, with
            errors of its own; on a GPU the host would have to wait for them.
        scale: what the rates are multiplied with; positive and finite. Default 10.

    Returns:
        The loss, a scalar in float32 (float64 for float64 outputs).

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; ``scale`` is out of range.
    """
    rates = _rates(outputs, targets)
    return functional.cross_entropy(check_positive("scale", scale) * rates, targets)
