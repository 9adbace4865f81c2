"""Trains a spiking network, and shows how it learned.

    python examples/train.py                              hand-written digits, 8 x 8 pixels: under a minute on a CPU
    python examples/train.py mnist-mlp --data-dir data    the MNIST network 784-800-10 of arXiv:1706.02609
    python examples/train.py --list                       all experiments
    python examples/train.py mnist-mlp --list             the settings of one, each with its source
    python examples/train.py --resume RUN                 go on with a run that was interrupted or killed
    torchrun --nproc-per-node 2 examples/train.py ...     several processes, with the results of one
    python examples/train.py --help                       everything else

Needs what `pip install '.[examples]'` installs. Writes runs/EXPERIMENT/DATE-TIME/: report.md and its pictures,
metrics.json and .csv, TensorBoard's file, checkpoint.pt. One process at a time works on a run.

Exit codes: 0; 1 for a file that cannot be written or read, too little memory, a run in use, or numbers that are not
finite any more; 2 for arguments that make no sense; 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the
output (| head). Whatever ends a run, --resume goes on with it.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import commands
import torch
from data import LOADERS, SHAPES, Data, load
from experiments import CHOICES, EXPERIMENTS, Settings, command, option
from files import locked, memory_limit
from lightning_fabric import Fabric
from summary import write_report
from trainer import (
    CHECKPOINT,
    METRICS,
    DivergedError,
    Trainer,
    convolutional,
    least_memory,
    read_checkpoint,
)

import stbp_cuda
from stbp_cuda.engine import BACKENDS
from stbp_cuda.surrogate import SURROGATES

KINDS = {"int": int, "float": float, "str": str}
ALL_CHOICES = {**CHOICES, "data": tuple(LOADERS), "surrogate": tuple(SURROGATES), "backend": BACKENDS}
POSITIVE = (
    *("steps", "time_window", "learning_rate", "batch_size", "accumulate", "epochs", "elastic_sigma"),
    *("step_epochs", "step_factor"),
)
NOT_NEGATIVE = ("weight_norm", "linear_learning_rate", "weight_decay", "seed", "train_samples", "test_samples")
RANGES = {"momentum": (0, 1), "dropout": (0, 1), "norm_decay": (0, 1), "elastic_alpha": (-1e4, 1e4)}
MOST = {"int": 2**62, "float": 1e30}  # what torch computes with
SMALLER = "fewer --steps, a smaller --batch-size or --network, or --accumulate need less"
# docs/performance.md, "Memory on a CPU": the page faults of fresh memory cost as much as the convolutions.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "THP_MEM_ALLOC_ENABLE": "1"}


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where data come from, and where computations run."""
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where data lie or are downloaded to; default: data")
    add("--cache-dir", type=Path, default=Path("runs", ".cache"), help="for binned events and unpacked archives")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--workers", type=int, default=2, help="processes that read data which a GPU has no room for; default: 2")


def check_places(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not 0 <= args.workers <= 1000:
        parser.error(f"--workers must be a number from 0 to 1000, got {args.workers}")


def make_parser() -> argparse.ArgumentParser:
    parser = commands.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name, (least, most) in RANGES.items():
        if not least <= getattr(settings, name) <= most:
            parser.error(f"{option(name)} must lie in [{least:g}, {most:g}], got {getattr(settings, name)}")
    for name in POSITIVE:
        if not 0 < getattr(settings, name) < math.inf:
            parser.error(f"{option(name)} must be positive and finite, got {getattr(settings, name)}")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(settings, name) < math.inf:
            parser.error(f"{option(name)} must be finite and not negative, got {getattr(settings, name)}")
    for field in dataclasses.fields(Settings):
        value, most = getattr(settings, field.name), MOST.get(str(field.type), math.inf)
        if not isinstance(value, str) and value > most:
            parser.error(f"{option(field.name)} must be at most {most:g}, got {value}")
    microseconds = 1000 * settings.time_window
    if not 1 <= round(microseconds) < 2**63 or not math.isclose(microseconds, round(microseconds), rel_tol=1e-9):
        parser.error(f"--time-window must be a whole number of microseconds, in ms, got {settings.time_window}")
    if settings.step_factor > 1:
        parser.error(f"--step-factor must be at most 1, got {settings.step_factor}")
    if settings.elastic_sigma < 0.01:
        parser.error(f"--elastic-sigma must be at least 0.01, got {settings.elastic_sigma}")
    if settings.learning_rate * settings.linear_learning_rate > MOST["float"]:
        parser.error(f"--learning-rate times --linear-learning-rate must be at most {MOST['float']:g}")
    if (settings.data in ("nmnist", "dvscifar10")) != (settings.encoding == "events"):
        parser.error(f"--encoding {settings.encoding} does not suit --data {settings.data}")
    if settings.encoding == "events" and settings.augmentation != "none":
        parser.error(f"--augmentation {settings.augmentation} is for images, not for events")
    try:
        least = least_memory(settings, SHAPES[settings.data], 1)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a size that torch cannot count
        parser.error(str(error).partition("\n")[0])
    check_memory(settings, least, parser)


def check_memory(settings: Settings, least: int, parser: argparse.ArgumentParser) -> None:
    """Ends with a message if there is less memory than ``least``, where Linux would let the process begin and then
    kill it."""
    if least > (limit := memory_limit()):
        parser.error(
            f"{settings.steps} steps of {settings.network} take {least / 1e9:,.1f} GB at least, and there are "
            f"{limit / 1e9:,.1f} GB; {SMALLER}"
        )


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


def ending(error: BaseException, folder: Path, settings: Settings) -> tuple[int, str]:
    """The exit code and the message for a run that an error has ended. Raises the error if it is a fault of ours."""
    begun = any((folder / name).exists() for name in (CHECKPOINT, METRICS))
    go_on = f"--resume {folder} goes on" if begun else "begin again: nothing was kept"
    if isinstance(error, KeyboardInterrupt):
        return commands.exit_code(signal.SIGINT), f"interrupted; {go_on}"
    if isinstance(error, DivergedError):
        kept = f"; {folder / CHECKPOINT} is that of before" if (folder / CHECKPOINT).exists() else ""
        return 1, (
            f"error: {error}. A smaller --learning-rate (here {settings.learning_rate:g}), another --weight-norm or "
            f"--surrogate, or --precision fp32 may help{kept}"
        )
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return 1, f"error: {commands.reason(error)}; when that is mended, {go_on}"
    # torch has a class for it on a GPU, on a CPU just words.
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in words):
        return 1, f"error: there is not enough memory; {SMALLER}"
    raise error


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.list:
        list_experiments(args.experiment)
        return
    if not 0 <= args.checkpoint_seconds < math.inf:
        parser.error(f"--checkpoint-seconds must be finite and not negative, got {args.checkpoint_seconds}")
    check_places(args, parser)
    with contextlib.ExitStack() as lock:
        train(args, parser, lock)


