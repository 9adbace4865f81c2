"""The CUDA kernels as nvcc compiles them, without a GPU: what ptxas and cuobjdump say of them."""

import re
import subprocess
from pathlib import Path

import compiled
import pytest
import torch
from compiled import MULTIPROCESSORS, SCALARS, Kernel

COMPILED = [*(("float32", architecture) for architecture in MULTIPROCESSORS), ("bfloat16", "90"), ("float16", "75")]
Kernels = dict[tuple[str, str], list[Kernel]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    try:
        compiled.find_tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return compiled.compile_all(COMPILED, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize(("scalar", "architecture"), COMPILED)
def test_nothing_leaves_the_registers(scalar: str, architecture: str, kernels: Kernels) -> None:
    """And a multiprocessor has at least two blocks, of which one computes while the other waits."""
    found = kernels[scalar, architecture]
    assert {kernel.name for kernel in found} == set(compiled.PARAMETERS)
    assert not [kernel for kernel in found if kernel.local]
    assert not [kernel for kernel in found if kernel.blocks < 2]


@pytest.mark.parametrize("scalar", ["float32", "bfloat16"])
def test_packs_move_in_16_bytes(scalar: str, kernels: Kernels) -> None:
    found = [
        kernel
        for kernel in kernels[scalar, "90"]
        if kernel.name.startswith("lif") and kernel.parameters["width"] * SCALARS[scalar][1] == 16
    ]
    assert len(found) > 8
    for kernel in found:
        assert kernel.loads.keys() == kernel.stores.keys() == {16}, kernel


def test_what_is_read() -> None:
    """From text like that of the tools."""
    neuron = "stbp::Lif<float, stbp::EitherReset, stbp::Heaviside, stbp::Rectangular<float> >"
    signature = f"void stbp::cuda::lif_backward<4, float, {neuron} >(stbp::NeuronBackward<float>, {neuron})"
    name, parameters, of = compiled.parse(signature) or ("", {}, "")
    assert (name, parameters) == ("lif_backward", {"width": 4})
    assert of == "Lif<float, EitherReset, Heaviside, Rectangular<float> >"
    assert compiled.parse("void other::fill<4>(float)") is None
    rows = compiled.parse(signature.replace("backward<4", "backward_rows<8, 4"))
    assert rows is not None
    assert rows[1] == {"rows": 8, "width": 4}
    tile = compiled.parse(f"void stbp::cuda::neunorm_forward<stbp::cuda::Tile<1, 4>, float, {neuron} >({neuron})")
    assert tile is not None
    assert tile[:2] == ("neunorm_forward", {"positions": 1, "features": 4})
    sums = compiled.parse("void stbp::cuda::general_gradients<float>(stbp::Extras<float>, stbp::cuda::GeneralPlan)")
    assert sums == ("general_gradients", {}, "float")
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.64.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   LDG.E.U16 R10, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R10, desc[UR4][R2.64] ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R12 ;
    """
    assert compiled.memory_widths(code, "LDG") == {16: 1, 8: 1, 4: 1, 2: 1}
    assert compiled.memory_widths(code, "STG") == {16: 1}


def test_instructions_of_loops() -> None:
    lines = [
        *("S2R R1, SR_TID.X", "LDG.E.128 R4, desc[UR4][R2.64]", "@!P0 FADD R1, R1, R4", "FMUL R1, R1, R1"),
        *("@P1 BRA 0x20", "IADD3 R2, R2, R3, RZ", "@P0 BRA 0x10", "EXIT", "BRA 0x80", "NOP"),
    ]
    code = "".join(f"        /*{16 * place:04x}*/      {line} ;  /* 0x1 */\n" for place, line in enumerate(lines))
    assert compiled.instructions_of(code, rows=4) == 8  # without the jump that nothing reaches, and NOP
    # The outer loop has six, from LDG on, three of which are the inner one.
    assert compiled.instructions_of(code, rows=None) == 6 + 3


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "architecture", "warps"),
    [
        *((32, 128, 0, "90", 64), (128, 128, 0, "90", 16), (129, 128, 0, "90", 12), (168, 128, 0, "80", 12)),
        *((255, 128, 0, "90", 8), (32, 128, 0, "75", 32), (64, 256, 0, "75", 32), (64, 256, 8192, "75", 32)),
        *((64, 256, 40960, "75", 8), (64, 256, 40960, "120", 16), (64, 256, 40960, "90", 32)),
    ],
)
def test_warps_at_once(registers: int, threads: int, shared: int, architecture: str, warps: int) -> None:
    """As NVIDIA's occupancy calculator has it. Of shared memory a block of sm_80 and later costs a KB more."""
    kernel = Kernel("lif_forward", {}, "float32", "", architecture, registers, threads, shared, 0, {}, {})
    assert kernel.warps == warps


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STBP_CUDA_BUILD", "0")
    with pytest.raises(FileNotFoundError, match="nvcc is neither"):
        compiled.find_tools()


def test_the_kernels_alone_are_built_in_one_line(tmp_path: Path) -> None:
    """bench/kernels.cu, with the line at its head but for the architecture of a GPU that need not be here."""
    try:
        nvcc, *_ = compiled.find_tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source = compiled.ROOT / "bench" / "kernels.cu"
    (line,) = re.findall(r"^//   nvcc (.*) -o kernels bench/kernels.cu && ./kernels ", source.read_text(), re.MULTILINE)
    flags = line.replace("-arch=native", "-arch=sm_90").split()
    program = tmp_path / "kernels"
    said = compiled.run(nvcc, *flags, "-Xptxas", "-O0", "-DSCALARS=BFloat16", "-o", program, source)
    assert "warning" not in said
    if not torch.cuda.is_available():
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("cudaGetDeviceProperties")
