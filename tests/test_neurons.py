"""Every neuron with all that its calls may have: parameters that are tensors, lengths, potentials, layouts."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad

import stbp_cuda
from stbp_cuda import engine, functional, ops, reference
from stbp_cuda.neurons import NEURONS
from stbp_cuda.surrogate import SURROGATES, MultiGaussian, Polynomial, Triangle

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in engine.DTYPES}
CHUNK = ops.chunk("cpu")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hard": ("lif", {"v_reset": -0.25}),
    "soft": ("lif", {"reset": "soft"}),
    "delayed": ("lif", {"reset": "soft", "delayed": True}),
    "li": ("li", {}),
}
RANGES = {
    "decay": (0.0, 1.0),
    "v_threshold": (0.25, 1.25),
    "subtract": (0.25, 1.25),
    "scale": (0.5, 2.0),
    "shift": (-0.5, 0.5),
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES)
both_backends = pytest.mark.parametrize("backend", ["fused", "reference"])


def test_all_neurons_are_tested() -> None:
    assert {kind for kind, _ in VARIANTS.values()} == NEURONS.keys()


def names_of(variant: str) -> tuple[str, ...]:
    """The parameters that may be tensors."""
    kind, _ = VARIANTS[variant]
    return (*(name for name in NEURONS[kind].parameters if name != "subtract" or variant != "hard"), "scale", "shift")


def neuron(variant: str, x: Tensor, **options: Any) -> Any:
    """Without the options that this one has not."""
    kind, own = VARIANTS[variant]
    function = getattr(functional, kind)
    accepted = inspect.signature(function).parameters
    return function(x, **{name: value for name, value in {**own, **options}.items() if name in accepted})


def normal(*size: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)


def parameter(name: str, *size: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    low, high = RANGES[name]
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(seed + len(name)), dtype=torch.float64)
    return (low + (high - low) * uniform).to(device, dtype)


def gradients(outputs: Any, leaves: Any, seed: int = 5) -> list[Tensor]:
    """Of random weights of all outputs."""
    leaves = list(leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights = [normal(*y.shape, seed=seed + i, device=y.device, dtype=y.dtype) for i, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def same(found: Any, expected: Any) -> None:
    found, expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Relative to the largest, for sums in which much may cancel."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * max(1.0, float(theirs.abs().max())))


# Against the reference.

FORMS = ("default", "number", "[]", "[C]", "ones", "sample", "steps")
LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]] = {
    "contiguous": lambda x: (x, {}),
    "channels last": lambda x: (x.movedim(2, -1).contiguous().movedim(-1, 2) if x.dim() > 2 else x, {}),
    "batch first": lambda x: (x.transpose(0, 1).contiguous(), {"time_dim": 1}),
    "batch first, channels last": lambda x: (
        x.movedim((0, 1, -1), (1, 0, 2)).contiguous().movedim(2, -1) if x.dim() > 2 else x.transpose(0, 1),
        {"time_dim": 1},
    ),
    "time last": lambda x: (x.movedim(0, -1).contiguous(), {"time_dim": -1}),
    "folded": lambda x: (x.flatten(0, 1), {"steps": len(x)}),
    "sliced": lambda x: (torch.stack([x, x], -1)[..., 0], {}),
    "transposed": lambda x: (x.transpose(0, 1).contiguous().transpose(0, 1), {}),
    "batch innermost": lambda x: (x.movedim(1, -1).contiguous().movedim(-1, 1), {}),
    "constant": lambda x: (x[0], {"steps": len(x), "constant": True}),
    "expanded": lambda x: (x[:1].expand(x.shape), {}),
}


def unarranged(y: Tensor, steps: int, options: dict[str, Any]) -> Tensor:
    """An output for an input in one of the layouts, as ``[T, B, ...]``."""
    if "steps" in options and "constant" not in options:
        return y.unflatten(0, (steps, -1)) if y.numel() else y.reshape(steps, y.shape[0] // steps, *y.shape[1:])
    return y.movedim(options.get("time_dim", 0), 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: a shape, a layout, the forms of the parameters, and the seed of its random numbers."""

    steps: int
    batch: int
    sample: tuple[int, ...]
    layout: str
    variant: str
    surrogate: str
    forms: dict[str, str]
    initial: str
    lengths: bool
    potentials: str | None
    flags: dict[str, bool]
    gain: float
    seed: int


