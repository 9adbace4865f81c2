"""The gradients of the operators, and what the transforms of torch beside autograd make of them.

The stable ABI has no autograd. An eager call takes the shortest way: :class:`FusedLIF`, over operators without any
registration. ``torch.func`` takes only functions that come in more pieces, each of which costs time: TransformableLIF.
These are also the gradients of the public operators. A compiler sees ``torch.ops.stbp_cuda.lif``, whose numbers may
change from call to call, and traces it down to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .ops import (
    eager_lif_backward,
    eager_lif_forward,
    eager_neunorm_lif_backward,
    eager_neunorm_lif_forward,
    lif_backward,
    lif_forward,
    neunorm_lif_backward,
    neunorm_lif_forward,
    neuron_text,
)
from .reference import refuse_forward_ad

__all__ = ["FusedLIF", "FusedNeuNormLIF", "TransformableLIF", "TransformableNeuNormLIF", "transforms"]

# Inside a Function, an operator would else go through its own autograd kernel, the Function.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_torch_func_is_active = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack


def transforms() -> bool:
    """Whether a transform of torch.func, forward AD or a mode that sees each operator is active."""
    return forward_ad._current_level >= 0 or _torch_func_is_active() or _count_modes() > 0


def _saved(ctx: Any, names: str) -> tuple[Any, ...]:
    try:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(
            f"{names} of a spiking layer was changed in place between its forward and its backward pass, which needs "
            f"the value: pass a copy, x.clone(), or use `a = a + b` for `a += b`. ({error})"
        ) from error


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "the fused kernels have no second derivative (create_graph=True, or torch.func.grad of a grad): "
        "backend='reference' has one, of the surrogate"
    )


class FusedLIF(torch.autograd.Function):
    """The fused forward and backward passes as one differentiable function.

    Each argument and each result costs a microsecond on the way there and back, so that there are as few as can be.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, initial_potential: Tensor | None, call: tuple[int, str, bool]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Args: those of the operator; ``call`` is (steps, neuron, return_potential).

        Returns the spikes, and the final potential if asked for.
        """
        steps, neuron, return_potential = call
        spikes: Tensor
        spikes, final_potential, states = eager_lif_forward(x, initial_potential, steps, neuron, return_potential, True)
        ctx.save_for_backward(x, initial_potential, states)
        ctx.call = call
        if not return_potential:
            return spikes
        ctx.set_materialize_grads(False)
        return spikes, final_potential

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_final: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Returns dL/dx and dL/d(initial potential)."""
        x, initial_potential, states = _saved(ctx, "x or initial_potential")
        steps, neuron, _ = ctx.call
        wants_initial = initial_potential is not None and ctx.needs_input_grad[1]
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(x)
        if torch.is_grad_enabled() or transforms():  # create_graph=True, or many gradients by vmap
            grad_x, grad_initial = LIFGradient.apply(
                grad_spikes, grad_final, x, initial_potential, states, steps, neuron, None, wants_initial
            )
        else:
            grad_x, grad_initial = eager_lif_backward(
                grad_spikes, grad_final, x, initial_potential, states, steps, neuron, wants_initial
            )
        return grad_x, grad_initial if wants_initial else None, None


class LIFGradient(torch.autograd.Function):
    """The backward pass as a function that has no derivative, which says so."""

    jvp = staticmethod(refuse_forward_ad)
    backward = staticmethod(_refuse_second_derivative)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            return lif_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is needed."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _map_lif_backward(LIFGradient.apply, info, in_dims, *args)


def _saves_states(steps: int) -> bool:
    """Whether the backward pass gets states. In a graph for all numbers of steps it computes them anew: a number of
    states that may be 0, 1 or more would make it a graph for some."""
    return not isinstance(steps, torch.SymInt)


