"""The surrogates: stand-ins for the derivative of the spike, which is zero everywhere but at the threshold.

The spike is ``o = H(s)`` with ``s = potential - v_threshold``. Each surrogate has

* ``width``, the parameter ``a`` of the paper (arXiv:1706.02609, Eqs. 23-26), in units of the potential, or of its
  square or inverse square root as the formulas say;
* ``gain``, a factor of all of it: the area under the derivative, which is 1 by default;
* ``derivative(s)``, which takes the place of ``dH/ds`` in the backward pass;
* ``antiderivative(s)``, rising from 0 to the gain: the smooth spike that gradients are checked with.

``csrc/neurons/surrogate.h`` holds the same formulas for the fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .checks import check_fraction, check_number
from .other_libraries import WIDTHS, surrogate_advice

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "SURROGATES",
    "Atan",
    "FastSigmoid",
    "Gaussian",
    "MultiGaussian",
    "Polynomial",
    "Rectangular",
    "Sigmoid",
    "Surrogate",
    "Triangle",
    "resolve_surrogate",
]


@dataclass(frozen=True)
class Surrogate:
    """The base of all surrogates.

    Args:
        width: the parameter ``a``, from 1e-30 to 1e30, so that float32 holds what the formulas make of it. Default 1.
        gain: what the derivative is multiplied by, up to 1e6. Default 1. A surrogate whose derivative is 1 at the
            threshold, as in much published code, has the inverse of the height that the formulas give.

    Raises:
        TypeError: ``width`` or ``gain`` is not a number.
        ValueError: one of them is out of range.
    """

    name: ClassVar[str]

    width: float = 1.0
    gain: float = 1.0

    def __new__(cls, *args: Any, **options: Any) -> Self:
        for option in options.keys() & WIDTHS.get(cls.__name__, {}).keys() - cls.__dataclass_fields__.keys():
            width = WIDTHS[cls.__name__][option]
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {option!r}; write width={width}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        width = check_number("width", self.width, 1e-30, 1e30, "lie in [1e-30, 1e30]")
        object.__setattr__(self, "width", width)
        gain = check_number("gain", self.gain, 1e-6, 1e6, "lie in [1e-6, 1e6]")
        object.__setattr__(self, "gain", gain)

    def derivative(self, s: Tensor) -> Tensor:
        """The surrogate derivative at ``s = potential - v_threshold``; any shape, elementwise."""
        raise NotImplementedError

    def antiderivative(self, s: Tensor) -> Tensor:
        """The smooth spike at ``s = potential - v_threshold``; any shape, elementwise, from 0 to the gain."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rectangular(Surrogate):
    """``h1(s) = 1/a`` where ``|s| < a/2``, else 0 (Eq. 23). The default, as in both papers."""

    name: ClassVar[str] = "rectangular"

    def derivative(self, s: Tensor) -> Tensor:
        return (s.abs() < self.width / 2).to(s.dtype) * (self.gain / self.width)

    def antiderivative(self, s: Tensor) -> Tensor:
        return self.gain * (s * (1 / self.width) + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Polynomial(Surrogate):
    """``h2(s) = sqrt(a)/2 - (a/4) |s|`` where ``|s| < 2/sqrt(a)``, else 0 (Eq. 24)."""

    name: ClassVar[str] = "polynomial"

    def derivative(self, s: Tensor) -> Tensor:
        triangle = self.gain * (math.sqrt(self.width) / 2) - self.gain * (self.width / 4) * s.abs()
        return torch.where(s.abs() < 2 / math.sqrt(self.width), triangle, 0.0)

    def antiderivative(self, s: Tensor) -> Tensor:
        end = 2 / math.sqrt(self.width)
        inside = s.clamp(-end, end)
        rising = self.gain * (math.sqrt(self.width) / 2) - self.gain * (self.width / 8) * inside.abs()
        return self.gain / 2 + inside * rising


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """``h3(s) = (1/a) e^(-s/a) / (1 + e^(-s/a))^2`` (Eq. 25), the derivative of the logistic function of ``s/a``."""

    name: ClassVar[str] = "sigmoid"

    def derivative(self, s: Tensor) -> Tensor:
        # Even in s: the exponential of -|s| cannot overflow and loses no digits in the tails.
        e = torch.exp(-s.abs() * (1 / self.width))
        return (self.gain / self.width) * (e / (1 + e).square())

    def antiderivative(self, s: Tensor) -> Tensor:
        return self.gain * torch.sigmoid(s * (1 / self.width))


def _density(s: Tensor, variance: float, gain: float) -> Tensor:
    return torch.exp(-s.square() * (1 / (2 * variance))) * (gain / math.sqrt(2 * math.pi * variance))


def _distribution(s: Tensor, variance: float, gain: float) -> Tensor:
    return (gain / 2) * torch.erfc(-s * (1 / math.sqrt(2 * variance)))


@dataclass(frozen=True)
class Gaussian(Surrogate):
    """``h4(s) = e^(-s^2 / (2a)) / sqrt(2 pi a)`` (Eq. 26), a normal density of variance ``a``."""

    name: ClassVar[str] = "gaussian"

    def derivative(self, s: Tensor) -> Tensor:
        return _density(s, self.width, self.gain)

    def antiderivative(self, s: Tensor) -> Tensor:
        return _distribution(s, self.width, self.gain)


@dataclass(frozen=True)
class Atan(Surrogate):
    """``h(s) = (1/a) / (1 + (pi s / a)^2)``. The ``alpha`` of SpikingJelly's ATan is ``2 / a``."""

    name: ClassVar[str] = "atan"

    def derivative(self, s: Tensor) -> Tensor:
        return (self.gain / self.width) / (1 + (s * (math.pi / self.width)).square())

    def antiderivative(self, s: Tensor) -> Tensor:
        return self.gain * (0.5 + torch.atan(s * (math.pi / self.width)) * (1 / math.pi))


@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """``h(s) = (1/a) / (1 + 2|s|/a)^2``. snnTorch's fast_sigmoid of a ``slope`` is
    ``FastSigmoid(2 / slope, gain=2 / slope)``."""

    name: ClassVar[str] = "fast_sigmoid"

    def derivative(self, s: Tensor) -> Tensor:
        return (self.gain / self.width) / (1 + s.abs() * (2 / self.width)).square()

    def antiderivative(self, s: Tensor) -> Tensor:
        return self.gain / 2 + (self.gain / 2) * (s / (self.width / 2 + s.abs()))


@dataclass(frozen=True)
class MultiGaussian(Surrogate):
    """``(1 + b) G(s; 0, a) - b G(s; sqrt(a), c^2 a) - b G(s; -sqrt(a), c^2 a)``, with ``G(s; m, v)`` the normal density
    of mean ``m`` and variance ``v``: negative at a distance (Yin et al., arXiv:2103.12593). Their code is
    ``MultiGaussian(0.25, gain=0.5)``.

    Args:
        width, gain: as for all; the area is ``(1 - b)`` times the gain.
        height: ``b``, from 0 to 1. Default 0.15.
        scale: ``c``, from 1e-3 to 1e3. Default 6.
    """

    name: ClassVar[str] = "multi_gaussian"

    height: float = 0.15
    scale: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "height", check_fraction("height", self.height))
        object.__setattr__(self, "scale", check_number("scale", self.scale, 1e-3, 1e3, "lie in [1e-3, 1e3]"))

    def _of(self, normal: Callable[[Tensor, float, float], Tensor], s: Tensor) -> Tensor:
        distance, wide = math.sqrt(self.width), self.width * self.scale**2
        sides = normal(s - distance, wide, self.gain) + normal(s + distance, wide, self.gain)
        return (1 + self.height) * normal(s, self.width, self.gain) - self.height * sides

    def derivative(self, s: Tensor) -> Tensor:
        return self._of(_density, s)

    def antiderivative(self, s: Tensor) -> Tensor:
        return self._of(_distribution, s)


def Triangle(half_width: float = 1.0, gain: float = 1.0) -> Polynomial:  # noqa: N802
    """The triangle that is 0 from a distance of ``half_width`` from the threshold on, and ``gain / half_width`` high: a
    :class:`Polynomial` of width ``4 / half_width**2``.

    Args:
        half_width: from 1e-14 to 1e14. Default 1.
        gain: as for all surrogates.

    Raises:
        TypeError, ValueError: one of them is not a number, or out of range.
    """
    half_width = check_number("half_width", half_width, 1e-14, 1e14, "lie in [1e-14, 1e14]")
    return Polynomial(4 / half_width**2, gain)


SURROGATES: dict[str, type[Surrogate]] = {
    cls.name: cls for cls in (Rectangular, Polynomial, Sigmoid, Gaussian, Atan, FastSigmoid, MultiGaussian)
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
