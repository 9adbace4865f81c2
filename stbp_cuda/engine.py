"""From checked arguments to kernels or the reference: what the functions and layers of all neurons share."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import autograd, ops, reference
from .checks import check_integer, check_number, plain
from .neurons import Neuron
from .tracing import jit_trace, refuse_trace

__all__ = [
    "AFFINE",
    "BACKENDS",
    "DTYPES",
    "POTENTIALS",
    "Call",
    "check_call",
    "check_input",
    "check_steps",
    "kept",
    "run",
    "use_fused",
]

BACKENDS = ("auto", "fused", "reference")
POTENTIALS = ("before_reset", "after_reset")
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
AFFINE = {"scale": 1.0, "shift": 0.0}  # the parameters of the current
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_warned: set[str] = set()
_with_kernels: set[torch.device] = set()  # devices that were asked, beside the CPU
_kept: dict[Any, Any] = {}


@dataclass(frozen=True)
class Call:
    """A neuron that has been checked, and how it is to be run."""

    neuron: Neuron
    text: str  # the neuron as the operators take it; "" in a compiled graph, whose numbers it would fix
    steps: int | None
    time_dim: int
    backend: str
    has_kernel: bool  # for all dtypes


def check_steps(steps: object) -> int:
    """The number of time steps as a Python integer; raise if it is none."""
    return check_integer("steps", steps)


def check_call(neuron: Neuron, steps: object, time_dim: object, backend: str) -> Call:
    """Raise if an argument is not accepted; see :func:`stbp_cuda.functional.lif`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    dim = plain(time_dim)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"time_dim must be an integer, got {time_dim!r}")
    text = "" if torch.compiler.is_compiling() else neuron.text()
    has_kernel = neuron.missing_kernel(torch.float32) is None
    return Call(neuron, text, None if steps is None else check_steps(steps), dim, backend, has_kernel)


def _no_dimension(time_dim: int, rank: int) -> ValueError:
    return ValueError(f"time_dim must be a dimension of x with its time, from {-rank} to {rank - 1}, got {time_dim}")


