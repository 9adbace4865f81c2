"""Modules that go with spiking neurons: on time-major input ``[T, B, ...]``, and without state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from .checks import check_fraction, check_integer

__all__ = ["Dropout", "TimeDistributed", "Voting", "fold_time"]

MASKS = ("step", "sequence")


def fold_time(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of ``[B, ...]`` to ``[T, B, ...]``, with all steps in one batch of ``T * B``. Time is folded and
    unfolded without a copy, in channels_last, too."""
    if x.dim() < 2:
        raise ValueError(f"x must be of shape [T, B, ...], got {tuple(x.shape)}")
    y = function(x.flatten(0, 1))
    return y.view(*x.shape[:2], *y.shape[1:])


class TimeDistributed(nn.Sequential):
    """Modules that know no time, one after another, on every step of ``[T, B, ...]``, as one batch of ``T * B``::

        nn.Sequential(
            stbp_cuda.TimeDistributed(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)),  # [T, B, 1, H, W]
            stbp_cuda.LIFLayer(),
            stbp_cuda.TimeDistributed(nn.AvgPool2d(2)),
        )

    Batch norm thus takes its statistics over all steps and samples. (``LIFLayer(steps=T)`` is the other way to bring
    both kinds of modules together: time stays folded.)

    Args:
        modules: as for :class:`torch.nn.Sequential`, each from ``[B, ...]`` to ``[B, ...]``.

    Raises:
        ValueError: the input has fewer than two dimensions.
    """

    def forward(self, x: Tensor) -> Tensor:
        return fold_time(super().forward, x)


class Voting(nn.Module):
    """The votes of populations of neurons (arXiv:1809.05793): the last layer has a population for each class, and the
    vote of a class is the mean over its population. Populations are contiguous: class ``c`` has the neurons from
    ``c * population`` up to, and without, ``(c + 1) * population``.

    Nothing here is learned: it is a product with a fixed matrix, M in the paper. The mean over time of the votes is the
    mean firing rate of each population.

    Args:
        classes: the number of classes; positive.

    Shape:
        ``[..., classes * population]`` to ``[..., classes]``.

    Raises:
        ValueError: ``classes`` is not a positive integer, or does not divide the last dimension of the input.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = check_integer("classes", classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % self.classes:
            raise ValueError(
                f"the last dimension of x must be {self.classes} classes times a population, got {tuple(x.shape)}"
            )
        return x.view(*x.shape[:-1], self.classes, x.shape[-1] // self.classes).mean(-1)

    def extra_repr(self) -> str:
        return f"classes={self.classes}"


class Dropout(nn.Module):
    """Dropout on ``[T, B, ...]``: in training each neuron is silenced with probability ``p``, and what the others send
    is scaled by ``1 / (1 - p)``. In evaluation it changes nothing.

    arXiv:1809.05793 has a dropout of 0.5 for CIFAR10 and does not tell whether a mask lasts for a step or for a sample;
    its authors' code draws a new one at every step, and so does the default.

    Args:
        p: the probability, in [0, 1]. Default 0.5.
        mask: "step" draws a new mask at every step; "sequence" one that is kept for all steps, so that a neuron is
            absent for a whole sample. Default "step".

    Raises:
        ValueError: ``p`` or ``mask`` is not one of those accepted; the input has no time dimension.
    """

    def __init__(self, p: float = 0.5, mask: Literal["step", "sequence"] = "step") -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        self.p = check_fraction("p", p)
        self.mask: Literal["step", "sequence"] = mask

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"x must be of shape [T, B, ...], got {tuple(x.shape)}")
        if not self.training:
            return x
        if self.mask == "step":
            return nn.functional.dropout(x, self.p)
        return x * nn.functional.dropout(torch.ones_like(x[0]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, mask={self.mask!r}"