class TransformableLIF(torch.autograd.Function):
    """:class:`FusedLIF` with the operator's arguments and results, in the pieces that torch.func wants."""

    jvp = staticmethod(refuse_forward_ad)

    @staticmethod
    def forward(x: Tensor, initial_potential: Tensor | None, steps: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *call, _ = rest
        with _below_autograd():
            return lif_forward(x, initial_potential, steps, *call, _saves_states(steps))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, initial_potential, ctx.steps, ctx.neuron, numbers, ctx.return_potential, _ = inputs
        states = output[2]
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, initial_potential, states, numbers)

    @staticmethod
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_final: Tensor | None, grad_states: None
    ) -> tuple[Tensor | None, ...]:
        x, initial_potential, states, numbers = _saved(ctx, "x or initial_potential")
        wants_initial = initial_potential is not None and ctx.needs_input_grad[1]
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(x)
        if not ctx.return_potential:
            grad_final = None
        grad_x, grad_initial = LIFGradient.apply(
            grad_spikes, grad_final, x, initial_potential, states, ctx.steps, ctx.neuron, numbers, wants_initial
        )
        return grad_x, grad_initial if wants_initial else None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _map_lif_forward(TransformableLIF.apply, info, in_dims, *args)


class FusedNeuNormLIF(torch.autograd.Function):
    """The fused passes of LIF neurons with normalisation as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, decays: Tensor | None, call: tuple[int, str, float, bool]
    ) -> Tensor:
        """Args: those of the operator; ``call`` is (steps, neuron, norm_decay, squared)."""
        kept: tuple[Tensor, ...]
        normalised: Tensor
        normalised, *kept = eager_neunorm_lif_forward(x, weight, decays, *call)
        ctx.save_for_backward(x, weight, decays, *kept)
        ctx.call = call
        return normalised

    @staticmethod
    def backward(ctx: Any, grad_normalised: Tensor) -> tuple[Tensor | None, ...]:
        """Returns dL/dx, dL/dweight and dL/ddecays."""
        saved = _saved(ctx, "x, weight or a decay")
        wants_decays = saved[2] is not None and ctx.needs_input_grad[2]
        if torch.is_grad_enabled() or transforms():
            steps, neuron, *norm = ctx.call
            gradients = NeuNormLIFGradient.apply(grad_normalised, *saved, steps, neuron, None, *norm, wants_decays)
        else:
            gradients = eager_neunorm_lif_backward(grad_normalised, *saved, *ctx.call, wants_decays)
        return *gradients[:2], gradients[2] if wants_decays else None, None


class NeuNormLIFGradient(LIFGradient):
    """The backward pass with normalisation, as :class:`LIFGradient`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        with _below_autograd():
            return neunorm_lif_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(NeuNormLIFGradient.apply, info, in_dims, *args)


class TransformableNeuNormLIF(torch.autograd.Function):
    """:class:`FusedNeuNormLIF` with the operator's arguments and results."""

    jvp = staticmethod(refuse_forward_ad)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, decays: Tensor | None, steps: int, *rest: Any) -> tuple[Tensor, ...]:
        *call, _ = rest
        with _below_autograd():
            return neunorm_lif_forward(x, weight, decays, steps, *call, _saves_states(steps))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, decays, ctx.steps, ctx.neuron, numbers, *ctx.norm, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, decays, *output[1:], numbers)

    @staticmethod
    def backward(ctx: Any, grad_normalised: Tensor, *grads: Any) -> tuple[Tensor | None, ...]:
        *saved, numbers = _saved(ctx, "x, weight or a decay")
        wants_decays = saved[2] is not None and ctx.needs_input_grad[2]
        gradients = NeuNormLIFGradient.apply(
            grad_normalised, *saved, ctx.steps, ctx.neuron, numbers, *ctx.norm, wants_decays
        )
        return *gradients[:2], gradients[2] if wants_decays else None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(TransformableNeuNormLIF.apply, info, in_dims, *args)


