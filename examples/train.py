"""Trains a spiking network, and shows how it learned.

    python examples/train.py                              hand-written digits, 8 x 8 pixels: under a minute on a CPU
    python examples/train.py mnist-mlp --data-dir data    the MNIST network 784-800-10 of arXiv:1706.02609
    python examples/train.py --help                       everything else

Needs what `pip install '.[examples]'` installs. Writes runs/<experiment>/<date and time>/: metrics.json, checkpoint.pt,
learning_curve.png and raster.png.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor, nn
from tqdm import tqdm

import stbp_cuda
from stbp_cuda.functional import BACKENDS
from stbp_cuda.surrogate import SURROGATES


@dataclass(frozen=True)
class Settings:
    """Of one experiment; each is an option of the command line, too."""

    hidden: int  # neurons between the pixels and the classes
    steps: int  # T, for which an image is shown
    decay: float
    v_threshold: float
    surrogate: str
    width: float  # of the surrogate
    learning_rate: float  # the highest: it rises during the first tenth of a run, then falls to 0 (OneCycleLR)
    batch_size: int
    epochs: int
    seed: int


EXPERIMENTS = {
    "digits": Settings(
        hidden=256,
        steps=15,
        decay=0.5,
        v_threshold=0.5,
        surrogate="atan",  # has tails, so that no neuron is ever out of the gradient's reach
        width=1.0,
        learning_rate=2e-3,
        batch_size=50,
        epochs=40,
        seed=0,
    ),
    # The paper's neurons, with a wider surrogate: at width 1 an output neuron can leave the gradient's reach for good.
    # The paper does not tell its learning rate, batch size and epochs.
    "mnist-mlp": Settings(
        hidden=800,
        steps=30,
        decay=0.1,
        v_threshold=1.5,
        surrogate="rectangular",
        width=2.0,
        learning_rate=5e-3,
        batch_size=50,
        epochs=25,
        seed=0,
    ),
}


@dataclass(frozen=True)
class Images:
    """A set of images, as intensities from 0 to 1 [S, pixels], and their classes [S]."""

    intensities: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(self.intensities.to(device), self.classes.to(device))


def digits() -> tuple[Images, Images]:
    """1,797 digits of 8 x 8 pixels, which come with scikit-learn; every fifth is kept for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=0.2, stratify=y, random_state=0)
    train, test = (Images(torch.tensor(x).float(), torch.tensor(y)) for x, y in ((x_train, y_train), (x_test, y_test)))
    return train, test


