"""The example as its users run it: from the command line, in a folder of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "examples" / "train.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(TRAIN), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def train(folder: Path, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that must succeed, and its metrics."""
    before = set(folder.glob("runs/*/*"))
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    (results,) = set(folder.glob("runs/*/*")) - before
    metrics = json.loads((results / "metrics.json").read_text())
    assert f"test accuracy {metrics['epochs'][-1]['test_accuracy']:.2%}" in done.stdout
    return results, metrics


def test_the_main_job(tmp_path: Path) -> None:
    """Without any argument: at least 96 % on the digits in under a minute, and everything that it promises."""
    results, metrics = train(tmp_path)
    assert results.parent == tmp_path / "runs" / "digits"
    assert metrics["epochs"][-1]["test_accuracy"] >= 0.96
    assert sum(row["train_seconds"] for row in metrics["epochs"]) < 60
    assert {path.name for path in results.iterdir()} == {
        "metrics.json",
        "checkpoint.pt",
        "learning_curve.png",
        "raster.png",
    }
    for name in ("learning_curve.png", "raster.png"):
        image = matplotlib.image.imread(results / name)
        assert image.shape[0] > 300
        assert image.std() > 0.05  # something is drawn

    checkpoint = torch.load(results / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == metrics["settings"]["epochs"] == len(metrics["epochs"])
    assert checkpoint["settings"] == metrics["settings"]
    assert [tuple(tensor.shape) for tensor in checkpoint["model"].values()] == [(256, 64), (256,), (10, 256), (10,)]


def test_every_backend_gives_the_same_curve(tmp_path: Path) -> None:
    short = ("--epochs", "3", "--hidden", "64", "--seed", "5")
    curves = []
    for backend in ("fused", "reference"):
        _, metrics = train(tmp_path, "--backend", backend, *short)
        assert metrics["backend"] == backend
        curves.append([(row["train_loss"], row["train_accuracy"], row["test_accuracy"]) for row in metrics["epochs"]])
    assert len(curves[0]) == 3
    assert curves[0] == curves[1]
    _, other = train(tmp_path, *short[:-1], "6")
    assert other["epochs"][0]["train_loss"] != curves[0][0][0]


@pytest.mark.skipif("STBP_CUDA_DATA" not in os.environ, reason="STBP_CUDA_DATA names no folder with MNIST/raw")
def test_mnist(tmp_path: Path) -> None:
    """The network 784-800-10 of the paper: at least 97 % after an epoch on the real images."""
    # A copy, for torchvision unpacks the archives where they lie.
    raw = shutil.copytree(Path(os.environ["STBP_CUDA_DATA"], "MNIST", "raw"), tmp_path / "data" / "MNIST" / "raw")
    raw.chmod(0o755)
    _, metrics = train(tmp_path, "mnist-mlp", "--data-dir", "data", "--epochs", "1")
    assert metrics["epochs"][0]["test_accuracy"] >= 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "invalid choice: 'cifar'"),
        (["--epochs", "0"], "--epochs must be positive and finite, got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive and finite, got inf"),
        (["--decay", "1.5"], "decay must lie in [0, 1], got 1.5"),
        (["--width", "-1"], "width must lie in [1e-30, 1e30], got -1.0"),
        (["--surrogate", "triangle"], "invalid choice: 'triangle'"),
        (["--device", "abacus"], "abacus"),
        (["mnist-mlp", "--data-dir", "a-file"], "MNIST can neither be read from nor downloaded to a-file: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    done = run(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_example_of_the_readme() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["rates"].shape == (32, 10)
    assert all(parameter.grad is not None for parameter in names["net"].parameters())
