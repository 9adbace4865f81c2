"""How runs of examples/ end where something comes from outside: another process, a full disk, a closed pipe, Ctrl-C, a
size that no machine has, numbers that are not finite. One line and an exit code, and the run can be gone on with."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import files
import interrupts
import pytest
import torch
import train
import trainer

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--network=64-16-10", "--train-samples=60", "--test-samples=40", "--epochs=3", "--steps=3"]


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> Callable[..., tuple[Any, str]]:
    """Runs train.py in this process; its exit code, and what it has written to stderr beside its progress bar."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, "\n".join(
            line for line in lines if line.strip() and "batch/s" not in line and "?batch" not in line
        )

    return call


def script(folder: Path, *arguments: str, **options: Any) -> Any:
    command = [sys.executable, "-W", "error", str(EXAMPLES / arguments[0]), *arguments[1:]]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, **options)


def assert_complete(folder: Path, epochs: int = 3) -> None:
    record = json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in record["epochs"]] == list(range(1, epochs + 1))
    assert trainer.read_checkpoint(folder / "checkpoint.pt")["epoch"] == epochs
    assert (folder / "report.md").exists()
    assert not list(folder.rglob("*.part"))


# --- one process for a folder ---------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(start: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    assert start(*TINY, "--run-dir", "run")[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with files.locked(tmp_path / "run"):
        for arguments in (["--resume", "run"], [*TINY, "--run-dir", "run"], ["--resume", str(tmp_path / "run" / ".")]):
            code, error = start(*arguments)
            assert str(code).startswith("error: ")
            assert "run is in use: another process is at work on this run" in str(code)
            assert "\n" not in str(code)
            assert not error
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert start("--resume", "run")[0] == 0


