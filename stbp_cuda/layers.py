"""Spiking neurons as modules."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from .checks import check_flag, check_sizes, plain
from .other_libraries import unexpected_keyword
from .surrogate import Surrogate, resolve_surrogate

if TYPE_CHECKING:
    from typing_extensions import Never, Unpack

__all__ = ["LIFLayer", "NeuNorm", "NeuNormLIF"]

# Other libraries call `reset()` and set `backend` on every module of a network that has an attribute of that name.
_RENAMED = {"reset": "reset_mode", "backend": "backend_mode"}
_OPTIONS = {
    option: _RENAMED.get(option, option)
    for option in inspect.signature(functional.check_options).parameters
    if option != "smooth"
}  # of check_options, and the attributes of a layer that hold them
_ATTRIBUTES = frozenset({*_OPTIONS.values(), "norm_decay", "scaling"})


class LIFLayer(nn.Module):
    """A layer of leaky integrate-and-fire neurons, run over all time steps at once; :func:`stbp_cuda.functional.lif` as
    a module, and described there.

    Stateless: every call starts from zero potential unless one is passed, so that nothing leaks from batch to batch.

    Args:
        decay: the fraction of the potential that is left after one step, in [0, 1]. Default 0.25.
        v_threshold: the potential at which a neuron fires. Default 0.75. (Both defaults are those of the CIFAR10
            networks of arXiv:1809.05793.)
        surrogate: the name of a surrogate, or an object from :mod:`stbp_cuda.surrogate`. Default "rectangular".
        reset: "hard" (to ``v_reset``) or "soft" (subtract ``v_threshold``). Default "hard".
        v_reset: the potential after a hard reset. Default 0.
        detach_reset: let no gradient through the reset. Default False.
        spatial_only: let no gradient from a step to the one before (SDBP). Default False.
        strict_threshold: fire at ``u > v_threshold`` instead of ``u >= v_threshold``. Default False.
        steps: the number of time steps T, where the input is ``[T*B, ...]``; None for input ``[T, B, ...]``.
        backend: "auto", "fused" or "reference". Default "auto".

    Each is an attribute, too, which may be set and is checked by the next call. ``reset`` and ``backend`` are
    ``reset_mode`` and ``backend_mode`` there, as other libraries take modules with attributes of those names for their
    own.

    Raises:
        TypeError, ValueError: an option is not one of those accepted.

    Example::

        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 800), stbp_cuda.LIFLayer(steps=10), nn.Linear(800, 10))
        net(torch.rand(10 * 32, 1, 28, 28))  # 10 steps, a batch of 32
    """

    def __init__(
        self,
        decay: float = 0.25,
        v_threshold: float = 0.75,
        surrogate: str | Surrogate = "rectangular",
        *,
        reset: Literal["hard", "soft"] = "hard",
        v_reset: float = 0.0,
        detach_reset: bool = False,
        spatial_only: bool = False,
        strict_threshold: bool = False,
        steps: int | None = None,
        backend: Literal["auto", "fused", "reference"] = "auto",
        **unexpected: Never,
    ) -> None:
        if unexpected:
            raise unexpected_keyword(type(self).__name__, unexpected)
        super().__init__()
        self.decay = decay
        self.v_threshold = v_threshold
        self.surrogate = resolve_surrogate(surrogate)
        self.reset_mode: Literal["hard", "soft"] = reset
        self.v_reset = v_reset
        self.detach_reset = detach_reset
        self.spatial_only = spatial_only
        self.strict_threshold = strict_threshold
        self.steps = steps
        self.backend_mode: Literal["auto", "fused", "reference"] = backend
        self._checked: functional.Checked | None = self._check()

    def _check(self) -> functional.Checked:
        return functional.check_options(**{name: getattr(self, attribute) for name, attribute in _OPTIONS.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RENAMED and isinstance(value, str) and value in (*functional.RESETS, *functional.BACKENDS):
            raise AttributeError(f"{type(self).__name__} keeps {name} in the attribute {_RENAMED[name]}; set that")
        if name not in _ATTRIBUTES:
            super().__setattr__(name, value)
        else:
            super().__setattr__(name, plain(value))
            if "_checked" in self.__dict__:  # after __init__
                try:
                    self._checked = self._check()
                except (TypeError, ValueError):  # of two that are set one by one; the next call raises, if it is more
                    self._checked = None

    def forward(
        self, x: Tensor, initial_potential: Tensor | None = None, return_potential: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: input current ``[T, B, ...]``, or ``[T*B, ...]`` with ``steps=T``.
            initial_potential: ``[B, ...]``, or None for zeros.
            return_potential: also return the final potential ``[B, ...]``.

        Returns:
            The spikes, in the shape and dtype of ``x``; with ``return_potential`` also the final potential.

        Raises:
            TypeError, ValueError, RuntimeError: see :func:`stbp_cuda.functional.lif`.
        """
        return functional.run(x, self._checked or self._check(), initial_potential, bool(return_potential))

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, v_threshold={self.v_threshold}, surrogate={self.surrogate}, "
            f"reset={self.reset_mode!r}, v_reset={self.v_reset}, detach_reset={self.detach_reset}, "
            f"spatial_only={self.spatial_only}, strict_threshold={self.strict_threshold}, steps={self.steps}, "
            f"backend={self.backend_mode!r}"
        )


def _weight(shape: Sequence[int]) -> nn.Parameter:
    """``U``, zero: a network starts as the one without normalisation."""
    sizes = check_sizes(shape)
    if not sizes:
        raise ValueError(f"shape must hold the positive sizes (C, H, W) of one sample, got {shape!r}")
    return nn.Parameter(torch.zeros(sizes))


class NeuNorm(nn.Module):
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
        self.steps = None if steps is None else functional.check_steps(steps)

    def forward(self, spikes: Tensor) -> Tensor:
        """Normalise the spikes of all time steps, ``[T, B, C, H, W]`` or ``[T*B, C, H, W]`` with ``steps=T``."""
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

    def _check(self) -> functional.Checked:
        functional.check_norm(self.norm_decay, self.scaling)
        return super()._check()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Run the layer on input current ``[T, B, C, H, W]``, or ``[T*B, C, H, W]`` with ``steps=T``.

        Returns:
            The normalised spikes, in the shape and dtype of ``x``, and in its memory order if that is channels_last.

        Raises:
            TypeError, ValueError, RuntimeError: see :func:`stbp_cuda.functional.neunorm_lif`.
        """
        decay: float | Tensor
        norm_decay: float | Tensor
        decay, norm_decay = self.decay, self.norm_decay
        if self.decay_logits is not None:
            decay, norm_decay = self.decay_logits.sigmoid().unbind()
        return functional.run_neunorm(
            x, self.weight, self._checked or self._check(), decay, norm_decay, self.scaling == "1/F^2"
        )

    def extra_repr(self) -> str:
        learned = self.decay_logits is not None
        norm = f"norm_decay={self.norm_decay}, scaling={self.scaling!r}, learn_decays={learned}"
        return f"{tuple(self.weight.shape)}, {super().extra_repr()}, {norm}"
