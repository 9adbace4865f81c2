"""The operators themselves: what torch asks of a custom operator, and their own checks."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from stbp_cuda import engine, ops
from stbp_cuda.neurons import LIF

NEURON = (
    "lif decay=0.5 v_threshold=0.75 subtract=0.75 v_reset=0.0 reset=hard delayed=0 detach_reset=0 spatial_only=0 "
    "strict_threshold=0 smooth=0 surrogate=rectangular width=1.0 gain=1.0 height=0.15 scale=6.0"
)

NUMBERS = torch.tensor([0.5, 0.75, 0.75, 0.0, 1.0, 1.0, 0.15, 6.0], dtype=torch.float64)  # those of NEURON


def test_the_text_of_a_neuron() -> None:
    assert LIF(decay=0.5).text() == NEURON
    numbers, kind = LIF(decay=0.5).split()
    assert numbers == NUMBERS.tolist()
    assert kind == re.sub(r"\d+\.\d+", "1.0", NEURON)


def forward_arguments(shape: tuple[int, ...], steps: int, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    x = torch.randn(shape, device=device).to(dtype)
    initial = torch.randn((shape[0] // steps, *shape[1:]), device=device).to(ops.state_dtype(dtype))
    return [x, initial, None, None, steps, 0, False, NEURON, None, 0, True, True, True]


def backward_arguments(
    shape: tuple[int, ...], steps: int, device: str, dtype: torch.dtype = torch.float32
) -> list[Any]:
    forward = forward_arguments(shape, steps, device, dtype)
    x, initial = forward[:2]
    _, final, _, states = ops.neuron_forward(*forward)
    grads = [torch.randn_like(x), torch.randn_like(final), None]
    return [*grads, x, initial, None, None, states, steps, 0, False, NEURON, None, 0, True, False]


SHAPES = [((3, 5), 3), ((70, 2, 4), 70), ((12, 2, 3, 3), 4), ((4, 0), 4), ((0, 2), 7)]


@pytest.mark.parametrize(("shape", "steps"), SHAPES)
@pytest.mark.parametrize("dtype", engine.DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck_forward(shape: tuple[int, ...], steps: int, dtype: torch.dtype, device: str) -> None:
    arguments = forward_arguments(shape, steps, device, dtype)
    torch.library.opcheck(ops.neuron_forward, arguments)
    other = [arguments[0], None, *arguments[2:8], NUMBERS, 0, True, False, False]
    torch.library.opcheck(ops.neuron_forward, other)
    torch.library.opcheck(ops.neuron_forward, [arguments[0].requires_grad_(), *arguments[1:]])


@pytest.mark.parametrize(("shape", "steps"), SHAPES)
@pytest.mark.parametrize("dtype", engine.DTYPES, ids=str)
def test_opcheck_backward(shape: tuple[int, ...], steps: int, dtype: torch.dtype, device: str) -> None:
    arguments = backward_arguments(shape, steps, device, dtype)
    torch.library.opcheck(ops.neuron_backward, arguments)
    arguments[1] = arguments[4] = None
    torch.library.opcheck(ops.neuron_backward, [*arguments[:-4], NUMBERS, 0, False, False])


def test_numbers_hold_in_place_of_those_in_the_text(device: str) -> None:
    other = NEURON
    for name in "decay", "v_threshold", "v_reset", "width", "gain":
        other = re.sub(f"{name}=[0-9.]+", f"{name}=0.1", other)
    forward = forward_arguments((70, 40), 70, device)
    expected = ops.neuron_forward(*forward)
    found = ops.neuron_forward(*forward[:7], other, NUMBERS, *forward[9:])
    grads = [torch.randn_like(expected[0]), torch.randn_like(expected[1]), None]
    call = [*grads, *forward[:4]]
    gradients = ops.neuron_backward(*call, expected[3], 70, 0, False, NEURON, None, 0, True, False)
    found += ops.neuron_backward(*call, found[3], 70, 0, False, other, NUMBERS, 0, True, False)
    assert expected[0].any()
    for a, b in zip((*expected, *gradients), found, strict=True):
        assert torch.equal(a, b)


def layouts() -> dict[str, Tensor]:
    x = torch.randn(6, 4, 3, 5)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "time innermost": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced": torch.randn(6, 4, 3, 10)[..., ::2],
        "expanded": x[:, :, :1].expand(6, 4, 3, 5),
        "one step": x[:1].transpose(1, 2),
        "ones": torch.randn(6, 1, 3, 1).transpose(1, 3),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("folded", [False, True])
def test_the_fake_kernels_predict_shapes_and_strides(layout: str, folded: bool, device: str) -> None:
    x = layouts()[layout].to(device)
    steps = 1 if folded else x.shape[0]
    forward = [None, None, None, steps, 0, False, NEURON, None, 0, True, True, True]
    backward = [steps, 0, False, NEURON, None, 0, True, False]
    outputs = ops.neuron_forward(x, *forward)
    gradients = ops.neuron_backward(torch.ones_like(x), None, None, x, None, None, None, outputs[3], *backward)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_x, *fake_outputs = (mode.from_tensor(t) for t in (x, *outputs))
        predicted = ops.neuron_forward(fake_x, *forward)
        predicted += ops.neuron_backward(
            torch.ones_like(fake_x), None, None, fake_x, None, None, None, fake_outputs[3], *backward
        )
    for real, fake in zip((*outputs, *gradients), predicted, strict=True):
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert real.numel() == 0 or fake.stride() == real.stride()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.tensor(1.0), "x must have a time dimension, got shape ()"),
        (0, torch.zeros(6, 4, dtype=torch.int32), "x must be float64, float32, float16 or bfloat16"),
        (1, torch.zeros(1, 5), "initial_potential must have shape (1, 4), got (1, 5)"),
        (1, torch.zeros(1, 4, dtype=torch.float64), "initial_potential must have the dtype that goes with x's"),
        (4, 0, "steps must be at least 1, got 0"),
        (4, 4, "the first dimension of x must be a multiple of steps = 4, got x of shape (6, 4)"),
        (7, NEURON.replace("smooth=0", "smooth=1"), "the smooth spike needs x in float64"),
        (
            7,
            NEURON.replace("rectangular", "triangle"),
            "surrogate must be one of rectangular polynomial sigmoid gaussian atan fast_sigmoid multi_gaussian, got",
        ),
        (7, NEURON.replace("width=1.0", "width=0"), "width must be positive, got 0"),
        (7, NEURON.replace("0.5", "half"), "neuron must have a number after 'decay=', got lif decay=half"),
        (7, NEURON.replace("hard", "medium"), "reset must be hard or soft, got medium"),
        (7, NEURON.replace(" reset=hard", ""), "neuron must go on with ' reset=' at ' delayed=0"),
        (7, NEURON + " more", "neuron has more than it should, got lif decay=0.5"),
        (7, "", "neuron must begin with one of lif li, got ''"),
        (8, NUMBERS[:3], "numbers has too few values, 3"),
        (8, torch.cat([NUMBERS, NUMBERS]), "numbers has too many values, 16"),
        (8, NUMBERS.float(), "numbers must be a contiguous tensor of one dimension in float64 on the CPU"),
        (8, -NUMBERS, "width must be positive, got -1"),
        (5, 2, "time_dim must be 0 or 1, got 2"),
        (5, 1, "x must be [B, T, ...] with T = 6, got x of shape (6, 4)"),
        (9, 3, "potentials must be 0, 1 or 2, got 3"),
        (2, torch.zeros(4, 1), "parameters must have shape [3 or 5, 1 or 6, ...], got (4, 1)"),
        (2, torch.zeros(3, 1, 2), "parameters must have as many dimensions as x with its time, or 2, got (3, 1, 2)"),
        (2, torch.zeros(3, 1).double(), "parameters must have the dtype of potentials that goes with x's"),
        (3, torch.zeros(3, dtype=torch.int64), "lengths must have shape (4,), got (3,)"),
        (3, torch.zeros(4), "lengths must be of dtype int64"),
    ],
)
def test_bad_arguments_of_forward(position: int, value: object, message: str) -> None:
    """functional.lif finds these first and says more; the operators must not trust their callers either."""
    arguments = forward_arguments((6, 4), 6, "cpu")
    arguments[position] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.neuron_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(6, 5), "grad_output must have shape (70, 4), got (6, 5)"),
        (0, torch.zeros(70, 4, dtype=torch.float16), "grad_output must have the dtype that goes with x's"),
        (1, torch.zeros(4), "grad_final must have shape (1, 4), got (4,)"),
        (7, torch.zeros(1, 4), "states must have shape (2, 4), got (1, 4)"),
    ],
)
def test_bad_arguments_of_backward(position: int, value: object, message: str) -> None:
    arguments = backward_arguments((70, 4), 70, "cpu")
    arguments[position] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.neuron_backward(*arguments)


@pytest.mark.cuda
def test_tensors_on_two_devices() -> None:
    arguments = forward_arguments((6, 4), 6, "cuda")
    arguments[1] = arguments[1].cpu()
    with pytest.raises(RuntimeError, match="initial_potential must be on the device of x"):
        ops.neuron_forward(*arguments)