RANDOM: dict[str, Any] = {
    "steps": st.one_of(st.integers(1, 12), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 70])),
    "batch": st.integers(1, 5),
    "sample": st.one_of(
        st.lists(st.integers(1, 7), max_size=3).map(tuple),
        st.sampled_from([(17,), (65,), (3, 70), (0,), (5, 3, 7), (19, 1, 1)]),
    ),
    "layout": st.sampled_from(list(LAYOUTS)),
    "variant": st.sampled_from(list(VARIANTS)),
    "surrogate": st.sampled_from(list(SURROGATES)),
    "forms": st.fixed_dictionaries({name: st.sampled_from(FORMS) for name in RANGES}),
    "initial": st.sampled_from(["none", "number", "tensor"]),
    "lengths": st.booleans(),
    "potentials": st.sampled_from([None, *engine.POTENTIALS]),
    "flags": st.fixed_dictionaries(
        {name: st.booleans() for name in ("detach_reset", "strict_threshold", "spatial_only")}
    ),
    "gain": st.sampled_from([1.0, 0.3]),
    "seed": st.integers(0, 2**31),
}
cases = st.builds(Case, **RANDOM)
# Many neighbours with the same parameters, which a CPU then keeps in registers.
alike = st.builds(
    Case,
    **{
        **RANDOM,
        "sample": st.sampled_from([(3, 137), (2, 15, 17), (5, 16, 16), (271,), (1, 9, 61)]),
        "layout": st.sampled_from(["contiguous", "batch first", "folded"]),
        "forms": st.sampled_from(["[C]", "[]", "number"]).map(lambda form: dict.fromkeys(RANGES, form)),
        "potentials": st.none(),
        "flags": st.one_of(
            st.just(dict.fromkeys(["detach_reset", "strict_threshold", "spatial_only"], False)), RANDOM["flags"]
        ),
    },
)


