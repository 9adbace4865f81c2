"""The CUDA kernels where there is no GPU: their own source, compiled as C++ against a stand-in for nvcc's built-ins and
run thread after thread, against the reference and under sanitizers.
"""

import dataclasses
import importlib.util
import itertools
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
    random_tensors,
    run,
)
from test_neunorm import every_surrogate  # those that the kernels have here
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
NEUNORM_CHUNK = 8
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
    or fewer; from the general kernels of packs and of single neurons; smooth spikes from these alone."""
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

    def launch(io: Any, plan: Any) -> None:
        if isinstance(plan, bool):
            io.launch_general(options, plan)
        else:
            io.launch(options, plan)

    general = [True, False]  # packs or not
    both = [general if smooth else plans(backward) + general for backward in (False, True)]
    results = []
    for i in range(max(map(len, both))):
        there, back = (compiled[i % len(compiled)] for compiled in both)
        spikes, spikes_alone, grad_x = (blank((steps, neurons), dtype) for _ in range(3))
        potential = blank((neurons,), state)
        states = blank((kept, neurons), state) if kept else None
        grad_initial = None if initial is None else blank((neurons,), state)

        forward = kernels.Forward(steps, neurons, x, initial, spikes, potential, states)
        launch(forward, there)
        grad_final = last if case.final else None
        backward = kernels.Backward(steps, neurons, x, initial, states, gradient, grad_final, grad_x, grad_initial)
        launch(backward, back)
        widths = [plan.width for plan in (there, back) if not isinstance(plan, bool)]
        assert forward.widest_pack() == backward.widest_pack() >= max(widths, default=1)

        # Without the outputs that not every call needs.
        launch(kernels.Forward(steps, neurons, x, initial, spikes_alone, None, None), there)
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


def in_order(tensor: Tensor, channels_last: bool) -> Tensor:
    """``[..., C, P]`` as it lies in memory."""
    return tensor.transpose(-1, -2).contiguous() if channels_last else tensor


def run_neunorm_stand_in(
    stand_in: ModuleType,
    case: test_neunorm.Case,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    groups: int,
    split: Any,
    channels_last: bool,
    widest: int,
    shared_bytes: int,
    surrogate: str,
    reset: str,
    smooth: bool = False,
) -> list[Tensor | None]:
    """The results of ``test_neunorm.run`` and all else that the kernels leave: dL/dweight of every group, dL/d(both
    decays) of every group and strip, sums, maps and states."""
    dtype = tensors[0].dtype
    state = ops.state_dtype(dtype)
    kernels = kernels_of(stand_in, dtype)
    options = options_of(stand_in, case, surrogate, reset, smooth=smooth)
    x, weight, gradient = (copy_of(in_order(tensor, channels_last)) for tensor in tensors)
    features, positions = case.shape
    space = (positions, features) if channels_last else (features, positions)
    shape = [case.steps, case.batch, features, positions]
    kept = (case.steps - 1) // NEUNORM_CHUNK
    strips = -(-positions // split.strip)
    decays = copy_of(torch.tensor([case.decay, case.norm_decay], dtype=state)) if case.learned else None
    normalised, grad_x = (blank(tuple(x.shape), dtype) for _ in range(2))
    sums, maps = (blank((case.steps, case.batch, positions), state) for _ in range(2))
    states = blank((kept, case.batch, *space), state) if kept else None
    carried = blank((groups, *space), state) if kept else None
    grad_weight = blank((groups, *space), state)
    grad_decays = blank((groups, strips, 2), state) if case.learned else None
    common = (case.norm_decay, case.scaling == "1/F^2", channels_last)
    forward = kernels.NeuNormForward(shape, *common, x, weight, decays, normalised, sums, maps, states)
    arrays = (x, weight, decays, sums, maps, states, gradient, grad_x, grad_weight, grad_decays, carried)
    backward = kernels.NeuNormBackward(shape, *common, groups, *arrays)
    for io in (forward, backward):
        plan = io.plan(split, min(widest, io.widest_pack()), shared_bytes)
        assert plan.strips == strips
        assert (plan.shared_bytes > 0) == (shared_bytes > 0)
        io.launch(options, plan)
    assert carried is None or not result(carried, state).isnan().any()

    def found(array: np.ndarray | None, of: torch.dtype, ordered: bool = True) -> Tensor | None:
        if array is None:
            return None
        tensor = result(array, of)
        return in_order(tensor, True) if ordered and channels_last else tensor

    results = [found(normalised, dtype), found(grad_x, dtype), found(grad_weight, state)]
    results += [found(grad_decays, state, False), found(sums, state, False), found(maps, state, False)]
    return [*results, found(states, state)]


def bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def run_every_neunorm_kernel(
    stand_in: ModuleType,
    case: test_neunorm.Case,
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    groups: int,
    split: Any,
    **options: Any,
) -> test_neunorm.Results:
    """The results of ``test_neunorm.run``, after a look whether both orders, all tiles, and shared memory or none give
    the same bits."""
    first, *others = (
        run_neunorm_stand_in(
            stand_in,
            case,
            tensors,
            groups=groups,
            split=split,
            channels_last=channels_last,
            widest=widest,
            shared_bytes=shared_bytes,
            **options,
        )
        for channels_last, widest, shared_bytes in itertools.product((False, True), (8, 1), (2**20, 0))
    )
    for other in others:
        assert [bits(tensor) for tensor in other] == [bits(tensor) for tensor in first]
    assert not any(tensor.isnan().any() for tensor in first if tensor is not None)
    normalised, grad_x, grad_weight, grad_decays, *_ = first
    assert normalised is not None
    assert grad_x is not None
    assert grad_weight is not None
    return normalised, grad_x, grad_weight.sum(0), None if grad_decays is None else grad_decays.sum((0, 1))


# Around the ends of chunks, of strips, of packs, and of what the teams of a block share; a block here costs
# milliseconds.
neunorm_cases = st.builds(
    dataclasses.replace,
    test_neunorm.cases,
    steps=st.sampled_from([1, 2, NEUNORM_CHUNK, NEUNORM_CHUNK + 1, 2 * NEUNORM_CHUNK + 3]),
    batch=st.integers(1, 2),
    shape=st.tuples(
        st.one_of(st.integers(1, 9), st.sampled_from([12, 15, 16, 36])), st.sampled_from([1, 2, 7, 8, 9, 18])
    ),
    folded=st.just(False),
)
# Teams, lanes and strips of a block: whole warps where one has all teams of a position.
splits = st.sampled_from([(8, 8, 4), (4, 16, 8), (32, 4, 1), (1, 32, 32), (16, 2, 2)])
LARGE_NEUNORM = test_neunorm.Case(2 * NEUNORM_CHUNK + 3, 3, (44, 13))
few = settings(max_examples=2 if SANITIZED is None else 1)


def split_of(stand_in: ModuleType, case: test_neunorm.Case, teams_lanes_strip: tuple[int, int, int]) -> Any:
    return stand_in.NeuNormSplit(4 if case.shape[0] % 4 == 0 else 1, *teams_lanes_strip)


@every_surrogate
@every_reset
@every_dtype
@few
@given(case=neunorm_cases, groups=st.integers(1, 2), split=splits)
@example(case=LARGE_NEUNORM, groups=2, split=(8, 8, 4))
def test_neunorm_agrees_with_the_reference(
    stand_in: ModuleType,
    case: test_neunorm.Case,
    groups: int,
    split: tuple[int, int, int],
    surrogate: str,
    reset: str,
    dtype: torch.dtype,
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset}
    tensors = x, weight, gradient = test_neunorm.random_tensors(case, dtype, "cpu")
    own = {"groups": min(groups, case.batch), "split": split_of(stand_in, case, split)}
    ours = run_every_neunorm_kernel(stand_in, case, tensors, **own, **options)
    wide = (x.to(weight.dtype), weight, gradient.to(weight.dtype))
    test_neunorm.assert_agree(ours, test_neunorm.run(case, wide, backend="reference", **options), tensors)


@every_surrogate
@every_reset
@few
@given(case=neunorm_cases, split=splits)
def test_neunorm_with_smooth_spikes_agrees_with_the_reference(
    stand_in: ModuleType, case: test_neunorm.Case, split: tuple[int, int, int], surrogate: str, reset: str
) -> None:
    options: dict[str, Any] = {"surrogate": surrogate, "reset": reset, "smooth": True}
    tensors = test_neunorm.random_tensors(case, torch.float64, "cpu")
    expected = test_neunorm.run(case, tensors, backend="reference", **options)
    own = split_of(stand_in, case, split)
    found = run_every_neunorm_kernel(stand_in, case, tensors, groups=1, split=own, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


# Bytes of shared memory that a block may have on an H100, and on an RTX 4090.
H100_SHARED, RTX_4090_SHARED = 227 * 1024, 99 * 1024


@pytest.mark.parametrize(
    ("features", "positions", "scalar_bytes", "split"),
    [
        pytest.param(64, 1024, 4, (4, 8, 32, 32), id="lanes for a warp"),
        pytest.param(72, 1024, 4, (4, 8, 16, 16), id="too many features for that"),
        pytest.param(128, 1024, 4, (4, 16, 16, 16), id="float32"),
        pytest.param(128, 1024, 2, (4, 16, 16, 16), id="half: a lane has two positions"),
        pytest.param(128, 1024, 8, (1, 32, 8, 8), id="float64 has no packs"),
        pytest.param(256, 1024, 4, (4, 32, 8, 8), id="the fewest lanes"),
        pytest.param(512, 256, 4, (4, 32, 8, 4), id="a shorter strip"),
        pytest.param(1024, 64, 4, (4, 32, 8, 2), id="and shorter"),
        pytest.param(1024, 64, 2, (4, 32, 8, 4), id="half"),
        pytest.param(100000, 64, 4, (4, 32, 8, 1), id="the shortest"),
        pytest.param(96, 1024, 4, (4, 8, 16, 16), id="fewer teams, so that none has less to do"),
        pytest.param(100, 1024, 4, (4, 16, 16, 16), id="where that helps"),
        pytest.param(15, 1024, 4, (1, 8, 32, 32), id="no packs"),
        pytest.param(3, 1024, 4, (1, 4, 32, 32), id="fewer features than teams"),
        pytest.param(10, 1, 4, (1, 16, 2, 2), id="one position"),
        pytest.param(512, 1, 2, (4, 32, 1, 1), id="one position, many features"),
        pytest.param(1, 1, 4, (1, 1, 32, 32), id="one neuron"),
        pytest.param(12, 5, 4, (4, 4, 8, 8), id="few positions"),
        pytest.param(12, 0, 4, (4, 4, 8, 8), id="none"),
    ],
)
def test_neunorm_split(
    stand_in: ModuleType, features: int, positions: int, scalar_bytes: int, split: tuple[int, int, int, int]
) -> None:
    found = stand_in.split_neunorm(features, positions, scalar_bytes)
    assert (found.pack, found.teams, found.lanes, found.strip) == split
    assert stand_in.neunorm_strips(features, positions, scalar_bytes) == -(-positions // found.strip)


def neunorm_plan(
    stand_in: ModuleType,
    dtype: torch.dtype,
    features: int,
    positions: int,
    channels_last: bool,
    widest: int = 8,
    shared_bytes: int = H100_SHARED,
) -> Any:
    """Of the backward pass, with 3 groups of 5 samples."""
    io = kernels_of(stand_in, dtype).NeuNormBackward(
        [1, 5, features, positions], 0.5, False, channels_last, 3, *[None] * 11
    )
    split = stand_in.split_neunorm(features, positions, dtype.itemsize)
    return io.plan(split, min(widest, io.widest_pack()), shared_bytes)


@pytest.mark.parametrize(
    ("dtype", "features", "positions", "channels_last", "widest", "shared", "plan"),
    # plan: positions and features of a tile, threads, rows, tiles, KB of shared memory
    [
        pytest.param(torch.float32, 128, 1024, False, 8, H100_SHARED, (1, 1, 256, 64, 8, 64), id="float32"),
        pytest.param(torch.float32, 128, 1024, True, 8, H100_SHARED, (1, 4, 256, 64, 2, 64), id="its packs"),
        pytest.param(torch.float32, 128, 1024, True, 2, H100_SHARED, (1, 1, 256, 64, 8, 64), id="not aligned"),
        pytest.param(torch.bfloat16, 128, 1024, False, 8, H100_SHARED, (2, 1, 256, 32, 8, 64), id="half: pairs"),
        pytest.param(torch.bfloat16, 128, 1024, True, 8, H100_SHARED, (1, 4, 256, 64, 2, 32), id="its packs, too"),
        pytest.param(torch.bfloat16, 128, 1023, False, 8, H100_SHARED, (1, 1, 256, 64, 8, 32), id="an odd number"),
        pytest.param(torch.bfloat16, 126, 1024, True, 8, H100_SHARED, (1, 1, 256, 64, 8, 32), id="odd features"),
        pytest.param(torch.bfloat16, 128, 16, False, 8, H100_SHARED, (2, 1, 128, 1, 8, 32), id="half the lanes"),
        pytest.param(torch.float64, 128, 1024, True, 8, H100_SHARED, (1, 1, 256, 128, 4, 64), id="float64"),
        pytest.param(
            torch.float32, 512, 256, False, 8, H100_SHARED, (1, 1, 256, 32, 16, 128), id="one block at a time"
        ),
        pytest.param(torch.float32, 512, 256, True, 8, H100_SHARED, (1, 4, 128, 64, 4, 64), id="smaller blocks"),
        pytest.param(
            torch.float32, 512, 256, False, 8, RTX_4090_SHARED, (1, 1, 256, 32, 16, 0), id="more than there is"
        ),
        pytest.param(torch.float32, 512, 256, True, 8, RTX_4090_SHARED, (1, 4, 128, 64, 4, 64), id="but not here"),
        pytest.param(torch.float32, 1024, 1, False, 8, H100_SHARED, (1, 4, 32, 1, 8, 32), id="one position is both"),
        pytest.param(torch.float32, 12, 0, True, 8, H100_SHARED, (1, 4, 32, 0, 1, 4), id="none"),
    ],
)
def test_neunorm_plan(
    stand_in: ModuleType,
    dtype: torch.dtype,
    features: int,
    positions: int,
    channels_last: bool,
    widest: int,
    shared: int,
    plan: tuple[int, int, int, int, int, int],
) -> None:
    found = neunorm_plan(stand_in, dtype, features, positions, channels_last, widest, shared)
    tile = (found.tile_positions, found.tile_features)
    assert (*tile, found.threads, found.rows, found.tiles, found.shared_bytes // 1024) == plan
    assert found.blocks == 3 * found.rows


@given(
    features=st.one_of(st.integers(1, 2000), st.integers(1, 2**31 - 1)),
    positions=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
    shared_bytes=st.sampled_from([0, 48 * 1024, RTX_4090_SHARED, H100_SHARED]),
)
def test_any_neunorm_plan(
    stand_in: ModuleType, features: int, positions: int, dtype: torch.dtype, channels_last: bool, shared_bytes: int
) -> None:
    """Teams and strips that a block's threads can share out, for every position; never more shared memory than there
    is."""
    plan = neunorm_plan(stand_in, dtype, features, positions, channels_last, 8, shared_bytes)
    assert plan.teams in (1, 2, 4, 8, 16, 32)
    assert plan.lanes in (1, 2, 4, 8, 16, 32)
    block = plan.lanes * plan.tile_positions
    assert block % plan.strip == 0
    assert block * (plan.rows - 1) < positions <= block * plan.rows
    assert plan.strip * (plan.strips - 1) < positions <= plan.strip * plan.strips
    assert 16 <= plan.threads <= 256
    assert plan.tile_features == 1 or plan.threads % 32 == 0
    assert features % plan.pack == 0
    assert plan.tiles * plan.tile_features * plan.teams >= features
    scratch = (256 if plan.tile_features > 1 else NEUNORM_CHUNK * (256 + 32)) * max(4, dtype.itemsize)
    assert plan.shared_bytes == 0 or scratch + plan.shared_bytes <= shared_bytes


def test_groups_of_samples(stand_in: ModuleType) -> None:
    """As many as fill a GPU, and never more than samples; the same in both orders and for all GPUs."""
    for batch, positions, groups in ((0, 16, 1), (5, 0, 1), (128, 512, 32), (20, 512, 20), (3, 80000, 1), (9, 1, 9)):
        assert stand_in.neunorm_groups(batch, 128, positions, 4) == groups


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
        "OMP_NUM_THREADS": "1",  # the tensors are small, and the other cores have tests of their own
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
    # Every kernel with one surrogate, on which no address depends, and every surrogate in one test of every type.
    tests = "spatial_only or smooth or packs or agrees and rectangular"
    # Captured by pytest, the sanitizers' reports would be lost with the process that they end.
    options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "--capture=sys", "-k", tests]
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
