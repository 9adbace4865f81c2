"""Every fused kernel against the reference."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from stbp_cuda import engine, functional, ops
from stbp_cuda.neurons import RESETS
from stbp_cuda.surrogate import SURROGATES, MultiGaussian

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in engine.DTYPES}
EXACT = ("rectangular", "polynomial", "atan", "fast_sigmoid")  # free of transcendental functions
CHUNK = ops.chunk("cpu")

every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES)
every_reset = pytest.mark.parametrize("reset", RESETS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
both_detach = pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: a shape, a memory order, parameters, and the seed of its random numbers."""

    steps: int
    shape: tuple[int, ...]
    order: str = "contiguous"
    folded: bool = False
    decay: float = 0.25
    v_threshold: float = 0.75
    v_reset: float = 0.0
    width: float = 1.0
    strict: bool = False
    spatial_only: bool = False
    initial: bool = False
    final: bool = False
    ties: bool = False
    seed: int = 0


ORDERS = ("contiguous", "permuted", "sliced", "expanded", "batch first")

cases = st.builds(
    Case,
    steps=st.one_of(st.integers(1, 12), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 70])),
    shape=st.one_of(
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
        st.sampled_from([(1,), (15,), (16,), (17,), (63,), (65,), (513,), (3, 700), (2, 3, 5, 7)]),
    ),
    order=st.sampled_from(ORDERS),
    folded=st.booleans(),
    decay=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]),
    v_threshold=st.sampled_from([0.25, 0.75, 1.5]),
    v_reset=st.sampled_from([0.0, 0.125, -0.3]),
    width=st.sampled_from([0.3, 1.0, 4.0]),
    strict=st.booleans(),
    initial=st.booleans(),
    final=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)


def in_order(x: Tensor, order: str) -> Tensor:
    """The same numbers in another memory order; of "expanded", the same numbers at every step."""
    if order == "permuted" and x.dim() > 2:  # as channels_last: time stays outermost
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "sliced" and x.dim() > 1:
        return torch.stack([x, x], dim=-1)[..., 0]
    if order == "expanded" and x.dim() > 0:
        return x[:1].expand(x.shape)
    if order == "batch first" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def random_tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The input, the initial potential, and the gradients of spikes and of the final potential."""
    generator = torch.Generator().manual_seed(case.seed)
    state = ops.state_dtype(dtype)
    shape = (case.steps, *(case.shape or (1,) * case.folded))

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = normal(shape)
    if case.ties:  # so that many potentials lie on the threshold
        x = (x * 4).round() / 4
    initial = normal(shape[1:]).to(device, state) if case.initial else None
    gradient, last = normal(shape).to(device, dtype), normal(shape[1:]).to(device, state)
    x = in_order(x.to(device, dtype), case.order)
    if case.folded:
        x, gradient = x.flatten(0, 1), gradient.flatten(0, 1)
    return x, initial, gradient, last


def run(
    case: Case, tensors: tuple[Tensor, Tensor | None, Tensor, Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Spikes, final potential, dL/dx and dL/d(initial potential)."""
    x, initial, gradient, last = tensors
    x = x.detach().requires_grad_()  # keeps the memory order
    initial = None if initial is None else initial.clone().requires_grad_()
    surrogate = SURROGATES[options.pop("surrogate")](case.width)
    spikes, potential = functional.lif(
        x,
        decay=case.decay,
        v_threshold=case.v_threshold,
        v_reset=case.v_reset if options["reset"] == "hard" else 0.0,
        strict_threshold=case.strict,
        spatial_only=case.spatial_only,
        surrogate=surrogate,
        steps=case.steps if case.folded else None,
        initial_potential=initial,
        return_potential=True,
        **options,
    )
    loss = (spikes * gradient).sum()
    if case.final:
        loss = loss + (potential * last).sum()
    loss.backward()
    assert x.grad is not None
    if initial is not None and initial.grad is None:  # spatial_only: the reference's autograd finds no way to it
        initial.grad = torch.zeros_like(initial)
    return spikes.detach(), potential.detach(), x.grad, None if initial is None else initial.grad


