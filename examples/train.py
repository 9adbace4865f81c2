"""Trains a spiking network, and shows how it learned.

    python examples/train.py                              hand-written digits, 8 x 8 pixels: under a minute on a CPU
    python examples/train.py mnist-mlp --data-dir data    the MNIST network 784-800-10 of arXiv:1706.02609
    python examples/train.py --list                       all experiments
    python examples/train.py mnist-mlp --list             the settings of one, each with its source
    python examples/train.py --resume RUN                 go on with a run that was interrupted or killed
    torchrun --nproc-per-node 2 examples/train.py ...     several processes, with the results of one
    python examples/train.py --help                       everything else

Needs what `pip install '.[examples]'` installs. Writes runs/EXPERIMENT/DATE-TIME/: report.md and its pictures,
metrics.json and .csv, TensorBoard's file, checkpoint.pt.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import logging
import math
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from data import LOADERS, SHAPES, Data, load
from experiments import CHOICES, EXPERIMENTS, Settings, command, option
from lightning_fabric import Fabric
from summary import write_report
from trainer import CHECKPOINT, METRICS, Trainer, build, convolutional, read_checkpoint

import stbp_cuda
from stbp_cuda.functional import BACKENDS
from stbp_cuda.surrogate import SURROGATES

KINDS = {"int": int, "float": float, "str": str}
ALL_CHOICES = {**CHOICES, "data": tuple(LOADERS), "surrogate": tuple(SURROGATES), "backend": BACKENDS}
POSITIVE = (
    *("steps", "time_window", "learning_rate", "batch_size", "accumulate", "epochs", "elastic_sigma"),
    *("step_epochs", "step_factor"),
)
NOT_NEGATIVE = (
    "weight_norm",
    "linear_learning_rate",
    "momentum",
    "weight_decay",
    "seed",
    "train_samples",
    "test_samples",
)
# Freed memory is neither given back nor mapped anew: its page faults cost a CPU as much as the convolutions.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where data come from, and where computations run."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where data lie or are downloaded to; default: data")
    add("--cache-dir", type=Path, default=Path("runs", ".cache"), help="for binned events and unpacked archives")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--workers", type=int, default=2, help="processes that read data which a GPU has no room for; default: 2")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", nargs="?", choices=EXPERIMENTS, metavar="EXPERIMENT", help="one of --list; default: digits")
    add("--list", action="store_true", help="list the experiments, or the settings of the one named")
    add("--run-dir", type=Path, help="a new folder for the run; default: runs/EXPERIMENT/DATE-TIME")
    add("--resume", type=Path, metavar="RUN", help="go on with the run in this folder, with its own settings")
    add_places(parser)
    add("--checkpoint-seconds", type=float, default=300, metavar="S", help="between checkpoints; default: 300")
    own = parser.add_argument_group("settings, in place of the experiment's own")
    for field in dataclasses.fields(Settings):
        if field.type == "bool":
            own.add_argument(option(field.name), action=argparse.BooleanOptionalAction, default=None)
        else:
            kind = KINDS[str(field.type)]
            choices = ALL_CHOICES.get(field.name)
            metavar = None if choices else kind.__name__
            own.add_argument(option(field.name), type=kind, choices=choices, metavar=metavar)
    return parser


def check(settings: Settings, parser: argparse.ArgumentParser) -> None:
    for name in POSITIVE:
        if not 0 < getattr(settings, name) < math.inf:
            parser.error(f"{option(name)} must be positive and finite, got {getattr(settings, name)}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(settings, name) < math.inf:
            parser.error(f"{option(name)} must be finite and not negative, got {getattr(settings, name)}")
    if (settings.data in ("nmnist", "dvscifar10")) != (settings.encoding == "events"):
        parser.error(f"--encoding {settings.encoding} does not suit --data {settings.data}")
    if settings.encoding == "events" and settings.augmentation != "none":
        parser.error(f"--augmentation {settings.augmentation} is for images, not for events")
    try:
        build(settings, SHAPES[settings.data])
    except (ValueError, TypeError) as error:
        parser.error(str(error).partition("\n")[0])


def list_experiments(name: str | None) -> None:
    if name is None:
        print(f"{'experiment':34} {'reported accuracy, %':36} what")
        for key, experiment in EXPERIMENTS.items():
            print(f"{key:34} {experiment.reported:36} {experiment.title}")
        return
    experiment = EXPERIMENTS[name]
    print(f"{name}: {experiment.title}; reported: {experiment.reported or 'nothing'}\n")
    print("A: arXiv:1706.02609, B: arXiv:1809.05793, C: the authors' code\n")
    for key, value in dataclasses.asdict(experiment.settings).items():
        print(f"{option(key):24} {value!s:28} {experiment.sources[key]}")


def make_fabric(device: str, precision: str, parser: argparse.ArgumentParser) -> Fabric:
    """One process on ``device``; or the processes that torchrun has started, each on a device of its own."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted).item()
        if wanted.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {device}")
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).partition("\n")[0])
    torch.backends.cudnn.deterministic = True  # the same bits each time, interrupted or not
    started = "LOCAL_WORLD_SIZE" in os.environ
    devices: Any = int(os.environ["LOCAL_WORLD_SIZE"]) if started else [wanted.index or 0]
    if wanted.type == "cpu" and not started:
        devices = 1
    with warnings.catch_warnings():
        # Fabric looks for clusters, and warns where it sees one that the command was not started on.
        warnings.filterwarnings("ignore", module="lightning_fabric")
        fabric = Fabric(
            accelerator=wanted.type,
            devices=devices,
            num_nodes=int(os.environ["WORLD_SIZE"]) // devices if started else 1,
            strategy="ddp" if started else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
        )
        fabric.launch()
    return fabric


