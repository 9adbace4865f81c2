"""Spiking neurons as modules."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import functional
from .checks import check_flag, check_number, check_sizes, plain
from .engine import AFFINE, BACKENDS, Call, check_steps, kept, run
from .neurons import LI, LIF, RESETS, Neuron
from .other_libraries import unexpected_keyword
from .surrogate import Surrogate, resolve_surrogate
from .tracing import fx_module, refuse_script

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

__all__ = ["LIFLayer", "LILayer", "NeuNorm", "NeuNormLIF", "PLIFLayer"]

# Other libraries call `reset()` and set `backend` on every module of a network that has an attribute of that name.
_RENAMED = {"reset": "reset_mode", "backend": "backend_mode"}


class ConstantsLayer(nn.Module):
    """A module whose state_dict holds the constants that it was trained with, so that loading it into one with others
    warns of them.

    They are text in a tensor of bytes, since much code takes all values of a state_dict for tensors: it moves, averages
    and compares them, or keeps them in files that hold nothing else. The text is filled up with spaces, as some of that
    code wants the sizes of a checkpoint to be those of the model.
    """

    __prepare_scriptable__ = refuse_script

    def _constants(self) -> dict[str, Any]:
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        text = json.dumps(self._constants(), default=repr)
        return torch.tensor(list(text.ljust(-(-len(text) // 256) * 256).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: object) -> None:
        """Restore nothing: the constants are those that the module was made with."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)  # of an earlier version, or of another library
        if key in state_dict:
            name = f"{prefix.removesuffix('.')} ({type(self).__name__})" if prefix else type(self).__name__
            self._compare(name, state_dict[key])

    def _compare(self, name: str, state: object) -> None:
        if isinstance(state, Tensor) and state.is_meta:
            return
        try:
            theirs = json.loads(bytes(round(code) for code in state.tolist()))  # type: ignore[attr-defined]
            ours = json.loads(json.dumps(self._constants(), default=repr))
            other = {key: theirs[key] for key in ours if key in theirs and theirs[key] != ours[key]}
        except (AttributeError, OverflowError, TypeError, ValueError):
            warnings.warn(f"{name}: the constants in the checkpoint cannot be read: {state!r}", stacklevel=2)
            return
        if other:
            trained, here = (", ".join(f"{key}={of[key]!r}" for key in other) for of in (theirs, ours))
            warnings.warn(
                f"{name}: the checkpoint was trained with {trained}; here it is {here}, which loading does not change",
                stacklevel=2,
            )


def _of_surrogate(surrogate: Surrogate) -> dict[str, Any]:
    fields = {f"surrogate.{field.name}": getattr(surrogate, field.name) for field in dataclasses.fields(surrogate)}
    return {"surrogate": type(surrogate).__name__, **fields}


# The range of a learned parameter: a function, its inverse in Python's numbers, and who has it.
_RANGES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "decay": (torch.sigmoid, lambda value: math.log(value / (1 - value))),
    "v_threshold": (nn.functional.softplus, lambda value: value + math.log(-math.expm1(-value))),
}


def _tensor(module: Any, name: str) -> Tensor:
    """``getattr(module, name)``, in less time where it is a parameter or a buffer."""
    value: Tensor | None = module._parameters.get(name)
    if value is None:
        value = module._buffers.get(name)
    return getattr(module, name) if value is None else value


def _of_start(name: str, start: float, least: float, shape: Sequence[int], device: torch.device) -> tuple[Any, ...]:
    """Where a learned parameter starts on its range's function, the function there, ``start``, and the range's ends."""
    function, inverse = _RANGES[name]
    at = torch.full(shape, inverse(start - least), dtype=torch.float64, device=device)
    ends = (0, 1) if name == "decay" else (float(np.nextafter(np.float32(least), np.float32(np.inf))), None)
    return at, function(at), torch.full_like(at, start), ends


