"""What a run leaves to look at: pictures, and report.md that shows them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from data import encode
from files import write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from torch import Tensor
from trainer import Trainer, arranged, generator, seed_of, watch

SHOWN = 100  # neurons of a layer in a raster, at most


def figure_of(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title)
    return figure


def learning_curve(record: dict[str, Any]) -> Figure:
    rows = record["epochs"]
    figure = figure_of(10, 4, record["title"])
    loss, error = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for part in "train", "test":
        loss.plot(epochs, [row[f"{part}_loss"] for row in rows], ".-", label=part)
        error.plot(epochs, [100 * (1 - row[f"{part}_accuracy"]) or math.nan for row in rows], ".-", label=part)
    loss.set(ylabel="loss")
    error.set(ylabel="error (100 - accuracy), %")
    for axis in loss, error:
        axis.set(xlabel="epoch", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def firing_rates(record: dict[str, Any]) -> Figure:
    """Of each layer, on the test set after each epoch."""
    rows = record["epochs"]
    figure = figure_of(8, 4, f"{record['title']}: mean firing rates on the test set")
    axis = figure.subplots()
    for name in rows[0]["rates"]:
        axis.plot([row["epoch"] for row in rows], [row["rates"][name] for row in rows], ".-", label=name)
    axis.set(xlabel="epoch", ylabel="spikes of a neuron a step", ylim=(0, None))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def confusion_matrix(record: dict[str, Any]) -> Figure:
    counts, classes = torch.tensor(record["confusion"]), record["data"]["classes"]
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = figure_of(7, 6.5, f"{record['title']}: test samples by class")
    axis = figure.subplots()
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            if count:
                color = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    places = range(len(classes))
    axis.set(xlabel="taken for", ylabel="class")
    axis.set_xticks(places, classes, rotation=0 if max(map(len, classes)) < 3 else 45)
    axis.set_yticks(places, classes)
    return figure


@torch.no_grad()
def raster(trainer: Trainer) -> Figure:
    """The spikes of every layer for one test sample."""
    settings, data, net = trainer.settings, trainer.data, trainer.net
    device = trainer.fabric.device
    batch, target = data.test.inputs[:1].to(device), int(data.test.targets[0])
    inputs = encode(batch, data, settings, generator(device, seed_of(settings, "test", 0)), augment=False)
    layers: dict[str, Tensor] = {"input": inputs} if settings.encoding != "direct" else {}
    net.eval()
    with watch(net, layers.__setitem__), trainer.fabric.autocast():
        rates = net(arranged(inputs, net)).float().mean(0)
    guess = data.classes[int(rates[:, : len(data.classes)].argmax(1))]
    sample = f"a sample of class {data.classes[target]}, taken for {guess}"
    figure = figure_of(8, 1.2 + 1.9 * len(layers), f"{trainer.record['title']}: {sample}")
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, spikes) in zip(axes, layers.items(), strict=True):
        flat = spikes.reshape(len(spikes), -1).float().cpu()  # [T, neurons]
        count = flat.shape[1]
        # Evenly chosen: a picture has not room for more.
        some = flat[:, torch.linspace(0, count - 1, min(count, SHOWN)).round().long()]
        step, neuron = some.nonzero(as_tuple=True)
        axis.vlines((step + 1).numpy(), (neuron - 0.45).numpy(), (neuron + 0.45).numpy(), color="black", linewidth=5)
        of_them = "" if count <= SHOWN else f", {SHOWN} of them shown"
        rate = (flat != 0).float().mean()
        axis.set_title(f"{name}: {count:,} neurons{of_them}, spikes at {rate:.1%} of the steps", fontsize=10)
        axis.set(ylim=(some.shape[1] - 0.5, -0.5), xlim=(0.5, settings.steps + 0.5))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set(xlabel="time step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def markdown(record: dict[str, Any], pictures: list[str]) -> str:
    rows, machine, settings = record["epochs"], record["machine"], record["settings"]
    last, best = rows[-1], max(rows, key=lambda row: row["test_accuracy"])
    seconds = sum(row["train_seconds"] + row["test_seconds"] for row in rows)
    lines = [
        f"# {record['title']}",
        "",
        f"Test accuracy {last['test_accuracy']:.2%} after epoch {last['epoch']} of {settings['epochs']}, best "
        f"{best['test_accuracy']:.2%} after epoch {best['epoch']}; reported: {record['reported'] or 'nothing'}.",
        "",
        f"- data: {record['data']['name']}, {record['data']['extent']}",
        f"- time: {seconds:,.0f} s, {last['train_seconds']:.1f} s to train for the last epoch",
        f"- hardware: {machine['gpu'] or machine['cpu']}, {machine['processes']} process(es) of {machine['threads']} "
        f"threads; torch {machine['torch']}",
        f"- begun: {record['date']}",
        f"- command: `{record['command']}`",
        "",
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures),
        "",
        "| layer | spikes of a neuron a step |",
        "|---|---:|",
        *(f"| {name} | {rate:.2%} |" for name, rate in last["rates"].items()),
        "",
        "Settings, and who states them: A arXiv:1706.02609, B arXiv:1809.05793, C the authors' code.",
        "",
        "| setting | value | source |",
        "|---|---|---|",
        *(f"| {name} | {value} | {record['sources'][name]} |" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def write_report(trainer: Trainer) -> list[Path]:
    """Of a run with at least one finished epoch. Returns all files of the run."""
    record, folder = trainer.record, trainer.folder
    figures = {
        "learning_curve.png": learning_curve(record),
        "confusion.png": confusion_matrix(record),
        "raster.png": raster(trainer),
        "firing_rates.png": firing_rates(record),
    }
    for name, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image)
        write(folder / name, image.getvalue())
    write(folder / "report.md", markdown(record, list(figures)).encode())
    return [path for path in folder.iterdir() if path.is_file()]
