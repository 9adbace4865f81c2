"""TimeDistributed, Voting and Dropout."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stbp_cuda


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.booleans())
def test_time_distributed_is_a_loop_over_time(steps: int, batch: int, channels: int, side: int, flat: bool) -> None:
    modules = [nn.Conv2d(channels, 2, 2), nn.AvgPool2d(1), *([nn.Flatten()] if flat else [])]
    x = torch.randn(steps, batch, channels, side, side)
    found = stbp_cuda.TimeDistributed(*modules)(x)
    expected = torch.stack([nn.Sequential(*modules)(step) for step in x])
    torch.testing.assert_close(found, expected)


def test_time_distributed_gives_batch_norm_all_steps() -> None:
    x = torch.randn(4, 3, 2, 5, 5)
    found = stbp_cuda.TimeDistributed(nn.BatchNorm2d(2))(x)
    torch.testing.assert_close(found.mean((0, 1, 3, 4)), torch.zeros(2), rtol=0, atol=1e-6)


def test_time_distributed_copies_nothing_in_channels_last() -> None:
    x = torch.randn(6, 2, 4, 4).to(memory_format=torch.channels_last).view(3, 2, 2, 4, 4)
    seen = []

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            seen.append(x.data_ptr())
            return x

    found = stbp_cuda.TimeDistributed(Look())(x)
    assert seen == [x.data_ptr()] == [found.data_ptr()]
    assert found.stride() == x.stride()


def test_time_distributed_needs_time_and_batch() -> None:
    with pytest.raises(ValueError, match=re.escape("x must be of shape [T, B, ...], got (3,)")):
        stbp_cuda.TimeDistributed(nn.Identity())(torch.zeros(3))


def test_voting_by_hand() -> None:
    spikes = torch.tensor([[[1.0, 0, 0, 1, 1, 1]]])
    assert stbp_cuda.Voting(2)(spikes).tolist() == [[[pytest.approx(1 / 3), 1]]]
    assert stbp_cuda.Voting(3)(spikes).tolist() == [[[0.5, 0.5, 1]]]
    assert "classes=3" in repr(stbp_cuda.Voting(3))


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 5), st.integers(1, 4))
def test_voting_is_a_product_with_a_matrix(leading: list[int], classes: int, population: int) -> None:
    """The matrix M of the paper: of row c, the entries of class c's population are 1/population."""
    x = torch.randn(*leading, classes * population, dtype=torch.float64)
    matrix = torch.zeros(classes, classes * population, dtype=torch.float64)
    for neuron in range(classes * population):
        matrix[neuron // population, neuron] = 1 / population
    torch.testing.assert_close(stbp_cuda.Voting(classes)(x), x @ matrix.T)


@pytest.mark.parametrize("shape", [(2, 7), (), (4, 0)])
def test_voting_refuses_what_it_cannot_divide(shape: tuple[int, ...]) -> None:
    message = f"the last dimension of x must be 3 classes times a population, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        stbp_cuda.Voting(3)(torch.zeros(shape))


@pytest.mark.parametrize("classes", [0, 2.0, True])
def test_voting_refuses_a_number_of_classes(classes: Any) -> None:
    with pytest.raises(ValueError, match="classes must be a positive integer, got"):
        stbp_cuda.Voting(classes)


@pytest.mark.parametrize("mask", ["step", "sequence"])
@pytest.mark.parametrize("shape", [(5, 40, 50), (5, 4, 3, 20, 10)])
def test_dropout_masks(mask: Any, shape: tuple[int, ...], device: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape, device=device) + 1
    x.requires_grad_()
    y = stbp_cuda.Dropout(0.2, mask)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / 0.8)[kept])
    chance = 2000 * (5 if mask == "step" else 1)  # that many draws
    assert abs(kept.double().mean().item() - 0.8) < 5 * (0.8 * 0.2 / chance) ** 0.5
    for t in range(1, 5):
        assert torch.equal(kept[t], kept[0]) == (mask == "sequence")
    assert not torch.equal(kept[:, 0], kept[:, 1])  # samples are dropped independently
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, kept / 0.8)


@pytest.mark.parametrize("mask", ["step", "sequence"])
def test_dropout_ends(mask: Any) -> None:
    x = torch.rand(3, 4, 5)
    assert stbp_cuda.Dropout(0.9, mask).eval()(x) is x
    assert torch.equal(stbp_cuda.Dropout(0.0, mask)(x), x)
    assert not stbp_cuda.Dropout(1.0, mask)(x).any()
    assert f"p=0.9, mask={mask!r}" in repr(stbp_cuda.Dropout(0.9, mask))


def test_dropout_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("p must lie in [0, 1], got 1.5")):
        stbp_cuda.Dropout(1.5)
    with pytest.raises(ValueError, match="mask must be one of step, sequence, got 'batch'"):
        stbp_cuda.Dropout(0.5, "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("x must be of shape [T, B, ...], got (3,)")):
        stbp_cuda.Dropout(0.5)(torch.zeros(3))