def test_a_killed_process_leaves_no_lock(start: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    assert start(*TINY, "--run-dir", "run")[0] == 0
    code = (
        "import files, pathlib, sys\nwith files.locked(pathlib.Path('run')):\n  print('locked', flush=True)\n  input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        (tmp_path / "run" / f"checkpoint.pt.{process.pid}.part").write_bytes(b"half")
        assert "run is in use" in str(start("--resume", "run")[0])
        process.kill()
        process.wait()
    assert start("--resume", "run")[0] == 0
    assert_complete(tmp_path / "run")


def test_a_file_system_without_locks(
    start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    code, error = start(*TINY, "--run-dir", "run")
    assert code == 0
    assert error == "warning: run cannot be locked (No locks available); let no other process use it"


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with files.locked(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "x.1.part").touch()
    assert (tmp_path / "runs" / "a").exists()
    with files.locked(tmp_path / "runs" / "a"):
        pass
    assert not (tmp_path / "runs" / "a").exists()


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_write(
    start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file in its turn, until a run gets to its end; each run is gone on with, too."""
    fsync = os.fsync
    for good in range(100):
        count, name = 0, f"run-{good}"

        def fill(*args: Any, good: int = good) -> None:
            nonlocal count
            count += 1
            if count > good:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(*args)

        monkeypatch.setattr(os, "fsync", fill)
        code, error = start(*TINY, "--epochs", "2", "--run-dir", name)
        monkeypatch.setattr(os, "fsync", fsync)
        if code == 0:
            break
        assert code == 1
        go_on = f"--resume {name} goes on" if good else "begin again: nothing was kept"
        (line,) = error.splitlines()
        assert line.startswith(f"error: {name}/")
        assert line.endswith(f": No space left on device; when that is mended, {go_on}")
        assert not list(tmp_path.rglob("*.part"))
        if good:
            assert start("--resume", name)[0] == 0
            assert_complete(tmp_path / name, epochs=2)
        else:
            assert not (tmp_path / name).exists()
    assert good == 12  # at the start and for two epochs seven, and a report of five
    assert_complete(tmp_path / name, epochs=2)


def test_a_disk_that_is_full_at_the_file_of_tensorboard(
    start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    framed = trainer.framed
    for good in range(4):  # the header, and each epoch
        with monkeypatch.context() as patch:
            count = 0

            def fill(event: Any, good: int = good) -> bytes:
                nonlocal count
                count += 1
                if count > good:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return framed(event)

            patch.setattr(trainer, "framed", fill)
            code, error = start(*TINY, "--run-dir", f"run-{good}")
        assert code == 1
        assert f"run-{good}/tensorboard/events.out.tfevents.run: No space left on device" in error.splitlines()[-1]
        assert start("--resume", f"run-{good}")[0] == 0
        assert_complete(tmp_path / f"run-{good}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = script(tmp_path, "train.py", *TINY, "--run-dir", "run", stdout=full)
        _, error = process.communicate()
    assert process.returncode == 1
    assert error == "error: No space left on device; when that is mended, begin again: nothing was kept\n"
    assert not (tmp_path / "run").exists()


def test_other_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def breaks(file: Any) -> None:
        file.write(b"x" * 10_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a", breaks)
    with pytest.raises(OSError, match=r"5 requested and 0 written: '.*a'"):
        files.write(tmp_path / "a", lambda _: (_ for _ in ()).throw(OSError("5 requested and 0 written")))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
    with pytest.raises(FileNotFoundError, match="missing/a"):
        files.write(tmp_path / "missing" / "a", b"")


# --- closed pipes ---------------------------------------------------------------------------------------------------


def test_a_pipe_that_is_closed_after_a_line(tmp_path: Path) -> None:
    with script(tmp_path, "train.py", *TINY, "--run-dir", "run", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("digits (scikit-learn's 8 x 8 digits")
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in error
    assert "Broken" not in error


@pytest.mark.parametrize("arguments", [["train.py", "--list"], ["train.py", "--help"], ["evaluate.py", "--help"]])
def test_a_pipe_that_nobody_reads(arguments: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = script(tmp_path, *arguments, stdout=writing)
    os.close(writing)
    _, error = process.communicate()
    assert error == ""
    assert process.returncode == 141 or ("--help" in arguments and process.returncode == 0)  # argparse lets it pass


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["argparse", "torch", "lightning_fabric"])
@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_an_interrupt_while_modules_are_imported(name: str, module: str, tmp_path: Path) -> None:
    """By a module of that name which sends it, as if the real one were being imported."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in 1, 2: pass\n"
    )
    paths = [str(tmp_path), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = script(tmp_path, name, stdout=subprocess.PIPE, env=environment)
    assert process.communicate() == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, ImportError, SystemExit, OSError, BrokenPipeError, None])
def test_an_interrupt_of_a_command(becomes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the code makes of it that it comes upon."""
    before = signal.getsignal(signal.SIGINT)

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes("another error") from None

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(SystemExit) as stop:
            commands.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
        interrupts.came = False
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("where", ["Trainer", "write_report", "write_json", "evaluate"])
def test_an_interrupt_outside_of_the_steps(
    where: str, start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train if where in ("Trainer", "write_report") else trainer, where, interrupt)
        code, error = start(*TINY, "--run-dir", "run")
    assert code == 130
    if where in ("Trainer", "write_json"):  # nothing was written yet
        assert "interrupted; begin again" in error
        assert not (tmp_path / "run").exists()
        return
    assert "interrupted; --resume run goes on" in error
    assert start("--resume", "run")[0] == 0
    assert_complete(tmp_path / "run")


def test_other_errors_are_not_hidden() -> None:
    def main() -> None:
        raise RuntimeError("a fault of ours")

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(RuntimeError, match="a fault of ours"):
            commands.run(main)
    finally:
        signal.signal(signal.SIGINT, before)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_a_size_that_only_the_allocator_refuses(
    start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "memory_limit", lambda: math.inf)
    code, error = start("--steps", "1000000000000", "--network", "64-10", "--run-dir", "run")
    assert code == 1
    assert "error: there is not enough memory; fewer --steps, a smaller --batch-size" in error.splitlines()[-1]


def test_the_least_memory_of_a_step() -> None:
    settings = train.EXPERIMENTS["digits"].settings
    weights = 64 * 256 + 256 + 256 * 10 + 10
    assert trainer.least_memory(settings, (1, 8, 8), 50) == 8 * weights + 4 * 15 * 50 * (64 + 256 + 10)
    other = train.dataclasses.replace(settings, encoding="direct", precision="bf16", accumulate=3)
    assert trainer.least_memory(other, (1, 8, 8), 50) == 8 * weights + 2 * 15 * 17 * (256 + 10)


# --- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "weight", "test loss"])
def test_a_run_that_diverges(
    what: str, number: float, start: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 2 of epoch 2: what epoch 1 has left is kept, and reported."""
    step, loss = trainer.Trainer.train_step, trainer.LOSSES["mse"]

    def poisoned(self: Any, *args: Any) -> None:
        step(self, *args)
        if (self.epoch, self.step) == (1, 1):
            if what == "loss":
                self.sums[0] = number
            elif what == "weight":
                with torch.no_grad():
                    self.net.get_parameter("layers.fc1.weight")[3, 4] = number

    def poisoned_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        late = what == "test loss" and not torch.is_grad_enabled() and (tmp_path / "run" / "checkpoint.pt").exists()
        return loss(outputs, targets) + (number if late else 0)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", poisoned)
        patch.setitem(trainer.LOSSES, "mse", poisoned_loss)
        code, error = start(*TINY, "--batch-size", "20", "--run-dir", "run")
    assert code == 1
    line = error.splitlines()[-1]
    named = {"loss": "the loss is", "weight": "layers.fc1.weight is", "test loss": "the test loss is"}[what]
    assert line.startswith(f"error: {named} not finite")
    assert "epoch 2" in line
    assert "A smaller --learning-rate (here 0.002)" in line
    assert "run/checkpoint.pt is that of before" in line
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "NaN" not in metrics
    assert "Infinity" not in metrics
    assert [row["epoch"] for row in json.loads(metrics)["epochs"]] == [1]
    checkpoint = trainer.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert (tmp_path / "run" / "report.md").exists()
    assert start("--resume", "run")[0] == 0  # what has poisoned it is gone
    assert_complete(tmp_path / "run")


def test_a_diverged_run_keeps_the_checkpoint_within_an_epoch(
    start: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    options = ["--optimizer", "sgd", "--weight-decay", "1e30", "--learning-rate", "1e5", "--checkpoint-seconds", "0"]
    code, error = start(*TINY, *options, "--batch-size", "10", "--run-dir", "run")
    assert code == 1
    assert "not finite any more by step" in error.splitlines()[-1]
    for path in (tmp_path / "run").glob("checkpoint.pt"):
        assert all(tensor.isfinite().all() for tensor in trainer.read_checkpoint(path)["model"].values())


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1000000000"], "1000000000 steps of 64-256-10 take 1,320.0 GB at least, and there are"),
        (["--steps", "5000000"], "5000000 steps of 64-256-10 take 330.0 GB at least, and there are"),
        (["--steps", "9" * 30], "--steps must be at most 4.61169e+18, got 9999"),
        (["--batch-size", "9" * 30], "--batch-size must be at most 4.61169e+18, got 9999"),
        (["--network", f"64-{10**14}-10"], "take "),
        (["--network", f"64-{10**30}-10"], ""),
        (["--checkpoint-seconds", "nan"], "--checkpoint-seconds must be finite and not negative, got nan"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds must be finite and not negative, got -1.0"),
        (["--checkpoint-seconds", "inf"], "--checkpoint-seconds must be finite and not negative, got inf"),
        (["--workers", "-1"], "--workers must be a number from 0 to 1000, got -1"),
        (["--time-window", "1e-9"], "--time-window must be a whole number of microseconds, in ms, got 1e-09"),
        (["--time-window", "0.0015"], "--time-window must be a whole number of microseconds, in ms, got 0.0015"),
        (["--time-window", "1e300"], "--time-window must be at most 1e+30, got 1e+300"),
        (["--time-window", "1e20"], "--time-window must be a whole number of microseconds, in ms, got 1e+20"),
        (["--momentum", "1.5"], "--momentum must lie in [0, 1], got 1.5"),
        (["--momentum", "nan"], "--momentum must lie in [0, 1], got nan"),
        (["--dropout", "nan"], "--dropout must lie in [0, 1], got nan"),
        (["--elastic-alpha", "nan"], "--elastic-alpha must lie in [-10000, 10000], got nan"),
        (["--elastic-alpha", "inf"], "--elastic-alpha must lie in [-10000, 10000], got inf"),
        (["--elastic-sigma", "1e-20"], "--elastic-sigma must be at least 0.01, got 1e-20"),
        (["--step-factor", "2"], "--step-factor must be at most 1, got 2.0"),
        (["--learning-rate", "1e38"], "--learning-rate must be at most 1e+30, got 1e+38"),
        (["--learning-rate", "1e20", "--linear-learning-rate", "1e20"], "--learning-rate times --linear-learning-rate"),
        (["--norm-decay", "nan"], "--norm-decay must lie in [0, 1], got nan"),
        *(
            ([f"--{name.replace('_', '-')}", value], f"{name.replace('_', '-')} must")
            for name in ("learning_rate", "linear_learning_rate", "weight_decay", "weight_norm", "step_factor")
            for value in ("nan", "inf", "-1")
        ),
        *(([f"--{name}", value], name) for name in ("decay", "width") for value in ("nan", "inf", "-1")),
        *((["--v-threshold", value], "v") for value in ("nan", "inf")),
        *(
            ([f"--{name}", value], f"--{name} must be")
            for name in ("steps", "batch-size", "accumulate", "epochs", "step-epochs")
            for value in ("0", "-1")
        ),
        *(([f"--{name}", "-1"], f"--{name} must be") for name in ("seed", "train-samples", "test-samples")),
    ],
)
def test_numbers_that_make_no_sense(
    arguments: list[str], message: str, start: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    """A single line, before anything is written."""
    code, error = start(*arguments)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert error.startswith("train.py: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())
