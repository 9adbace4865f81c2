"""The specification: neurons as plain loops over time, differentiated by autograd.

Everything else in this package must agree with it. It is meant to be read, and to run where no fused kernel can. No
tensor is divided by a Python number here, in neurons.py or in surrogate.py: on CUDA torch multiplies by the reciprocal
instead, which rounds differently from a division on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .neurons import Neuron

__all__ = ["neunorm", "run"]


def run(
    neuron: Neuron,
    x: Tensor,
    initial_potential: Tensor | None,
    parameters: Mapping[str, Any],
    lengths: Tensor | None = None,
    after_reset: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A neuron over all steps of ``x``.

    Args:
        neuron: its options, and numbers for the parameters that are not given.
        x: input current ``[T, B, ...]``, any floating dtype.
        initial_potential: ``v[0]`` of shape ``[B, ...]``, or None for zeros.
        parameters: those of the neuron, and ``scale`` and ``shift`` of its current, ``scale * x[t] + shift``; numbers,
            or tensors that broadcast to ``x[t]``. Of scale and shift a list of such tensors, one for each step.
        lengths: ``[B]`` the steps of each sample: after them its output and potentials are 0, and its state stays.
        after_reset: which potentials to return.

    Returns:
        The output, of ``x``'s shape and dtype, the final potential ``v[T]`` of shape ``[B, ...]``, and the potentials
        of all steps. Potentials are float64 for float64 input, else float32.
    """
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    own = {name: parameters.get(name, getattr(neuron, name)) for name in neuron.parameters}
    affine = "scale" in parameters or "shift" in parameters
    scale, shift = parameters.get("scale", 1.0), parameters.get("shift", 0.0)
    v = torch.zeros_like(x[0], dtype=state) if initial_potential is None else initial_potential.to(state)
    outputs, potentials = [], []
    for t, current in enumerate(x.to(state)):
        if lengths is not None:
            ended = (lengths <= t).view(-1, *[1] * (v.dim() - 1))
            current = current.masked_fill(ended, 0)  # padding may be anything, NaN too
        if affine:
            current = (scale[t] if isinstance(scale, list) else scale) * current + (
                shift[t] if isinstance(shift, list) else shift
            )
        o, u, after = neuron.reference_step(own, v, current)
        potential = after if after_reset else u
        if lengths is not None:
            o, potential = o.masked_fill(ended, 0), potential.masked_fill(ended, 0)
            after = torch.where(ended, v, after)
        v = after
        outputs.append(o.to(x.dtype))
        potentials.append(potential)
    return torch.stack(outputs), v, torch.stack(potentials)


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
