"""The specification against the paper, by hand, and against a loop in the style of the authors' published code."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stbp_cuda import functional
from stbp_cuda.surrogate import SURROGATES, Rectangular


class DivisionAsOnCuda(TorchDispatchMode):
    """Divides by a Python number as torch does on CUDA: multiplies by its reciprocal, which rounds twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_) and not isinstance(args[1], Tensor):
            reciprocal = torch.ones((), dtype=args[0].dtype) / torch.tensor(args[1], dtype=args[0].dtype)
            return torch.ops.aten.mul.Tensor(args[0], reciprocal)
        return func(*args, **(kwargs or {}))


def test_the_stand_in_divides_as_cuda_does() -> None:
    x = torch.linspace(0, 1, 10_000, dtype=torch.float64)
    with DivisionAsOnCuda():
        differ = (x / 33) != x / torch.tensor(33.0, dtype=torch.float64)
    assert 0.1 < differ.double().mean() < 0.3  # 1,880 of 10,000 on an H200


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_device_rounds_alike(surrogate: str, dtype: torch.dtype, smooth: bool) -> None:
    """Neurons with normalisation, which use every formula of the reference and of the surrogate."""
    generator = torch.Generator().manual_seed(0)

    def gradients() -> list[Tensor]:
        generator.manual_seed(0)
        tensors = [torch.randn(size, generator=generator, dtype=dtype) for size in ((9, 5, 33, 7), (33, 7))]
        tensors += [torch.tensor(decay, dtype=dtype) for decay in (0.3, 0.7)]
        x, weight, decay, norm_decay = (tensor.requires_grad_() for tensor in tensors)
        result = functional.neunorm_lif(
            x,
            weight,
            decay=decay,
            norm_decay=norm_decay,
            surrogate=SURROGATES[surrogate](0.7),
            smooth=smooth,
            backend="reference",
        )
        return [result, *torch.autograd.grad(result, (x, weight, decay, norm_decay), torch.cos(result.detach()))]

    expected = gradients()
    with DivisionAsOnCuda():
        found = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_three_steps_by_hand(device: str) -> None:
    """Eqs. 3-8 of arXiv:1706.02609, and the gradient, with decay 1/2, threshold 1 and h1 of width 2 (height 1/2).

    The numbers are exact in binary. Step by step::

        t  x      u                     o   v
        1  0.75   0.75                  0   0.75
        2  0.75   0.375 + 0.75 = 1.125  1   0
        3  0.5    0 + 0.5 = 0.5         0   0.5

    and back from dL/do = (1, 2, 4), where e is dL/du and h(u) = 1/2 at all three (|u - 1| < 1)::

        t  dL/do - decay u e[t+1]          e = that * h + decay (1 - o) e[t+1]
        3  4                               2
        2  2 - 0.5 * 1.125 * 2 = 0.875     0.4375 + 0
        1  1 - 0.5 * 0.75 * 0.4375         0.41796875 + 0.5 * 0.4375 = 0.63671875
           = 0.8359375
    """
    for backend in ("reference", "fused"):
        x = torch.tensor([0.75, 0.75, 0.5], device=device).unsqueeze(1).requires_grad_()
        initial = torch.zeros(1, device=device, requires_grad=True)
        spikes, potential = functional.lif(
            x,
            decay=0.5,
            v_threshold=1.0,
            surrogate=Rectangular(2.0),
            initial_potential=initial,
            return_potential=True,
            backend=backend,  # type: ignore[arg-type]
        )
        spikes.backward(torch.tensor([1.0, 2.0, 4.0], device=device).unsqueeze(1))
        assert spikes.flatten().tolist() == [0, 1, 0]
        assert potential.item() == 0.5
        assert x.grad is not None
        assert x.grad.flatten().tolist() == [0.63671875, 0.4375, 2.0]
        assert initial.grad is not None
        assert initial.grad.item() == 0.5 * 0.63671875  # dL/du[0-] = decay * e[1]


class ActFun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, threshold: float, lens: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        ctx.threshold, ctx.lens = threshold, lens
        return u.gt(threshold).float()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        return grad * ((u - ctx.threshold).abs() < ctx.lens), None, None


@pytest.mark.parametrize("steps", [1, 8, 45])
def test_agrees_with_the_loop_of_the_authors(steps: int, device: str) -> None:
    """Their code fires above the threshold, and its window of half-width lens has height 1, not 1 / (2 lens)."""
    threshold, lens, decay = 0.5, 0.5, 0.2
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(steps, 50, generator=generator).to(device)
    gradient = torch.randn(steps, 50, generator=generator).to(device)

    theirs = x.clone().requires_grad_()
    mem = spike = torch.zeros(50, device=device)
    outputs = []
    for current in theirs:
        mem = mem * decay * (1.0 - spike) + current
        spike = ActFun.apply(mem, threshold, lens)
        outputs.append(spike)
    torch.stack(outputs).backward(gradient)

    for backend in ("reference", "fused"):
        ours = x.clone().requires_grad_()
        spikes = functional.lif(
            ours,
            decay=decay,
            v_threshold=threshold,
            surrogate=Rectangular(2 * lens),
            strict_threshold=True,
            backend=backend,  # type: ignore[arg-type]
        )
        spikes.backward(gradient)
        assert torch.equal(spikes, torch.stack(outputs))
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
