"""The examples as their users run them: from the command line, in a folder of their own."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import data
import evaluate
import matplotlib.image
import numpy as np
import pytest
import results
import torch
import train
import trainer
from experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(folder: Path, *arguments: str, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def run_to_the_end(folder: Path, *arguments: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that must succeed, and its metrics."""
    before = set(folder.glob("runs/*/*"))
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    (results,) = set(folder.glob("runs/*/*")) - before - set(folder.glob("runs/.cache/*"))
    metrics = json.loads((results / "metrics.json").read_text())
    assert f"test accuracy {metrics['epochs'][-1]['test_accuracy']:.2%}" in done.stdout
    assert f"data: {metrics['data']['name']}, {metrics['data']['extent']}" in done.stdout
    return results, metrics


def train_here(patch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """The metrics of a run of three epochs in this process, which saves the time to import everything."""
    with patch.context() as changed:
        changed.chdir(folder)
        name = f"run-{len(list(folder.iterdir()))}"
        changed.setattr(sys, "argv", ["train.py", "--epochs", "3", "--run-dir", name, *arguments])
        train.main()
    return json.loads((folder / name / "metrics.json").read_text())


def test_the_main_job(tmp_path: Path) -> None:
    """Without any argument: at least 96 % on the digits, and everything that it promises."""
    results, metrics = run_to_the_end(tmp_path)
    assert results.parent == tmp_path / "runs" / "digits"
    assert metrics["epochs"][-1]["test_accuracy"] >= 0.96
    pictures = {"learning_curve.png", "raster.png", "confusion.png", "firing_rates.png"}
    files = {"metrics.json", "metrics.csv", "checkpoint.pt", "report.md"}
    assert {path.name for path in results.iterdir()} == pictures | files | {"tensorboard"}
    for name in pictures:
        image = matplotlib.image.imread(results / name)
        assert image.shape[0] > 300
        assert image.std() > 0.05  # something is drawn

    report = (results / "report.md").read_text()
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", report)) == pictures
    assert f"Test accuracy {metrics['epochs'][-1]['test_accuracy']:.2%} after epoch 40 of 40" in report
    for name, value in metrics["settings"].items():
        assert f"| {name} | {value} | {metrics['sources'][name]} |" in report

    checkpoint = torch.load(results / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == metrics["settings"]["epochs"] == len(metrics["epochs"])
    assert checkpoint["settings"] == metrics["settings"]
    weights = {name: tensor for name, tensor in checkpoint["model"].items() if not name.endswith("_extra_state")}
    assert [tuple(tensor.shape) for tensor in weights.values()] == [(256, 64), (256,), (10, 256), (10,)]
    assert len(checkpoint["model"]) == 4 + 2  # and the constants of two layers of neurons

    done = run(tmp_path, str(results), "--json", "evaluation.json", script="evaluate.py")
    assert done.returncode == 0, done.stderr[-5000:]
    last = metrics["epochs"][-1]
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["accuracy"] == last["test_accuracy"]
    assert evaluation["loss"] == last["test_loss"]
    assert evaluation["rates"] == last["rates"]
    assert f"test accuracy {last['test_accuracy']:.2%}" in done.stdout
    dense = 15 * 64 * 256, 15 * 256 * 10
    assert [macs for _, macs in evaluation["operations"].values()] == [*dense, sum(dense)]
    spikes, _ = evaluation["operations"]["fc2"]
    assert spikes == pytest.approx(last["rates"]["lif1"] * dense[1], rel=1e-5)


@pytest.mark.usefixtures("no_pictures")
def test_every_backend_gives_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def curve(backend: str, seed: int) -> list[tuple[float, ...]]:
        metrics = train_here(monkeypatch, tmp_path, "--network", "64-64-10", "--backend", backend, "--seed", str(seed))
        assert metrics["settings"]["backend"] == backend
        return [(row["train_loss"], row["train_accuracy"], row["test_accuracy"]) for row in metrics["epochs"]]

    first = curve("fused", 5)
    assert len(first) == 3
    assert curve("reference", 5) == first
    assert curve("fused", 6)[0] != first[0]


@pytest.mark.skipif("STBP_CUDA_DATA" not in os.environ, reason="STBP_CUDA_DATA names no folder with MNIST/raw")
def test_mnist(tmp_path: Path) -> None:
    """The network 784-800-10 of the paper: at least 97 % after an epoch on the real images."""
    _, metrics = run_to_the_end(tmp_path, "mnist-mlp", "--data-dir", os.environ["STBP_CUDA_DATA"], "--epochs", "1")
    assert metrics["data"]["extent"] == "all of it: 60,000 to train with, 10,000 to test"
    assert metrics["epochs"][0]["test_accuracy"] >= 0.97
    assert metrics["command"] == "python examples/train.py mnist-mlp --epochs 1"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_built(name: str) -> None:
    """Its settings are accepted, each has a source, and the network has an output for every class."""
    settings, sources = EXPERIMENTS[name].settings, EXPERIMENTS[name].sources
    assert list(dataclasses.asdict(settings)) == sorted(sources, key=list(vars(settings)).index)
    assert all(re.match("A$|B$|C$|ours", source) for source in sources.values())
    for setting, choices in train.ALL_CHOICES.items():
        assert getattr(settings, setting) in choices
    with torch.device("meta"):  # shapes alone; the largest networks have 50 million weights
        net = trainer.build(settings, data.SHAPES[settings.data])
        leading = (3,) if settings.encoding == "direct" else (settings.steps, 3)
        inputs = torch.zeros(*leading, *net.input_shape)
    assert net.output_shape == (10,)
    assert inputs.shape[-3:] == net.input_shape


SMALL = {  # experiment: a smaller network, if its own would take long
    "mnist-mlp": None,
    "mnist-cnn": None,
    "objects-cnn": None,
    "nmnist-mlp": None,
    "nmnist-cnn": "8C3(Enc)-8C3-AP2-20FC-Voting",
    "dvscifar10": "8C3(Enc)-8C3-AP2-20FC-Voting",
    "cifar10-cifarnet": "8C3(Enc)-8C3-AP2-20FC-Voting",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of experiment runs from its files to its report, here on a handful of random samples."""
    write = importlib.import_module("test_data")
    rng = np.random.default_rng(0)
    write.write_mnist(tmp_path / "data")
    labels = np.arange(12, dtype=np.uint8) % 2
    images = rng.integers(0, 256, (12, 28, 28), np.uint8)
    np.savez(tmp_path / "data" / "objects.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for i in range(4):
        events = [(*rng.integers(0, 34, 2).tolist(), i % 2, 50 * t) for t in range(1000)]
        write.write_nmnist(tmp_path / "data", "Train", i, f"{i:05}", events)
        write.write_nmnist(tmp_path / "data", "Test", i, f"{i:05}", events)
        write.write_aedat(tmp_path / "data" / "CIFAR10DVS" / "cat" / f"{i}.aedat", events)
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir()
    records = rng.integers(0, 10, (10, 3073), np.uint8)
    (folder / "data_batch_1_first4000.bin").write_bytes(records.tobytes())

    smaller = ["--network", SMALL[name]] if SMALL[name] else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", name, "--epochs", "1", "--run-dir", "run", *smaller])
    train.main()
    assert "test accuracy" in capsys.readouterr().out
    record = json.loads(Path("run", "metrics.json").read_text())
    assert 0 < record["epochs"][0]["train_loss"] < 5
    assert Path("run", "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "invalid choice: 'cifar'"),
        (["--epochs", "0"], "--epochs must be positive and finite, got 0"),
        (["--learning-rate", "inf"], "--learning-rate must be positive and finite, got inf"),
        (["--weight-norm", "-1"], "--weight-norm must be finite and not negative, got -1.0"),
        (["--decay", "1.5"], "decay must lie in [0, 1], got 1.5"),
        (["--width", "-1"], "width must lie in [1e-30, 1e30], got -1.0"),
        (["--surrogate", "triangle"], "invalid choice: 'triangle'"),
        (["--network", "64-many-10"], "'many' (token 2 of '64-many-10')"),
        (["--network", "99-10"], "'99' (token 1 of '99-10')"),
        (["--encoding", "events"], "--encoding events does not suit --data digits"),
        (["nmnist-mlp", "--augmentation", "elastic"], "--augmentation elastic is for images, not for events"),
        (["--device", "abacus"], "abacus"),
        (["--resume", "nothing"], "nothing holds no run to go on with"),
        (["--resume", "nothing", "--epochs", "3"], "leave out --epochs"),
        (["--run-dir", "a-file"], "a-file"),
        (["mnist-mlp", "--data-dir", "a-file"], "MNIST can neither be read from nor downloaded to a-file: "),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the argument, before anything is written."""
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_errors_have_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"something else")
    for script, arguments, message in (
        ("train.py", ["mnist-mlp", "--data-dir", "checkpoint.pt"], "MNIST can neither be read from"),
        ("evaluate.py", ["checkpoint.pt"], "error: checkpoint.pt is truncated, or no checkpoint"),
        ("results.py", ["missing"], "error: missing is no folder of a run of train.py"),
    ):
        done = run(tmp_path, *arguments, script=script)
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--list"])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(EXPERIMENTS)
    monkeypatch.setattr(sys, "argv", ["train.py", "mnist-mlp", "--list"])
    train.main()
    listed = capsys.readouterr().out
    assert re.search(r"--v-threshold +1\.5 +A\n", listed)
    assert re.search(r"--weight-norm +\S+ +ours", listed)
    assert len(re.findall(r"^--", listed, re.MULTILINE)) == len(vars(EXPERIMENTS["mnist-mlp"].settings))


def test_synaptic_operations() -> None:
    """Counted input by input."""
    operations = evaluate.Operations()
    torch.manual_seed(0)
    for name, module, shape in (
        ("conv", torch.nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
        ("same", torch.nn.Conv2d(2, 5, 3, padding="same"), (2, 2, 4, 4)),
        ("valid", torch.nn.Conv2d(1, 6, 5), (3, 1, 7, 8)),
        ("linear", torch.nn.Linear(7, 3), (4, 2, 7)),
    ):
        x = (torch.rand(shape) < 0.3).float()
        operations.see(name, module, x, module(x))
        # With weights of one and no bias, an output is the number of spikes that reach it.
        with torch.no_grad():
            module.weight.fill_(1)
            module.bias.zero_()
            assert operations.counts[name] == [float(module(x).sum()), float(module(torch.ones_like(x)).sum())]


@pytest.mark.usefixtures("no_pictures")
def test_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that differ in the seed share a row, with their mean; every experiment has a row."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    monkeypatch.chdir(tmp_path)
    tiny = ["--epochs", "2", "--train-samples", "60", "--test-samples", "40"]
    folders = []
    for name, other in (("0", []), ("1", ["--seed", "1"]), ("wide", ["--width", "2.5"])):
        folders.append(f"run-{name}")
        monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", folders[-1], *tiny, *other])
        train.main()
    monkeypatch.setattr(sys, "argv", ["results.py", *folders])
    results.main()
    page = (tmp_path / "results.md").read_text()
    last = [
        json.loads((tmp_path / folder / "metrics.json").read_text())["epochs"][-1]["test_accuracy"] * 100
        for folder in folders
    ]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| digits: ")]
    assert len(rows) == 2
    (both,) = (row for row in rows if "--width" not in row[-1])
    (wide,) = (row for row in rows if "--width" in row[-1])
    assert both[2] == f"{sum(last[:2]) / 2:.2f} ({last[0]:.2f}, {last[1]:.2f})"
    assert wide[2] == f"{last[2]:.2f}"
    assert wide[0].endswith("; changed: width")
    assert "changed" not in both[0]
    assert both[-1] == "`python examples/train.py digits --epochs 2 --train-samples 60 --test-samples 40 --seed 0, 1` |"
    assert "of that 60 and 40" in both[4]
    for name in set(EXPERIMENTS) - {"digits"}:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name}: "))
        assert "not run" in line

    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    results.main()
    (tmp_path / "results.md").write_text(page + "by hand")
    with pytest.raises(SystemExit, match="is out of date"):
        results.main()


def test_the_page_of_results_is_what_the_runs_say() -> None:
    done = run(ROOT, "--check", script="results.py")
    assert done.returncode == 0, done.stderr


def test_the_examples_of_the_readme() -> None:
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["rates"].shape == (32, 10)
    assert names["logits"].shape == (32, 20)
    assert all(parameter.grad is not None for parameter in names["net"].parameters())
