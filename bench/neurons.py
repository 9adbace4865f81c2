"""What parameters per channel, learned parameters, time in second place and read-outs cost.

    python bench/neurons.py            on the GPU if there is one
    python bench/neurons.py --quick    two shapes, float32
    python bench/neurons.py --help     everything else

Times, in one run and on the same random input, against the plain LIFLayer: decay, threshold, scale and shift per
channel, as constants and all learned; and the input as [B, T, ...]. Against rivals: PLIFLayer with one learned decay
against SpikingJelly's ParametricLIFNode and a loop over time, LILayer against a loop. All are checked to give the same
before they are timed. Prints a table, writes neurons-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import harness
import malloc
import torch
from matplotlib.figure import Figure
from rivals import Spike, load
from torch import Tensor, nn
from tqdm import tqdm

import stbp_cuda
from stbp_cuda.surrogate import Atan

# T, B, C, H, W, from the caches to far beyond them.
SHAPES = ((4, 16, 64, 16, 16), (4, 32, 128, 32, 32), (8, 16, 128, 15, 15), (16, 16, 128, 16, 16))
QUICK_SHAPES = SHAPES[::2]
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "backward", "fwd+bwd")
FOUR = ("decay", "v_threshold", "scale", "shift")
# What is compared, in which pass, and at least how fast as a multiple of the other one; medians over the grid.
TARGETS = (
    ("per channel", "plain", "forward", 0.85),
    ("all four learned", "plain", "backward", 0.75),
    ("[B, T, ...]", "plain", "fwd+bwd", 0.95),
    ("PLIFLayer", "SpikingJelly ParametricLIFNode", "fwd+bwd", 10.0),
    ("PLIFLayer", "loop with a learned decay", "fwd+bwd", 10.0),
    ("LILayer", "loop without spikes", "fwd+bwd", 10.0),
)


class ParametricLoop(nn.Module):
    """PLIF as a loop over time, with the operations of the kernel: v + (x - v) k as (1 - k) v + k x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.surrogate = Atan(1.0)

    def forward(self, x: Tensor) -> Tensor:
        k = self.w.sigmoid()
        v = torch.zeros_like(x[0], dtype=torch.float32)
        spikes = []
        for current in x:
            u = (1 - k) * v + (k * current.float() + 0.0)
            o = Spike.apply(u, 1.0, self.surrogate)
            v = u * (1 - o)
            spikes.append(o.to(x.dtype))
        return torch.stack(spikes)


class LeakyLoop(nn.Module):
    """A leaky integrator as a loop over time."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0], dtype=torch.float32)
        outputs = []
        for current in x:
            v = 0.9 * v + current.float()
            outputs.append(v.to(x.dtype))
        return torch.stack(outputs)


class SpikingJellyPlif(nn.Module):
    """Their node, with its state forgotten before each call."""

    def __init__(self) -> None:
        super().__init__()
        neuron = load("spikingjelly.activation_based.neuron")
        surrogate = load("spikingjelly.activation_based.surrogate")
        self.node = neuron.ParametricLIFNode(
            init_tau=2.0, detach_reset=False, v_reset=0.0, step_mode="m", surrogate_function=surrogate.ATan(alpha=2.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        result: Tensor = self.node(x.float()).to(x.dtype)
        return result


def contestants(channels: int, device: torch.device) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(0)
    four = {name: 0.3 + 0.5 * torch.rand(channels, generator=generator) for name in FOUR}
    layers: dict[str, nn.Module] = {
        "plain": stbp_cuda.LIFLayer(0.5, backend="fused"),
        "[B, T, ...]": stbp_cuda.LIFLayer(0.5, time_dim=1, backend="fused"),
        "per channel": stbp_cuda.LIFLayer(**four, backend="fused"),
        "all four learned": stbp_cuda.LIFLayer(
            **{name: nn.Parameter(value.clone()) for name, value in four.items()}, backend="fused"
        ),
        "PLIFLayer": stbp_cuda.PLIFLayer(surrogate=Atan(1.0), backend="fused"),
        "LILayer": stbp_cuda.LILayer(0.9, backend="fused"),
        "loop with a learned decay": ParametricLoop(),
        "loop without spikes": LeakyLoop(),
    }
    if harness.version("spikingjelly"):
        layers["SpikingJelly ParametricLIFNode"] = SpikingJellyPlif()
    return {name: layer.to(device) for name, layer in layers.items()}


SAME = (
    ("plain", "[B, T, ...]"),
    ("per channel", "all four learned"),
    ("PLIFLayer", "loop with a learned decay"),
    ("PLIFLayer", "SpikingJelly ParametricLIFNode"),
    ("LILayer", "loop without spikes"),
)


def check(layers: dict[str, nn.Module], inputs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Raise unless all that should be the same is: at most one spike in 10,000 may differ, where sums are rounded
    otherwise."""
    found = {}
    for name, layer in layers.items():
        x, grad = inputs[name]
        x.grad = None
        result = layer(x)
        result.backward(grad)
        assert x.grad is not None
        pair = (result.detach(), x.grad)
        found[name] = [tensor.movedim(1, 0) if name == "[B, T, ...]" else tensor for tensor in pair]
    for ours, theirs in SAME:
        if theirs in found:
            for a, b in zip(found[ours], found[theirs], strict=True):
                differ = ~torch.isclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
                if differ.float().mean() > 1e-4:
                    raise AssertionError(f"{ours} and {theirs} differ in {differ.float().mean():.2%} of the numbers")