def assert_gradients_agree(name: str, ours: Tensor, theirs: Tensor, surrogate: str) -> None:
    """``theirs`` rounded to the dtype of ``ours``, to the last bit; for surrogates with transcendental functions within
    the bound of the state's type, relative to the largest gradient, and one rounding.
    """
    if surrogate in EXACT:
        assert torch.equal(ours, theirs.to(ours.dtype)), f"{name} differs by up to {(ours - theirs).abs().max()}"
        return
    if ours.numel() == 0:
        return
    bound = {torch.float64: 1e-12, torch.float32: 1e-6}[theirs.dtype] * theirs.abs().max()
    if ours.dtype != theirs.dtype:
        half = torch.finfo(ours.dtype)
        bound = bound + half.eps * theirs.abs().clamp_min(half.tiny)
    excess = ((ours.to(theirs.dtype) - theirs).abs() - bound).max()
    assert excess <= 0, f"{name}: {excess:.3g} beyond the error that is allowed, up to {bound.max():.3g}"


@every_surrogate
@every_reset
@every_dtype
@given(case=cases, detach_reset=st.booleans())  # the kernels have an instance for each of the others, but not for this
@example(case=Case(6 * CHUNK + 8, (33,), initial=True, final=True, decay=0.9, width=4.0), detach_reset=False)
@example(case=Case(CHUNK + 1, (2, 3, 8, 8), order="permuted", initial=True, final=True), detach_reset=True)
@example(case=Case(4, (40_000,), order="sliced"), detach_reset=False)  # enough work for several threads
def test_agrees_with_the_reference(
    case: Case, detach_reset: bool, surrogate: str, reset: str, dtype: torch.dtype, device: str
) -> None:
    options = {"surrogate": surrogate, "reset": reset, "detach_reset": detach_reset}
    x, initial, gradient, last = random_tensors(case, dtype, device)
    spikes, potential, grad_x, grad_initial = run(case, (x, initial, gradient, last), backend="fused", **options)
    assert spikes.dtype == grad_x.dtype == dtype
    assert spikes.shape == grad_x.shape == x.shape

    # Half types: the reference runs in float32 on the rounded numbers.
    wide = ops.state_dtype(dtype)
    expected = run(case, (x.to(wide), initial, gradient.to(wide), last), backend="reference", **options)
    assert torch.equal(spikes.to(wide), expected[0])
    assert torch.equal(potential, expected[1])
    assert_gradients_agree("dL/dx", grad_x, expected[2], surrogate)
    if initial is not None:
        assert_gradients_agree("dL/dv[0]", grad_initial, expected[3], surrogate)


@every_surrogate
@every_reset
@every_dtype
@given(case=cases)
def test_spatial_only_agrees_with_the_reference(
    case: Case, surrogate: str, reset: str, dtype: torch.dtype, device: str
) -> None:
    options = {"surrogate": surrogate, "reset": reset, "detach_reset": False}
    case = dataclasses.replace(case, spatial_only=True)
    x, initial, gradient, last = random_tensors(case, dtype, device)
    spikes, potential, grad_x, grad_initial = run(case, (x, initial, gradient, last), backend="fused", **options)
    wide = ops.state_dtype(dtype)
    expected = run(case, (x.to(wide), initial, gradient.to(wide), last), backend="reference", **options)
    assert torch.equal(spikes.to(wide), expected[0])
    assert torch.equal(potential, expected[1])
    assert_gradients_agree("dL/dx", grad_x, expected[2], surrogate)
    assert grad_initial is None or not grad_initial.any()


