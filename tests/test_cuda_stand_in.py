"""The CUDA kernels where there is no GPU: their own source, compiled as C++ against a stand-in for nvcc's built-ins and
run thread after thread, against the reference and under sanitizers.
"""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
import pytest
import test_neunorm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_lif import (
    Case,
    assert_gradients_agree,
    both_detach,
    cases,
    every_dtype,
    every_reset,
    every_surrogate,
    random_tensors,
    run,
)
from torch import Tensor

from stbp_cuda import ops
from stbp_cuda.surrogate import SURROGATES

SOURCES = Path(__file__).parent / "cuda_stand_in"
# Those of setup.py that can change a result. g++ does not know nvcc's `#pragma unroll`, and does not see that rows past
# the last step, which are not loaded, are not used either.
FLAGS = (
    "-std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Werror -Wno-unknown-pragmas "
    "-Wno-maybe-uninitialized"
)
BUILDS = {"plain": "-O1", "sanitized": "-fsanitize=address,undefined -fno-sanitize-recover=all"}
# The folder of the builds, in the process that test_under_sanitizers starts.
SANITIZED = os.environ.get("STBP_CUDA_SANITIZED")

CHUNK, THREADS = 16, 128  # the kernels' own, for the cases to lie around
NEUNORM_CHUNK, STRIP = 8, 32
# The bytes on either side of an array: what a block of threads writes at once, in the largest packs. Sanitizers see
# where the memory itself ends.
GUARD = 0 if SANITIZED else THREADS * 32
UNWRITTEN = 0xFF  # every byte of a NaN, in every type


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module stand_in in plain/ and in sanitized/."""
    if SANITIZED:
        return Path(SANITIZED)
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_stand_in")
    lines = [
        f"rule cxx\n  command = g++ {FLAGS} $flags -c $in -o $out",
        "rule link\n  command = g++ -shared $flags $in -o $out",
        f"build module.o: cxx {SOURCES / 'module.cpp'}",
        f"  flags = -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}",
    ]
    for name, flags in BUILDS.items():
        objects = []
        for scalar in ("double", "float", "Half", "BFloat16"):
            objects.append(f"{name}/{scalar}.o")
            lines.append(f"build {objects[-1]}: cxx {SOURCES / 'kernels.cpp'}")
            lines.append(f"  flags = {flags} -DSTBP_SCALAR={scalar}")
        lines.append(f"build {name}/stand_in.so: link module.o {' '.join(objects)}\n  flags = {flags}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="session")
def stand_in(builds: Path) -> ModuleType:
    path = builds / ("sanitized" if SANITIZED else "plain") / "stand_in.so"
    spec = importlib.util.spec_from_file_location("stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.chunk, module.threads) == (CHUNK, THREADS)
    assert module.neunorm_chunk == NEUNORM_CHUNK
    assert module.surrogates == list(SURROGATES)
    return module


def kernels_of(stand_in: ModuleType, dtype: torch.dtype) -> Any:
    return getattr(stand_in, str(dtype).removeprefix("torch."))


def blank(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Memory for one array and not a byte more, between guards; integers, because NumPy has no bfloat16."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.full(GUARD + size + GUARD, UNWRITTEN, np.uint8)
    return memory[GUARD : GUARD + size].view(f"i{dtype.itemsize}").reshape(shape)


def copy_of(tensor: Tensor) -> np.ndarray:
    array = blank(tuple(tensor.shape), tensor.dtype)
    torch.from_numpy(array).view(tensor.dtype).copy_(tensor)
    return array


def result(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The array as a tensor, after a look at its guards."""
    assert array.base is not None
    guards = np.delete(array.base, slice(GUARD, GUARD + array.nbytes))
    assert (guards == UNWRITTEN).all(), "a kernel wrote outside its array"
    return torch.from_numpy(array).view(dtype)


def options_of(
    stand_in: ModuleType,
    case: Case | test_neunorm.Case,
    surrogate: str,
    reset: str,
    detach_reset: bool = False,
    smooth: bool = False,
) -> Any:
    return stand_in.Options(
        case.decay,
        case.v_threshold,
        case.v_reset if reset == "hard" else 0.0,
        reset == "soft",
        detach_reset,
        case.spatial_only,
        case.strict,
        smooth,
        stand_in.surrogates.index(surrogate),
        case.width,
    )


