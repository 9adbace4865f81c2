"""NeuNorm, and the fused kernels of neurons with it, against the reference."""

import copy
import dataclasses
import io
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_lif import every_dtype, every_reset
from torch import Tensor, nn

import stbp_cuda
from stbp_cuda import functional, ops
from stbp_cuda.engine import DTYPES
from stbp_cuda.layers import NeuNorm, NeuNormLIF
from stbp_cuda.neurons import LIF, RESETS
from stbp_cuda.surrogate import SURROGATES

WITH_KERNELS = [name for name in SURROGATES if name != "multi_gaussian"]
every_surrogate = pytest.mark.parametrize("surrogate", WITH_KERNELS)

CHUNK = ops.chunk("cpu", "neunorm_")
ORDERS = ("contiguous", "channels_last")

every_order = pytest.mark.parametrize("order", ORDERS)


def in_order(x: Tensor, dims: int, order: str) -> Tensor:
    """The same numbers in a memory order, where ``dims`` last dimensions are features and space."""
    return x.movedim(-dims, -1).contiguous().movedim(-1, -dims) if order == "channels_last" else x.contiguous()


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: a shape, parameters, and the seed of its random numbers."""

    steps: int
    batch: int
    shape: tuple[int, ...]  # of one sample: features, and any number of dimensions of space
    order: str = "contiguous"  # of the input
    grad_order: str = "contiguous"  # of the gradient that arrives
    folded: bool = False
    decay: float = 0.25
    norm_decay: float = 0.8
    v_threshold: float = 0.75
    v_reset: float = 0.0
    width: float = 1.0
    strict: bool = False
    spatial_only: bool = False
    scaling: str = "1/F"
    learned: bool = True
    seed: int = 0


cases = st.builds(
    Case,
    steps=st.one_of(st.integers(1, 10), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])),
    batch=st.integers(0, 3),
    shape=st.tuples(st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 33, 40]))).flatmap(
        lambda features: st.one_of(
            st.just(features),
            st.tuples(st.just(features[0]), st.sampled_from([0, 1, 7, 8, 15, 16, 17, 64, 65, 150])),
            st.tuples(st.just(features[0]), st.integers(1, 9), st.integers(1, 9)),
        )
    ),
    order=st.sampled_from(ORDERS),
    grad_order=st.sampled_from(ORDERS),
    folded=st.booleans(),
    decay=st.sampled_from([0.0, 0.1, 0.25, 0.9]),
    norm_decay=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    v_threshold=st.sampled_from([0.25, 0.75]),
    v_reset=st.sampled_from([0.0, 0.125, -0.3]),
    width=st.sampled_from([0.3, 1.0, 4.0]),
    strict=st.booleans(),
    spatial_only=st.sampled_from([False, False, True]),
    scaling=st.sampled_from(functional.SCALINGS),
    learned=st.booleans(),
    seed=st.integers(0, 2**31),
)
# Several strips of positions with a remainder, several groups of samples, several chunks.
LARGE = Case(2 * CHUNK + 1, 5, (33, 13, 11))
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]


def random_tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The input, the weight, and the gradient of the result."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device)

    lead = (case.steps * case.batch,) if case.folded else (case.steps, case.batch)
    shape = (*lead, *case.shape)
    return normal(shape).to(dtype), normal(case.shape).to(ops.state_dtype(dtype)), normal(shape).to(dtype)


def run(case: Case, tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> Results:
    """The normalised spikes, dL/dx, dL/dweight and dL/d(both decays)."""
    x = in_order(tensors[0], len(case.shape), case.order).detach().clone().requires_grad_()
    weight = tensors[1].detach().clone().requires_grad_()
    decays: Any = (case.decay, case.norm_decay)
    both = torch.tensor(decays, dtype=weight.dtype, device=x.device, requires_grad=True)
    if case.learned:
        decays = both.unbind()
    surrogate = SURROGATES[options.pop("surrogate")](case.width)
    result = functional.neunorm_lif(
        x,
        weight,
        decay=decays[0],
        norm_decay=decays[1],
        scaling=case.scaling,  # type: ignore[arg-type]
        v_threshold=case.v_threshold,
        v_reset=case.v_reset if options["reset"] == "hard" else 0.0,
        strict_threshold=case.strict,
        spatial_only=case.spatial_only,
        surrogate=surrogate,
        steps=case.steps if case.folded else None,
        **options,
    )
    result.backward(in_order(tensors[2], len(case.shape), case.grad_order))
    assert x.grad is not None
    assert weight.grad is not None
    return result.detach(), x.grad, weight.grad, both.grad


def assert_close(name: str, ours: Tensor, theirs: Tensor, terms: Tensor | float) -> None:
    """Within the rounding of a sum whose terms' magnitudes add up to ``terms``, and of the result's own dtype."""
    bound = {torch.float64: 1e-14, torch.float32: 4e-6}[theirs.dtype] * terms
    if ours.dtype != theirs.dtype:
        half = torch.finfo(ours.dtype)
        bound = bound + half.eps * theirs.abs().clamp_min(half.tiny)
    if ours.numel():
        excess = ((ours.to(theirs.dtype) - theirs).abs() - bound).max()
        assert excess <= 0, f"{name}: {excess:.3g} beyond the error that is allowed"


def assert_agree(ours: Results, theirs: Results, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0].to(ours[0].dtype))
    assert ours[1].dtype == ours[0].dtype
    size = theirs[1].abs().max().item() if theirs[1].numel() else 0.0
    size += tensors[2].abs().max().item() if tensors[2].numel() else 0.0
    assert_close("dL/dx", ours[1], theirs[1], 4 * size)
    samples = tensors[0].numel() // max(1, tensors[1].numel())
    assert_close("dL/dweight", ours[2], theirs[2], size * max(1, samples))
    assert (ours[3] is None) == (theirs[3] is None)
    if ours[3] is not None and theirs[3] is not None:
        assert_close("dL/ddecays", ours[3], theirs[3], 10 * size * max(1, tensors[0].numel()) ** 0.5)


@every_surrogate
@every_reset
@every_dtype
@given(case=cases, detach_reset=st.booleans())
@example(case=LARGE, detach_reset=False)
@example(case=dataclasses.replace(LARGE, order="channels_last"), detach_reset=True)
def test_agrees_with_the_reference(
    case: Case, detach_reset: bool, surrogate: str, reset: str, dtype: torch.dtype, device: str
) -> None:
    options = {"surrogate": surrogate, "reset": reset, "detach_reset": detach_reset}
    tensors = random_tensors(case, dtype, device)
    ours = run(case, tensors, backend="fused", **options)
    # Half types: the reference runs in float32 on the rounded numbers.
    x, weight, gradient = tensors
    wide = (x.to(weight.dtype), weight, gradient.to(weight.dtype))
    assert_agree(ours, run(case, wide, backend="reference", **options), tensors)


@every_dtype
@given(
    case=cases,
    grad_order=st.sampled_from(ORDERS),
    surrogate=st.sampled_from(WITH_KERNELS),
    reset=st.sampled_from(RESETS),
)
@example(case=LARGE, grad_order="channels_last", surrogate="sigmoid", reset="hard")
@example(case=Case(CHUNK + 1, 2, (300, 20)), grad_order="contiguous", surrogate="atan", reset="soft")
@example(case=Case(3, 70, (15, 9, 9)), grad_order="channels_last", surrogate="polynomial", reset="hard")
def test_both_orders_give_the_same_bits(
    case: Case, grad_order: str, surrogate: str, reset: str, dtype: torch.dtype, device: str
) -> None:
    tensors = random_tensors(case, dtype, device)
    smooth = [False, True] if dtype == torch.float64 else [False]
    for options in ({"surrogate": surrogate, "reset": reset, "smooth": value, "backend": "fused"} for value in smooth):
        results = [
            run(dataclasses.replace(case, order=order, grad_order=grad), tensors, **options)
            for order, grad in (("contiguous", "contiguous"), ("channels_last", grad_order))
        ]
        for ours, other in zip(*results, strict=True):
            assert (ours is None) == (other is None)
            assert ours is None or torch.equal(ours, other)  # type: ignore[arg-type]


@every_dtype
@pytest.mark.parametrize(
    ("lead", "shape"),
    [((6, 2), (5, 3, 4)), ((6, 2), (5, 7)), ((12,), (5, 3, 4)), ((6, 2), (1, 3, 4)), ((6, 2), (5, 1)), ((6, 2), (5,))],
)
def test_the_memory_order_is_kept_without_a_copy(
    lead: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also where both orders are the same memory: that is contiguous then."""
    x, gradient = (in_order(torch.randn(lead + shape).to(dtype), len(shape), "channels_last") for _ in range(2))
    x.requires_grad_()
    layer = NeuNormLIF(shape, steps=6 if len(lead) == 1 else None, backend="fused")
    with torch.profiler.profile(record_shapes=True) as profile:
        result = layer(x)
        result.backward(gradient)
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert list(x.shape) not in copied
    assert x.grad is not None
    for tensor in (result, x.grad):
        assert tensor.movedim(-len(shape), -1).is_contiguous()
        assert tensor.is_contiguous() == x.is_contiguous()


