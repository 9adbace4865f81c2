"""How long one training step of the papers' networks takes, the neurons' share of it, and how much memory it needs.

    python bench/train_step.py                   all contestants, on the GPU if there is one
    python bench/train_step.py --study speed     the networks S, M and L of arXiv:1809.05793, Fig. 4, against the loop
    python bench/train_step.py --study growth    how time and memory of its smallest grow with T, batch and width
    python bench/train_step.py --quick           fewer steps and samples
    python bench/train_step.py --help            everything else

A step is zero_grad, forward, the squared error of the firing rates, backward, and SGD. The networks are 784-800-10 and
15C5-P2-40C5-P2-300-10 of arXiv:1706.02609 on random spikes, and CIFARNet of arXiv:1809.05793 on random images, whose
first convolution all contestants compute once for all steps. All have the same weights and the same neurons, and are
checked before they are timed to give the same rates and gradients; where sums round differently, a few spikes differ,
and the output says how many.

The neurons' share is what a step takes beyond the same step without neurons. The peak is that of a step, beside weights
and input, on a CPU in a fresh process. On Linux's CPU every measurement is also made with the settings of malloc that
the README recommends, for all contestants; on a GPU with TF32 in convolutions and linear layers, and without. They are
always compared without it: it rounds differently in each memory layout, and spikes flip. Prints a table, writes
train_step-<device>.json and .png.

The two studies take malloc's settings or TF32 alone, and of the contestants ours and the per-step loop, the authors'
way. Speed has T = 10 and batches of 20, as there, and says how long an epoch of the data set's training samples would
take. The input is random in place of the data: the time does not depend on it. They write
train_step-<study>-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import malloc
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rivals import Spike, load
from torch import Tensor, nn
from tqdm import tqdm

import stbp_cuda
from stbp_cuda.surrogate import Rectangular

TF32_BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn)
RATES_MAY_DIFFER, GRADIENTS_MAY_DIFFER = 0.02, 0.05  # of all rates; of the gradient, in the 2-norm
FEWEST_CHECKED = 20  # samples in a study: of the rates of two, a single spike is 5 %
TARGETS = {("mnist-cnn", "loop"): 1.5, ("mnist-cnn", "spikingjelly"): 2.0}  # with malloc told to keep its memory


@dataclass(frozen=True)
class Network:
    """A network of the papers; neurons follow every convolution and every linear layer.

    Attributes:
        input: the shape of a sample.
        layers: "15C5" (15 maps, 5 x 5), "P2" (2 x 2 average pooling), "300" (a linear layer).
        padding: of the convolutions.
        direct: whether the input is a real-valued image, the same in every step, and not spikes.
        voters: output neurons for each of the ten classes.
        width: times as many maps and hidden neurons as ``layers`` says.
        samples: for training, in its data set.
        reported: seconds an epoch in arXiv:1809.05793, Fig. 4, read off the plot: PyTorch and MATLAB on a GTX 1060.
    """

    input: tuple[int, ...]
    layers: str
    steps: int
    batch: int
    decay: float
    v_threshold: float
    padding: int = 0
    direct: bool = False
    voters: int = 1
    width: float = 1
    samples: int = 0
    reported: tuple[float, float] | None = None

    def modules(self) -> list[nn.Module]:
        """What stands between the neurons, with random weights."""
        shape = torch.zeros(1, *self.input)
        modules: list[nn.Module] = []
        layers = self.layers.split("-")
        for i, layer in enumerate(layers):
            module: nn.Module
            width = self.width if i + 1 < len(layers) else 1
            if "C" in layer:
                maps, size = map(int, layer.split("C"))
                module = nn.Conv2d(shape.shape[1], round(width * maps), size, padding=self.padding)
            elif layer.startswith("P"):
                module = nn.AvgPool2d(int(layer[1:]))
            else:
                if shape.dim() > 2:
                    modules.append(nn.Flatten())
                    shape = shape.flatten(1)
                module = nn.Linear(shape.shape[1], round(width * int(layer)))
            modules.append(module)
            shape = module(shape)
        return modules


NETWORKS = {
    "mlp": Network((784,), "800-10", steps=30, batch=100, decay=0.1, v_threshold=1.5),
    "mnist-cnn": Network((1, 28, 28), "15C5-P2-40C5-P2-300-10", steps=30, batch=100, decay=0.1, v_threshold=1.5),
    "cifarnet": Network(
        (3, 32, 32),
        "128C3-256C3-P2-512C3-P2-1024C3-512C3-1024-512-100",
        steps=8,
        batch=2,  # on a CPU, for which a step of this takes seconds; on a GPU see fitting_batch
        decay=0.25,
        v_threshold=0.75,
        padding=1,
        direct=True,
        voters=10,
    ),
}
QUICK = {"mlp": (10, 50), "mnist-cnn": (10, 20), "cifarnet": (2, 1)}  # T and batch


def speed_networks() -> dict[str, Network]:
    """S, M and L for each data set of arXiv:1809.05793, Fig. 4."""
    events = (
        "128C3-P2-128C3-P2-512-100",
        "128C3-128C3-P2-256C3-P2-1024-100",
        "128C3-128C3-P2-384C3-384C3-P2-1024-512-100",
    )
    images = ("128C3-P2-256C3-P2-256-100", "128C3-P2-256C3-512C3-P2-512-100", NETWORKS["cifarnet"].layers)
    like_cifarnet = partial(dataclasses.replace, NETWORKS["cifarnet"], steps=10, batch=20)
    networks = {}
    for data_set, layers, reported, settings in (
        ("nmnist", events, ((22, 1030), (36, 1600), (101, 4060)), {"input": (2, 34, 34), "samples": 60_000}),
        ("dvscifar10", events, ((4.5, 443), (6.4, 602), (10.7, 1100)), {"input": (2, 42, 42), "samples": 8_000}),
        ("cifar10", images, ((29, 742), (39, 1380), (60, 2670)), {"samples": 50_000}),
    ):
        if layers is events:
            settings |= {"direct": False, "decay": 0.3 if data_set == "nmnist" else 0.35, "v_threshold": 0.05}
        for size, of_size, seconds in zip("sml", layers, reported, strict=True):
            networks[f"{data_set}-{size}"] = like_cifarnet(**settings, layers=of_size, reported=seconds)
    return networks


SPEED = speed_networks()
GROWTH = "nmnist-s"
GROWS = {"steps": (1, 2, 5, 10, 20, 40), "batch": (1, 2, 5, 10, 20, 40), "width": (0.25, 0.5, 1, 2)}


def fitting_batch(network: Network, device: torch.device) -> int:
    """As many samples as all have room for, at most 128, with a dozen numbers kept for each neuron and step."""
    shape, neurons = torch.zeros(1, *network.input), 0
    for module in network.modules():
        shape = module(shape)
        neurons += shape.numel()
    each = 16 * 4 * neurons * network.steps
    return max(1, min(128, int(0.8 * harness.free_memory(device) / each)))


def has_neurons(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


class Contestant(nn.Module):
    """A network: ``forward`` takes spikes [T, B, ...], or images [B, ...] if they are direct, and gives rates [B, 10].

    ``neurons=False`` leaves the neurons out, to see what the rest costs.
    """

    def __init__(self, network: Network, modules: list[nn.Module], neurons: bool) -> None:
        super().__init__()
        self.network, self.neurons = network, neurons
        self.stages = nn.ModuleList(modules)

    def rates(self, total: Tensor) -> Tensor:
        """From the sum of the output spikes over time [B, classes * voters]."""
        return total.unflatten(1, (-1, self.network.voters)).mean(2) / self.network.steps


class Ours(Contestant):
    """Time folded into the batch, and one call of the layer for all of it."""

    memory_format = torch.contiguous_format

    def __init__(self, network: Network, modules: list[nn.Module], neurons: bool) -> None:
        super().__init__(network, modules, neurons)
        options = (network.decay, network.v_threshold, Rectangular(1.0))
        self.lif = stbp_cuda.LIFLayer(*options, steps=network.steps) if neurons else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        steps = self.network.steps
        x = x if self.network.direct else x.flatten(0, 1)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.memory_format)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i == 0 and self.network.direct:
                x = x.repeat(steps, *(1,) * (x.dim() - 1))
            if has_neurons(stage):
                x = self.lif(x)
        return self.rates(x.unflatten(0, (steps, -1)).sum(0))


class OursChannelsLast(Ours):
    """The same, with channels last."""

    memory_format = torch.channels_last


class Loop(Contestant):
    """The customary loop: step by step through all layers, each with a potential and spikes of its own."""

    def neuron(self, current: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        u = current
        if state is not None:
            u = state[0] * self.network.decay * (1 - state[1]) + current
        return u, Spike.apply(u, self.network.v_threshold, Rectangular(1.0))

    def start(self) -> None:
        """Before a sequence."""

    def fire(self, i: int, current: Tensor, states: dict[int, Any]) -> Tensor:
        states[i] = self.neuron(current, states.get(i))
        return states[i][1]

    def forward(self, x: Tensor) -> Tensor:
        self.start()
        states: dict[int, Any] = {}
        total: Tensor | float = 0.0
        encoded = self.stages[0](x) if self.network.direct else None
        for t in range(self.network.steps):
            out = x if encoded is not None else x[t]
            for i, stage in enumerate(self.stages):
                out = encoded if i == 0 and encoded is not None else stage(out)
                if has_neurons(stage) and self.neurons:
                    out = self.fire(i, out, states)
            total = total + out
        assert isinstance(total, Tensor)
        return self.rates(total)


class SnnTorch(Loop):
    """The same loop with the library's neuron."""

    def __init__(self, network: Network, modules: list[nn.Module], neurons: bool) -> None:
        super().__init__(network, modules, neurons)
        import snntorch

        surrogate = Rectangular(1.0)
        # reset_delay=False, as the default cuts the gradient through the reset.
        self.leaky = nn.ModuleList(
            snntorch.Leaky(
                beta=network.decay,
                threshold=network.v_threshold,
                spike_grad=lambda s: Spike.apply(s, 0.0, surrogate),
                reset_mechanism="zero",
                reset_delay=False,
            )
            for _ in self.stages
        )

    def fire(self, i: int, current: Tensor, states: dict[int, Any]) -> Tensor:
        if i not in states:
            states[i] = self.leaky[i].reset_mem()
        spikes, states[i] = self.leaky[i](current, states[i])
        return spikes