def train(args: argparse.Namespace, parser: argparse.ArgumentParser, lock: contextlib.ExitStack) -> None:
    """The run that the arguments ask for. Its folder is locked until ``lock`` is closed."""
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
        if args.resume.is_dir() and os.environ.get("RANK", "0") == "0":
            lock.enter_context(locked(args.resume))
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
    if fabric.device.type == "cpu":
        samples = math.ceil(min(settings.batch_size, len(data.train)) / fabric.world_size)
        check_memory(settings, least_memory(settings, data.input_shape, samples), parser)
    if record is None:
        record = new_record(name, settings, data, fabric)
        folder = Path(fabric.broadcast(str(folder)))
        if fabric.is_global_zero:
            try:
                lock.enter_context(locked(folder))
                full = any(folder.iterdir())
            except OSError as error:
                parser.error(f"--run-dir {folder} cannot be made: {error}")
            if full:
                parser.error(f"{folder} is not empty; a new run wants a new folder, or --resume {folder}")
    elif record["data"] != (here := describe(data)):
        parser.error(f"{folder} was trained on {record['data']}, and here is {here}")

    say = print if fabric.is_global_zero else lambda *_: None
    code, trouble = 0, ""
    try:
        trainer = Trainer(record, settings, data, fabric, folder, args.workers)
        if checkpoint:
            trainer.load(checkpoint)
        say(f"{name} ({record['title']}) on {fabric.device}" + f" x {fabric.world_size}" * (fabric.world_size > 1))
        say(f"data: {data.name}, {data.extent}")
        say(f"run: {folder}/, to go on with after an interruption by --resume {folder}")
        if fabric.device.type == "cpu" and convolutional(trainer.net) and not machine(fabric)["malloc_keeps"]:
            malloc = " ".join(f"{key}={value}" for key, value in MALLOC.items())
            say(f"hint: faster with {malloc} in the environment")
        try:
            if not trainer.fit(args.checkpoint_seconds):
                code = commands.exit_code(trainer.stopped_by)
                trouble = f"interrupted in epoch {trainer.epoch + 1} of {settings.epochs}; --resume {folder} goes on"
        except (KeyboardInterrupt, DivergedError) as error:
            code, trouble = ending(error, folder, settings)
        if fabric.is_global_zero and trainer.rows:
            files = write_report(trainer)
            last, best = trainer.rows[-1], max(trainer.rows, key=lambda row: row["test_accuracy"])
            say(f"test accuracy {last['test_accuracy']:.2%}, best {best['test_accuracy']:.2%} in epoch {best['epoch']}")
            say(*sorted(map(str, files)), sep="\n")
    except (KeyboardInterrupt, OSError, RuntimeError, MemoryError) as error:
        code, trouble = ending(error, folder, settings)
    if code:
        if fabric.is_global_zero:
            print(trouble, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    commands.run(main)
    if torch.distributed.is_initialized():
        # Its threads end with it, once main's network has let go of it; one that lives on aborts the interpreter's end.
        gc.collect()
        torch.distributed.destroy_process_group()
