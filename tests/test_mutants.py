"""The tests of the CUDA kernels' source, tested: the kernels pass them, and broken on purpose, in each way that
matters, they fail. What fails is cuda_stand_in/check.cpp, under AddressSanitizer and UndefinedBehaviorSanitizer with
the threads of a block as fibers, or under ThreadSanitizer with threads of the system.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FLAGS = "-std=c++17 -O0 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-unknown-pragmas -pthread"
BUILDS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread -DSTBP_THREADS",
}

KERNELS, NEUNORM, PLAN = "cuda/kernels.cuh", "cuda/neunorm.cuh", "cuda/plan.h"
SUM_BEGINS = "    __syncthreads();  // all are done with what was there before\n"
FIRST_NEURON = "const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;"
# name: the build that must fail, what its output must say, the file in csrc/, what stands there, what instead.
MUTANTS: dict[str, tuple[str, str, str, str, str]] = {
    "the other neuron of a pair": ("address", "spikes", KERNELS, "i % 2 ? pairs", "i % 2 == 0 ? pairs"),
    "a spike in its neighbour's place": ("address", "spikes|dL/dx", KERNELS, "values[2 * i + 1])", "values[2 * i])"),
    "the rows of another thread": (
        *("address", "spikes", KERNELS, FIRST_NEURON),
        "const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x / 2 * 2) * kWidth;",
    ),
    "threads beyond the last neuron": (
        *("address", "heap-buffer-overflow", KERNELS, "if (first >= io.neurons) return;"),
        "if (first > io.neurons + kWidth) return;",
    ),
    "a step too many": ("address", "heap-buffer-overflow", KERNELS, "k < left ? load(from", "k <= left ? load(from"),
    "a step of the tail left out": ("address", "spikes", KERNELS, "if (k >= left) break;", "if (k + 1 >= left) break;"),
    "no step's gradient ahead": (
        *("address", "dL/dx", KERNELS, "gradient[k - kAhead] = k - kAhead < left"),
        "gradient[k - kAhead] = k < left",
    ),
    "a state too early": ("address", "dL/dx", KERNELS, "start % kChunk == kChunk - kAtOnce", "start % kChunk == 0"),
    "no state where one is wanted": (
        *("address", "dL/dx", KERNELS, "io.steps - start > kAtOnce) {"),
        "io.steps - start > kChunk) {",
    ),
    "a state of the wrong chunk": (
        *("address", "dL/dx|heap-buffer-overflow", KERNELS, "(chunk - 1) * io.neurons"),
        "chunk * io.neurons",
    ),
    "the later half's currents twice": ("address", "dL/dx", KERNELS, "rows[k] = earlier[k];", "rows[k] = rows[k];"),
    "the later half's state twice": ("address", "dL/dx", KERNELS, "v[i] = v_earlier[i];", "v[i] = v[i];"),
    "packs at any address": ("address", "the width that fits|misaligned", KERNELS, "bytes < 16 ? bytes : 16", "1"),
    "packs of any number": ("address", "misaligned|overflow", KERNELS, "neurons % width_ != 0", "false"),
    "an index of 32 bits": (
        *("address", "SEGV|overflow|many neurons", KERNELS, FIRST_NEURON),
        "const int first = int((blockIdx.x * unsigned(plan.threads) + threadIdx.x) * unsigned(kWidth));",
    ),
    "a block too few": (
        "address",
        "many neurons",
        PLAN,
        "(threads + plan.threads - 1) / plan.threads",
        "threads / plan.threads",
    ),
    "the sum overwritten while it is read": ("thread", "data race", NEUNORM, SUM_BEGINS, ""),
    "the sum read while it is written": (
        *("thread", "data race", NEUNORM, "= values[k];\n    __syncthreads();\n"),
        "= values[k];\n",
    ),
    "totals added up too early": (
        *("thread", "data race", NEUNORM, ": State(0);\n    __syncthreads();\n"),
        ": State(0);\n",
    ),
    "a barrier that not all reach": (
        *("address", "ended while others waited", NEUNORM, SUM_BEGINS),
        "    if (inside) __syncthreads();\n",
    ),
    "spikes of another feature": (
        "address",
        "normalised",
        NEUNORM,
        "held ? spikes[c * kStrip] : 0",
        "held ? spikes[0] : 0",
    ),
    "spikes past the shared memory": (
        *("address", "heap-buffer-overflow", PLAN, "bytes = features * kStrip;"),
        "bytes = features * kStrip / 2;",
    ),
    "positions beyond the last": (
        *("address", "heap-buffer-overflow", NEUNORM, "team.inside ? own : io.positions - 1;"),
        "own;",
    ),
    "kept by threads without a position": (
        "address",
        "heap-buffer-overflow|differs",
        NEUNORM,
        "if (inside) Pack",
        "Pack",
    ),
}


def folder_of(root: Path, name: str) -> Path:
    return root / re.sub(r"\W+", "_", name)


def command(folder: Path, build: str) -> str:
    return f"g++ {FLAGS} {BUILDS[build]} {folder / 'tests' / 'cuda_stand_in' / 'check.cpp'} -o {folder / build}"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of each mutant by name, and of the kernels as they are in "right"."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("no g++ on Linux")
    root = tmp_path_factory.mktemp("mutants")
    lines = ["rule run\n  command = $command"]
    for name in ("right", *MUTANTS):
        folder = folder_of(root, name)
        shutil.copytree(TESTS.parent / "csrc", folder / "csrc")
        shutil.copytree(TESTS / "cuda_stand_in", folder / "tests" / "cuda_stand_in")
        wanted = list(BUILDS)
        if name != "right":
            build, _, file, there, instead = MUTANTS[name]
            wanted = [build]
            source = folder / "csrc" / file
            text = source.read_text()
            assert there in text, f"{name}: {file} has no {there!r}; adapt the mutant to the new source"
            source.write_text(text.replace(there, instead))
        for build in wanted:
            lines.append(f"build {folder / build}: run\n  command = {command(folder, build)}")
    (root / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", root, "-k", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return root


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer wants addresses that a system which lays them out at random may have given away.
    fixed = ["setarch", "-R"]
    if subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode != 0:
        fixed = []
    return subprocess.run(
        [*fixed, program],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_pass(build: str, programs: Path) -> None:
    done = run(programs / "right" / build)
    assert done.returncode == 0, done.stdout
    assert "all the same" in done.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, programs: Path) -> None:
    build, error, *_ = MUTANTS[name]
    done = run(folder_of(programs, name) / build)
    assert done.returncode != 0
    assert any(word in done.stdout for word in error.split("|")), done.stdout
