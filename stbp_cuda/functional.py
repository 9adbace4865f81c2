"""Spiking neurons as functions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from . import ops, reference
from .surrogate import SURROGATES, Surrogate, resolve_surrogate

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Checked", "check_options", "lif", "run"]

BACKENDS = ("auto", "fused", "reference")
RESETS = ("hard", "soft")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT32_MAX = torch.finfo(torch.float32).max

_warned: set[str] = set()


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise ValueError(f"{name} must be finite in float32, got {value}")


class Checked(NamedTuple):
    """Options of :func:`lif` that have been checked, in the forms in which they are used."""

    options: dict[str, Any]  # as the reference takes them
    neuron: str  # as the operators do
    steps: int | None
    backend: str


def check_options(
    *,
    decay: float,
    v_threshold: float,
    surrogate: str | Surrogate,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    strict_threshold: bool,
    smooth: bool = False,
    steps: int | None,
    backend: str,
) -> Checked:
    """Raise if an option of :func:`lif` is not one it accepts; the options are described there."""
    _check_number("decay", decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}")
    _check_number("v_threshold", v_threshold)
    _check_number("v_reset", v_reset)
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(RESETS)}, got {reset!r}")
    if reset == "soft" and v_reset != 0:
        raise ValueError(f"v_reset belongs to reset='hard'; a soft reset subtracts v_threshold, got v_reset={v_reset}")
    if v_threshold <= v_reset:
        at_rest = "v_reset" if reset == "hard" else "0, the potential of rest"
        raise ValueError(f"v_threshold must lie above {at_rest}, got v_threshold={v_threshold}, v_reset={v_reset}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    options: dict[str, Any] = {
        "decay": decay,
        "v_threshold": v_threshold,
        "v_reset": v_reset,
        "soft_reset": reset == "soft",
        "detach_reset": bool(detach_reset),
        "strict_threshold": bool(strict_threshold),
        "smooth": bool(smooth),
        "surrogate": resolve_surrogate(surrogate),
    }
    return Checked(options, ops.neuron_text(**options), steps, backend)


def _check_input(x: Tensor, steps: int | None) -> int:
    """Raise if x does not fit; return the number of steps."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        accepted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"x must be of dtype {accepted}; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a strided tensor, got layout {x.layout}")
    if x.dim() == 0:
        raise ValueError("x must have a time dimension, [T, ...] or with steps=T [T*B, ...], got a tensor of shape ()")
    entries = x.shape[0]
    if steps is None:
        if entries == 0:
            raise ValueError(f"x must have at least one time step in its first dimension, got shape {tuple(x.shape)}")
        return entries
    if entries % steps:
        raise ValueError(f"steps={steps} must divide the first dimension of x, got shape {tuple(x.shape)}")
    return steps


