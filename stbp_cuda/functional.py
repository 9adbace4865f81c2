"""Spiking neurons as functions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from . import autograd, ops, reference
from .checks import check_flag, check_fraction, check_number, plain
from .engine import AFFINE, Call, check_call, check_input, check_steps, run, use_fused
from .neurons import LI, LIF, Neuron
from .other_libraries import unexpected_keyword
from .surrogate import SURROGATES, MultiGaussian, Surrogate
from .tracing import fx_function, jit_trace, refuse_trace

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

__all__ = ["li", "lif", "neunorm", "neunorm_lif"]

SCALINGS = ("1/F", "1/F^2")

Backend = Literal["auto", "fused", "reference"]
Potentials = Literal["before_reset", "after_reset"]


def _make_call(kind: type[Neuron], names: tuple[str, ...], steps: Any, time_dim: Any, backend: str, *of: Any) -> Call:
    return check_call(kind(**dict(zip(names, of, strict=True))), steps, time_dim, backend)


_known = functools.lru_cache(typed=True)(_make_call)
_IMMUTABLE = {bool, int, float, str, type(None), *SURROGATES.values()}


def make_call(kind: type[Neuron], *where: Any, **fields: Any) -> Call:
    """A neuron with its options checked; what was found right before is not checked again, as it would take half of a
    call."""
    options = (*where, *fields.values())
    if torch.compiler.is_compiling() or not _IMMUTABLE.issuperset(map(type, options)):
        return _make_call(kind, tuple(fields), *options)
    return _known(kind, tuple(fields), *options)  # type: ignore[arg-type]


def _plain_or_tensor(value: Any) -> Any:
    """A tensor stays one in a compiled graph, which cannot hold for another number of it; so does a parameter, be it
    frozen or not."""
    kept = isinstance(value, Tensor) and (
        value.dim() or torch.compiler.is_compiling() or isinstance(value, nn.Parameter)
    )
    return value if kept else plain(value)


def split_tensors(kind: type[Neuron], fields: dict[str, Any], scale: Any, shift: Any) -> dict[str, Any]:
    """Take parameters that are tensors, which the kernels get as arrays, out of ``fields``; with scale and shift, if
    they are not 1 and 0. What is left of a parameter is its default, with which the others are checked."""
    given: dict[str, Any] = {}
    for name in kind.parameters:
        if type(fields[name]) is float:
            continue
        value = _plain_or_tensor(fields[name])
        if isinstance(value, Tensor):
            given[name] = value
            del fields[name]
    for (name, neutral), value in zip(AFFINE.items(), (scale, shift), strict=True):
        if type(value) is float and value == neutral:
            continue
        value = _plain_or_tensor(value)
        if isinstance(value, Tensor) or check_number(name, value) != neutral:
            given[name] = value
    if kind is LIF and given:
        _ties(fields, given)
    return given


def _ties(fields: dict[str, Any], given: dict[str, Any]) -> None:
    """A soft reset subtracts the threshold, unless it is told what."""
    soft = fields["reset"] == "soft"
    if "subtract" in given and not soft:
        raise ValueError("subtract belongs to reset='soft'; a hard reset sets v_reset, got a tensor")
    if "v_threshold" in given:
        # The number is not used; above any v_reset, it passes the checks of the others.
        v_reset = 0.0 if fields["v_reset"] is None else check_number("v_reset", fields["v_reset"])
        fields["v_threshold"] = max(0.75, 2 * abs(v_reset))
        if soft and "subtract" not in given and fields["subtract"] is None:
            given["subtract"] = given["v_threshold"]


class NeuronOptions(TypedDict, total=False):
    """The keyword arguments of LIF neurons beside decay, threshold and surrogate, for the type checker."""

    reset: Literal["hard", "soft"]
    v_reset: float
    detach_reset: bool
    spatial_only: bool
    strict_threshold: bool
    steps: int | None
    backend: Backend


def lif(
    x: Tensor,
    *,
    decay: float | Tensor = 0.25,
    v_threshold: float | Tensor = 0.75,
    surrogate: str | Surrogate = "rectangular",
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    reset: Literal["hard", "soft"] = "hard",
    v_reset: float = 0.0,
    subtract: float | Tensor | None = None,
    delayed: bool = False,
    detach_reset: bool = False,
    spatial_only: bool = False,
    strict_threshold: bool = False,
    smooth: bool = False,
    steps: int | None = None,
    time_dim: int = 0,
    constant: bool = False,
    lengths: Tensor | None = None,
    initial_potential: Tensor | float | None = None,
    return_potential: bool = False,
    return_potentials: Potentials | None = None,
    backend: Backend = "auto",
    **unexpected: Never,
) -> Any:
    """Leaky integrate-and-fire neurons over all time steps, with the gradient of STBP.

    Forward (arXiv:1706.02609, Eqs. 3-8)::

        i[t] = scale * x[t] + shift                       current
        u[t] = decay * v[t-1] + i[t]                      charge
        o[t] = 1 if u[t] >= v_threshold else 0            fire
        v[t] = u[t] * (1 - o[t]) + v_reset * o[t]         hard reset
        v[t] = u[t] - subtract * o[t]                     soft reset

    Backward: exact backpropagation through time over these equations, with the surrogate in place of ``do/du``.

    Args:
        x: input current ``[T, B, ...]``, time-major; or ``[T*B, ...]`` with ``steps=T``. float64, float32, float16 or
            bfloat16, on any device. Any dense memory order with time outermost (contiguous, channels_last) is used as
            it is and kept; anything else is made contiguous first. One that is expanded along time is read once.
        decay: the fraction of the potential that is left after one step, in [0, 1]. (``tau`` of the paper.)
        v_threshold: the potential at which a neuron fires, in the units of ``x``; above ``v_reset``.
        surrogate: its name, with width 1, or an object from :mod:`stbp_cuda.surrogate` with a width of its own.
        scale, shift: of the current, in one pass with the neuron: a bias, a folded batch norm, 1 / tau.
        reset: "hard" sets the potential of a neuron that fired to ``v_reset``, "soft" subtracts ``subtract``.
        v_reset: the potential after a hard reset.
        subtract: what a soft reset subtracts; by default ``v_threshold``.
        delayed: let a soft reset come in the next step, after the decay, as snnTorch has it:
            ``u[t] = decay * u[t-1] + i[t] - subtract * o[t-1]``. The potential that goes from step to step, that of
            ``initial_potential`` and ``return_potential``, is then ``decay * u[t] - subtract * o[t]``.
        detach_reset: let no gradient through the reset (``v``'s dependence on ``o``).
        spatial_only: let no gradient from a step to the one before: the spatial-only backpropagation (SDBP) that
            arXiv:1706.02609 compares STBP with. ``initial_potential`` then gets a gradient of zero.
        strict_threshold: fire at ``u > v_threshold`` (the authors' code, NIR) instead of ``u >= v_threshold``.
        smooth: fire with the surrogate's antiderivative, a number between 0 and its gain, which makes the whole layer
            differentiable: for ``torch.autograd.gradcheck``. The fused kernels have it for float64 only.
        steps: the number of time steps T where time and batch share the first dimension; None where the first dimension
            is T.
        time_dim: the dimension of time, with ``x [B, T, ...]`` 1. Time in dimension 0 or 1 is read as it is; in any
            other ``x`` is copied.
        constant: ``x`` is ``[B, ...]``, the same current at each of ``steps`` steps; it is read once. The spikes are
            ``[T, B, ...]``.
        lengths: ``[B]`` integers from 0 to T: past its end a sample has no spikes and potentials of 0 in
            ``return_potentials``, its state stays as it was, and nothing gets a gradient.
        initial_potential: ``v[0]`` in the shape of one step of ``x``, ``[B, ...]``, and in float32 (float64 for
            float64 ``x``) or the dtype of ``x``; or a number; None for zeros. Differentiable.
        return_potential: also return the final potential ``v[T]``, to be passed on as ``initial_potential``.
            Differentiable.
        return_potentials: also return the potentials of all steps: "before_reset" ``u``, "after_reset" ``v``.
            Differentiable.
        backend: "fused" runs the compiled kernels or raises; "reference" runs the loop in
            :mod:`stbp_cuda.reference`; "auto" runs the kernels where they can run, else the reference with one warning.

    ``decay``, ``v_threshold``, ``subtract``, ``scale`` and ``shift`` may be tensors, which get gradients and are not
    checked. They broadcast to one step of one sample: ``[]``, ``[C]`` for the first dimension after the batch,
    ``[C, 1, 1]``, ``[C, H, W]``; scale and shift also with a row for each step, ``[T, C, 1, 1]``.

    Returns:
        The spikes, in the shape and dtype of ``x``; with ``return_potential`` also ``v[T]``, in the shape of one step,
        and with ``return_potentials`` the potentials of all steps, both in float32 (float64 for float64 ``x``).

    Raises:
        TypeError: an argument has a wrong type, or a tensor a dtype that is not accepted.
        ValueError: an option is out of range, or a shape or device does not fit.
        RuntimeError: ``backend="fused"`` and no fused kernel can run.
    """
    if not isinstance(x, Tensor):
        node = fx_function(lif, **{name: value for name, value in locals().items() if name != "unexpected"})
        if node is not None:
            return node
    if unexpected:
        raise unexpected_keyword("lif", unexpected)
    fields: dict[str, Any] = {
        "decay": decay,
        "v_threshold": v_threshold,
        "subtract": subtract,
        "v_reset": v_reset,
        "reset": reset,
        "delayed": delayed,
        "detach_reset": detach_reset,
        "spatial_only": spatial_only,
        "strict_threshold": strict_threshold,
        "smooth": smooth,
        "surrogate": surrogate,
    }
    given = split_tensors(LIF, fields, scale, shift)
    return run(
        x,
        make_call(LIF, steps, time_dim, backend, **fields),
        initial_potential,
        check_flag("return_potential", return_potential),
        given,
        lengths=lengths,
        constant=check_flag("constant", constant),
        return_potentials=return_potentials,
    )


def li(
    x: Tensor,
    *,
    decay: float | Tensor = 0.25,
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
    output: Literal["all", "last"] = "all",
    steps: int | None = None,
    time_dim: int = 0,
    constant: bool = False,
    lengths: Tensor | None = None,
    initial_potential: Tensor | float | None = None,
    return_potential: bool = False,
    backend: Backend = "auto",
    **unexpected: Never,
) -> Any:
    """Leaky integrators, which do not spike: a read-out ::

        v[t] = decay * v[t-1] + scale * x[t] + shift

    Args:
        x: input current, as in :func:`lif`.
        decay: the fraction of the potential that is left after one step, in [0, 1], or a tensor.
        output: "all" returns the potentials of all steps, "last" that of the last one alone, ``[B, ...]``.
        lengths: as in :func:`lif`: the last potential is that at the end of a sample, the others past it are 0.
        others: as in :func:`lif`.

    Returns:
        The potentials ``v`` in the dtype of ``x``; with ``return_potential`` also ``v[T]`` in float32 (float64 for
        float64 ``x``).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lif`.
    """
    if not isinstance(x, Tensor):
        node = fx_function(li, **{name: value for name, value in locals().items() if name != "unexpected"})
        if node is not None:
            return node
    if unexpected:
        raise unexpected_keyword("li", unexpected)
    if output not in ("all", "last"):
        raise ValueError(f"output must be one of all, last, got {output!r}")
    fields: dict[str, Any] = {"decay": decay}
    given = split_tensors(LI, fields, scale, shift)
    return run(
        x,
        make_call(LI, steps, time_dim, backend, **fields),
        initial_potential,
        check_flag("return_potential", return_potential),
        given,
        lengths=lengths,
        constant=check_flag("constant", constant),
        last=output == "last",
    )


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
    if not isinstance(spikes, Tensor):
        node = fx_function(neunorm, **locals())
        if node is not None:
            return node
    if jit_trace() is not None:
        refuse_trace("reference")
    number = check_norm(0.0 if isinstance(decay, Tensor) else decay, scaling, "decay")
    decay = decay if isinstance(decay, Tensor) else number
    folded = steps is not None
    if folded:
        steps = check_steps(steps)
    steps = check_input(spikes, steps, "spikes")
    _check_weight(weight, spikes, folded, "spikes")
    unfolded = torch.unflatten(spikes, 0, (steps, spikes.shape[0] // steps)) if folded else spikes
    result = reference.neunorm(unfolded, weight, decay=decay, squared=scaling == "1/F^2")
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
    if not isinstance(x, Tensor):
        given = {name: value for name, value in locals().items() if name != "options"}
        node = fx_function(neunorm_lif, **given, **options)
        if node is not None:
            return node
    unexpected = [option for option in options if option not in NeuronOptions.__annotations__]
    if unexpected:
        raise unexpected_keyword("neunorm_lif", unexpected)
    steps, backend = options.pop("steps", None), options.pop("backend", "auto")
    number: Any = 0.0 if isinstance(decay, Tensor) else decay
    fields = {"decay": number, "v_threshold": v_threshold, "surrogate": surrogate, "smooth": smooth, **options}
    call = make_call(LIF, steps, 0, backend, **fields)
    number = check_norm(0.0 if isinstance(norm_decay, Tensor) else norm_decay, scaling)
    decay = decay if isinstance(decay, Tensor) else call.neuron.decay  # type: ignore[attr-defined]
    norm_decay = norm_decay if isinstance(norm_decay, Tensor) else number
    return run_neunorm(x, weight, call, decay, norm_decay, scaling == "1/F^2")


def run_neunorm(
    x: Tensor, weight: Tensor, call: Call, decay: float | Tensor, norm_decay: float | Tensor, squared: bool
) -> Tensor:
    """:func:`neunorm_lif` with options that were checked before."""
    if jit_trace() is not None:
        refuse_trace(call.backend)
    steps, folded = check_input(x, call.steps), call.steps is not None
    _check_weight(weight, x, folded, "x")
    state = ops.state_dtype(x.dtype)
    result: Tensor
    problem = None
    if isinstance(call.neuron.surrogate, MultiGaussian):  # type: ignore[attr-defined]
        problem = "there is no fused kernel with normalisation for the surrogate MultiGaussian"
    if not use_fused(x, call, problem):
        unfolded = torch.unflatten(x, 0, (steps, x.shape[0] // steps)) if folded else x
        spikes, *_ = reference.run(call.neuron, unfolded, None, {"decay": decay})
        result = reference.neunorm(spikes, weight, decay=norm_decay, squared=squared)
        return result.flatten(0, 1) if folded else result
    decays = None
    if isinstance(decay, Tensor) or isinstance(norm_decay, Tensor):
        both = (torch.as_tensor(value, dtype=state, device=x.device) for value in (decay, norm_decay))
        decays = torch.stack([value.reshape(()) for value in both])
    fixed = 0.0 if isinstance(norm_decay, Tensor) else norm_decay
    weight = weight.to(state)
    if torch.compiler.is_compiling():
        numbers, kind = call.neuron.split()
        result = torch.ops.stbp_cuda.neunorm_lif(x, weight, decays, steps, numbers, fixed, squared, kind, ops.VERSION)
    elif autograd.transforms():
        result = autograd.TransformableNeuNormLIF.apply(
            x, weight, decays, steps, call.text, None, fixed, squared, False
        )[0]
    else:
        result = autograd.FusedNeuNormLIF.apply(x, weight, decays, (steps, call.text, fixed, squared))
    return result
