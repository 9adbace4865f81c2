"""The compiled operators, and the shapes of their outputs for ``torch.compile`` and ``torch.export``.

``torch.ops.stbp_cuda.neuron_forward``, ``neuron_backward`` and their like with normalisation are defined in
``csrc/torch/schema.cpp``, with one implementation per device. Their gradients are in ``autograd.py``.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"the extension of stbp_cuda cannot be loaded ({error}). In the source folder, python finds the sources before "
        "the installed package: run from elsewhere, or install with `pip install -e .`"
    ) from error

__all__ = [
    "VERSION",
    "build_info",
    "chunk",
    "fused_backend_problem",
    "state_dtype",
]

neuron_forward = torch.ops.stbp_cuda.neuron_forward.default
neuron_backward = torch.ops.stbp_cuda.neuron_backward.default
neunorm_lif_forward = torch.ops.stbp_cuda.neunorm_lif_forward.default
neunorm_lif_backward = torch.ops.stbp_cuda.neunorm_lif_backward.default
# The same, without what costs time: csrc/torch/schema.cpp.
eager_neuron_forward = torch.ops.stbp_cuda._neuron_forward.default
eager_neuron_backward = torch.ops.stbp_cuda._neuron_backward.default
# What the eager operators of neurons are asked for, the bits of one number; Asked in csrc/torch/neuron_op.h.
TIME_SECOND, CONSTANT, POTENTIALS, OUTPUT, FINAL, STATES, GRAD_INITIAL, GRAD_PARAMETERS = 1, 2, 4, 16, 32, 64, 128, 256


VERSION = importlib.metadata.version("stbp_cuda")
_INFO: dict[str, Any] = _C.build_info()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of potentials for input of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk(device_type: str, neuron: str = "") -> int:
    """K of "one state is kept for backward every K steps" on a device; for ``neuron="neunorm_"`` that with NeuNorm."""
    value = _INFO[f"{'cuda' if device_type == 'cuda' else 'cpu'}_{neuron}chunk"]
    return int(value)


def fused_backend_problem(device: torch.device) -> str | None:
    """Why no fused kernel can run on a device, or None if one can."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"there are no fused kernels for device type {device.type!r}, only for cpu and cuda"
    built = _INFO["cuda_architectures"]
    if not built:
        return "this build of stbp_cuda has no CUDA kernels (no nvcc worked when it was installed)"
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(name, capability) for name in built.split()):
        return None
    return (
        f"this build of stbp_cuda has CUDA kernels for {built}, "
        f"and the device is of compute capability {capability[0]}.{capability[1]}"
    )


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture such as "8.0", "9.0a" or "12.1+PTX" runs on a device."""
    major, minor = name.removesuffix("+PTX").split(".")
    if minor.endswith("a"):
        return capability == (int(major), int(minor[:-1]))
    built = (int(major), int(minor.removesuffix("f")))
    return built <= capability and (name.endswith("+PTX") or built[0] == capability[0])


def build_info() -> dict[str, Any]:
    """How the extension was built, and what it uses on this machine.

    Returns:
        Versions (``stbp_cuda``, ``python``, ``torch``, ``torch_headers``, ``cxx_compiler``, ``cuda_compiler``: None
        without CUDA kernels); ``cuda_architectures``, as a string such as "7.5 9.0+PTX"; ``cpu_instruction_set``, the
        one chosen on this machine; ``cpu_chunk`` and ``cuda_chunk``, the K of "one state is kept every K steps", and
        ``cpu_neunorm_chunk`` and ``cuda_neunorm_chunk``, those with normalisation; and ``backends``: for each device
        here, what a tensor on it would use.
    """
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    problems = {str(device): fused_backend_problem(device) for device in devices}
    return {
        "stbp_cuda": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_INFO,
        "backends": {device: f"reference ({why})" if why else "fused" for device, why in problems.items()},
    }


class _InputShape:
    """The shape and memory order that the input shares with the other tensors of a call; as in csrc/torch/checks.h."""

    def __init__(self, x: Tensor, steps: int, time_dim: int, constant: bool, samples_apart: bool) -> None:
        self.like, self.steps, self.time_dim, self.constant = x, steps, time_dim, constant
        self.sizes, self.strides = list(x.shape), list(x.stride())
        if constant:
            self.sizes.insert(time_dim, steps)
            self.strides.insert(time_dim, 0)
        self.neurons = math.prod(self.sizes) // steps
        if not self._is_dense() or (samples_apart and not self._samples_are_apart()):
            self.strides = [math.prod(max(size, 1) for size in self.sizes[d + 1 :]) for d in range(len(self.sizes))]

    def _is_dense(self) -> bool:
        if self.neurons == 0:
            return True
        times = [self.time_dim] if self.constant else []
        dims = (d for d in range(len(self.sizes)) if d not in times and self.sizes[d] != 1)
        order = sorted(dims, key=self.strides.__getitem__)
        expected = 1
        for d in order:
            if self.strides[d] != expected:
                return False
            expected = expected * self.sizes[d]
        if self.time_dim == 0 and self.steps == 1:
            return True
        for outermost in range(self.time_dim + 1):
            if self.sizes[outermost] == 1 or outermost in times:
                continue
            if not order or order.pop() != outermost:
                return False
        return True

    def _samples_are_apart(self) -> bool:
        batch = 1 - self.time_dim
        return all(
            self.sizes[d] == 1 or self.sizes[batch] == 1 or self.strides[d] <= self.strides[batch]
            for d in range(2, len(self.sizes))
        )

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """An empty tensor that has ``count`` entries where the input has ``steps``."""
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[self.time_dim] = self.sizes[self.time_dim] // self.steps * count
        if self.time_dim == 1:
            strides[1] = self.neurons // self.sizes[0] if self.sizes[0] > 0 else 1
            strides[0] = strides[1] * count
        elif self.constant:
            strides[0] = self.neurons
        return self.like.new_empty_strided(sizes, strides, dtype=dtype)

    def empty_input(self) -> Tensor:
        """An empty tensor like the input."""
        if not self.constant:
            return self.empty(self.steps, self.like.dtype)
        return self.empty(1, self.like.dtype).squeeze(self.time_dim)


def _fake_neuron_forward(
    x: Tensor,
    initial: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    steps: int,
    time_dim: int,
    constant: bool,
    neuron: str,
    numbers: Tensor | None,
    potentials: int,
    return_output: bool,
    return_final: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = state_dtype(x.dtype)
    shape = _InputShape(x, steps, time_dim, constant, parameters is not None or lengths is not None)
    saved = (steps - 1) // chunk(x.device.type)
    return (
        shape.empty(steps, x.dtype) if return_output else x.new_empty(0),
        shape.empty(1, state) if return_final else x.new_empty(0, dtype=state),
        shape.empty(steps, state) if potentials else x.new_empty(0, dtype=state),
        shape.empty(saved, state) if save_states else x.new_empty(0, dtype=state),
    )


def _fake_neuron_backward(
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    grad_potentials: Tensor | None,
    x: Tensor,
    initial: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    states: Tensor | None,
    steps: int,
    time_dim: int,
    constant: bool,
    neuron: str,
    numbers: Tensor | None,
    potentials: int,
    return_grad_initial: bool,
    return_grad_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = state_dtype(x.dtype)
    shape = _InputShape(x, steps, time_dim, constant, parameters is not None or lengths is not None)
    return (
        shape.empty_input(),
        shape.empty(1, state) if return_grad_initial else x.new_empty(0, dtype=state),
        x.new_empty(parameters.shape if return_grad_parameters and parameters is not None else 0, dtype=state),
    )


def _features_innermost(x: Tensor, last: int) -> bool:
    """Whether the kernels take ``x``, whose ``last`` last dimensions are features and space, as channels_last."""
    return not x.is_contiguous() and x.movedim(-last, -1).is_contiguous()


def _empty_in_order(like: Tensor, size: tuple[int, ...], last: int, innermost: bool, dtype: torch.dtype) -> Tensor:
    if not innermost:
        return like.new_empty(size, dtype=dtype)
    features = len(size) - last
    moved = (*size[:features], *size[features + 1 :], size[features])
    return like.new_empty(moved, dtype=dtype).movedim(-1, features)


def _fake_neunorm_lif_forward(
    x: Tensor,
    weight: Tensor,
    decays: Tensor | None,
    steps: int,
    neuron: str,
    numbers: Tensor | None,
    norm_decay: float,
    squared: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = state_dtype(x.dtype)
    positions = math.prod(weight.shape[1:])
    batch = math.prod(x.shape[: x.dim() - weight.dim()]) // steps
    saved = (steps - 1) // chunk(x.device.type, "neunorm_")
    innermost = _features_innermost(x, weight.dim())
    states = (saved, batch, weight.shape[0], positions)
    return (
        _empty_in_order(x, x.shape, weight.dim(), innermost, x.dtype),
        x.new_empty((steps, batch, positions), dtype=state),
        x.new_empty((steps, batch, positions), dtype=state),
        _empty_in_order(x, states, 2, innermost, state) if save_states else x.new_empty(0, dtype=state),
    )


def _fake_neunorm_lif_backward(
    grad_normalised: Tensor,
    x: Tensor,
    weight: Tensor,
    decays: Tensor | None,
    sums: Tensor,
    maps: Tensor,
    states: Tensor,
    steps: int,
    neuron: str,
    numbers: Tensor | None,
    norm_decay: float,
    squared: bool,
    return_grad_decays: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    last = weight.dim()
    return (
        _empty_in_order(x, x.shape, last, _features_innermost(x, last), x.dtype),
        weight.new_empty(weight.shape),
        weight.new_empty(2 if return_grad_decays else 0),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "neuron_forward": _fake_neuron_forward,
    "neuron_backward": _fake_neuron_backward,
    "neunorm_lif_forward": _fake_neunorm_lif_forward,
    "neunorm_lif_backward": _fake_neunorm_lif_backward,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"stbp_cuda::{_name}", _fake)
