"""The data sets, each as tensors in memory or mapped from a cache on disk, and what happens to a batch of them.

Images are [S, C, H, W] and event frames [S, T, 2, H, W], both uint8. They are converted, augmented and encoded a batch
at a time on the device that trains: on these sizes that costs less than to have worker processes do it. Events are
binned once, into the cache.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from experiments import Settings
from files import memory_limit, write
from torch import Tensor
from tqdm import tqdm

import stbp_cuda

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SCALE = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # mean and standard deviation by channel

# What readers raise at files that are missing, damaged, or of another kind.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    AssertionError,
    NotImplementedError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Part:
    """For training or for the test: inputs uint8 [S, ...], targets int64 [S]."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs for {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    def some(self, count: int) -> Part:
        """So many of the samples, always the same, or all of them for 0 or if there are not more."""
        if not 0 < count < len(self):
            return self
        index = torch.from_numpy(np.random.default_rng(0).permutation(len(self))[:count])
        return Part(self.inputs[index], self.targets[index])


@dataclass(frozen=True)
class Data:
    """Attributes:

    name: for reports; says so where it is not what the experiment asks for.
    extent: how much of the set there is.
    mean, std: by channel, of the intensities; None to leave them as they are.
    """

    name: str
    extent: str
    classes: tuple[str, ...]
    train: Part
    test: Part
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one time step."""
        return tuple(self.train.inputs.shape[-3:])


def extent(train: Part, test: Part, all_train: int = 0, all_test: int = 0) -> str:
    if (len(train), len(test)) == (all_train, all_test) or not all_train:
        return f"all of it: {len(train):,} to train with, {len(test):,} to test"
    return f"part of it: {len(train):,} of {all_train:,} to train with, {len(test):,} of {all_test:,} to test"


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


# --- images ---------------------------------------------------------------------------------------------------------


def digits(folder: Path, cache: Path, settings: Settings) -> Data:
    """1,797 digits of 8 x 8 pixels, which come with scikit-learn; every fifth is kept for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    train, test = (
        Part((torch.tensor(x) * 255 / 16).round().byte().view(-1, 1, 8, 8), torch.tensor(y))
        for x, y in ((x_train, y_train), (x_test, y_test))
    )
    return Data("scikit-learn's digits", extent(train, test), tuple("0123456789"), train, test)


