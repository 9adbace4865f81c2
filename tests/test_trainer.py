"""The trainer of examples/: a run depends neither on how often it is interrupted, nor on how its work is divided."""

import csv
import importlib
import io
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stbp_cuda

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMES = ("train_seconds", "test_seconds", "time")


@pytest.fixture(scope="module")
def lab() -> SimpleNamespace:
    """The modules of examples/."""
    names = ("data", "experiments", "train", "trainer")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    """Networks as small as these only wait for one another's threads, here and in processes started from here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


SETTINGS = {
    "mlp": {"network": "64-32-10", "steps": 5, "learning_rate": 5e-3},
    "cnn": {
        "network": "8x8x1-6C3(Enc)-6C3-AP2-20FC-Voting",
        "steps": 4,
        "encoding": "direct",
        "neunorm": "1/F",
        "dropout": 0.3,
        "augmentation": "crop_flip",
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "linear_learning_rate": 0.1,
        "schedule": "step",
        "step_epochs": 1,
        "v_threshold": 0.2,
    },
    "elastic": {"network": "8x8x1-4C3-P2-10", "steps": 5, "augmentation": "elastic", "weight_decay": 1e-4},
}
SHORT = {"batch_size": 20, "epochs": 2, "train_samples": 73, "test_samples": 50}  # 4 batches, the last of 13


def start(lab: SimpleNamespace, folder: Path, **settings: Any) -> Any:
    """A new run on some of the digits."""
    parser = lab.train.make_parser()
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not True]
    args = parser.parse_args(["digits", *words, *(f"--{name}" for name, value in settings.items() if value is True)])
    given = {name: getattr(args, name) for name in settings}
    chosen = lab.experiments.Settings(**{**vars(lab.experiments.EXPERIMENTS["digits"].settings), **given})
    lab.train.check(chosen, parser)
    fabric = lab.train.make_fabric("cpu", chosen.precision, parser)
    data = lab.data.load(chosen, folder, folder)
    folder.mkdir(exist_ok=True)
    record = lab.train.new_record("digits", chosen, data, fabric)
    return lab.trainer.Trainer(record, chosen, data, fabric, folder, 0)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_bits(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_same_bits(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for item, same in zip(one, other, strict=True):
            assert_same_bits(item, same)
    else:
        assert one == other


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints are the same, but for times."""
    one, other = ({**state, "seconds": 0.0} for state in (one, other))
    for state in one, other:
        record = json.loads(state["record"])
        state["record"] = [without_times(record["epochs"]), record.get("confusion")]
    assert_same_bits(one, other)


