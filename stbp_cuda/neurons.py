"""The neurons: each is data, checks and one time step.

A neuron is a frozen dataclass. Its fields are its options; those named in ``parameters`` may also be tensors in a
call. ``reference_step`` is the specification, differentiated by autograd, which the kernels of the same name in
``csrc/neurons`` must agree with. A subclass with a ``kind`` registers itself in NEURONS, where tests find it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import check_flag, check_fraction, check_number
from .surrogate import SURROGATES, Surrogate, resolve_surrogate

__all__ = ["LI", "LIF", "NEURONS", "Neuron", "refuse_forward_ad"]

RESETS = ("hard", "soft")
SNNTORCH = ("zero", "subtract", "none")

NEURONS: dict[str, type[Neuron]] = {}

# The fields of a surrogate in the text of a neuron, and what stands there for one that has no such field.
_SURROGATE_FIELDS = {"width": 1.0, "gain": 1.0, "height": 0.15, "scale": 6.0}


@dataclass(frozen=True)
class Neuron:
    """The base of all neurons."""

    kind: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # fields that may be tensors, in the order of the kernels

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        NEURONS[cls.kind] = cls

    def fields(self) -> dict[str, Any]:
        """The options in the order of the kernels, with those of the surrogate; strings and flags as words."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Surrogate):
                found["surrogate"] = value.name
                found.update({name: getattr(value, name, default) for name, default in _SURROGATE_FIELDS.items()})
            else:
                found[field.name] = str(int(value)) if isinstance(value, bool) else value
        return found

    def text(self) -> str:
        """The operators' argument ``neuron``."""
        fields = self.fields()
        return " ".join([self.kind, *(f"{k}={v if isinstance(v, str) else repr(float(v))}" for k, v in fields.items())])

    def split(self) -> tuple[list[float], str]:
        """The numbers among the options, and the text with a 1 in place of each: for graphs where they may change."""
        fields = self.fields()
        numbers = [value for value in fields.values() if not isinstance(value, str)]
        return numbers, " ".join([self.kind, *(f"{k}={v if isinstance(v, str) else 1.0}" for k, v in fields.items())])

    def missing_kernel(self, dtype: torch.dtype) -> str | None:
        """Why no fused kernel has this neuron, or None if one has."""
        return None

    def reference_step(self, p: Mapping[str, Any], v: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            p: the parameters, as tensors that broadcast to ``v`` or as numbers.
            v: the potential that the step before has left, ``[...]``.
            current: the input current ``[...]``, in the dtype of ``v``.

        Returns:
            The output, the potential before the reset, and the potential after it.
        """
        raise NotImplementedError


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
    def forward(u: Tensor, s: Tensor, v_threshold: Any, strict: bool, surrogate: Surrogate) -> Tensor:
        fired: Tensor = u > v_threshold if strict else u >= v_threshold
        return fired.to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, s, _, _, ctx.surrogate = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        (s,) = ctx.saved_tensors
        surrogate: Surrogate = ctx.surrogate
        return None, grads[0] * surrogate.derivative(s), None, None, None

    jvp = staticmethod(refuse_forward_ad)


@dataclass(frozen=True)
class LIF(Neuron):
    """Leaky integrate-and-fire, as in Eqs. 3-8 of arXiv:1706.02609; :func:`stbp_cuda.functional.lif` describes the
    options ::

        u[t] = decay * v[t-1] + i[t]
        o[t] = 1 if u[t] >= v_threshold else 0
        v[t] = u[t] * (1 - o[t]) + v_reset * o[t]     hard reset
        v[t] = u[t] - subtract * o[t]                 soft reset

    and with a delayed reset ``u[t] = v[t-1] + i[t]``, ``v[t] = decay * u[t] - subtract * o[t]``.
    """

    kind: ClassVar[str] = "lif"
    parameters: ClassVar[tuple[str, ...]] = ("decay", "v_threshold", "subtract")

    decay: float = 0.25
    v_threshold: float = 0.75
    subtract: float | None = None
    v_reset: float = 0.0
    reset: str = "hard"
    delayed: bool = False
    detach_reset: bool = False
    spatial_only: bool = False
    strict_threshold: bool = False
    smooth: bool = False
    surrogate: str | Surrogate = "rectangular"

    def __post_init__(self) -> None:
        if self.v_reset is None:
            raise TypeError("v_reset must be a number, got None; for a soft reset, which has none, write reset='soft'")
        decay = check_fraction("decay", self.decay, "; for a time constant tau it is 1 - 1/tau")
        v_threshold = check_number("v_threshold", self.v_threshold)
        v_reset = check_number("v_reset", self.v_reset)
        if self.reset not in RESETS:
            advice = ""
            if self.reset in SNNTORCH:
                advice = "; snnTorch's 'zero' is 'hard', its 'subtract' is 'soft' with delayed=True"
            raise ValueError(f"reset must be one of {', '.join(RESETS)}, got {self.reset!r}{advice}")
        soft = self.reset == "soft"
        if soft and v_reset != 0:
            raise ValueError(f"v_reset belongs to reset='hard'; a soft reset subtracts, got v_reset={v_reset}")
        if v_threshold <= v_reset:
            at_rest = "0, the potential of rest" if soft else "v_reset"
            raise ValueError(f"v_threshold must lie above {at_rest}, got v_threshold={v_threshold}, v_reset={v_reset}")
        subtract = v_threshold if self.subtract is None else check_number("subtract", self.subtract)
        if self.subtract is not None and not soft:
            raise ValueError(f"subtract belongs to reset='soft'; a hard reset sets v_reset, got subtract={subtract}")
        flags = ("delayed", "detach_reset", "spatial_only", "strict_threshold", "smooth")
        checked: dict[str, Any] = {name: check_flag(name, getattr(self, name)) for name in flags}
        if checked["delayed"] and not soft:
            raise ValueError("delayed belongs to reset='soft', got reset='hard'")
        if checked["delayed"] and checked["spatial_only"]:
            raise ValueError("spatial_only leaves nothing of a delayed reset, which is in the next step: choose one")
        checked.update(decay=decay, v_threshold=v_threshold, subtract=subtract, v_reset=v_reset)
        checked["surrogate"] = resolve_surrogate(self.surrogate)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def missing_kernel(self, dtype: torch.dtype) -> str | None:
        kind = type(self.surrogate)
        if SURROGATES.get(kind.name) is not kind:  # type: ignore[union-attr]
            return f"there is no fused kernel for the surrogate {kind.__name__}"
        if self.smooth and dtype != torch.float64:
            return f"the smooth spike has fused kernels for torch.float64 only, and x is {dtype}"
        return None

    def reference_step(self, p: Mapping[str, Any], v: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        surrogate: Surrogate = self.surrogate  # type: ignore[assignment]
        before = v.detach() if self.spatial_only else v
        u = (before if self.delayed else p["decay"] * before) + current
        s = u - p["v_threshold"]
        if self.smooth:
            o = surrogate.antiderivative(s)
        else:
            o = _Spike.apply(u.detach(), s, p["v_threshold"], self.strict_threshold, surrogate)
        reset_by = o.detach() if self.detach_reset else o
        if self.reset == "hard":
            return o, u, u * (1 - reset_by) + self.v_reset * reset_by
        return o, u, (p["decay"] * u if self.delayed else u) - p["subtract"] * reset_by


@dataclass(frozen=True)
class LI(Neuron):
    """A leaky integrator, which does not spike: ``v[t] = decay * v[t-1] + i[t]``, its output."""

    kind: ClassVar[str] = "li"
    parameters: ClassVar[tuple[str, ...]] = ("decay",)

    decay: float = 0.25

    def __post_init__(self) -> None:
        decay = check_fraction("decay", self.decay, "; for a time constant tau it is 1 - 1/tau")
        object.__setattr__(self, "decay", decay)

    def reference_step(self, p: Mapping[str, Any], v: Tensor, current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = p["decay"] * v + current
        return v, v, v
