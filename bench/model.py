"""What the compiled CUDA kernels say of themselves, and how near the bandwidth of memory a model puts them. Needs nvcc
and cuobjdump, and no GPU: nothing here is a measurement.

    python bench/model.py            every number type, for the architectures and GPUs of the tables: some two minutes
    python bench/model.py --quick    float32 for H100 and H200
    python bench/model.py --help     everything else

Compiles the kernels as setup.py does. ptxas tells their registers and what they spill; cuobjdump their instructions, of
which those that move global memory are counted. The model takes a multiprocessor to be as fast as the slowest of

- its share of the bandwidth, with the bytes that a neuron and step must move;
- its threads, each by itself: an instruction a clock, and LATENCY from a load to the first use of what it brings;
- its four schedulers, an instruction a clock each, with the instructions of a neuron and step, tails included.

Of neurons with normalisation, those are the instructions of their two loops over the features, with so many features
that what comes between them takes no time.

It knows nothing of how well DRAM keeps up with its data sheet (a copy does not reach that either), of the time the
first and the last threads are alone, of instructions that a unit takes longer for, and of threads in each other's way.
Prints tables, writes model-cuda.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "cuda_stand_in" / "instantiate.cu"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
SCALARS = {"float32": ("float", 4), "bfloat16": ("BFloat16", 2), "float16": ("Half", 2), "float64": ("double", 8)}
TABLE = ("75", "80", "90", "100", "120")

# Seconds from a load to its data while memory is busy: assumed, no data sheet tells it. For memory that does nothing
# else doi:10.1016/j.ultsonch.2023.106546, table 3, has a round 400 clocks, 284 ns on A100 and 228 on H100.
LATENCY = 800e-9
WARP, SCHEDULERS = 32, 4

# Threads, blocks and KB of shared memory that a multiprocessor holds, from the table of compute capabilities in CUDA's
# programming guide. Of the last, each block from 8.0 on takes one more for the system.
RESIDENT = {
    "75": (1024, 16, 64),
    "80": (2048, 32, 164),
    "89": (1536, 24, 100),
    "90": (2048, 32, 228),
    "100": (2048, 32, 228),
    "120": (1536, 24, 100),
}
REGISTERS = 65536  # of a multiprocessor, for all of these


@dataclass(frozen=True)
class Gpu:
    """From NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and GeForce RTX 4090: multiprocessors, GHz of the
    boost clock, GB/s of memory. H200 has H100's chip."""

    architecture: str
    processors: int
    clock: float
    bandwidth: float


GPUS = {
    "A100": Gpu("80", 108, 1.41, 2039),
    "H100": Gpu("90", 132, 1.98, 3350),
    "H200": Gpu("90", 132, 1.98, 4800),
    "RTX 4090": Gpu("89", 128, 2.52, 1008),
}


Instruction = tuple[int, str, str]  # its address, what it is, and its operands


