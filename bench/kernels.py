"""How near the CPU kernels by themselves come to a copy of their input, on buffers that are there already.

    python bench/kernels.py            every dtype, the machine's best instruction set, one thread and all of them
    python bench/kernels.py --quick    a minute, half of which compiles
    python bench/kernels.py --help     everything else

Compiles the kernels from csrc/ with the flags of setup.py, into a program without torch: a call of an operator takes
longer than a small kernel. "Of a copy" compares bandwidths: what a pass must move (x and the spikes; backward x and
both gradients) in its time, against what a copy of x moves in its own. Prints a table, writes kernels-cpu.json and
.png.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import stbp_cuda

ROOT = Path(__file__).parent.parent
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
COLOURS = dict(zip(BYTES, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
MOVED = {"fwd": 2, "bwd": 3}  # tensors of the size of x
INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")  # from the narrowest
STEPS, NEURONS = (1, 4, 16, 64), (2**12, 2**14, 2**16, 2**18, 2**20)
QUICK_STEPS, QUICK_NEURONS = (4, 16), (2**12, 2**16, 2**20)
MOST = 2**26  # bytes of x
SMALL = 2**16  # bytes of x up to which the start of the threads is part of what is measured
TARGET = 0.8


def build(folder: Path) -> Path:
    """The program, compiled like the package."""
    flags = runpy.run_path(str(ROOT / "setup.py"))
    compiler = os.environ.get("CXX", "g++")
    sources = [ROOT / "csrc" / "cpu" / "kernels_portable.cpp", ROOT / "bench" / "kernels.cpp"]
    if platform.machine() == "x86_64":
        sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in flags["ISA_FLAGS"]]
    running = []
    for source in tqdm(sources, desc="compiling", disable=None):
        isa = flags["ISA_FLAGS"].get(source.stem, "-fopenmp" if source.stem == "kernels" else "")
        command = [compiler, *flags["CXX_FLAGS"].split(), *isa.split(), "-c", str(source)]
        running.append(subprocess.Popen([*command, "-o", str(folder / f"{source.stem}.o")]))
        if len(running) % (os.cpu_count() or 1) == 0:
            running[-1].wait()
    for source, process in zip(sources, running, strict=True):
        if process.wait():
            sys.exit(f"{compiler} could not compile {source}")
    program = folder / "kernels"
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run([compiler, "-fopenmp", *objects, "-o", str(program)], check=True)
    return program


def measure(
    program: Path, instruction_set: str, dtype: str, threads: int, seconds: float, shapes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    numbers = [str(number) for shape in shapes for number in shape]
    done = subprocess.run(
        [str(program), instruction_set, dtype, str(seconds), *numbers],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    points = []
    for line in done.stdout.splitlines():
        steps, neurons, *rest = line.split()
        x_bytes = int(steps) * int(neurons) * BYTES[dtype]
        times = {}
        for name, i in zip(("copy", *MOVED), itertools.count(0, 3), strict=False):
            median, low, high = map(float, rest[i : i + 3])
            times[name] = {"median": median, "quartiles": [low, high]}
        points.append(
            {
                "instruction_set": instruction_set,
                "dtype": dtype,
                "threads": threads,
                "steps": int(steps),
                "neurons": int(neurons),
                "x_bytes": x_bytes,
                "times": times,
                "copy_gb_per_s": 2 * x_bytes / times["copy"]["median"] / 1e9,
                "of_a_copy": {
                    name: moved / 2 * times["copy"]["median"] / times[name]["median"] for name, moved in MOVED.items()
                },
            }
        )
    return points


def row(point: dict[str, Any]) -> str:
    text = f"{point['instruction_set']:<9}{point['dtype']:<9}{point['threads']:>8}{point['steps']:>5}"
    text += f"{point['neurons']:>10,}{point['x_bytes'] / 2**20:>10.3f}{point['copy_gb_per_s']:>11.1f}"
    for name in MOVED:
        per_step = 1e9 * point["times"][name]["median"] / point["steps"] / point["neurons"]
        text += f"{per_step:>10.4f}{point['of_a_copy'][name]:>7.0%}"
    return text


def summarise(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the target is met, and how much faster all threads are than one."""
    summary: dict[str, Any] = {}
    for dtype, name in itertools.product(BYTES, MOVED):
        seen = [p for p in points if p["dtype"] == dtype and p["x_bytes"] > SMALL]
        shares = sorted(p["of_a_copy"][name] for p in seen)
        if not shares:
            continue
        pairs = {}
        for p in seen:
            pairs.setdefault((p["instruction_set"], p["steps"], p["neurons"]), {})[p["threads"]] = p
        gains = sorted(
            of[1]["times"][name]["median"] / of[max(of)]["times"][name]["median"]
            for of in pairs.values()
            if len(of) > 1
        )
        summary[f"{dtype} {name}"] = {
            "of_a_copy": {"median": shares[len(shares) // 2], "worst": shares[0]},
            "met_at": sum(share >= TARGET for share in shares),
            "points": len(shares),
            "gain_of_all_threads": gains[len(gains) // 2] if gains else None,
        }
    return summary


def picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 5), dpi=120, layout="constrained")
    figure.suptitle(f"The CPU kernels by themselves, on buffers that are there already: {harness.where(machine)}")
    best = max((p["instruction_set"] for p in points), key=INSTRUCTION_SETS.index)
    most = max(p["threads"] for p in points)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, MOVED, strict=True):
        for dtype, colour in COLOURS.items():
            for threads, marker in {1: "o", most: "^"}.items():
                seen = [
                    (p["x_bytes"], 100 * p["of_a_copy"][name])
                    for p in points
                    if (p["instruction_set"], p["dtype"], p["threads"]) == (best, dtype, threads)
                ]
                if seen:
                    label = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
                    axis.scatter(
                        *zip(*seen, strict=True), 30, colour, marker=marker, alpha=0.7, linewidths=0, label=label
                    )
        axis.axhline(100, color="gray", linewidth=1)
        axis.axhline(100 * TARGET, color="black", linewidth=1, linestyle="--")
        axis.axvline(SMALL, color="gray", linewidth=1, linestyle=":")
        axis.set(title=f"{name}, {best}", xlabel="bytes of x", xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the bandwidth of a copy of x")
    axes[1].legend(fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, seconds=0.5, quick_seconds=0.1)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=BYTES, help="default: all; with --quick float32 and bfloat16")
    add("--all-instruction-sets", action="store_true", help="not only the best of this machine")
    add("--steps", nargs="+", type=harness.positive(int), metavar="T", help="in place of the grid's")
    add("--neurons", nargs="+", type=harness.positive(int), metavar="N", help="in place of the grid's")
    args = parser.parse_args()
    device = harness.prepare(parser, args)
    if device.type != "cpu":
        parser.error(
            "these are the kernels of the CPU: on a GPU the launch is no part of a kernel's time, and speed.py tells"
        )
    best = stbp_cuda.build_info()["cpu_instruction_set"]
    sets = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1] if args.all_instruction_sets else (best,)
    dtypes = args.dtypes or (list(BYTES)[:2] if args.quick else list(BYTES))
    steps, neurons = (QUICK_STEPS, QUICK_NEURONS) if args.quick else (STEPS, NEURONS)
    grid = list(itertools.product(args.steps or steps, args.neurons or neurons))
    machine = harness.describe(device)
    name_of_result = f"kernels-cpu{'-quick' if args.quick else ''}"
    points = harness.Points(args.out, name_of_result, machine)
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        print(f"{'set':<9}{'dtype':<9}{'threads':>8}{'T':>5}{'N':>10}{'x MiB':>10}{'copy GB/s':>11}", end="")
        print("".join(f"{f'{name} ns':>10}{'copy':>7}" for name in MOVED))
        runs = list(itertools.product(sets, dtypes, sorted({1, torch.get_num_threads()})))
        with tqdm(total=len(runs) * len(grid), disable=None) as bar:
            for instruction_set, dtype, threads in runs:
                shapes = [shape for shape in grid if shape[0] * shape[1] * BYTES[dtype] <= MOST]
                for shape in shapes:
                    for point in measure(program, instruction_set, dtype, threads, args.seconds, [shape]):
                        points.append(point)
                        bar.write(row(point))
                    bar.update()
    if not points:
        parser.error("no point is left to measure")
    summary = summarise(points)
    print(f"\nof the bandwidth of a copy, where x exceeds {SMALL >> 10} KB:")
    for name, seen in summary.items():
        share, gain = seen["of_a_copy"], seen["gain_of_all_threads"]
        text = f"{name:<14}median {share['median']:>5.0%}, worst {share['worst']:>5.0%}; "
        text += f"at least {TARGET:.0%} at {seen['met_at']} of {seen['points']} points"
        print(text + (f"; all threads {gain:.2f} x as fast as one" if gain else ""))
    result = {"machine": machine, "summary": summary, "points": points}
    harness.write_json(args.out / f"{name_of_result}.json", result)
    harness.save(picture(points, machine), args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    main()
