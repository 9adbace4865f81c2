"""The specification: the LIF neuron as a plain loop over time, differentiated by autograd.

Everything else in this package must agree with it. It is meant to be read, and to run where no fused kernel can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .surrogate import Surrogate

__all__ = ["lif"]


class _Spike(torch.autograd.Function):
    """The Heaviside step forward, the surrogate's derivative backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v_threshold: float, strict: bool, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.v_threshold, ctx.surrogate = v_threshold, surrogate
        fired = u > v_threshold if strict else u >= v_threshold
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(u - ctx.v_threshold), None, None, None


def lif(
    x: Tensor,
    initial_potential: Tensor | None,
    *,
    decay: float,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    strict_threshold: bool,
    smooth: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire over all steps of ``x``, as in Eqs. 3-8 of arXiv:1706.02609 ::

        u[t] = decay * v[t-1] + x[t]
        o[t] = 1 if u[t] >= v_threshold else 0
        v[t] = u[t] * (1 - o[t]) + v_reset * o[t]     hard reset
        v[t] = u[t] - v_threshold * o[t]              soft reset

    Args:
        x: input current ``[T, ...]``, any floating dtype.
        initial_potential: ``v[0]`` of shape ``[...]``, or None for zeros.
        others: as in :func:`stbp_cuda.functional.lif`, which checks them.

    Returns:
        The spikes, of ``x``'s shape and dtype, and the final potential ``v[T]`` of shape ``[...]``. Potentials are
        float64 for float64 input, else float32.
    """
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = torch.zeros_like(x[0], dtype=state) if initial_potential is None else initial_potential.to(state)
    spikes = []
    for current in x:
        u = decay * v + current.to(state)
        o = (
            surrogate.antiderivative(u - v_threshold)
            if smooth
            else _Spike.apply(u, v_threshold, strict_threshold, surrogate)
        )
        reset_by = o.detach() if detach_reset else o
        v = u - v_threshold * reset_by if soft_reset else u * (1 - reset_by) + v_reset * reset_by
        spikes.append(o.to(x.dtype))
    return torch.stack(spikes), v