@dataclass
class Kernel:
    """One kernel, as compiled for one architecture."""

    name: str  # lif_forward and so on
    scalar: str  # one of SCALARS
    width: int  # neurons of a thread
    surrogate: str  # empty forward
    smooth: bool
    architecture: str
    registers: int
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    shared: int = 0  # bytes of a block, without those a launch asks for
    instructions: int = 0
    per_neuron_step: float = 0.0  # instructions that are issued for one, in whole chunks
    loads: dict[int, int] = dataclasses.field(default_factory=dict)  # of global memory, by the bytes of one
    stores: dict[int, int] = dataclasses.field(default_factory=dict)
    under_way: int = 0  # the most bytes that loads of a thread are waiting for at once
    # Of whole chunks: a round of each loop that a thread is in most of the time, and how many steps that does.
    loops: list[tuple[list[Instruction], int]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def threads(self) -> int:
        """Of a block."""
        if self.name.startswith("lif"):
            return constant("kMostThreads")
        return constant("kNeuNormThreads")

    @property
    def resident(self) -> int:
        """Threads that a multiprocessor holds at once."""
        return self.resident_beside(0)

    @property
    def resident_holding(self) -> int:
        """The same where the gradients of a chunk are in shared memory and take as much of it as csrc/cuda/plan.h likes
        them to; on a GPU that has not so much for a block, they are not."""
        return (self.name == "neunorm_backward" and self.resident_beside(constant("kMostHeld"))) or self.resident

    def resident_beside(self, shared: int) -> int:
        """The same where a launch asks for so many bytes of shared memory."""
        most, blocks, kilobytes = RESIDENT[self.architecture]
        of_a_warp = -(-self.registers // 8) * 8 * WARP
        limits = [REGISTERS // of_a_warp // (self.threads // WARP), most // self.threads, blocks]
        if self.shared + shared:
            of_system = 0 if self.architecture == "75" else 1024
            limits.append(1024 * kilobytes // (self.shared + shared + of_system))
        return min(limits) * self.threads

    @property
    def row_bytes(self) -> int:
        """That a neuron and step must move: x and the spikes, or x and both gradients."""
        rows = 2 if self.name.endswith("forward") else 3
        return rows * SCALARS[self.scalar][1]

    @property
    def state_bytes(self) -> float:
        """The same of a long input's states."""
        return max(4, SCALARS[self.scalar][1]) / constant("kChunk" if self.name.startswith("lif") else "kNeuNormChunk")


def constant(name: str) -> int:
    """A number that csrc/cuda/ has."""
    for source in ("plan.h", "launch.h"):
        found = re.search(
            rf"constexpr int(?:64_t)? {name} = (?:(\d+) \* )?(\w+);", (ROOT / "csrc" / "cuda" / source).read_text()
        )
        if found:
            value = int(found[2]) if found[2].isdigit() else constant(found[2])
            return value * int(found[1] or 1)
    raise ValueError(f"csrc/cuda/ has no {name}")


def find_tools() -> tuple[Path, Path]:
    """nvcc, as setup.py finds it, and cuobjdump.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    nvcc = SETUP["find_nvcc"]()
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither in CUDA_HOME, nor on PATH, nor in the environment")
    folders = [Path(path) for path in sys.path]
    candidates = [path for folder in folders for path in sorted(folder.glob("nvidia/cu*/bin/cuobjdump"), reverse=True)]
    candidates += [folder / "triton/backends/nvidia/bin/cuobjdump" for folder in folders]
    candidates += [nvcc.parent / "cuobjdump", *map(Path, filter(None, [shutil.which("cuobjdump")]))]
    for candidate in candidates:
        # It calls the other, from beside itself or from PATH.
        if candidate.exists() and ((candidate.parent / "nvdisasm").exists() or shutil.which("nvdisasm")):
            return nvcc, candidate
    raise FileNotFoundError("no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def run(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def compiled(scalar: str, architecture: str, folder: Path) -> list[Kernel]:
    """All kernels of a number type for one architecture, with what ptxas and cuobjdump say of them."""
    nvcc, cuobjdump = find_tools()
    cubin = folder / f"{scalar}-{architecture}.cubin"
    flags = [*SETUP["NVCC_FLAGS"].split(), "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    said = run(nvcc, *flags, f"-DSTBP_SCALAR={SCALARS[scalar][0]}", SOURCE, "-o", cubin)
    code = disassembled(run("env", f"PATH={cuobjdump.parent}:{os.environ['PATH']}", cuobjdump, "-sass", cubin))
    kernels = []
    for symbol, stack, stored, loaded, registers, shared in re.findall(
        r"Function properties for (\S+)\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:.* (\d+) bytes smem)?",
        said,
    ):
        named = re.match(r"_ZN4stbp4cuda\d+((?:lif|neunorm)_(?:for|back)ward)ILi(\d+)E", symbol)
        if not named:
            continue
        surrogate = re.search(r"(?:Heaviside|Smooth)ENS_\d+([A-Za-z]+?)I", symbol)
        kernel = Kernel(
            name=named[1],
            scalar=scalar,
            width=int(named[2]) if named[1].startswith("lif") else 1,
            surrogate=surrogate[1] if surrogate else "",
            smooth="6SmoothE" in symbol,
            architecture=architecture,
            registers=int(registers),
            stack=int(stack),
            spilled=int(stored) + int(loaded),
            shared=int(shared or 0),
        )
        count(kernel, code[symbol])
        kernels.append(kernel)
    return kernels


def disassembled(text: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            current = functions[function[1]] = []
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)\s*(.*?);", line):
            current.append((int(found[1], 16), found[2], found[3]))
    return functions


def moved_bytes(operation: str) -> int:
    """Of one load or store, by a thread."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for suffix, size in sizes.items() if suffix in operation.split(".")), 4)


def widths(code: list[Instruction], kind: str) -> dict[int, int]:
    """How many loads or stores there are, by the bytes of one."""
    return dict(Counter(moved_bytes(operation) for _, operation, _ in code if operation.startswith(kind)))


def amount(code: list[Instruction], *kinds: str) -> int:
    return sum(operation.startswith(kinds) for _, operation, _ in code)


def count(kernel: Kernel, code: list[Instruction]) -> None:
    """Fill in what the instructions tell."""
    kernel.instructions = len(code)
    kernel.loads, kernel.stores = widths(code, "LDG"), widths(code, "STG")
    kernel.under_way = most_under_way(code)
    spans = sorted(
        (address - int(target[1], 16), int(target[1], 16), address)
        for address, operation, operands in code
        if operation.startswith("BRA")
        and (target := re.search(r"0x([0-9a-f]+)", operands))
        and int(target[1], 16) < address
    )

    def loop(span: tuple[int, int, int]) -> list[Instruction]:
        return [instruction for instruction in code if span[1] <= instruction[0] <= span[2]]

    def innermost(span: tuple[int, int, int]) -> bool:
        return not any(span[1] <= other[1] and other[2] <= span[2] for other in spans if other != span)

    if kernel.name.startswith("lif"):
        round_, steps = loop(spans[-1]), constant("kAtOnce")
        if kernel.name == "lif_backward":  # whose loop over chunks has a loop over their halves
            half = loop(max(span for span in spans if innermost(span)))
            end = round_.index(half[-1]) + 1
            round_[end:end] = half
            steps *= 2
        kernel.loops = [(round_, steps)]
    else:
        # Over the features, before the sum and after it, each compiled with shared memory to wait in, where it does
        # more with that, and without. Only the second stores rows.
        steps = constant("kNeuNormChunk")
        passes = [loop(span) for span in spans if innermost(span)]
        passes = [code for code in passes if amount(code, "LDG", "STG")]
        for chosen in (
            [c for c in passes if amount(c, "STG") < steps],
            [c for c in passes if amount(c, "STG") >= steps],
        ):
            if chosen:  # with smooth spikes nothing waits in shared memory
                code = max(chosen, key=lambda code: amount(code, "LDS", "STS"))
                features = amount(code, "LDG") // steps if amount(code, "STG") < steps else 1
                kernel.loops.append((code, features * steps))
    kernel.per_neuron_step = sum(len(code) / steps for code, steps in kernel.loops) / kernel.width


def most_under_way(code: list[Instruction]) -> int:
    """Walks the code from top to bottom. Loads return in order: the first instruction that has to do with the result of
    one waits for it and all before it."""
    waiting: list[tuple[set[int], int]] = []
    most = 0
    for _, operation, operands in code:
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}
        done = [i for i, (registers, _) in enumerate(waiting) if registers & used]
        if done:
            waiting = waiting[done[-1] + 1 :]
        if operation.startswith("LDG"):
            size = moved_bytes(operation)
            first = int(re.findall(r"\bR(\d+)\b", operands)[0])
            waiting.append((set(range(first, first + max(1, size // 4))), size))
            most = max(most, sum(size for _, size in waiting))
    return most


def round_seconds(code: list[Instruction], clock: float, latency: float = LATENCY) -> float:
    """How long a thread takes for a round of its loop, after some others, at an instruction a clock of so many GHz."""
    now = start = 0.0
    arrival: dict[int, float] = {}  # by register
    for _ in range(3):
        start = now
        for _, operation, operands in code:
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", operands)]
            for register in registers:
                now = max(now, arrival.pop(register, 0.0))
            now += 1e-9 / clock
            if operation.startswith("LDG"):
                end = registers[0] + max(1, moved_bytes(operation) // 4)
                arrival |= dict.fromkeys(range(registers[0], end), now + latency)
    return now - start


def predicted(kernel: Kernel, gpu: Gpu) -> dict[str, Any]:
    """What the model says, as shares of the bandwidth of the data sheet."""
    of_processor = 1e9 * gpu.bandwidth / gpu.processors  # bytes a second
    moved = kernel.row_bytes + kernel.state_bytes
    # A thread's, for a step of its neurons. By Little's law; loads are a part of what moves, stores wait for nobody.
    seconds = sum(round_seconds(code, gpu.clock) / steps for code, steps in kernel.loops)
    loaded = sum(
        moved_bytes(operation) / steps
        for code, steps in kernel.loops
        for _, operation, _ in code
        if operation.startswith("LDG")
    )
    resident = kernel.resident_holding
    of_step = moved * kernel.width
    limits = {
        "bandwidth": 1.0,
        "latency": resident * of_step / seconds / of_processor,
        "instructions": SCHEDULERS * WARP * 1e9 * gpu.clock / kernel.per_neuron_step * moved / of_processor,
    }
    binding = min(limits, key=lambda name: limits[name])
    return {
        "bytes_per_neuron_step": moved,
        "under_way_per_processor": resident * loaded * LATENCY / seconds,
        "needed_under_way": LATENCY * of_processor * loaded / of_step,
        "resident_threads": resident,
        "instructions_per_neuron_step": kernel.per_neuron_step,
        "limits": limits,
        "fraction": limits[binding],
        "limited_by": binding,
    }


def main_kernels(kernels: list[Kernel]) -> list[Kernel]:
    """Of each pass the widest that is trained with, with the paper's surrogate."""
    chosen: dict[tuple[str, str, str], Kernel] = {}
    for kernel in kernels:
        if kernel.surrogate in ("", "NoSurrogate", "Rectangular") and not kernel.smooth:
            key = (kernel.name, kernel.scalar, kernel.architecture)
            if key not in chosen or kernel.width > chosen[key].width:
                chosen[key] = kernel
    return list(chosen.values())


def picture(points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    kernels = list(dict.fromkeys(f"{point['scalar']}\n{point['kernel'].replace('_', chr(10))}" for point in points))
    gpus = list(dict.fromkeys(point["gpu"] for point in points))
    for i, gpu in enumerate(gpus):
        own = [point for point in points if point["gpu"] == gpu]
        places = [j + (i - (len(gpus) - 1) / 2) * 0.8 / len(gpus) for j in range(len(kernels))]
        spare = [min(limit for name, limit in point["limits"].items() if name != "bandwidth") for point in own]
        axis.bar(places, spare, 0.8 / len(gpus), label=gpu)
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(kernels)), kernels)
    axis.set(ylabel="what latency and instructions allow,\nof the bandwidth of memory", yscale="log")
    axis.set_title("A model, not a measurement: below the dashed line memory is not the limit", fontsize="medium")
    axis.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 for H100 and H200")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    args = parser.parse_args()
    try:
        nvcc, _ = find_tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    gpus = {name: gpu for name, gpu in GPUS.items() if not args.quick or gpu.architecture == "90"}
    architectures = (
        ("90",) if args.quick else tuple(sorted({*TABLE, *(gpu.architecture for gpu in gpus.values())}, key=int))
    )
    kernels: list[Kernel] = []
    seconds: dict[str, float] = {}  # for one architecture
    with tempfile.TemporaryDirectory() as folder:
        jobs = list(itertools.product(("float32",) if args.quick else SCALARS, architectures))
        for scalar, architecture in tqdm(jobs, desc="compiling", disable=None):
            start = time.perf_counter()
            kernels += compiled(scalar, architecture, Path(folder))
            seconds[scalar] = seconds.get(scalar, 0) + (time.perf_counter() - start) / len(architectures)
    points = []
    for name, gpu in gpus.items():
        for kernel in main_kernels(kernels):
            if kernel.architecture == gpu.architecture and kernel.scalar != "float64":
                points.append({"gpu": name, "kernel": kernel.name, "scalar": kernel.scalar, **predicted(kernel, gpu)})
    head = f"{'':37}{'B a step':>9}{'KB under way':>14}{'wanted':>8}{'threads':>9}{'instructions':>14}"
    print(f"{head}{'of peak':>9}  limit")
    for point in points:
        print(
            f"{point['gpu']:10}{point['scalar']:10}{point['kernel']:17}{point['bytes_per_neuron_step']:>9.2f}"
            f"{point['under_way_per_processor'] / 1024:>14.0f}{point['needed_under_way'] / 1024:>8.0f}"
            f"{point['resident_threads']:>9}{point['instructions_per_neuron_step']:>14.1f}{point['fraction']:>9.0%}"
            f"  {point['limited_by']}"
        )
    rows = []
    for kernel in kernels:
        row = dataclasses.asdict(dataclasses.replace(kernel, loops=[]))
        del row["loops"]
        row["resident_threads"] = kernel.resident
        row["resident_threads_holding"] = kernel.resident_holding
        rows.append(row)
    result = {
        "nvcc": SETUP["nvcc_version"](nvcc),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "compile_seconds": seconds,
        "latency": LATENCY,
        "gpus": {name: dataclasses.asdict(gpu) for name, gpu in gpus.items()},
        "kernels": rows,
        "model": points,
    }
    name = f"model-cuda{'-quick' if args.quick else ''}"
    args.out.mkdir(parents=True, exist_ok=True)
    harness.write_json(args.out / f"{name}.json", result)
    harness.save(picture(points), args.out / f"{name}.png")


if __name__ == "__main__":
    main()
