"""How fast neurons with normalisation are, fused and as two layers: NeuNormLIF against LIFLayer and NeuNorm.

    python bench/neunorm.py            the convolutional layers of arXiv:1809.05793, on the GPU if there is one
    python bench/neunorm.py --quick    two of them
    python bench/neunorm.py --help     everything else

All are checked to give the same before they are timed. What must move is read and written once: the current and the
normalised spikes forward, the current again and both gradients backward, 20 bytes for each neuron and step in float32
and 10 in half types; the auxiliary map is a C-th of that. Each layer is timed contiguous and in channels_last. Prints a
table, writes neunorm-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from typing import Any

import harness
import malloc
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import stbp_cuda

# T, B, C, H, W: the layers that have a NeuNorm in CIFARNet, in its speed networks, and in the neuromorphic network.
SHAPES = (
    (8, 4, 128, 32, 32),
    (8, 4, 256, 32, 32),
    (8, 4, 512, 16, 16),
    (8, 4, 1024, 8, 8),
    (10, 4, 128, 34, 34),
    (10, 4, 128, 17, 17),
    (30, 4, 15, 24, 24),
)
QUICK_SHAPES = (SHAPES[2], SHAPES[5])
DTYPES = ("float32", "bfloat16")
ORDERS = ("contiguous", "channels_last")  # of the input and of the gradient that arrives
PASSES = ("fwd", "fwd+bwd")
LEAST = 2.0  # times as fast as the two layers, forward and backward


class TwoLayers(nn.Module):
    """The fused neurons, then the normalisation in PyTorch."""

    def __init__(self, shape: tuple[int, ...], backend: str) -> None:
        super().__init__()
        self.lif = stbp_cuda.LIFLayer(backend=backend)  # type: ignore[arg-type]
        self.norm = stbp_cuda.NeuNorm(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.lif(x))


def contestants(shape: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        "NeuNormLIF": stbp_cuda.NeuNormLIF(shape, backend="fused"),
        "LIFLayer + NeuNorm": TwoLayers(shape, "fused"),
        "eager loop + NeuNorm": TwoLayers(shape, "reference"),
    }
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(shape, generator=generator)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data.copy_(weight)
        layer.to(device)
    return layers


def train(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x.grad = None
    layer.zero_grad()
    result = layer(x)
    result.backward(grad)
    assert x.grad is not None
    return result.detach(), x.grad


def infer(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def point(shape: tuple[int, ...], dtype: str, order: str, seconds: float, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(1)
    number = getattr(torch, dtype)
    x, grad = (torch.randn(shape, generator=generator, device=device).to(number) for _ in range(2))
    if order == "channels_last":
        x, grad = (tensor.movedim(2, -1).contiguous().movedim(-1, 2) for tensor in (x, grad))
    x.requires_grad_()
    layers = contestants(shape[2:], device)
    results = {name: train(layer, x, grad) for name, layer in layers.items()}
    for name, found in results.items():
        for ours, theirs in zip(results["NeuNormLIF"], found, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
            )
    points = []
    for name, run in zip(PASSES, (infer, train), strict=True):
        runs = {label: lambda layer=layer, run=run: run(layer, x, grad) for label, layer in layers.items()}
        target = torch.empty_like(x)
        times = harness.measure({**runs, "copy": lambda target=target: target.copy_(x.detach())}, seconds, device)
        moved = x.nbytes * (2 if name == "fwd" else 5)
        median = times["NeuNormLIF"]["median"]
        points.append(
            {
                "shape": shape,
                "dtype": dtype,
                "order": order,
                "pass": name,
                "times": times,
                "moved_bytes": moved,
                "gb_per_s": moved / median / 1e9,
                "of_a_copy": moved / (2 * x.nbytes) * times["copy"]["median"] / median,
                "ratios": {label: times[label]["median"] / median for label in list(layers)[1:]},
            }
        )
    return points


def row(found: dict[str, Any]) -> str:
    neurons = math.prod(found["shape"])
    text = f"{' x '.join(map(str, found['shape'])):<22}{found['dtype']:<10}{found['order']:<14}{found['pass']:<8}"
    text += f"{1e9 * found['times']['NeuNormLIF']['median'] / neurons:>8.3f}{found['gb_per_s']:>8.1f}"
    text += f"{found['of_a_copy']:>8.0%}"
    return text + "".join(f"{ratio:>22.2f} x" for ratio in found["ratios"].values())


def summarise(points: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {}
    for name in PASSES:
        seen = [found["ratios"]["LIFLayer + NeuNorm"] for found in points if found["pass"] == name]
        summary[name] = {"median": statistics.median(seen), "worst": min(seen), "points": len(seen)}
    return summary


def picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    figure.suptitle(f"Neurons with normalisation, {points[0]['dtype']}, on {harness.where(machine)}")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name in zip(axes, reversed(PASSES), strict=True):
        shown = [p for p in points if p["pass"] == name and p["dtype"] == points[0]["dtype"]]
        labels = [label for label in shown[0]["times"] if label != "copy"]
        for i, label in enumerate(labels):
            places = [y + 0.27 * (i - 1) for y in range(len(shown))]
            values = [1e9 * found["times"][label]["median"] / math.prod(found["shape"]) for found in shown]
            colour = ("red", "tab:blue", "tab:gray")[i]
            bars = axis.barh(places, values, 0.25, label=label, color=colour)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.set_yticks(
            range(len(shown)), [f"{' x '.join(map(str, found['shape']))}, {found['order']}" for found in shown]
        )
        axis.set(title=name, xlabel="ns for each neuron and step")
        axis.margins(x=0.15)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_ylabel("T x B x C x H x W")
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    malloc.add_option(parser)
    args = parser.parse_args()
    device = harness.prepare(parser, args)
    machine = harness.describe(device)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    dtypes = DTYPES[: 1 if args.quick else 2]
    name_of_result = f"neunorm-{device.type}{'-quick' if args.quick else ''}"
    points = harness.Points(args.out, name_of_result, machine)
    print(f"{'T x B x C x H x W':<22}{'dtype':<10}{'order':<14}{'pass':<8}{'ns':>8}{'GB/s':>8}{'copy':>8}", end="")
    print(f"{'LIFLayer + NeuNorm':>24}{'eager loop + NeuNorm':>24}")
    cases = list(itertools.product(dtypes, shapes, ORDERS))
    with tqdm(total=len(cases), disable=None) as bar:
        for dtype, shape, order in cases:
            for found in point(shape, dtype, order, args.seconds, device):
                points.append(found)
                bar.write(row(found))
            bar.update()
    summary = summarise(points)
    for name, seen in summary.items():
        print(f"{name}: {seen['median']:.2f} x as fast as the two layers (median), at worst {seen['worst']:.2f} x")
    targets = {
        f"fwd+bwd at least {LEAST:g} x as fast as LIFLayer and NeuNorm ({where})": summary["fwd+bwd"][which] >= LEAST
        for which, where in (("median", "median over the layers"), ("worst", "each layer"))
    }
    for target, met in targets.items():
        print(f"{'met' if met else 'NOT MET':<9}{target}")
    result = {"machine": machine, "summary": summary, "targets": targets, "points": points}
    harness.write_json(args.out / f"{name_of_result}.json", result)
    harness.save(picture(points, machine), args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    malloc.start(main)
