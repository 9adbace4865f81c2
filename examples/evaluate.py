"""Evaluates a checkpoint of train.py on the test set: accuracy, firing rates and synaptic operations.

    python examples/evaluate.py runs/mnist-mlp/DATE-TIME/checkpoint.pt --data-dir data

A synaptic operation is an addition of one weight to one potential, which one input other than zero causes in each
neuron that it leads to; a dense network would need a multiplication and addition (MAC) for each weight in use at every
step. Inputs of the first layer that are real numbers, and those behind average pooling or NeuNorm, count as one
operation for each weight, too, if they are not zero, although they have to be multiplied.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import argparse
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands
import torch
from data import load
from files import write_json
from torch import Tensor, nn
from train import add_places, check_places, make_fabric
from trainer import Source, build, convolutional, evaluate, read_checkpoint


class Operations:
    """Of the layers with weights, over all samples seen: [synaptic operations, MACs] by name."""

    def __init__(self) -> None:
        self.counts: dict[str, list[float]] = {}

    def see(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        active = (x != 0).float()
        if isinstance(module, nn.Linear):
            spikes = float(active.sum(dtype=torch.float64)) * module.out_features
            macs = output.numel() * module.in_features
        else:
            assert isinstance(module, nn.Conv2d)
            # For each place of the output, the inputs under the kernel that are not zero; at the border some of the
            # kernel lies outside.
            ones = torch.ones(1, 1, *module.kernel_size, device=x.device)
            options = (None, module.stride, module.padding)
            under = nn.functional.conv2d(active.sum(1, keepdim=True), ones, *options)
            inside = nn.functional.conv2d(torch.ones_like(active[:1, :1]), ones, *options)
            spikes = float(under.sum(dtype=torch.float64)) * module.out_channels
            macs = float(inside.sum()) * module.in_channels * module.out_channels * len(x)
        counts = self.counts.setdefault(name, [0.0, 0.0])
        counts[0] += spikes
        counts[1] += macs

    @contextmanager
    def watch(self, net: nn.Module) -> Iterator[None]:
        def hook(name: str) -> Any:
            return lambda module, args, output: self.see(name, module, args[0], output)

        handles = [
            module.register_forward_hook(hook(name.rpartition(".")[2]))
            for name, module in net.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def main() -> None:
    parser = commands.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt of a run, or the folder of the run")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    add_places(parser)
    args = parser.parse_args()
    check_places(args, parser)
    path = args.checkpoint / "checkpoint.pt" if args.checkpoint.is_dir() else args.checkpoint
    checkpoint = read_checkpoint(path)
    settings, record = checkpoint["settings"], checkpoint["record"]
    fabric = make_fabric(args.device, settings.precision, parser)
    data = load(settings, args.data_dir, args.cache_dir)
    net = build(settings, data.input_shape)
    try:
        net.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        parser.error(f"{path} does not fit {settings.network} on {data.name}: {str(error).partition(chr(10))[0]}")
    net.to(fabric.device, memory_format=torch.channels_last if convolutional(net) else torch.preserve_format)
    operations = Operations()
    with operations.watch(net):
        result = evaluate(net, Source(data.test, fabric.device, args.workers), data, settings, fabric)

    samples = len(data.test)
    print(f"{record['experiment']} ({record['title']}), {checkpoint['epoch']} of {settings.epochs} epochs trained")
    print(f"data: {data.name}, {data.extent}")
    print(f"test accuracy {result.accuracy:.2%}, loss {result.loss:.4f}\n")
    print(f"{'neurons':10} {'spikes of a neuron a step':>26}")
    for name, rate in result.rates.items():
        print(f"{name:10} {rate:26.2%}")
    print(f"\na sample, in all {settings.steps} steps")
    print(f"{'weights':10} {'synaptic operations':>26} {'dense MACs':>18} {'share':>8}")
    per_sample = {name: [count / samples for count in counts] for name, counts in operations.counts.items()}
    per_sample["all"] = [math.fsum(column) for column in zip(*per_sample.values(), strict=True)]
    for name, (spikes, macs) in per_sample.items():
        print(f"{name:10} {spikes:26,.0f} {macs:18,.0f} {spikes / macs:8.1%}")
    if args.json:
        content = {**dataclasses.asdict(result), "accuracy": result.accuracy, "operations": per_sample}
        write_json(args.json, content)


if __name__ == "__main__":
    commands.run(main)
