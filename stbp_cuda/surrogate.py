"""The surrogates: stand-ins for the derivative of the spike, which is zero everywhere but at the threshold.

The spike is ``o = H(s)`` with ``s = potential - v_threshold``. Each surrogate has

* ``width``, the parameter ``a`` of the paper (arXiv:1706.02609, Eqs. 23-26), in units of the potential, or of its
  square or inverse square root as the formulas say;
* ``derivative(s)``, of unit area, which takes the place of ``dH/ds`` in the backward pass;
* ``antiderivative(s)``, rising from 0 to 1: the smooth spike that gradients are checked with.

``csrc/neurons/surrogate.h`` holds the same formulas for the fused kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .checks import check_number
from .other_libraries import WIDTHS, surrogate_advice

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "SURROGATES",
    "Atan",
    "FastSigmoid",
    "Gaussian",
    "Polynomial",
    "Rectangular",
    "Sigmoid",
    "Surrogate",
    "resolve_surrogate",
]


@dataclass(frozen=True)
class Surrogate:
    """The base of all surrogates.

    Args:
        width: the parameter ``a``, from 1e-30 to 1e30, so that float32 holds what the formulas make of it. Default 1.

    Raises:
        TypeError: ``width`` is not a number.
        ValueError: ``width`` is out of range.
    """

    name: ClassVar[str]

    width: float = 1.0

    def __new__(cls, *args: Any, **options: Any) -> Self:
        for option in options.keys() & WIDTHS.get(cls.__name__, {}).keys() - cls.__dataclass_fields__.keys():
            width = WIDTHS[cls.__name__][option]
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {option!r}; write width={width}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        width = check_number("width", self.width, 1e-30, 1e30, "lie in [1e-30, 1e30]")
        object.__setattr__(self, "width", width)

    def derivative(self, s: Tensor) -> Tensor:
        """The surrogate derivative at ``s = potential - v_threshold``; any shape, elementwise."""
        raise NotImplementedError

    def antiderivative(self, s: Tensor) -> Tensor:
        """The smooth spike at ``s = potential - v_threshold``; any shape, elementwise, from 0 to 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rectangular(Surrogate):
    """``h1(s) = 1/a`` where ``|s| < a/2``, else 0 (Eq. 23). The default, as in both papers."""

    name: ClassVar[str] = "rectangular"

    def derivative(self, s: Tensor) -> Tensor:
        return (s.abs() < self.width / 2).to(s.dtype) * (1 / self.width)

    def antiderivative(self, s: Tensor) -> Tensor:
        return (s * (1 / self.width) + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Polynomial(Surrogate):
    """``h2(s) = sqrt(a)/2 - (a/4) |s|`` where ``|s| < 2/sqrt(a)``, else 0 (Eq. 24)."""

    name: ClassVar[str] = "polynomial"

    def derivative(self, s: Tensor) -> Tensor:
        triangle = math.sqrt(self.width) / 2 - (self.width / 4) * s.abs()
        return torch.where(s.abs() < 2 / math.sqrt(self.width), triangle, 0.0)

    def antiderivative(self, s: Tensor) -> Tensor:
        end = 2 / math.sqrt(self.width)
        inside = s.clamp(-end, end)
        return 0.5 + inside * (math.sqrt(self.width) / 2 - (self.width / 8) * inside.abs())


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """``h3(s) = (1/a) e^(-s/a) / (1 + e^(-s/a))^2`` (Eq. 25), the derivative of the logistic function of ``s/a``."""

    name: ClassVar[str] = "sigmoid"

    def derivative(self, s: Tensor) -> Tensor:
        # Even in s: the exponential of -|s| cannot overflow and loses no digits in the tails.
        e = torch.exp(-s.abs() * (1 / self.width))
        return (1 / self.width) * (e / (1 + e).square())

    def antiderivative(self, s: Tensor) -> Tensor:
        return torch.sigmoid(s * (1 / self.width))


@dataclass(frozen=True)
class Gaussian(Surrogate):
    """``h4(s) = e^(-s^2 / (2a)) / sqrt(2 pi a)`` (Eq. 26), a normal density of variance ``a``."""

    name: ClassVar[str] = "gaussian"

    def derivative(self, s: Tensor) -> Tensor:
        return torch.exp(-s.square() * (1 / (2 * self.width))) * (1 / math.sqrt(2 * math.pi * self.width))

    def antiderivative(self, s: Tensor) -> Tensor:
        return 0.5 * torch.erfc(-s * (1 / math.sqrt(2 * self.width)))


@dataclass(frozen=True)
class Atan(Surrogate):
    """``h(s) = (1/a) / (1 + (pi s / a)^2)``. The ``alpha`` of SpikingJelly's ATan is ``2 / a``."""

    name: ClassVar[str] = "atan"

    def derivative(self, s: Tensor) -> Tensor:
        return (1 / self.width) / (1 + (s * (math.pi / self.width)).square())

    def antiderivative(self, s: Tensor) -> Tensor:
        return 0.5 + torch.atan(s * (math.pi / self.width)) * (1 / math.pi)


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """``h(s) = (1/a) / (1 + 2|s|/a)^2``. The ``slope`` of snnTorch's fast_sigmoid is ``2 / a``; its height is 1."""

    name: ClassVar[str] = "fast_sigmoid"

    def derivative(self, s: Tensor) -> Tensor:
        return (1 / self.width) / (1 + s.abs() * (2 / self.width)).square()

    def antiderivative(self, s: Tensor) -> Tensor:
        return 0.5 + 0.5 * (s / (self.width / 2 + s.abs()))


SURROGATES: dict[str, type[Surrogate]] = {
    cls.name: cls for cls in (Rectangular, Polynomial, Sigmoid, Gaussian, Atan, FastSigmoid)
}


def resolve_surrogate(surrogate: str | Surrogate) -> Surrogate:
    """A surrogate from its name, with width 1, or the surrogate itself."""
    if isinstance(surrogate, Surrogate):
        return surrogate
    if isinstance(surrogate, str) and surrogate in SURROGATES:
        return SURROGATES[surrogate]()
    advice = surrogate_advice(surrogate)
    if isinstance(surrogate, str):
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}{advice}")
    if isinstance(surrogate, type) and issubclass(surrogate, Surrogate):
        advice = f": write {surrogate.__name__}() or {surrogate.__name__}(width)"
    raise TypeError(f"surrogate must be a name or a stbp_cuda.surrogate.Surrogate, got {surrogate!r}{advice}")