class SpikingJelly(Contestant):
    """Step mode "m": the library folds time into the batch by itself. Its torch backend on a CPU."""

    def __init__(self, network: Network, modules: list[nn.Module], neurons: bool) -> None:
        super().__init__(network, modules, neurons)
        from spikingjelly.activation_based import layer, neuron, surrogate

        self.wrapped = nn.ModuleList()
        for module in modules:
            self.wrapped.append(layer.SeqToANNContainer(module))
            if has_neurons(module) and neurons:
                self.wrapped.append(
                    neuron.LIFNode(
                        tau=1 / (1 - network.decay),
                        decay_input=False,
                        v_threshold=network.v_threshold,
                        surrogate_function=surrogate.Rect(alpha=1.0),
                        step_mode="m",
                    )
                )

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self)
        rest = list(self.wrapped)
        if self.network.direct:
            x = self.stages[0](x).repeat(self.network.steps, 1, 1, 1, 1)
            rest = rest[1:]
        for module in rest:
            x = module(x)
        return self.rates(x.sum(0))


CONTESTANTS: dict[str, tuple[str, type[Contestant], str | None]] = {  # label, class, package
    "ours": ("stbp_cuda", Ours, None),
    "ours-channels-last": ("stbp_cuda, channels_last", OursChannelsLast, None),
    "loop": ("per-step loop", Loop, None),
    "spikingjelly": ("SpikingJelly", SpikingJelly, "spikingjelly"),
    "snntorch": ("snnTorch", SnnTorch, "snntorch"),
}