def mnist(folder: Path) -> tuple[Images, Images]:
    """70,000 digits of 28 x 28 pixels, from folder/MNIST/raw, downloaded to it where they are missing."""
    from torchvision.datasets import MNIST

    try:
        train, test = (MNIST(str(folder), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        sys.exit(f"MNIST can neither be read from nor downloaded to {folder}: {error}")
    return tuple(Images(part.data.flatten(1).float() / 255, part.targets) for part in (train, test))  # type: ignore[return-value]


def bernoulli_spikes(intensities: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Independent spikes [T, B, pixels] at every step, each with the intensity of its pixel for its probability."""
    chance = torch.rand(steps, *intensities.shape, generator=generator, device=intensities.device)
    return (chance < intensities).to(intensities.dtype)


def network(settings: Settings, inputs: int, classes: int, backend: str) -> nn.Sequential:
    """Two linear layers, each followed by spiking neurons, on [T, B, inputs]."""

    def linear(n_in: int, n_out: int) -> nn.Linear:
        layer = nn.Linear(n_in, n_out)
        with torch.no_grad():
            # As the paper starts, with uniform weights and rows scaled to one length; but to twice the threshold where
            # it says 1, with which hardly a hidden neuron of its MNIST network fires, and no gradient gets through.
            layer.weight.uniform_(-1, 1)
            layer.weight *= 2 * settings.v_threshold / layer.weight.norm(dim=1, keepdim=True)
            layer.bias.zero_()
        return layer

    def lif() -> stbp_cuda.LIFLayer:
        surrogate = SURROGATES[settings.surrogate](settings.width)
        return stbp_cuda.LIFLayer(settings.decay, settings.v_threshold, surrogate, backend=backend)

    return nn.Sequential(linear(inputs, settings.hidden), lif(), linear(settings.hidden, classes), lif())


def batches(images: Images, size: int, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
    count, device = len(images.classes), images.classes.device
    order = torch.randperm(count).to(device) if shuffle else torch.arange(count, device=device)
    for index in order.split(size):
        yield images.intensities[index], images.classes[index]


def train_one_epoch(
    net: nn.Sequential,
    images: Images,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    bar: tqdm[Any],
) -> tuple[float, float]:
    """Returns the mean loss, and the accuracy on the way, while the weights still change."""
    net.train()
    losses, hits = 0.0, 0
    for intensities, classes in batches(images, settings.batch_size, shuffle=True):
        rates = net(bernoulli_spikes(intensities, settings.steps, generator)).mean(0)
        wanted = nn.functional.one_hot(classes, rates.shape[1]).to(rates.dtype)
        loss = (rates - wanted).square().sum(1).mean() / 2  # Eq. 9 of the paper
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses += loss.item() * len(classes)
        hits += int((rates.argmax(1) == classes).sum())
        bar.update()
    return losses / len(images.classes), hits / len(images.classes)


@torch.no_grad()
def accuracy(net: nn.Sequential, images: Images, settings: Settings) -> float:
    """The share of images whose class has the highest rate. The input spikes are the same at every call."""
    net.eval()
    generator = torch.Generator(images.classes.device).manual_seed(settings.seed)
    hits = 0
    for intensities, classes in batches(images, 1000, shuffle=False):
        rates = net(bernoulli_spikes(intensities, settings.steps, generator)).mean(0)
        hits += int((rates.argmax(1) == classes).sum())
    return hits / len(images.classes)


def learning_curve(rows: list[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    figure.suptitle(title)
    loss, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["train_loss"] for row in rows], ".-", label="train")
    loss.set(ylabel="loss", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_minor_locator(NullLocator())
    loss.yaxis.set_major_formatter("{x:g}")
    for part in "train", "test":
        right.plot(epochs, [100 * row[f"{part}_accuracy"] for row in rows], ".-", label=part)
    right.set(ylabel="accuracy, %")
    for axis in loss, right:
        axis.set(xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


@torch.no_grad()
def raster(net: nn.Sequential, images: Images, settings: Settings, title: str) -> Figure:
    """The spikes of every neuron at every step, for one image."""
    generator = torch.Generator(images.classes.device).manual_seed(settings.seed)
    spikes = bernoulli_spikes(images.intensities[:1], settings.steps, generator)
    layers = {"pixels": spikes}
    for module in net.eval():
        spikes = module(spikes)
        if isinstance(module, stbp_cuda.LIFLayer):
            layers["hidden neurons" if len(layers) == 1 else "classes"] = spikes
    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    guess = int(layers["classes"].mean(0).argmax())
    figure.suptitle(f"{title}: an image of class {int(images.classes[0])}, taken for {guess}")
    axes = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1.3]})
    for axis, (name, of_layer) in zip(axes, layers.items(), strict=True):
        step, _, neuron = of_layer.nonzero(as_tuple=True)
        axis.vlines((step + 1).cpu(), (neuron - 0.45).cpu(), (neuron + 0.45).cpu(), color="black", linewidth=3)
        axis.set_title(f"{of_layer.shape[2]} {name}, which spike at {of_layer.mean():.1%} of the steps", fontsize=10)
        axis.set(ylim=(of_layer.shape[2] - 0.5, -0.5))
    axes[-1].set(xlabel="time step", xlim=(0.5, settings.steps + 0.5), yticks=range(layers["classes"].shape[2]))
    axes[-1].tick_params(axis="y", labelsize=7)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def write(path: Path, data: bytes) -> None:
    """All or nothing: an interrupted run leaves the file of the epoch before."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_figure(path: Path, figure: Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image)
    write(path, image.getvalue())


def parse() -> tuple[argparse.Namespace, Settings, torch.device]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", nargs="?", choices=EXPERIMENTS, default="digits", help="default: digits")
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST lies or is downloaded to; default: data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--backend", choices=BACKENDS, default="auto", help="of the spiking layers; default: auto, the fused kernels")
    own = parser.add_argument_group("settings, in place of the experiment's own")
    choices = {"surrogate": list(SURROGATES)}
    for field in fields(Settings):
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        name = "--" + field.name.replace("_", "-")
        own.add_argument(
            name, type=kind, choices=choices.get(field.name), metavar=None if kind is str else kind.__name__
        )
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    settings = replace(EXPERIMENTS[args.experiment], **{k: v for k, v in given.items() if v is not None})
    for name in "hidden", "steps", "learning_rate", "batch_size", "epochs":
        if not 0 < getattr(settings, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {getattr(settings, name)}")
    try:
        network(settings, 1, 1, args.backend)  # checks the neurons' parameters
        device = torch.device(args.device)
        torch.empty(1, device=device).item()
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    return args, settings, device


def main() -> None:
    args, settings, device = parse()
    train, test = (part.to(device) for part in (digits() if args.experiment == "digits" else mnist(args.data_dir)))

    torch.manual_seed(settings.seed)  # the weights, and the order of the images
    generator = torch.Generator(device).manual_seed(settings.seed + 1)  # the input spikes
    pixels, classes = train.intensities.shape[1], int(train.classes.max()) + 1
    net = network(settings, pixels, classes, args.backend).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    per_epoch = -(-len(train.classes) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )

    title = f"{args.experiment} {pixels}-{settings.hidden}-{classes}"
    now = datetime.datetime.now(datetime.timezone.utc)
    folder = Path("runs", args.experiment, now.strftime("%Y%m%d-%H%M%S-%f"))
    folder.mkdir(parents=True)
    print(f"{title} on {device}, {len(train.classes):,} images to train with, {len(test.classes):,} to test; {folder}/")
    result: dict[str, Any] = {
        "experiment": args.experiment,
        "date": now.isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "backend": args.backend,
        "build": stbp_cuda.build_info(),
        "epochs": [],
    }
    rows = result["epochs"]
    stopped = False
    try:
        with tqdm(total=settings.epochs * per_epoch, unit="batch", dynamic_ncols=True, disable=None) as bar:
            for epoch in range(1, settings.epochs + 1):
                bar.set_description(f"epoch {epoch}/{settings.epochs}")
                start = time.perf_counter()
                loss, train_accuracy = train_one_epoch(net, train, settings, optimizer, schedule, generator, bar)
                seconds = time.perf_counter() - start
                row = {
                    "epoch": epoch,
                    "train_loss": loss,
                    "train_accuracy": train_accuracy,
                    "test_accuracy": accuracy(net, test, settings),
                    "train_seconds": seconds,
                }
                rows.append(row)
                bar.write(
                    f"epoch {epoch:3}  loss {loss:.4f}  accuracy: train {train_accuracy:7.2%}, "
                    f"test {row['test_accuracy']:7.2%}  {seconds:.1f} s"
                )
                state = io.BytesIO()
                model, of_optimizer = net.state_dict(), optimizer.state_dict()
                torch.save(
                    {"settings": asdict(settings), "epoch": epoch, "model": model, "optimizer": of_optimizer}, state
                )
                write(folder / "checkpoint.pt", state.getvalue())
                write(folder / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
    except KeyboardInterrupt:
        stopped = True
    if rows:
        write_figure(folder / "learning_curve.png", learning_curve(rows, title))
        write_figure(folder / "raster.png", raster(net, test, settings, title))
        best = max(rows, key=lambda row: row["test_accuracy"])
        print(
            f"test accuracy {rows[-1]['test_accuracy']:.2%}, best {best['test_accuracy']:.2%} in epoch {best['epoch']}"
        )
        print(*sorted(str(path) for path in folder.iterdir()), sep="\n")
    if stopped:
        sys.exit(f"interrupted after {len(rows)} of {settings.epochs} epochs")


if __name__ == "__main__":
    main()