def point(shape: tuple[int, ...], dtype: str, seconds: float, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype)) for _ in range(2))
    layers = contestants(shape[2], device)
    inputs = {name: (x.clone().requires_grad_(), grad) for name in layers}
    second = [tensor.movedim(0, 1).contiguous() for tensor in (x, grad)]
    inputs["[B, T, ...]"] = (second[0].requires_grad_(), second[1])
    check(layers, inputs)

    def forward(name: str) -> Callable[[], object]:
        layer, current = layers[name], inputs[name][0]

        def run() -> None:
            with torch.no_grad():
                layer(current)

        return run

    def both(name: str) -> Callable[[], object]:
        layer, (current, upstream) = layers[name], inputs[name]

        def run() -> None:
            current.grad = None
            layer.zero_grad()
            layer(current).backward(upstream)

        return run

    def backward(name: str) -> Callable[[], object]:
        current, upstream = inputs[name]
        result = layers[name](current)
        wanted = [current, *layers[name].parameters()]
        return lambda: torch.autograd.grad(result, wanted, upstream, retain_graph=True)

    points = []
    for pass_, make in zip(PASSES, (forward, backward, both), strict=True):
        compared = [target for target in TARGETS if target[2] == pass_]
        names = dict.fromkeys(name for target in compared for name in target[:2] if name in layers)
        times = harness.measure({name: make(name) for name in names}, seconds * len(names) / 3, device)
        ratios = {
            f"{ours} / {theirs}": times[theirs]["median"] / times[ours]["median"]
            for ours, theirs, *_ in compared
            if theirs in times
        }
        points.append({"shape": shape, "dtype": dtype, "pass": pass_, "times": times, "ratios": ratios})
    return points


def summarise(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    summary = {}
    for ours, theirs, pass_, _ in TARGETS:
        seen = [p["ratios"][f"{ours} / {theirs}"] for p in points if f"{ours} / {theirs}" in p["ratios"]]
        if seen:
            summary[f"{ours} / {theirs}"] = {"pass": pass_, "median": statistics.median(seen), "worst": min(seen)}
    return summary


def picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    figure.suptitle(f"Times as fast as what it is compared with, on {harness.where(machine)}")
    axes = figure.subplots(2, 1, height_ratios=(3, 3))
    for axis, rivals in zip(axes, (False, True), strict=True):
        shown = [target for target in TARGETS if (target[3] > 1) == rivals]
        labels = sorted({f"{' x '.join(map(str, p['shape']))}, {p['dtype']}" for p in points})
        for i, (ours, theirs, pass_, least) in enumerate(shown):
            key = f"{ours} / {theirs}"
            values = {
                f"{' x '.join(map(str, p['shape']))}, {p['dtype']}": p["ratios"][key]
                for p in points
                if key in p["ratios"]
            }
            places = [y + 0.27 * (i - 1) for y in range(len(labels))]
            bars = axis.barh(places, [values.get(label, 0) for label in labels], 0.25, label=f"{key}, {pass_}")
            axis.bar_label(bars, fmt="%.2f" if not rivals else "%.1f", fontsize=7, padding=2)
            axis.axvline(least, color=bars[0].get_facecolor(), linestyle="--", linewidth=1)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xlabel("times as fast; dashed: the least that is wanted of the median")
        axis.margins(x=0.1)
        axis.grid(alpha=0.3, axis="x")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.invert_yaxis()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    malloc.add_option(parser)
    args = parser.parse_args()
    device = harness.prepare(parser, args)
    machine = harness.describe(device)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    name_of_result = f"neurons-{device.type}{'-quick' if args.quick else ''}"
    points = harness.Points(args.out, name_of_result, machine)
    cases = list(itertools.product(DTYPES[: 1 if args.quick else 2], shapes))
    print(f"{'T x B x C x H x W':<24}{'dtype':<10}times as fast")
    with tqdm(total=len(cases), disable=None) as bar:
        for dtype, shape in cases:
            for found in point(shape, dtype, args.seconds, device):
                points.append(found)
                ratios = ", ".join(f"{key} ({found['pass']}): {ratio:.2f}" for key, ratio in found["ratios"].items())
                bar.write(f"{' x '.join(map(str, shape)):<24}{dtype:<10}{ratios}")
            bar.update()
    summary = summarise(points)
    targets = {}
    for ours, theirs, pass_, least in TARGETS:
        seen = summary.get(f"{ours} / {theirs}")
        if seen is None:
            continue
        print(f"{ours} / {theirs}, {pass_}: {seen['median']:.2f} (median), at worst {seen['worst']:.2f}")
        targets[f"{ours} at least {least:g} x as fast as {theirs}, {pass_} (median)"] = seen["median"] >= least
    for target, met in targets.items():
        print(f"{'met' if met else 'NOT MET':<9}{target}")
    result = {"machine": machine, "summary": summary, "targets": targets, "points": points}
    harness.write_json(args.out / f"{name_of_result}.json", result)
    harness.save(picture(points, machine), args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    malloc.start(main)
