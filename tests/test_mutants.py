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
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
CHECK = Path("tests/cuda_stand_in/check.cpp")
FLAGS = "-std=c++17 -O0 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-unknown-pragmas -pthread"
# name: the flags; those for mutants, which leave out what none of them needs and takes long.
BUILDS = {
    "address": ("-fsanitize=address,undefined -fno-sanitize-recover=all", "-fsanitize=address,alignment"),
    "thread": ("-fsanitize=thread -DSTBP_THREADS",) * 2,
}


class Mutant(NamedTuple):
    build: str  # the one that must fail
    said: str  # one of these, with | between them, must be in its output
    file: str  # in csrc/
    there: str  # an expression, wherever it stands in the file; between « and » if only where the rest is around it
    instead: str  # another expression of this type


KERNELS, GENERAL, NEUNORM, PLAN = "cuda/neuron.cuh", "cuda/general.cuh", "cuda/neunorm.cuh", "cuda/plan.h"
NEURON, IO = "neurons/lif.h", "core/io.h"
# What of check.cpp runs for mutants of a file; all of it for those of the others.
PARTS = {KERNELS: "plain", NEURON: "plain", GENERAL: "general", NEUNORM: "neunorm"}
FIRST_NEURON = "(int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth"
GRADIENTS = "load_rows<1>(gradient, load, «io.grad_output + at»,"
VALUES_BARRIER = "= values[k][p]; });\n        «__syncthreads()»;"
NOTHING = "void()"  # in place of a call
MUTANTS = {
    "the other neuron of a pair": Mutant("address", "spikes", KERNELS, "«i % 2» ? pairs", "i % 2 == 0"),
    "a spike in its neighbour's place": Mutant(
        "address", "spikes|dL/dx", KERNELS, "values[2 * i + 1]", "values[2 * i]"
    ),
    "the rows of another thread": Mutant(
        *("address", "spikes", KERNELS, FIRST_NEURON),
        "(int64_t(blockIdx.x) * plan.threads + threadIdx.x / 2 * 2) * kWidth",
    ),
    "threads beyond the last neuron": Mutant(
        *("address", "heap-buffer-overflow", KERNELS, "first >= io.layout.neurons()"),
        "first > io.layout.neurons() + kWidth",
    ),
    "a step too many": Mutant("address", "heap-buffer-overflow", KERNELS, "|| «k < count») rows", "k <= count"),
    "rows taken for granted": Mutant("address", "heap-buffer-overflow", KERNELS, "«k < kFewest» ||", "kFewest > 1"),
    "too few rows": Mutant("address", "spikes", PLAN, "«steps <= 4» ? 4", "steps <= 5"),
    "a row left out": Mutant(
        *("address", "spikes", KERNELS, "k >= kFewest && k >= steps"),
        "k >= kFewest && k + 1 >= steps",
    ),
    "the common neuron for another": Mutant("address", "dL/dx", NEURON, "options.v_reset == 0", "true"),
    "a step of the tail left out": Mutant("address", "spikes", KERNELS, "k >= left", "k + 1 >= left"),
    "gradients of another half": Mutant("address", "dL/dx", KERNELS, GRADIENTS, "io.grad_output + rows_at"),
    "a state too early": Mutant(
        *("address", "dL/dx", KERNELS, "start % kChunk == kChunk - kAtOnce"),
        "start % kChunk == 0",
    ),
    "no state where one is wanted": Mutant(
        *("address", "dL/dx", KERNELS, "«steps - start > kAtOnce») {"),
        "steps - start > kChunk",
    ),
    "a state of the wrong chunk": Mutant(
        *("address", "dL/dx|heap-buffer-overflow", KERNELS, "(chunk - 1) * stride"),
        "chunk * stride",
    ),
    "gradients read once more": Mutant(
        *("address", "more or less read", KERNELS, GRADIENTS),
        "(load(io.grad_output + at), io.grad_output + at)",
    ),
    "the later half's currents twice": Mutant("address", "dL/dx", KERNELS, "rows[k] = «earlier[k]»", "rows[k]"),
    "the later half's state twice": Mutant("address", "dL/dx", KERNELS, "v[i] = «v_earlier[i]»", "v[i]"),
    "packs at any address": Mutant(
        *("address", "the width that fits|misaligned", KERNELS, "bytes < 16 ? bytes : 16"),
        "1",
    ),
    "packs of any number": Mutant("address", "misaligned|overflow", KERNELS, "neighbours % width_ != 0", "false"),
    "an index of 32 bits": Mutant(
        *("address", "SEGV|overflow|many neurons", KERNELS, FIRST_NEURON),
        "int((blockIdx.x * unsigned(plan.threads) + threadIdx.x) * unsigned(kWidth))",
    ),
    "a block too few": Mutant(
        *("address", "many neurons", PLAN, "(threads + plan.threads - 1) / plan.threads"),
        "threads / plan.threads",
    ),
    "no time between two dimensions": Mutant(
        *("address", "spikes", IO, "n / inner * inner * rows + n % inner"),
        "n",
    ),
    "the length of another sample": Mutant("address", "output|potentials", IO, "n / sample", "n / sample / 2"),
    "parameters of another entry": Mutant(
        *("address", "output", GENERAL, "extras.count > 1 ? «n / extras.group % extras.count»"),
        "n / extras.group / 2 % extras.count",
    ),
    "parameters of the neighbour": Mutant(
        "address", "heap-buffer-overflow|output", GENERAL, "from + «i * apart»", "(i ^ 1) * apart"
    ),
    "scale and shift of another step": Mutant("address", "output|general dL/dx", GENERAL, "load_affine(«t»)", "t / 2"),
    "no zeros past the end": Mutant("address", "output", GENERAL, "for (; «t < all»; ++t)", "t + 1 < all"),
    "no states past the end": Mutant("address", "states", GENERAL, "«row < saved»; ++row", "row + 1 < saved"),
    "the state before another part": Mutant(
        *("address", "general dL/dx", GENERAL, "v[i] = «starts[0][i]»"),
        "starts[1][i]",
    ),
    "the other potentials": Mutant(
        *("address", "general dL/dx", GENERAL, "extras.after_reset ? State(0) : shown.get(i)"),
        "shown.get(i)",
    ),
    "the last step alone": Mutant(
        *("address", "dL/dx of all steps", GENERAL, "grad_constant[i] += «grad_x[i]»"),
        "t + 1 < steps ? State(0) : grad_x[i]",
    ),
    "repeats of another group": Mutant(
        *("address", "general dL/dx", GENERAL, "group * plan.passes + pass"),
        "pass",
    ),
    "sums of the neighbour": Mutant(
        *("address", "dL/dparameters", GENERAL, "sums[(cell * kWidth + «i») * plan.threads] +="),
        "i ^ 1",
    ),
    "threads added up too early": Mutant(
        *("thread", "data race", GENERAL, "width *= 2) {\n      «__syncthreads()»;\n      if (place"),
        NOTHING,
    ),
    "a repeat of the block left out": Mutant(
        *("address", "dL/dparameters", GENERAL, "add_up(row, «plan.thread_rows», plan.lanes"),
        "plan.thread_rows - 1",
    ),
    "lanes of the next entry": Mutant(
        *("address", "dL/dparameters", GENERAL, "end < plan.lanes ? int(end) : plan.lanes"),
        "plan.lanes",
    ),
    "one block's sums for all": Mutant(
        *("address", "dL/dparameters", GENERAL, "entry + begin + «i % columns»"),
        "i % columns * 0",
    ),
    "sums past the shared memory": Mutant(
        *("address", "heap-buffer-overflow", PLAN, "int(of_block * int64_t(«sizeof(double)»))"),
        "sizeof(float)",
    ),
    "too little room for sums": Mutant(
        *("address", "heap-buffer-overflow", PLAN, "cells * groups * «sums()» + held"),
        "columns",
    ),
    "values added up too early": Mutant("thread", "data race", NEUNORM, VALUES_BARRIER, NOTHING),
    "parts of the sum added up too early": Mutant(
        *("thread", "data race", NEUNORM, "plan.teams - first_team);\n        «__syncthreads()»;"),
        NOTHING,
    ),
    "totals added up too early": Mutant(
        *("thread", "data race", NEUNORM, "= values[p];\n    });\n    «__syncthreads()»;"),
        NOTHING,
    ),
    "a total over the one before": Mutant(
        *("thread", "data race", NEUNORM, "    «__syncthreads()»;\n    each<kPositions>"),
        NOTHING,
    ),
    "a barrier that not all reach": Mutant(
        *("address", "ended while others waited", NEUNORM, VALUES_BARRIER),
        "tiles > 0 ? __syncthreads() : void()",
    ),
    "a shuffle that not all reach": Mutant(
        *("address", "ended while others waited", NEUNORM, "apart < plan.teams"),
        "tiles > 0 && apart < plan.teams",
    ),
    "a team left out": Mutant("address", "normalised", NEUNORM, "«i < count» ? from", "i < count - 1"),
    "half of the teams": Mutant("address", "normalised", NEUNORM, "apart < plan.teams", "2 * apart < plan.teams"),
    "teams of another position": Mutant("address", "normalised", NEUNORM, "apart < plan.teams", "apart <= plan.teams"),
    "another order of the teams": Mutant(
        *("address", "bits of another order", NEUNORM, "values[k][0], «apart»)"),
        "plan.teams / 2 / apart",
    ),
    "features of another team": Mutant(
        *("address", "overflow|normalised", NEUNORM, "return {0, «team» * plan.pack * at.feature_stride"),
        "team ^ 1",
    ),
    "a feature of the next team": Mutant(
        *("address", "normalised|heap-buffer-overflow", PLAN, "(plan.teams - 1) * plan.pack + 1"),
        "(plan.teams - 1) * plan.pack",
    ),
    "a pack too many": Mutant(
        *("address", "heap-buffer-overflow|normalised", NEUNORM, "team < plan.more_packs"),
        "team <= plan.more_packs",
    ),
    "gradients of another tile": Mutant(
        *("address", "dL/dx", NEUNORM, "const Part* const slot = slots + «cursor.tile» *"),
        "0",
    ),
    "slots of another thread": Mutant(
        *("address", "normalised", NEUNORM, "* of_tile * 32 + «int(threadIdx.x) % 32»"),
        "int(threadIdx.x) % 16",
    ),
    "slots of another warp": Mutant(
        *("thread", "data race", NEUNORM, "«warp * plan.tiles * of_tile * 32» + int(threadIdx.x)"),
        "0",
    ),
    "gradients read twice": Mutant("address", "more or less read", NEUNORM, "if («held») {", "false"),
    "a sum begun with another feature's": Mutant(
        *("address", "dL/dU", NEUNORM, "there && !(last && sample == from)"),
        "there && !last",
    ),
    "currents of the tile before": Mutant(
        "address", "dL/dx", NEUNORM, "if constexpr (kParts == 1) «fetch()»;", NOTHING
    ),
    "gradients past the shared memory": Mutant(
        *("address", "heap-buffer-overflow", PLAN, "widest, «kNeuNormChunk * int(sizeof(Scalar))», device"),
        "(kNeuNormChunk - 1) * int(sizeof(Scalar))",
    ),
    "spikes of another tile": Mutant("address", "normalised", NEUNORM, "bits = slots[«cursor.tile * 32»];", "0"),
    "spikes of another neuron of a tile": Mutant(
        *("address", "normalised", NEUNORM, "y[e] = bits >> (8 * «e» + k) & 1u"),
        "e ^ 1",
    ),
    "spikes past the shared memory": Mutant(
        *("address", "heap-buffer-overflow", PLAN, "threads = «(plan.threads() + 31) / 32 * 32»;"),
        "plan.threads() / 2",
    ),
    "positions beyond the last": Mutant(
        *("address", "heap-buffer-overflow|differs", NEUNORM, "tiles = «position() < io.positions» ?"),
        "position() <= io.positions",
    ),
    "maps of no position": Mutant(
        *("address", "heap-buffer-overflow|differs", NEUNORM, "return «team == 0 && tiles > 0»;"),
        "team == 0",
    ),
    "a strip beyond the last": Mutant(
        *("address", "heap-buffer-overflow|differs", NEUNORM, "int64_t(row) * strips + strip >= plan.strips"),
        "false",
    ),
    "packs of features at any address": Mutant(
        *("address", "misaligned|overflow|differs", PLAN, "scalar_bytes < 8 && widest >= 4"),
        "scalar_bytes < 8",
    ),
}