class NeuronLayer(ConstantsLayer):
    """The base of the layers of neurons: options as attributes, checked when they are set, and parameters that may be
    tensors or learned.

    A subclass has ``kind``, the neuron, and in its constructor sets what the layer's call needs.
    """

    kind: ClassVar[type[Neuron]]

    def _set_up(
        self,
        options: dict[str, Any],
        learn: Sequence[str],
        channels: int | Sequence[int] | None,
        unexpected: Mapping[str, Any],
    ) -> None:
        if unexpected:
            raise unexpected_keyword(type(self).__name__, unexpected)
        super().__init__()
        self._names = {name: _RENAMED.get(name, name) for name in options}  # of options, and of their attributes
        for name, value in options.items():
            setattr(self, self._names[name], value)
        accepted = (*self.kind.parameters, *AFFINE)
        if not isinstance(learn, Iterable):
            raise TypeError(f"learn must hold names of {', '.join(accepted)}, got {learn!r}")
        learn = (learn,) if isinstance(learn, str) else tuple(learn)
        for name in learn:
            if name not in accepted:
                raise ValueError(f"learn must hold names of {', '.join(accepted)}, got {name!r}")
        if "subtract" in learn and options["reset"] != "soft":
            raise ValueError("subtract belongs to reset='soft'; a hard reset sets v_reset, and it cannot be learned")
        channels = plain(channels)
        sizes = () if channels is None else check_sizes((channels,) if isinstance(channels, int) else channels)
        if channels is not None and not sizes:
            raise ValueError(f"channels must be None, a positive integer or a shape of them, got {channels!r}")
        if sizes and not learn:
            raise ValueError("channels is the shape of parameters that are learned, and learn is empty")
        self._call: Call | None = self._check()
        starts = {name: self._start(name) for name in learn}
        if starts:
            self._modules["learned"] = nn.ParameterDict(
                {name: torch.full(sizes, 0.0 if name in _RANGES else start) for name, start in starts.items()}
            )
            self._learns, self._is_fixed = learn, False

    @property
    def learned(self) -> Mapping[str, nn.Parameter]:
        """What is trained, by name; :meth:`values` are the values that follow."""
        return self._modules.get("learned") or {}  # type: ignore[return-value]

    def _start(self, name: str) -> float:
        """The number from which a learned parameter starts."""
        value = getattr(self, name)
        if value is None:
            value = getattr(self._checked().neuron, name)
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be a number where it is learned, got a tensor; an nn.Parameter is, too")
        if name == "decay" and value in (0, 1):
            raise ValueError(f"decay must lie between 0 and 1 where it is learned, got {value}")
        return float(value)

    def _value(self, name: str, parameter: Tensor) -> Any:
        """A learned parameter in its range: the parameter is 0 at its start, and moves along the range's function."""
        if name not in _RANGES:
            return parameter
        function, _ = _RANGES[name]
        start, least = self._start(name), 0.0
        if name == "v_threshold":
            least = 0.0 if getattr(self, "reset_mode", "hard") == "soft" else float(self.v_reset)  # type: ignore[arg-type]
        # Exactly `start` at 0, in every dtype.
        at, before, first, ends = kept(_of_start, name, start, least, parameter.shape, device=parameter.device)
        value = first + (function(at + parameter) - before)
        return value.clamp(*ends)

    def values(self) -> dict[str, Tensor]:
        """The parameters that are tensors or learned, as the kernels get them."""
        found = {name: _tensor(self, name) for name in self._tensors}
        for name in self._learns:
            found[name] = self._value(name, _tensor(self._modules["learned"], name))
        return found

    def _options(self) -> dict[str, Any]:
        return {option: getattr(self, name) for option, name in self._names.items()}

    def _check(self) -> Call:
        options = self._options()
        where = options.pop("steps"), options.pop("time_dim"), options.pop("backend")
        fields = {name: options[name] for name in self.kind.__dataclass_fields__ if name in options}
        given = functional.split_tensors(self.kind, fields, options.get("scale", 1.0), options.get("shift", 0.0))
        self._given = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        self._tensors = tuple(
            name for name in (*self.kind.parameters, *AFFINE) if isinstance(options.get(name), Tensor)
        )
        self._is_fixed = not (self._tensors or self._learns_by_itself or self._learns)
        return functional.make_call(self.kind, *where, **fields)

    def _checked(self) -> Call:
        """The call, checked again if an option that was set did not fit."""
        return self._call or self._check()

    def _parameters_given(self) -> dict[str, Any]:
        if self._is_fixed:
            return self._given
        given = {**self._given, **self.values()}
        # A soft reset subtracts the threshold, unless it is told what.
        if "v_threshold" in given and getattr(self, "reset_mode", "hard") == "soft" and self.subtract is None:
            given.setdefault("subtract", given["v_threshold"])
        return given

    def _constants(self) -> dict[str, Any]:
        constants: dict[str, Any] = {}
        for option, value in self._options().items():
            moved = option in self.learned and option not in _RANGES  # others are learned relative to where they start
            if option in ("steps", "time_dim", "backend") or isinstance(value, Tensor) or moved:
                continue
            constants.update(_of_surrogate(value) if isinstance(value, Surrogate) else {option: value})
        return constants

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__.get("_names", {})
        accepted = (*RESETS, *BACKENDS)
        if name in _RENAMED and name in names and isinstance(value, str) and value in accepted:
            raise AttributeError(f"{type(self).__name__} keeps {name} in the attribute {_RENAMED[name]}; set that")
        if name not in names.values() and name not in self._more_options:
            super().__setattr__(name, value)
            return
        value = value if isinstance(value, nn.Parameter) else plain(value)
        if name == "surrogate":
            value = resolve_surrogate(value) if "_call" not in self.__dict__ else value
        buffered = name in (*self.kind.parameters, *AFFINE) and not isinstance(value, nn.Parameter)
        if buffered and isinstance(value, Tensor) and name not in self._buffers:
            self.__dict__.pop(name, None)
            self._parameters.pop(name, None)
            self.register_buffer(name, value)
        elif not isinstance(value, Tensor) and name in (*self._buffers, *self._parameters):
            delattr(self, name)
            super().__setattr__(name, value)
        else:
            super().__setattr__(name, value)
        if "_call" in self.__dict__:  # after __init__
            try:
                self._call = self._check()
            except (TypeError, ValueError):  # of two that are set one by one; the next call raises, if it is more
                self._call = None

    _more_options: ClassVar[tuple[str, ...]] = ()  # attributes of a subclass that are checked, too
    _learns_by_itself: ClassVar[bool] = False  # whether a subclass adds to values()
    _learns: tuple[str, ...] = ()

    def extra_repr(self) -> str:
        shown = []
        for option, value in self._options().items():
            if option in self.learned:
                continue
            text = f"tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            shown.append(f"{option}={text}")
        learned = [f"{name}={self._start(name)} {list(p.shape)}" for name, p in self.learned.items()]
        return ", ".join([*shown, *([f"learned: {', '.join(learned)}"] if learned else [])])


