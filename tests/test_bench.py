"""The benchmarks run, tell what they measured, and hold every rival that is installed against the eager loop."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import harness
import malloc
import matplotlib.image
import pytest
import report
import rivals
import speed
import torch
import train_step
from experiments import EXPERIMENTS

import stbp_cuda

BENCH = Path(__file__).parent.parent / "bench"
INSTALLED = [name for name, rival in rivals.RIVALS.items() if not rival.problem(torch.device("cpu"))]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Warnings are errors here as well, but where PYTHONWARNINGS says otherwise."""
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    environment = {"PYTHONWARNINGS": "error", **os.environ}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def result(done: subprocess.CompletedProcess[str], folder: Path, name: str, *pictures: str) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-5000:]
    for picture in pictures:
        assert matplotlib.image.imread(folder / f"{picture}.png").std() > 0.05
    assert not list(folder.glob("*.unfinished.json"))
    written = json.loads((folder / f"{name}.json").read_text())
    assert {"date", "cpu", "threads", "torch", "stbp_cuda", "cpu_instruction_set"} <= written["machine"].keys()
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_rival_computes_the_same(name: str, dtype: torch.dtype, device: str) -> None:
    rival = rivals.RIVALS[name]
    if problem := rival.problem(torch.device(device), dtype):
        pytest.skip(problem)
    if name == "compile" and dtype != torch.float32:
        pytest.skip("compiling takes long; bench/speed.py checks it in every dtype")
    layer = rival.layer(torch.device(device))
    for steps in (5, 2) if name != "compile" else (3,):  # another shape, and nothing is left from the call before
        x, grad = rivals.random_input(steps, 30_000, dtype, torch.device(device), seed=steps)
        for pass_ in rivals.PASSES.values():
            counts = rivals.check(rival, pass_(layer, x, grad), x, grad)
            assert counts["of"] == x.numel()
            if rival.exact:
                assert counts["spikes"] == counts.get("gradients", 0) == 0


def test_check_sees_what_is_wrong() -> None:
    x, grad = rivals.random_input(4, 1000, torch.float32, torch.device("cpu"))
    spikes, grad_x = rivals.forward_backward(rivals.unbind, x, grad)
    wrong = spikes.clone()
    wrong[2, 7] = 1 - wrong[2, 7]
    with pytest.raises(AssertionError, match="'spikes': 1, 'gradients': 0"):
        rivals.check(rivals.RIVALS["ours"], (wrong, grad_x), x, grad)
    with pytest.raises(AssertionError, match=r"'spikes': 0, 'gradients': \d{4}"):  # of another surrogate
        rivals.check(rivals.RIVALS["norse"], (spikes, grad_x), x, grad)
    detached = rivals.forward_backward(
        lambda x: rivals.stbp_cuda.functional.lif(x, decay=rivals.DECAY, detach_reset=True), x, grad
    )
    with pytest.raises(AssertionError, match=r"'spikes': 0, 'gradients': \d+"):
        rivals.check(rivals.RIVALS["ours"], detached, x, grad)


@pytest.mark.skipif("spikingjelly" not in INSTALLED, reason="no SpikingJelly")
@pytest.mark.parametrize("name", ["spikingjelly-native", "spikingjelly-triton"])
def test_who_refuses_float64_is_left_out(name: str) -> None:
    gpu = torch.device("cuda")
    assert rivals.RIVALS[name].problem(gpu, torch.float64) == "its kernels refuse float64"
    assert rivals.RIVALS[name].problem(gpu, torch.bfloat16) is None
    assert rivals.RIVALS["spikingjelly"].problem(gpu, torch.float64) is None


