"""How fast one layer of LIF neurons runs: the fused layer against the plain loop over time and torch.compile of it.

    python bench/speed.py            the grid behind the published figures, on the GPU if there is one
    python bench/speed.py --quick    a minute's worth of it
    python bench/speed.py --help     everything else

Prints a table and a summary, and writes speed-<device>.json (all that was measured) and .png (a picture of it).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import io
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from tqdm import tqdm

import stbp_cuda
from stbp_cuda.ops import fused_backend_problem, state_dtype

Layer = Callable[[Tensor], Tensor]
Point = dict[str, Any]  # as it goes into the JSON file
DECAY, V_THRESHOLD, WIDTH = 0.25, 0.75, 1.0
RIVALS = {"eager": "the eager loop", "unbind": "the same with x.unbind()", "compile": "torch.compile"}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "v"}  # in the picture
QUICK_GRID, SMALL_GRID = ((4, 16), (4096, 65536)), ((4, 16), (16384, 1048576))  # the latter for dtypes but float32
NEURONS = {"cpu": (2**10, 2**12, 2**14, 2**16, 2**18, 2**20), "cuda": (2**10, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)}
SMALL = 64 * 1024  # bytes of x up to which the cost of a call hides the bandwidth, so that the target does not apply
SHORTEST_SAMPLE = 1e-3  # seconds; faster calls are timed several at once
FEWEST_ROUNDS = 5


class Spike(torch.autograd.Function):
    """The step function, with the rectangular surrogate for its derivative."""

    @staticmethod
    def forward(ctx: Any, mem: Tensor) -> Tensor:
        ctx.save_for_backward(mem)
        return (mem >= V_THRESHOLD).to(mem.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (mem,) = ctx.saved_tensors
        return grads[0] * ((mem - V_THRESHOLD).abs() < WIDTH / 2).to(mem.dtype) / WIDTH


def loop(currents: Sequence[Tensor]) -> Tensor:
    """The layer as one writes it in plain PyTorch. For half types the state is float32, as it is in the fused layer."""
    dtype, state = currents[0].dtype, state_dtype(currents[0].dtype)
    mem = spike = torch.zeros_like(currents[0], dtype=state)
    spikes = []
    for current in currents:
        mem = mem * DECAY * (1 - spike) + current.to(state)
        spike = Spike.apply(mem)
        spikes.append(spike.to(dtype))
    return torch.stack(spikes)


def eager(x: Tensor) -> Tensor:
    return loop([x[t] for t in range(x.shape[0])])


def unbind(x: Tensor) -> Tensor:
    """The same for one who knows that the backward pass of each ``x[t]`` fills a tensor as large as all of ``x``."""
    return loop(x.unbind())


def copy(x: Tensor) -> Tensor:
    return x.clone()


def forward(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (layer(x),)


def forward_backward(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    if layer is copy:
        return forward(copy, x, grad) + forward(copy, grad, x)
    x.grad = None
    spikes = layer(x)
    spikes.backward(grad)
    assert x.grad is not None
    return spikes, x.grad


PASSES = {"fwd": forward, "fwd+bwd": forward_backward}


def sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call, once caches and allocator are as this contestant leaves them, not as another one did."""
    run()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    synchronize(device)
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def measure(runs: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, dict[str, Any]]:
    """Time all contestants turn by turn, so that a machine that slows down slows them all."""
    gc.collect()
    gc.disable()  # else the garbage of one is collected at the cost of another
    try:
        calls = {}
        for name, run in runs.items():
            run()  # warm-up; sample makes another
            calls[name] = math.ceil(SHORTEST_SAMPLE / min(SHORTEST_SAMPLE, sample(run, 1, device)))
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order, shuffle = list(runs), random.Random(0).shuffle
        end = time.perf_counter() + seconds
        for done in itertools.count():
            if done >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)  # nobody always follows the same other
            for name in order:
                samples[name].append(sample(runs[name], calls[name], device))
    finally:
        gc.enable()
    times = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        times[name] = {"median": median, "quartiles": [low, high], "samples": len(values), "calls": calls[name]}
    return times