def run_stand_in(
    stand_in: ModuleType,
    case: Case,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor],
    *,
    surrogate: str,
    reset: str,
    detach_reset: bool,
    smooth: bool = False,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The results of ``test_lif.run`` from all kernels that can run so many steps and packs, with blocks of 128 threads
    or fewer."""
    dtype = tensors[0].dtype
    state = ops.state_dtype(dtype)
    kernels = kernels_of(stand_in, dtype)
    options = options_of(stand_in, case, surrogate, reset, detach_reset, smooth)
    x, initial, gradient, last = (None if tensor is None else copy_of(tensor) for tensor in tensors)
    steps, neurons = case.steps, *case.shape
    kept = (steps - 1) // CHUNK

    def plans(backward: bool) -> list[Any]:
        fit = [plan for plan in kernels.compiled_plans(steps, backward) if neurons % plan.width == 0]
        threads = [THREADS >> neurons // plan.width % 3 for plan in fit]
        blocks = [-(-neurons // (plan.width * count)) for plan, count in zip(fit, threads, strict=True)]
        return [stand_in.Plan(plan.rows, plan.width, *rest) for plan, *rest in zip(fit, threads, blocks, strict=True)]

    both = plans(False), plans(True)
    results = []
    for i in range(max(map(len, both))):
        there, back = (compiled[i % len(compiled)] for compiled in both)
        spikes, spikes_alone, grad_x = (blank((steps, neurons), dtype) for _ in range(3))
        potential = blank((neurons,), state)
        states = blank((kept, neurons), state) if kept else None
        grad_initial = None if initial is None else blank((neurons,), state)

        forward = kernels.Forward(steps, neurons, x, initial, spikes, potential, states)
        forward.launch(options, there)
        grad_final = last if case.final else None
        backward = kernels.Backward(steps, neurons, x, initial, states, gradient, grad_final, grad_x, grad_initial)
        backward.launch(options, back)
        assert forward.widest_pack() == backward.widest_pack() >= max(there.width, back.width)

        # Without the outputs that not every call needs.
        kernels.Forward(steps, neurons, x, initial, spikes_alone, None, None).launch(options, there)
        assert torch.equal(result(spikes_alone, dtype), result(spikes, dtype))
        if states is not None:
            assert not result(states, state).isnan().any()
        results.append(
            (
                result(spikes, dtype),
                result(potential, state),
                result(grad_x, dtype),
                None if grad_initial is None else result(grad_initial, state),
            )
        )
    return results


# Around the ends of chunks, packs and blocks of threads.
neurons = st.one_of(
    st.integers(1, 40),
    st.integers(1, 6).map(lambda packs: 8 * packs),
    st.sampled_from([THREADS * pack + more for pack in (1, 2, 4, 8) for more in (-pack, -1, 0, 1, pack)]),
)
flat_cases = st.builds(
    dataclasses.replace,
    cases,
    steps=st.one_of(st.integers(1, 2 * CHUNK + 2), st.sampled_from([3 * CHUNK, 5 * CHUNK + 1])),
    shape=st.tuples(neurons),
    order=st.just("contiguous"),
    folded=st.just(False),
)
# Packs of every type fill more than a block.
LARGE = Case(3 * CHUNK + 2, (8 * (THREADS + 3),), initial=True, final=True)


@every_surrogate
@every_reset
@both_detach
@every_dtype
@given(case=flat_cases)
@example(case=LARGE)
@example(case=Case(1, (1,)))
def test_agrees_with_the_reference(
    stand_in: ModuleType, case: Case, surrogate: str, reset: str, detach_reset: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset, "detach_reset": detach_reset}
    tensors = random_tensors(case, dtype, "cpu")
    x, initial, gradient, last = tensors
    # Half types: the reference runs in float32 on the rounded numbers.
    wide = ops.state_dtype(dtype)
    expected = run(case, (x.to(wide), initial, gradient.to(wide), last), backend="reference", **options)
    for spikes, potential, grad_x, grad_initial in run_stand_in(stand_in, case, tensors, **options):
        assert (grad_initial is None) == (expected[3] is None)
        assert torch.equal(spikes.to(wide), expected[0])
        assert torch.equal(potential, expected[1])
        assert_gradients_agree("dL/dx", grad_x, expected[2], surrogate)
        if grad_initial is not None and expected[3] is not None:
            assert_gradients_agree("dL/dv[0]", grad_initial, expected[3], surrogate)


@every_surrogate
@every_reset
@every_dtype
@given(case=flat_cases)
@example(case=LARGE)
def test_spatial_only_agrees_with_the_reference(
    stand_in: ModuleType, case: Case, surrogate: str, reset: str, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset, "detach_reset": False}
    case = dataclasses.replace(case, spatial_only=True)
    tensors = x, initial, gradient, last = random_tensors(case, dtype, "cpu")
    wide = ops.state_dtype(dtype)
    expected = run(case, (x.to(wide), initial, gradient.to(wide), last), backend="reference", **options)
    for spikes, potential, grad_x, grad_initial in run_stand_in(stand_in, case, tensors, **options):
        assert torch.equal(spikes.to(wide), expected[0])
        assert torch.equal(potential, expected[1])
        assert_gradients_agree("dL/dx", grad_x, expected[2], surrogate)
        assert grad_initial is None or not grad_initial.any()


@every_surrogate
@every_reset
@both_detach
@given(case=flat_cases)
@example(case=LARGE)
def test_smooth_spikes_agree_with_the_reference(
    stand_in: ModuleType, case: Case, surrogate: str, reset: str, detach_reset: bool
) -> None:
    case = dataclasses.replace(case, ties=False)  # autograd's choice at the corners of a surrogate is not ours
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset, "detach_reset": detach_reset, "smooth": True}
    tensors = random_tensors(case, torch.float64, "cpu")
    expected = run(case, tensors, backend="reference", **options)
    for ours in run_stand_in(stand_in, case, tensors, **options):
        for ours_, theirs in zip(ours, expected, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours_, theirs, rtol=1e-11, atol=1e-12)


def run_neunorm_stand_in(
    stand_in: ModuleType,
    case: test_neunorm.Case,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    groups: int,
    strip: int,
    surrogate: str,
    reset: str,
    smooth: bool = False,
) -> test_neunorm.Results:
    """The results of ``test_neunorm.run``, with the batch in so many groups, and so many positions to a block."""
    dtype = tensors[0].dtype
    state = ops.state_dtype(dtype)
    kernels = kernels_of(stand_in, dtype)
    options = options_of(stand_in, case, surrogate, reset, smooth=smooth)
    x, weight, gradient = (copy_of(tensor) for tensor in tensors)
    features, positions = case.shape
    shape = [case.steps, case.batch, features, positions]
    kept = (case.steps - 1) // NEUNORM_CHUNK
    squared, strips = case.scaling == "1/F^2", -(-positions // strip)
    decays = copy_of(torch.tensor([case.decay, case.norm_decay], dtype=state)) if case.learned else None
    normalised, grad_x = (blank(tuple(x.shape), dtype) for _ in range(2))
    sums, maps = (blank((case.steps, case.batch, positions), state) for _ in range(2))
    states = blank((kept, case.batch, features, positions), state) if kept else None
    carried = blank((groups, features, positions), state) if kept else None
    grad_weight = blank((groups, features, positions), state)
    grad_decays = blank((groups, strips, 2), state) if case.learned else None
    both = (case.norm_decay, squared)
    forward = kernels.NeuNormForward(shape, *both, x, weight, decays, normalised, sums, maps, states)
    backward = kernels.NeuNormBackward(
        shape, *both, groups, x, weight, decays, sums, maps, states, gradient, grad_x, grad_weight, grad_decays, carried
    )
    spikes = features * strip
    for launch, blocks, bytes_, results in (
        (forward.launch, strips * case.batch, spikes, [normalised]),
        (backward.launch, strips * groups, spikes * NEUNORM_CHUNK * dtype.itemsize, [grad_x, grad_weight, grad_decays]),
    ):
        # As for more features than the shared memory is enough for, and with it.
        launch(options, stand_in.NeuNormPlan(strip, strips, blocks, 0))
        expected = [None if array is None else array.copy() for array in results]
        launch(options, stand_in.NeuNormPlan(strip, strips, blocks, bytes_))
        for array, first in zip(results, expected, strict=True):
            assert (array == first).all() if array is not None else first is None
    for array in (sums, maps, states, carried):
        assert array is None or not result(array, state).isnan().any()
    return (
        result(normalised, dtype),
        result(grad_x, dtype),
        result(grad_weight, state).sum(0),
        None if grad_decays is None else result(grad_decays, state).sum((0, 1)),
    )


# Around the ends of chunks, of strips, and of what the teams of a block share; a block here costs milliseconds.
neunorm_cases = st.builds(
    dataclasses.replace,
    test_neunorm.cases,
    steps=st.sampled_from([1, 2, NEUNORM_CHUNK, NEUNORM_CHUNK + 1, 2 * NEUNORM_CHUNK + 3]),
    batch=st.integers(1, 2),
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 8, STRIP - 1, STRIP, STRIP + 1])),
    folded=st.just(False),
)
strips = st.sampled_from([STRIP, 16, 8, 1])
LARGE_NEUNORM = test_neunorm.Case(2 * NEUNORM_CHUNK + 3, 3, (7, STRIP + 5))
few = settings(max_examples=2 if SANITIZED is None else 1)


@every_surrogate
@every_reset
@every_dtype
@few
@given(case=neunorm_cases, groups=st.integers(1, 2), strip=strips)
@example(case=LARGE_NEUNORM, groups=2, strip=STRIP)
def test_neunorm_agrees_with_the_reference(
    stand_in: ModuleType,
    case: test_neunorm.Case,
    groups: int,
    strip: int,
    surrogate: str,
    reset: str,
    dtype: torch.dtype,
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset}
    tensors = x, weight, gradient = test_neunorm.random_tensors(case, dtype, "cpu")
    ours = run_neunorm_stand_in(stand_in, case, tensors, groups=min(groups, case.batch), strip=strip, **options)
    wide = (x.to(weight.dtype), weight, gradient.to(weight.dtype))
    test_neunorm.assert_agree(ours, test_neunorm.run(case, wide, backend="reference", **options), tensors)


@every_surrogate
@every_reset
@few
@given(case=neunorm_cases, strip=strips)
def test_neunorm_with_smooth_spikes_agrees_with_the_reference(
    stand_in: ModuleType, case: test_neunorm.Case, strip: int, surrogate: str, reset: str
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset, "smooth": True}
    tensors = test_neunorm.random_tensors(case, torch.float64, "cpu")
    expected = test_neunorm.run(case, tensors, backend="reference", **options)
    found = run_neunorm_stand_in(stand_in, case, tensors, groups=1, strip=strip, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


# Bytes of shared memory that a block may have on an H100, and on an RTX 4090.
H100_SHARED, RTX_4090_SHARED = 227 * 1024, 99 * 1024


@pytest.mark.parametrize(
    ("features", "positions", "scalar_bytes", "shared_bytes", "plan"),
    [
        pytest.param(64, 1024, 4, H100_SHARED, (32, 32, 64 * 1024), id="a strip for a warp"),
        pytest.param(65, 1024, 4, H100_SHARED, (16, 64, 65 * 512), id="too many features for that"),
        pytest.param(128, 1024, 4, H100_SHARED, (16, 64, 64 * 1024), id="float32"),
        pytest.param(128, 1024, 2, H100_SHARED, (32, 32, 64 * 1024), id="half"),
        pytest.param(128, 1024, 8, H100_SHARED, (8, 128, 64 * 1024), id="float64"),
        pytest.param(512, 256, 4, H100_SHARED, (8, 32, 128 * 1024), id="the shortest strip, and more than is wanted"),
        pytest.param(512, 256, 4, RTX_4090_SHARED, (8, 32, 0), id="or than there is"),
        pytest.param(872, 64, 4, H100_SHARED, (8, 8, 872 * 256), id="the most"),
        pytest.param(873, 64, 4, H100_SHARED, (8, 8, 0), id="more than the most"),
        pytest.param(1744, 64, 2, H100_SHARED, (8, 8, 1744 * 128), id="the most of a half type"),
        pytest.param(360, 64, 4, RTX_4090_SHARED, (8, 8, 360 * 256), id="the most elsewhere"),
        pytest.param(128, 289, 2, H100_SHARED, (32, 10, 64 * 1024), id="a strip that is not full"),
        pytest.param(10, 1, 4, H100_SHARED, (1, 1, 320), id="one position"),
        pytest.param(10, 5, 4, H100_SHARED, (8, 1, 2560), id="few"),
        pytest.param(10, 0, 4, H100_SHARED, (1, 0, 320), id="none"),
    ],
)
def test_neunorm_plan(
    stand_in: ModuleType,
    features: int,
    positions: int,
    scalar_bytes: int,
    shared_bytes: int,
    plan: tuple[int, int, int],
) -> None:
    backward = stand_in.plan_neunorm_backward(3, features, positions, scalar_bytes, shared_bytes)
    assert (backward.strip, backward.strips, backward.shared_bytes) == plan
    forward = stand_in.plan_neunorm_forward(5, features, positions, scalar_bytes, shared_bytes)
    assert (forward.strip, forward.strips, forward.shared_bytes) == (*plan[:2], features * plan[0])
    assert (forward.blocks, backward.blocks) == (5 * plan[1], 3 * plan[1])
    assert stand_in.neunorm_strips(features, positions, scalar_bytes) == plan[1]


@given(
    features=st.one_of(st.integers(1, 2000), st.integers(1, 2**40)),
    positions=st.integers(0, 2**20),
    scalar_bytes=st.sampled_from([2, 4, 8]),
    shared_bytes=st.sampled_from([0, 48 * 1024, RTX_4090_SHARED, H100_SHARED]),
)
def test_any_neunorm_plan(
    stand_in: ModuleType, features: int, positions: int, scalar_bytes: int, shared_bytes: int
) -> None:
    """Strips that a block's threads can share out, for every position; never more shared memory than there is."""
    scratch = NEUNORM_CHUNK * (256 + STRIP) * max(4, scalar_bytes)
    for plan in (
        stand_in.plan_neunorm_forward(2, features, positions, scalar_bytes, shared_bytes),
        stand_in.plan_neunorm_backward(2, features, positions, scalar_bytes, shared_bytes),
    ):
        assert plan.strip in (1, 2, 4, 8, 16, 32)
        assert plan.strip * (plan.strips - 1) < positions <= plan.strip * plan.strips
        assert plan.blocks == 2 * plan.strips
        assert plan.shared_bytes == 0 or scratch + plan.shared_bytes <= shared_bytes