def with_all_mutants(file: str, text: str) -> str:
    """A file of csrc/ in which, as in cuda_stand_in/mutant.h, the program chooses the mutant."""
    alternatives: dict[tuple[int, int], list[str]] = {}  # by the expression's span
    for number, (name, mutant) in enumerate(MUTANTS.items()):
        if mutant.file != file:
            continue
        there = mutant.there if "«" in mutant.there else f"«{mutant.there}»"
        before, expression, after = map(re.escape, re.split("[«»]", there))
        spans = [place.span() for place in re.finditer(f"(?<={before}){expression}(?={after})", text)]
        assert spans, f"{name}: {file} has no {mutant.there!r}; adapt the mutant to the new source"
        for span in spans:
            alternatives.setdefault(span, []).append(f"mutant({number}) ? ({mutant.instead}) : ")
    pieces, end = [], 0
    for (begin, stop), choices in sorted(alternatives.items()):
        assert end <= begin, f"{file}: {text[begin:stop]!r} of one mutant overlaps another's; adapt one"
        pieces += [text[end:begin], f"({''.join(choices)}({text[begin:stop]}))"]
        end = stop
    return "".join([*pieces, text[end:]])


# The second runs a program, which must not end the others: what it says is kept, and how it ends.
RULES = """rule compile
  command = g++ $flags $in -o $out
rule run
  command = ( STBP_MUTANT=$number $fixed timeout 300 $in $arguments ) >$out.said 2>&1; echo $$? >$out
"""
NO_MUTANT = -1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what came of the kernels as they are, in right/, and of all mutants by their numbers, in mutants/:
    how the program of a build ended, and what it said."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("no g++ on Linux")
    root = tmp_path_factory.mktemp("mutants")
    shutil.copytree(TESTS.parent / "csrc", root / "csrc")
    shutil.copytree(TESTS / "cuda_stand_in", root / "tests" / "cuda_stand_in")
    for file in {mutant.file for mutant in MUTANTS.values()}:
        source = root / "csrc" / file
        source.write_text(with_all_mutants(file, source.read_text()))
    # ThreadSanitizer wants addresses that a system which lays them out at random may have given away.
    fixed = "setarch -R" if subprocess.run(["setarch", "-R", "true"], check=False).returncode == 0 else ""
    lines = [f"fixed = {fixed} env TSAN_OPTIONS=halt_on_error=1", RULES]

    def run(kind: str, build: str, number: int, arguments: str = "") -> None:
        lines.append(f"build {kind}/{build}.{number}: run {kind}/{build}")
        lines.append(f"  number = {number}\n  arguments = {arguments}")

    for build, (flags, of_mutants) in BUILDS.items():
        lines.append(f"build right/{build}: compile {TESTS.parent / CHECK}\n  flags = {FLAGS} {flags}")
        lines.append(f"build mutants/{build}: compile {root / CHECK}")
        lines.append(f"  flags = {FLAGS} {of_mutants} -include {root / CHECK.parent / 'mutant.h'}")
        run("right", build, NO_MUTANT)
        run("mutants", build, NO_MUTANT)
    for number, mutant in enumerate(MUTANTS.values()):
        run("mutants", mutant.build, number, PARTS.get(mutant.file, ""))
    (root / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", root, "-k", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return root


def outcome(run: Path) -> tuple[int, str]:
    """The program's exit status, and what it has said."""
    return int(run.read_text()), Path(f"{run}.said").read_text()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ["right", "mutants"])
def test_the_kernels_pass(kind: str, build: str, runs: Path) -> None:
    """As they are, and with mutants of which none is chosen: so what fails with one fails for it."""
    status, said = outcome(runs / kind / f"{build}.{NO_MUTANT}")
    assert status == 0, said
    assert "all the same" in said


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, runs: Path) -> None:
    mutant = MUTANTS[name]
    status, said = outcome(runs / "mutants" / f"{mutant.build}.{list(MUTANTS).index(name)}")
    assert status != 0
    assert any(word in said for word in mutant.said.split("|")), said