def check_input(x: Tensor, steps: int | None, name: str = "x", time_dim: int = 0) -> int:
    """Raise if x does not fit; return the number of steps."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must be of dtype {accepted}; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor, got layout {x.layout}")
    if x.dim() == 0:
        raise ValueError(
            f"{name} must have a time dimension, [T, ...] or with steps=T [T*B, ...], got a tensor of shape ()"
        )
    if time_dim >= x.dim():
        raise _no_dimension(time_dim, x.dim())
    entries = x.shape[time_dim]
    if steps is None:
        if entries == 0:
            where = "first dimension" if time_dim == 0 else f"dimension {time_dim}"
            raise ValueError(f"{name} must have at least one time step in its {where}, got shape {tuple(x.shape)}")
        return entries
    if entries % steps:
        raise ValueError(f"steps={steps} must divide the first dimension of {name}, got shape {tuple(x.shape)}")
    return steps


def _initial_potential(v: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The initial potential as a tensor in the shape of one step."""
    state = ops.state_dtype(x.dtype)
    if not isinstance(v, Tensor):
        if not isinstance(plain(v), int | float) or isinstance(plain(v), bool):
            raise TypeError(f"initial_potential must be a tensor, a number or None, got {type(v).__name__}")
        return x.new_full(shape, check_number("initial_potential", v), dtype=state)
    if v.dtype not in (state, x.dtype):
        accepted = f"{state}, the dtype of potentials for x in {x.dtype}" + (
            "" if state == x.dtype else ", or the dtype of x"
        )
        raise TypeError(f"initial_potential must be of dtype {accepted}; got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"initial_potential must be on the device of x, {x.device}, got {v.device}")
    if tuple(v.shape) != shape:
        raise ValueError(f"initial_potential must have the shape of one step of x, {shape}, got {tuple(v.shape)}")
    return v


def _is_expanded(x: Tensor, time_dim: int) -> bool:
    """Whether the same current is behind all steps, and no gradient is wanted for each of them."""
    if x.stride(time_dim) != 0 or x.shape[time_dim] == 1 or x.numel() == 0:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and not autograd.transforms()


def _outside() -> int:
    """The ``stacklevel`` of whoever called this package, for a warning of the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith((f"{__package__}.", "torch.nn.modules.")):
        frame, level = frame.f_back, level + 1
    return level


def use_fused(x: Tensor, call: Call, problem: str | None = None) -> bool:
    """Whether the kernels run, with a warning or an error where they cannot; ``problem`` is why they cannot."""
    backend = call.backend
    if backend == "reference":
        return False
    known = x.is_cpu or (not torch.compiler.is_compiling() and x.device in _with_kernels)
    if known and call.has_kernel and problem is None:
        return True  # first, for the rest takes microseconds
    problem = problem or call.neuron.missing_kernel(x.dtype) or ops.fused_backend_problem(x.device)
    if problem is None:
        if not torch.compiler.is_compiling():
            _with_kernels.add(x.device)
        return True
    if backend == "fused":
        raise RuntimeError(f"backend='fused' cannot run: {problem}")
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f"stbp_cuda runs its slow reference implementation: {problem}; backend='reference' asks for it silently",
            stacklevel=1 if torch.compiler.is_compiling() else _outside(),
        )
    return False


def _check_lengths(lengths: Any, x: Tensor, batch: int, steps: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be of dtype torch.int64 or torch.int32, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths must have one entry for each sample, shape {(batch,)}, got {tuple(lengths.shape)}")
    if lengths.device != x.device:
        raise ValueError(f"lengths must be on the device of x, {x.device}, got {lengths.device}")
    known = lengths.is_cpu and not torch.compiler.is_compiling() and not autograd.transforms()
    if known and batch and not (lengths.min() >= 0 and lengths.max() <= steps):
        raise ValueError(f"lengths must lie in [0, {steps}], the steps of x, got {lengths.tolist()}")
    return lengths.to(torch.int64)


def _align(shape: tuple[int, ...], sample: tuple[int, ...], steps: int | None) -> tuple[int, ...] | None:
    """A parameter's shape as [1 or steps, *sample], or with 1 in place of sizes of the sample; None if it does not fit.
    One that may not differ in time has no ``steps``."""
    rank = len(sample)
    if len(shape) == 1 and rank >= 1:  # of the first dimension after the batch
        shape = (*shape, *[1] * (rank - 1))
    shape = shape or (1,) * rank
    if len(shape) == rank:
        shape = (1, *shape)
    elif steps is None:
        return None
    fits = len(shape) == rank + 1 and shape[0] in (1, steps)
    return shape if fits and all(size in (1, full) for size, full in zip(shape[1:], sample, strict=True)) else None


def _aligned_shape(name: str, value: Tensor, x: Tensor, sample: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """The shape of a parameter as [1 or T, *sample], or with 1 in place of sizes of the sample."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a tensor of a floating dtype, got {value.dtype}")
    if value.device != x.device and value.dim() > 0:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")
    in_time = name in AFFINE
    shape = _align(tuple(value.shape), sample, steps if in_time else None)
    if shape is not None:
        return shape
    first = f", [{sample[0]}] of its first dimension" if sample else ""
    also = f", or with a row for each step, ({steps}, ...)" if in_time else ""
    raise ValueError(
        f"{name} must broadcast to one step of one sample, {sample}{first}{also}; got shape {tuple(value.shape)}"
    )