@every_surrogate
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("width", [0.3, 1.0, 4.0])
def test_derivative_element_by_element(surrogate: str, dtype: torch.dtype, width: float, device: str) -> None:
    """One step, where no sum can cancel: far into the tails each derivative is right by itself."""
    x = torch.linspace(-30, 30, 100_001, device=device, dtype=dtype).unsqueeze(0).requires_grad_()
    gradients = []
    for backend in ("fused", "reference"):
        spikes = functional.lif(x, surrogate=SURROGATES[surrogate](width), backend=backend)  # type: ignore[arg-type]
        gradients += torch.autograd.grad(spikes.sum(), x)
    if surrogate in EXACT:
        assert torch.equal(*gradients)
    elif surrogate == "multi_gaussian":  # a difference: as right as its parts
        parts = MultiGaussian(width, height=0.0).derivative(x.detach() - 0.75) + 1
        assert ((gradients[0] - gradients[1]).abs() <= {torch.float64: 1e-14, torch.float32: 4e-7}[dtype] * parts).all()
    else:
        rtol = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
        # Subnormal numbers have few bits: the last few of them are allowed.
        torch.testing.assert_close(
            *gradients, rtol=rtol, atol=16 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        )


@every_surrogate
def test_derivative_against_float64(surrogate: str, device: str) -> None:
    """The float32 kernels' exponentials and divisions over all magnitudes, of arguments that have no rounding of their
    own: the threshold is 0, the width 1, and squares of 12 bits are exact."""
    if surrogate == "multi_gaussian":
        pytest.skip("Gaussians of arguments that are rounded: what it adds up is tried here by itself")
    s = torch.cat([torch.zeros(1), torch.logspace(-30, 30, 200_001)])
    s = (s.view(torch.int32) & ~0xFFF).view(torch.float32)
    s = torch.cat([s, -s]).to(device)
    x = s.unsqueeze(0).requires_grad_()
    spikes = functional.lif(x, v_threshold=0.0, v_reset=-1.0, surrogate=surrogate, backend="fused")
    (found,) = torch.autograd.grad(spikes.sum(), x)
    expected = SURROGATES[surrogate]().derivative(s.double())
    bound = 1e-6 * expected + torch.finfo(torch.float32).smallest_normal
    assert ((found[0].double() - expected).abs() <= bound).all()


@every_dtype
def test_long_sequences(dtype: torch.dtype, device: str) -> None:
    case = Case(3000, (70,), decay=0.95, initial=True, final=True)
    tensors = random_tensors(case, dtype, device)
    options = {"surrogate": "rectangular", "reset": "soft", "detach_reset": False}
    ours = run(case, tensors, backend="fused", **options)
    theirs = run(case, tensors, backend="reference", **options)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert torch.equal(ours_, theirs_)


