"""Training and evaluation, on Lightning Fabric: one process or several, CPU or GPU, fp32 or bf16.

Everything random follows from (seed, epoch, step): the order of the samples, augmentation, input spikes, dropout. So a
checkpoint needs no state of a random number generator, and a run that goes on from one ends with the same bits. Spikes
and augmentation are drawn for a whole batch, of which each process takes its share, so that a sample's do not depend on
how many processes there are. (The masks of dropout do.)
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pickle
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import numpy as np
import torch
from data import Data, Part, encode
from experiments import Settings
from files import naming, write, write_json
from lightning_fabric import Fabric
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import stbp_cuda
from stbp_cuda.surrogate import SURROGATES

LOSSES = {"mse": stbp_cuda.losses.rate_mse, "cross_entropy": stbp_cuda.losses.rate_cross_entropy}
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.json"
FORMAT = 1  # of checkpoints


def seed_of(settings: Settings, purpose: str, *where: int) -> int:
    """A seed for one purpose at one place of a run."""
    entropy = (settings.seed, *purpose.encode(), *where)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def build(settings: Settings, input_shape: tuple[int, ...]) -> stbp_cuda.Network:
    """The network of a run with its initial weights.

    Raises ValueError or TypeError where a setting is not accepted."""
    torch.manual_seed(seed_of(settings, "weights"))
    net = stbp_cuda.network(
        settings.network,
        input_shape,
        steps=settings.steps if settings.encoding == "direct" else None,
        decay=settings.decay,
        v_threshold=settings.v_threshold,
        surrogate=SURROGATES[settings.surrogate](settings.width),
        spatial_only=settings.spatial_only,
        neunorm=settings.neunorm != "none",
        norm_decay=settings.norm_decay,
        scaling="1/F" if settings.neunorm == "none" else settings.neunorm,
        dropout=settings.dropout,
        backend=settings.backend,
    )
    for module in net.modules():
        if settings.weight_norm and isinstance(module, nn.Conv2d | nn.Linear):
            stbp_cuda.init.unit_norm_rows_(module.weight, settings.weight_norm)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def convolutional(net: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in net.modules())


# --- samples --------------------------------------------------------------------------------------------------------


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """A part of a data set, asked for by the indices of a batch."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.part.targets.device)
        return self.part.inputs[index], self.part.targets[index]


