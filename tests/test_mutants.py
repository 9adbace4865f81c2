"""The tests of the CUDA kernels' source, tested: the kernels pass them, and broken on purpose, in each way that
matters, they fail. What fails is cuda_stand_in/check.cpp, under AddressSanitizer and UndefinedBehaviorSanitizer with
the threads of a block as fibers, or under ThreadSanitizer with threads of the system.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FLAGS = "-std=c++17 -O0 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-unknown-pragmas -pthread"
# name: the flags; those for mutants, which leave out what none of them needs and takes long.
BUILDS = {
    "address": ("-fsanitize=address,undefined -fno-sanitize-recover=all", "-fsanitize=address,alignment"),
    "thread": ("-fsanitize=thread -DSTBP_THREADS",) * 2,
}

KERNELS, NEUNORM, PLAN, NEURON = "cuda/kernels.cuh", "cuda/neunorm.cuh", "cuda/plan.h", "neuron.h"
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
    "a step too many": ("address", "heap-buffer-overflow", KERNELS, "|| k < count) rows", "|| k <= count) rows"),
    "rows taken for granted": ("address", "heap-buffer-overflow", KERNELS, "1 : kRows / 2 + 1;", "1 : kRows;"),
    "too few rows": ("address", "spikes", PLAN, "steps <= 4 ? 4", "steps <= 5 ? 4"),
    "a row left out": (
        *("address", "spikes", KERNELS, "if (k >= kFewest && k >= steps) break;"),
        "if (k >= kFewest && k + 1 >= steps) break;",
    ),
    "the common neuron for another": (
        *("address", "dL/dx", NEURON, "options.v_reset == 0 && "),
        "",
    ),
    "a step of the tail left out": ("address", "spikes", KERNELS, "if (k >= left) break;", "if (k + 1 >= left) break;"),
    "gradients of another half": (
        *("address", "dL/dx", KERNELS, "load_rows<1>(gradient, load, io.grad_spikes + at,"),
        "load_rows<1>(gradient, load, io.grad_spikes + first,",
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
    "gradients read once more": (
        *("address", "more or less read", KERNELS, "      load_rows<1>(gradient"),
        "      load(io.grad_spikes + at);\n      load_rows<1>(gradient",
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
    "values added up too early": (
        *("thread", "data race", NEUNORM, "= values[k][p]; });\n        __syncthreads();\n"),
        "= values[k][p]; });\n",
    ),
    "parts of the sum added up too early": (
        *("thread", "data race", NEUNORM, "plan.teams - first_team);\n        __syncthreads();\n"),
        "plan.teams - first_team);\n",
    ),
    "totals added up too early": (
        *("thread", "data race", NEUNORM, "= values[p];\n    });\n    __syncthreads();\n"),
        "= values[p];\n    });\n",
    ),
    "a total over the one before": (
        *("thread", "data race", NEUNORM, "    __syncthreads();\n    each<kPositions>"),
        "    each<kPositions>",
    ),
    "a barrier that not all reach": (
        *("address", "ended while others waited", NEUNORM, "= values[k][p]; });\n        __syncthreads();\n"),
        "= values[k][p]; });\n        if (tiles > 0) __syncthreads();\n",
    ),
    "a shuffle that not all reach": (
        *("address", "ended while others waited", NEUNORM, "    if constexpr (Tile::kInWarp) {\n"),
        "    if constexpr (Tile::kInWarp) {\n      if (tiles == 0) return;\n",
    ),
    "a team left out": ("address", "normalised", NEUNORM, "i < count ? from", "i < count - 1 ? from"),
    "half of the teams": (
        "address",
        "normalised",
        NEUNORM,
        "apart < plan.teams; apart",
        "2 * apart < plan.teams; apart",
    ),
    "teams of another position": (
        *("address", "normalised", NEUNORM, "apart < plan.teams; apart"),
        "apart <= plan.teams; apart",
    ),
    "another order of the teams": (
        *("address", "bits of another order", NEUNORM, "int apart = 1; apart < plan.teams; apart *= 2"),
        "int apart = plan.teams / 2; apart > 0; apart /= 2",
    ),
    "features of another team": (
        *("address", "overflow|normalised", NEUNORM, "return {0, team * plan.pack * at.feature_stride"),
        "return {0, (team ^ 1) * plan.pack * at.feature_stride",
    ),
    "a feature of the next team": (
        *("address", "normalised|heap-buffer-overflow", PLAN, "(plan.teams - 1) * plan.pack + 1)"),
        "(plan.teams - 1) * plan.pack)",
    ),
    "a pack too many": (
        *("address", "heap-buffer-overflow|normalised", NEUNORM, "(team < plan.more_packs)"),
        "(team <= plan.more_packs)",
    ),
    "gradients of another tile": (
        *("address", "dL/dx", NEUNORM, "const Part* const slot = slots + cursor.tile *"),
        "const Part* const slot = slots + 0 *",
    ),
    "slots of another thread": (
        *("address", "normalised", NEUNORM, "* of_tile * 32 + int(threadIdx.x) % 32"),
        "* of_tile * 32 + int(threadIdx.x) % 16",
    ),
    "slots of another warp": (
        *("thread", "data race", NEUNORM, "+ warp * plan.tiles * of_tile * 32"),
        "+ warp * 0",
    ),
    "gradients read twice": ("address", "more or less read", NEUNORM, "if (held) {\n", "if (false) {\n"),
    "a sum begun with another feature's": (
        *("address", "dL/dU", NEUNORM, "there && !(last && sample == from)"),
        "there && !last",
    ),
    "currents of the tile before": ("address", "dL/dx", NEUNORM, "if constexpr (kParts == 1) fetch();\n", ""),
    "gradients past the shared memory": (
        *("address", "heap-buffer-overflow", PLAN, "widest, kNeuNormChunk * int(sizeof(Scalar)), device"),
        "widest, (kNeuNormChunk - 1) * int(sizeof(Scalar)), device",
    ),
    "spikes of another tile": ("address", "normalised", NEUNORM, "bits = slots[cursor.tile * 32];", "bits = slots[0];"),
    "spikes of another neuron of a tile": (
        *("address", "normalised", NEUNORM, "y[e] = bits >> (8 * e + k) & 1u"),
        "y[e] = bits >> (8 * (e ^ 1) + k) & 1u",
    ),
    "spikes past the shared memory": (
        *("address", "heap-buffer-overflow", PLAN, "threads = (plan.threads() + 31) / 32 * 32;"),
        "threads = plan.threads() / 2;",
    ),
    "positions beyond the last": (
        *("address", "heap-buffer-overflow|differs", NEUNORM, "tiles = position() < io.positions ?"),
        "tiles = position() <= io.positions ?",
    ),
    "maps of no position": (
        *("address", "heap-buffer-overflow|differs", NEUNORM, "return team == 0 && tiles > 0;"),
        "return team == 0;",
    ),
    "a strip beyond the last": (
        *("address", "heap-buffer-overflow|differs", NEUNORM, "strip >= plan.strips) return;"),
        "false) return;",
    ),
    "packs of features at any address": (
        *("address", "misaligned|overflow|differs", PLAN, "scalar_bytes < 8 && widest >= 4 ? 4 : 1;"),
        "scalar_bytes < 8 ? 4 : 1;",
    ),
}


def folder_of(root: Path, name: str) -> Path:
    return root / re.sub(r"\W+", "_", name)


# Compiles a program and runs it, which must not end the others: what it says is kept, and how it ends.
RULE = """rule check
  command = g++ $flags $in -o $out && { ( $fixed timeout 300 $out ) >$out.said 2>&1; echo $$? >$out.status; }
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what came of the programs of each mutant by name, and of the kernels as they are in "right"."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("no g++ on Linux")
    root = tmp_path_factory.mktemp("mutants")
    # ThreadSanitizer wants addresses that a system which lays them out at random may have given away.
    fixed = "setarch -R" if subprocess.run(["setarch", "-R", "true"], check=False).returncode == 0 else ""
    lines = [f"fixed = {fixed} env TSAN_OPTIONS=halt_on_error=1", RULE]
    for name in ("right", *MUTANTS):
        folder = folder_of(root, name)
        shutil.copytree(TESTS.parent / "csrc", folder / "csrc")
        shutil.copytree(TESTS / "cuda_stand_in", folder / "tests" / "cuda_stand_in")
        flags = {build: of_the_right for build, (of_the_right, _) in BUILDS.items()}
        if name != "right":
            build, _, file, there, instead = MUTANTS[name]
            flags = {build: BUILDS[build][1] + (" -DSTBP_NEUNORM_ALONE" if file == NEUNORM else "")}
            source = folder / "csrc" / file
            text = source.read_text()
            assert there in text, f"{name}: {file} has no {there!r}; adapt the mutant to the new source"
            source.write_text(text.replace(there, instead))
        for build, own in flags.items():
            lines.append(f"build {folder / build}: check {folder / 'tests' / 'cuda_stand_in' / 'check.cpp'}")
            lines.append(f"  flags = {FLAGS} {own}")
    (root / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", root, "-k", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return root


def outcome(program: Path) -> tuple[int, str]:
    """Its exit status, and what it has said."""
    return int(Path(f"{program}.status").read_text()), Path(f"{program}.said").read_text()


@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_pass(build: str, programs: Path) -> None:
    status, said = outcome(programs / "right" / build)
    assert status == 0, said
    assert "all the same" in said


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, programs: Path) -> None:
    build, error, *_ = MUTANTS[name]
    status, said = outcome(folder_of(programs, name) / build)
    assert status != 0
    assert any(word in said for word in error.split("|")), said
