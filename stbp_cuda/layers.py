"""Spiking neurons as modules."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import Tensor, nn

from . import functional
from .surrogate import Surrogate, resolve_surrogate

__all__ = ["LIFLayer"]

_OPTIONS = frozenset(inspect.signature(functional.check_options).parameters) - {"smooth"}


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
        strict_threshold: fire at ``u > v_threshold`` instead of ``u >= v_threshold``. Default False.
        steps: the number of time steps T, where the input is ``[T*B, ...]``; None for input ``[T, B, ...]``.
        backend: "auto", "fused" or "reference". Default "auto".

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
        strict_threshold: bool = False,
        steps: int | None = None,
        backend: Literal["auto", "fused", "reference"] = "auto",
    ) -> None:
        super().__init__()
        self.decay = decay
        self.v_threshold = v_threshold
        self.surrogate = resolve_surrogate(surrogate)
        self.reset: Literal["hard", "soft"] = reset
        self.v_reset = v_reset
        self.detach_reset = detach_reset
        self.strict_threshold = strict_threshold
        self.steps = steps
        self.backend: Literal["auto", "fused", "reference"] = backend
        self._checked: functional.Checked | None = self._check()

    def _check(self) -> functional.Checked:
        return functional.check_options(**{name: getattr(self, name) for name in _OPTIONS})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _OPTIONS:
            self._checked = None  # the next call checks what has changed

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
        if self._checked is None:
            self._checked = self._check()
        return functional.run(x, self._checked, initial_potential, return_potential)

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, v_threshold={self.v_threshold}, surrogate={self.surrogate}, reset={self.reset!r}, "
            f"v_reset={self.v_reset}, detach_reset={self.detach_reset}, strict_threshold={self.strict_threshold}, "
            f"steps={self.steps}, backend={self.backend!r}"
        )
