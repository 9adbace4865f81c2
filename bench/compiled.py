"""What the compiler made of the CUDA kernels: registers, warps a multiprocessor, and bytes that left the registers; and
how many instructions the LIF kernels take a neuron and step.

    python bench/compiled.py            every number type for the architectures of the table: some three minutes
    python bench/compiled.py --help     everything else

Compiles the kernels as setup.py does, and reads what ptxas and cuobjdump say of them. Needs nvcc and cuobjdump, and no
GPU. Prints a table, writes compiled-cuda.json.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from stbp_cuda.surrogate import SURROGATES, MultiGaussian

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "cuda_stand_in" / "instantiate.cu"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
SCALARS = {"float32": ("float", 4), "bfloat16": ("BFloat16", 2), "float16": ("Half", 2), "float64": ("double", 8)}
PLAIN = {name: kind for name, kind in SURROGATES.items() if kind is not MultiGaussian}  # those of the plain kernels
# What the integers mean that come first among a kernel's template arguments.
PARAMETERS = {
    "lif_forward": ("width",),
    "lif_backward": ("width",),
    "lif_forward_rows": ("rows", "width"),
    "lif_backward_rows": ("rows", "width"),
    "general_forward": ("width",),
    "general_backward": ("width",),
    "general_gradients": (),
    "neunorm_forward": ("positions", "features"),
    "neunorm_backward": ("positions", "features"),
}
COUNTED = "90"  # the architecture whose instructions are counted
# Rows that the plain kernels for any T, and the general ones, load at once.
AT_ONCE = int(re.findall(r"kAtOnce = (\d+)", (ROOT / "csrc" / "cuda" / "launch.h").read_text())[0])
GENERAL_AT_ONCE = int(re.findall(r"kGeneralAtOnce = (\d+)", (ROOT / "csrc" / "cuda" / "plan.h").read_text())[0])

WARP, REGISTERS = 32, 65536  # threads of a warp; registers of a multiprocessor, on every architecture of the table
# Threads, blocks and KB of shared memory of a multiprocessor, from the table of compute capabilities in CUDA's
# programming guide.
MULTIPROCESSORS = {
    "75": (1024, 16, 64),
    "80": (2048, 32, 164),
    "90": (2048, 32, 228),
    "100": (2048, 32, 228),
    "120": (1536, 24, 100),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel, as compiled for one architecture."""

    name: str  # lif_forward and so on
    parameters: dict[str, int]  # see PARAMETERS
    scalar: str  # one of SCALARS
    neuron: str  # with its reset and surrogate
    architecture: str
    registers: int
    threads: int  # of a block, at most
    shared: int  # bytes of a block, without those that a launch asks for
    local: int  # bytes of a stack frame, and spilled bytes, stored and loaded
    loads: dict[int, int]  # of global memory: how many instructions, by the bytes of one
    stores: dict[int, int]
    instructions: float | None = None  # a neuron and step, of LIF kernels with one surrogate

    @property
    def blocks(self) -> int:
        """That a multiprocessor holds at once."""
        threads, blocks, kilobytes = MULTIPROCESSORS[self.architecture]
        of_a_warp = -(-self.registers // 8) * 8 * WARP  # registers are given out in units of 256
        limits = [REGISTERS // of_a_warp // (self.threads // WARP), threads // self.threads, blocks]
        if self.shared:
            of_system = 0 if self.architecture == "75" else 1024
            limits.append(1024 * kilobytes // (self.shared + of_system))
        return min(limits)

    @property
    def warps(self) -> int:
        return self.blocks * self.threads // WARP

    @property
    def under_way(self) -> int:
        """Bytes of rows that the warps of a multiprocessor ask for at once: of x, and backward also of a gradient, or
        of x of a whole chunk."""
        at_once = GENERAL_AT_ONCE if self.name.startswith("general") else AT_ONCE
        rows = self.parameters.get("rows", at_once) * (1 if "forward" in self.name else 2)
        return self.warps * WARP * rows * self.parameters["width"] * SCALARS[self.scalar][1]


def find_tools() -> tuple[Path, Path, Path]:
    """nvcc, as setup.py finds it, cuobjdump, and c++filt.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    nvcc = SETUP["find_nvcc"]()
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither in CUDA_HOME, nor on PATH, nor in the environment")
    demangler = shutil.which("c++filt")
    if demangler is None:
        raise FileNotFoundError("no c++filt on PATH: it comes with binutils")
    folders = [Path(path) for path in sys.path]
    candidates = [path for folder in folders for path in sorted(folder.glob("nvidia/cu*/bin/cuobjdump"), reverse=True)]
    candidates += [folder / "triton/backends/nvidia/bin/cuobjdump" for folder in folders]
    candidates += [nvcc.parent / "cuobjdump", *map(Path, filter(None, [shutil.which("cuobjdump")]))]
    for candidate in candidates:
        # cuobjdump calls nvdisasm, from beside itself or from PATH.
        if candidate.exists() and ((candidate.parent / "nvdisasm").exists() or shutil.which("nvdisasm")):
            return nvcc, candidate, Path(demangler)
    raise FileNotFoundError("no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def run(*command: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")
    return done.stdout


def template_arguments(text: str) -> list[str]:
    """ "1, A<B, C>, D" as ["1", "A<B, C>", "D"]."""
    depth, arguments = 0, [""]
    for character in text:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return [argument.strip() for argument in arguments]


def parse(signature: str) -> tuple[str, dict[str, int], str] | None:
    """Name, parameters and neuron of a demangled kernel; None for another function."""
    found = re.match(r"void stbp::cuda::(\w+)<(.*)>\(", signature.replace("(int)", ""))
    if found is None:
        return None
    arguments = template_arguments(re.sub(r"stbp::cuda::Tile<(\d+), (\d+)>", r"\1, \2", found[2]))
    values = [int(argument) for argument in itertools.takewhile(str.isdigit, arguments)]
    names = PARAMETERS[found[1]]
    if len(names) != len(values):
        raise ValueError(f"PARAMETERS of bench/compiled.py has {names} for {signature}")
    return found[1], dict(zip(names, values, strict=True)), re.sub(r"\w+::", "", arguments[-1])


def memory_widths(code: str, kind: str) -> dict[int, int]:
    """How many LDG or STG instructions there are, by the bytes that a thread moves with one."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = re.findall(rf"\*/\s+(?:@!?U?P\w+ +)?{kind}\.([A-Z0-9_.]*)", code)
    return dict(Counter(next((sizes[s] for s in suffixes.split(".") if s in sizes), 4) for suffixes in found))


def instructions_of(code: str, rows: int | None) -> int:
    """How many instructions a thread issues for a kernel with so many rows, or for a round of the outermost loop where
    that is None: a half's loop, the inner one of the backward kernel, goes round twice in it."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]*)\s*(.*?);", code, re.MULTILINE)
    addresses = [int(address, 16) for address, operation, _ in found if operation != "NOP"]
    jumps = [(int(address, 16), rest) for address, operation, rest in found if operation == "BRA"]
    targets = [(address, int(rest.split()[-1].strip("`()"), 16)) for address, rest in jumps]
    loops = [(target, address) for address, target in targets if target < address]  # the last instruction, a trap, too
    if rows is not None:
        return len(addresses) - 1

    def inside(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address in addresses)

    outer = max(loops, key=inside)
    inner = [loop for loop in loops if loop != outer and outer[0] <= loop[0] and loop[1] <= outer[1]]
    return inside(outer) + max(map(inside, inner), default=0)


def sections(text: str, heading: str) -> dict[str, str]:
    """A text by its headings: lines that start with a pattern and go on with a name."""
    parts = (part.partition("\n") for part in re.split(f"^{heading}", text, flags=re.MULTILINE)[1:])
    return {name.strip(): body for name, _, body in parts}


def compiled(scalar: str, architecture: str, folder: Path, surrogate: str = "") -> list[Kernel]:
    """All kernels of a number type for one architecture, with what ptxas and cuobjdump say of them.

    With one surrogate alone, whose name in C++ is given, the instructions of LIF kernels are counted, too."""
    nvcc, cuobjdump, demangler = find_tools()
    cubin = folder / f"{scalar}-{architecture}{surrogate}.cubin"
    flags = [*SETUP["NVCC_FLAGS"].split(), "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    flags += [f"-DSTBP_SURROGATES={surrogate}"] if surrogate else []
    said = run(nvcc, *flags, f"-DSTBP_SCALAR={SCALARS[scalar][0]}", SOURCE, "-o", cubin)
    with_nvdisasm = ("env", f"PATH={cuobjdump.parent}:{os.environ['PATH']}", cuobjdump)
    code = sections(run(*with_nvdisasm, "-sass", cubin), r"\s*Function : ")
    attributes = sections(run(*with_nvdisasm, "-elf", cubin), r"\.nv\.info\.")
    properties = re.findall(
        r"Function properties for (\S+)\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:.* (\d+) bytes smem)?",
        said,
    )
    signatures = run(demangler, stdin="\n".join(symbol for symbol, *_ in properties)).splitlines()
    kernels = []
    for (symbol, *numbers), signature in zip(properties, signatures, strict=True):
        named = parse(signature)
        if named is None:
            continue
        stack, stored, loaded, registers, shared = (int(number or 0) for number in numbers)
        rows, width = named[1].get("rows"), named[1].get("width")
        steps = rows or {"lif_forward": AT_ONCE, "lif_backward": 2 * AT_ONCE}.get(named[0])
        issued = instructions_of(code[symbol], rows) / (steps * width) if surrogate and steps and width else None
        kernels.append(
            Kernel(
                *named[:2],
                scalar=scalar,
                neuron=named[2],
                architecture=architecture,
                registers=registers,
                threads=int(re.findall(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(0x\w+)", attributes[symbol])[0], 16),
                shared=shared,
                local=stack + stored + loaded,
                loads=memory_widths(code[symbol], "LDG"),
                stores=memory_widths(code[symbol], "STG"),
                instructions=issued,
            )
        )
    return kernels


def compile_all(pairs: Iterable[tuple[str, str]], folder: Path) -> dict[tuple[str, str], list[Kernel]]:
    """The kernels of each number type and architecture, with a compiler for every core."""
    pairs = list(pairs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(pairs, pool.map(lambda pair: compiled(*pair, folder), pairs), strict=True))


def table(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """A row for each name, number type and parameters, with the worst of all neurons and surrogates."""
    groups: dict[tuple[Any, ...], list[Kernel]] = {}
    for kernel in kernels:
        key = (kernel.name, list(SCALARS).index(kernel.scalar), *kernel.parameters.items())
        groups.setdefault(key, []).append(kernel)
    rows = []
    for _, same in sorted(groups.items()):
        by_architecture = {
            name: [kernel for kernel in same if kernel.architecture == name]
            for name in sorted({kernel.architecture for kernel in same}, key=int)
        }
        rows.append(
            {
                "kernel": same[0].name,
                "dtype": same[0].scalar,
                **same[0].parameters,
                "threads": max(kernel.threads for kernel in same),
                "compiled": len(same),
                "local_bytes": max(kernel.local for kernel in same),
                "registers": {name: max(k.registers for k in of) for name, of in by_architecture.items()},
                "warps": {name: min(k.warps for k in of) for name, of in by_architecture.items()},
                "bytes_under_way": {
                    name: min(k.under_way for k in of)
                    for name, of in by_architecture.items()
                    if "width" in of[0].parameters
                },
            }
        )
    return rows


def counted(folder: Path) -> list[dict[str, Any]]:
    """A row for each LIF kernel that moves packs, of the neuron that most people train: instructions a neuron and step,
    for each surrogate compiled alone. Where one is chosen, the choice adds some five a row."""
    pairs = [(scalar, surrogate) for scalar in ("float32", "bfloat16") for surrogate in PLAIN.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alone = list(pool.map(lambda pair: compiled(pair[0], COUNTED, folder, pair[1].__name__), pairs))
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (scalar, surrogate), kernels in zip(pairs, alone, strict=True):
        for kernel in kernels:
            common = "CommonReset" in kernel.neuron or "forward" in kernel.name
            if kernel.instructions is None or kernel.parameters["width"] == 1 or not common:
                continue
            key = (kernel.name, scalar, *kernel.parameters.values())
            row = rows.setdefault(
                key, {"kernel": kernel.name, "dtype": scalar, **kernel.parameters, "instructions": {}}
            )
            row["instructions"][surrogate.name] = round(kernel.instructions, 1)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=SCALARS, default=list(SCALARS), help="default: all")
    add("--architectures", nargs="+", choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS), help="default: all")
    add("--out", type=Path, default=ROOT / "bench" / "results", help="folder; default bench/results")
    args = parser.parse_args()
    try:
        nvcc, *_ = find_tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        found = compile_all(itertools.product(args.dtypes, args.architectures), Path(folder))
        instructions = counted(Path(folder))
    rows = table(itertools.chain.from_iterable(found.values()))
    print("registers / warps a multiprocessor, at worst")
    for row in rows:
        parameters = " ".join(f"{name} {row[name]}" for name in PARAMETERS[row["kernel"]])
        cells = "".join(f"{registers:>6} / {row['warps'][name]:<2}" for name, registers in row["registers"].items())
        print(f"{row['kernel']:<19}{row['dtype']:<9}{parameters:<18}{cells}   local bytes: {row['local_bytes']}")
    print(f"instructions a neuron and step on sm_{COUNTED}: {', '.join(PLAIN)}")
    for row in instructions:
        parameters = " ".join(f"{name} {row[name]}" for name in PARAMETERS[row["kernel"]])
        cells = "".join(f"{number:>7}" for number in row["instructions"].values())
        print(f"{row['kernel']:<19}{row['dtype']:<9}{parameters:<18}{cells}")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"nvcc": SETUP["nvcc_version"](nvcc), "date": date, "kernels": rows, "instructions": instructions}
    harness.write_json(args.out / "compiled-cuda.json", result)


if __name__ == "__main__":
    main()