def sizes_of(form: str, name: str, case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a parameter: as it is given, and as [rows, batch, ...]."""
    sample = case.sample
    of_channels = (*sample[:1], *[1] * (len(sample) - 1))
    if form == "[C]":
        return sample[:1], (1, 1, *of_channels)
    if form == "sample":
        return sample, (1, 1, *sample)
    if form == "ones" and len(sample) > 1:  # those of one dimension
        ones = tuple(size if d == case.seed % len(sample) else 1 for d, size in enumerate(sample))
        return ones, (1, 1, *ones)
    if form == "steps" and name in ("scale", "shift"):
        each = sample if case.seed % 2 else of_channels
        return (case.steps, *each), (case.steps, 1, *each)
    return (), (1, 1, *[1] * len(sample))


@every_dtype
@settings(max_examples=5 * settings.default.max_examples)
@given(case=st.one_of(cases, alike))
def test_agrees_with_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    state, full = ops.state_dtype(dtype), (case.steps, case.batch, *case.sample)
    kind, own = VARIANTS[case.variant]
    flags = {**case.flags, "spatial_only": case.flags["spatial_only"] and case.variant != "delayed"}
    options = {**own, **flags, "surrogate": SURROGATES[case.surrogate](0.7, case.gain)}
    options = {name: value for name, value in options.items() if name in NEURONS[kind].__dataclass_fields__}
    lengths = torch.arange(case.batch, device=device) * 3 % (case.steps + 1) if case.lengths else None
    numbers, tensors, spread = {}, {}, {}
    for name in names_of(case.variant):
        form = case.forms[name]
        size, aligned = sizes_of(form, name, case)
        value = parameter(name, *size, seed=case.seed, device=device, dtype=state)
        if form == "number":
            numbers[name] = value.item()
        elif form != "default":
            tensors[name] = value.requires_grad_()
            # The reference gets one for each neuron.
            rows = value.detach().reshape(aligned).expand(aligned[0], *full[1:])
            spread[name] = rows.clone(memory_format=torch.contiguous_format).requires_grad_()

    leaf = normal(*full, seed=case.seed, device=device, dtype=dtype).requires_grad_()
    initial: Any = {"none": None, "number": 0.25}.get(case.initial)
    start = None if initial is None else torch.full(full[1:], initial, dtype=state, device=device)
    ours_of, theirs_of = {"x": leaf}, {"x": leaf.detach().to(state).requires_grad_()}
    if case.initial == "tensor":
        initial = normal(*full[1:], seed=case.seed + 1, device=device, dtype=state).requires_grad_()
        start = initial.detach().clone().requires_grad_()
        ours_of["initial"], theirs_of["initial"] = initial, start
    x, layout = LAYOUTS[case.layout](leaf)
    output, final, *potentials = neuron(
        case.variant, x, **options, **numbers, **tensors, **layout, initial_potential=initial, lengths=lengths,
        return_potential=True, return_potentials=case.potentials, backend="fused",
    )  # fmt: skip
    assert (output.dtype, final.dtype) == (dtype, state)
    ours = [unarranged(output, case.steps, layout), final, *(unarranged(y, case.steps, layout) for y in potentials)]

    wide = theirs_of["x"]
    known = {name: list(rows) if len(rows) > 1 else rows[0] for name, rows in spread.items()}
    if "v_threshold" in known and own.get("reset") == "soft" and case.forms["subtract"] == "default":
        known["subtract"] = known["v_threshold"]
    fields = {name: value for name, value in numbers.items() if name in NEURONS[kind].parameters}
    known.update({name: value for name, value in numbers.items() if name not in fields})
    theirs = reference.run(
        NEURONS[kind](**{**options, **fields}),
        wide[:1].expand(full) if case.layout in ("constant", "expanded") else wide,
        start, known, lengths, case.potentials == "after_reset",
    )[: len(ours)]  # fmt: skip
    same(ours, [theirs[0].to(dtype), *theirs[1:]])
    if not leaf.numel():
        return

    weights = [normal(*y.shape, seed=case.seed + i, device=device, dtype=y.dtype) for i, y in enumerate(ours)]
    ours_of.update(tensors)
    theirs_of.update(spread)
    found = torch.autograd.grad(ours, list(ours_of.values()), weights)
    weights = [weight.to(state) for weight in weights]
    expected = torch.autograd.grad(theirs, list(theirs_of.values()), weights, allow_unused=True)
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}[state]
    for name, a, b in zip(ours_of, found, expected, strict=True):
        b = torch.zeros_like(theirs_of[name]) if b is None else b
        if name in tensors:  # a sum, in which the gradients of neurons may cancel
            assert a.dtype == state
            summed = b.double().sum_to_size(sizes_of(case.forms[name], name, case)[1]).reshape(a.shape)
            assert (a - summed).abs().max() <= rtol * (1 + b.double().abs().sum()), name
            continue
        if name == "x" and case.layout == "expanded" and a.dtype != state:
            continue  # torch adds up what the steps got, each rounded; another test has these
        half = torch.finfo(a.dtype)
        rounding = half.eps * b.abs().clamp_min(half.tiny) if a.dtype != state else 0
        excess = (a.to(state).clamp(half.min, half.max) - b.clamp(half.min, half.max)).abs() - rounding
        assert (excess <= rtol * b.abs().max()).all(), name


@every_surrogate
@every_variant
@pytest.mark.parametrize("steps", [1, 4, CHUNK + 2])
def test_gradcheck(surrogate: str, variant: str, steps: int, device: str) -> None:
    """The fused float64 kernels with the smooth spike, by everything that has a gradient at once."""
    if variant == "li" and surrogate != "rectangular":
        pytest.skip("has no surrogate")
    make = {"device": device, "dtype": torch.float64}
    x, initial = normal(steps, 2, 2, seed=7, **make), normal(2, 2, seed=8, **make)
    sizes = {"decay": (2,), "v_threshold": (), "subtract": (1,), "scale": (steps, 1), "shift": (2,)}
    names = names_of(variant)
    leaves = (x, initial, *(parameter(name, *sizes[name], **make) for name in names))

    def call(x: Tensor, initial: Tensor, *parameters: Tensor) -> Any:
        return neuron(
            variant, x, **dict(zip(names, parameters, strict=True)), surrogate=SURROGATES[surrogate](1.3, 0.8),
            smooth=True, initial_potential=initial, return_potential=True,
            return_potentials=engine.POTENTIALS[steps % 2], backend="fused",
        )  # fmt: skip

    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(call, leaves, atol=1e-6, fast_mode=steps > CHUNK)


# Parameters.

ACCEPTED = [(), (3,), (3, 1, 1), (1, 4, 1), (1, 1, 2), (1, 1, 1), (3, 4, 1), (3, 4, 2)]
IN_TIME = [(5, 3, 1, 1), (5, 1, 1, 1), (5, 1, 4, 2), (5, 3, 4, 2), (1, 3, 4, 2)]


@both_backends
@every_variant
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch first", "batch first, channels last"])
def test_a_shape_is_its_expansion(variant: str, layout: str, backend: str, device: str) -> None:
    x, options = LAYOUTS[layout](normal(5, 2, 3, 4, 2, device=device))
    for name in names_of(variant):
        for size in [*ACCEPTED, *(IN_TIME if name in ("scale", "shift") else [])]:
            small = parameter(name, *size, device=device).requires_grad_()
            aligned = small.reshape(-1, 1, 1) if len(size) == 1 else small
            large = aligned.expand(*([size[0]] if len(size) == 4 else []), 3, 4, 2)
            large = large.detach().contiguous().requires_grad_()
            found, expected = (
                neuron(variant, x, **{name: value}, **options, return_potential=True, backend=backend)
                for value in (small, large)
            )
            same(found, expected)
            (of_small,), (of_large,) = gradients(found, [small]), gradients(expected, [large])
            summed = of_large.sum_to_size(aligned.shape).reshape(size)
            torch.testing.assert_close(of_small, summed, rtol=1e-4, atol=1e-4)


@both_backends
@pytest.mark.parametrize("name", RANGES)
def test_a_shape_that_does_not_fit(name: str, backend: str, device: str) -> None:
    x = normal(5, 2, 3, 4, 2, device=device)
    for size in [(2,), (4,), (3, 4), (2, 1, 1), (3, 4, 3), (4, 3, 1, 1), (2, 3, 4, 2), (5, 2, 3, 4, 2)]:
        with pytest.raises(ValueError, match=rf"{name} must broadcast to one step of one sample, \(3, 4, 2\)") as error:
            functional.lif(x, **{name: torch.ones(size, device=device)}, reset="soft", backend=backend)
        assert str(error.value).endswith(f"got shape {size}")
        assert ("a row for each step" in str(error.value)) == (name in ("scale", "shift"))
    if name not in ("scale", "shift"):
        with pytest.raises(ValueError, match=f"{name} must broadcast"):
            functional.lif(x, **{name: torch.ones(5, 3, 1, 1, device=device)}, reset="soft", backend=backend)


@both_backends
@pytest.mark.parametrize("name", RANGES)
def test_a_dtype_or_device_that_does_not_fit(name: str, backend: str, device: str) -> None:
    x = normal(5, 2, 3, device=device)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"{name} must be a number or a tensor of a floating dtype, got {dtype}"):
            functional.lif(x, **{name: torch.ones(3, dtype=dtype)}, reset="soft", backend=backend)
    with pytest.raises(ValueError, match=f"{name} must be on the device of x, {device}.*, got meta"):
        functional.lif(x, **{name: torch.ones(3, device="meta")}, reset="soft", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_another_dtype(dtype: torch.dtype, device: str) -> None:
    """They are taken in that of potentials, and their gradients come in their own."""
    x, decay = normal(5, 2, 3, device=device), parameter("decay", 3, device=device).to(dtype).requires_grad_()
    assert torch.equal(functional.lif(x, decay=decay), functional.lif(x, decay=decay.float()))
    functional.lif(x, decay=decay).sum().backward()
    assert decay.grad is not None
    assert decay.grad.dtype == dtype


def test_a_number_is_a_tensor_of_it(device: str) -> None:
    x = normal(70, 3, 5, device=device)
    for variant in VARIANTS:
        for name in names_of(variant):
            value = parameter(name).item()
            whole = torch.full((5,), value, device=device)
            found, expected = (neuron(variant, x, **{name: v}, return_potential=True) for v in (whole, value))
            same(found, expected)


@every_variant
@pytest.mark.parametrize("size", [(), (3,), (3, 50, 67)])
def test_gradients_of_parameters_have_the_same_bits(variant: str, size: tuple[int, ...], device: str) -> None:
    """On every run, and for any number of threads."""
    x = normal(9, 4, 3, 50, 67, device=device)
    leaves = {name: parameter(name, *size, device=device).requires_grad_() for name in names_of(variant)}
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            outputs = neuron(variant, x, **leaves, surrogate="gaussian", return_potential=True)
            found.append(gradients(outputs, leaves.values()))
    finally:
        torch.set_num_threads(threads)
    assert all(gradient.any() for gradient in found[0])
    for other in found[1:]:
        same(other, found[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gradients_of_many_neurons_are_exact_sums(channels: int, layout: str, device: str) -> None:
    """All of one sign, so that a sum in float32 would show."""
    x, _ = LAYOUTS[layout](normal(4, 3, channels, 1000, 1000 // channels, device=device).abs_())
    decay = torch.full((channels,), 0.5, device=device, requires_grad=True)
    shift = torch.zeros(channels, device=device, requires_grad=True)
    potentials = functional.li(x, decay=decay, shift=shift)
    found = torch.autograd.grad(potentials, (decay, shift), torch.ones_like(potentials))
    v, of_decay, of_shift = torch.zeros(3, *x.shape[1:], dtype=torch.float64, device=device)
    sums = [torch.zeros(channels, dtype=torch.float64, device=device) for _ in range(2)]
    for current in x:
        of_decay, of_shift = 0.5 * of_decay + v, 0.5 * of_shift + 1
        v = 0.5 * v + current
        for total, part in zip(sums, (of_decay, of_shift), strict=True):
            total += part.sum((0, 2, 3))
    for ours, expected in zip(found, sums, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)


# Time.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "detached": {"detach_reset": True},
    "strict": {"strict_threshold": True, "return_potentials": "before_reset"},
    "spatial": {"spatial_only": True},
    "potentials": {"return_potentials": "after_reset"},
    "parameters": {"decay": (3,), "v_threshold": (), "scale": (3, 4), "return_potentials": "after_reset"},
    "learned steps": {"shift": (70, 3, 1), "decay": (3, 4), "return_potentials": "before_reset"},
}
every_option = pytest.mark.parametrize("option", [name for name in OPTIONS if name != "spatial"])


def options_of(name: str, variant: str, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options, and parameters that have gradients."""
    options, parameters = dict(OPTIONS[name]), {}
    for key in RANGES:
        if key in options and key not in names_of(variant):
            del options[key]
        elif key in options:
            parameters[key] = parameter(key, *options.pop(key), device=device).requires_grad_()
    return options, parameters


@every_variant
@every_option
@pytest.mark.parametrize("cuts", [(1, 40), (32, 64)])
def test_a_sequence_in_parts_is_the_whole(variant: str, option: str, cuts: tuple[int, ...], device: str) -> None:
    x = normal(70, 2, 3, 4, device=device).requires_grad_()
    options, parameters = options_of(option, variant, device)
    output, final, *potentials = neuron(variant, x, **options, **parameters, return_potential=True)
    handed, parts = None, []
    for first, last in zip((0, *cuts), (*cuts, 70), strict=True):
        given_ = {name: p[first:last] if name == "shift" else p for name, p in parameters.items()}
        part, handed, *of_all = neuron(
            variant, x[first:last], **options, **given_, initial_potential=handed, return_potential=True
        )
        parts.append((part, *of_all))
    joined = [torch.cat(of_all) for of_all in zip(*parts, strict=True)]
    same([*joined, handed], [output, *potentials, final])
    leaves = [x, *parameters.values()]
    found, expected = gradients([*joined, handed], leaves), gradients([output, *potentials, final], leaves)
    assert torch.equal(found[0], expected[0])
    close(found[1:], expected[1:], 1e-4)  # sums of sums


@every_variant
@pytest.mark.parametrize("option", ["plain", "spatial", "potentials", "parameters", "learned steps"])
@pytest.mark.parametrize(("time_dim", "backend"), [(0, "fused"), (1, "fused"), (0, "reference")])
def test_lengths_are_those_of_samples_by_themselves(
    variant: str, option: str, time_dim: int, backend: str, device: str
) -> None:
    if (variant, option) == ("delayed", "spatial"):
        pytest.skip("refused")
    lengths = torch.tensor([70, 0, 1, 32, 33, 64, 65, 69], device=device)
    x = normal(70, 8, 3, 4, device=device)
    x[2:, 2] = math.nan  # read by nobody
    x.requires_grad_()
    initial = normal(8, 3, 4, seed=1, device=device).requires_grad_()
    options, parameters = options_of(option, variant, device)
    options["backend"] = backend
    whole = neuron(
        variant, x.movedim(0, time_dim), **options, **parameters, initial_potential=initial, lengths=lengths.int(),
        time_dim=time_dim, return_potential=True,
    )  # fmt: skip
    output, final, *potentials = (y.movedim(time_dim, 0) if y.dim() == 4 else y for y in whole)
    alone = []
    for sample, length in enumerate(lengths.tolist()):
        one = slice(sample, sample + 1)
        for y in (output, *potentials):
            assert not y[length:, one].any()
        if length == 0:
            nothing = torch.zeros(70, 1, 3, 4, device=device)
            alone.append((nothing, initial[one], *[nothing] * len(potentials)))
            continue
        given_ = {name: p[:length] if name == "shift" else p for name, p in parameters.items()}
        y, last, *others = neuron(
            variant, x[:length, one], **options, **given_, initial_potential=initial[one], return_potential=True
        )
        padded = [nn.functional.pad(y, (0, 0, 0, 0, 0, 0, 0, 70 - length)) for y in (y, *others)]
        alone.append((padded[0], last, *padded[1:]))
    expected = [torch.cat(of_all, 0 if of_all[0].dim() == 3 else 1) for of_all in zip(*alone, strict=True)]
    same([output, final, *potentials], expected)
    leaves = [x, initial, *parameters.values()]
    ours, theirs = gradients([output, final, *potentials], leaves), gradients(expected, leaves)
    same(ours[:2], theirs[:2])
    close(ours[2:], theirs[2:], 1e-4)
    assert ours[0].isfinite().all()


@pytest.mark.parametrize("output", ["all", "last"])
def test_the_last_potential_of_a_read_out(output: str, device: str) -> None:
    for dtype in DTYPES.values():
        x = normal(70, 3, 5, device=device, dtype=dtype)
        for lengths in (None, torch.tensor([70, 0, 33], device=device)):
            options: dict[str, Any] = {"lengths": lengths, "initial_potential": 0.5}
            found, final = functional.li(x, output=output, return_potential=True, **options)
            last = found if output == "last" else functional.li(x, output="last", **options)
            assert torch.equal(last, final.to(dtype))
            assert torch.equal(stbp_cuda.LILayer(output=output)(x, **options), found)


@every_variant
@pytest.mark.parametrize("option", ["plain", "potentials", "parameters", "learned steps"])
@pytest.mark.parametrize("time_dim", [0, 1, -1])
@pytest.mark.parametrize("given_as", ["constant", "expanded"])
def test_a_constant_is_its_repetition(variant: str, option: str, time_dim: int, given_as: str, device: str) -> None:
    one = normal(2, 3, 4, device=device).requires_grad_()
    options, parameters = options_of(option, variant, device)
    options = {**options, "time_dim": time_dim, "return_potential": True}
    place = time_dim % 4
    repeated = torch.stack([one] * 70, place)
    expected = neuron(variant, repeated, **options, **parameters)
    if given_as == "constant":
        found = neuron(variant, one, constant=True, steps=70, **options, **parameters)
    else:
        found = neuron(variant, one.unsqueeze(place).expand(repeated.shape), **options, **parameters)
    same(found, expected)
    leaves = [one, *parameters.values()]
    close(gradients(found, leaves), gradients(expected, leaves))


@both_backends
@every_dtype
def test_an_expanded_input_with_a_gradient_of_its_own(dtype: torch.dtype, backend: str, device: str) -> None:
    """Each step has its own where somebody asks: no step may get that of all."""
    one = normal(3, 4, device=device, dtype=dtype)
    weight = normal(6, 3, 4, seed=1, device=device, dtype=dtype)

    def loss(x: Tensor) -> Tensor:
        return (functional.lif(x, surrogate="sigmoid", backend=backend) * weight).sum()

    dense = one.repeat(6, 1, 1).requires_grad_()
    (expected,) = torch.autograd.grad(loss(dense), dense)
    leaf = one.expand(6, 3, 4).requires_grad_()
    assert torch.equal(torch.autograd.grad(loss(leaf), leaf)[0], expected)
    assert torch.equal(grad(loss)(one.expand(6, 3, 4)), expected)
    kept = (one.requires_grad_() * 1).expand(6, 3, 4)
    kept.retain_grad()
    loss(kept).backward()
    assert kept.grad is not None
    assert torch.equal(kept.grad, expected)


@every_variant
@every_option
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_time_behind_the_batch_is_not_copied(variant: str, option: str, order: str, device: str) -> None:
    x = normal(2, 70, 3, 4, device=device)
    x = (x.movedim(2, -1).contiguous().movedim(-1, 2) if order == "channels last" else x).requires_grad_()
    options, parameters = options_of(option, variant, device)
    options["return_potential"] = True
    found, final, *more = neuron(variant, x, time_dim=1, **options, **parameters)
    moved, last, *of_all = neuron(variant, x.transpose(0, 1).contiguous(), **options, **parameters)
    moved, *of_all = (y.transpose(0, 1) for y in (moved, *of_all))
    same([final, found, *more], [last, moved, *of_all])
    leaves = [x, *parameters.values()]
    ours, theirs = gradients([found, final, *more], leaves), gradients([moved, last, *of_all], leaves)
    assert torch.equal(ours[0], theirs[0])
    close(ours[1:], theirs[1:], 1e-4)
    assert found.stride() == ours[0].stride() == x.stride()
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        neuron(variant, x, time_dim=1, **options)
    assert "aten::copy_" not in {event.key for event in profile.key_averages()}


# Rules of others, written as loops.


@both_backends
@pytest.mark.parametrize("subtract", [0.6, 0.4])
def test_a_delayed_reset_is_that_of_snntorch(subtract: float, backend: str, device: str) -> None:
    x = normal(40, 5, 6, device=device, dtype=torch.float64)
    options: dict[str, Any] = {} if subtract == 0.6 else {"subtract": subtract}  # by default the threshold
    spikes, final, before = functional.lif(
        x, decay=0.8, v_threshold=0.6, reset="soft", delayed=True, return_potential=True,
        return_potentials="before_reset", backend=backend, **options,
    )  # fmt: skip
    u = o = torch.zeros(5, 6, dtype=torch.float64, device=device)
    for t, current in enumerate(x):
        u = 0.8 * u + current - subtract * o
        o = (u >= 0.6).double()
        assert torch.equal(spikes[t], o)
        torch.testing.assert_close(before[t], u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, 0.8 * u - subtract * o, rtol=1e-12, atol=1e-12)
    assert spikes.any()


# Surrogates.


@pytest.mark.parametrize(("width", "gain", "height", "scale"), [(1.0, 1.0, 0.15, 6.0), (0.25, 0.5, 0.3, 2.0)])
def test_multi_gaussian(width: float, gain: float, height: float, scale: float, device: str) -> None:
    surrogate = MultiGaussian(width, gain, height, scale)
    s = torch.linspace(-80, 80, 400_001, dtype=torch.float64, device=device)

    def density(mean: float, deviation: float) -> Tensor:
        return torch.exp(-(((s - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))

    one = math.sqrt(width)
    sides = density(one, scale * one) + density(-one, scale * one)
    expected = gain * ((1 + height) * density(0, one) - height * sides)
    x = s[None].requires_grad_()
    (found,) = torch.autograd.grad(functional.lif(x, v_threshold=0.0, v_reset=-1.0, surrogate=surrogate).sum(), x)
    for derivative in (surrogate.derivative(s.detach()), found[0]):
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-14)
        assert torch.trapezoid(derivative, s).item() == pytest.approx(gain * (1 - height), rel=1e-6)
    assert (expected < 0).any()


@every_surrogate
@both_backends
def test_gain_multiplies_gradients_and_nothing_else(surrogate: str, backend: str, device: str) -> None:
    """By a power of 2, to the last bit; of spatial_only, where a gradient is through one spike at most."""
    x = normal(5, 3, 4, device=device).requires_grad_()
    results = []
    for gain in (1.0, 0.25):
        of_gain = SURROGATES[surrogate](0.7, gain)
        spikes = functional.lif(x, surrogate=of_gain, spatial_only=True, backend=backend)
        results.append((spikes, *gradients(spikes, [x])))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1] * 0.25, results[1][1])