def test_measure_takes_turns_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with the calls alone: 0.1 ms for one of a, 0.3 ms for one of b."""
    now = 0
    clock = SimpleNamespace(perf_counter_ns=lambda: now, perf_counter=lambda: now * 1e-9)
    monkeypatch.setattr(harness, "time", clock)
    calls: list[str] = []

    def run(name: str, nanoseconds: int) -> None:
        nonlocal now
        now += nanoseconds
        calls.append(name)

    runs = {name: lambda name=name, of=of: run(name, of) for name, of in (("a", 100_000), ("b", 300_000))}
    times = harness.measure(runs, 0.05, torch.device("cpu"))
    assert times.keys() == runs.keys()
    assert [times[name]["calls"] for name in "ab"] == [10, 4]  # as many as take a millisecond
    for name, seconds in (("a", 1e-4), ("b", 3e-4)):
        seen = times[name]
        assert seen["median"] == pytest.approx(seconds)
        assert seen["quartiles"] == pytest.approx([seconds] * 2)
        assert seen["samples"] >= harness.FEWEST_ROUNDS
        assert calls.count(name) >= seen["samples"] * seen["calls"]
    assert 0.05 < now * 1e-9 < 0.06


def test_peak_memory_counts_what_is_freed_again() -> None:
    megabytes = 64

    def step() -> None:
        torch.ones(megabytes, 2**18)

    peak = harness.peak_memory(step, torch.device("cpu"))
    if peak is None:
        pytest.skip("the peak of a process is known on Linux only")
    assert peak == pytest.approx(megabytes * 2**20, rel=0.05)


def test_budget_leaves_out_what_takes_too_long() -> None:
    args = speed.argparse.Namespace(longest=2.0, compile_steps=16)
    budget = speed.Budget(args, torch.device("cpu"))
    assert budget.problem("eager", "float32", "fwd", 4, 100) is None
    assert budget.took("eager", "float32", "fwd", 4, 100, 1.0) is None
    assert budget.problem("eager", "float32", "fwd", 8, 100) is None
    assert "expected" in (budget.problem("eager", "float32", "fwd", 16, 100) or "")
    assert "expected" in (budget.problem("eager", "float32", "fwd", 32, 100) or "")
    assert budget.problem("eager", "bfloat16", "fwd", 32, 100) is None
    assert "more than 2 s" in (budget.took("eager", "bfloat16", "fwd", 32, 100, 3.0) or "")
    assert "unrolls" in (budget.problem("compile", "float32", "fwd", 17, 1) or "")
    assert "memory" in (budget.problem("unbind", "float32", "fwd", 2**20, 2**20) or "")
    assert not budget.fits("ours", "float32", 2**20, 2**20)


def test_speed(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--dtypes", "float32", "--steps", 1, 17, "--neurons", 1000)
    few = ("--seconds", 0.02, "--longest", 60, "--compile-steps", 1, "--out", tmp_path)
    done = run("speed.py", *small, *few)
    written = result(done, tmp_path, "speed-cpu", "speed-cpu", "roofline-cpu")
    grid = [(steps, part) for steps in (1, 17) for part in ("fwd", "fwd+bwd")]
    assert [(p["steps"], p["pass"]) for p in written["points"]] == grid
    assert written["machine"]["malloc"].items() >= malloc.KEEP.items()
    names = set(written["rivals"])
    assert names == set(INSTALLED)
    assert written["unavailable"].keys() == rivals.RIVALS.keys() - names
    for point in written["points"]:
        times, left_out = point["times"], point["left_out"]
        assert all(seen["faults"] >= 0 for seen in times.values())
        assert left_out.keys() == ({"compile"} if point["steps"] == 17 else set())
        assert times.keys() == names - left_out.keys() | {"clone", "copy_"}
        assert point["ratios"].keys() == names - left_out.keys() - {"ours"}
        for rival, ratio in point["ratios"].items():
            assert ratio == pytest.approx(times[rival]["median"] / times["ours"]["median"])
            assert times[rival]["different"]["of"] == point["steps"] * point["neurons"]
    assert written["summary"]["against"]["eager"]["points"] == len(grid)
    assert "no result  SpikingJelly, native" in done.stdout
    assert "it unrolls T" in done.stdout
    for target in written["summary"]["targets"]:
        assert target in done.stdout


def test_malloc_as_it_comes_and_no_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rivals, which take most of the time, the grid is larger."""
    for name in (*malloc.KEEP, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    small = ("--device", "cpu", "--dtypes", "float32", "bfloat16", "--steps", 1, 17, "--neurons", 1000, 40000)
    done = run("speed.py", *small, "--seconds", 0.02, "--rivals", "--malloc", "default", "--out", tmp_path)
    written = result(done, tmp_path, "speed-cpu", "speed-cpu", "roofline-cpu")
    assert written["machine"]["malloc"] == {}
    grid = [
        (dtype, steps, neurons, part)
        for dtype in ("float32", "bfloat16")
        for neurons in (1000, 40000)
        for steps in (1, 17)
        for part in ("fwd", "fwd+bwd")
    ]
    assert [(p["dtype"], p["steps"], p["neurons"], p["pass"]) for p in written["points"]] == grid
    for point in written["points"]:
        times = point["times"]
        assert times.keys() == {"ours", "clone", "copy_"}
        size = {"float32": 4, "bfloat16": 2}[point["dtype"]]
        moved = point["steps"] * point["neurons"] * size * (2 if point["pass"] == "fwd" else 4)
        assert point["moved_bytes"] == moved
        assert point["gb_per_s"] == pytest.approx(moved / times["ours"]["median"] / 1e9)
        assert f"{point['dtype']:<9}{point['steps']:>5}{point['neurons']:>11,}  {point['pass']}" in done.stdout


def test_memory(tmp_path: Path) -> None:
    few = ("--steps", 40, "--neurons", 2**16, "--rivals", "ours", "unbind", "spikingjelly-triton", "--out", tmp_path)
    written = result(run("memory.py", "--device", "cpu", *few), tmp_path, "memory-cpu", "memory-cpu")
    points = {point["name"]: point for point in written["points"]}
    assert {"ours", "unbind", "spikingjelly-triton"} <= points.keys()
    x = 40 * 2**16 * 4
    ours, loop = points["ours"], points["unbind"]
    assert ours["kept"] == ours["known"]["bytes"] * 40 * 2**16  # to the byte
    assert ours["kept_input"] == x < ours["kept"]  # 40 steps are more than K
    assert loop["kept_input"] == 0
    assert loop["kept"] > 2 * ours["kept"]
    for point in ours, loop:
        assert point["per_neuron_step"]["kept"] == point["kept"] / (x / 4)
        if point["growth"] is not None:
            assert point["growth"] == pytest.approx(point["kept"] - point["kept_input"] + point["spikes"], rel=0.2)
        assert point["peak"] is None or point["peak"] > point["growth"]
    if ours["peak"] is not None:  # the spikes, the gradient, and a state for each of two, of every neuron
        assert ours["peak"] == pytest.approx(2 * x + 2 * 2**16 * 4, rel=0.1)
    problem = rivals.RIVALS["spikingjelly-triton"].problem(torch.device("cpu"))
    assert problem == ("needs a CUDA GPU" if "spikingjelly" in INSTALLED else "No module named 'spikingjelly'")
    assert written["not_measured"] == {"float32 spikingjelly-triton": problem}


def test_neunorm(tmp_path: Path) -> None:
    done = run("neunorm.py", "--device", "cpu", "--quick", "--seconds", 0.05, "--out", tmp_path)
    written = result(done, tmp_path, "neunorm-cpu-quick", "neunorm-cpu-quick")
    points = written["points"]
    orders = ("contiguous", "channels_last")
    expected = [(5, order, name) for order in orders for name in ("fwd", "fwd+bwd")] * 2
    assert [(len(p["shape"]), p["order"], p["pass"]) for p in points] == expected
    for point in points:
        fused = point["times"]["NeuNormLIF"]["median"]
        assert point["ratios"]["LIFLayer + NeuNorm"] == point["times"]["LIFLayer + NeuNorm"]["median"] / fused
        assert point["ratios"]["eager loop + NeuNorm"] == point["times"]["eager loop + NeuNorm"]["median"] / fused
        assert point["moved_bytes"] == math.prod(point["shape"]) * (8 if point["pass"] == "fwd" else 20)
    worst = min(p["ratios"]["LIFLayer + NeuNorm"] for p in points if p["pass"] == "fwd+bwd")
    assert [met for target, met in written["targets"].items() if "each layer" in target] == [worst >= 2]


def test_neurons(tmp_path: Path) -> None:
    done = run("neurons.py", "--device", "cpu", "--quick", "--seconds", 0.01, "--out", tmp_path)
    written = result(done, tmp_path, "neurons-cpu-quick", "neurons-cpu-quick")
    assert [p["pass"] for p in written["points"]] == ["forward", "backward", "fwd+bwd"] * 2
    for point in written["points"]:
        for pair, ratio in point["ratios"].items():
            ours, theirs = pair.split(" / ")
            assert ratio == point["times"][theirs]["median"] / point["times"][ours]["median"]
    assert len(written["targets"]) == len(written["summary"]) == 6
    least = [met for target, met in written["targets"].items() if target.startswith("per channel")]
    assert least == [written["summary"]["per channel / plain"]["median"] >= 0.85]


# A benchmark that sends itself a SIGINT when it begins its third measurement.
INTERRUPTED = """
import os, runpy, signal, sys
import harness

measure, before = harness.measure, iter(range(2))
def measure_two(*arguments):
    if next(before, None) is None:
        os.kill(os.getpid(), signal.SIGINT)
    return measure(*arguments)

harness.measure = measure_two
harness.FEWEST_ROUNDS = harness.FEWEST_LONG_ROUNDS = 2
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--quick", "--seconds", "0.01", "--out", str(tmp_path)]
    command = [sys.executable, "-c", INTERRUPTED.replace("sys.argv[1]", repr(str(BENCH / "neunorm.py"))), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    line = next(line for line in done.stdout.splitlines(keepends=True) if "fwd+bwd" in line)
    assert [path.name for path in tmp_path.iterdir()] == ["neunorm-cpu-quick.unfinished.json"]
    kept = json.loads((tmp_path / "neunorm-cpu-quick.unfinished.json").read_text())
    assert kept["machine"]["torch"] == torch.__version__
    assert [point["pass"] for point in kept["points"]] == ["fwd", "fwd+bwd"]
    assert " x ".join(map(str, kept["points"][1]["shape"])) in line

    (tmp_path / "parts.tsv").write_text("build\tpassed\t3\nneunorm\tcut short after 1 s\t1\n")
    (tmp_path / "neunorm.log").write_text(line)
    text = report.summary(tmp_path)
    assert "| neunorm | cut short after 1 s | 1 |" in text
    assert line in text
    assert f".unfinished.json) has the {len(kept['points'])} points" in text


def test_overhead(tmp_path: Path) -> None:
    done = run("overhead.py", "--device", "cpu", "--seconds", 0.05, "--out", tmp_path)
    written = result(done, tmp_path, "overhead-cpu", "overhead-cpu")
    both, parts = written["times"]["forward and backward"], written["times"]["parts"]
    assert {"x * 2", "LIFLayer", "eager loop"} <= both.keys()
    assert {"operator, forward", "LIFLayer, forward"} <= parts.keys()
    assert all(seen["median"] > 0 for seen in (*both.values(), *parts.values()))
    target = written["target"]
    assert target["ratio"] == both["LIFLayer"]["median"] / both["x * 2 as an autograd.Function"]["median"]
    assert target["met"] == (target["ratio"] <= 1.5)
    assert f"at most 1.5 x x * 2 as an autograd.Function: {target['ratio']:.2f} x" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_kernels(tmp_path: Path, hasty_compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest instruction set and the widest."""
    monkeypatch.setenv("CXX", hasty_compiler)
    small = ("--dtypes", "float32", "--steps", 3, "--neurons", 1000, 40000, "--seconds", 0.01, "--out", tmp_path)
    written = result(run("kernels.py", *small, "--all-instruction-sets"), tmp_path, "kernels-cpu", "kernels-cpu")
    seen = [(p["instruction_set"], p["threads"], p["neurons"]) for p in written["points"]]
    assert seen[:2] == [("portable", 1, 1000), ("portable", 1, 40000)]
    assert seen[-1] == (written["machine"]["cpu_instruction_set"], torch.get_num_threads(), 40000)
    for point in written["points"]:
        times = {name: of["median"] for name, of in point["times"].items()}
        assert times["copy"] > 0
        assert point["of_a_copy"]["fwd"] == pytest.approx(times["copy"] / times["fwd"])
        assert point["of_a_copy"]["bwd"] == pytest.approx(1.5 * times["copy"] / times["bwd"])


def test_train_step(tmp_path: Path) -> None:
    """Alone: each rival would be another process."""
    few = ("--networks", "mlp", "--contestants", "ours", "--steps", 3, "--batch", 4, "--seconds", 0.02)
    done = run("train_step.py", "--device", "cpu", *few, "--malloc", "keep", "--out", tmp_path)
    (point,) = result(done, tmp_path, "train_step-cpu", "train_step-cpu")["points"]
    assert (point["name"], point["ratio"], point["malloc"]) == ("ours", 1, "keep")
    assert point["peak"] is None or point["peak"] > 0


def test_all_contestants_of_train_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which is faster."""
    monkeypatch.setattr(train_step.harness, "in_fresh_process", lambda function, *args: function(*args))
    few = ["--networks", "mnist-cnn", "--steps", "3", "--batch", "4", "--seconds", "0.02", "--malloc", "keep"]
    threads = str(torch.get_num_threads())
    options = ["--device", "cpu", "--threads", threads, *few, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *options])
    train_step.main()
    written = json.loads((tmp_path / "train_step-cpu.json").read_text())
    names = {"ours", "ours-channels-last", "loop"} | {"spikingjelly", "snntorch"} & set(INSTALLED)
    assert {point["name"] for point in written["points"]} == names
    for point in written["points"]:
        assert 0 <= point["neurons_share"] < 1
        assert point["different"]["rates"] <= train_step.RATES_MAY_DIFFER
        assert point["samples_per_second"] == pytest.approx(4 / point["median"])
        assert point["tf32"] is None  # there is none on a CPU
    assert len(written["targets"]) == len({"loop", "spikingjelly"} & names)


def test_contestants_are_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And timed as asked; afterwards all is as before."""

    def allowed() -> list[bool]:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    seen: dict[str, list[bool]] = {}

    def results(*of: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen["compared"] = allowed()
        return torch.ones(2), torch.ones(2)

    def measure(runs: dict[str, object], *of: object) -> dict[str, dict[str, float]]:
        seen["timed"] = allowed()
        return {name: {"median": 1.0} for name in runs}

    monkeypatch.setattr(train_step, "results", results)
    monkeypatch.setattr(train_step.harness, "measure", measure)
    network = dataclasses.replace(train_step.NETWORKS["mlp"], steps=2, batch=2)
    before = allowed()
    for tf32 in True, False:
        train_step.time_all(network, ["ours"], False, 0.0, "cpu", torch.get_num_threads(), tf32)
        assert seen == {"compared": [False, False], "timed": [tf32, tf32]}
        assert allowed() == before


@pytest.mark.parametrize("network", train_step.NETWORKS)
def test_every_network_is_that_of_the_paper(network: str) -> None:
    """Its parameters by the numbers, and a step that trains them."""
    parameters = {
        "mlp": 784 * 800 + 800 + 800 * 10 + 10,
        "mnist-cnn": 25 * 15 + 15 + 15 * 25 * 40 + 40 + 40 * 16 * 300 + 300 + 3000 + 10,
        "cifarnet": sum(9 * a * b + b for a, b in itertools.pairwise((3, 128, 256, 512, 1024, 512)))
        + (512 * 64 * 1024 + 1024)
        + (1024 * 512 + 512)
        + (512 * 100 + 100),
    }
    modules = train_step.NETWORKS[network].modules()
    assert sum(p.numel() for module in modules for p in module.parameters()) == parameters[network]


@pytest.mark.parametrize("network", train_step.SPEED)
def test_speed_networks_are_those_of_the_experiments(network: str) -> None:
    """The same strings stand in examples/experiments.py; the settings that time depends on, too."""
    speed, settings = train_step.SPEED[network], EXPERIMENTS[f"speed-{network}"].settings
    built = stbp_cuda.network(settings.network, input_shape=speed.input)
    counted = sum(p.numel() for module in speed.modules() for p in module.parameters())
    assert counted == sum(p.numel() for p in built.parameters())
    assert (speed.steps, speed.batch) == (settings.steps, settings.batch_size)
    assert (speed.decay, speed.v_threshold) == (settings.decay, settings.v_threshold)
    assert speed.direct == (settings.encoding == "direct")


@pytest.mark.parametrize("study", ["speed", "growth"])
def test_studies(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which is faster; and on a small network."""
    monkeypatch.setattr(train_step.harness, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setitem(
        train_step.SPEED, "nmnist-s", dataclasses.replace(train_step.SPEED["nmnist-s"], layers="4C3-P2-8C3-P2-8-100")
    )
    options = ["--device", "cpu", "--threads", torch.get_num_threads(), "--networks", "nmnist-s", "--quick"]
    options += ["--seconds", 0.01, "--out", tmp_path, "--study", study]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, options)])
    train_step.main()
    assert matplotlib.image.imread(tmp_path / f"train_step-{study}-cpu-quick.png").std() > 0.05
    written = json.loads((tmp_path / f"train_step-{study}-cpu-quick.json").read_text())
    assert {point["name"] for point in written["points"]} == {"ours", "loop"}
    if study == "speed":
        for point in written["points"]:
            assert point["seconds_per_epoch"] == pytest.approx(60_000 / point["batch"] * point["median"])
            assert point["reported_seconds_per_epoch"] == [22, 1030]
        return
    assert len(written["points"]) == 2 * (3 + 3 + 2)  # the network of batch 2 is that of width 1
    lines = {(line["of"], line["name"]): line for line in written["growth"]}
    for grows, least, most in ("steps", 1, 5), ("batch", 1, 5), ("width", 0.25, 1):
        for name in "ours", "loop":
            line = lines[grows, name]
            ends = {p[grows]: p["median"] for p in written["points"] if p["name"] == name and grows in p["grows"]}
            assert (line["from"], line["to"]) == (least, most)
            assert line["time"] == ends[most] / ends[least]


def test_train_step_sees_another_neuron() -> None:
    network = dataclasses.replace(train_step.NETWORKS["mlp"], steps=4, batch=3)
    x, y = train_step.data(network, torch.device("cpu"))
    state = train_step.weights(network, x)
    expected = train_step.results("ours", network, state, x, y)
    assert expected[0].max() > 0  # neurons fire
    train_step.check("loop", train_step.results("loop", network, state, x, y), expected)
    leakier = dataclasses.replace(network, decay=0.05)
    with pytest.raises(AssertionError, match=r"loop differs from ours in .* of the gradient"):
        train_step.check("loop", train_step.results("loop", leakier, state, x, y), expected)


@pytest.fixture
def interpreters(tmp_path: Path) -> list[Path]:
    """Two, in which a clock goes on with calls of layers alone: by 1 ms for each in the first, 1.1 in the second."""
    found = []
    for nanoseconds in 1_000_000, 1_100_000:
        folder = tmp_path / str(nanoseconds)
        package = shutil.copytree(Path(stbp_cuda.__file__).parent, folder / "stbp_cuda")
        with (package / "layers.py").open("a") as file:
            file.write(
                "\nimport time\n_now, _forward = [0], LIFLayer.forward\n"
                "time.perf_counter_ns, time.perf_counter = lambda: _now[0], lambda: _now[0] * 1e-9\n"
                "def _slower(self, x):\n"
                f"    _now[0] += {nanoseconds}\n"
                "    return _forward(self, x)\n"
                "LIFLayer.forward = _slower\n"
                "import __main__\n__main__.SHAPES = [(4, 4096)]\n"  # of compare.py: larger ones would tell no more
            )
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}:$PYTHONPATH exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        found.append(python)
    return found


def test_compare(interpreters: list[Path]) -> None:
    done = run("compare.py", *interpreters, "--rounds", 3, "--seconds", 0.01)
    assert done.returncode == 1, done.stderr[-5000:]
    assert "B is slower than A by more than 5 %" in done.stdout
    assert re.search(r"^all +1\.100 +1\.100-1\.100 +B is slower$", done.stdout, re.MULTILINE)


def test_compare_judges_by_the_interval() -> None:
    generator = random.Random(0)

    def rounds(ratio: float, noise: float, count: int = 8) -> list[tuple[dict[str, float], dict[str, float]]]:
        cases = ("a", "b", "c")
        return [
            (dict.fromkeys(cases, 1.0), {case: ratio * generator.gauss(1, noise) for case in cases})
            for _ in range(count)
        ]

    assert compare.judge(rounds(1.10, 0.01), 1.05)[1]
    assert not compare.judge(rounds(1.00, 0.01), 1.05)[1]
    assert not compare.judge(rounds(1.04, 0.005), 1.05)[1]
    assert not compare.judge(rounds(1.07, 0.2), 1.05)[1]  # it may be noise
    one = [(a, {**b, "b": 1.5}) for a, b in rounds(1.0, 0.01)]
    lines, slower = compare.judge(one, 1.05)
    assert slower
    assert "B is slower" in next(line for line in lines if line.startswith("b "))


def test_the_pages_hold_the_figures_of_the_results() -> None:
    done = run("report.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("speed.py", ["--steps", "0"], "--steps: must be a positive number, got '0'"),
        ("speed.py", ["--seconds", "inf"], "--seconds: must be a positive number, got 'inf'"),
        ("speed.py", ["--device", "abacus"], "abacus"),
        ("speed.py", ["--rivals", "brian"], "brian"),
        ("speed.py", ["--steps", 10**6, "--neurons", 10**6, "--device", "cpu"], "no point is left to measure"),
        ("memory.py", ["--neurons", "many"], "--neurons: must be a positive number, got 'many'"),
        ("memory.py", ["--device", "meta:1"], "meta"),
        ("overhead.py", ["--neurons", "0"], "--neurons: must be a positive number, got '0'"),
        ("kernels.py", ["--dtypes", "int8"], "int8"),
        ("train_step.py", ["--networks", "resnet"], "resnet"),
        ("train_step.py", ["--device", "cpu", "--tf32", "on"], "--tf32 is for a GPU"),
        ("train_step.py", ["--batch", "-1"], "--batch: must be a positive number, got '-1'"),
        ("train_step.py", ["--study", "speed", "--networks", "mlp"], "--study speed has nmnist-s, "),
        ("train_step.py", ["--study", "growth", "--networks", "mlp", "cifarnet"], "--study growth has one network"),
        ("train_step.py", ["--study", "growth", "--malloc", "keep", "default"], "a study has one setting"),
        ("memory.py", ["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_arguments(
    script: str,
    arguments: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(script.removesuffix(".py")).main()
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-commit", "HEAD"], "'no-such-commit' is neither a commit of this repository nor an environment"),
        (["/bin/false", "HEAD"], "'/bin/false' has no stbp_cuda that can be imported"),
        (["HEAD", "HEAD", "--rounds", "1"], "--rounds must be at least 3"),
    ],
)
def test_bad_arguments_of_compare(arguments: list[str], message: str) -> None:
    done = run("compare.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
