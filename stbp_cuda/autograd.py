"""The gradients of the operators, and what the transforms of torch beside autograd make of them.

The stable ABI has no autograd. An eager call takes the shortest way: :class:`FusedNeuron`, over operators without any
registration. ``torch.func`` takes only functions that come in more pieces, each of which costs time:
TransformableNeuron, which is also the gradient of the public operators. A compiler sees
``torch.ops.stbp_cuda.neuron``, whose numbers may change from call to call, and traces it down to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .neurons import refuse_forward_ad
from .ops import (
    CONSTANT,
    FINAL,
    GRAD_INITIAL,
    GRAD_PARAMETERS,
    OUTPUT,
    POTENTIALS,
    STATES,
    TIME_SECOND,
    eager_neuron_backward,
    eager_neuron_forward,
    neunorm_lif_backward,
    neunorm_lif_forward,
    neuron_backward,
    neuron_forward,
    state_dtype,
)

__all__ = ["FusedNeuNormLIF", "FusedNeuron", "TransformableNeuNormLIF", "TransformableNeuron", "transforms"]

# Inside a Function, an operator would else go through its own autograd kernel, the Function.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_torch_func_is_active = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd.grad(is_grads_batched=True)

OTHERS = FINAL | 3 * POTENTIALS  # what a neuron is asked for beside its output


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


def stack(rows: list[Tensor] | tuple[Tensor, ...], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Parameters that are alike as the kernels take them, ``[P, 1 or T, ...]``."""
    stacked = torch.stack(rows)
    if stacked.dtype is not dtype:  # to() takes longer
        stacked = stacked.float() if dtype is torch.float32 else stacked.double()
    return stacked.view(size)


