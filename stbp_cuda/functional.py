"""Spiking neurons as functions."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from . import autograd, ops, reference
from .checks import check_flag, check_fraction, check_integer, check_number
from .other_libraries import unexpected_keyword
from .surrogate import SURROGATES, Surrogate, resolve_surrogate

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

__all__ = [
    "Checked",
    "check_norm",
    "check_options",
    "check_steps",
    "lif",
    "neunorm",
    "neunorm_lif",
    "run",
    "run_neunorm",
]

BACKENDS = ("auto", "fused", "reference")
RESETS = ("hard", "soft")
SNNTORCH = ("zero", "subtract", "none")
SCALINGS = ("1/F", "1/F^2")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_warned: set[str] = set()
_with_kernels: set[torch.device] = set()  # devices that were asked, beside the CPU


def check_steps(steps: object) -> int:
    """The number of time steps as a Python integer; raise if it is none."""
    return check_integer("steps", steps)


class Checked(NamedTuple):
    """Options of :func:`lif` that have been checked, in the forms in which they are used."""

    options: dict[str, Any]  # as the reference takes them
    neuron: str  # as the operators do
    steps: int | None
    backend: str


def check_options(
    *,
    decay: float = 0.25,
    v_threshold: float = 0.75,
    surrogate: str | Surrogate = "rectangular",
    reset: str = "hard",
    v_reset: float = 0.0,
    detach_reset: bool = False,
    spatial_only: bool = False,
    strict_threshold: bool = False,
    smooth: bool = False,
    steps: int | None = None,
    backend: str = "auto",
) -> Checked:
    """Raise if an option of :func:`lif` is not one it accepts; the options are described there."""
    if v_reset is None:
        raise TypeError("v_reset must be a number, got None; for a soft reset, which has none, write reset='soft'")
    decay = check_fraction("decay", decay, "; for a time constant tau it is 1 - 1/tau")
    v_threshold = check_number("v_threshold", v_threshold)
    v_reset = check_number("v_reset", v_reset)
    if reset not in RESETS:
        advice = "; snnTorch's 'zero' is 'hard', its 'subtract' is 'soft' but a step later" if reset in SNNTORCH else ""
        raise ValueError(f"reset must be one of {', '.join(RESETS)}, got {reset!r}{advice}")
    if reset == "soft" and v_reset != 0:
        raise ValueError(f"v_reset belongs to reset='hard'; a soft reset subtracts v_threshold, got v_reset={v_reset}")
    if v_threshold <= v_reset:
        at_rest = "v_reset" if reset == "hard" else "0, the potential of rest"
        raise ValueError(f"v_threshold must lie above {at_rest}, got v_threshold={v_threshold}, v_reset={v_reset}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if steps is not None:
        steps = check_steps(steps)
    options: dict[str, Any] = {
        "decay": decay,
        "v_threshold": v_threshold,
        "v_reset": v_reset,
        "soft_reset": reset == "soft",
        "detach_reset": check_flag("detach_reset", detach_reset),
        "spatial_only": check_flag("spatial_only", spatial_only),
        "strict_threshold": check_flag("strict_threshold", strict_threshold),
        "smooth": check_flag("smooth", smooth),
        "surrogate": resolve_surrogate(surrogate),
    }
    # Text would fix the numbers of a compiled graph.
    neuron = "" if torch.compiler.is_compiling() else ops.neuron_text(ops.switches(**options), *_numbers(options))
    return Checked(options, neuron, steps, backend)


_known = functools.lru_cache(typed=True)(check_options)
_IMMUTABLE = {bool, int, float, str, type(None), *SURROGATES.values()}


def _checked(**options: Any) -> Checked:
    """:func:`check_options`, but what was found right before is not checked again: it would take half of a call."""
    if torch.compiler.is_compiling() or not _IMMUTABLE.issuperset(map(type, options.values())):
        return check_options(**options)
    return _known(**options)


def _numbers(options: dict[str, Any]) -> tuple[float, float, float, float]:
    return options["decay"], options["v_threshold"], options["v_reset"], options["surrogate"].width


def _check_input(x: Tensor, steps: int | None, name: str = "x") -> int:
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
    entries = x.shape[0]
    if steps is None:
        if entries == 0:
            shape = tuple(x.shape)
            raise ValueError(f"{name} must have at least one time step in its first dimension, got shape {shape}")
        return entries
    if entries % steps:
        raise ValueError(f"steps={steps} must divide the first dimension of {name}, got shape {tuple(x.shape)}")
    return steps


def _unfolded(x: Tensor, steps: int, folded: bool) -> Tensor:
    return x.reshape(steps, x.shape[0] // steps, *x.shape[1:]) if folded else x


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
    known = x.is_cpu or (not torch.compiler.is_compiling() and x.device in _with_kernels)
    if known and not smooth and SURROGATES.get(surrogate.name) is type(surrogate):
        return True  # first, for the rest takes microseconds
    problem = ops.fused_backend_problem(x.device)
    if SURROGATES.get(surrogate.name) is not type(surrogate):
        problem = f"there is no fused kernel for the surrogate {type(surrogate).__name__}"
    elif smooth and x.dtype != torch.float64:
        problem = f"the smooth spike has fused kernels for torch.float64 only, and x is {x.dtype}"
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
            stacklevel=4,
        )
    return False


class NeuronOptions(TypedDict, total=False):
    """The keyword arguments that all neurons have beside decay, threshold and surrogate, for the type checker."""

    reset: Literal["hard", "soft"]
    v_reset: float
    detach_reset: bool
    spatial_only: bool
    strict_threshold: bool
    steps: int | None
    backend: Literal["auto", "fused", "reference"]


class LIFOptions(NeuronOptions, total=False):
    """The keyword arguments of :func:`lif`."""

    decay: float
    v_threshold: float
    surrogate: str | Surrogate
    smooth: bool
    initial_potential: Tensor | None


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
    spatial_only: bool = False,
    strict_threshold: bool = False,
    smooth: bool = False,
    steps: int | None = None,
    initial_potential: Tensor | None = None,
    return_potential: bool = False,
    backend: Literal["auto", "fused", "reference"] = "auto",
    **unexpected: Never,
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
        spatial_only: let no gradient from a step to the one before: the spatial-only backpropagation (SDBP) that
            arXiv:1706.02609 compares STBP with. ``initial_potential`` then gets a gradient of zero.
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
    if unexpected:
        raise unexpected_keyword("lif", unexpected)
    checked = _checked(
        decay=decay,
        v_threshold=v_threshold,
        surrogate=surrogate,
        reset=reset,
        v_reset=v_reset,
        detach_reset=detach_reset,
        spatial_only=spatial_only,
        strict_threshold=strict_threshold,
        smooth=smooth,
        steps=steps,
        backend=backend,
    )
    return run(x, checked, initial_potential, check_flag("return_potential", return_potential))


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
        spikes, potential = reference.lif(_unfolded(x, steps, folded), initial_potential, **checked.options)
        if folded:
            spikes = spikes.flatten(0, 1)
        return (spikes, potential) if return_potential else spikes

    if initial_potential is not None:
        initial_potential = initial_potential.to(ops.state_dtype(x.dtype))
        if not folded:
            initial_potential = initial_potential.unsqueeze(0)
    if torch.compiler.is_compiling():
        numbers, switches = _numbers(checked.options), ops.switches(**checked.options)
        spikes, potential = torch.ops.stbp_cuda.lif(
            x, initial_potential, steps, *numbers, switches, return_potential, ops.VERSION
        )
    elif autograd.transforms():
        spikes, potential, _ = autograd.TransformableLIF.apply(
            x, initial_potential, steps, checked.neuron, None, return_potential, False
        )
    elif torch.is_grad_enabled() and (
        x.requires_grad or (initial_potential is not None and initial_potential.requires_grad)
    ):
        result: Tensor | tuple[Tensor, Tensor]
        result = autograd.FusedLIF.apply(x, initial_potential, (steps, checked.neuron, return_potential))
        if not return_potential:
            return result
        spikes, potential = result
    else:
        spikes, potential, _ = ops.eager_lif_forward(
            x, initial_potential, steps, checked.neuron, return_potential, False
        )
    if not return_potential:
        return spikes
    return spikes, potential if folded else potential.squeeze(0)


def check_norm(norm_decay: float, scaling: str, name: str = "norm_decay") -> float:
    """The leak of the auxiliary map as a Python number; raise if an option of :func:`neunorm` or :func:`neunorm_lif` is
    not one they accept."""
    norm_decay = check_fraction(name, norm_decay)
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    return norm_decay


def _check_weight(weight: Tensor, x: Tensor, folded: bool, name: str) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be of a floating dtype, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of {name}, {x.device}, got {weight.device}")
    if weight.dim() == 0 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [C, ...] with at least one feature map, got {tuple(weight.shape)}")
    before = 1 if folded else 2
    if x.dim() != before + weight.dim() or x.shape[before:] != weight.shape:
        expected = f"[{'T*B' if folded else 'T, B'}, {', '.join(map(str, weight.shape))}], after weight"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def neunorm(
    spikes: Tensor,
    weight: Tensor,
    decay: float | Tensor = 0.8,
    *,
    scaling: Literal["1/F", "1/F^2"] = "1/F",
    steps: int | None = None,
) -> Tensor:
    """Neuron normalisation (NeuNorm) of spikes, in plain PyTorch.

    All F feature maps of a layer share an auxiliary map ``a``, a leaky mean of their spikes, and each gets its share of
    it subtracted before the next layer (arXiv:1809.05793, Eqs. 9-10)::

        a[t] = decay * a[t-1] + gain * sum_f o_f[t]
        y_c[t] = o_c[t] - U_c * a[t]

    Args:
        spikes: ``[T, B, C, H, W]``, time-major; or ``[T*B, C, H, W]`` with ``steps=T``. float64, float32, float16 or
            bfloat16. ``H, W`` stand for any number of dimensions of space.
        weight: the trainable ``U [C, H, W]``.
        decay: the leak of the auxiliary map, in [0, 1] (``k_tau2`` of the paper). A float, or a tensor of one number,
            which can then be learned and is not checked.
        scaling: ``gain`` is ``(1 - decay) / F`` with "1/F", so that ``a`` is a running mean rate, as the paper says in
            words; ``(1 - decay) / F**2`` with "1/F^2", as follows from its equation and ``k_tau2 + v F = 1``.
        steps: the number of time steps T where time and batch share the first dimension.

    Returns:
        ``y``, in the shape and dtype of ``spikes``. Computed in float64 for float64 spikes, else in float32.

    Raises:
        TypeError: an argument has a wrong type, or a tensor a dtype that is not accepted.
        ValueError: an option is out of range, or a shape or device does not fit.
    """
    number = check_norm(0.0 if isinstance(decay, Tensor) else decay, scaling, "decay")
    decay = decay if isinstance(decay, Tensor) else number
    folded = steps is not None
    if folded:
        steps = check_steps(steps)
    steps = _check_input(spikes, steps, "spikes")
    _check_weight(weight, spikes, folded, "spikes")
    result = reference.neunorm(_unfolded(spikes, steps, folded), weight, decay=decay, squared=scaling == "1/F^2")
    return result.flatten(0, 1) if folded else result


def neunorm_lif(
    x: Tensor,
    weight: Tensor,
    *,
    decay: float | Tensor = 0.25,
    v_threshold: float = 0.75,
    surrogate: str | Surrogate = "rectangular",
    norm_decay: float | Tensor = 0.8,
    scaling: Literal["1/F", "1/F^2"] = "1/F",
    smooth: bool = False,
    **options: Unpack[NeuronOptions],
) -> Tensor:
    """:func:`lif` and :func:`neunorm` of its spikes, in one fused pass forward and one backward.

    Args:
        x: input current ``[T, B, C, H, W]``, or ``[T*B, C, H, W]`` with ``steps=T``; as in :func:`lif`, but used
            as it is and kept where it is contiguous or channels_last, with the features innermost.
        weight: the trainable ``U [C, H, W]``.
        decay, norm_decay: the leaks of potential and auxiliary map, in [0, 1] (``k_tau1`` and ``k_tau2`` of
            arXiv:1809.05793). Floats, or tensors of one number each, which can then be learned and are not checked.
        v_threshold, surrogate, smooth, others: as in :func:`lif`. ``spatial_only`` cuts the gradient along the
            potentials, not that along the auxiliary map.
        scaling: as in :func:`neunorm`.

    Returns:
        ``o_c[t] - U_c * a[t]``, in the shape and dtype of ``x``.

    Raises:
        TypeError, ValueError: as :func:`lif` and :func:`neunorm`.
        RuntimeError: ``backend="fused"`` and no fused kernel can run.
    """
    unexpected = [option for option in options if option not in NeuronOptions.__annotations__]
    if unexpected:
        raise unexpected_keyword("neunorm_lif", unexpected)
    checked = _checked(
        decay=0.0 if isinstance(decay, Tensor) else decay,
        v_threshold=v_threshold,
        surrogate=surrogate,
        smooth=smooth,
        **options,
    )
    number = check_norm(0.0 if isinstance(norm_decay, Tensor) else norm_decay, scaling)
    decay = decay if isinstance(decay, Tensor) else checked.options["decay"]
    norm_decay = norm_decay if isinstance(norm_decay, Tensor) else number
    return run_neunorm(x, weight, checked, decay, norm_decay, scaling == "1/F^2")


def run_neunorm(
    x: Tensor, weight: Tensor, checked: Checked, decay: float | Tensor, norm_decay: float | Tensor, squared: bool
) -> Tensor:
    """:func:`neunorm_lif` with options that were checked before."""
    steps, folded = _check_input(x, checked.steps), checked.steps is not None
    _check_weight(weight, x, folded, "x")
    state = ops.state_dtype(x.dtype)
    result: Tensor
    if not _use_fused(x, checked):
        spikes, _ = reference.lif(_unfolded(x, steps, folded), None, **{**checked.options, "decay": decay})
        result = reference.neunorm(spikes, weight, decay=norm_decay, squared=squared)
        return result.flatten(0, 1) if folded else result
    decays = None
    if isinstance(decay, Tensor) or isinstance(norm_decay, Tensor):
        both = (torch.as_tensor(value, dtype=state, device=x.device) for value in (decay, norm_decay))
        decays = torch.stack([value.reshape(()) for value in both])
    fixed = 0.0 if isinstance(norm_decay, Tensor) else norm_decay
    weight = weight.to(state)
    if torch.compiler.is_compiling():
        numbers, switches = _numbers(checked.options), ops.switches(**checked.options)
        result = torch.ops.stbp_cuda.neunorm_lif(
            x, weight, decays, steps, *numbers, fixed, squared, switches, ops.VERSION
        )
    elif autograd.transforms():
        result = autograd.TransformableNeuNormLIF.apply(
            x, weight, decays, steps, checked.neuron, None, fixed, squared, False
        )[0]
    else:
        result = autograd.FusedNeuNormLIF.apply(x, weight, decays, (steps, checked.neuron, fixed, squared))
    return result