def read(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


# --- interruptions --------------------------------------------------------------------------------------------------


class DeathError(Exception):
    pass


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_dies_after_any_step_goes_on_as_if_it_had_not(
    kind: str, lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead after each single step: every part of an epoch, and its end, is gone on from."""
    settings = {**SETTINGS[kind], **SHORT}
    whole = start(lab, tmp_path / "whole", **settings)
    assert whole.fit(checkpoint_seconds=1e9)

    step = lab.trainer.Trainer.train_step

    def die_after_two(self: Any, *args: Any) -> None:
        if next(taken) == 1:
            raise DeathError
        step(self, *args)

    monkeypatch.setattr(lab.trainer.Trainer, "train_step", die_after_two)
    for lives in itertools.count(1):
        taken = itertools.count()
        torch.manual_seed(lives)  # what others leave in the global generator must not matter
        run = start(lab, tmp_path / "dying", **settings)
        if lives > 1:
            run.load(lab.trainer.read_checkpoint(tmp_path / "dying" / "checkpoint.pt"))
        try:
            assert run.fit(checkpoint_seconds=0)
            break
        except DeathError:
            run.board.close()
    assert lives == settings["epochs"] * 4
    assert_same_state(read(tmp_path / "whole"), read(tmp_path / "dying"))


def test_dying_while_writing_leaves_the_checkpoint_before(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(lab, tmp_path, **SETTINGS["mlp"], **SHORT)
    run.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def die(*_: object) -> None:
        raise DeathError

    run.step = 3
    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, die)
            with pytest.raises(DeathError):
                run.save()
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run.save()
    assert read(tmp_path)["step"] == 3


# Each line of the input asks for a run; the answer is its exit status. A signal is sent by the run to itself, at a call
# of a function that is counted from its first checkpoint on, so that no machine is too fast or too slow for it.
FORKS = """
import os, signal, sys
import matplotlib.figure, sklearn.datasets, sklearn.model_selection
import commands, train

matplotlib.figure.Figure.savefig = lambda self, file: file.write(b"undrawn")

replace = os.replace
def send(number, calls):
    def count(frame, event, argument):
        nonlocal calls
        calls -= 1
        if calls == 0:
            sys.setprofile(None)
            os.kill(os.getpid(), number)
    def replace_and_count(old, new):
        replace(old, new)
        if str(new).endswith("checkpoint.pt"):
            os.replace = replace
            sys.setprofile(count)
    os.replace = replace_and_count

for line in sys.stdin:
    folder, number, calls, *arguments = line.split()
    child = os.fork()
    if not child:
        os.chdir(folder)
        for stream in 1, 2:
            os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.argv = ["train.py", *arguments]
        if int(number):
            send(int(number), int(calls))
        commands.run(train.main)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Processes of train.py, one after another, which share the time that its imports take."""

    def __enter__(self) -> "Runs":
        environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # Not in the root of a clone, where Python would find the sources before the installed package.
        command = [sys.executable, "-c", FORKS]
        self.server = subprocess.Popen(command, text=True, cwd=EXAMPLES, env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()  # ends with its input

    def __call__(self, folder: Path, *arguments: str, end: int = 0, calls: int = 0) -> int:
        """The exit status of a run, which sends itself the signal ``end`` at so many calls of functions after its first
        checkpoint; without one it runs to its end."""
        print(folder, int(end), calls, *arguments, file=self.server.stdin, flush=True)
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


LONG = [
    "--network=64-64-48-10",
    "--dropout=0.2",
    "--epochs=8",
    "--train-samples=400",
    "--batch-size=20",
    "--run-dir=run",
]


def steps_taken(folder: Path) -> int:
    state = read(folder)
    return 20 * int(state["epoch"]) + int(state["step"])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGINT, SIGTERM, then SIGKILL several times: the same bits as without, and no row lost or written twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    always = ["--checkpoint-seconds", "0"]
    # Others every time, so that in time all moments are tried: up to ten of the 160 steps for each.
    moments = [random.randint(1, 150_000) for _ in range(6)]
    with Runs() as run:
        assert run(whole, *LONG) == 0
        assert run(killed, *LONG, *always, end=signal.SIGINT, calls=moments[0]) == 130
        assert run(killed, "--resume", "run", *always, end=signal.SIGTERM, calls=moments[1]) == 143
        messages = (killed / "log").read_text()
        assert messages.count("--resume run goes on") == 2
        assert "Traceback" not in messages
        steps = [steps_taken(killed / "run")]
        for moment in moments[2:]:
            assert run(killed, "--resume", "run", *always, end=signal.SIGKILL, calls=moment) == -signal.SIGKILL
            steps.append(steps_taken(killed / "run"))
        assert run(killed, "--resume", "run") == 0
    assert steps == sorted(steps)

    one, other = (folder / "run" for folder in (whole, killed))
    assert_same_state(read(one), read(other))
    rows = json.loads((other / "metrics.json").read_text())["epochs"]
    assert [row["epoch"] for row in rows] == list(range(1, 9)), f"moments {moments}"
    assert f"test accuracy {rows[-1]['test_accuracy']:.2%}" in (killed / "log").read_text()
    with (other / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in table] == [row["test_loss"] for row in rows]
    board = EventAccumulator(str(other / "tensorboard"))
    board.Reload()
    events = board.Scalars("test/loss")
    assert [event.step for event in events] == list(range(1, 9))
    assert [event.value for event in events] == pytest.approx([row["test_loss"] for row in rows])
    assert not list(other.glob("*.part"))


# --- how the work is divided ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "passes"), [("mlp", 3), ("elastic", 20)])
def test_accumulation_changes_nothing(kind: str, passes: int, lab: SimpleNamespace, tmp_path: Path) -> None:
    """Also in passes that do not divide the batch, and that the last one has too few samples for."""
    settings = {**SETTINGS[kind], **SHORT}
    one = start(lab, tmp_path / "one", **settings)
    other = start(lab, tmp_path / "other", **settings, accumulate=passes)
    for run in one, other:
        assert run.fit(1e9)
    for row, same in zip(one.rows, other.rows, strict=True):
        assert same["train_loss"] == pytest.approx(row["train_loss"], abs=1e-6)
        assert same["test_loss"] == pytest.approx(row["test_loss"], abs=1e-6)


# The script, and then no thread of Gloo, which would abort the interpreter as it ends.
UNDER_TORCHRUN = """
import runpy, sys
from pathlib import Path

sys.argv.pop(0)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
"""


def test_two_processes_give_the_losses_of_one(lab: SimpleNamespace, tmp_path: Path) -> None:
    """101 samples in batches of 20: the last one is a single sample, of which one process has nothing."""
    settings = {"network": "8x8-6C3-32-10", "train_samples": 101, "batch_size": 20, "epochs": 3}
    one = start(lab, tmp_path / "one", **settings)
    assert one.fit(1e9)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    command = [*torchrun, str(script), str(EXAMPLES / "train.py"), *options, "--run-dir", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "on cpu x 2" in done.stdout
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["machine"]["processes"] == 2
    for row, same in zip(one.rows, two["epochs"], strict=True):
        for loss in "train_loss", "test_loss":
            assert same[loss] == pytest.approx(row[loss], abs=1e-6)
        assert same["test_accuracy"] == row["test_accuracy"]
        assert same["rates"] == pytest.approx(row["rates"], abs=1e-6)
    assert one.rows[2]["train_loss"] < 0.9 * one.rows[0]["train_loss"]  # something was learned

    # What two have written, one can go on from.
    one.load(lab.trainer.read_checkpoint(tmp_path / "two" / "checkpoint.pt"))
    assert one.finished
    result = lab.trainer.evaluate(one.net, one.test, one.data, one.settings, one.fabric)
    assert result.loss == pytest.approx(two["epochs"][2]["test_loss"], abs=1e-6)


def test_bf16(lab: SimpleNamespace, tmp_path: Path) -> None:
    """Close to fp32, but not the same; the weights stay in fp32."""
    runs = [
        start(lab, tmp_path / precision, **SETTINGS["cnn"], **{**SHORT, "train_samples": 300}, precision=precision)
        for precision in ("fp32", "bf16")
    ]
    for run in runs:
        assert run.fit(1e9)
    one, other = (run.rows[-1] for run in runs)
    assert one["train_loss"] != other["train_loss"] == pytest.approx(one["train_loss"], rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in runs[1].net.parameters())
    assert other["train_loss"] < runs[1].rows[0]["train_loss"]


def test_compiled(lab: SimpleNamespace, tmp_path: Path) -> None:
    settings = {**SETTINGS["mlp"], **SHORT, "train_samples": 80, "epochs": 1}
    runs = [start(lab, tmp_path / str(how), **settings, **how) for how in ({}, {"compile": True})]
    for run in runs:
        assert run.fit(1e9)
    assert runs[1].rows[0]["train_loss"] == pytest.approx(runs[0].rows[0]["train_loss"], rel=1e-5)
    # Its weights are those of the network itself, under the same names.
    assert read(runs[0].folder)["model"].keys() == read(runs[1].folder)["model"].keys()


def test_fully_connected_layers_learn_at_a_rate_of_their_own(lab: SimpleNamespace, tmp_path: Path) -> None:
    run = start(lab, tmp_path, **SETTINGS["cnn"], **SHORT)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.net.named_parameters():
        assert rates.pop(id(parameter)) == pytest.approx(0.01 if ".fc" in name else 0.1)
    assert not rates


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_by_hand(lab: SimpleNamespace, tmp_path: Path) -> None:
    run = start(lab, tmp_path, **SETTINGS["cnn"], **SHORT)
    result = lab.trainer.evaluate(run.net, run.test, run.data, run.settings, run.fabric)
    again = lab.trainer.evaluate(run.net, run.test, run.data, run.settings, run.fabric)
    assert result == again

    spikes: dict[str, list[torch.Tensor]] = {name: [] for name in run.net.lif_layers()}
    images, targets = run.data.test.inputs.float() / 255, run.data.test.targets
    run.net.eval()
    with torch.no_grad(), lab.trainer.watch(run.net, lambda name, s: spikes[name].append(s)):
        outputs = run.net(images)
    for name, (s,) in spikes.items():
        assert set(s.unique().tolist()) <= {0.0, 1.0}, name  # also in front of NeuNorm
        assert result.rates[name] == pytest.approx(float(s.mean()), abs=1e-6)
    guesses = outputs.mean(0).argmax(1)
    assert result.accuracy == pytest.approx(float((guesses == targets).double().mean()))
    assert sum(map(sum, result.confusion)) == 50
    assert result.confusion[3][8] == int(((targets == 3) & (guesses == 8)).sum())
    assert result.loss == pytest.approx(float(stbp_cuda.losses.rate_mse(outputs, targets)), abs=1e-6)


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Code:
    """An object whose unpickling would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def bad_checkpoints(good: bytes) -> Iterator[tuple[str, bytes]]:
    def saved(content: object) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    yield "empty", b""
    yield "text", b"no checkpoint at all\n"
    yield "half", good[: len(good) // 2]
    yield "all but the end", good[:-10]
    yield "a pickle", pickle.dumps(Code())
    yield "code", saved({"format": 1, "settings": Code()})
    yield "another's", saved({"state_dict": {"weight": torch.zeros(3)}})
    yield "a tensor", saved(torch.zeros(3))
    state = torch.load(io.BytesIO(good), weights_only=True)
    yield "later", saved({**state, "format": 1000})
    yield "other settings", saved({**state, "settings": {"flavour": "vanilla"}})
    yield "no record", saved({**state, "record": "{"})


def test_bad_checkpoints(lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(lab, tmp_path / "run", **SETTINGS["mlp"], **SHORT)
    run.save()
    good = tmp_path / "run" / "checkpoint.pt"
    assert lab.trainer.read_checkpoint(good)["settings"] == run.settings
    for name, content in bad_checkpoints(good.read_bytes()):
        bad = tmp_path / f"{name}.pt"
        bad.write_bytes(content)
        with pytest.raises(SystemExit) as failure:
            lab.trainer.read_checkpoint(bad)
        message = str(failure.value.code)
        assert message.startswith(f"error: {bad} "), name
        assert "\n" not in message
    with pytest.raises(SystemExit, match=r"error: .*missing\.pt cannot be read"):
        lab.trainer.read_checkpoint(tmp_path / "missing.pt")
    assert not (tmp_path / "executed").exists()


def test_as_many_outputs_as_classes(lab: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="64-9 has 9 outputs, and scikit-learn's digits has 10 classes"):
        start(lab, tmp_path, network="64-9")
