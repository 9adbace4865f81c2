"""The data sets of examples/, from small files in their real formats."""

import dataclasses
import errno
import importlib
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import experiments
import numpy as np
import pytest
import torch

DATA = os.environ.get("STBP_CUDA_DATA", "")
real_data = pytest.mark.skipif(not DATA, reason="STBP_CUDA_DATA names no folder with data")


@pytest.fixture(scope="module")
def data() -> Any:
    return importlib.import_module("data")


def settings(experiment: str, **other: Any) -> Any:
    return dataclasses.replace(experiments.EXPERIMENTS[experiment].settings, **other)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """The format of MNIST's files."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_mnist(folder: Path, count: int = 12) -> np.ndarray[Any, Any]:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    for part in "train", "t10k":
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return images


def write_nmnist(folder: Path, part: str, digit: int, name: str, events: list[tuple[int, int, int, int]]) -> Path:
    """A recording of (x, y, polarity, microseconds), five bytes each."""
    path = folder / "NMNIST" / part / str(digit) / f"{name}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, p, t in events))
    return path


def write_aedat(path: Path, events: list[tuple[int, int, int, int]]) -> None:
    """A recording of a DVS128 in AEDAT 2.0, as DVS-CIFAR10's files are: (x, y, polarity, microseconds)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# created Fri Apr 15 2016\r\n"
    raw = [((127 - y) << 8 | (127 - x) << 1 | (1 - p), t) for x, y, p, t in events]
    path.write_bytes(header + np.array(raw, ">u4").tobytes())


def test_mnist(data: Any, tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    loaded = data.load(settings("mnist-mlp"), tmp_path, tmp_path / "cache")
    assert torch.equal(loaded.train.inputs, torch.from_numpy(images).unsqueeze(1))
    assert loaded.test.targets.tolist() == [i % 10 for i in range(12)]
    assert loaded.extent == "part of it: 12 of 60,000 to train with, 12 of 10,000 to test"
    some = data.load(settings("mnist-mlp", train_samples=5, test_samples=99), tmp_path, tmp_path / "cache")
    assert (len(some.train), len(some.test)) == (5, 12)
    assert some.extent.startswith(loaded.extent)
    assert some.extent != loaded.extent


@pytest.mark.parametrize("size", [0, 7, 500])
def test_a_truncated_file_of_mnist_is_named_an_error(size: int, data: Any, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:size])
    with pytest.raises(SystemExit, match="error: MNIST can neither be read from"):
        data.load(settings("mnist-mlp"), tmp_path, tmp_path / "cache")


@real_data
def test_archives_of_mnist_are_unpacked_elsewhere(data: Any, tmp_path: Path) -> None:
    raw = Path(DATA, "MNIST", "raw")
    before = sorted(raw.iterdir())
    loaded = data.load(settings("mnist-mlp"), Path(DATA), tmp_path)
    assert loaded.extent == "all of it: 60,000 to train with, 10,000 to test"
    assert sorted(raw.iterdir()) == before


def test_nmnist(data: Any, tmp_path: Path) -> None:
    # Times of the second file pass 2^16, and its events are counted from the first of them.
    write_nmnist(tmp_path, "Train", 3, "00001", [(0, 0, 1, 0), (33, 5, 0, 4_999), (33, 5, 0, 5_000), (1, 2, 1, 99_000)])
    write_nmnist(tmp_path, "Train", 0, "00002", [(7, 8, 0, 100_000), (7, 8, 0, 104_000), (9, 33, 1, 114_000)])
    write_nmnist(tmp_path, "Test", 1, "00001", [(4, 4, 1, 10)])
    chosen = settings("nmnist-mlp", steps=3)
    loaded = data.load(chosen, tmp_path, tmp_path / "cache")
    assert loaded.name == "N-MNIST"
    assert loaded.extent == "part of it: 2 of 60,000 to train with, 1 of 10,000 to test"
    assert loaded.train.targets.tolist() == [3, 0]
    expected = torch.zeros(2, 3, 2, 34, 34, dtype=torch.uint8)
    expected[0, 0, 1, 0, 0] = expected[0, 0, 0, 5, 33] = expected[0, 1, 0, 5, 33] = 1
    expected[1, 0, 0, 8, 7] = 2
    expected[1, 2, 1, 33, 9] = 1
    assert torch.equal(loaded.train.inputs, expected)
    assert loaded.input_shape == (2, 34, 34)
    batch = data.encode(loaded.train.inputs, loaded, chosen, torch.Generator(), augment=True)
    assert torch.equal(batch, expected.transpose(0, 1).float())