def kept(make: Callable[..., Any], *args: Any, device: torch.device) -> Any:
    """What ``make(*args, device=device)`` returns, new tensors, kept for the next call. Not where they belong to what
    looks on: a compiler, a transform or a graph of CUDA."""
    if torch.compiler.is_compiling() or autograd.transforms():
        return make(*args, device=device)
    key = (make, args, device)
    found = _kept.get(key)
    if found is None:
        found = make(*args, device=device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return found
            torch.cuda.current_stream(device).synchronize()  # once: another stream may be next to use it
        if len(_kept) >= 1000:  # someone changes a number in every step
            _kept.clear()
        _kept[key] = found
    return found


def _number(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


@functools.lru_cache
def _size(count: int, shape: tuple[int, ...], x: tuple[int, ...], constant: bool) -> tuple[int, ...] | None:
    """The shape of ``count`` parameters of one shape as the kernels take them; None if it takes more than a view."""
    sample = x[1:] if constant else x[2:]
    aligned = _align(shape, sample, None)
    varying = sum(size != 1 for size in aligned or ())
    return (count, *aligned) if aligned and (varying <= 1 or aligned[1:] == sample) else None


def _names(call: Call, given: Mapping[str, Any]) -> tuple[str, ...]:
    """The parameters that the kernels take, in their order."""
    own = call.neuron.parameters
    return (*own, *AFFINE) if "scale" in given or "shift" in given else own


def _alike(
    call: Call, given: Mapping[str, Any], x: Tensor, constant: bool
) -> tuple[list[Tensor], Sequence[int] | None]:
    """The parameters as tensors of one shape, and the shape of all of them stacked, as :func:`autograd.stack` takes
    them; no shape if they differ in shape, dtype or device, which takes more time."""
    device, dtype = x.device, None
    exact = ops.state_dtype(x.dtype)
    shape: tuple[int, ...] = ()
    for value in given.values():
        if isinstance(value, Tensor):
            shape, dtype = value.shape, value.dtype
            exact = dtype if dtype is torch.float64 else exact
            break
    found = []
    for name in _names(call, given):
        row = given.get(name)
        if row is None:
            row = AFFINE[name] if name in AFFINE else getattr(call.neuron, name)
        if not isinstance(row, Tensor):
            row = kept(_number, shape, row, exact, device=device)
        elif row.dtype is not dtype or row.shape != shape or row.device != device:
            return [], None
        found.append(row)
    known = dtype is None or dtype.is_floating_point
    return found, _size(len(found), shape, x.shape, constant) if known else None


def _stacked(call: Call, given: Mapping[str, Any], x: Tensor, sample: tuple[int, ...], steps: int) -> Tensor:
    """Parameters as the kernels take them, [P, 1 or T, ...], checked; by functions that autograd and compilers see."""
    state = ops.state_dtype(x.dtype)
    found: list[Tensor] = []
    aligned: list[tuple[int, ...]] = []
    for name in _names(call, given):
        value: Any = given[name] if name in given else getattr(call.neuron, name, AFFINE.get(name))
        if not isinstance(value, Tensor):
            if torch.compiler.is_compiling():  # only as a factor of a tensor is a number not fixed
                value = torch.ones((), dtype=torch.float64, device=x.device) * value
            else:
                value = _number((), value, state, x.device)
        aligned.append(_aligned_shape(name, value, x, sample, steps))
        found.append(value.to(x.device, state))
    if all(row.shape == found[0].shape for row in found):
        stacked = torch.stack(found).reshape(len(found), *aligned[0])
    else:
        found = [row.reshape(shape) for row, shape in zip(found, aligned, strict=True)]
        stacked = torch.stack(torch.broadcast_tensors(*found))  # type: ignore[no-untyped-call]
    # The kernels take one dimension of a sample or all.
    varying = [d for d in range(2, stacked.dim()) if stacked.shape[d] != 1]
    if len(varying) > 1:
        stacked = stacked.expand(*stacked.shape[:2], *sample)
    return stacked


def _reference(
    x: Tensor, call: Call, given: Mapping[str, Any], initial: Tensor | None, lengths: Tensor | None, after_reset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference on ``x [T, B, ...]``."""
    state = ops.state_dtype(x.dtype)
    sample = tuple(x.shape[2:])
    parameters: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            shape = _aligned_shape(name, value, x, sample, x.shape[0])
            rows = value.to(x.device, state).reshape(shape)
            value = list(rows) if rows.shape[0] > 1 else rows[0]
        parameters[name] = value
    return reference.run(call.neuron, x, initial, parameters, lengths, after_reset)


def run(
    x: Tensor,
    call: Call,
    initial_potential: Any = None,
    return_potential: bool = False,
    given: Mapping[str, Any] | None = None,
    *,
    lengths: Tensor | None = None,
    constant: bool = False,
    return_potentials: str | None = None,
    last: bool = False,
) -> Any:
    """A neuron over all steps.

    Args:
        x: input current, as :func:`stbp_cuda.functional.lif` takes it.
        call: what has been checked before: to check it anew takes a tenth of a small call.
        given: parameters that are tensors, and scale and shift.
        last: return the output of the last step alone, that of a neuron which does not reset.
        others: as in :func:`stbp_cuda.functional.lif`.

    Returns:
        The output; and what was asked for, in the order final potential, potentials of all steps.
    """
    if jit_trace() is not None:
        refuse_trace(call.backend)
    if return_potentials is not None and return_potentials not in POTENTIALS:
        accepted = ", ".join(POTENTIALS)
        raise ValueError(f"return_potentials must be None or one of {accepted}, got {return_potentials!r}")
    which = 0 if return_potentials is None else POTENTIALS.index(return_potentials) + 1
    time_dim, folded = call.time_dim, call.steps is not None
    # What the kernels take as it is, first: a small layer waits for the rest.
    if not constant and lengths is None and (time_dim == 0 or (time_dim == 1 and not folded)):
        steps = check_input(x, call.steps, "x", time_dim)
        expanded = not x.stride()[time_dim] and _is_expanded(x, time_dim)
        if x.dim() > 1 and not (folded and given) and not expanded and use_fused(x, call):
            if initial_potential is not None:
                batch = (x.shape[0] // steps,) if folded else x.shape[:time_dim]
                initial_potential = _initial_potential(initial_potential, x, (*batch, *x.shape[time_dim + 1 :]))
                if not folded:
                    initial_potential = initial_potential.unsqueeze(time_dim)
            output, potential, potentials = _call_fused(
                x,
                call,
                initial_potential,
                given,
                None,
                steps,
                time_dim,
                False,
                which,
                not last,
                return_potential or last,
            )
            if potential is not None and not folded:
                potential = potential.squeeze(time_dim)
            return _results(x, output, potential, potentials, return_potential, which, last)
    return _run_shaped(x, call, initial_potential, return_potential, given or {}, lengths, constant, which, last)


def _run_shaped(
    x: Tensor,
    call: Call,
    initial: Any,
    return_potential: bool,
    given: Mapping[str, Any],
    lengths: Any,
    constant: bool,
    which: int,
    last: bool,
) -> Any:
    """:func:`run` in the general case: ``x`` is brought into a shape that the kernels or the reference take."""
    time_dim = call.time_dim
    if constant:
        if call.steps is None:
            raise ValueError("constant=True needs steps, the number of time steps")
        steps, folded = call.steps, False
        check_input(x.unsqueeze(0) if isinstance(x, Tensor) else x, None)
        rank = x.dim() + 1
    else:
        folded = call.steps is not None
        rank = x.dim() if isinstance(x, Tensor) else 1
        if folded and time_dim != 0:
            raise ValueError(f"steps is for time in the first dimension, and time_dim is {time_dim}")
    if isinstance(x, Tensor) and not -rank <= time_dim < max(rank, 1):
        raise _no_dimension(time_dim, rank)
    time_dim %= max(rank, 1)
    if not constant:
        steps = check_input(x, call.steps, time_dim=time_dim)
        if folded:
            x = torch.unflatten(x, 0, (steps, x.shape[0] // steps))
            rank += 1
    step_shape = tuple(x.shape) if constant else (*x.shape[:time_dim], *x.shape[time_dim + 1 :])
    if initial is not None:
        initial = _initial_potential(initial, x, step_shape)
    if lengths is not None:
        if len(step_shape) == 0:
            raise ValueError("lengths needs x with a batch, [T, B, ...], got one of a single dimension")
        lengths = _check_lengths(lengths, x, step_shape[0], steps)

    # The kernels want time before or behind the batch.
    moved = time_dim
    fused = use_fused(x, call)
    if time_dim > 1 or (time_dim == 1 and not fused):
        x, time_dim = (x if constant else x.movedim(time_dim, 0)), 0
    no_batch = len(step_shape) == 0  # a compiler cannot tell of a tuple
    if no_batch:
        x = x.unsqueeze(0) if constant else x.unsqueeze(1)
        initial = None if initial is None else initial.unsqueeze(0)
    elif not constant and _is_expanded(x, time_dim):
        x, constant = x.select(time_dim, 0), True

    output: Tensor | None
    potential: Tensor | None
    potentials: Tensor | None
    if fused:
        initial = None if initial is None else initial.unsqueeze(time_dim)
        output, potential, potentials = _call_fused(
            x, call, initial, given, lengths, steps, time_dim, constant, which, not last, return_potential or last
        )
        potential = None if potential is None else potential.squeeze(time_dim)
    else:
        repeated = x.expand(steps, *x.shape) if constant else x
        output, potential, potentials = _reference(repeated, call, given, initial, lengths, which == 2)

    def as_given(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if no_batch:
            tensor = tensor.squeeze(1)
        if folded:
            return tensor.flatten(0, 1)
        return tensor if moved == time_dim else tensor.movedim(0, moved)

    if no_batch and potential is not None:
        potential = potential.squeeze(0)
    return _results(x, as_given(output), potential, as_given(potentials), return_potential, which, last)


def _results(
    x: Tensor,
    output: Tensor | None,
    potential: Tensor | None,
    potentials: Tensor | None,
    return_potential: bool,
    which: int,
    last: bool,
) -> Any:
    """What was asked for, as :func:`run` returns it."""
    output = potential.to(x.dtype) if last else output  # type: ignore[union-attr]
    if not return_potential and not which:
        return output
    more = ([potential] if return_potential else []) + ([potentials] if which else [])
    return output, *more


def _call_fused(
    x: Tensor,
    call: Call,
    initial: Tensor | None,
    given: Mapping[str, Any] | None,
    lengths: Tensor | None,
    steps: int,
    time_dim: int,
    constant: bool,
    which: int,
    return_output: bool,
    return_final: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The kernels, on ``x [T, B, ...]`` or ``[B, T, ...]``, or ``[B, ...]`` of all steps; without parameters and
    lengths also ``[T*B, ...]``. The potential is that of one step, with its dimension of time. What is not asked for
    is None."""
    compiling = torch.compiler.is_compiling()
    # The eager operators have no fake kernels.
    transformed = compiling or autograd.transforms() or type(x) not in PLAIN_TENSORS or x.is_meta
    if initial is not None:
        initial = initial.to(ops.state_dtype(x.dtype))
    rows: list[Tensor] | tuple[Tensor, ...] = ()
    size = None
    if given:
        if not transformed:
            rows, size = _alike(call, given, x, constant)
        if size is None:
            rows = (_stacked(call, given, x, tuple(x.shape[1:] if constant else x.shape[2:]), steps),)
    if transformed:
        tensors = (x, initial, rows[0] if rows else None, lengths)
        if compiling:
            numbers, kind = call.neuron.split()
            found = torch.ops.stbp_cuda.neuron(
                *tensors, steps, time_dim, constant, numbers, kind, which, return_output, return_final, ops.VERSION
            )
        else:
            found = autograd.TransformableNeuron.apply(
                *tensors, steps, time_dim, constant, call.text, None, which, return_output, return_final, False
            )
        wanted = (return_output, return_final, which)
        return tuple(result if asked else None for result, asked in zip(found, wanted, strict=False))  # type: ignore[return-value]
    asked = time_dim + ops.CONSTANT * constant + ops.POTENTIALS * which
    asked += ops.OUTPUT * return_output + ops.FINAL * return_final
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (initial is not None and initial.requires_grad)
        or True in [row.requires_grad for row in rows]
    ):
        found = autograd.FusedNeuron.apply(x, initial, lengths, (steps, call.text, asked, size), *rows)
        if not return_final and not which:
            return found, None, None
        left = iter(found)
        return tuple(next(left) if asked else None for asked in (return_output, return_final, which))  # type: ignore[return-value]
    parameters = None
    if rows:
        parameters = rows[0] if size is None else autograd.stack(rows, size, ops.state_dtype(x.dtype))
    return ops.eager_neuron_forward(x, initial, parameters, lengths, steps, call.text, asked)[:3]  # type: ignore[no-any-return]
