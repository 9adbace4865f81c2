"""The CUDA kernels as nvcc compiles them, without a GPU: what ptxas and cuobjdump say, as bench/model.py reads it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model
import pytest
from model import Kernel, constant

from stbp_cuda.surrogate import SURROGATES

COMPILED = [*(("float32", architecture) for architecture in model.TABLE), ("bfloat16", "90"), ("float16", "75")]
Compiled = dict[tuple[str, str], list[Kernel]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    try:
        model.find_tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("compiled")

    def compile_one(of: tuple[str, str]) -> list[Kernel]:
        return model.compiled(*of, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(COMPILED, pool.map(compile_one, COMPILED), strict=True))


@pytest.mark.parametrize(("scalar", "architecture"), COMPILED)
def test_nothing_leaves_the_registers(scalar: str, architecture: str, compiled: Compiled) -> None:
    kernels = compiled[scalar, architecture]
    widths = 2 if scalar == "float32" else 3
    # Of LIF each width, and with normalisation, the forward pass and the backward pass for every surrogate.
    assert len(kernels) == (widths + 1) * (1 + len(SURROGATES))
    spilling = [kernel for kernel in kernels if kernel.stack or kernel.spilled]
    assert not spilling
    # At least two blocks at a time, so that one computes while the other waits.
    assert min(kernel.resident // kernel.threads for kernel in kernels) >= 2


@pytest.mark.parametrize("scalar", ["float32", "bfloat16"])
def test_packs_move_in_16_bytes_and_once(scalar: str, compiled: Compiled) -> None:
    """With the loads of the next steps under way before a step needs its own."""
    steps = constant("kAtOnce")
    state_words = 1 if scalar == "float32" else 2  # 8 states of a half type's pack are 32 bytes
    for kernel in compiled[scalar, "90"]:
        if kernel.name == "lif_forward" and kernel.width > 2:
            # The first rows, and in the loop those of the next round; the initial state. The spikes, and two states.
            assert kernel.loads == {16: 2 * steps + state_words}
            assert kernel.stores == {16: steps + 2 * state_words}
            assert kernel.under_way >= 16 * steps
        elif kernel.name == "lif_backward" and kernel.width > 2:
            # Both halves of a chunk's currents, and in the loop over them a half's gradients; two states. dL/dx; one.
            assert kernel.loads == {16: 3 * steps + 2 * state_words}
            assert kernel.stores == {16: steps + state_words}
            assert kernel.under_way >= 16 * steps * 2


@pytest.mark.parametrize("scalar", ["float32", "bfloat16"])
def test_how_often_a_thread_waits(scalar: str, compiled: Compiled) -> None:
    """Of rounds of their loop, in latencies of memory: forward once for the rows of the next round; backward once for a
    chunk's currents and, as a half's gradients come in two groups of kAhead, twice for each half."""
    for kernel in compiled[scalar, "90"]:
        if kernel.name.startswith("lif") and kernel.width > 2:
            waits = {"lif_forward": 1, "lif_backward": 5}[kernel.name]
            ((code, _),) = kernel.loops
            assert model.round_seconds(code, clock=1e9, latency=1.0) == pytest.approx(waits, abs=1e-3)


@pytest.mark.parametrize(
    ("neurons", "scalar", "gpu"),
    [
        *(("lif", scalar, gpu) for scalar in ("float32", "bfloat16") for gpu in ("H100", "H200")),
        ("neunorm", "float32", "H100"),
    ],
)
def test_memory_is_the_limit(neurons: str, scalar: str, gpu: str, compiled: Compiled) -> None:
    """By the model, with the surrogate of the papers."""
    kernels = [kernel for kernel in model.main_kernels(compiled[scalar, "90"]) if kernel.name.startswith(neurons)]
    assert {kernel.name for kernel in kernels} == {f"{neurons}_forward", f"{neurons}_backward"}
    for kernel in kernels:
        found = model.predicted(kernel, model.GPUS[gpu])
        assert found["limited_by"] == "bandwidth", found


def test_what_the_model_takes_for_the_two_passes_over_the_features(compiled: Compiled) -> None:
    """Those with shared memory: two features' rows and what goes with them, then one's; spikes wait as a byte."""
    steps = constant("kNeuNormChunk")
    shapes = {
        # LDG, STG, LDS, STS: x and a state twice, of each feature a state and a byte; a weight, the byte, y.
        "neunorm_forward": [(2 * (steps + 1), 2, 0, 2), (1, steps, 1, 0)],
        # g, a weight and a sum, which comes back, and g waits, and a is there; x, a state and dL/dv, both g and u.
        "neunorm_backward": [(2 * (steps + 2), 2, 2 * steps, 2 * steps), (steps + 2, steps + 1, None, steps)],
    }
    for kernel in compiled["float32", "90"]:
        if not kernel.name.startswith("neunorm"):
            continue
        assert [count for _, count in kernel.loops] == [2 * steps, steps]
        for (code, _), shape in zip(kernel.loops, shapes[kernel.name], strict=True):
            found = tuple(model.amount(code, kind) for kind in ("LDG", "STG", "LDS", "STS"))
            assert all(want is None or got == want for got, want in zip(found, shape, strict=True)), (
                kernel.name,
                found,
            )


def test_what_is_under_way() -> None:
    code = model.disassembled("""
        Function : f
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0 */
        /*0010*/              @!P0 LDG.E.64.CONSTANT R8, desc[UR4][R2.64+0x10] ;    /* 0x0 */
        /*0020*/                   FADD R12, R9, R9 ;    /* 0x0 */
        /*0030*/                   LDG.E.U16 R10, desc[UR4][R2.64] ;    /* 0x0 */
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R12 ;    /* 0x0 */
        /*0050*/               @P1 BRA 0x0 ;    /* 0x0 */
    """)["f"]
    assert len(code) == 6
    assert model.most_under_way(code) == 24
    # Two loads, 100 ns until FADD has the second's, and four more instructions; nobody waits for the third's.
    assert model.round_seconds(code, clock=1.0, latency=100e-9) == pytest.approx((2 + 100 + 4) * 1e-9)
    assert model.widths(code, "LDG") == {16: 1, 8: 1, 2: 1}
    assert model.widths(code, "STG") == {16: 1}


@pytest.mark.parametrize(
    ("registers", "architecture", "resident"),
    [(32, "90", 2048), (128, "90", 512), (129, "90", 384), (168, "80", 384), (255, "80", 256), (32, "75", 1024)],
)
def test_threads_at_once(registers: int, architecture: str, resident: int) -> None:
    """As NVIDIA's occupancy calculator has it, for blocks of 128."""
    assert Kernel("lif_forward", "float32", 4, "", False, architecture, registers, 0, 0).resident == resident


@pytest.mark.parametrize(
    ("shared", "architecture", "resident"),
    [(0, "75", 1024), (8192, "75", 1024), (40960, "75", 256), (40960, "89", 512), (40960, "90", 1024)],
)
def test_threads_beside_shared_memory(shared: int, architecture: str, resident: int) -> None:
    """The same for blocks of 256, of which sm_75 can give 64 KB and sm_89 100, a KB of each block the system's."""
    kernel = Kernel("neunorm_forward", "float32", 1, "", False, architecture, 64, 0, 0, shared)
    assert kernel.resident == resident


@pytest.mark.parametrize(("architecture", "resident"), [("75", 1024), ("80", 512), ("89", 256), ("90", 768)])
def test_threads_beside_gradients(architecture: str, resident: int) -> None:
    """The same, with the 64 KB of gradients that sm_75 has no room for."""
    kernel = Kernel("neunorm_backward", "float32", 1, "", False, architecture, 64, 0, 0, 8192)
    assert kernel.resident_holding == resident


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STBP_CUDA_BUILD", "0")
    with pytest.raises(FileNotFoundError, match="nvcc is neither"):
        model.find_tools()
