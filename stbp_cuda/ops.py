"""The compiled operators, and the shapes of their outputs for ``torch.compile`` and ``torch.export``.

``torch.ops.stbp_cuda.lif_forward``, ``lif_backward`` and their like with normalisation are defined in ``csrc/torch/schema.cpp``,
with one implementation per device. Their gradients are in ``autograd.py``.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .surrogate import Surrogate

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
    "neuron_text",
    "state_dtype",
    "switches",
]

lif_forward = torch.ops.stbp_cuda.lif_forward.default
lif_backward = torch.ops.stbp_cuda.lif_backward.default
neunorm_lif_forward = torch.ops.stbp_cuda.neunorm_lif_forward.default
neunorm_lif_backward = torch.ops.stbp_cuda.neunorm_lif_backward.default
# The same, without what costs time: csrc/torch/schema.cpp.
eager_lif_forward = torch.ops.stbp_cuda._lif_forward.default
eager_lif_backward = torch.ops.stbp_cuda._lif_backward.default
eager_neunorm_lif_forward = torch.ops.stbp_cuda._neunorm_lif_forward.default
eager_neunorm_lif_backward = torch.ops.stbp_cuda._neunorm_lif_backward.default


def switches(
    *,
    soft_reset: bool,
    detach_reset: bool,
    spatial_only: bool,
    strict_threshold: bool,
    smooth: bool,
    surrogate: Surrogate,
    **numbers: float,
) -> str:
    """The options of a neuron that are no numbers, as :func:`neuron_text` has them."""
    return (
        f"reset={'soft' if soft_reset else 'hard'} detach_reset={detach_reset:d} spatial_only={spatial_only:d} "
        f"strict_threshold={strict_threshold:d} smooth={smooth:d} surrogate={surrogate.name}"
    )


def neuron_text(switches: str, decay: float, v_threshold: float, v_reset: float, width: float) -> str:
    """The operators' argument ``neuron``: all options in one string; ten arguments would each slow every call."""
    return (
        f"lif decay={float(decay)!r} v_threshold={float(v_threshold)!r} v_reset={float(v_reset)!r} "
        f"width={float(width)!r} {switches}"
    )


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


def _is_dense_and_time_major(x: Tensor, steps: int) -> bool:
    order = sorted((d for d in range(x.dim()) if x.size(d) != 1), key=x.stride)
    expected = 1
    for d in order:
        if x.stride(d) != expected:
            return False
        expected = expected * x.size(d)
    return steps == 1 or not order or order[-1] == 0


def _empty(x: Tensor, steps: int, count: int | None, dtype: torch.dtype) -> Tensor:
    """An empty tensor in the memory order of ``x``; for each ``steps`` entries of ``x``, ``count`` (None: as many)."""
    dense = x if x.numel() == 0 or _is_dense_and_time_major(x, steps) else x.contiguous()
    size = [x.size(0) if count is None else x.size(0) // steps * count, *x.shape[1:]]
    return x.new_empty_strided(size, dense.stride(), dtype=dtype)


def _fake_lif_forward(
    x: Tensor,
    initial_potential: Tensor | None,
    steps: int,
    neuron: str,
    numbers: Tensor | None,
    return_potential: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    state = state_dtype(x.dtype)
    return (
        _empty(x, steps, None, x.dtype),
        _empty(x, steps, 1, state) if return_potential else x.new_empty(0, dtype=state),
        _empty(x, steps, (steps - 1) // chunk(x.device.type) if save_states else 0, state),
    )


def _fake_lif_backward(
    grad_spikes: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    initial_potential: Tensor | None,
    states: Tensor,
    steps: int,
    neuron: str,
    numbers: Tensor | None,
    return_grad_initial: bool,
) -> tuple[Tensor, Tensor]:
    state = state_dtype(x.dtype)
    return (
        _empty(x, steps, None, x.dtype),
        _empty(x, steps, 1, state) if return_grad_initial else x.new_empty(0, dtype=state),
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


def _without_numbers(fake: Callable[..., Any], place: int, *more: Any) -> Callable[..., Any]:
    return lambda *args: fake(*args[:place], None, *args[place:], *more)


_FAKES: dict[str, Callable[..., Any]] = {
    "lif_forward": _fake_lif_forward,
    "lif_backward": _fake_lif_backward,
    "neunorm_lif_forward": _fake_neunorm_lif_forward,
    "neunorm_lif_backward": _fake_neunorm_lif_backward,
    "_lif_forward": _without_numbers(_fake_lif_forward, 4),
    "_lif_backward": _without_numbers(_fake_lif_backward, 7),
    "_neunorm_lif_forward": _without_numbers(_fake_neunorm_lif_forward, 5, True),
    "_neunorm_lif_backward": _without_numbers(_fake_neunorm_lif_backward, 9),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"stbp_cuda::{_name}", _fake)