@every_surrogate
@every_reset
@both_detach
@pytest.mark.parametrize("steps", [1, 5, CHUNK + 2])
def test_gradcheck(surrogate: str, reset: str, detach_reset: bool, steps: int, device: str) -> None:
    """The fused float64 kernels with the smooth spike: gradients by both inputs, through both outputs."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(steps, 3, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    initial = torch.randn(3, generator=generator, dtype=torch.float64).to(device).requires_grad_()

    def lif(x: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return functional.lif(
            x,
            decay=0.6,
            v_threshold=0.4,
            v_reset=0.1 if reset == "hard" else 0.0,
            surrogate=SURROGATES[surrogate](1.3),
            reset=reset,  # type: ignore[arg-type]
            smooth=True,
            initial_potential=initial,
            return_potential=True,
            detach_reset=detach_reset,
            backend="fused",
        )

    if not detach_reset:
        assert torch.autograd.gradcheck(lif, (x, initial), atol=1e-6)
        return
    # A detached gradient is no derivative of the function computed: autograd on the reference defines it.
    outputs = [
        lif(x, initial),
        functional.lif(
            x,
            decay=0.6,
            v_threshold=0.4,
            v_reset=0.1 if reset == "hard" else 0.0,
            surrogate=SURROGATES[surrogate](1.3),
            reset=reset,
            smooth=True,
            initial_potential=initial,
            return_potential=True,
            detach_reset=True,  # type: ignore[arg-type]
            backend="reference",
        ),
    ]
    weights = [torch.randn(output.shape, generator=generator, dtype=torch.float64).to(device) for output in outputs[0]]
    ours, theirs = (torch.autograd.grad(output, (x, initial), weights) for output in outputs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-12, atol=1e-14)


@every_reset
@pytest.mark.parametrize("cut", [1, 8, CHUNK, CHUNK + 5])
def test_a_sequence_in_two_parts_is_the_whole(reset: str, cut: int, device: str) -> None:
    """Spikes, and the gradient through the potential that is handed over: streams and truncated BPTT."""
    steps = 2 * CHUNK + 3
    x = torch.randn(steps, 4, 9, generator=torch.Generator().manual_seed(cut)).to(device).requires_grad_()
    whole, last = functional.lif(x, decay=0.5, reset=reset, return_potential=True)  # type: ignore[arg-type]
    first, handed = functional.lif(x[:cut], decay=0.5, reset=reset, return_potential=True)  # type: ignore[arg-type]
    second, end = functional.lif(
        x[cut:],
        decay=0.5,
        reset=reset,
        initial_potential=handed,
        return_potential=True,  # type: ignore[arg-type]
    )
    parts = torch.cat([first, second])
    assert torch.equal(parts, whole)
    assert torch.equal(end, last)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (expected,) = torch.autograd.grad((whole * weight).sum() + last.sum(), x)
    (gradient,) = torch.autograd.grad((parts * weight).sum() + end.sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@every_dtype
@every_surrogate
def test_nan_and_inf_stay_in_their_neuron(poison: float, dtype: torch.dtype, surrogate: str, device: str) -> None:
    neurons, sick = 530, 131
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2 * CHUNK + 1, neurons, generator=generator).to(device, dtype)
    gradient = torch.randn(x.shape, generator=generator).to(device, dtype)
    poisoned = x.clone()
    poisoned[3, sick] = poison
    poisoned_gradient = gradient.clone()
    poisoned_gradient[5, sick + 2] = poison
    results = []
    for input_, upstream in ((x, gradient), (poisoned, poisoned_gradient)):
        leaf = input_.requires_grad_()
        spikes, potential = functional.lif(leaf, surrogate=surrogate, return_potential=True, backend="fused")
        spikes.backward(upstream)
        results.append((spikes.detach(), potential.detach().unsqueeze(0), leaf.grad))
    others = [n for n in range(neurons) if n not in (sick, sick + 2)]
    for healthy, ill in zip(*results, strict=True):
        assert torch.equal(healthy[:, others], ill[:, others])


@every_dtype
@pytest.mark.parametrize("neurons", [2**18, 2**18 + 64, 2**18 + 7])
def test_results_that_no_cache_holds(dtype: torch.dtype, neurons: int) -> None:
    """The CPU kernels write them past the caches where rows are aligned; all ways give the same as small calls."""
    steps = CHUNK + 3
    generator = torch.Generator().manual_seed(neurons)
    x = torch.randn(steps, neurons, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(steps, neurons, generator=generator).to(dtype)
    spikes, potential = functional.lif(x, decay=0.5, return_potential=True, backend="fused")
    spikes.backward(gradient)
    assert x.grad is not None
    for part in torch.arange(neurons).split(2**15 + 5):  # small enough for the caches
        of_part = slice(int(part[0]), int(part[-1]) + 1)
        small = x.detach()[:, of_part].clone().requires_grad_()
        some_spikes, some_potential = functional.lif(small, decay=0.5, return_potential=True, backend="fused")
        some_spikes.backward(gradient[:, of_part].clone())
        assert torch.equal(spikes[:, of_part], some_spikes)
        assert torch.equal(potential[of_part], some_potential)
        assert torch.equal(x.grad[:, of_part], small.grad)


def test_runs_are_the_same_from_one_to_the_next(device: str) -> None:
    case = Case(40, (3000,), initial=True, final=True)
    tensors = random_tensors(case, torch.float32, device)
    options = {"surrogate": "gaussian", "reset": "hard", "detach_reset": False, "backend": "fused"}
    first, second = (run(case, tensors, **options) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_number_of_threads_changes_nothing() -> None:
    case = Case(9, (50_001,), initial=True, final=True)
    tensors = random_tensors(case, torch.float32, "cpu")
    options = {"surrogate": "sigmoid", "reset": "hard", "detach_reset": False, "backend": "fused"}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(case, tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "steps", "memory_format"),
    [((5, 3, 4, 4), None, torch.contiguous_format), ((10, 3, 4, 4), 5, torch.channels_last)],
)
def test_dense_layouts_are_kept_and_not_copied(
    shape: tuple[int, ...], steps: int | None, memory_format: torch.memory_format, device: str
) -> None:
    x = torch.randn(shape, device=device).contiguous(memory_format=memory_format).requires_grad_()
    spikes = functional.lif(x, steps=steps, backend="fused")
    assert spikes.stride() == x.stride()
    (gradient,) = torch.autograd.grad(spikes.sum(), x)
    assert gradient.stride() == x.stride()
    # A copy would show as one more allocation of the size of x.
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        functional.lif(x, steps=steps, backend="fused")
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


def test_other_layouts_become_contiguous(device: str) -> None:
    x = torch.randn(4, 6, 5, device=device).transpose(0, 1)
    spikes = functional.lif(x, backend="fused")
    assert spikes.is_contiguous()
    assert torch.equal(spikes, functional.lif(x.contiguous(), backend="fused"))


def test_without_grad_nothing_is_kept(device: str) -> None:
    x = torch.randn(3 * CHUNK, 10, device=device)
    expected = functional.lif(x, backend="reference")
    with torch.no_grad():
        assert torch.equal(functional.lif(x.requires_grad_()), expected)
    with torch.inference_mode():
        spikes = functional.lif(x)
    assert spikes.is_inference()
    assert torch.equal(spikes, expected)
    assert functional.lif(x.detach()).grad_fn is None


def test_kept_for_backward_is_the_input_and_a_state_every_chunk(device: str) -> None:
    chunk = ops.chunk(device)
    x = torch.randn(3 * chunk + 1, 10, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.lif(x, backend="fused")
    assert [tuple(t.shape) for t in kept] == [(3 * chunk + 1, 10), (3, 10)]
    assert kept[0].data_ptr() == x.data_ptr()


def test_an_unused_output_gets_no_gradient(device: str) -> None:
    """Only the final potential is used: the kernels must take the spikes' gradient for zero."""
    x = torch.randn(6, 8, device=device, requires_grad=True)
    gradients = []
    for backend in ("fused", "reference"):
        _, potential = functional.lif(x, return_potential=True, backend=backend)  # type: ignore[arg-type]
        gradients += torch.autograd.grad(potential.sum(), x)
    assert torch.equal(*gradients)