class LIFLayer(NeuronLayer):
    """A layer of leaky integrate-and-fire neurons, run over all time steps at once; :func:`stbp_cuda.functional.lif` as
    a module, and described there.

    Stateless: every call starts from zero potential unless one is passed, so that nothing leaks from batch to batch.

    Args:
        decay: the fraction of the potential that is left after one step, in [0, 1]. Default 0.25.
        v_threshold: the potential at which a neuron fires. Default 0.75. (Both defaults are those of the CIFAR10
            networks of arXiv:1809.05793.)
        surrogate: the name of a surrogate, or an object from :mod:`stbp_cuda.surrogate`. Default "rectangular".
        reset: "hard" (to ``v_reset``) or "soft" (subtract ``subtract``). Default "hard".
        v_reset: the potential after a hard reset. Default 0.
        subtract: what a soft reset subtracts. Default None, the threshold.
        delayed: let a soft reset come in the next step, after the decay. Default False.
        detach_reset: let no gradient through the reset. Default False.
        spatial_only: let no gradient from a step to the one before (SDBP). Default False.
        strict_threshold: fire at ``u > v_threshold`` instead of ``u >= v_threshold``. Default False.
        scale, shift: of the current, ``scale * x + shift``. Default 1 and 0.
        learn: names of parameters that are trained: "decay" (in (0, 1), by a sigmoid), "v_threshold" (above
            ``v_reset``, by a softplus), "subtract", "scale", "shift". They start exactly from the values given, and are
            in ``learned``; :meth:`values` are their values.
        channels: the shape of what is learned: None for one number for the layer; an integer C for the first dimension
            after the batch; or a shape that broadcasts to a sample, such as ``(C, H, W)``.
        steps: the number of time steps T, where the input is ``[T*B, ...]``; None for input ``[T, B, ...]``.
        time_dim: the dimension of time; 1 for input ``[B, T, ...]``. Default 0.
        backend: "auto", "fused" or "reference". Default "auto".

    ``decay``, ``v_threshold``, ``subtract``, ``scale`` and ``shift`` may also be tensors, which become buffers, or
    parameters of torch, which are trained as they are.

    Each is an attribute, too, which may be set and is checked by the next call. ``reset`` and ``backend`` are
    ``reset_mode`` and ``backend_mode`` there, as other libraries take modules with attributes of those names for their
    own. All but ``steps``, ``time_dim`` and ``backend`` are in the ``state_dict``, as ``_extra_state``: loading it into
    a layer with others warns, and changes none of them.

    Raises:
        TypeError, ValueError: an option is not one of those accepted.

    Example::

        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 800), stbp_cuda.LIFLayer(steps=10), nn.Linear(800, 10))
        net(torch.rand(10 * 32, 1, 28, 28))  # 10 steps, a batch of 32
    """

    kind = LIF

    def __init__(
        self,
        decay: float | Tensor = 0.25,
        v_threshold: float | Tensor = 0.75,
        surrogate: str | Surrogate = "rectangular",
        *,
        reset: Literal["hard", "soft"] = "hard",
        v_reset: float = 0.0,
        subtract: float | Tensor | None = None,
        delayed: bool = False,
        detach_reset: bool = False,
        spatial_only: bool = False,
        strict_threshold: bool = False,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        learn: Sequence[str] = (),
        channels: int | Sequence[int] | None = None,
        steps: int | None = None,
        time_dim: int = 0,
        backend: Literal["auto", "fused", "reference"] = "auto",
        **unexpected: Never,
    ) -> None:
        options = {
            "decay": decay,
            "v_threshold": v_threshold,
            "surrogate": surrogate,
            "reset": reset,
            "v_reset": v_reset,
            "subtract": subtract,
            "delayed": delayed,
            "detach_reset": detach_reset,
            "spatial_only": spatial_only,
            "strict_threshold": strict_threshold,
            "scale": scale,
            "shift": shift,
            "steps": steps,
            "time_dim": time_dim,
            "backend": backend,
        }
        self._set_up(options, learn, channels, unexpected)

    def forward(
        self,
        x: Tensor,
        initial_potential: Tensor | float | None = None,
        return_potential: bool = False,
        *,
        lengths: Tensor | None = None,
        constant: bool = False,
        return_potentials: Literal["before_reset", "after_reset"] | None = None,
    ) -> Any:
        """Run the layer.

        Args:
            x: input current ``[T, B, ...]``, or ``[T*B, ...]`` with ``steps=T``.
            initial_potential: ``[B, ...]``, a number, or None for zeros.
            return_potential: also return the final potential ``[B, ...]``.
            lengths: ``[B]`` the steps of each sample.
            constant: ``x`` is ``[B, ...]``, the same at each of ``steps`` steps.
            return_potentials: also return the potentials of all steps, "before_reset" or "after_reset".

        Returns:
            The spikes, in the shape and dtype of ``x``; with ``return_potential`` also the final potential, with
            ``return_potentials`` also those of all steps.

        Raises:
            TypeError, ValueError, RuntimeError: see :func:`stbp_cuda.functional.lif`.
        """
        if not isinstance(x, Tensor):
            states: dict[str, Any] = {"initial_potential": initial_potential, "return_potential": return_potential}
            states.update(lengths=lengths, constant=constant, return_potentials=return_potentials)
            node = fx_module(self, x, **states)
            return functional.lif(x, **{**self._options(), **self.values()}, **states) if node is None else node
        call = self._call or self._check()
        if lengths is None and not constant and return_potentials is None:  # fewer arguments take less time
            return run(x, call, initial_potential, bool(return_potential), self._parameters_given())
        return run(
            x,
            call,
            initial_potential,
            bool(return_potential),
            self._parameters_given(),
            lengths=lengths,
            constant=constant,
            return_potentials=return_potentials,
        )


