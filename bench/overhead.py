"""Where the host's time goes in a small layer: forward and backward of so few neurons that the kernels take none of it.

    python bench/overhead.py            on the GPU if there is one
    python bench/overhead.py --help     everything else

Times, in the same run: ``x * 2``, which has the cost of any differentiable operation; the same as an autograd.Function,
of which the layer should take at most 1.5 times as long; the layer; each of its parts, from the operator up; other ways
to write the autograd function; and the rivals. On a GPU the kernels run on while the host goes ahead, and the clock is
the host's. Prints a table, writes overhead-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import torch
from matplotlib.figure import Figure
from rivals import RIVALS, random_input
from torch import Tensor

import stbp_cuda
from stbp_cuda import autograd, engine, functional, ops
from stbp_cuda.neurons import LIF

BASE, MOST = "x * 2 as an autograd.Function", 1.5  # the layer may take so many times as long
LEFT_OUT = ("ours", "compile")  # of the rivals: the layer has its own line, and a compiled function runs no Python


class Times2(torch.autograd.Function):
    """What ``torch.autograd.Function`` costs by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Decorated(torch.autograd.Function):
    """The layer's function with the customary decorator."""

    forward = autograd.FusedNeuron.forward
    backward = staticmethod(torch.autograd.function.once_differentiable(autograd.FusedNeuron.backward))


def registered() -> Callable[..., Tensor]:
    """The layer's function as ``torch.library`` would have it: an operator with a registered gradient."""

    @torch.library.custom_op("stbp_cuda_bench::lif", mutates_args=())
    def lif(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        spikes, _, _, states = ops.eager_neuron_forward(x, None, None, None, steps, NEURON, ASKED)
        return spikes, x.new_empty(0) if states is None else states

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.steps = inputs
        ctx.save_for_backward(x, output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_spikes: Tensor, grad_states: None) -> tuple[Tensor, None]:
        x, states = ctx.saved_tensors
        saved = (x, None, None, None, states)
        return ops.eager_neuron_backward(grad_spikes, None, None, *saved, ctx.steps, NEURON, 0)[0], None

    lif.register_autograd(backward, setup_context=setup_context)
    return lambda x, steps: lif(x, steps)[0]


NEURON = LIF(decay=0.5).text()
ASKED = ops.OUTPUT + ops.STATES


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    x.grad = None
    function(x).backward(grad)


def host_seconds(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, Any]]:
    """By the host's clock, whatever the device: its work is not waited for, but between the samples."""
    times = harness.measure(runs, seconds * len(runs), torch.device("cpu"))
    for value in times.values():
        value["microseconds"] = 1e6 * value["median"]
    return times


def contestants(steps: int, neurons: int, device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    x, grad = random_input(steps, neurons, torch.float32, device)
    plain = x.detach()
    layer = stbp_cuda.LIFLayer(0.5, 0.75, backend="fused")
    call = engine.check_call(LIF(decay=0.5), None, 0, "fused")
    call_of_function = (steps, NEURON, ops.OUTPUT, None)
    states = ops.eager_neuron_forward(plain, None, None, None, steps, NEURON, ASKED)[3]
    way = functools.partial(both_ways, x=x, grad=grad)
    return {
        "forward and backward": {
            "x * 2": lambda: way(lambda x: x * 2),
            BASE: lambda: way(Times2.apply),
            "LIFLayer": lambda: way(layer),
            "its autograd.Function": lambda: way(lambda x: autograd.FusedNeuron.apply(x, None, None, call_of_function)),
            "with once_differentiable": lambda: way(lambda x: Decorated.apply(x, None, None, call_of_function)),
            "with register_autograd": functools.partial(way, functools.partial(registered(), steps=steps)),
            **{
                rival.label: functools.partial(way, rival.layer(device))
                for name, rival in RIVALS.items()
                if name not in LEFT_OUT and rival.problem(device) is None
            },
        },
        "parts": {
            "operator, forward": lambda: ops.eager_neuron_forward(plain, None, None, None, steps, NEURON, ASKED),
            "public operator, forward": lambda: ops.neuron_forward(
                plain, None, None, None, steps, 0, False, NEURON, None, 0, True, False, True
            ),
            "operator, backward": lambda: ops.eager_neuron_backward(
                grad, None, None, plain, None, None, None, states, steps, NEURON, 0
            ),
            "autograd.Function, forward": lambda: autograd.FusedNeuron.apply(x, None, None, call_of_function),
            "checks of x, and the Function": lambda: engine.run(x, call),
            "LIFLayer, forward": lambda: layer(x),
            "functional.lif, forward": lambda: functional.lif(x, backend="fused"),
            "LIFLayer, forward, no_grad": lambda: layer(plain),
            "x * 2, no_grad": lambda: plain * 2,
        },
    }


def picture(times: dict[str, dict[str, Any]], machine: dict[str, Any], shape: str) -> Figure:
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axis = figure.subplots()
    names = list(times)[::-1]
    bars = axis.barh(names, [times[name]["microseconds"] for name in names], color="tab:blue")
    axis.bar_label(bars, fmt="%.0f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.axvline(MOST * times[BASE]["microseconds"], color="black", linewidth=1, linestyle="--", zorder=0)
    axis.set(xlabel=f"us of the host (dashed: what the layer may take, {MOST:g} x that of {BASE})")
    axis.margins(x=0.1)
    axis.set_title(f"Forward and backward of {shape} neurons\n{harness.where(machine)}", fontsize="medium")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, seconds=1.0, quick_seconds=0.2)
    parser.add_argument("--steps", type=harness.positive(int), default=4, metavar="T", help="default 4")
    parser.add_argument("--neurons", type=harness.positive(int), default=32, metavar="N", help="default 32")
    args = parser.parse_args()
    device = harness.prepare(parser, args)
    machine = harness.describe(device)
    name_of_result = f"overhead-{device.type}{'-quick' if args.quick else ''}"
    points = harness.Points(args.out, name_of_result, machine)
    times = {}
    for title, runs in contestants(args.steps, args.neurons, device).items():
        times[title] = host_seconds(runs, args.seconds)
        harness.synchronize(device)
        points.append({title: times[title]})
        print(f"\n{title + ', us':<40}{'median':>9}   25-75 %")
        for name, value in times[title].items():
            low, high = (1e6 * number for number in value["quartiles"])
            print(f"{name:<40}{value['microseconds']:>9.1f}   {low:.1f}-{high:.1f}")
    both = times["forward and backward"]
    # The kernels of so few neurons take well under a microsecond of this.
    ratio = both["LIFLayer"]["median"] / both[BASE]["median"]
    target = {"ratio": ratio, "most": MOST, "met": ratio <= MOST}
    print(f"\n{'met' if target['met'] else 'NOT MET':<9}at most {MOST:g} x {BASE}: {ratio:.2f} x")
    shape = f"{args.steps} x {args.neurons}"
    result = {"machine": machine, "steps": args.steps, "neurons": args.neurons, "target": target, "times": times}
    harness.write_json(args.out / f"{name_of_result}.json", result)
    harness.save(picture(both, machine, shape), args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    main()