# Errors.

X = torch.zeros(5, 2, 3, 4)
LIF, LI, LIFLayer, LILayer = functional.lif, functional.li, stbp_cuda.LIFLayer, stbp_cuda.LILayer
NeuNormLIF = stbp_cuda.NeuNormLIF
ERRORS: list[tuple[type[Exception], str, Callable[..., Any], dict[str, Any]]] = [
    (TypeError, "lengths must be a tensor, got list", LIF, {"lengths": [5, 2]}),
    (TypeError, "lengths must be of dtype torch.int64 or torch.int32", LIF, {"lengths": torch.ones(2)}),
    (ValueError, "lengths must have one entry for each sample, shape (2,)", LIF, {"lengths": torch.tensor([1])}),
    (ValueError, "lengths must lie in [0, 5], the steps of x, got [6, 0]", LIF, {"lengths": torch.tensor([6, 0])}),
    (ValueError, "lengths must lie in [0, 5], the steps of x, got [5, -1]", LI, {"lengths": torch.tensor([5, -1])}),
    (ValueError, "lengths must be on the device of x", LIF, {"lengths": torch.tensor([1, 2], device="meta")}),
    (ValueError, "lengths needs x with a batch", LIF, {"x": X[:, 0, 0, 0], "lengths": torch.tensor([5])}),
    (ValueError, "subtract belongs to reset='soft'; a hard reset sets v_reset, got", LIF, {"subtract": 1.0}),
    (ValueError, "subtract belongs to reset='soft'", LIF, {"subtract": torch.ones(3)}),
    (ValueError, "delayed belongs to reset='soft', got reset='hard'", LIF, {"delayed": True}),
    (ValueError, "spatial_only leaves", LIF, {"delayed": True, "reset": "soft", "spatial_only": True}),
    (ValueError, "constant=True needs steps", LIF, {"constant": True}),
    (TypeError, "constant must be True or False, got 'yes'", LIF, {"constant": "yes"}),
    (ValueError, "steps is for time in the first dimension, and time_dim is 1", LIF, {"steps": 5, "time_dim": 1}),
    (ValueError, "steps=4 must divide the first dimension of x", LIF, {"steps": 4, "decay": torch.ones(4)}),
    (ValueError, "time_dim must be a dimension of x with its time, from -4 to 3, got 4", LIF, {"time_dim": 4}),
    (TypeError, "time_dim must be an integer, got 1.0", LIF, {"time_dim": 1.0}),
    (ValueError, "x must have at least one time step in its dimension 1", LIF, {"x": X[:, :0], "time_dim": 1}),
    (TypeError, "x must be a tensor, got list", LIF, {"x": [1.0], "decay": torch.ones(3)}),
    (ValueError, "return_potentials must be None or one of before_reset", LIF, {"return_potentials": "all"}),
    (TypeError, "initial_potential must be a tensor, a number or None, got str", LIF, {"initial_potential": "0"}),
    (ValueError, "initial_potential must be finite", LI, {"initial_potential": math.inf}),
    (ValueError, "initial_potential must have the shape of one step of x, (5, 3, 4), got (2, 3, 4)", LIF,
     {"time_dim": 1, "initial_potential": X[0]}),
    (TypeError, "scale must be a number", LIF, {"scale": "1"}),
    (TypeError, "scale must be a number, got array", LIF, {"scale": np.ones(3)}),
    (ValueError, "shift must be finite", LI, {"shift": math.nan}),
    (TypeError, "v_reset must be a number", LIF, {"v_reset": "0", "v_threshold": torch.ones(3)}),
    (ValueError, "output must be one of all, last, got 'mean'", LI, {"output": "mean"}),
    (ValueError, "decay must lie in [0, 1], got 2", LI, {"decay": 2}),
    (TypeError, "learn must hold names of decay, v_threshold, subtract, scale, shift", LIFLayer, {"learn": 3}),
    (ValueError, "learn must hold names of decay, scale, shift, got 'v_threshold'", LILayer, {"learn": "v_threshold"}),
    (ValueError, "subtract belongs to reset='soft'", LIFLayer, {"learn": "subtract"}),
    (ValueError, "channels must be None, a positive integer or a shape", LIFLayer, {"learn": "decay", "channels": 0}),
    (ValueError, "channels is the shape of parameters that are learned", LILayer, {"channels": 3}),
    (ValueError, "decay must be a number where", LIFLayer, {"learn": "decay", "decay": torch.ones(3)}),
    (ValueError, "decay must lie between 0 and 1 where it is", LIFLayer, {"learn": "decay", "decay": 1.0}),
    (ValueError, "output must be one of all, last, got 'mean'", LILayer, {"output": "mean"}),
    (TypeError, "decay of NeuNormLIF must be a number", NeuNormLIF, {"shape": (3, 4), "decay": torch.ones(3)}),
    (ValueError, "init_tau must be above 1, got 1", stbp_cuda.PLIFLayer, {"init_tau": 1.0}),
    (TypeError, "and takes no decay", stbp_cuda.PLIFLayer, {"decay": 0.5}),
    (ValueError, "gain must lie in [1e-6, 1e6], got 0", Polynomial, {"gain": 0.0}),
    (ValueError, "height must lie in [0, 1], got 2", MultiGaussian, {"height": 2.0}),
    (ValueError, "scale must lie in [1e-3, 1e3], got 0", MultiGaussian, {"scale": 0.0}),
    (ValueError, "half_width must lie in [1e-14, 1e14], got -1", Triangle, {"half_width": -1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "function", "options"), ERRORS)
def test_an_error_names_the_argument(
    error: type[Exception], message: str, function: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**({"x": X, **options} if function in (LIF, LI) else options))