def problem(name: str) -> str | None:
    """Why a contestant cannot run; None if it can."""
    try:
        load(CONTESTANTS[name][2] or "torch")
    except ImportError as error:
        return str(error)
    return None


def data(network: Network, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random input and targets [B, 10]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(network.batch, *network.input, generator=generator)
    x = images - 0.5
    if not network.direct:
        x = (torch.rand(network.steps, *images.shape, generator=generator) < images).float()
    classes = torch.randint(10, (network.batch,), generator=generator)
    return x.to(device), nn.functional.one_hot(classes, 10).float().to(device)


def weights(network: Network, x: Tensor) -> list[dict[str, Tensor]]:
    """Random ones with which neurons of all layers fire: each current has the deviation of the threshold."""
    torch.manual_seed(0)
    modules = network.modules()
    with torch.no_grad():
        out = x.cpu() if network.direct else x.cpu().flatten(0, 1)
        for i, module in enumerate(modules):
            current = module(out)
            if has_neurons(module):
                scale = network.v_threshold / current.std()
                module.weight.mul_(scale)
                module.bias.zero_()
                current = module(out)
            if i == 0 and network.direct:
                current = current.repeat(network.steps, 1, 1, 1)
            lif = partial(
                stbp_cuda.functional.lif, decay=network.decay, v_threshold=network.v_threshold, steps=network.steps
            )
            out = lif(current) if has_neurons(module) else current
    return [module.state_dict() for module in modules]


def make(
    name: str, network: Network, state: list[dict[str, Tensor]], device: torch.device, neurons: bool = True
) -> Contestant:
    modules = network.modules()
    for module, part in zip(modules, state, strict=True):
        module.load_state_dict(part)
    contestant = CONTESTANTS[name][1](network, modules, neurons).to(device)
    if name == "ours-channels-last" and len(network.input) == 3:
        contestant = contestant.to(memory_format=torch.channels_last)
    return contestant


def train(model: Contestant, x: Tensor, y: Tensor, rate: float = 1e-6) -> Callable[[], Tensor]:
    """One step; the rate is so small that the weights stay what they are."""
    optimizer = torch.optim.SGD(model.stages.parameters(), lr=rate)

    def step() -> Tensor:
        optimizer.zero_grad()
        rates = model(x)
        nn.functional.mse_loss(rates, y).backward()
        optimizer.step()
        return rates.detach()

    return step


def results(name: str, network: Network, state: list[dict[str, Tensor]], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The rates and all gradients."""
    model = make(name, network, state, x.device)
    rates = train(model, x, y, rate=0.0)()
    return rates, torch.cat([p.grad.flatten() for p in model.stages.parameters() if p.grad is not None])


def check(name: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Hold a contestant against ours. Raise if more than rounding makes them differ."""
    least = 0.5 / 30  # less than a spike of one voter
    different = ((found[0] - expected[0]).abs() > least / 10).float().mean().item()
    gradient = ((found[1] - expected[1]).norm() / expected[1].norm()).item()
    if different > RATES_MAY_DIFFER or not gradient <= GRADIENTS_MAY_DIFFER:
        raise AssertionError(
            f"{name} differs from ours in {different:.1%} of the rates, {gradient:.1%} of the gradient"
        )
    return {"rates": different, "gradient": gradient}


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """In convolutions and linear layers. Not by ``fp32_precision``: others could not read ``allow_tf32`` then."""
    before = [backend.allow_tf32 for backend in TF32_BACKENDS]
    try:
        for backend in TF32_BACKENDS:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, was_allowed in zip(TF32_BACKENDS, before, strict=True):
            backend.allow_tf32 = was_allowed


def time_all(
    network: Network, names: list[str], study: bool, seconds: float, device: str, threads: int, tf32: bool | None
) -> dict[str, dict[str, Any]]:
    """Time, and but in a study time without neurons, of every contestant; on a CPU to be run in a fresh process."""
    torch.set_num_threads(threads)
    at = torch.device(device)
    checked = dataclasses.replace(network, batch=max(network.batch, FEWEST_CHECKED)) if study else network
    x, y = data(checked, at)
    state = weights(checked, x)
    with allow_tf32(False):
        expected = results("ours", checked, state, x, y)
        differences = {name: check(name, results(name, checked, state, x, y), expected) for name in names}
    x, y = data(network, at)
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        for neurons in (True,) if study else (True, False):
            runs[f"{name} {neurons}"] = train(make(name, network, state, at, neurons), x, y)
    with allow_tf32(bool(tf32)):
        times = harness.measure(runs, seconds * len(runs), at)
    found = {}
    for name in names:
        found[name] = {**times[f"{name} True"], "different": differences[name]}
        if not study:
            rest = times[f"{name} False"]
            part = max(0.0, 1 - rest["median"] / found[name]["median"])
            found[name] |= {"without_neurons": rest, "neurons_share": part}
    return found


def peak(network: Network, name: str, device: str, threads: int) -> int | None:
    """The memory of one step; on a CPU to be run in a fresh process."""
    torch.set_num_threads(threads)
    at = torch.device(device)
    x, y = data(network, at)
    state = weights(network, x)
    small = dataclasses.replace(network, batch=1)
    few = x[:1] if network.direct else x[:, :1]
    train(make(name, small, state, at), few.contiguous(), y[:1])()
    step = train(make(name, network, state, at), x, y)
    return harness.peak_memory(step, at)


def setting(point: dict[str, Any]) -> str:
    return point["malloc"] if point.get("tf32") is None else "TF32" if point["tf32"] else "no TF32"


def row(point: dict[str, Any]) -> str:
    low, high = (f"{1e3 * seconds:,.1f}" for seconds in point["quartiles"])
    text = f"{point['network']:<13}{point['steps']:>3}{point['batch']:>6}{point['width']:>6g}  {setting(point):<8} "
    text += f"{point['label']:<26}{1e3 * point['median']:>10,.1f}  {f'{low}-{high}':<20}{point['ratio']:>6.2f} x"
    memory = "not known" if point["peak"] is None else f"{point['peak'] / 2**20:,.0f}"
    share = f"{point['neurons_share']:.0%}" if "neurons_share" in point else ""
    text += f"{share:>9}{memory:>11}{point['samples_per_second']:>11,.0f}{point['different']['rates']:>9.2%}"
    text += f"{point['faults']:>10,.0f}"
    return text + (f"{point['seconds_per_epoch']:>11,.0f}" if "seconds_per_epoch" in point else "")


HEADER = (
    f"{'network':<13}{'T':>3}{'batch':>6}{'width':>6}  {'setting':<8} {'':<26}{'ms':>10}  {'25-75 %':<20}{'of ours':>8}"
    f"{'neurons':>9}{'peak MiB':>11}{'samples/s':>11}{'differ':>9}{'faults':>10}{'s/epoch':>11}"
)


def summarise(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets: how many times as fast as a rival ours is where malloc keeps its memory."""
    targets = {}
    kept = {(p["network"], p["name"]): p for p in points if p["malloc"] == "keep"}
    plain = {(p["network"], p["name"]): p for p in points if p["malloc"] == "default"}
    for (network, rival), least in TARGETS.items():
        ours = min((kept[network, name]["median"] for name in OURS if (network, name) in kept), default=None)
        if ours is None or (network, rival) not in kept:
            continue
        ratio = kept[network, rival]["median"] / ours
        without = plain[network, rival]["median"] / ours if (network, rival) in plain else None
        label = f"{network}: at least {least:g} x as fast as {CONTESTANTS[rival][0]}"
        targets[label] = {"ratio": ratio, "to_its_default": without, "least": least, "met": ratio >= least}
    return targets


OURS = ("ours", "ours-channels-last")
COLOURS = {"ours": "red", "ours-channels-last": "salmon", "loop": "C0", "spikingjelly": "C2", "snntorch": "C4"}


def picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    networks = list(dict.fromkeys(p["network"] for p in points))
    figure = Figure(figsize=(1 + 5.5 * len(networks), 8), dpi=120, layout="constrained")
    figure.suptitle(f"One training step on {harness.where(machine)}")
    grid = figure.subplots(2, len(networks), squeeze=False)
    for (times, memory), network in zip(grid.T, networks, strict=True):
        shown = [p for p in points if p["network"] == network]
        first = shown[0]
        words = {"keep": "\nmalloc keeps memory", "TF32": "\nTF32", "no TF32": "\nno TF32"}
        labels = [p["label"] + words.get(setting(p), "") for p in shown]
        for y, p in enumerate(shown):
            rest, colour = 1e3 * (1 - p["neurons_share"]) * p["median"], COLOURS[p["name"]]
            times.barh(y, rest, color="lightgray", label="the rest" if y == 0 else None)
            times.barh(y, 1e3 * p["median"] - rest, left=rest, color=colour, label="neurons" if y == 0 else None)
            times.annotate(f" {1e3 * p['median']:,.0f}", (1e3 * p["median"], y), va="center", fontsize=8)
            if p["peak"] is not None:
                memory.barh(y, p["peak"] / 2**20, color=colour)
                memory.annotate(f" {p['peak'] / 2**20:,.0f}", (p["peak"] / 2**20, y), va="center", fontsize=8)
        times.set(title=f"{network}, T = {first['steps']}, batch {first['batch']}", xlabel="ms (coloured: neurons)")
        memory.set(xlabel="peak, MiB")
        for axis in times, memory:
            axis.set_yticks(range(len(shown)), labels, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.grid(alpha=0.3, axis="x")
    return figure


def speed_picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 4.5), dpi=120, layout="constrained")
    figure.suptitle(f"An epoch of the networks S, M, L, T = {points[0]['steps']}, on {harness.where(machine)}")
    data_sets = dict.fromkeys(p["network"].partition("-")[0] for p in points)
    for axis, data_set in zip(figure.subplots(1, len(data_sets), squeeze=False)[0], data_sets, strict=True):
        shown = [p for p in points if p["network"].startswith(f"{data_set}-")]
        networks = list(dict.fromkeys(p["network"] for p in shown))
        names = list(dict.fromkeys(p["name"] for p in shown))
        for p in shown:
            x = networks.index(p["network"]) + (names.index(p["name"]) - (len(names) - 1) / 2) / (len(names) + 1)
            label = p["label"] if p["network"] == networks[0] else None
            axis.bar(x, p["seconds_per_epoch"], 0.9 / (len(names) + 1), color=COLOURS[p["name"]], label=label)
            text = f"{p['seconds_per_epoch']:,.0f}"
            axis.annotate(text, (x, p["seconds_per_epoch"]), ha="center", va="bottom", fontsize=8)
        axis.set(title=f"{data_set}, {SPEED[networks[0]].samples:,} samples", ylabel="s an epoch")
        axis.set_xticks(range(len(networks)), [network.rpartition("-")[2].upper() for network in networks])
        axis.margins(y=0.1)
        axis.legend(fontsize=8)
    return figure


def growing(points: list[dict[str, Any]], grows: str, name: str) -> list[dict[str, Any]]:
    """Those of one contestant in which only ``grows`` differs, from the least to the most."""
    return sorted((p for p in points if grows in p["grows"] and p["name"] == name), key=lambda p: p[grows])


def growth_picture(points: list[dict[str, Any]], machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    figure.suptitle(f"One training step of {points[0]['network']} on {harness.where(machine)}")
    labels = {"steps": "T", "batch": "batch", "width": "width, as a factor"}
    for (times, memory), grows in zip(figure.subplots(2, len(GROWS)).T, GROWS, strict=True):
        for name in dict.fromkeys(p["name"] for p in points):
            shown = growing(points, grows, name)
            style = {"color": COLOURS[name], "marker": "o", "label": CONTESTANTS[name][0]}
            times.plot([p[grows] for p in shown], [1e3 * p["median"] for p in shown], **style)
            if all(p["peak"] is not None for p in shown):
                memory.plot([p[grows] for p in shown], [p["peak"] / 2**20 for p in shown], **style)
        for axis, what in (times, "ms"), (memory, "peak, MiB"):
            axis.set(xscale="log", yscale="log", xlabel=labels[grows], ylabel=what)
            axis.set_xticks(GROWS[grows], [f"{value:g}" for value in GROWS[grows]])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    return figure


def growth(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The factors by which time and peak grow from the least to the most of each."""
    found = []
    for grows in GROWS:
        for name in dict.fromkeys(p["name"] for p in points):
            least, *_, most = growing(points, grows, name)
            found.append(
                {
                    "of": grows,
                    "name": name,
                    "label": CONTESTANTS[name][0],
                    "from": least[grows],
                    "to": most[grows],
                    "time": most["median"] / least["median"],
                    "peak": most["peak"] / least["peak"] if least["peak"] and most["peak"] else None,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, seconds=2.0, quick_seconds=0.2)
    everything = {**NETWORKS, **SPEED}
    add = parser.add_argument
    add("--study", choices=("speed", "growth"), help="in place of the comparison of all contestants")
    add("--networks", nargs="+", choices=everything, metavar="NAME", help=", ".join(everything))
    add("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=", ".join(CONTESTANTS))
    add("--steps", type=harness.positive(int), metavar="T", help="in place of the network's")
    add("--batch", type=harness.positive(int), help="in place of the network's")
    add(
        "--malloc",
        nargs="+",
        choices=malloc.MALLOC,
        help="default: both on Linux's CPU, in a study keep; elsewhere default",
    )
    add("--tf32", nargs="+", choices=("on", "off"), help="on a GPU; default: both, in a study on")
    args = parser.parse_args()
    if args.study == "speed" and not SPEED.keys() >= set(args.networks or ()):
        parser.error(f"--networks: --study speed has {', '.join(SPEED)}")
    if args.study == "growth" and len(args.networks or ()) > 1:
        parser.error("--networks: --study growth has one network")
    if args.study and len(args.malloc or ()) > 1:
        parser.error("--malloc: a study has one setting")
    device = harness.prepare(parser, args)
    if args.tf32 and device.type != "cuda":
        parser.error("--tf32 is for a GPU")
    on_linux_cpu = device.type == "cpu" and sys.platform == "linux"
    modes = args.malloc or ((["keep"] if args.study else list(malloc.MALLOC)) if on_linux_cpu else ["default"])
    tf32_modes = [None]
    if device.type == "cuda":
        tf32_modes = [text == "on" for text in args.tf32 or (["on"] if args.study else ["on", "off"])]
    # On a GPU nothing depends on malloc, and torch's allocator counts the peak: one process is enough.
    apart = harness.in_fresh_process if device.type == "cpu" else lambda function, *of: function(*of)
    wanted = args.contestants or (["ours", "loop"] if args.study else list(CONTESTANTS))
    problems = {name: why for name in wanted if (why := problem(name))}
    for name, why in problems.items():
        print(f"left out: {CONTESTANTS[name][0]}: {why}")
    names = ["ours", *(name for name in wanted if name not in problems and name != "ours")]

    # The networks, and what grows in each of them.
    tasks: dict[tuple[str, Network], list[str]] = {}
    for name in args.networks or ([GROWTH] if args.study == "growth" else SPEED if args.study else NETWORKS):
        network = everything[name]
        steps, batch = QUICK.get(name, (4, 2)) if args.quick else (network.steps, network.batch)
        if name == "cifarnet" and device.type == "cuda":
            batch = fitting_batch(network, device)
        network = dataclasses.replace(network, steps=args.steps or steps, batch=args.batch or batch)
        if args.study == "growth":
            for grows, values in GROWS.items():
                for value in values[:3] if args.quick else values:
                    tasks.setdefault((name, dataclasses.replace(network, **{grows: value})), []).append(grows)
        else:
            tasks[name, network] = []

    machine = harness.describe(device)
    name_of_result = "-".join(filter(None, ("train_step", args.study, device.type, "quick" if args.quick else "")))
    points = harness.Points(args.out, name_of_result, machine)
    print(HEADER)
    with tqdm(total=len(tasks) * len(modes) * len(tf32_modes), disable=None) as bar:
        for (network_name, network), grows in tasks.items():
            # Channels last are something for images.
            able = [name for name in names if name != "ours-channels-last" or len(network.input) == 3]
            for mode, tf32 in itertools.product(modes, tf32_modes):
                bar.set_description(f"{network_name}, malloc {mode}")
                with malloc.environment(malloc.MALLOC[mode]):
                    shared = (args.device, torch.get_num_threads())
                    times = apart(time_all, network, able, bool(args.study), args.seconds, *shared, tf32)
                    peaks = {name: apart(peak, network, name, *shared) for name in able}
                fastest = min(times[name]["median"] for name in OURS if name in times)
                for name in able:
                    point = {
                        "network": network_name,
                        "layers": network.layers,
                        "steps": network.steps,
                        "batch": network.batch,
                        "width": network.width,
                        "malloc": mode,
                        "tf32": tf32,
                        "name": name,
                        "label": CONTESTANTS[name][0],
                        "ratio": times[name]["median"] / fastest,
                        "samples_per_second": network.batch / times[name]["median"],
                        "peak": peaks[name],
                        **times[name],
                    }
                    if args.study == "growth":
                        point["grows"] = grows
                    if args.study == "speed":
                        point["seconds_per_epoch"] = network.samples / point["samples_per_second"]
                        point["reported_seconds_per_epoch"] = network.reported
                    points.append(point)
                    bar.write(row(point))
                bar.update()
    result: dict[str, Any] = {"machine": machine, "malloc": malloc.MALLOC, "points": points}
    if args.study == "speed":
        figure = speed_picture(points, machine)
    elif args.study == "growth":
        figure = growth_picture(points, machine)
        result["growth"] = growth(points)
        for seen in result["growth"]:
            memory = "not known" if seen["peak"] is None else f"{seen['peak']:.2f} x"
            change = f"{seen['of']} {seen['from']:g} to {seen['to']:g}"
            print(f"{change:<18}{seen['label']:<26}time {seen['time']:.2f} x, peak {memory}")
    else:
        figure = picture(points, machine)
        result["targets"] = summarise(points)
        for target, seen in result["targets"].items():
            other = f" ({seen['to_its_default']:.2f} x if only ours is)" if seen["to_its_default"] else ""
            word = "met" if seen["met"] else "NOT MET"
            print(f"{word:<9}{target}, both with malloc told to keep its memory: {seen['ratio']:.2f} x{other}")
    harness.write_json(args.out / f"{name_of_result}.json", result)
    harness.save(figure, args.out / f"{name_of_result}.png")
    points.finish()


if __name__ == "__main__":
    main()