def _beside_batch(info: Any, tensors: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any]:
    """Tensors, or None, with the dimension of vmap in second place, behind that of time."""
    placed: list[Any] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        if tensor is not None:
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            tensor = tensor.movedim(0, 1)
        placed.append(tensor)
    return placed


def _map_lif_forward(run: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """Neurons are independent, so that a mapped dimension is one more of the batch."""
    outputs = run(*_beside_batch(info, args[:2], in_dims[:2]), *args[2:])
    return_potential = args[5]
    return outputs, (1, 1 if return_potential else None, 1)


def _map_lif_backward(run: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    outputs = run(*_beside_batch(info, args[:5], in_dims[:5]), *args[5:])
    return_grad_initial = args[-1]
    return outputs, (1, 1 if return_grad_initial else None)


def _one_by_one(run: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """For samples with weights, or gradients of weights, of their own."""
    outputs = [
        run(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _autograd_kernel(operator: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        derived = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if forward_ad._current_level >= 0:
            derived |= any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]
        if derived and _torch_func_is_active():
            raise RuntimeError(
                f"{operator} has no gradient inside torch.func.grad and its like: call stbp_cuda.functional or a layer"
            )
        if derived:
            return function.apply(*args)
        with _below_autograd():
            return operator(*args)

    return kernel


_library: Any = torch.library.Library("stbp_cuda", "IMPL")  # type: ignore[no-untyped-call]
for _operator, _function, _rule in (
    (lif_forward, TransformableLIF, _map_lif_forward),
    (lif_backward, LIFGradient, _map_lif_backward),
    (neunorm_lif_forward, TransformableNeuNormLIF, _one_by_one),
    (neunorm_lif_backward, NeuNormLIFGradient, _one_by_one),
):
    _library.impl(_operator, _autograd_kernel(_operator, _function), "Autograd")
    torch.library.register_vmap(_operator, functools.partial(_rule, _operator), lib=_library)


def _neuron_and_numbers(switches: str, *values: Any) -> tuple[str, Tensor | None]:
    """The operators' arguments ``neuron`` and ``numbers``. In a graph that holds for all values of a number, numbers
    are a tensor: an operator's argument of type float or str would fix them."""
    if not any(isinstance(value, torch.SymFloat | torch.SymInt) for value in values):
        return neuron_text(switches, *values[:4]), None
    one = torch.ones((), dtype=torch.float64, device="cpu")  # only as a factor of a tensor is a number not fixed
    return neuron_text(switches, 1.0, 1.0, 0.0, 1.0), torch.stack([one * value for value in values])


def _traced_lif(
    x: Tensor,
    initial_potential: Tensor | None,
    steps: int,
    decay: float,
    v_threshold: float,
    v_reset: float,
    width: float,
    switches: str,
    return_potential: bool,
    version: str,
) -> tuple[Tensor, Tensor]:
    neuron, numbers = _neuron_and_numbers(switches, decay, v_threshold, v_reset, width)
    spikes, potential, _ = lif_forward(x, initial_potential, steps, neuron, numbers, return_potential, False)
    return spikes, potential


def _traced_neunorm_lif(
    x: Tensor,
    weight: Tensor,
    decays: Tensor | None,
    steps: int,
    decay: float,
    v_threshold: float,
    v_reset: float,
    width: float,
    norm_decay: float,
    squared: bool,
    switches: str,
    version: str,
) -> Tensor:
    neuron, numbers = _neuron_and_numbers(switches, decay, v_threshold, v_reset, width, norm_decay)
    fixed = 0.0 if numbers is not None else float(norm_decay)
    normalised: Tensor = neunorm_lif_forward(x, weight, decays, steps, neuron, numbers, fixed, squared, False)[0]
    return normalised


_library.impl("lif", _traced_lif, "CompositeImplicitAutograd")
_library.impl("neunorm_lif", _traced_neunorm_lif, "CompositeImplicitAutograd")