def test_groups_of_samples(stand_in: ModuleType) -> None:
    """As many as fill a GPU, and never more than samples."""
    for batch, strips, groups in ((0, 1, 1), (5, 0, 1), (128, 32, 32), (20, 32, 20), (3, 5000, 1), (9, 1, 9)):
        assert stand_in.neunorm_groups(batch, strips) == groups


@every_dtype
def test_packs_are_no_wider_than_fits(stand_in: ModuleType, dtype: torch.dtype) -> None:
    kernels = kernels_of(stand_in, dtype)
    state = ops.state_dtype(dtype)
    widest = 16 // dtype.itemsize
    steps, neurons = CHUNK + 1, 2 * widest

    def shifted(array: np.ndarray, by: int) -> np.ndarray:
        return np.resize(array, array.size + by)[by:]

    rows, row = blank((steps, neurons), dtype), blank((neurons,), state)
    for launch, arrays in (
        (kernels.Forward, (rows, row, rows, row, row)),
        (kernels.Backward, (rows, row, row, rows, row, rows, row)),
    ):
        assert launch(steps, neurons, *arrays).widest_pack() == widest
        assert launch(steps, neurons, *[rows if array is rows else None for array in arrays]).widest_pack() == widest
        assert launch(steps, neurons + widest // 2, *arrays).widest_pack() == widest // 2
        assert launch(steps, neurons - 1, *arrays).widest_pack() == 1
        for i, array in enumerate(arrays):
            odd = launch(steps, neurons, *arrays[:i], shifted(array, 1), *arrays[i + 1 :])
            assert odd.widest_pack() == 1, i
            # A shift by half a pack; where that is 16 bytes of float32, a state is as well aligned as before.
            half = launch(steps, neurons, *arrays[:i], shifted(array, widest // 2), *arrays[i + 1 :])
            assert half.widest_pack() == (widest if widest // 2 * array.itemsize == 16 else widest // 2), i


H100, T4 = 132, 40  # multiprocessors


@pytest.mark.parametrize(
    ("steps", "neurons", "scalar_bytes", "widest", "processors", "forward", "backward"),
    [
        # rows, width, threads, blocks
        pytest.param(1, 2**24, 4, 4, H100, (1, 4, 128, 2**15), (1, 4, 128, 2**15), id="float32, T 1"),
        pytest.param(2, 2**24, 4, 4, H100, (2, 4, 128, 2**15), (2, 4, 128, 2**15), id="float32, T 2"),
        pytest.param(3, 2**24, 4, 4, H100, (4, 4, 128, 2**15), (4, 4, 128, 2**15), id="float32, T 3"),
        pytest.param(8, 2**24, 4, 4, H100, (8, 4, 128, 2**15), (8, 4, 128, 2**15), id="float32, T 8"),
        pytest.param(9, 2**24, 4, 4, H100, (0, 4, 128, 2**15), (0, 4, 128, 2**15), id="float32, T 9"),
        pytest.param(4, 2**24, 2, 8, H100, (4, 8, 128, 2**14), (4, 8, 128, 2**14), id="half, T 4"),
        pytest.param(5, 2**24, 2, 8, H100, (8, 8, 128, 2**14), (8, 4, 128, 2**15), id="half, T 5"),
        pytest.param(16, 2**24, 2, 8, H100, (0, 8, 128, 2**14), (0, 4, 128, 2**15), id="half, T 16"),
        pytest.param(4, 2**24, 8, 2, H100, (0, 1, 128, 2**17), (0, 1, 128, 2**17), id="float64"),
        pytest.param(4, 2**24 + 1, 4, 1, H100, (8, 1, 128, 2**17 + 1), (8, 1, 128, 2**17 + 1), id="an odd number"),
        pytest.param(9, 2**24 + 4, 2, 4, H100, (0, 1, 128, 2**17 + 1), (0, 4, 128, 2**15 + 1), id="four of half"),
        pytest.param(4, 1024 * H100, 4, 4, H100, (4, 4, 128, 2 * H100), (4, 4, 128, 2 * H100), id="enough for packs"),
        pytest.param(4, 1024 * H100 - 4, 4, 4, H100, (8, 1, 128, 8 * H100), (8, 1, 128, 8 * H100), id="too few"),
        pytest.param(4, 1024 * H100 - 4, 4, 4, T4, (4, 4, 128, 2 * H100), (4, 4, 128, 2 * H100), id="a smaller GPU"),
        pytest.param(9, 128 * H100, 4, 4, H100, (0, 1, 128, H100), (0, 1, 128, H100), id="large blocks"),
        pytest.param(9, 128 * H100 - 1, 4, 1, H100, (0, 1, 64, 2 * H100), (0, 1, 64, 2 * H100), id="smaller blocks"),
        pytest.param(1, 1, 2, 1, H100, (8, 1, 32, 1), (8, 1, 32, 1), id="one neuron"),
        pytest.param(1, 0, 4, 4, H100, (8, 1, 32, 0), (8, 1, 32, 0), id="none"),
        pytest.param(9, 2**40, 4, 4, H100, (0, 4, 128, 2**31), (0, 4, 128, 2**31), id="more than 2^31"),
    ],
)
def test_plan(
    stand_in: ModuleType,
    steps: int,
    neurons: int,
    scalar_bytes: int,
    widest: int,
    processors: int,
    forward: tuple[int, ...],
    backward: tuple[int, ...],
) -> None:
    for goes_back, expected in (False, forward), (True, backward):
        found = stand_in.plan_lif(steps, neurons, scalar_bytes, goes_back, widest, processors)
        assert (found.rows, found.width, found.threads, found.blocks) == expected


@given(
    steps=st.integers(1, 2 * CHUNK),
    neurons=st.one_of(st.integers(0, 2**20), st.integers(0, 2**40)),
    scalar_bytes=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    processors=st.integers(1, 200),
)
def test_any_plan(
    stand_in: ModuleType, steps: int, neurons: int, scalar_bytes: int, backward: bool, processors: int
) -> None:
    """Of a kernel that is compiled and can run so many steps; no pack is wider than fits, every neuron has its thread,
    and no block is idle."""
    widest = math.gcd(neurons, 16 // scalar_bytes)
    plan = stand_in.plan_lif(steps, neurons, scalar_bytes, backward, widest, processors)
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[scalar_bytes]
    compiled = kernels_of(stand_in, dtype).compiled_plans(steps, backward)
    assert (plan.rows, plan.width) in [(other.rows, other.width) for other in compiled]
    assert plan.width <= widest
    assert plan.threads in (32, 64, 128)
    block = plan.width * plan.threads
    assert block * (plan.blocks - 1) < neurons <= block * plan.blocks


def run_sanitized(*command: str, builds: Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitized build of stand_in."""
    # Python itself is not sanitized: the library must be there before its first malloc, and C++'s own before the
    # library looks for the exceptions of C++.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "STBP_CUDA_SANITIZED": str(builds),
        "STBP_CUDA_HYPOTHESIS": "quick",
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=builds / "sanitized",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_under_sanitizers(builds: Path) -> None:
    # Captured by pytest, the sanitizers' reports would be lost with the process that they end.
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", "-k", "agree or packs"]
    done = run_sanitized("-m", "pytest", *options, __file__, builds=builds)
    assert done.returncode == 0, done.stdout + done.stderr


LAUNCH = """
import numpy as np
import stand_in

steps, neurons, width = 3, 20, {}  # the kernels for up to 4 rows, or 8 of single numbers
x, spikes = (np.zeros(steps * neurons, np.float32) for _ in range(2))
{}
options = stand_in.Options(0.25, 0.75, 0.0, False, False, False, False, False, 0, 1.0)
plan = stand_in.Plan(4 if width > 1 else 8, width, 128, 1)
stand_in.float32.Forward(steps, neurons, x, None, spikes, None, None).launch(options, plan)
"""


@pytest.mark.parametrize(
    ("width", "mistake", "error"),
    [
        pytest.param(1, "x = x[:-1].copy()", "heap-buffer-overflow(?s:.*)READ of size 4 ", id="read"),
        pytest.param(1, "spikes = spikes[:-1].copy()", "heap-buffer-overflow(?s:.*)WRITE of size 4 ", id="write"),
        pytest.param(4, "spikes = spikes[:-1].copy()", "heap-buffer-overflow(?s:.*)WRITE of size 16 ", id="pack"),
        pytest.param(4, "x = np.zeros(x.size + 1, x.dtype)[1:]", "misaligned address", id="misaligned read"),
        pytest.param(4, "spikes = np.zeros(x.size + 1, x.dtype)[1:]", "misaligned address", id="misaligned write"),
    ],
)
def test_the_sanitizers_see_a_wrong_launch(width: int, mistake: str, error: str, builds: Path) -> None:
    right = run_sanitized("-c", LAUNCH.format(width, ""), builds=builds)
    assert right.returncode == 0, right.stderr
    wrong = run_sanitized("-c", LAUNCH.format(width, mistake), builds=builds)
    assert wrong.returncode != 0
    assert re.search(error, wrong.stderr), wrong.stderr