def check(name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raise if a contestant does not give the spikes of the eager loop to the bit, its gradients up to rounding."""
    if not torch.equal(results[0], expected[0]):
        count, of = (results[0] != expected[0]).sum(), expected[0].numel()
        raise AssertionError(f"{name} differs from the eager loop in {count} of {of} spikes")
    for result, other in zip(results[1:], expected[1:], strict=True):
        torch.testing.assert_close(result, other, msg=lambda why: f"gradients of {name}: {why}")


def measure_point(dtype: str, steps: int, neurons: int, seconds: float, device: torch.device) -> Iterator[Point]:
    """One entry for each pass, after checking that all contestants compute the same."""
    torch.manual_seed(0)
    x = torch.randn(steps, neurons, device=device).to(getattr(torch, dtype)).requires_grad_()
    grad = torch.randn(steps, neurons, device=device).to(x.dtype)
    torch._dynamo.reset()  # compile for every shape, as for a user who has just one, and never run into a limit
    ours = stbp_cuda.LIFLayer(DECAY, V_THRESHOLD, stbp_cuda.surrogate.Rectangular(WIDTH), backend="fused")
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    for name, run in PASSES.items():
        layers: dict[str, Layer] = {"ours": ours, "eager": eager, "unbind": unbind, "copy": copy}
        expected = run(eager, x, grad)
        check("ours", run(ours, x, grad), expected)
        check("unbind", run(unbind, x, grad), expected)
        start = time.perf_counter()
        try:
            results = run(compiled, x, grad)
            compilation: Point = {"compile_seconds": time.perf_counter() - start}
            check("compile", results, expected)
            layers["compile"] = compiled
            del results
        except Exception as error:  # whatever the compiler raises: the others are measured all the same
            compilation = {"failed": f"{type(error).__name__}: {error}"}
        del expected
        times = measure({key: partial(run, layer, x, grad) for key, layer in layers.items()}, seconds, device)
        times["compile"] = {**times.get("compile", {}), **compilation}
        moved = x.nbytes * (2 if run is forward else 4)  # x and the spikes, and their gradients
        median = times["ours"]["median"]
        yield {
            "dtype": dtype,
            "steps": steps,
            "neurons": neurons,
            "pass": name,
            "x_bytes": x.nbytes,
            "moved_bytes": moved,
            "times": times,
            "gb_per_s": moved / median / 1e9,
            "share_of_copy": times["copy"]["median"] / median,
            "ratios": {rival: times[rival]["median"] / median for rival in RIVALS if "median" in times[rival]},
        }


def title(point: Point) -> str:
    return f"{point['dtype']} {point['steps']} x {point['neurons']:,} {point['pass']}"


def header() -> str:
    rivals = "".join(f"{rival + ' us':>14}{'ratio':>8}" for rival in RIVALS)
    return f"{'dtype':<9}{'T':>4}{'N':>11}  {'pass':<7}{'ours us':>11}  {'25-75 %':<19}{'GB/s':>6}{'copy':>6}{rivals}"


def row(point: Point) -> str:
    times = point["times"]
    low, high = (f"{1e6 * seconds:,.1f}" for seconds in times["ours"]["quartiles"])
    text = f"{point['dtype']:<9}{point['steps']:>4}{point['neurons']:>11,}  {point['pass']:<7}"
    text += f"{1e6 * times['ours']['median']:>11,.1f}  {f'{low}-{high}':<19}"
    text += f"{point['gb_per_s']:>6.1f}{point['share_of_copy']:>6.0%}"
    for rival, ratio in point["ratios"].items():
        text += f"{1e6 * times[rival]['median']:>14,.1f}{ratio:>7.2f}x"
    if "failed" in times["compile"]:
        return f"{text}  failed: {' '.join(times['compile']['failed'].split())[:80]}"
    return f"{text}  compiled in {times['compile']['compile_seconds']:.1f} s"


def digest(points: list[Point], main: list[Point], least: float, value: Callable[[Point], float]) -> Point | None:
    """The median over the main points, and the worst of all of them; None where there is nothing to tell."""
    if not points or not main:
        return None
    worst = min(points, key=value)
    return {
        "median": statistics.median(map(value, main)),
        "worst": value(worst),
        "worst_at": title(worst),
        "least": least,
        "below_at": [title(p) for p in points if value(p) < least],
        "points": len(points),
    }


def summarise(points: list[Point]) -> Point:
    """What the project promises, held against what was measured: True, False, or None where that does not tell."""
    training = [p for p in points if p["pass"] == "fwd+bwd"]
    training = [p for p in training if p["dtype"] == "float32"] or training
    large = [p for p in points if p["pass"] == "fwd" and p["x_bytes"] > SMALL]
    seen = {}
    for rival in RIVALS:
        known, main = ([p for p in some if rival in p["ratios"]] for some in (points, training))
        seen[rival] = digest(known, main, 1, lambda p, rival=rival: p["ratios"][rival])
    seen["copy"] = digest(large, large, 0.6, lambda p: p["share_of_copy"])
    failed_at = [title(p) for p in points if "failed" in p["times"]["compile"]]
    slower = any(seen[rival] and seen[rival]["below_at"] for rival in RIVALS)
    targets = {}
    for rival, least in ("eager", 10), ("compile", 1.5):
        name = f"fwd+bwd at least {least} x as fast as {RIVALS[rival]} (median)"
        targets[name] = seen[rival] and seen[rival]["median"] >= least
    targets["nowhere slower than any of them"] = False if slower else None if failed_at else True
    copied = seen["copy"]
    targets["fwd at least 60 % of a copy's bandwidth where x exceeds 64 KB"] = copied and not copied["below_at"]
    return {"against": seen, "compile_failed_at": failed_at, "targets": targets}


def show(summary: Point) -> None:
    print("\nours is, as the median of fwd+bwd in float32 (a copy: of fwd), and at worst:")
    for name, seen in summary["against"].items():
        label = {**RIVALS, "copy": "a copy where x > 64 KB"}[name]
        if seen:
            below = f"below {seen['least']:g} x at {len(seen['below_at'])} of {seen['points']}"
            print(f"{seen['median']:7.2f} x {label:<24}{seen['worst']:6.2f} x at {seen['worst_at']}; {below}")
        else:
            print(f"{'no result':<9} {label}")
    if summary["compile_failed_at"]:
        print(f"torch.compile failed at {', '.join(summary['compile_failed_at'])}")
    for target, met in summary["targets"].items():
        print(f"{'not known' if met is None else 'met' if met else 'NOT MET':<9} {target}")


def dots(axis: Axes, label: str, colour: str, seen: list[tuple[str, float, float]]) -> None:
    """A dot for every (dtype, x, y), and an entry of the legend."""
    for dtype, marker in MARKERS.items():
        places = [(x, y) for of, x, y in seen if of == dtype]
        axis.scatter([x for x, _ in places], [y for _, y in places], 26, colour, marker=marker, alpha=0.7, linewidths=0)
    axis.plot([], [], "o", color=colour, label=label)


def picture(points: list[Point], machine: Point) -> Figure:
    figure = Figure(figsize=(15, 5), dpi=120, layout="constrained")
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_instruction_set']}"
    figure.suptitle(f"One layer of LIF neurons, fused, on {where} (torch {machine['torch']})")
    training, inference, bandwidth = figure.subplots(1, 3)
    ratios = [ratio for p in points for ratio in p["ratios"].values()]
    inference.sharey(training)
    for axis, name in (training, "fwd+bwd"), (inference, "fwd"):
        for (rival, label), colour in zip(RIVALS.items(), ("tab:blue", "tab:cyan", "tab:orange"), strict=True):
            known = [p for p in points if p["pass"] == name and rival in p["ratios"]]
            dots(axis, label, colour, [(p["dtype"], p["steps"] * p["neurons"], p["ratios"][rival]) for p in known])
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=name, xlabel="T x N", ylabel="times as fast as", xscale="log", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(min(1, *ratios) / 1.5, max(ratios) * 5)  # every point, and room for the legend
        axis.legend(loc="upper left")
    for name, colour in ("fwd+bwd", "tab:purple"), ("fwd", "tab:green"):
        seen = [(p["dtype"], p["x_bytes"], 100 * p["share_of_copy"]) for p in points if p["pass"] == name]
        dots(bandwidth, name, colour, seen)
    bandwidth.set(title="bandwidth", xlabel="bytes of x", ylabel="% of a copy's", xscale="log", ylim=(0, None))
    bandwidth.hlines(60, SMALL, max(p["x_bytes"] for p in points), color="black", linewidth=1)
    for dtype in {p["dtype"]: None for p in points}:
        bandwidth.plot([], [], MARKERS[dtype], color="gray", label=dtype)
    bandwidth.legend()
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    return figure


def describe(device: torch.device) -> Point:
    """The machine, and what runs on it."""
    cpu, gpu, driver = platform.processor() or platform.machine(), None, None
    with contextlib.suppress(OSError):
        cpu = (re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    load = os.getloadavg() if hasattr(os, "getloadavg") else None  # by others, at the start
    here = {"date": date, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load}
    return {**here, "gpu": gpu, "driver": driver, **stbp_cuda.build_info()}


def write(path: Path, data: bytes) -> None:
    """All or nothing: an interrupted run leaves the file of the one before."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
    print(path)


def grid(args: argparse.Namespace, device: torch.device) -> list[tuple[str, int, int]]:
    """Every dtype, T and N to measure, but none where the eager loop's dozen tensors of T x N may not fit."""
    most = 2**27 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory // 32
    points = []
    for dtype in args.dtypes:
        steps, neurons = ((1, 4, 8, 16, 30, 100), NEURONS[device.type]) if dtype == "float32" else SMALL_GRID
        if args.quick:
            steps, neurons = QUICK_GRID
        pairs = list(itertools.product(args.steps or steps, args.neurons or neurons))
        if dtype == "float32" and not (args.quick or args.steps or args.neurons):
            pairs.append((30, 80000))  # a layer of 800 neurons and a batch of 100
        for pair in pairs:
            if math.prod(pair) * getattr(torch, dtype).itemsize <= most:
                points.append((dtype, *pair))
            else:
                print(f"left out: {dtype} {pair[0]} x {pair[1]:,}, as x is larger than {most >> 20:,} MiB")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--dtypes", nargs="+", choices=MARKERS, help="default: all; with --quick float32")
    add("--steps", nargs="+", type=int, metavar="T", help="in place of the grid's")
    add("--neurons", nargs="+", type=int, metavar="N", help="in place of the grid's")
    add("--seconds", type=float, help="for each point and pass; default 2, with --quick 0.3")
    add("--threads", type=int, help="of the CPU; default torch's own choice")
    add("--quick", action="store_true", help="a small grid; writes speed-<device>-quick.*")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder; default bench/results")
    args = parser.parse_args()
    numbers = (args.seconds, args.threads, *(args.steps or ()), *(args.neurons or ()))
    if not all(number is None or 0 < number < math.inf for number in numbers):
        parser.error("--steps, --neurons, --seconds and --threads must be positive")
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device).item()
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).partition("\n")[0])
    if problem := fused_backend_problem(device):
        parser.error(f"there is nothing to measure on {device}: {problem}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtypes = args.dtypes or (["float32"] if args.quick else list(MARKERS))
    args.seconds = args.seconds or (0.3 if args.quick else 2.0)

    sys.stdout.reconfigure(line_buffering=True)  # a pipe shows each line of the table as it comes, too
    machine = describe(device)
    todo = grid(args, device)
    points: list[Point] = []
    print(header())
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        tqdm(total=len(PASSES) * len(todo), disable=None) as bar,
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # compile for real, whatever ran before
        with contextlib.suppress(Exception):  # what only the first compilation takes; an error comes back below
            torch.compile(eager)(torch.randn(2, 3, device=device))
        for dtype, steps, neurons in todo:
            bar.set_description(f"{dtype} {steps} x {neurons:,}")
            for point in measure_point(dtype, steps, neurons, args.seconds, device):
                points.append(point)
                bar.write(row(point))
                bar.update()
    if not points:
        parser.error("no point is left to measure")
    summary = summarise(points)
    show(summary)
    name = f"speed-{device.type}{'-quick' if args.quick else ''}"
    result = {"machine": machine, "seconds": args.seconds, "summary": summary, "points": points}
    write(args.out / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    image = io.BytesIO()
    picture(points, machine).savefig(image)
    write(args.out / f"{name}.png", image.getvalue())


if __name__ == "__main__":
    main()
