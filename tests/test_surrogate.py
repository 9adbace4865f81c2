"""The surrogates by themselves: shape, area, and derivative against antiderivative."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from stbp_cuda.surrogate import (
    SURROGATES,
    MultiGaussian,
    Polynomial,
    Rectangular,
    Surrogate,
    Triangle,
    resolve_surrogate,
)

every_surrogate = pytest.mark.parametrize("name", SURROGATES)
every_width = pytest.mark.parametrize("width", [0.1, 1.0, 2.5])
every_gain = pytest.mark.parametrize("gain", [1.0, 0.3])


def area(surrogate: Surrogate) -> float:
    return surrogate.gain * (1 - surrogate.height if isinstance(surrogate, MultiGaussian) else 1)


@every_surrogate
@every_width
@every_gain
def test_derivative_is_that_of_the_antiderivative(name: str, width: float, gain: float) -> None:
    surrogate = SURROGATES[name](width, gain)
    s = torch.linspace(-3, 3, 4001, dtype=torch.float64) + 1e-4  # off the corners, which lie at round numbers
    h = 1e-6
    numerical = (surrogate.antiderivative(s + h) - surrogate.antiderivative(s - h)) / (2 * h)
    torch.testing.assert_close(surrogate.derivative(s), numerical, rtol=1e-6, atol=1e-8 / width)


@every_surrogate
@every_width
@every_gain
def test_autograd_of_the_antiderivative_is_the_derivative(name: str, width: float, gain: float) -> None:
    surrogate = SURROGATES[name](width, gain)
    s = (torch.linspace(-3, 3, 4001, dtype=torch.float64) + 1e-4).requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate.antiderivative(s).sum(), s)
    torch.testing.assert_close(gradient, surrogate.derivative(s).detach(), rtol=1e-9, atol=1e-15 / width)


@every_surrogate
@every_width
@every_gain
def test_antiderivative_rises_from_0_to_the_area_and_is_half_at_the_threshold(
    name: str, width: float, gain: float
) -> None:
    surrogate = SURROGATES[name](width, gain)
    values = surrogate.antiderivative(torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64))
    expected = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) * area(surrogate)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-8)
    s = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    assert (surrogate.antiderivative(s).diff() >= 0).all() or name == "multi_gaussian"  # negative at a distance


# The paper's Eqs. 23-26 with numbers put in, and the others' at the peak and at one more point.
@pytest.mark.parametrize(
    ("name", "width", "s", "expected"),
    [
        ("rectangular", 0.5, 0.2, 2.0),
        ("rectangular", 0.5, 0.25, 0.0),
        ("polynomial", 4.0, 0.25, 0.75),
        ("polynomial", 4.0, 1.0, 0.0),
        ("sigmoid", 2.0, 0.0, 0.125),
        ("sigmoid", 1.0, -1.0, math.e / (1 + math.e) ** 2),
        ("gaussian", 2.0, 0.0, 1 / math.sqrt(4 * math.pi)),
        ("gaussian", 0.5, 1.0, math.exp(-1) / math.sqrt(math.pi)),
        ("atan", 2.0, 0.0, 0.5),
        ("atan", math.pi, 1.0, 1 / (2 * math.pi)),
        ("fast_sigmoid", 0.5, 0.0, 2.0),
        ("fast_sigmoid", 2.0, -1.0, 0.125),
        # 1.15 in the middle, and from each side 0.15 of a normal density six times as wide.
        ("multi_gaussian", 1.0, 0.0, (1.15 - 0.05 * math.exp(-1 / 72)) / math.sqrt(2 * math.pi)),
        (
            "multi_gaussian",
            0.25,
            0.5,
            (1.15 * math.exp(-0.5) - 0.025 * (1 + math.exp(-1 / 18))) / math.sqrt(math.pi / 2),
        ),
    ],
)
def test_derivative_at_a_point(name: str, width: float, s: float, expected: float) -> None:
    at = torch.tensor(s, dtype=torch.float64)
    assert SURROGATES[name](width).derivative(at).item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert SURROGATES[name](width, 0.5).derivative(at).item() == pytest.approx(0.5 * expected, rel=1e-12, abs=0)


def test_triangle_is_a_polynomial() -> None:
    assert Triangle(0.3, 0.5) == Polynomial(4 / 0.3**2, 0.5)


@pytest.mark.parametrize(("s", "expected"), [(0.0, 0.5), (1.0, 0.25), (-1.5, 0.125), (2.0, 0.0), (3.0, 0.0)])
def test_triangle_at_a_point(s: float, expected: float) -> None:
    at = torch.tensor(s, dtype=torch.float64)
    assert Triangle(2.0).derivative(at).item() == pytest.approx(expected)
    assert Triangle(2.0, gain=2.0).derivative(at).item() == pytest.approx(2 * expected)


@every_surrogate
@every_gain
def test_area(name: str, gain: float) -> None:
    s = torch.from_numpy(np.sinh(np.linspace(-25, 25, 200_001)))  # dense at 0, and far out for the heavy tails
    found = torch.trapezoid(SURROGATES[name](1.0, gain).derivative(s), s).item()
    # Points are 1e-4 apart where the rectangle ends.
    assert found == pytest.approx(area(SURROGATES[name](1.0, gain)), abs=1e-3)


@every_surrogate
@pytest.mark.parametrize("width", [1e-30, 1.0, 1e30])
def test_far_tails_neither_overflow_nor_turn_nan(name: str, width: float) -> None:
    surrogate = SURROGATES[name](width)
    s = torch.tensor([-3e38, -1e5, 0.0, 1e5, 3e38])
    for value in (surrogate.derivative(s), surrogate.antiderivative(s)):
        assert value.isfinite().all()
        assert (value >= 0).all() or name == "multi_gaussian"


def test_resolve() -> None:
    assert resolve_surrogate("rectangular") == Rectangular(1.0)
    assert resolve_surrogate(Rectangular(2.0)) == Rectangular(2.0)
    with pytest.raises(ValueError, match=r"surrogate must be one of rectangular, .*, got 'triangle'"):
        resolve_surrogate("triangle")
    with pytest.raises(TypeError, match=r"surrogate must be a name or a .*Surrogate, got 3"):
        resolve_surrogate(3)  # type: ignore[arg-type]


@every_surrogate
@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf, 1e-31, 1e31])
def test_width_must_be_in_range(name: str, width: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"width must lie in [1e-30, 1e30], got {width}")):
        SURROGATES[name](width)


@every_surrogate
@pytest.mark.parametrize("gain", [0.0, -1.0, math.nan, math.inf, 1e-7, 1e7])
def test_gain_must_be_in_range(name: str, gain: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"gain must lie in [1e-6, 1e6], got {gain}")):
        SURROGATES[name](gain=gain)


@pytest.mark.parametrize("half_width", [0.0, -1.0, math.nan, 1e-15, 1e15])
def test_half_width_must_be_in_range(half_width: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"half_width must lie in [1e-14, 1e14], got {half_width}")):
        Triangle(half_width)


@every_surrogate
@pytest.mark.parametrize("value", ["1", None, True])
@pytest.mark.parametrize("argument", ["width", "gain"])
def test_width_and_gain_must_be_numbers(name: str, value: object, argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be a number"):
        SURROGATES[name](**{argument: value})  # type: ignore[arg-type]


def test_a_surrogate_of_ones_own_needs_both_formulas() -> None:
    class Nothing(Surrogate):
        name = "nothing"

    s: Tensor = torch.zeros(1)
    with pytest.raises(NotImplementedError):
        Nothing().derivative(s)
    with pytest.raises(NotImplementedError):
        Nothing().antiderivative(s)


def test_a_newton_step_rounds_reciprocals_correctly() -> None:
    """What csrc/number.h has for CUDA, in integers, for every mantissa: x = m / 2^23, and 1 / x is 2^47 / m units of
    2^-24. From each approximation within 1 ulp comes the nearest number, but for one mantissa from one of the two; that
    the hardware gives the other one there, IEEE's reciprocal, which rests on the same step, tells."""
    m = np.arange(2**23, 2**24, dtype=np.int64)
    nearest = (2**48 + m) // (2 * m)
    wrong = []
    for approximate in (2**47 // m, 2**47 // m + 1):
        rest = (2**47 - m * approximate).astype(np.float32).astype(np.int64)  # 1 - x y, in units of 2^-47
        product = approximate * rest
        up = product & (2**47 - 1)
        refined = approximate + (product >> 47)
        refined += (up > 2**46) | ((up == 2**46) & (refined % 2 == 1))
        wrong.append(m[refined != nearest].tolist())
    assert wrong == [[2**24 - 1], []]


def test_cudas_arithmetic_keeps_the_sigmoid_within_its_bound() -> None:
    """An exponential within 2 ulp (CUDA's guide has expf() within 1) and a reciprocal within 1 (PTX's rcp.approx), at
    their worst, against float64 over the whole range of numbers whose results are normal."""
    x = -np.geomspace(1e-7, 80, 400_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    expected = exact / (1 + exact) ** 2
    for ulps in itertools.product((-2, 0, 2), (-1, 0, 1)):
        e = exact.astype(np.float32)
        e += ulps[0] * np.spacing(e)
        square = (1 + e) * (1 + e)
        reciprocal = (1 / square.astype(np.float64)).astype(np.float32)
        reciprocal += ulps[1] * np.spacing(reciprocal)
        assert (np.abs(e * reciprocal - expected) <= 1e-6 * expected).all()