def test_another_order_is_made_contiguous(device: str) -> None:
    x = torch.randn(3, 6, 4, 5, device=device).transpose(0, 1).requires_grad_()
    layer = NeuNormLIF((4, 5), backend="fused").to(device)
    result = layer(x)
    (grad_x,) = torch.autograd.grad(result, x, torch.ones_like(result))
    assert result.is_contiguous()
    assert grad_x.is_contiguous()
    assert torch.equal(result, layer(x.contiguous()))


@every_surrogate
@every_reset
@every_order
@pytest.mark.parametrize(("scaling", "steps"), [("1/F^2", 1), ("1/F", CHUNK + 2)])
def test_gradcheck(surrogate: str, reset: str, order: str, scaling: str, steps: int, device: str) -> None:
    """The fused float64 kernels with the smooth spike: gradients by the current, U and both decays."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(steps, 2, 3, 2, generator=generator, dtype=torch.float64).to(device)
    x = in_order(x, 2, order).requires_grad_()
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    decays = [torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True) for value in (0.6, 0.7)]

    def neunorm_lif(x: Tensor, weight: Tensor, decay: Tensor, norm_decay: Tensor) -> Tensor:
        return functional.neunorm_lif(
            x,
            weight,
            decay=decay,
            norm_decay=norm_decay,
            scaling=scaling,  # type: ignore[arg-type]
            v_threshold=0.4,
            v_reset=0.1 if reset == "hard" else 0.0,
            surrogate=SURROGATES[surrogate](1.3),
            reset=reset,  # type: ignore[arg-type]
            smooth=True,
            backend="fused",
        )

    assert torch.autograd.gradcheck(neunorm_lif, (x, weight, *decays), atol=1e-6)


def test_by_hand() -> None:
    """Two features, one position: the equations of the paper with pencil and paper."""
    spikes = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 0.0]]])  # T = 3, B = 1, F = 2
    weight = torch.tensor([1.0, -2.0])
    # "1/F": gain 0.25; a = 0.5, 0.5 * 0.5 + 0.25 = 0.5, 0.25
    expected = torch.tensor([[[0.5, 2.0]], [[-0.5, 2.0]], [[-0.25, 0.5]]])
    assert torch.equal(functional.neunorm(spikes, weight, 0.5), expected)
    # "1/F^2": gain 0.125; half of it
    literal = spikes + (expected - spikes) / 2
    assert torch.equal(functional.neunorm(spikes, weight, 0.5, scaling="1/F^2"), literal)
    # Currents far from the threshold give these spikes.
    current = torch.where(spikes > 0, 10.0, -10.0)
    fused = functional.neunorm_lif(current, weight, decay=0.0, norm_decay=0.5, backend="fused")
    assert torch.equal(fused, expected)


@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_and_threads_change_nothing(dtype: torch.dtype, order: str) -> None:
    case = Case(CHUNK + 3, 9, (40, 9, 9), order)
    tensors = random_tensors(case, dtype, "cpu")
    options = {"surrogate": "gaussian", "reset": "hard", "backend": "fused"}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(case, tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@every_order
def test_kept_for_backward_is_the_input_and_little_else(order: str, device: str) -> None:
    chunk = ops.chunk(device, "neunorm_")
    x = in_order(torch.randn(2 * chunk + 1, 3, 4, 5, 5, device=device), 3, order).requires_grad_()
    layer = NeuNormLIF((4, 5, 5)).to(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    steps = 2 * chunk + 1
    assert [tuple(t.shape) for t in kept] == [x.shape, (4, 5, 5), (steps, 3, 25), (steps, 3, 25), (2, 3, 4, 25)]
    assert kept[0].data_ptr() == x.data_ptr()


def operator_arguments(
    device: str, dtype: torch.dtype, learned: bool, order: str = "contiguous"
) -> tuple[list[Any], list[Any]]:
    """For the operators forward and backward."""
    x = in_order(torch.randn(CHUNK + 2, 2, 3, 4, 5, device=device).to(dtype), 3, order)
    weight = torch.randn(3, 4, 5, device=device, dtype=ops.state_dtype(dtype))
    decays = torch.tensor([0.5, 0.8], device=device, dtype=weight.dtype) if learned else None
    call = [x.shape[0], LIF().text(), None, 0.8, False]
    forward = [x, weight, decays, *call, True]
    backward = [torch.randn_like(x), x, weight, decays, *ops.neunorm_lif_forward(*forward)[1:], *call, learned]
    return forward, backward


@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(dtype: torch.dtype, learned: bool, order: str, device: str) -> None:
    forward, backward = operator_arguments(device, dtype, learned, order)
    torch.library.opcheck(ops.neunorm_lif_forward, forward)
    torch.library.opcheck(ops.neunorm_lif_backward, backward)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, torch.zeros(3, 4, 6), "x must end in the shape of weight, (3, 4, 6), got (18, 2, 3, 4, 5)"),
        (1, torch.zeros(()), "weight must have shape (C, ...), got ()"),
        (1, torch.zeros(3, 4, 5).double(), "weight must have the dtype that goes with x's"),
        (2, torch.zeros(3), "decays must have shape (2,), got (3,)"),
        (3, 0, "steps must be at least 1, got 0"),
        (3, 5, "the first dimensions of x must hold a multiple of steps = 5 samples, got x of shape (18, 2, 3, 4, 5)"),
    ],
)
def test_bad_arguments_of_the_operator(position: int, value: object, message: str) -> None:
    forward, _ = operator_arguments("cpu", torch.float32, True)
    forward[position] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.neunorm_lif_forward(*forward)


@pytest.mark.parametrize("position", [0, 1, 2, 4, 5, 6])
def test_tensors_of_a_wrong_shape_in_the_operator_backward(position: int) -> None:
    _, backward = operator_arguments("cpu", torch.float32, True)
    backward[position] = backward[position][..., :-1].clone()
    with pytest.raises(RuntimeError, match=" must "):
        ops.neunorm_lif_backward(*backward)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm_decay": 1.5}, ValueError, "norm_decay must lie in [0, 1], got 1.5"),
        ({"norm_decay": "a"}, TypeError, "norm_decay must be a number, got 'a'"),
        ({"decay": -0.1}, ValueError, "decay must lie in [0, 1], got -0.1"),
        ({"scaling": "mean"}, ValueError, "scaling must be one of 1/F, 1/F^2, got 'mean'"),
        ({"weight": [1]}, TypeError, "weight must be a tensor, got list"),
        (
            {"weight": torch.zeros(2, 3, dtype=torch.int32)},
            TypeError,
            "weight must be of a floating dtype, got torch.int",
        ),
        (
            {"weight": torch.zeros(())},
            ValueError,
            "weight must have shape [C, ...] with at least one feature map, got ()",
        ),
        ({"weight": torch.zeros(3, 3)}, ValueError, "x must have shape [T, B, 3, 3], after weight, got (4, 5, 2, 3)"),
        ({"steps": 2}, ValueError, "x must have shape [T*B, 2, 3], after weight, got (4, 5, 2, 3)"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, fused, reference, got 'fast'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"x": torch.zeros(4, 5, 2, 3), "weight": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=re.escape(message)):
        functional.neunorm_lif(**call)


def test_bad_arguments_of_neunorm_and_the_layers() -> None:
    spikes = torch.zeros(4, 5, 2, 3)
    with pytest.raises(ValueError, match=re.escape("decay must lie in [0, 1], got 2")):
        functional.neunorm(spikes, torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match=re.escape("spikes must have shape [T, B, 7], after weight, got (4, 5, 2, 3)")):
        functional.neunorm(spikes, torch.zeros(7))
    with pytest.raises(ValueError, match=re.escape("steps must be a positive integer, got 0")):
        functional.neunorm(spikes, torch.zeros(2, 3), steps=0)
    for layer in (NeuNorm, NeuNormLIF):
        for shape in ((), (0, 3), (2.0, 3)):
            with pytest.raises(ValueError, match="shape must hold the positive sizes"):
                layer(shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("norm_decay must lie between 0 and 1 where it is learned, got 1")):
        NeuNormLIF((2, 3), norm_decay=1, learn_decays=True)


def test_the_layers_are_the_functions(device: str) -> None:
    x = torch.randn(6, 3, 4, 5, 5, device=device)
    weight = torch.randn(4, 5, 5, device=device)
    layer = NeuNormLIF((4, 5, 5), 0.4, 0.6, "atan", norm_decay=0.9, scaling="1/F^2", reset="soft").to(device)
    norm = NeuNorm((4, 5, 5), 0.9, scaling="1/F^2").to(device)
    spikes = stbp_cuda.LIFLayer(0.4, 0.6, "atan", reset="soft")(x)
    assert torch.equal(layer(x), spikes)  # U starts from 0
    assert torch.equal(norm(spikes), spikes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        norm.weight.copy_(weight)
    assert torch.equal(layer(x), norm(spikes))
    assert not torch.equal(layer(x), spikes)
    layer.steps = norm.steps = 6
    assert torch.equal(layer(x.flatten(0, 1)), norm(spikes.flatten(0, 1)))


@pytest.mark.parametrize("learn_decays", [False, True])
def test_copies_files_and_repr(learn_decays: bool) -> None:
    layer = NeuNormLIF((2, 3, 3), 0.3, norm_decay=0.9, learn_decays=learn_decays, steps=4)
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(8, 2, 3, 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = NeuNormLIF((2, 3, 3), 0.3, norm_decay=0.9, learn_decays=learn_decays, steps=4)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x), layer(x))
    for part in (
        "(2, 3, 3)",
        "decay=0.3",
        "norm_decay=0.9",
        "scaling='1/F'",
        f"learn_decays={learn_decays}",
        "steps=4",
    ):
        assert part in repr(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "decay_logits"][: 1 + learn_decays]
    assert not list(layer.buffers())


def test_decays_are_learned(device: str) -> None:
    layer = NeuNormLIF((3, 4), 0.25, norm_decay=0.8, learn_decays=True).to(device)
    assert layer.decay_logits is not None
    torch.testing.assert_close(layer.decay_logits.sigmoid(), torch.tensor([0.25, 0.8], device=device))
    with torch.no_grad():
        layer.weight.fill_(0.5)
    layer(torch.randn(8, 5, 3, 4, device=device)).square().sum().backward()
    assert layer.decay_logits.grad is not None
    assert (layer.decay_logits.grad != 0).all()


@every_order
@pytest.mark.parametrize("learn_decays", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool, learn_decays: bool, order: str, device: str) -> None:
    torch._dynamo.reset()
    layer = NeuNormLIF((3, 4, 4), surrogate="sigmoid", learn_decays=learn_decays).to(device)
    with torch.no_grad():
        layer.weight.normal_()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for steps in (3, CHUNK + 2):
        x = in_order(torch.randn(steps, 2, 3, 4, 4, device=device), 3, order).requires_grad_()
        gradient = torch.randn_like(x)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            result = run(x)
            results.append((result, *torch.autograd.grad(result, (x, *layer.parameters()), gradient)))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, check_stride=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), NeuNormLIF((3, 4, 4), v_threshold=0.1, steps=2)).to(device)
    with torch.autocast(device, dtype=dtype):
        result = net(torch.randn(6, 2, 6, 6, device=device))
    assert result.dtype == dtype
    result.float().square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_second_derivatives_are_refused_not_wrong(device: str) -> None:
    x = torch.randn(3, 2, 4, device=device, requires_grad=True)
    result = functional.neunorm_lif(x, torch.ones(4, device=device), backend="fused")
    scale = torch.ones_like(result).requires_grad_()
    (gradient,) = torch.autograd.grad((result * scale).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_other_layouts_give_the_same(device: str) -> None:
    x = torch.randn(6, 4, 5, 7, device=device)
    weight = torch.randn(4, 5, 7, device=device)
    expected = functional.neunorm_lif(x, weight, steps=3)
    assert torch.equal(
        functional.neunorm_lif(x.contiguous(memory_format=torch.channels_last), weight, steps=3), expected
    )
    assert torch.equal(functional.neunorm_lif(x.movedim(0, -1).contiguous().movedim(-1, 0), weight, steps=3), expected)


def test_a_surrogate_without_kernels_here(device: str) -> None:
    x, weight = torch.randn(3, 2, 4, 5, device=device), torch.rand(4, 5, device=device)
    options = {"surrogate": "multi_gaussian"}
    with pytest.raises(RuntimeError, match="no fused kernel with normalisation for the surrogate MultiGaussian"):
        functional.neunorm_lif(x, weight, backend="fused", **options)  # type: ignore[arg-type]
    result = functional.neunorm_lif(x, weight, backend="reference", **options)  # type: ignore[arg-type]
    assert torch.equal(result, functional.neunorm(functional.lif(x, **options), weight))  # type: ignore[arg-type]
