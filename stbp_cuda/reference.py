"""The specification: neurons as plain loops over time, differentiated by autograd.

Everything else in this package must agree with it. It is meant to be read, and to run where no fused kernel can. No
tensor is divided by a Python number here or in surrogate.py: on CUDA torch multiplies by the reciprocal instead, which
rounds differently from a division on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .surrogate import Surrogate

__all__ = ["lif", "neunorm"]


def refuse_forward_ad(ctx: Any, *tangents: Any) -> Any:
    """The ``jvp`` of every function of this package."""
    raise RuntimeError(
        "stbp_cuda has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad), only "
        "the gradient of the backward pass: use torch.func.vjp, jacrev or grad"
    )


class _Spike(torch.autograd.Function):
    """The Heaviside step forward, the surrogate's derivative backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, v_threshold: float, strict: bool, surrogate: Surrogate) -> Tensor:
        fired = u > v_threshold if strict else u >= v_threshold
        return fired.to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, ctx.v_threshold, _, ctx.surrogate = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(u - ctx.v_threshold), None, None, None

    jvp = staticmethod(refuse_forward_ad)


def lif(
    x: Tensor,
    initial_potential: Tensor | None,
    *,
    decay: float | Tensor,
    v_threshold: float,
    v_reset: float,
    soft_reset: bool,
    detach_reset: bool,
    spatial_only: bool,
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
        u = decay * (v.detach() if spatial_only else v) + current.to(state)
        o = (
            surrogate.antiderivative(u - v_threshold)
            if smooth
            else _Spike.apply(u, v_threshold, strict_threshold, surrogate)
        )
        reset_by = o.detach() if detach_reset else o
        v = u - v_threshold * reset_by if soft_reset else u * (1 - reset_by) + v_reset * reset_by
        spikes.append(o.to(x.dtype))
    return torch.stack(spikes), v


def neunorm(spikes: Tensor, weight: Tensor, *, decay: float | Tensor, squared: bool) -> Tensor:
    """Neuron normalisation of all steps of ``spikes``, as in Eqs. 9-10 of arXiv:1809.05793 ::

        a[t] = decay * a[t-1] + gain * sum of the feature maps of o[t]     gain = (1 - decay) * share
        y_c[t] = o_c[t] - U_c * a[t]                                       share = 1 / C or 1 / C**2

    Args:
        spikes: ``[T, ..., C, H, W]``, any floating dtype; ``H, W`` stand for any number of dimensions of space.
        weight: ``U [C, H, W]``.
        others: as in :func:`stbp_cuda.functional.neunorm`, which checks them.

    Returns:
        ``y``, in the shape and dtype of ``spikes``. Computed in float64 for float64 spikes, else in float32.
    """
    state = torch.float64 if spikes.dtype == torch.float64 else torch.float32
    features = weight.shape[0]
    decay = torch.as_tensor(decay, dtype=state, device=spikes.device)
    gain = (1 - decay) * (1 / (features**2 if squared else features))
    o = spikes.to(state)
    a = torch.zeros((), dtype=state, device=spikes.device)
    maps = []
    for of_all_features in o.sum(-weight.dim(), keepdim=True):
        a = decay * a + gain * of_all_features
        maps.append(a)
    return (o - weight.to(state) * torch.stack(maps)).to(spikes.dtype)