def machine(fabric: Fabric) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = (re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    on_gpu = fabric.device.type == "cuda"
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(fabric.device) if on_gpu else None,
        "processes": fabric.world_size,
        "malloc_keeps": all(os.environ.get(name) == value for name, value in MALLOC.items()),
        **stbp_cuda.build_info(),
    }


def describe(data: Data) -> dict[str, Any]:
    return {"name": data.name, "extent": data.extent, "classes": list(data.classes)}


def new_record(name: str, settings: Settings, data: Data, fabric: Fabric) -> dict[str, Any]:
    experiment = EXPERIMENTS[name]
    values, usual = dataclasses.asdict(settings), dataclasses.asdict(experiment.settings)
    changed = {key: value for key, value in values.items() if value != usual[key]}
    return {
        "experiment": name,
        "title": experiment.title,
        "reported": experiment.reported,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command(name, values),
        "settings": values,
        "sources": {
            key: "the command line" if key in changed else source for key, source in experiment.sources.items()
        },
        "data": describe(data),
        "machine": machine(fabric),
        "epochs": [],
    }


def to_resume(folder: Path, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record of the run in ``folder``, and its checkpoint, if it lived to write one."""
    if (folder / CHECKPOINT).exists():
        checkpoint = read_checkpoint(folder / CHECKPOINT)
        return checkpoint["record"], checkpoint
    try:
        record = json.loads((folder / METRICS).read_text())
        Settings(**record["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{folder} holds no run to go on with: no {CHECKPOINT}, and no usable {METRICS} ({error})")
    return record, None


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.list:
        list_experiments(args.experiment)
        return
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    given = {key: value for key, value in given.items() if value is not None}
    record, checkpoint = None, None
    if args.resume:
        surplus = [
            *map(option, given),
            *([args.experiment] if args.experiment else []),
            *(["--run-dir"] * bool(args.run_dir)),
        ]
        if surplus:
            parser.error(f"--resume goes on with a run as it was begun; leave out {', '.join(surplus)}")
        record, checkpoint = to_resume(args.resume, parser)
        name, settings, folder = record["experiment"], Settings(**record["settings"]), args.resume
    else:
        name = args.experiment or "digits"
        settings = dataclasses.replace(EXPERIMENTS[name].settings, **given)
        now = datetime.datetime.now(datetime.timezone.utc)
        folder = args.run_dir or Path("runs", name, now.strftime("%Y%m%d-%H%M%S-%f"))
    check(settings, parser)
    fabric = make_fabric(args.device, settings.precision, parser)
    with fabric.rank_zero_first():
        data = load(settings, args.data_dir, args.cache_dir)
    if record is None:
        record = new_record(name, settings, data, fabric)
        folder = Path(fabric.broadcast(str(folder)))
        if fabric.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # A run that was killed at once leaves a folder with nothing in it, or a file begun.
                full = any(path.suffix != ".part" for path in folder.iterdir())
            except OSError as error:
                parser.error(f"--run-dir {folder} cannot be made: {error}")
            if full:
                parser.error(f"{folder} is not empty; a new run wants a new folder, or --resume {folder}")
    elif record["data"] != (here := describe(data)):
        parser.error(f"{folder} was trained on {record['data']}, and here is {here}")
    trainer = Trainer(record, settings, data, fabric, folder, args.workers)
    if checkpoint:
        trainer.load(checkpoint)

    say = print if fabric.is_global_zero else lambda *_: None
    say(f"{name} ({record['title']}) on {fabric.device}" + f" x {fabric.world_size}" * (fabric.world_size > 1))
    say(f"data: {data.name}, {data.extent}")
    say(f"run: {folder}/, to go on with after an interruption by --resume {folder}")
    if fabric.device.type == "cpu" and convolutional(trainer.net) and not machine(fabric)["malloc_keeps"]:
        say("hint: faster with " + " ".join(f"{key}={value}" for key, value in MALLOC.items()) + " in the environment")
    try:
        done = trainer.fit(args.checkpoint_seconds)
    except KeyboardInterrupt:
        done = False
    if fabric.is_global_zero and trainer.rows:
        files = write_report(trainer)
        last, best = trainer.rows[-1], max(trainer.rows, key=lambda row: row["test_accuracy"])
        say(f"test accuracy {last['test_accuracy']:.2%}, best {best['test_accuracy']:.2%} in epoch {best['epoch']}")
        say(*sorted(map(str, files)), sep="\n")
    if not done:
        sys.exit(f"interrupted in epoch {trainer.epoch + 1} of {settings.epochs}; --resume {folder} goes on")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    if torch.distributed.is_initialized():
        # Its threads end with it, once main's network has let go of it; one that lives on aborts the interpreter's end.
        gc.collect()
        torch.distributed.destroy_process_group()