class FusedNeuron(torch.autograd.Function):
    """The fused forward and backward passes of a neuron as one differentiable function.

    Each argument, each result and each other function around this one costs a microsecond on the way there and back:
    there are as few as can be, and parameters are stacked within.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        initial: Tensor | None,
        lengths: Tensor | None,
        call: tuple[int, str, int, Sequence[int] | None],
        *rows: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:
        """Args: those of the operator; ``call`` is (steps, neuron, asked, size); ``rows`` are the parameters, one by
        one where there is a ``size`` of all of them, else as one tensor.

        Returns what is asked for, in the order of the operator.
        """
        steps, neuron, asked, size = call
        parameters = None
        if rows:
            parameters = rows[0] if size is None else stack(rows, size, state_dtype(x.dtype))
        *outputs, states = eager_neuron_forward(x, initial, parameters, lengths, steps, neuron, asked | STATES)
        ctx.save_for_backward(x, initial, parameters, lengths, states)
        ctx.call = call
        if size is not None:
            ctx.shape = rows[0].shape
        if asked & OTHERS == 0:
            return outputs[0]  # type: ignore[no-any-return]
        ctx.set_materialize_grads(False)
        return tuple(output for output in outputs if output is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns dL/dx, dL/d(initial state), and those of the rows."""
        saved = _saved(ctx, "x, a parameter or initial_potential")
        steps, neuron, asked, size = ctx.call
        _, wants_initial, _, _, *wanted = ctx.needs_input_grad
        wants_parameters = True in wanted
        batched = True in [grad is not None and _is_batched(grad) for grad in grads]
        if asked & OTHERS:
            left = iter(grads)
            grads = tuple(next(left) if asked & bits else None for bits in (OUTPUT, FINAL, 3 * POTENTIALS))
        else:
            grads = (*grads, None, None)
        if batched or torch.is_grad_enabled() or transforms():  # or create_graph=True
            call = (steps, asked & TIME_SECOND, bool(asked & CONSTANT), neuron, None, asked // POTENTIALS & 3)
            found = NeuronGradient.apply(*grads, *saved, *call, wants_initial, wants_parameters)
        else:
            asked += GRAD_INITIAL * wants_initial + GRAD_PARAMETERS * wants_parameters
            found = eager_neuron_backward(*grads, *saved, steps, neuron, asked)
        grad_x, grad_initial, grad = found
        of_rows: Sequence[Tensor | None] = ()
        if wants_parameters and size is not None:
            of_rows = grad.view(len(wanted), *ctx.shape).unbind()
        elif wanted:
            of_rows = (grad if wants_parameters else None,) * len(wanted)
        return grad_x, grad_initial if wants_initial else None, None, None, *of_rows


class NeuronGradient(torch.autograd.Function):
    """The backward pass as a function that has no derivative, which says so."""

    jvp = staticmethod(refuse_forward_ad)
    backward = staticmethod(_refuse_second_derivative)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _below_autograd():
            return neuron_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is needed."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _map_neuron_backward(NeuronGradient.apply, info, in_dims, *args)


def _saves_states(steps: int) -> bool:
    """Whether the backward pass gets states. In a graph for all numbers of steps it computes them anew: a number of
    states that may be 0, 1 or more would make it a graph for some."""
    return not isinstance(steps, torch.SymInt)


class TransformableNeuron(torch.autograd.Function):
    """The operator's arguments and results, in the pieces that torch.func wants."""

    jvp = staticmethod(refuse_forward_ad)

    @staticmethod
    def forward(
        x: Tensor,
        initial: Tensor | None,
        parameters: Tensor | None,
        lengths: Tensor | None,
        steps: int,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *call, _ = rest
        with _below_autograd():
            return neuron_forward(x, initial, parameters, lengths, steps, *call, _saves_states(steps))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, initial, parameters, lengths, *ctx.call, numbers, ctx.potentials, return_output, return_final, _ = inputs
        ctx.returns = (return_output, return_final, ctx.potentials != 0)
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, initial, parameters, lengths, output[3], numbers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, numbers = _saved(ctx, "x, a parameter or initial_potential")
        asked = (grad if returned else None for grad, returned in zip(grads, ctx.returns, strict=False))
        wants_initial = saved[1] is not None and ctx.needs_input_grad[1]
        wants_parameters = saved[2] is not None and ctx.needs_input_grad[2]
        grad_x, grad_initial, grad_parameters = NeuronGradient.apply(
            *asked, *saved, *ctx.call, numbers, ctx.potentials, wants_initial, wants_parameters
        )
        return (
            grad_x,
            grad_initial if wants_initial else None,
            grad_parameters if wants_parameters else None,
            *[None] * 10,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _map_neuron_forward(TransformableNeuron.apply, info, in_dims, *args)


class FusedNeuNormLIF(torch.autograd.Function):
    """The fused passes of LIF neurons with normalisation as one differentiable function."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, decays: Tensor | None, call: tuple[int, str, float, bool]
    ) -> Tensor:
        """Args: those of the operator; ``call`` is (steps, neuron, norm_decay, squared)."""
        kept: tuple[Tensor, ...]
        normalised: Tensor
        steps, neuron, *norm = call
        with _below_autograd():
            normalised, *kept = neunorm_lif_forward(x, weight, decays, steps, neuron, None, *norm, True)
        ctx.save_for_backward(x, weight, decays, *kept)
        ctx.call = call
        return normalised

    @staticmethod
    def backward(ctx: Any, grad_normalised: Tensor) -> tuple[Tensor | None, ...]:
        """Returns dL/dx, dL/dweight and dL/ddecays."""
        saved = _saved(ctx, "x, weight or a decay")
        wants_decays = saved[2] is not None and ctx.needs_input_grad[2]
        steps, neuron, *norm = ctx.call
        call = (steps, neuron, None, *norm, wants_decays)
        if torch.is_grad_enabled() or transforms():
            gradients = NeuNormLIFGradient.apply(grad_normalised, *saved, *call)
        else:
            gradients = NeuNormLIFGradient.forward(grad_normalised, *saved, *call)
        return *gradients[:2], gradients[2] if wants_decays else None, None


class NeuNormLIFGradient(NeuronGradient):
    """The backward pass with normalisation, as :class:`NeuronGradient`."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
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


class _InBatch:
    """The dimension of vmap as a part of the batch, as neurons are independent of one another."""

    def __init__(self, info: Any, time_dim: int, constant: bool, apart: bool) -> None:
        self.size, self.batch, self.constant = info.batch_size, 1 - time_dim, constant
        # Else it is a dimension of its own, as time and batch may be one.
        self.merged = apart or time_dim == 1

    def put(self, tensor: Tensor | None, dim: int | None, batch: int) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(self.size, *tensor.shape)
        tensor = tensor.movedim(0, batch)
        return tensor.flatten(batch, batch + 1) if self.merged else tensor

    def take(self, tensor: Tensor, batch: int) -> tuple[Tensor, int | None]:
        """A result, and where the dimension is; nowhere in one that was not asked for."""
        if tensor.dim() == 1 and tensor.numel() == 0:
            return tensor, None
        if self.merged:
            tensor = torch.unflatten(tensor, batch, (self.size, tensor.size(batch) // self.size))
        return tensor, batch


def _map_neuron_forward(run: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    x, initial, parameters, lengths, steps, time_dim, constant, *rest = args
    if in_dims[2] is not None:
        return _one_by_one(run, info, in_dims, *args)
    place = _InBatch(info, time_dim, constant, parameters is not None or lengths is not None)
    outputs = run(
        place.put(x, in_dims[0], 0 if constant else place.batch),
        place.put(initial, in_dims[1], place.batch),
        parameters,
        place.put(lengths, in_dims[3], 0),
        steps,
        time_dim,
        constant,
        *rest,
    )
    return tuple(zip(*(place.take(output, place.batch) for output in outputs), strict=True))


def _map_neuron_backward(run: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    *grads, x, initial, parameters, lengths, states, _steps, time_dim, constant = args[:11]
    if in_dims[5] is not None or args[-1]:
        return _one_by_one(run, info, in_dims, *args)
    place = _InBatch(info, time_dim, constant, parameters is not None or lengths is not None)
    batch = place.batch
    grad_x, grad_initial, none = run(
        *(place.put(grad, dim, batch) for grad, dim in zip(grads, in_dims, strict=False)),
        place.put(x, in_dims[3], 0 if constant else batch),
        place.put(initial, in_dims[4], batch),
        parameters,
        place.put(lengths, in_dims[6], 0),
        place.put(states, in_dims[7], batch),
        *args[8:],
    )
    found = (place.take(grad_x, 0 if constant else batch), place.take(grad_initial, batch), (none, None))
    return tuple(zip(*found, strict=True))


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
    (neuron_forward, TransformableNeuron, _map_neuron_forward),
    (neuron_backward, NeuronGradient, _map_neuron_backward),
    (neunorm_lif_forward, TransformableNeuNormLIF, _one_by_one),
    (neunorm_lif_backward, NeuNormLIFGradient, _one_by_one),
):
    _library.impl(_operator, _autograd_kernel(_operator, _function), "Autograd")
    torch.library.register_vmap(_operator, functools.partial(_rule, _operator), lib=_library)


def _neuron_and_numbers(kind: str, values: Sequence[Any]) -> tuple[str, Tensor | None]:
    """The operators' arguments ``neuron`` and ``numbers``, from the two that :meth:`Neuron.split` gives. In a graph
    that holds for all values of a number, numbers are a tensor: an operator's argument of type float or str would fix
    them."""
    if any(isinstance(value, torch.SymFloat | torch.SymInt) for value in values):
        one = torch.ones((), dtype=torch.float64, device="cpu")  # only as a factor of a tensor is a number not fixed
        return kind, torch.stack([one * value for value in values])
    numbers = iter(values)
    words = (f"{word[:-3]}{float(next(numbers))!r}" if word.endswith("=1.0") else word for word in kind.split(" "))
    return " ".join(words), None


def _traced_neuron(
    x: Tensor,
    initial: Tensor | None,
    parameters: Tensor | None,
    lengths: Tensor | None,
    steps: int,
    time_dim: int,
    constant: bool,
    numbers: Sequence[Any],
    kind: str,
    potentials: int,
    return_output: bool,
    return_final: bool,
    version: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = (*_neuron_and_numbers(kind, numbers), potentials, return_output, return_final, False)
    outputs: tuple[Tensor, Tensor, Tensor]
    outputs = neuron_forward(x, initial, parameters, lengths, steps, time_dim, constant, *call)[:3]
    return outputs


def _traced_neunorm_lif(
    x: Tensor,
    weight: Tensor,
    decays: Tensor | None,
    steps: int,
    numbers: Sequence[Any],
    norm_decay: float,
    squared: bool,
    kind: str,
    version: str,
) -> Tensor:
    neuron, changing = _neuron_and_numbers(kind, [*numbers, norm_decay])
    fixed = 0.0 if changing is not None else float(norm_decay)
    normalised: Tensor = neunorm_lif_forward(x, weight, decays, steps, neuron, changing, fixed, squared, False)[0]
    return normalised


_library.impl("neuron", _traced_neuron, "CompositeImplicitAutograd")
_library.impl("neunorm_lif", _traced_neunorm_lif, "CompositeImplicitAutograd")
