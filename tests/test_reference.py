"""The specification against the paper, by hand, and against a loop in the style of the authors' published code."""

import pytest
import torch
from torch import Tensor

from stbp_cuda import functional
from stbp_cuda.surrogate import Rectangular


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
