"""How fast one layer of LIF neurons runs: the fused layer against every other way to run it that is installed.

    python bench/speed.py            the grid behind the published figures, on the GPU if there is one
    python bench/speed.py --quick    a minute's worth of it
    python bench/speed.py --help     everything else

`pip install '.[bench]'` brings the rivals; bench/rivals.py says how they are set to the same neuron, and each is held
against the eager loop before it is timed. Prints a table and a summary, and writes speed-<device>.json (all that was
measured), speed-<device>.png (cost against T and against N) and roofline-<device>.png (bandwidth against a copy's).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import malloc
import torch
from harness import (
    Points,
    add_arguments,
    describe,
    free_memory,
    measure,
    no_compile_cache,
    positive,
    prepare,
    release_free_memory,
    save,
    synchronize,
    where,
    write_json,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rivals import DECAY, PASSES, RIVALS, V_THRESHOLD, check, random_input
from torch import Tensor
from tqdm import tqdm

from stbp_cuda.ops import state_dtype

Point = dict[str, Any]  # as it goes into the JSON file
DTYPES = ("float32", "bfloat16", "float16", "float64")
STEPS, NEURONS = (1, 4, 16, 64, 256, 1024), (2**8, 2**12, 2**16, 2**20, 2**24)
QUICK_STEPS, QUICK_NEURONS = (4, 16), (2**12, 2**18)
SMALL = 64 * 1024  # bytes of x up to which the cost of a call hides the bandwidth, so that the target does not apply
LEAST = {"eager": 10, "spikingjelly": 10, "snntorch": 10, "norse": 10, "compile": 2}  # the targets for training
OTHERS = [name for name in RIVALS if name != "ours"]
# Tensors like x that are there for all: x, the gradient of the spikes, what they are copied to, new and old, and what
# the allocators keep.
COPIED = 8
COLOURS = dict(zip(RIVALS, ("red", *(f"C{i}" for i in (0, 9, 1, 2, 8, 6, 4, 5))), strict=True))


def copies(name: str, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """What the bandwidth is held against: x, and in training the gradient, copied to new tensors and to old ones."""
    sources = [x.detach()] if name == "fwd" else [x.detach(), grad]
    buffers = [torch.empty_like(source) for source in sources]
    return {
        "clone": lambda: [source.clone() for source in sources],
        "copy_": lambda: [buffer.copy_(source) for buffer, source in zip(buffers, sources, strict=True)],
    }


class Budget:
    """Who can take part at a point: whoever fits in memory, and will not take too long for a call."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.longest, self.compile_steps, self.memory = args.longest, args.compile_steps, free_memory(device)
        self.seen: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}  # seconds at T and N

    def fits(self, name: str, dtype: str, steps: int, neurons: int) -> bool:
        number = getattr(torch, dtype)
        kept = COPIED * number.itemsize + RIVALS[name].tensors * state_dtype(number).itemsize
        return steps * neurons * kept < 0.8 * self.memory

    def problem(self, name: str, dtype: str, run: str, steps: int, neurons: int) -> str | None:
        """Why a contestant is left out. Its time for a call is taken to grow as T x N from the largest point so far."""
        if name == "compile" and steps > self.compile_steps:
            return f"it unrolls T, and is compiled up to T = {self.compile_steps} only"
        if not self.fits(name, dtype, steps, neurons):
            return "may not fit in memory"
        seen = self.seen.setdefault((name, dtype, run), {})
        smaller = [(t * n, seconds) for (t, n), seconds in seen.items() if t <= steps and n <= neurons]
        if name != "ours" and smaller:
            size, seconds = max(smaller)
            if (expected := seconds * steps * neurons / size) > self.longest:
                seen[steps, neurons] = expected
                return f"expected to take more than {self.longest:g} s for a call"
        return None

    def took(self, name: str, dtype: str, run: str, steps: int, neurons: int, seconds: float) -> str | None:
        """Why a contestant is left out after a call that took so long."""
        self.seen[name, dtype, run][steps, neurons] = seconds
        if name == "ours" or seconds <= self.longest:
            return None
        return f"took {seconds:.1f} s for the first call, more than {self.longest:g} s"


