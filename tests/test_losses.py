"""Losses and initial weights, against what the paper's formulas give by hand."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stbp_cuda import init, losses

LOSSES = [losses.rate_mse, losses.rate_cross_entropy]

# Two steps, two samples, three classes. The rates are (1/2, 1, 0) and (0, 0, 1).
OUTPUTS = torch.tensor([[[1.0, 1, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]])
TARGETS = torch.tensor([0, 2])


def test_rate_mse_by_hand(device: str) -> None:
    loss = losses.rate_mse(OUTPUTS.to(device), TARGETS.to(device))
    assert loss.item() == ((1 - 0.5) ** 2 + 1**2 + 0 + 0) / (2 * 2)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_rate_cross_entropy_by_hand(scale: float, device: str) -> None:
    loss = losses.rate_cross_entropy(OUTPUTS.to(device), TARGETS.to(device), scale)
    first = math.exp(scale / 2) / (math.exp(scale / 2) + math.exp(scale) + 1)
    second = math.exp(scale) / (math.exp(scale) + 2)
    assert loss.item() == pytest.approx(-(math.log(first) + math.log(second)) / 2, rel=1e-6)


def test_the_default_scale_lets_rates_speak_clearly() -> None:
    sure = torch.nn.functional.one_hot(torch.tensor([3]), 10).float().expand(4, 1, 10)
    loss = losses.rate_cross_entropy(sure, torch.tensor([3]))
    assert math.exp(-loss.item()) == pytest.approx(0.9996, abs=5e-5)
    assert torch.equal(loss, losses.rate_cross_entropy(sure, torch.tensor([3]), 10.0))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**16))
def test_rate_mse_is_equation_9(steps: int, samples: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.rand(steps, samples, classes, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(classes, (samples,), generator=generator)
    expected = torch.zeros((), dtype=torch.float64)
    for s in range(samples):
        wanted = torch.zeros(classes, dtype=torch.float64)
        wanted[targets[s]] = 1
        expected = expected + (wanted - sum(outputs[t, s] for t in range(steps)) / steps).norm() ** 2 / (2 * samples)
    torch.testing.assert_close(losses.rate_mse(outputs, targets), expected)
    for loss in LOSSES:
        assert torch.autograd.gradcheck(lambda outputs, loss=loss: loss(outputs, targets), outputs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_have_rates_in_float32(loss: Any, dtype: torch.dtype, device: str) -> None:
    outputs = (torch.rand(7, 4, 10, device=device) < 0.3).to(dtype)  # sevenths, which no half type holds
    targets = torch.arange(4, device=device)
    assert loss(outputs, targets).dtype == torch.float32
    assert torch.equal(loss(outputs, targets), loss(outputs.float(), targets))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("outputs", "targets", "error", "message"),
    [
        (OUTPUTS.tolist(), TARGETS, TypeError, "outputs must be a tensor, got list"),
        (OUTPUTS, 2, TypeError, "targets must be a tensor, got int"),
        (OUTPUTS.long(), TARGETS, TypeError, "outputs must be of a floating dtype, got torch.int64"),
        (OUTPUTS, TARGETS.float(), TypeError, "targets must be class numbers of dtype torch.int64, got torch.float32"),
        (OUTPUTS[0], TARGETS, ValueError, "outputs must be of shape [T, B, classes], none of them 0, got (2, 3)"),
        (OUTPUTS[:0], TARGETS, ValueError, "outputs must be of shape [T, B, classes], none of them 0, got (0, 2, 3)"),
        (
            OUTPUTS,
            TARGETS[:1],
            ValueError,
            "targets must be of shape [B] = (2,) for outputs of shape (2, 2, 3), got (1",
        ),
    ],
)
def test_losses_refuse(loss: Any, outputs: Any, targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        loss(outputs, targets)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_rate_cross_entropy_refuses_a_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        losses.rate_cross_entropy(OUTPUTS, TARGETS, scale)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5, 5)])
@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_unit_norm_rows(shape: tuple[int, ...], norm: float, device: str) -> None:
    weight = torch.nn.Parameter(torch.empty(shape, device=device))
    generator = torch.Generator(device).manual_seed(0)
    assert init.unit_norm_rows_(weight, norm, generator) is weight
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((6,), norm, device=device))
    drawn = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator.manual_seed(0)).flatten(1)
    torch.testing.assert_close(weight.detach().flatten(1), norm * drawn / drawn.norm(dim=1, keepdim=True))
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.parametrize(
    ("weight", "norm", "error", "message"),
    [
        ([[1.0]], 1.0, TypeError, "weight must be a tensor of a floating dtype, got list"),
        (
            torch.ones(2, 2, dtype=torch.int64),
            1.0,
            TypeError,
            "weight must be a tensor of a floating dtype, got torch.i",
        ),
        (torch.ones(3), 1.0, ValueError, "weight must be of shape [outputs, inputs, ...], got (3,)"),
        (torch.ones(3, 2), 0.0, ValueError, "norm must be positive and finite, got 0.0"),
        (torch.ones(3, 2), math.nan, ValueError, "norm must be positive and finite, got nan"),
    ],
)
def test_unit_norm_rows_refuses(weight: Any, norm: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        init.unit_norm_rows_(weight, norm)