class PLIFLayer(LIFLayer):
    """A :class:`LIFLayer` with one time constant, which is learned: the parametric LIF of arXiv:2007.05785 ::

        u[t] = v[t-1] + (x[t] - v[t-1]) * k     k = sigmoid(w)

    so that ``decay`` is ``1 - k`` and ``scale`` is ``k``.

    Args:
        init_tau: the time constant ``1 / k`` to start from, above 1. Default 2.
        v_threshold: default 1.
        surrogate: default "atan".
        options: those of :class:`LIFLayer` but decay, scale, learn and channels.

    Raises:
        TypeError, ValueError: an option is not one of those accepted.
    """

    _learns_by_itself = True

    def __init__(
        self,
        init_tau: float = 2.0,
        v_threshold: float | Tensor = 1.0,
        surrogate: str | Surrogate = "atan",
        **options: Any,
    ) -> None:
        init_tau = check_number("init_tau", init_tau)
        if init_tau <= 1:
            raise ValueError(f"init_tau must be above 1, got {init_tau}")
        for option in ("decay", "scale", "learn", "channels"):
            if option in options:
                raise TypeError(f"PLIFLayer has one learned parameter, from init_tau, and takes no {option}")
        super().__init__(1 - 1 / init_tau, v_threshold, surrogate, scale=1 / init_tau, **options)
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1)))

    def values(self) -> dict[str, Tensor]:
        k = self.w.double().sigmoid()
        return {**super().values(), "decay": torch.rsub(k, 1), "scale": k}  # 1 - k, which takes longer

    def _constants(self) -> dict[str, Any]:
        return {option: value for option, value in super()._constants().items() if option not in ("decay", "scale")}


