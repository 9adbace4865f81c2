"""The contestants: one layer of LIF neurons, ``x [T, N] -> spikes [T, N]``, as each library's users would write it.

All are set to the same neuron, and :func:`check` holds each of them against the eager loop::

    u[t] = DECAY * v[t-1] + x[t]        o[t] = 1 if u[t] >= V_THRESHOLD else 0        v[t] = u[t] * (1 - o[t])

with nothing detached, a state in float32 (float64 for float64 ``x``) that starts from zero in each call, and spikes in
the dtype of ``x``. What cannot be made the same is in each contestant's ``note``.

DECAY is 0.5 because halving is exact: SpikingJelly's ``v - v / tau + x`` rounds as ``DECAY * v + x`` does, and each as
what a compiler makes of it with a fused multiply-add.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import stbp_cuda
from stbp_cuda.ops import state_dtype
from stbp_cuda.surrogate import Polynomial, Rectangular, Surrogate

Layer = Callable[[Tensor], Tensor]
DECAY, V_THRESHOLD = 0.5, 0.75
RECTANGULAR = Rectangular(width=1)
DIFFERENT = 1e-4  # the fraction of spikes and gradients that rounding may change where it is not the same


class Spike(torch.autograd.Function):
    """The step function, with a surrogate for its derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v_threshold: float, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.v_threshold, ctx.surrogate = v_threshold, surrogate
        return (u >= v_threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        s = u - ctx.v_threshold if ctx.v_threshold else u
        return grads[0] * ctx.surrogate.derivative(s), None, None


def loop(currents: Sequence[Tensor], surrogate: Surrogate = RECTANGULAR) -> Tensor:
    """The layer as one writes it in plain PyTorch."""
    dtype, state = currents[0].dtype, state_dtype(currents[0].dtype)
    u = spike = torch.zeros_like(currents[0], dtype=state)
    spikes = []
    for current in currents:
        u = u * DECAY * (1 - spike) + current.to(state)
        spike = Spike.apply(u, V_THRESHOLD, surrogate)
        spikes.append(spike.to(dtype))
    return torch.stack(spikes)


def eager(x: Tensor) -> Tensor:
    return loop([x[t] for t in range(x.shape[0])])


def unbind(x: Tensor) -> Tensor:
    """The same for one who knows that the backward pass of each ``x[t]`` fills a tensor as large as all of ``x``."""
    return loop(x.unbind())


def compiled() -> Layer:
    torch._dynamo.reset()  # compile for every shape, as for a user who has just one, and never run into a limit
    return torch.compile(eager, fullgraph=True, dynamic=False)


def ours() -> Layer:
    return stbp_cuda.LIFLayer(DECAY, V_THRESHOLD, RECTANGULAR, backend="fused")


def load(package: str) -> ModuleType:
    with warnings.catch_warnings():  # by Norse, about functions that are not used here
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        return importlib.import_module(package)


def spikingjelly(backend: str, surrogate_name: str) -> Layer:
    """``backend`` as in ``SJ_LIF_CUDA_IMPLEMENTATION``, which is read at import: here it changes with each call."""
    from spikingjelly._ops.lif import _selection
    from spikingjelly.activation_based import functional, neuron, surrogate

    options = {
        "tau": 1 / (1 - DECAY),
        "decay_input": False,
        "v_threshold": V_THRESHOLD,
        "surrogate_function": getattr(surrogate, surrogate_name)(alpha=1.0),
    }
    node = neuron.LIFNode(**options, step_mode="m")
    selected: dict[Any, Any] = {}

    def layer(x: Tensor) -> Tensor:
        _selection._requested, _selection._selections = backend, selected
        if x.dtype in (torch.float32, torch.float64):
            functional.reset_net(node)
            return node(x)
        # A node would keep its state in a half type; the function it calls takes the state's dtype as it comes.
        state = torch.zeros_like(x[0], dtype=torch.float32)
        return functional.lif_multi_step(x, state, **options)[0].to(x.dtype)

    return layer


def snntorch() -> Layer:
    import snntorch

    leaky = snntorch.Leaky(
        beta=DECAY,
        threshold=V_THRESHOLD,
        spike_grad=lambda s: Spike.apply(s, 0.0, RECTANGULAR),
        reset_mechanism="zero",
        reset_delay=False,
    )

    def layer(x: Tensor) -> Tensor:
        mem = leaky.reset_mem()
        spikes = []
        for current in x.unbind():
            spike, mem = leaky(current.to(state_dtype(x.dtype)), mem)
            spikes.append(spike.to(x.dtype))
        return torch.stack(spikes)

    return layer


def norse() -> Layer:
    library = load("norse.torch")
    rate = 1 - DECAY
    # Norse fires above the threshold, we at it: above the next smaller number is the same.
    v_th = torch.tensor(rate * V_THRESHOLD).nextafter(torch.tensor(-math.inf))
    triangle = {"method": "triangle", "alpha": torch.tensor(1.0)}
    parameters = library.LIFBoxParameters(tau_mem_inv=torch.tensor(rate), v_th=v_th, **triangle)
    cell = library.LIFBoxCell(parameters, dt=1.0)

    def layer(x: Tensor) -> Tensor:
        state = None
        spikes = []
        for current in x.unbind():
            spike, state = cell(current.to(state_dtype(x.dtype)), state)
            spikes.append(spike.to(x.dtype))
        return torch.stack(spikes)

    return layer


@dataclass(frozen=True)
class Rival:
    """A contestant.

    Attributes:
        label: its name in pictures and tables.
        make: makes a layer, which may be called with any ``x [T, N]``.
        package: what must be installed.
        cuda_only: whether it runs on a GPU only.
        float64: whether it takes float64.
        surrogate: the one its gradients belong to.
        exact: whether its arithmetic is that of the eager loop, so that its spikes must equal the loop's to the bit.
        tensors: about how many tensors like x, in the dtype of the state, training needs at most: to tell what fits.
        note: what could not be made the same, and what else a reader of its figures should know.
    """

    label: str
    make: Callable[[], Layer]
    package: str | None = None
    cuda_only: bool = False
    float64: bool = True
    surrogate: Surrogate = RECTANGULAR
    exact: bool = True
    tensors: int = 14
    note: str = ""

    def layer(self, device: torch.device) -> Layer:
        with device:  # for what a library keeps as tensors
            return self.make()

    def problem(self, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
        """Why it cannot run on a device, or there with inputs of a dtype; None if it may."""
        if self.package:
            try:
                load(self.package)
            except ImportError as error:
                return str(error)
        if self.cuda_only and device.type != "cuda":
            return "needs a CUDA GPU"
        if dtype == torch.float64 and not self.float64:
            return "its kernels refuse float64"
        return None


FUSED_SPIKINGJELLY = (
    "its kernels have no rectangular surrogate: PiecewiseQuadratic(alpha=1), which is our Polynomial(width=4); "
    "chosen by an internal switch, as the public one is read once at import"
)
RIVALS = {
    "ours": Rival("stbp_cuda", ours, tensors=3),
    "eager": Rival(
        "eager loop", lambda: eager, note="the backward pass of each x[t] fills a tensor as large as x: O(T^2)"
    ),
    "unbind": Rival("eager loop, x.unbind()", lambda: unbind),
    "compile": Rival(
        "torch.compile", compiled, tensors=4, note="of the eager loop; compiling is not counted in its times"
    ),
    "spikingjelly": Rival(
        "SpikingJelly, torch",
        lambda: spikingjelly("auto", "Rect"),
        "spikingjelly",
        note="half types by functional.lif_multi_step with a float32 state, which a LIFNode cannot have",
    ),
    "spikingjelly-triton": Rival(
        "SpikingJelly, Triton",
        lambda: spikingjelly("triton", "PiecewiseQuadratic"),
        "spikingjelly",
        cuda_only=True,
        float64=False,
        tensors=4,
        surrogate=Polynomial(width=4),
        note=FUSED_SPIKINGJELLY,
    ),
    "spikingjelly-native": Rival(
        "SpikingJelly, native",
        lambda: spikingjelly("cuda", "PiecewiseQuadratic"),
        "spikingjelly",
        cuda_only=True,
        float64=False,
        tensors=4,
        surrogate=Polynomial(width=4),
        note=FUSED_SPIKINGJELLY + "; needs an installation from source",
    ),
    "snntorch": Rival(
        "snnTorch",
        snntorch,
        "snntorch",
        note="reset_delay=False, as its default cuts the gradient through the reset (and computes less); the eager "
        "loop's spike function as spike_grad, as its own ones fire above the threshold, not at it; half types are "
        "cast to float32 step by step, else its state would be in a half type",
    ),
    "norse": Rival(
        "Norse",
        norse,
        "norse",
        surrogate=Polynomial(width=4 * (1 - DECAY) ** 2),
        exact=False,
        note="LIFBoxCell, whose potential is (1 - decay) times ours: it scales the input where we do not, and rounds "
        "differently; no rectangular surrogate: method='triangle', which is our Polynomial(width=1); half types are "
        "cast to float32 step by step, else its state would be in a half type",
    ),
}


def forward(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Inference. Returns the spikes."""
    with torch.no_grad():
        return (layer(x),)


def forward_backward(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Training. Returns the spikes and the gradient of ``x``."""
    x.grad = None
    spikes = layer(x)
    spikes.backward(grad)
    assert x.grad is not None
    return spikes.detach(), x.grad


PASSES = {"fwd": forward, "fwd+bwd": forward_backward}


def random_input(
    steps: int, neurons: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """An input current that requires its gradient, and a gradient of the spikes."""
    generator = torch.Generator(device).manual_seed(seed)
    x, grad = (torch.randn(steps, neurons, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x.requires_grad_(), grad


def different(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], exact: bool = True) -> dict[str, int]:
    """How many spikes, and gradients (but for rounding), differ from those expected. Raise if that is too many."""
    close = [results[0] == expected[0]]
    for result, other in zip(results[1:], expected[1:], strict=True):
        close.append(torch.isclose(result, other, rtol=4 * torch.finfo(other.dtype).eps, atol=1e-5))
    counts = {name: int((~same).sum()) for name, same in zip(("spikes", "gradients"), close, strict=False)}
    allowed = 0 if exact else DIFFERENT * expected[0].numel()
    if max(counts.values()) > allowed:
        raise AssertionError(f"differs from the eager loop in {counts} of {expected[0].numel()}")
    return counts


def check(rival: Rival, results: tuple[Tensor, ...], x: Tensor, grad: Tensor, most: int = 2**22) -> dict[str, int]:
    """Hold what a contestant gave for ``x`` and ``grad`` against the eager loop with the same surrogate.

    Neurons are independent: where there are more than ``most`` spikes, only evenly spaced neurons are compared.

    Returns:
        How many "spikes" and "gradients" differ, "of" how many.

    Raises:
        AssertionError: some differ, though the arithmetic is the same, or more than rounding explains.
    """
    every = max(1, x.numel() // most)
    some_x, some_grad = x.detach()[:, ::every].contiguous().requires_grad_(), grad[:, ::every].contiguous()
    run = forward_backward if len(results) > 1 else forward
    expected = run(lambda x: loop(x.unbind(), rival.surrogate), some_x, some_grad)
    counts = different(tuple(result[:, ::every] for result in results), expected, rival.exact)
    return {**counts, "of": some_x.numel()}
