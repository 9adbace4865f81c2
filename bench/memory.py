"""How much memory one layer of LIF neurons takes in training: the fused layer and every rival that is installed.

    python bench/memory.py              16 steps of a million neurons in float32, on the GPU if there is one
    python bench/memory.py --growing    what the CPU's malloc makes of sizes that grow from call to call
    python bench/memory.py --help       everything else

For each contestant: the bytes that autograd keeps between forward and backward, each storage counted once, and how many
of these are x itself, which the layer before keeps anyway; what the process (on a GPU: torch's allocator) has grown by
between the two, which should be these without x, but with the spikes; and the peak of forward and backward, beside x
and the gradient of the spikes, which were there before, but with the spikes, the gradient of x, and what the C
library's allocator cannot use again. That last part varies from process to process where there are many tensors, by a
tenth and now and then by half: on a CPU the peak is the median of three processes.

On a CPU, each figure is measured in a copy of this process, where no freed memory lies ready to be used again unseen.

Prints a table of bytes for each neuron and step, and writes memory-<device>.json and .png. With --growing it prints no
more than the peak, and what is left when all results are freed, for the fused layer and the allocator of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from harness import (
    Points,
    add_arguments,
    describe,
    in_fork,
    in_fresh_process,
    memory_in_use,
    peak_memory,
    positive,
    prepare,
    release_free_memory,
    resident_memory,
    save,
    where,
    write_json,
)
from matplotlib.figure import Figure
from rivals import RIVALS, Layer, forward_backward, random_input
from torch import Tensor
from tqdm import tqdm

import stbp_cuda

DTYPES = ("float32", "bfloat16", "float16", "float64")
PEAKS = 3  # processes for the median of a peak
FEW = 64  # neurons to warm up with


def known_counts(steps: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, str]]:
    """Bytes for each neuron and step that kernels keep for backward, by their design: how many, and what they are."""
    size, state = dtype.itemsize, 8 if dtype == torch.float64 else 4
    states = (steps - 1) // stbp_cuda.build_info()[f"{device.type}_chunk"] * state / steps
    fused = () if dtype == torch.float64 else ("spikingjelly-native", "spikingjelly-triton")
    return {
        # docs/kernel.md, Recomputation
        "ours": (size + states, "x, and a state every K steps"),
        # _ops/lif/autograd.py of 2.0.0 saves the third output of its kernels, h, and nothing else
        **dict.fromkeys(fused, (4, "the float32 charged potential h")),
        # of 16 bytes that its forward kernel moves (read x; write s, h, v), h and v stay
        "SpikingJelly 0.0.0.0.14, CuPy": (2 * size, "h and v"),
    }


@dataclass(eq=False)
class Saved:
    """A tensor that autograd keeps, for as long as it does."""

    tensor: Tensor


def set_up(name: str, steps: int, neurons: int, dtype: str, device: str, threads: int) -> tuple[Layer, Tensor, Tensor]:
    """A layer, its input and the gradient of its spikes, after all that is loaded, started or compiled only once."""
    torch.set_num_threads(threads)
    at, number = torch.device(device), getattr(torch, dtype)
    layer = RIVALS[name].layer(at)
    forward_backward(layer, *random_input(steps, neurons if name == "compile" else FEW, number, at))
    return layer, *random_input(steps, neurons, number, at)


def kept(layer: Layer, x: Tensor) -> dict[str, int | None]:
    """What is there between forward and backward."""
    saved: list[weakref.ref[Saved]] = []

    def keep(tensor: Tensor) -> Saved:
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    release_free_memory()
    before = memory_in_use(x.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        spikes = layer(x)
    release_free_memory()
    after = memory_in_use(x.device)
    alive = [kept.tensor.untyped_storage() for ref in saved if (kept := ref())]
    storages = {storage.data_ptr(): storage.nbytes() for storage in alive}
    return {
        "kept": sum(storages.values()),
        "kept_input": storages.get(x.untyped_storage().data_ptr(), 0),
        "growth": None if before is None or after is None else after - before,
        "spikes": spikes.nbytes,
    }


def peak(layer: Layer, x: Tensor, grad: Tensor) -> int | None:
    """What forward and backward take at most."""
    return peak_memory(lambda: layer(x).backward(grad), x.device)


def kept_apart(*what: Any) -> dict[str, int | None]:
    return kept(*set_up(*what)[:2])


def peak_apart(*what: Any) -> int | None:
    return peak(*set_up(*what))


def measured(peaks: int, device: torch.device, *what: Any) -> dict[str, int | None]:
    """All figures of a contestant; on a CPU with the median of so many peaks."""
    if device.type == "cuda":  # where torch counts, whatever was there before
        layer, x, grad = set_up(*what)
        return {**kept(layer, x), "peak": peak(layer, x, grad)}
    found = [size for _ in range(peaks) if (size := in_fork(peak_apart, *what)) is not None]
    return {**in_fork(kept_apart, *what), "peak": statistics.median_low(found) if found else None}


def growing(train: bool, threads: int, steps: int = 64, neurons: int = 2**18) -> tuple[float, float] | None:
    """What a process holds of calls for 1, 2, ... steps, as recordings of growing length would make them: at most, and
    two seconds after all results are freed. In sizes of the largest input, beside which they come; None where that
    cannot be known."""
    torch.set_num_threads(threads)
    layer, x = stbp_cuda.LIFLayer(), torch.randn(steps, neurons)

    def call(count: int) -> Tensor:
        spikes = layer(x[:count].requires_grad_(train))
        if train:
            spikes.sum().backward()
        return spikes

    def calls() -> None:
        for count in range(1, steps + 1):
            spikes = call(count)  # while the spikes of the call before are alive, and in training their gradients
        del spikes

    call(1)
    release_free_memory()
    before = resident_memory()
    most = peak_memory(calls, x.device)
    time.sleep(2)  # some allocators give back with a delay, and then only when they are called
    call(1)
    after = resident_memory()
    if before is None or most is None or after is None:
        return None
    return most / x.nbytes, (after - before) / x.nbytes


def row(point: dict[str, Any]) -> str:
    numbers = (point["per_neuron_step"].get(key) for key in ("kept", "kept_input", "growth", "peak"))
    text = f"{point['dtype']:<9} {point['label']:<32}"
    text += "".join(f"{'not known' if number is None else f'{number:.2f}':>11}" for number in numbers)
    known = point["known"]
    return f"{text}   {known['bytes']:.2f}: {known['what']}" if known else text


def picture(points: list[dict[str, Any]], machine: dict[str, Any], steps: int, neurons: int) -> Figure:
    dtypes = list(dict.fromkeys(point["dtype"] for point in points))
    most = max(sum(point["dtype"] == dtype for point in points) for dtype in dtypes)
    figure = Figure(figsize=(1 + 8 * len(dtypes), 2.2 + 0.5 * most), dpi=120, layout="constrained")
    figure.suptitle(f"Memory of one layer in training, {steps} steps of {neurons:,} neurons\non {where(machine)}")
    (axes,) = figure.subplots(1, len(dtypes), squeeze=False)
    for axis, dtype in zip(axes, dtypes, strict=True):
        shown = [point for point in points if point["dtype"] == dtype]
        for y, point in enumerate(shown):
            of = point["per_neuron_step"]
            if of.get("peak") is not None:
                axis.barh(y - 0.2, of["peak"], 0.38, color="tab:gray", label="peak")
                axis.annotate(f" {of['peak']:.1f}", (of["peak"], y - 0.2), va="center", fontsize=8)
            if "kept" in of:
                own = of["kept"] - of["kept_input"]
                axis.barh(y + 0.2, of["kept_input"], 0.38, color="tab:cyan", label="kept for backward: x itself")
                axis.barh(y + 0.2, own, 0.38, of["kept_input"], color="tab:blue", label="kept for backward: the rest")
                axis.annotate(f" {of['kept']:.1f}", (of["kept"], y + 0.2), va="center", fontsize=8)
            if point["known"]:
                count = point["known"]["bytes"]
                axis.plot([count] * 2, [y, y + 0.4], color="black", linewidth=2, label="kept, by design")
        axis.set(title=dtype, xlabel="bytes for each neuron and step")
        labels = [point["label"] + ("" if "kept" in point else "\n(not measured here)") for point in shown]
        axis.set_yticks(range(len(shown)), labels)
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.margins(x=0.1)
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=2 * len(dtypes))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, seconds=None)
    add = parser.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    add("--steps", type=positive(int), default=16, metavar="T", help="default 16")
    add("--neurons", type=positive(int), metavar="N", help=f"default {2**20:,}, with --quick {2**18:,}")
    add("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="NAME", help=f"of {', '.join(RIVALS)}")
    add("--growing", action="store_true", help="measure that instead, on a CPU")
    args = parser.parse_args()
    device = prepare(parser, args)
    if args.growing:
        for train in False, True:
            found = in_fresh_process(growing, train, torch.get_num_threads())
            text = "peak {:.2f}, kept {:.2f}".format(*found) if found else "not known"
            print(f"{'training' if train else 'inference':<10} {text} times the largest input")
        return
    neurons = args.neurons or (2**18 if args.quick else 2**20)

    machine = describe(device)
    name_of_result = f"memory-{device.type}{'-quick' if args.quick else ''}"
    points = Points(args.out, name_of_result, machine)
    failed: dict[str, str] = {}
    print(f"bytes for each neuron and step; {args.steps} steps of {neurons:,} neurons")
    print(f"{'dtype':<9} {'':<32}{'kept':>11}{'of it x':>11}{'growth':>11}{'peak':>11}   kept, by design")
    with tqdm(total=len(args.dtypes) * len(args.rivals), disable=None) as bar:
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            counts = known_counts(args.steps, dtype, device)
            for name in dict.fromkeys([*args.rivals, *counts]):
                taken: dict[str, Any] = {}
                if name in args.rivals:
                    bar.update()
                    problem = RIVALS[name].problem(device, dtype)
                    if not problem:
                        try:
                            what = (name, args.steps, neurons, dtype_name, args.device, torch.get_num_threads())
                            peaks = 1 if args.quick or name == "compile" else PEAKS  # compiling takes longest
                            taken = measured(peaks, device, *what)
                        except Exception as error:  # whatever a rival raises: the others are measured all the same
                            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    if problem:
                        failed[f"{dtype_name} {name}"] = problem
                known = dict(zip(("bytes", "what"), counts[name], strict=True)) if name in counts else None
                if not taken and not known:
                    continue
                every = args.steps * neurons
                per = {key: None if value is None else value / every for key, value in taken.items()}
                label = RIVALS[name].label if name in RIVALS else name
                point = {"dtype": dtype_name, "name": name, "label": label, "known": known}
                points.append({**point, **taken, "per_neuron_step": per})
                bar.write(row(points[-1]))
    for name, problem in failed.items():
        print(f"not measured: {name}: {problem}")
    result = {"machine": machine, "steps": args.steps, "neurons": neurons, "not_measured": failed, "points": points}
    write_json(args.out / f"{name_of_result}.json", result)
    save(picture(points, machine, args.steps, neurons), args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    main()