class LILayer(NeuronLayer):
    """A read-out of leaky integrators, which do not spike; :func:`stbp_cuda.functional.li` as a module.

    Args:
        decay: the fraction of the potential that is left after one step, in [0, 1]. Default 0.25.
        output: "all" for the potentials of all steps, "last" for that of the last one. Default "all".
        scale, shift, learn, channels, steps, time_dim, backend: as in :class:`LIFLayer`; "decay", "scale" and "shift"
            may be learned.

    Raises:
        TypeError, ValueError: an option is not one of those accepted.
    """

    kind = LI

    def __init__(
        self,
        decay: float | Tensor = 0.25,
        *,
        output: Literal["all", "last"] = "all",
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        learn: Sequence[str] = (),
        channels: int | Sequence[int] | None = None,
        steps: int | None = None,
        time_dim: int = 0,
        backend: Literal["auto", "fused", "reference"] = "auto",
        **unexpected: Never,
    ) -> None:
        if output not in ("all", "last"):
            raise ValueError(f"output must be one of all, last, got {output!r}")
        options = {
            "decay": decay,
            "scale": scale,
            "shift": shift,
            "steps": steps,
            "time_dim": time_dim,
            "backend": backend,
        }
        self._set_up(options, learn, channels, unexpected)
        self.output = output

    def forward(
        self,
        x: Tensor,
        initial_potential: Tensor | float | None = None,
        return_potential: bool = False,
        *,
        lengths: Tensor | None = None,
        constant: bool = False,
    ) -> Any:
        """Run the layer; the arguments are those of :class:`LIFLayer`.

        Returns:
            The potentials of all steps in the shape and dtype of ``x``, or with ``output="last"`` that of the last one
            ``[B, ...]``; with ``return_potential`` also the final potential.

        Raises:
            TypeError, ValueError, RuntimeError: see :func:`stbp_cuda.functional.li`.
        """
        more: dict[str, Any] = {"lengths": lengths, "constant": constant}
        if not isinstance(x, Tensor):
            states = {"initial_potential": initial_potential, "return_potential": return_potential, **more}
            node = fx_module(self, x, **states)
            if node is not None:
                return node
            return functional.li(x, **{**self._options(), **self.values()}, output=self.output, **states)
        given = self._parameters_given()
        last = self.output == "last"
        return run(x, self._checked(), initial_potential, bool(return_potential), given, last=last, **more)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output={self.output!r}"