def measure_point(
    names: list[str], dtype: str, steps: int, neurons: int, seconds: float, budget: Budget, device: torch.device
) -> Iterator[Point]:
    """One entry for each pass, after checking that all contestants compute the same."""
    release_free_memory()  # of the point before, which a malloc that keeps it may not find a use for
    x, grad = random_input(steps, neurons, getattr(torch, dtype), device)
    layers = {name: RIVALS[name].layer(device) for name in names}
    for run_name, run in PASSES.items():
        of = (dtype, run_name, steps, neurons)
        runs, firsts, left_out = {}, {}, {}
        for name, layer in layers.items():
            if problem := RIVALS[name].problem(device, x.dtype) or budget.problem(name, *of):
                left_out[name] = problem
                continue
            start = time.perf_counter()
            try:
                results = run(layer, x, grad)
                synchronize(device)
                first = time.perf_counter() - start
                firsts[name] = {"first_seconds": first, "different": check(RIVALS[name], results, x, grad)}
                del results
            except Exception as error:  # whatever a rival raises or gets wrong: the others are measured all the same
                if name == "ours":
                    raise
                left_out[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if name != "compile" and (problem := budget.took(name, *of, first)):  # which compiled in that call
                left_out[name] = problem
                continue
            runs[name] = partial(run, layer, x, grad)
        times = measure({**runs, **copies(run_name, x, grad)}, seconds, device)
        for name in runs:
            budget.took(name, *of, times[name]["median"])  # the first call is a slow one
        moved = x.nbytes * (2 if run_name == "fwd" else 4)  # x and the spikes, and their gradients
        median = times["ours"]["median"]
        yield {
            "dtype": dtype,
            "steps": steps,
            "neurons": neurons,
            "pass": run_name,
            "x_bytes": x.nbytes,
            "moved_bytes": moved,
            "times": {name: {**seen, **firsts.get(name, {})} for name, seen in times.items()},
            "left_out": left_out,
            "gb_per_s": moved / median / 1e9,
            "share_of_copy": times["clone"]["median"] / median,
            "ratios": {name: times[name]["median"] / median for name in OTHERS if name in times},
        }


def title(point: Point) -> str:
    return f"{point['dtype']} {point['steps']} x {point['neurons']:,} {point['pass']}"


def header(names: list[str]) -> str:
    rivals = "".join(f"{name[:12]:>13}" for name in names if name != "ours")
    ours = f"{'ours us':>12}  {'25-75 %':<23}{'faults':>8}{'GB/s':>6}{'clone':>7}"
    return f"{'dtype':<9}{'T':>5}{'N':>11}  {'pass':<7}{ours}{rivals}"


def row(point: Point, names: list[str]) -> str:
    low, high = (f"{1e6 * seconds:,.1f}" for seconds in point["times"]["ours"]["quartiles"])
    text = f"{point['dtype']:<9}{point['steps']:>5}{point['neurons']:>11,}  {point['pass']:<7}"
    text += f"{1e6 * point['times']['ours']['median']:>12,.1f}  {f'{low}-{high}':<23}"
    text += f"{point['times']['ours']['faults']:>8,.0f}{point['gb_per_s']:>6.1f}{point['share_of_copy']:>7.0%}"
    for name in names:
        if name in point["ratios"]:
            text += f"{point['ratios'][name]:>11.2f} x"
        elif name != "ours":
            text += f"{'-':>13}"
    return text


def digest(points: list[Point], main: list[Point], least: float, value: Callable[[Point], float]) -> Point | None:
    """The median over the main points, and the worst of all of them; None where there is nothing to tell."""
    if not points or not main:
        return None
    worst = min(points, key=value)
    groups: dict[str, list[float]] = {}
    for point in points:
        groups.setdefault(f"{point['dtype']} {point['pass']}", []).append(value(point))
    return {
        "median": statistics.median(map(value, main)),
        "medians": {group: statistics.median(values) for group, values in groups.items()},
        "worst": value(worst),
        "worst_at": title(worst),
        "least": least,
        "below_at": [title(p) for p in points if value(p) < least],
        "points": len(points),
    }


def summarise(points: list[Point]) -> Point:
    """What the project promises, held against what was measured: True, False, or None where that does not tell."""
    seen, left_out = {}, {}
    for name in OTHERS:
        known = [p for p in points if name in p["ratios"]]
        training = [p for p in known if p["pass"] == "fwd+bwd"]
        seen[name] = digest(known, training, 1, lambda p, name=name: p["ratios"][name])
        reasons: dict[str, list[str]] = {}
        for point in points:
            if name in point["left_out"]:
                reasons.setdefault(point["left_out"][name], []).append(title(point))
        left_out[name] = reasons
    large = [p for p in points if p["pass"] == "fwd" and p["x_bytes"] > SMALL]
    seen["clone"] = copied = digest(large, large, 0.6, lambda p: p["share_of_copy"])
    targets = {}
    for name, least in LEAST.items():
        target = f"fwd+bwd at least {least} x as fast as {RIVALS[name].label} (median over the grid)"
        targets[target] = seen[name] and seen[name]["median"] >= least
    slower = any(found["below_at"] for name in OTHERS if (found := seen[name]))
    failed = any(reason.startswith("failed") for reasons in left_out.values() for reason in reasons)
    unknown = failed or not all(seen[name] for name in LEAST)
    targets["nowhere slower than any of them"] = False if slower else None if unknown else True
    targets["fwd at least 60 % of a copy's bandwidth where x exceeds 64 KB"] = copied and not copied["below_at"]
    compiled = [(p["times"]["compile"]["first_seconds"], title(p)) for p in points if "compile" in p["times"]]
    slowest = dict(zip(("seconds", "at"), max(compiled), strict=True)) if compiled else None
    return {"against": seen, "left_out": left_out, "slowest_compilation": slowest, "targets": targets}


def some(titles: list[str]) -> str:
    return "; ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")


