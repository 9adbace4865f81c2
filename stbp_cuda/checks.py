"""Arguments that are numbers. NumPy's scalars and tensors of no dimensions count as the Python numbers they hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "check_flag",
    "check_fraction",
    "check_integer",
    "check_number",
    "check_positive",
    "check_sizes",
    "plain",
]

FLOAT32_MAX = torch.finfo(torch.float32).max
_NUMPY = (np.generic, np.ndarray)  # torch.compile cannot join them by |


def _differentiated(tensor: Tensor) -> bool:
    """Whether a derivative is taken with respect to a tensor, or it is one of many under vmap."""
    if tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def plain(value: Any) -> Any:
    """The Python number, bool or string that a NumPy scalar or a tensor of no dimensions holds; else the value itself.

    A tensor that a derivative is taken of stays one: it would be lost.
    """
    if isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if value is None:
        return None
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and not value.is_complex() and not _differentiated(value)
        return value.item() if is_number else value
    if isinstance(value, _NUMPY) and not value.ndim:
        return float(value) if np.issubdtype(value.dtype, np.floating) else value.item()
    return value


def check_number(
    name: str,
    value: object,
    low: float = -FLOAT32_MAX,
    high: float = FLOAT32_MAX,
    accepted: str = "be finite in float32",
) -> float:
    """The number as a Python one.

    Raises:
        TypeError: it is none.
        ValueError: it does not lie between ``low`` and ``high``, or is NaN.
    """
    if type(value) is float and low <= value <= high:
        return value  # first, as functional.lif() checks all its options in every call
    number = plain(value)
    if isinstance(number, Tensor) and number.dim() == 0 and _differentiated(number):
        raise TypeError(f"{name} must be a number; no gradient would reach the tensor that was given, so detach() it")
    if isinstance(number, bool) or not isinstance(number, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= number <= high:
        raise ValueError(f"{name} must {accepted}, got {number}")
    return number  # type: ignore[return-value]


def check_fraction(name: str, value: object, advice: str = "") -> float:
    """:func:`check_number` for one in [0, 1]; ``advice`` ends the message about one beyond."""
    if type(value) is float and 0 <= value <= 1:
        return value
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {number}{advice if number > 1 else ''}")
    return number


def check_positive(name: str, value: object) -> float:
    """:func:`check_number` for a positive one."""
    return check_number(name, value, math.ulp(0.0), sys.float_info.max, "be positive and finite")


def check_integer(name: str, value: object) -> int:
    """The positive integer as a Python one.

    Raises:
        ValueError: it is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt) or number < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return number  # type: ignore[return-value]


def check_sizes(value: object) -> tuple[int, ...]:
    """Positive integers as a tuple of Python ones; () if they are none."""
    if isinstance(value, str) or not isinstance(value, Iterable) or (isinstance(value, Tensor) and value.dim() == 0):
        return ()
    try:
        return tuple(check_integer("size", size) for size in value)
    except ValueError:
        return ()


def check_flag(name: str, value: bool | object) -> bool:
    """The flag as a bool.

    Raises:
        TypeError: it is neither True nor False, nor 0 or 1.
    """
    if value is True or value is False:
        return value
    flag = plain(value)
    if not isinstance(flag, int) or flag not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(flag)