def _check_initial_potential(v: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(v, Tensor):
        raise TypeError(f"initial_potential must be a tensor or None, got {type(v).__name__}")
    state = ops.state_dtype(x.dtype)
    if v.dtype not in (state, x.dtype):
        accepted = f"{state}, the dtype of potentials for x in {x.dtype}" + (
            "" if state == x.dtype else ", or the dtype of x"
        )
        raise TypeError(f"initial_potential must be of dtype {accepted}; got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"initial_potential must be on the device of x, {x.device}, got {v.device}")
    if tuple(v.shape) != shape:
        raise ValueError(f"initial_potential must have the shape of one step of x, {shape}, got {tuple(v.shape)}")


def _use_fused(x: Tensor, checked: Checked) -> bool:
    """Whether the kernels run, with a warning or an error where they cannot."""
    backend = checked.backend
    if backend == "reference":
        return False
    surrogate, smooth = checked.options["surrogate"], checked.options["smooth"]
    if x.is_cpu and not smooth and SURROGATES.get(surrogate.name) is type(surrogate):
        return True  # first, for the rest takes microseconds
    problem = ops.fused_backend_problem(x.device)
    if SURROGATES.get(surrogate.name) is not type(surrogate):
        problem = f"there is no fused kernel for the surrogate {type(surrogate).__name__}"
    elif smooth and x.dtype != torch.float64:
        problem = f"the smooth spike has fused kernels for torch.float64 only, and x is {x.dtype}"
    if problem is None:
        return True
    if backend == "fused":
        raise RuntimeError(f"backend='fused' cannot run: {problem}")
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(
            f"stbp_cuda runs its slow reference implementation: {problem}; backend='reference' asks for it silently",
            stacklevel=4,
        )
    return False


class LIFOptions(TypedDict, total=False):
    """The keyword arguments of :func:`lif`, for the type checker."""

    decay: float
    v_threshold: float
    surrogate: str | Surrogate
    reset: Literal["hard", "soft"]
    v_reset: float
    detach_reset: bool
    strict_threshold: bool
    smooth: bool
    steps: int | None
    initial_potential: Tensor | None
    backend: Literal["auto", "fused", "reference"]


@overload
def lif(x: Tensor, *, return_potential: Literal[False] = ..., **options: Unpack[LIFOptions]) -> Tensor: ...


@overload
def lif(x: Tensor, *, return_potential: Literal[True], **options: Unpack[LIFOptions]) -> tuple[Tensor, Tensor]: ...


def lif(
    x: Tensor,
    *,
    decay: float = 0.25,
    v_threshold: float = 0.75,
    surrogate: str | Surrogate = "rectangular",
    reset: Literal["hard", "soft"] = "hard",
    v_reset: float = 0.0,
    detach_reset: bool = False,
    strict_threshold: bool = False,
    smooth: bool = False,
    steps: int | None = None,
    initial_potential: Tensor | None = None,
    return_potential: bool = False,
    backend: Literal["auto", "fused", "reference"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire neurons over all time steps, with the gradient of STBP.

    Forward (arXiv:1706.02609, Eqs. 3-8)::

        u[t] = decay * v[t-1] + x[t]                      charge
        o[t] = 1 if u[t] >= v_threshold else 0            fire
        v[t] = u[t] * (1 - o[t]) + v_reset * o[t]         hard reset
        v[t] = u[t] - v_threshold * o[t]                  soft reset

    Backward: exact backpropagation through time over these equations, with the surrogate in place of ``do/du``.

    Args:
        x: input current ``[T, B, ...]``, time-major; or ``[T*B, ...]`` with ``steps=T``. float64, float32, float16 or
            bfloat16, on any device. Any dense memory order with time outermost (contiguous, channels_last) is used as
            it is and kept; anything else is made contiguous first.
        decay: the fraction of the potential that is left after one step, in [0, 1]. (``tau`` of the paper.)
        v_threshold: the potential at which a neuron fires, in the units of ``x``; above ``v_reset``.
        surrogate: its name, with width 1, or an object from :mod:`stbp_cuda.surrogate` with a width of its own.
        reset: "hard" sets the potential of a neuron that fired to ``v_reset``, "soft" subtracts ``v_threshold``.
        v_reset: the potential after a hard reset.
        detach_reset: let no gradient through the reset (``v``'s dependence on ``o``).
        strict_threshold: fire at ``u > v_threshold`` (the authors' code, NIR) instead of ``u >= v_threshold``.
        smooth: fire with the surrogate's antiderivative, a number between 0 and 1, which makes the whole layer
            differentiable: for ``torch.autograd.gradcheck``. The fused kernels have it for float64 only.
        steps: the number of time steps T where time and batch share the first dimension; None where the first dimension
            is T.
        initial_potential: ``v[0]`` in the shape of one step of ``x``, ``[B, ...]``, and in float32 (float64 for
            float64 ``x``) or the dtype of ``x``; None for zeros. Differentiable.
        return_potential: also return the final potential ``v[T]``, to be passed on as ``initial_potential``.
            Differentiable.
        backend: "fused" runs the compiled kernels or raises; "reference" runs the loop in
            :mod:`stbp_cuda.reference`; "auto" runs the kernels where they can run, else the reference with one warning.

    Returns:
        The spikes, in the shape and dtype of ``x``; with ``return_potential`` also ``v[T]``, in the shape of one step
        and in float32 (float64 for float64 ``x``).

    Raises:
        TypeError: an argument has a wrong type, or a tensor a dtype that is not accepted.
        ValueError: an option is out of range, or a shape or device does not fit.
        RuntimeError: ``backend="fused"`` and no fused kernel can run.
    """
    checked = check_options(
        decay=decay,
        v_threshold=v_threshold,
        surrogate=surrogate,
        reset=reset,
        v_reset=v_reset,
        detach_reset=detach_reset,
        strict_threshold=strict_threshold,
        smooth=smooth,
        steps=steps,
        backend=backend,
    )
    return run(x, checked, initial_potential, return_potential)


def run(
    x: Tensor, checked: Checked, initial_potential: Tensor | None, return_potential: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`lif` with options that were checked before: to check them anew takes a tenth of a small call."""
    steps = checked.steps
    folded = steps is not None
    steps = _check_input(x, steps)
    if initial_potential is not None:
        shape = (x.shape[0] // steps, *x.shape[1:]) if folded else tuple(x.shape[1:])
        _check_initial_potential(initial_potential, x, shape)

    spikes: Tensor
    potential: Tensor
    if not _use_fused(x, checked):
        spikes, potential = reference.lif(
            x.reshape(steps, x.shape[0] // steps, *x.shape[1:]) if folded else x, initial_potential, **checked.options
        )
        if folded:
            spikes = spikes.flatten(0, 1)
        return (spikes, potential) if return_potential else spikes

    if initial_potential is not None:
        initial_potential = initial_potential.to(ops.state_dtype(x.dtype))
        if not folded:
            initial_potential = initial_potential.unsqueeze(0)
    if torch.is_grad_enabled() and (
        x.requires_grad or (initial_potential is not None and initial_potential.requires_grad)
    ):
        result: Tensor | tuple[Tensor, Tensor]
        result = ops.FusedLIF.apply(x, initial_potential, (checked.steps, checked.neuron, return_potential))
        if not return_potential:
            return result
        spikes, potential = result
    else:
        spikes, potential, _ = ops.lif_forward(x, initial_potential, steps, checked.neuron, return_potential, False)
        if not return_potential:
            return spikes
    return spikes, potential if folded else potential.squeeze(0)