class Source:
    """Batches on the device: from there, if they fit, else from pinned memory that worker processes fill."""

    def __init__(self, part: Part, device: torch.device, workers: int) -> None:
        self.device, self.workers = device, 0
        if device.type == "cuda":
            if part.inputs.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
                part = Part(part.inputs.to(device), part.targets.to(device))
            else:
                self.workers = workers
        self.part = part

    def batches(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        away = self.part.inputs.device != self.device
        loader = DataLoader(
            Batches(self.part), sampler=indices, batch_size=None, num_workers=self.workers, pin_memory=away
        )
        for inputs, targets in loader:
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


# --- evaluation -----------------------------------------------------------------------------------------------------


@contextmanager
def watch(net: stbp_cuda.Network, see: Any) -> Iterator[None]:
    """Calls see(name, spikes [T, B, ...]) for each layer of neurons in every forward pass."""

    def hook(name: str) -> Any:
        def call(module: stbp_cuda.LIFLayer, args: tuple[Tensor], output: Tensor) -> None:
            # After NeuNorm they are no spikes any more.
            see(name, output if type(module) is stbp_cuda.LIFLayer else stbp_cuda.LIFLayer.forward(module, args[0]))

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in net.lif_layers().items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Evaluation:
    """Attributes:

    confusion: [classes, outputs]: how many samples of a class were taken for which.
    rates: the mean firing rate of each layer of neurons, in spikes a step.
    """

    loss: float
    confusion: list[list[int]]
    rates: dict[str, float]

    @property
    def accuracy(self) -> float:
        return sum(row[i] for i, row in enumerate(self.confusion)) / sum(map(sum, self.confusion))


@torch.no_grad()
def evaluate(net: stbp_cuda.Network, source: Source, data: Data, settings: Settings, fabric: Fabric) -> Evaluation:
    """The input spikes are the same at every call."""
    training = net.training
    net.eval()
    device, classes = fabric.device, len(data.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    rates: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64, device=device) for name in net.lif_layers()}

    def see(name: str, spikes: Tensor) -> None:
        rates[name] += spikes.mean(dtype=torch.float32).double() * spikes.shape[1]

    indices = list(torch.arange(len(source.part)).split(2 * settings.batch_size))
    with watch(net, see), fabric.autocast():
        for step, (batch, targets) in enumerate(source.batches(indices)):
            random = generator(device, seed_of(settings, "test", step))
            inputs = encode(batch, data, settings, random, augment=False)
            inputs, targets = share(inputs, targets, settings, fabric.world_size)[fabric.global_rank]
            if len(targets):
                outputs = net(arranged(inputs, net)).float()
                loss += LOSSES[settings.loss](outputs, targets).double() * len(targets)
                guesses = outputs.mean(0)[:, :classes].argmax(1)
                confusion.index_put_((targets, guesses), confusion.new_ones(()), accumulate=True)
    net.train(training)
    flat = torch.cat([confusion.flatten(), loss.view(1), *(rate.view(1) for rate in rates.values())])
    flat = total(flat, fabric)
    counts, loss, means = flat[: classes**2].view(classes, classes), flat[classes**2], flat[classes**2 + 1 :]
    count = float(counts.sum())
    return Evaluation(
        float(loss) / count,
        counts.long().tolist(),
        {name: float(mean) / count for name, mean in zip(rates, means, strict=True)},
    )


def total(values: Tensor, fabric: Fabric) -> Tensor:
    """The sum over all processes."""
    return fabric.all_reduce(values, reduce_op="sum") if fabric.world_size > 1 else values


def share(inputs: Tensor, targets: Tensor, settings: Settings, pieces: int) -> list[tuple[Tensor, Tensor]]:
    """A batch in pieces of nearly equal size, one after another."""
    dim = 0 if settings.encoding == "direct" else 1  # of the samples
    return list(zip(inputs.tensor_split(pieces, dim), targets.tensor_split(pieces), strict=True))


def arranged(inputs: Tensor, net: nn.Module) -> Tensor:
    """Channels last, for a convolutional network."""
    if inputs.dim() < 4 or not convolutional(net):
        return inputs
    if inputs.dim() == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, inputs.shape[:2])


# --- checkpoints ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Exits with a message if the file is none of ours or damaged. No code of it is executed."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # torch reads other files, too, in an older format that can fail anyhow
                sys.exit(f"error: {path} is truncated, or no checkpoint of train.py")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are no checkpoints anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        sys.exit(f"error: {path} is no checkpoint of train.py, which hold tensors and plain data only")
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        sys.exit(f"error: {path} cannot be read, is truncated, or is no checkpoint of train.py: {reason}")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or "settings" not in checkpoint:
        sys.exit(f"error: {path} is no checkpoint of this version of train.py")
    try:
        checkpoint["settings"] = Settings(**checkpoint["settings"])
        checkpoint["record"] = json.loads(checkpoint["record"])
    except (TypeError, ValueError, KeyError) as error:
        sys.exit(f"error: {path} was written by another version of train.py: {error}")
    return checkpoint