def show(summary: Point) -> None:
    print("\nours is, as the median of fwd+bwd (a copy: of fwd), and at worst:")
    for name, seen in summary["against"].items():
        label = "x.clone() where x > 64 KB" if name == "clone" else RIVALS[name].label
        if seen:
            below = f"below {seen['least']:g} x at {len(seen['below_at'])} of {seen['points']}"
            print(f"{seen['median']:8.2f} x {label:<26}{seen['worst']:7.2f} x at {seen['worst_at']}; {below}")
        else:
            print(f"{'no result':<10} {label}")
    for name in OTHERS:
        if (seen := summary["against"][name]) and seen["below_at"]:
            print(f"slower than {RIVALS[name].label} at {'; '.join(seen['below_at'])}")
    for name, reasons in summary["left_out"].items():
        for reason, at in reasons.items():
            print(f"left out: {RIVALS[name].label} at {some(at)}: {reason}")
    if compiled := summary["slowest_compilation"]:
        print(f"torch.compile took up to {compiled['seconds']:.1f} s to compile, at {compiled['at']}")
    for target, met in summary["targets"].items():
        print(f"{'not known' if met is None else 'met' if met else 'NOT MET':<9} {target}")


def two_of(values: list[int]) -> list[int]:
    """A small and a large one."""
    values = sorted(set(values))
    return sorted({values[len(values) // 4], values[len(values) * 5 // 8]})


def line(axis: Axes, name: str, places: list[tuple[float, float]]) -> None:
    x, y = zip(*sorted(places), strict=True)
    if name in RIVALS:
        width, front = (2.5, 3) if name == "ours" else (1.3, 2)
        label, colour = RIVALS[name].label, COLOURS[name]
        axis.plot(x, y, "o-", markersize=4, label=label, color=colour, linewidth=width, zorder=front)
    else:
        axis.plot(x, y, {"clone": "--", "copy_": ":"}[name], label=f"a copy, {name}", color="gray", linewidth=1.8)


def finish(figure: Figure, machine: Point, text: str) -> Figure:
    """Title, grid, and one legend for all axes."""
    figure.suptitle(f"{text}\non {where(machine)}")
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.set_yscale("log")
        handles, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=6)
    return figure


def cost_picture(points: list[Point], machine: Point) -> Figure:
    dtype = points[0]["dtype"]
    points = [p for p in points if p["dtype"] == dtype]
    steps, neurons = ([p[key] for p in points] for key in ("steps", "neurons"))
    panels = [("neurons", value, "steps") for value in two_of(neurons) if len(set(steps)) > 1 or len(set(neurons)) == 1]
    panels += [("steps", value, "neurons") for value in two_of(steps) if len(set(neurons)) > 1]
    symbols = {"neurons": "N", "steps": "T"}
    figure = Figure(figsize=(4 * len(panels), 8), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(panels), sharey="row", squeeze=False)
    for axes, run in zip(grid, ("fwd+bwd", "fwd"), strict=True):
        for axis, (fixed, value, moving) in zip(axes, panels, strict=True):
            shown = [p for p in points if p["pass"] == run and p[fixed] == value]
            for name in (*RIVALS, "clone", "copy_"):
                places = [
                    (p[moving], 1e9 * p["times"][name]["median"] / p["steps"] / p["neurons"])
                    for p in shown
                    if name in p["times"]
                ]
                if places:
                    line(axis, name, places)
            axis.set(title=f"{run}, {symbols[fixed]} = {value:,}", xlabel=symbols[moving], xscale="log")
            if moving == "steps":
                axis.set_xticks(sorted({p["steps"] for p in shown}), labels=sorted({p["steps"] for p in shown}))
                axis.xaxis.set_minor_locator(NullLocator())
        axes[0].set_ylabel("ns per neuron and step")
    return finish(figure, machine, f"One layer of LIF neurons, {dtype}")


def roofline_picture(points: list[Point], machine: Point) -> Figure:
    figure = Figure(figsize=(14, 6.5), dpi=120, layout="constrained")
    first = points[0]["dtype"]
    markers = dict(zip(DTYPES, "os^v", strict=True))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, run in zip(axes, ("fwd+bwd", "fwd"), strict=True):
        shown = [p for p in points if p["pass"] == run]
        for name in ("copy_", "clone"):
            roof: dict[int, list[float]] = {}
            for p in shown:
                roof.setdefault(p["moved_bytes"], []).append(p["moved_bytes"] / p["times"][name]["median"] / 1e9)
            line(axis, name, [(size, statistics.median(seen)) for size, seen in roof.items()])
        for name, dtype in itertools.product(RIVALS, DTYPES):
            known = [p for p in shown if name in p["times"] and p["dtype"] == dtype]
            if not known or (dtype != first and name != "ours"):
                continue
            places = [(p["moved_bytes"], p["moved_bytes"] / p["times"][name]["median"] / 1e9) for p in known]
            label = RIVALS[name].label + (f", {dtype}" if name == "ours" else "")
            size, front = (42, 3) if name == "ours" else (18, 2)
            filled = {"facecolors": COLOURS[name] if dtype == first else "none", "edgecolors": COLOURS[name]}
            marker = markers[dtype]
            axis.scatter(*zip(*places, strict=True), size, marker=marker, label=label, zorder=front, **filled)
        axis.set(title=run, xscale="log", xlabel="bytes that must move: x, the spikes, in training their gradients")
    axes[0].set_ylabel("GB/s of these bytes")
    return finish(figure, machine, f"One layer of LIF neurons ({first} if not said), a dot for each T and N")


def contestants(args: argparse.Namespace, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The names of those that can run, and why the others cannot; printed, with what to know of each."""
    problems = {name: problem for name in args.rivals if (problem := RIVALS[name].problem(device))}
    print(f"LIF neurons of decay {DECAY}, threshold {V_THRESHOLD}, hard reset; surrogate rectangular if not said")
    for name in args.rivals:
        remark = f"left out: {problems[name]}" if name in problems else RIVALS[name].note
        print(f"  {name:<20} {RIVALS[name].label:<22} {remark}")
    return ["ours", *(name for name in args.rivals if name not in problems)], problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    malloc.add_option(parser)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, help="default: float32 bfloat16; with --quick float32")
    add("--steps", nargs="+", type=positive(int), metavar="T", help="in place of the grid's")
    add("--neurons", nargs="+", type=positive(int), metavar="N", help="in place of the grid's")
    add("--rivals", nargs="*", choices=OTHERS, default=OTHERS, metavar="NAME", help=f"none, or of {', '.join(OTHERS)}")
    add("--longest", type=positive(float), default=2.0, help="seconds for a call, else a rival is left out; default 2")
    add("--compile-steps", type=positive(int), default=64, help="the largest T for torch.compile; default 64")
    args = parser.parse_args()
    device = prepare(parser, args)
    dtypes = args.dtypes or ("float32", "bfloat16")[: 1 if args.quick else 2]
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    neurons = args.neurons or (QUICK_NEURONS if args.quick else NEURONS)

    machine, budget = describe(device), Budget(args, device)
    names, problems = contestants(args, device)
    todo, left_out = [], []
    for dtype, n, t in itertools.product(dtypes, sorted(neurons), sorted(steps)):
        if budget.fits("ours", dtype, t, n):
            todo.append((dtype, t, n))
        else:
            left_out.append(f"{dtype} {t} x {n:,}")
            print(f"left out: {left_out[-1]}, which may not fit in memory")
    if not todo:
        parser.error("no point is left to measure")
    name = f"{device.type}{'-quick' if args.quick else ''}"
    points = Points(args.out, f"speed-{name}", machine)
    print(f"\n{header(names)}")
    with no_compile_cache(), tqdm(total=len(PASSES) * len(todo), disable=None) as bar:
        if "compile" in names:
            with contextlib.suppress(Exception):  # what only the first compilation takes; an error comes back below
                RIVALS["compile"].layer(device)(torch.randn(2, 3, device=device))
        for dtype, t, n in todo:
            bar.set_description(f"{dtype} {t} x {n:,}")
            for point in measure_point(names, dtype, t, n, args.seconds, budget, device):
                points.append(point)
                bar.write(row(point, names))
                bar.update()
    summary = summarise(points)
    show(summary)
    result = {
        "machine": machine,
        "neuron": {"decay": DECAY, "v_threshold": V_THRESHOLD},
        "seconds": args.seconds,
        "rivals": {name: {"label": RIVALS[name].label, "note": RIVALS[name].note} for name in names},
        "unavailable": problems,
        "left_out": left_out,
        "summary": summary,
        "points": points,
    }
    write_json(args.out / f"speed-{name}.json", result)
    save(cost_picture(points, machine), args.out / f"speed-{name}.png")
    save(roofline_picture(points, machine), args.out / f"roofline-{name}.png")
    points.finish()


if __name__ == "__main__":
    malloc.start(main)