def mnist(folder: Path, cache: Path, settings: Settings) -> Data:
    """From folder/MNIST/raw, downloaded to it where there is nothing. torchvision unpacks archives where they lie, so
    that those which are there are copied to the cache first."""
    from torchvision.datasets import MNIST

    raw = folder / "MNIST" / "raw"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    try:
        if not all((raw / name).exists() for name in names) and all((raw / f"{name}.gz").exists() for name in names):
            folder = cache
            (cache / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
            for name in names:
                if not (cache / "MNIST" / "raw" / name).exists():
                    write(cache / "MNIST" / "raw" / f"{name}.gz", (raw / f"{name}.gz").read_bytes())
        train, test = (
            Part(part.data.unsqueeze(1), part.targets)
            for part in (MNIST(str(folder), train=train, download=True) for train in (True, False))
        )
    except UNREADABLE as error:
        fail(f"MNIST can neither be read from nor downloaded to {folder}: {error}")
    return Data("MNIST", extent(train, test, 60_000, 10_000), tuple("0123456789"), train, test)


def objects(folder: Path, cache: Path, settings: Settings) -> Data:
    """Grey patches of 28 x 28: folder/objects/{train,test}/CLASS/*.png, or folder/objects.npz or
    folder/pedestrian/pedestrian28.npz with x_train, y_train, x_test and y_test."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor, resize

    images, archives = folder / "objects", [folder / "objects.npz", folder / "pedestrian" / "pedestrian28.npz"]
    try:
        if images.is_dir():
            parts = []
            for name in "train", "test":
                found = ImageFolder(
                    str(images / name), lambda image: resize(pil_to_tensor(image.convert("L")), [28, 28])
                )
                parts.append(Part(torch.stack([x for x, _ in found]), torch.tensor(found.targets)))
            return Data("objects, own", extent(*parts), tuple(found.classes), *parts)
        archive = next((path for path in archives if path.is_file()), None)
        if archive is None:
            fail(f"objects: {folder} has neither objects/train, objects.npz nor pedestrian/pedestrian28.npz")
        with archive.open("rb") as file, np.load(file) as arrays:
            train, test = (
                Part(
                    torch.from_numpy(arrays[f"x_{part}"]).byte().view(-1, 1, 28, 28),
                    torch.from_numpy(arrays[f"y_{part}"]).long(),
                )
                for part in ("train", "test")
            )
    except UNREADABLE as error:
        fail(f"objects cannot be read from {folder}: {error}")
    stand_in = "stand-in for the unpublished set: " if archive.name == "pedestrian28.npz" else ""
    return Data(f"objects ({stand_in}{archive.name})", extent(train, test), ("background", "pedestrian"), train, test)


def cifar10(folder: Path, cache: Path, settings: Settings) -> Data:
    """From folder/cifar-10-batches-py, as torchvision has it; else a JPEG archive or a part in the official binary
    layout from folder/cifar10; else downloaded to folder."""
    from torchvision.datasets import CIFAR10

    jpeg, part = (
        folder / "cifar10" / name for name in ("cifar10_jpeg_q75_all60000.tar.xz", "data_batch_1_first4000.bin")
    )
    try:
        if not (folder / CIFAR10.base_folder).is_dir() and not (folder / CIFAR10.filename).is_file():
            if jpeg.is_file():
                name, (train, test) = "CIFAR-10 (JPEG)", cifar10_jpeg(jpeg, cache)
                return Data(name, extent(train, test, 50_000, 10_000), CIFAR10_CLASSES, train, test, *CIFAR10_SCALE)
            if part.is_file():
                records = torch.from_numpy(np.fromfile(part, np.uint8).reshape(-1, 3073))
                images, targets = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
                count = len(records) * 4 // 5
                train, test = Part(images[:count], targets[:count]), Part(images[count:], targets[count:])
                name = f"CIFAR-10 (first {len(records):,}, the last fifth for the test)"
                return Data(name, extent(train, test, 50_000, 10_000), CIFAR10_CLASSES, train, test, *CIFAR10_SCALE)
        train, test = (
            Part(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
            for part in (CIFAR10(str(folder), train=train, download=True) for train in (True, False))
        )
    except UNREADABLE as error:
        fail(f"CIFAR-10 can neither be read from nor downloaded to {folder}: {error}")
    return Data("CIFAR-10", extent(train, test, 50_000, 10_000), CIFAR10_CLASSES, train, test, *CIFAR10_SCALE)


def cifar10_jpeg(archive: Path, cache: Path) -> list[Part]:
    """An archive of CIFAR-10-images/{train,test}/CLASS/*.jpg."""
    from PIL import Image

    def members(part: str) -> Callable[[], tuple[list[Any], list[int]]]:
        def read() -> tuple[list[Any], list[int]]:
            images, targets = [], []
            with tarfile.open(archive) as tar:
                for member in tqdm(tar, desc=f"decoding {part} of {archive.name}", disable=None, leave=False):
                    if member.isfile() and f"/{part}/" in member.name:
                        file = tar.extractfile(member)
                        assert file is not None
                        images.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
                        targets.append(CIFAR10_CLASSES.index(Path(member.name).parent.name))
            return images, targets

        return read

    key = f"{archive.stat().st_size}"
    return [cached(cache / f"cifar10-jpeg-{part}-{key}", members(part)) for part in ("train", "test")]


# --- events ---------------------------------------------------------------------------------------------------------


EVENTS = np.dtype([("x", "<i8"), ("y", "<i8"), ("t", "<i8"), ("p", "<i8")])  # t in microseconds


def nmnist(folder: Path, cache: Path, settings: Settings) -> Data:
    """From folder/NMNIST/{Train,Test}/DIGIT/*.bin, as many as there are; downloaded by tonic where there are none."""
    import tonic

    root = folder / "NMNIST"
    try:
        if not any(root.glob("Train/*/*.bin")) or not any(root.glob("Test/*/*.bin")):
            for train in True, False:
                tonic.datasets.NMNIST(str(folder), train=train)
    except UNREADABLE as error:
        fail(f"N-MNIST can neither be read from nor downloaded to {root}: {error}")

    def read(path: Path) -> Any:
        if path.stat().st_size % 5:
            raise ValueError("its size is no multiple of the 5 bytes of an event")
        return tonic.io.read_mnist_file(str(path), dtype=tonic.datasets.NMNIST.dtype)

    parts = []
    for name in "Train", "Test":
        files = sorted((root / name).glob("[0-9]/*.bin"), key=lambda path: path.name)
        labels = [int(path.parent.name) for path in files]
        parts.append(binned(root, files, labels, read, (34, 34, 2), settings, cache / f"nmnist-{name.lower()}"))
    return Data("N-MNIST", extent(*parts, 60_000, 10_000), tuple("0123456789"), *parts)


def read_dvs128(path: Path) -> Any:
    """The events of a DVS128 recording: AEDAT 2.0, as DVS-CIFAR10 is distributed, or AEDAT 4, as tonic downloads it.

    Of AEDAT 2.0, events with bit 15 set are dropped (external ones, of no pixel), times that pass 2**32 go on, and
    events are put in the order of their times."""
    if path.suffix == ".aedat4":
        import tonic

        try:
            events = tonic.io.read_aedat4(str(path))
            events.dtype.names = ("t", "x", "y", "p")
            return events
        except ImportError as error:
            fail(f"AEDAT 4 files such as {path.name} need another package, pip install aedat: {error}")
    content = path.read_bytes()
    if not content.startswith(b"#!AER-DAT2"):
        raise ValueError("it does not begin like a file in AEDAT 2.0")
    start = 0
    while content[start : start + 1] == b"#":
        start = content.find(b"\n", start) + 1
        if not start:
            raise ValueError("it ends within its header")
    if (len(content) - start) % 8:
        raise ValueError("it ends within an event")
    address, ticks = np.frombuffer(content, ">u4", offset=start).astype(np.int64).reshape(-1, 2).T
    if (address >> 16).any():
        raise ValueError("it has addresses of more than 16 bits, which a DVS128 has not")
    of_pixels = address >> 15 == 0  # the others come from outside of the sensor
    address, ticks = address[of_pixels], ticks[of_pixels]
    # Times are counted modulo 2**32. They may fall a little: from one event to the next they are taken to be as near as
    # they can be.
    change = (np.diff(ticks) + 2**31) % 2**32 - 2**31
    if len(change) and change.min() < -(10**6):
        raise ValueError(
            f"its times fall by {-change.min() / 1e6:.1f} s: the clock was reset, or nothing happened for half an hour"
        )
    events = np.empty(len(address), EVENTS)
    events["x"], events["y"], events["p"] = 127 - (address >> 1 & 127), 127 - (address >> 8 & 127), 1 - (address & 1)
    events["t"] = np.cumsum(np.concatenate([ticks[:1], change]))
    return events[np.argsort(events["t"], kind="stable")]


def read_dvscifar10(path: Path) -> Any:
    """Reduced to 42 x 42, with a stride of 3, as in arXiv:1809.05793."""
    events = read_dvs128(path)
    reduced = np.empty(len(events), EVENTS)
    for field in EVENTS.names:
        reduced[field] = events[field] // 3 if field in "xy" else events[field]
    return reduced[(reduced["x"] < 42) & (reduced["y"] < 42)]


def dvscifar10(folder: Path, cache: Path, settings: Settings) -> Data:
    """From folder/CIFAR10DVS/CLASS/*.aedat or *.aedat4; downloaded by tonic where there are none. Four fifths, drawn
    with a fixed seed, are for training."""
    import tonic

    root = folder / "CIFAR10DVS"
    try:
        if not any(root.glob("*/*.aedat*")):
            tonic.datasets.CIFAR10DVS(str(folder))
    except UNREADABLE as error:
        fail(f"DVS-CIFAR10 can neither be read from nor downloaded to {root}: {error}")
    files = sorted(path for name in CIFAR10_CLASSES for path in root.glob(f"{name}/*.aedat*"))
    labels = [CIFAR10_CLASSES.index(path.parent.name) for path in files]
    everything = binned(root, files, labels, read_dvscifar10, (42, 42, 2), settings, cache / "dvscifar10")
    if len(files) < 2:
        fail(f"DVS-CIFAR10: {root} has one recording, and one is needed for training and one for the test")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(files)))
    train, test = order.tensor_split([len(order) * 4 // 5])
    parts = [Part(everything.inputs[index], everything.targets[index]) for index in (train, test)]
    return Data("DVS-CIFAR10", extent(*parts, 8_000, 2_000), CIFAR10_CLASSES, *parts)


def binned(
    root: Path,
    files: Sequence[Path],
    labels: list[int],
    read: Callable[[Path], Any],
    sensor_size: tuple[int, int, int],
    settings: Settings,
    path: Path,
) -> Part:
    """Recordings as frames uint8 [S, T, 2, H, W], counts above 255 as 255. They are made once and kept in the cache as
    ``path``."""
    if not files:
        fail(f"{root} has recordings, but none in a folder that is named like a class")
    window = round(1000 * settings.time_window)
    listing = "".join(f"{file.relative_to(root)} {file.stat().st_size}\n" for file in files)
    key = hashlib.sha256(listing.encode()).hexdigest()[:12]

    def bin_all() -> tuple[Any, list[int]]:
        shape = (len(files), settings.steps, 2, *sensor_size[1::-1])
        least = max(math.prod(shape), 16 * math.prod(shape[1:]))  # one recording is counted in int64, twice
        if least > memory_limit():
            fail(f"{settings.steps} steps of {len(files)} recording(s) take {least / 1e9:,.0f} GB, more than there is")
        frames = np.empty(shape, np.uint8)
        for i, file in enumerate(tqdm(files, desc=f"binning {path.name}", unit="file", disable=None, leave=False)):
            try:
                counts = stbp_cuda.encoding.event_frames(read(file), sensor_size, window, settings.steps)
            except UNREADABLE as error:
                fail(f"{file} is no recording that can be used: {error}")
            frames[i] = counts.clamp(max=255).byte().numpy()
        return frames, labels

    return cached(path.with_name(f"{path.name}-{window}us-{settings.steps}-{key}"), bin_all)


def cached(path: Path, make: Callable[[], tuple[Any, list[int]]]) -> Part:
    """What ``make`` gives, from path.npy, mapped into memory, and path-targets.npy if they are there."""
    inputs, targets = path.with_name(f"{path.name}.npy"), path.with_name(f"{path.name}-targets.npy")
    if not inputs.exists() or not targets.exists():
        arrays = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, array in zip((inputs, targets), arrays, strict=True):
            write(file, partial(np.save, arr=np.asarray(array), allow_pickle=False))
    try:
        # Copy on write, for torch wants memory that may be written to.
        return Part(torch.from_numpy(np.load(inputs, mmap_mode="c")), torch.from_numpy(np.load(targets)).long())
    except UNREADABLE as error:
        fail(f"{inputs}, made by an earlier run, is damaged ({error}); delete it")


LOADERS: dict[str, Callable[[Path, Path, Settings], Data]] = {
    "digits": digits,
    "mnist": mnist,
    "nmnist": nmnist,
    "objects": objects,
    "cifar10": cifar10,
    "dvscifar10": dvscifar10,
}


# Of a sample at one time step; own objects may be of more classes than two.
SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "nmnist": (2, 34, 34),
    "objects": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "dvscifar10": (2, 42, 42),
}


def load(settings: Settings, folder: Path, cache: Path) -> Data:
    """The data of an experiment, as far as ``folder`` has them; what is made of them once is kept in ``cache``.

    Exits with a message where they cannot be had."""
    data = LOADERS[settings.data](folder, cache, settings)
    train, test = data.train.some(settings.train_samples), data.test.some(settings.test_samples)
    if (len(train), len(test)) != (len(data.train), len(data.test)):
        of_it = f"; of that {len(train):,} and {len(test):,}, drawn at random"
        data = replace(data, train=train, test=test, extent=data.extent + of_it)
    return data


# --- batches --------------------------------------------------------------------------------------------------------


def encode(batch: Tensor, data: Data, settings: Settings, generator: torch.Generator, augment: bool) -> Tensor:
    """A batch uint8 as the input of a network: [T, B, ...] floats, or [B, ...] for a constant current. Every random
    number comes from ``generator``, so that the whole batch must be here, also where a process uses a share of it."""
    if settings.encoding == "events":
        return batch.transpose(0, 1).float()
    if augment and settings.augmentation == "crop_flip":
        batch = crop_flip(batch, generator)
    images = batch.float() / 255
    if augment and settings.augmentation == "elastic":
        images = elastic(images, settings.elastic_alpha, settings.elastic_sigma, generator)
    if settings.encoding == "bernoulli":
        return stbp_cuda.encoding.bernoulli(images, settings.steps, generator)
    if data.mean is None:
        return images
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (data.mean, data.std))
    return (images - mean) / std


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image [B, C, H, W] shifted by up to ``padding`` pixels, with zeros coming in, and flipped or not."""
    count, _, height, width = images.shape
    device = images.device

    def draw(below: int) -> Tensor:
        return torch.randint(below, (count, 1), generator=generator, device=device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=device)
    columns = torch.where(draw(2).bool(), columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, [padding] * 4)
    samples = torch.arange(count, device=device).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[samples, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def elastic(images: Tensor, alpha: float, sigma: float, generator: torch.Generator) -> Tensor:
    """Each image [B, C, H, W] distorted by a field of its own: uniform in [-1, 1], smoothed by a Gaussian, times alpha.

    torchvision's ElasticTransform takes 1 ms an image, or has one field for a whole batch; this takes 2 ms for 100."""
    count, _, height, width = images.shape
    device = images.device

    def smooth(size: int) -> Tensor:
        at = torch.arange(size, device=device, dtype=torch.float32)
        weights = torch.exp(-((at.unsqueeze(1) - at) ** 2) / (2 * sigma**2))
        return weights / weights.sum(1, keepdim=True).max()  # as if zeros lay around the field

    noise = torch.rand(count, 2, height, width, generator=generator, device=device) * 2 - 1
    shift = alpha * smooth(height) @ noise @ smooth(width).T
    size = torch.tensor([width, height], device=device)
    identity = torch.nn.functional.affine_grid(torch.eye(2, 3, device=device).expand(count, 2, 3), images.shape, False)
    grid = identity + shift.permute(0, 2, 3, 1) * 2 / size
    return torch.nn.functional.grid_sample(images, grid, align_corners=False).clamp_(0, 1)