def least_memory(settings: Settings, input_shape: tuple[int, ...], samples: int) -> int:
    """Bytes that a training step takes at least, on so many samples: weights, their gradients, and what each layer of
    neurons gets, for each step of time.

    Raises ValueError or TypeError where a setting is not accepted."""
    count = 0

    def see(name: str, spikes: Tensor) -> None:
        nonlocal count
        count += spikes.numel()

    with torch.device("meta"):  # shapes alone
        net = build(dataclasses.replace(settings, steps=1, weight_norm=0.0, compile=False), input_shape)
        leading = (1,) if settings.encoding == "direct" else (1, 1)
        with watch(net, see):
            net(torch.zeros(*leading, *net.input_shape))
    if settings.encoding != "direct":
        count += math.prod(input_shape)
    size = 2 if settings.precision == "bf16" else 4
    passes = settings.accumulate
    return 8 * sum(p.numel() for p in net.parameters()) + size * settings.steps * math.ceil(samples / passes) * count


# --- training -------------------------------------------------------------------------------------------------------


class DivergedError(Exception):
    """Training has come to numbers that are not finite, and will not come back."""


class Trainer:
    """One run, in a folder of its own.

    Attributes:
        record: what metrics.json holds: all about the run, and a row for each finished epoch.
        epoch, step: the next step to take; both count from 0.
        stopped_by: the number of the signal that has stopped ``fit``.
    """

    def __init__(
        self, record: dict[str, Any], settings: Settings, data: Data, fabric: Fabric, folder: Path, workers: int
    ) -> None:
        self.record, self.settings, self.data, self.fabric, self.folder = record, settings, data, fabric, folder
        self.train, self.test = (Source(part, fabric.device, workers) for part in (data.train, data.test))
        self.net = build(settings, data.input_shape)
        if (outputs := self.net.output_shape[0]) < len(data.classes):
            sys.exit(
                f"error: {settings.network} has {outputs} outputs, and {data.name} has {len(data.classes)} classes"
            )
        if convolutional(self.net):
            self.net.to(memory_format=torch.channels_last)
        self.board: IO[bytes] | None = None
        self.stopped_by = 0
        self.epoch = self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)  # loss, hits, samples of this epoch
        self.seconds = 0.0  # of this epoch
        self.steps = math.ceil(len(data.train) / settings.batch_size)  # in an epoch

        linear = [p for m in self.net.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
        others = [p for p in self.net.parameters() if all(p is not other for other in linear)]
        rate, of_linear = settings.learning_rate, settings.learning_rate * settings.linear_learning_rate
        groups = [{"params": others, "lr": rate}, {"params": linear, "lr": of_linear}]
        groups = [group for group in groups if group["params"]]
        self.net.to(fabric.device)
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, weight_decay=settings.weight_decay)
        else:
            optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
        model = torch.compile(self.net) if settings.compile else self.net
        self.model, self.optimizer = fabric.setup(model, optimizer)
        self.schedule = self.make_schedule(optimizer)

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Of the learning rate, by steps."""
        settings, schedulers = self.settings, torch.optim.lr_scheduler
        if settings.schedule == "one_cycle":
            return schedulers.OneCycleLR(
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
                settings.epochs * self.steps,
                pct_start=0.1,
                cycle_momentum=False,
            )
        every = settings.step_epochs if settings.schedule == "step" else settings.epochs + 1
        return schedulers.StepLR(optimizer, every * self.steps, settings.step_factor)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.record["epochs"]

    @property
    def finished(self) -> bool:
        return self.epoch == self.settings.epochs

    def save(self) -> None:
        """Everything that the run needs to go on, all or nothing.

        Raises DivergedError, and keeps the checkpoint before, if there are numbers that are not finite."""
        if not self.fabric.is_global_zero:
            return
        self.check_finite()
        state = io.BytesIO()
        torch.save(
            {
                "format": FORMAT,
                "settings": dataclasses.asdict(self.settings),
                "record": json.dumps(self.record),
                "epoch": self.epoch,
                "step": self.step,
                "sums": self.sums.cpu(),
                "seconds": self.seconds,
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
            },
            state,
        )
        write(self.folder / CHECKPOINT, state.getvalue())

    def check_finite(self) -> None:
        """Raise DivergedError if the loss of this epoch or a weight is not finite any more.

        Both, for neurons do not fire where their potential is NaN, and so hide it from the loss."""
        tensors = {"loss": self.sums[0], **dict(self.net.named_parameters()), **dict(self.net.named_buffers())}
        finite = torch.stack([tensor.sum().isfinite() for tensor in tensors.values()]).tolist()
        for name, tensor in tensors.items():
            if not finite.pop(0) and not tensor.isfinite().all():
                what = "the loss" if name == "loss" else name
                raise DivergedError(f"{what} is not finite any more by step {self.step} of epoch {self.epoch + 1}")

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same settings."""
        self.record = checkpoint["record"]
        self.epoch, self.step, self.seconds = checkpoint["epoch"], checkpoint["step"], checkpoint["seconds"]
        self.sums.copy_(checkpoint["sums"])
        self.net.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule.load_state_dict(checkpoint["schedule"])

    def fit(self, checkpoint_seconds: float) -> bool:
        """Train to the end; True. After an interrupt (Ctrl-C) of a single process, save and stop; False.

        Raises:
            DivergedError: the loss or a weight is not finite any more. The checkpoint is that of before.
            OSError: a file cannot be written. The checkpoint is the last one that could.
        """
        try:
            return self.fit_until(Interrupt(enabled=self.fabric.world_size == 1), checkpoint_seconds)
        finally:
            if self.board is not None:
                with suppress(OSError):  # raised for before
                    self.board.close()

    def fit_until(self, stop: Interrupt, checkpoint_seconds: float) -> bool:
        self.write_metrics()
        saved = time.monotonic()
        total_steps = self.settings.epochs * self.steps
        hidden = None if self.fabric.is_global_zero else True
        with (
            stop,
            tqdm(total=total_steps, initial=self.epoch * self.steps + self.step, unit="batch", dynamic_ncols=True,
                 disable=hidden, smoothing=0.05) as bar,
        ):  # fmt: skip
            while not self.finished:
                bar.set_description(f"epoch {self.epoch + 1}/{self.settings.epochs}")
                start, before = time.perf_counter(), self.seconds
                self.net.train()
                for batch, targets in self.train.batches(self.order()[self.step :]):
                    self.train_step(batch, targets)
                    self.step += 1
                    self.seconds = before + time.perf_counter() - start
                    bar.update()
                    if stop or (self.fabric.is_global_zero and time.monotonic() - saved >= checkpoint_seconds):
                        self.save()
                        saved = time.monotonic()
                    if stop:
                        self.stopped_by = stop.came
                        return False
                    if not bar.disable and bar.n == bar.last_print_n:  # it was just drawn
                        self.check_finite()
                        loss, hits, count = self.sums.tolist()
                        bar.set_postfix_str(f"loss {loss / count:.4f}, accuracy {hits / count:.1%}", refresh=False)
                self.end_epoch(bar)
                saved = time.monotonic()
        return True

    def order(self) -> list[Tensor]:
        """The samples of each batch of this epoch."""
        random = generator(torch.device("cpu"), seed_of(self.settings, "order", self.epoch))
        order = torch.randperm(len(self.data.train), generator=random)
        return list(order.split(self.settings.batch_size))

    def train_step(self, batch: Tensor, targets: Tensor) -> None:
        """One step of the optimizer; this process takes its share of the batch, in as many passes as asked for."""
        settings, fabric = self.settings, self.fabric
        where = self.epoch, self.step
        random = generator(fabric.device, seed_of(settings, "input", *where))
        inputs = encode(batch, self.data, settings, random, augment=True)
        pieces = share(inputs, targets, settings, fabric.world_size * settings.accumulate)
        first = fabric.global_rank * settings.accumulate
        sums = torch.zeros_like(self.sums)
        self.optimizer.zero_grad()
        for i in range(first, first + settings.accumulate):
            if settings.dropout:
                torch.manual_seed(seed_of(settings, "dropout", *where, i))
            x, y = pieces[i]
            count = len(y)
            # A small batch, last of an epoch. All processes must take part in a pass: this one with weight 0.
            if not count:
                x, y = pieces[0]
            last = i == first + settings.accumulate - 1
            with fabric.no_backward_sync(self.model, enabled=not last):
                outputs = self.model(arranged(x, self.net))
                loss = LOSSES[settings.loss](outputs, y)
                # DDP averages over processes; weighted like this it gives the gradient of the whole batch's mean.
                fabric.backward(loss * (count * fabric.world_size / len(targets)))
            if count:
                hits = (outputs.detach().mean(0)[:, : len(self.data.classes)].argmax(1) == y).sum()
                sums += torch.stack([loss.detach().double() * count, hits.double(), sums.new_tensor(count)])
        self.optimizer.step()
        self.schedule.step()
        self.sums += total(sums, fabric)

    def end_epoch(self, bar: tqdm[Any]) -> None:
        """Evaluate, and write everything down."""
        self.check_finite()
        start = time.perf_counter()
        result = evaluate(self.net, self.test, self.data, self.settings, self.fabric)
        if not math.isfinite(result.loss):
            raise DivergedError(f"the test loss is not finite after epoch {self.epoch + 1}")
        loss, hits, count = self.sums.tolist()
        row = {
            "epoch": self.epoch + 1,
            "train_loss": loss / count,
            "train_accuracy": hits / count,
            "test_loss": result.loss,
            "test_accuracy": result.accuracy,
            "learning_rate": self.schedule.get_last_lr()[0],
            "rates": result.rates,
            "train_seconds": self.seconds,
            "test_seconds": time.perf_counter() - start,
            "time": time.time(),
        }
        self.rows.append(row)
        self.record["confusion"] = result.confusion
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self.save()
        self.write_metrics()
        if self.fabric.is_global_zero:
            rates = ", ".join(f"{rate:.1%}" for rate in result.rates.values())
            bar.write(
                f"epoch {row['epoch']:3}  loss {row['train_loss']:.4f}  accuracy: train {row['train_accuracy']:7.2%}, "
                f"test {row['test_accuracy']:7.2%}  {row['train_seconds']:.1f} s  spikes a step: {rates}",
                file=sys.stdout,
            )

    def write_metrics(self) -> None:
        """metrics.json, metrics.csv and TensorBoard's file, from the rows, so that they never lack or repeat one."""
        if not self.fabric.is_global_zero:
            return
        write_json(self.folder / METRICS, self.record)
        flat = [
            {**{k: v for k, v in row.items() if k != "rates"}, **{f"rate_{k}": v for k, v in row["rates"].items()}}
            for row in self.rows
        ]
        if flat:
            text = io.StringIO()
            table = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(flat)
            write(self.folder / "metrics.csv", text.getvalue().encode())
        # TensorBoard's own writer has a thread, which dies of a full disk with a traceback.
        path = self.folder / "tensorboard" / "events.out.tfevents.run"
        try:
            if self.board is None or self.board.closed:
                shutil.rmtree(path.parent, ignore_errors=True)
                path.parent.mkdir()
                self.board, self.on_board = path.open("ab"), 0
                self.board.write(framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
            for row in flat[self.on_board :]:
                scalars = [
                    Summary.Value(tag=name.replace("_", "/", 1), simple_value=value)
                    for name, value in row.items()
                    if name not in ("epoch", "time")
                ]
                self.board.write(
                    framed(Event(step=row["epoch"], wall_time=row["time"], summary=Summary(value=scalars)))
                )
            self.board.flush()
        except OSError as error:
            raise naming(error, path) from error
        self.on_board = len(flat)


def framed(event: Event) -> bytes:
    """An event as it stands in TensorBoard's files."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


class Interrupt:
    """True once Ctrl-C or SIGTERM has come, so that the step under way is finished; the second time, it interrupts."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.came = enabled, 0

    def __bool__(self) -> bool:
        return self.came != 0

    def __enter__(self) -> Interrupt:
        if self.enabled:
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = number