def test_second_derivatives_are_refused_not_wrong(device: str) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.ones(3, 4, device=device, requires_grad=True)  # by which the first derivative is differentiable
    (gradient,) = torch.autograd.grad((functional.lif(x, backend="fused") * weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(3, 0), (1, 0, 5), (2, 4, 0, 3)])
def test_no_neurons(shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    spikes, potential = functional.lif(x, return_potential=True, backend="fused")
    assert spikes.shape == shape
    assert potential.shape == shape[1:]
    spikes.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.cuda
@every_dtype
def test_a_full_gpu(dtype: torch.dtype) -> None:
    """Packs of 16 bytes a thread are launched only where they leave no multiprocessor short of threads."""
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    case = Case(2 * ops.chunk("cuda") + 1, (processors * 1024 * (16 // dtype.itemsize),), initial=True, final=True)
    options: dict[str, Any] = {"surrogate": "polynomial", "reset": "hard", "detach_reset": False}
    x, initial, gradient, last = random_tensors(case, dtype, "cuda")
    ours = run(case, (x, initial, gradient, last), backend="fused", **options)
    wide = ops.state_dtype(dtype)
    theirs = run(case, (x.to(wide), initial, gradient.to(wide), last), backend="reference", **options)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert ours_ is not None
        assert theirs_ is not None
        assert torch.equal(ours_, theirs_.to(ours_.dtype))


@pytest.mark.cuda
def test_cuda_graph_and_side_stream() -> None:
    x = torch.randn(20, 4096, device="cuda")
    expected = functional.lif(x, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        assert torch.equal(functional.lif(x, backend="fused"), expected)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph), torch.no_grad():
        spikes = functional.lif(static, backend="fused")
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(spikes, expected)