def test_events_are_binned_once(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in "Train", "Test":
        write_nmnist(tmp_path, part, 3, "00001", [(0, 0, 1, 0)])
    chosen, cache = settings("nmnist-mlp", steps=3), tmp_path / "cache"
    first = data.load(chosen, tmp_path, cache)
    with monkeypatch.context() as patch:
        patch.setattr(data.stbp_cuda.encoding, "event_frames", None)  # not to be called
        again = data.load(chosen, tmp_path, cache)
    assert torch.equal(again.train.inputs, first.train.inputs)
    # Other steps, another window, or other recordings are binned anew.
    assert data.load(settings("nmnist-mlp", steps=4), tmp_path, cache).train.inputs.shape[1] == 4
    write_nmnist(tmp_path, "Train", 5, "00000", [(0, 0, 1, 0)])
    assert data.load(chosen, tmp_path, cache).train.targets.tolist() == [5, 3]
    for file in cache.glob("*-5000us-3-*.npy"):
        file.write_bytes(file.read_bytes()[:150])
    with pytest.raises(SystemExit, match=r"made by an earlier run, is damaged .*; delete it"):
        data.load(chosen, tmp_path, cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [(bytes(7), "no multiple of the 5 bytes"), (bytes([99, 3, 0, 0, 9]), "x from 0 to 33")],
)
def test_a_bad_recording_is_named(content: bytes, message: str, data: Any, tmp_path: Path) -> None:
    for part in "Train", "Test":
        write_nmnist(tmp_path, part, 3, "00001", [(0, 0, 1, 0)])
    bad = write_nmnist(tmp_path, "Train", 4, "00009", [])
    bad.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{bad} is no recording that can be used: .*{message}"):
        data.load(settings("nmnist-mlp"), tmp_path, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_counts_of_events_saturate(data: Any, tmp_path: Path) -> None:
    for part, count in (("Train", 40_000), ("Test", 256)):
        write_nmnist(tmp_path, part, 3, "00001", [(3, 5, 1, 0)] * count + [(3, 6, 0, 0)] * 255)
    loaded = data.load(settings("nmnist-mlp", steps=2), tmp_path, tmp_path / "cache")
    for part in loaded.train, loaded.test:
        assert part.inputs[0, 0, 1, 5, 3] == part.inputs[0, 0, 0, 6, 3] == 255
        assert part.inputs.count_nonzero() == 2


def test_a_recording_without_events_is_all_zero(data: Any, tmp_path: Path) -> None:
    for part in "Train", "Test":
        write_nmnist(tmp_path, part, 3, "00001", [])
    loaded = data.load(settings("nmnist-mlp", steps=2), tmp_path, tmp_path / "cache")
    assert loaded.train.inputs.shape == (1, 2, 2, 34, 34)
    assert not loaded.train.inputs.any()
    for i, header in enumerate((b"#!AER-DAT2.0\r\n", b"#!AER-DAT2.0\n# x\n")):
        path = tmp_path / "CIFAR10DVS" / "cat" / f"{i}.aedat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header)
        assert len(data.read_dvs128(path)) == 0
    loaded = data.load(settings("dvscifar10", steps=2), tmp_path, tmp_path / "cache")
    assert loaded.train.inputs.shape == (1, 2, 2, 42, 42)
    assert not loaded.train.inputs.any()


@pytest.mark.parametrize(("folders", "message"), [(["cats", "0"], "none in a folder"), (["cat"], "one recording")])
def test_too_few_recordings(folders: list[str], message: str, data: Any, tmp_path: Path) -> None:
    for folder in folders:
        write_aedat(tmp_path / "CIFAR10DVS" / folder / "a.aedat", [(1, 2, 1, 5)])
    with pytest.raises(SystemExit, match=message):
        data.load(settings("dvscifar10"), tmp_path, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for part in "Train", "Test":
        write_nmnist(tmp_path, part, 3, "00001", [(0, 0, 1, 0)])
    for module, name in (("os", "fsync"), ("numpy", "save")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(module), name, full)
            with pytest.raises(OSError, match=r"No space left on device: '.*\.npy'"):
                data.load(settings("nmnist-mlp", steps=3), tmp_path, tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
    assert len(data.load(settings("nmnist-mlp", steps=3), tmp_path, tmp_path / "cache").train) == 1


def test_more_frames_than_memory(data: Any, tmp_path: Path) -> None:
    for part in "Train", "Test":
        write_nmnist(tmp_path, part, 3, "00001", [(0, 0, 1, 0)])
    with pytest.raises(SystemExit, match=r"10000000000 steps of 1 recording\(s\) take 369,920 GB, more than"):
        data.load(settings("nmnist-mlp", steps=10**10), tmp_path, tmp_path / "cache")


@real_data
def test_real_nmnist(data: Any, tmp_path: Path) -> None:
    loaded = data.load(settings("nmnist-mlp"), Path(DATA), tmp_path)
    assert (len(loaded.train), len(loaded.test)) == (1000, 100)
    assert loaded.train.targets.bincount().tolist() == [97, 116, 99, 93, 105, 92, 94, 117, 87, 100]
    counts = loaded.train.inputs.flatten(2).sum(2, dtype=torch.float32)
    assert 20 < counts.mean() < 200  # events in 5 ms


def test_dvscifar10(data: Any, tmp_path: Path) -> None:
    names = data.CIFAR10_CLASSES
    for i in range(20):
        at = 3 * i
        events = [(at, 4, 1, 1000), (at + 1, 3, 1, 1001), (127, 0, 1, 1002), (0, at, 0, 6500)]
        write_aedat(tmp_path / "CIFAR10DVS" / names[i % 10] / f"cifar10_{names[i % 10]}_{i // 10}.aedat", events)
    chosen = settings("dvscifar10", steps=2)
    loaded = data.load(chosen, tmp_path, tmp_path / "cache")
    assert loaded.extent == "part of it: 16 of 8,000 to train with, 4 of 2,000 to test"
    assert loaded.train.inputs.shape == (16, 2, 2, 42, 42)
    assert sorted([*loaded.train.targets, *loaded.test.targets]) == sorted([*range(10), *range(10)])
    for frames, target in zip(loaded.train.inputs, loaded.train.targets, strict=True):
        (i,) = (
            i for i in range(20) if i % 10 == target and frames[0, 1, 1, i] == 2
        )  # two events in one place, by 3 x 3
        assert frames[1, 0, i, 0] == 1
        assert frames.sum() == 3  # x = 127 lies beyond 42 x 3
    again = data.load(chosen, tmp_path, tmp_path / "elsewhere")
    assert torch.equal(again.test.inputs, loaded.test.inputs)  # the split is fixed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no header",
        b"#!AER-DAT1.0\r\n" + bytes(8),
        b"#!AER-DAT2.0",
        b"#!AER-DAT2.0\r\n# cut sho",
        b"#!AER-DAT2.0\r\n" + bytes(15),
        b"#!AER-DAT2.0\r\n" + bytes([0, 1]) + bytes(6),  # an address of another camera
    ],
)
def test_a_bad_aedat_file_is_named(content: bytes, data: Any, tmp_path: Path) -> None:
    bad = tmp_path / "CIFAR10DVS" / "cat" / "a.aedat"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{bad} is no recording that can be used"):
        data.load(settings("dvscifar10"), tmp_path, tmp_path / "cache")


def write_raw(path: Path, events: list[tuple[int, int]]) -> Path:
    """A recording in AEDAT 2.0 of (address, time)."""
    path.write_bytes(b"#!AER-DAT2.0\r\n" + np.array(events, ">u4").tobytes())
    return path


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([2**32 - 10, 2**32 - 1, 5, 30], [0, 9, 15, 40]),
        ([2**31 - 2, 2**31 + 3], [0, 5]),
        ([2**32 - 3, 2, 2**32 - 1, 4], [0, 2, 5, 7]),  # a little out of order, where they wrap
        ([10, 5, 7, 1_000_004, 5], [0, 0, 2, 5, 999_999]),
        ([2**32 - 1, 2**31 - 2, 2**32 - 3, 2**31 - 4], [i * (2**31 - 1) for i in range(4)]),
    ],
)
def test_times_of_a_dvs128_that_wrap(times: list[int], expected: list[int], data: Any, tmp_path: Path) -> None:
    events = data.read_dvs128(write_raw(tmp_path / "a.aedat", [(i << 1, t) for i, t in enumerate(times)]))
    assert (events["t"] - events["t"][0]).tolist() == expected
    assert sorted((127 - events["x"]).tolist()) == list(range(len(times)))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([5_000_000, 3_999_999], r"its times fall by 1\.0 s"),
        ([0, 2**31], r"its times fall by 2147\.5 s"),  # or half an hour went by
        ([0, 7, 3 * 10**9], r"its times fall by 1295\.0 s"),
    ],
)
def test_times_of_a_dvs128_that_can_be_read_two_ways(times: list[int], message: str, data: Any, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.aedat", [(0, t) for t in times])
    with pytest.raises(ValueError, match=message):
        data.read_dvs128(path)


def test_events_of_a_dvs128_from_outside_are_dropped(data: Any, tmp_path: Path) -> None:
    raw = [(1 << 15, 3), (126 << 8 | 125 << 1, 7), (0xFFFF, 2**31), (0x8001, 8), (127 << 8 | 127 << 1 | 1, 9)]
    events = data.read_dvs128(write_raw(tmp_path / "a.aedat", raw))
    assert events.tolist() == [(2, 1, 7, 1), (0, 0, 9, 0)]


def test_aedat4_as_tonic_reads_it(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tonic.io

    fields = [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")]  # of the package aedat
    decoded = np.array([(0, 3, 0, True), (1, 6, 125, False), (2, 126, 0, True)], fields)
    monkeypatch.setattr(tonic.io, "read_aedat4", lambda path: decoded.copy())
    events = data.read_dvscifar10(tmp_path / "cifar10_cat_0.aedat4")
    assert events.tolist() == [(1, 0, 0, 1), (2, 41, 1, 0)]


@real_data
@pytest.mark.parametrize(("name", "count"), [("dvs128_neal_walking", 70_304), ("dvs128_alex_walking_again", 19_182)])
def test_real_recordings_of_a_dvs128(name: str, count: int, data: Any) -> None:
    events = data.read_dvs128(Path(DATA, "aedat", f"{name}.aedat"))
    assert len(events) == count
    assert (np.diff(events["t"]) >= 0).all()
    assert set(np.unique(events["p"])) == {0, 1}
    for axis in "xy":
        assert 0 <= events[axis].min() < 20
        assert 100 < events[axis].max() <= 127


def test_cifar10_as_torchvision_has_it(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    official = torchvision.datasets.CIFAR10
    folder = tmp_path / official.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    images: list[np.ndarray[Any, Any]] = []

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, torchvision.datasets.utils.calculate_md5(folder / name)]

    def batch(name: str) -> list[str]:
        images.append(rng.integers(0, 256, (4, 3072), np.uint8))
        return write(name, {"data": images[-1], "labels": [3, 1, 4, 1]})

    monkeypatch.setattr(official, "train_list", [batch(name) for name, _ in official.train_list])
    monkeypatch.setattr(official, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": list(data.CIFAR10_CLASSES)})
    monkeypatch.setattr(official, "meta", {"filename": name, "key": "label_names", "md5": md5})
    loaded = data.load(settings("cifar10-cifarnet"), tmp_path, tmp_path / "cache")
    assert loaded.name == "CIFAR-10"
    assert torch.equal(loaded.train.inputs.flatten(1), torch.from_numpy(np.concatenate(images[:-1])))
    assert torch.equal(loaded.test.inputs.flatten(1), torch.from_numpy(images[-1]))
    assert loaded.test.targets.tolist() == [3, 1, 4, 1]


def test_cifar10_stand_ins_are_named_so(data: Any, tmp_path: Path) -> None:
    from PIL import Image

    folder, cache = tmp_path / "cifar10", tmp_path / "cache"
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (10, 3073), np.uint8)
    records[:, 0] %= 10
    (folder / "data_batch_1_first4000.bin").write_bytes(records.tobytes())
    loaded = data.load(settings("cifar10-cifarnet"), tmp_path, cache)
    assert loaded.name == "CIFAR-10 (first 10, the last fifth for the test)"
    assert torch.equal(loaded.train.inputs.flatten(1), torch.from_numpy(records[:8, 1:]))
    assert loaded.test.targets.tolist() == records[8:, 0].tolist()

    archive = folder / "cifar10_jpeg_q75_all60000.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for part, name, grey in (("train", "frog", 40), ("train", "truck", 200), ("test", "cat", 90)):
            content = io.BytesIO()
            Image.new("RGB", (32, 32), (grey, grey, 0)).save(content, "JPEG")
            member = tarfile.TarInfo(f"CIFAR-10-images/{part}/{name}/0000.jpg")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    loaded = data.load(settings("cifar10-cifarnet"), tmp_path, cache)
    assert loaded.name == "CIFAR-10 (JPEG)"
    assert loaded.extent == "part of it: 2 of 50,000 to train with, 1 of 10,000 to test"
    assert loaded.train.targets.tolist() == [6, 9]
    assert (loaded.train.inputs[:, 0].float().mean((1, 2)) - torch.tensor([40.0, 200.0])).abs().max() < 5

    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(SystemExit, match="error: CIFAR-10 can neither be read from"):
        data.load(settings("cifar10-cifarnet"), tmp_path, tmp_path / "other")


def test_objects(data: Any, tmp_path: Path) -> None:
    from PIL import Image

    chosen = settings("objects-mlp")
    with pytest.raises(SystemExit, match=r"has neither objects/train, objects\.npz nor"):
        data.load(chosen, tmp_path, tmp_path)
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (6, 28, 28), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.array([0, 1, 0, 1, 1, 0], np.uint8) for part in ("train", "test")}
    stand_in = tmp_path / "pedestrian" / "pedestrian28.npz"
    stand_in.parent.mkdir()
    np.savez(stand_in, **arrays, **labels)
    loaded = data.load(chosen, tmp_path, tmp_path)
    assert "stand-in" in loaded.name
    assert torch.equal(loaded.test.inputs[:, 0], torch.from_numpy(arrays["x_test"]))

    shutil.copy(stand_in, tmp_path / "objects.npz")
    assert data.load(chosen, tmp_path, tmp_path).name == "objects (objects.npz)"
    stand_in.with_name("part").write_bytes(stand_in.read_bytes()[:-100])
    stand_in.with_name("part").replace(tmp_path / "objects.npz")
    with pytest.raises(SystemExit, match="error: objects cannot be read from"):
        data.load(chosen, tmp_path, tmp_path)

    for part in "train", "test":
        for i, name in enumerate(("apple", "pear")):
            folder = tmp_path / "objects" / part / name
            folder.mkdir(parents=True)
            Image.new("L", (40, 40), 50 + 100 * i).save(folder / "1.png")
    loaded = data.load(chosen, tmp_path, tmp_path)
    assert loaded.classes == ("apple", "pear")
    assert loaded.train.inputs.shape == (2, 1, 28, 28)
    assert loaded.train.inputs[:, 0, 0, 0].tolist() == [50, 150]


def test_crop_and_flip(data: Any) -> None:
    """Every image is a window of its padded self, or of its mirror image; all of these occur, each image on its own."""
    images = torch.arange(1, 1 + 3 * 16, dtype=torch.uint8).view(1, 3, 4, 4).repeat(2000, 1, 1, 1)
    padded = torch.nn.functional.pad(images[0], [1] * 4)
    windows = [(flip, y, x, padded.flip(2) if flip else padded) for flip in (0, 1) for y in range(3) for x in range(3)]
    result = data.crop_flip(images, torch.Generator().manual_seed(0), padding=1)
    assert result.dtype == torch.uint8
    matches = torch.stack(
        [(result == source[:, y : y + 4, x : x + 4]).flatten(1).all(1) for _, y, x, source in windows]
    )
    assert (matches.sum(0) == 1).all()
    assert (matches.sum(1) - 2000 / 18).abs().max() < 60
    repeated = data.crop_flip(images, torch.Generator().manual_seed(0), padding=1)
    assert torch.equal(repeated, result)


def test_elastic(data: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 1, 28, 28)
    image[..., 9:19, 9:19] = 1
    images = image.repeat(50, 1, 1, 1)
    assert torch.allclose(data.elastic(images, 0.0, 4.0, generator), images, atol=1e-5)
    bent = data.elastic(images, 34.0, 4.0, generator)
    assert bent.min() >= 0
    assert bent.max() <= 1
    assert (bent - images).abs().mean((1, 2, 3)).min() > 0.001  # each is distorted,
    assert (bent[1:] - bent[:-1]).abs().mean((1, 2, 3)).min() > 0.001  # and differently,
    assert (bent.sum((1, 2, 3)) - 100).abs().max() < 50  # but not torn to pieces


def test_elastic_smooths_with_a_gaussian(data: Any) -> None:
    """Far from the border, the displacement is what a Gaussian filter of scipy makes of the same noise."""
    from scipy.ndimage import gaussian_filter

    alpha, sigma, size = 5.0, 2.0, 33
    noise = torch.rand(1, 2, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    dx, dy = (gaussian_filter(noise[0, i].double().numpy(), sigma, mode="constant", truncate=8) * alpha for i in (0, 1))
    # On an image that is its own coordinate, a distorted pixel tells where it came from.
    ramp = torch.arange(size).float() / size
    images = torch.stack([ramp.expand(size, size), ramp.view(-1, 1).expand(size, size)]).unsqueeze(1)
    for image, shift in ((images[:1], dx), (images[1:], dy)):
        bent = data.elastic(image, alpha, sigma, torch.Generator().manual_seed(3))
        moved = ((bent - image)[0, 0] * size).numpy()
        assert np.abs(moved - shift)[8:-8, 8:-8].max() < 1e-3
        assert np.abs(shift).max() > 0.1


def test_encoding(data: Any, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    chosen = settings("mnist-mlp", steps=400)
    loaded = data.load(chosen, tmp_path, tmp_path)
    batch = loaded.train.inputs[:4]
    spikes = data.encode(batch, loaded, chosen, torch.Generator().manual_seed(0), augment=False)
    assert spikes.shape == (400, 4, 1, 28, 28)
    assert (spikes.mean(0) - batch / 255).abs().max() < 0.15
    direct = settings("mnist-mlp", encoding="direct")
    scaled = data.Data("", "", (), loaded.train, loaded.test, (0.5,), (0.25,))
    current = data.encode(batch, scaled, direct, torch.Generator(), augment=False)
    assert torch.allclose(current, (batch / 255 - 0.5) / 0.25)