def _weight(shape: Sequence[int]) -> nn.Parameter:
    """``U``, zero: a network starts as the one without normalisation."""
    sizes = check_sizes(shape)
    if not sizes:
        raise ValueError(f"shape must hold the positive sizes (C, H, W) of one sample, got {shape!r}")
    return nn.Parameter(torch.zeros(sizes))


class NeuNorm(ConstantsLayer):
    """Neuron normalisation of spikes; :func:`stbp_cuda.functional.neunorm` as a module, and described there.

    Args:
        shape: ``(C, H, W)`` of the feature maps, which the trainable ``weight`` (``U``) gets. It starts from 0.
        decay: the leak of the auxiliary map, in [0, 1]. Default 0.8, as for the CIFAR10 networks of arXiv:1809.05793.
        scaling: "1/F" or "1/F^2". Default "1/F".
        steps: the number of time steps T, where the input is ``[T*B, C, H, W]``; None for ``[T, B, C, H, W]``.

    Raises:
        TypeError, ValueError: an argument is not one of those accepted.
    """

    def __init__(
        self,
        shape: Sequence[int],
        decay: float = 0.8,
        *,
        scaling: Literal["1/F", "1/F^2"] = "1/F",
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = _weight(shape)
        self.decay = functional.check_norm(decay, scaling, "decay")
        self.scaling: Literal["1/F", "1/F^2"] = scaling
        self.steps = None if steps is None else check_steps(steps)

    def _constants(self) -> dict[str, Any]:
        return {"norm_decay": self.decay, "scaling": self.scaling}  # named as those of NeuNormLIF

    def forward(self, spikes: Tensor) -> Tensor:
        """Normalise the spikes of all time steps, ``[T, B, C, H, W]`` or ``[T*B, C, H, W]`` with ``steps=T``."""
        if not isinstance(spikes, Tensor):
            node = fx_module(self, spikes)
            if node is not None:
                return node
        return functional.neunorm(spikes, self.weight, self.decay, scaling=self.scaling, steps=self.steps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, decay={self.decay}, scaling={self.scaling!r}, steps={self.steps}"


class NeuNormLIF(LIFLayer):
    """:class:`LIFLayer` and :class:`NeuNorm` in one fused pass; :func:`stbp_cuda.functional.neunorm_lif` as a module.

    Args:
        shape: ``(C, H, W)`` of the feature maps, which the trainable ``weight`` (``U``) gets. It starts from 0.
        decay, v_threshold, surrogate, others: as in :class:`LIFLayer`.
        norm_decay: the leak of the auxiliary map, in [0, 1]. Default 0.8.
        scaling: "1/F" or "1/F^2". Default "1/F".
        learn_decays: whether both decays are trained, as the sigmoid of a parameter ``decay_logits`` of two numbers;
            they must then lie between 0 and 1 and may not be either. Default False.

    Raises:
        TypeError, ValueError: an argument is not one of those accepted.
    """

    norm_decay: float = 0.8
    scaling: Literal["1/F", "1/F^2"] = "1/F"

    def __init__(
        self,
        shape: Sequence[int],
        decay: float = 0.25,
        v_threshold: float = 0.75,
        surrogate: str | Surrogate = "rectangular",
        *,
        norm_decay: float = 0.8,
        scaling: Literal["1/F", "1/F^2"] = "1/F",
        learn_decays: bool = False,
        **options: Unpack[functional.NeuronOptions],
    ) -> None:
        unexpected = [option for option in options if option not in functional.NeuronOptions.__annotations__]
        if unexpected:
            raise unexpected_keyword(type(self).__name__, unexpected)
        super().__init__(decay, v_threshold, surrogate, **options)
        self.weight = _weight(shape)
        self.norm_decay = functional.check_norm(norm_decay, scaling)
        self.scaling = scaling
        self.decay_logits: nn.Parameter | None = None
        if check_flag("learn_decays", learn_decays):
            for name, value in ("decay", self.decay), ("norm_decay", self.norm_decay):
                if value in (0, 1):
                    raise ValueError(f"{name} must lie between 0 and 1 where it is learned, got {value}")
            self.decay_logits = nn.Parameter(torch.logit(torch.tensor([self.decay, self.norm_decay])))

    _more_options = ("norm_decay", "scaling")

    def _check(self) -> Call:
        functional.check_norm(self.norm_decay, self.scaling)
        call = super()._check()
        for name in ("decay", "v_threshold"):
            if isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name} of NeuNormLIF must be a number, got a tensor")
        neutral = {"subtract": None, "delayed": False, "scale": 1, "shift": 0, "time_dim": 0}
        for name, value in neutral.items():
            given = getattr(self, name)
            if isinstance(given, Tensor) or given != value:
                raise ValueError(f"{name} of NeuNormLIF must be {value}, got {given!r}")
        return call

    def _constants(self) -> dict[str, Any]:
        constants = {**super()._constants(), "norm_decay": self.norm_decay, "scaling": self.scaling}
        learned = ("decay", "norm_decay") if self.decay_logits is not None else ()
        return {key: value for key, value in constants.items() if key not in learned}

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Run the layer on input current ``[T, B, C, H, W]``, or ``[T*B, C, H, W]`` with ``steps=T``.

        Returns:
            The normalised spikes, in the shape and dtype of ``x``, and in its memory order if that is channels_last.

        Raises:
            TypeError, ValueError, RuntimeError: see :func:`stbp_cuda.functional.neunorm_lif`.
        """
        if not isinstance(x, Tensor):
            node = fx_module(self, x)
            if node is not None:
                return node
        decay: Any
        norm_decay: float | Tensor
        decay, norm_decay = self.decay, self.norm_decay
        if self.decay_logits is not None:
            decay, norm_decay = self.decay_logits.sigmoid().unbind()
        if not isinstance(x, Tensor):
            options = {name: self._options()[name] for name in functional.NeuronOptions.__annotations__}
            options.update(v_threshold=self.v_threshold, surrogate=self.surrogate)
            options.update(decay=decay, norm_decay=norm_decay, scaling=self.scaling)
            return functional.neunorm_lif(x, self.weight, **options)  # where torch.fx traces this layer alone
        return functional.run_neunorm(x, self.weight, self._checked(), decay, norm_decay, self.scaling == "1/F^2")

    def extra_repr(self) -> str:
        learned = self.decay_logits is not None
        norm = f"norm_decay={self.norm_decay}, scaling={self.scaling!r}, learn_decays={learned}"
        return f"{tuple(self.weight.shape)}, {super().extra_repr()}, {norm}"
