"""The benchmark runs, and tells what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

SPEED = Path(__file__).parent.parent / "bench" / "speed.py"


def test_speed(tmp_path: Path) -> None:
    small = ("--device", "cpu", "--dtypes", "float32", "bfloat16", "--steps", "3", "--neurons", "1000", "40000")
    command = [sys.executable, str(SPEED), *small, "--seconds", "0.05", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert matplotlib.image.imread(tmp_path / "speed-cpu.png").std() > 0.05
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert {"date", "cpu", "torch", "cpu_instruction_set"} <= result["machine"].keys()
    assert [(p["dtype"], p["steps"], p["neurons"], p["pass"]) for p in result["points"]] == [
        (dtype, 3, neurons, part)
        for dtype in ("float32", "bfloat16")
        for neurons in (1000, 40000)
        for part in ("fwd", "fwd+bwd")
    ]
    for point in result["points"]:
        times = point["times"]
        assert times.keys() == {"ours", "eager", "unbind", "compile", "copy"}
        assert "failed" not in times["compile"]
        for rival, ratio in point["ratios"].items():
            assert ratio == pytest.approx(times[rival]["median"] / times["ours"]["median"])
        size = {"float32": 4, "bfloat16": 2}[point["dtype"]]
        assert point["moved_bytes"] == 3 * point["neurons"] * size * (2 if point["pass"] == "fwd" else 4)
        assert point["gb_per_s"] == pytest.approx(point["moved_bytes"] / times["ours"]["median"] / 1e9)
        assert f"{point['dtype']:<9}{3:>4}{point['neurons']:>11,}  {point['pass']}" in done.stdout
    assert result["summary"]["targets"].keys()
    assert "torch.compile" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps, --neurons, --seconds and --threads must be positive"),
        (["--device", "abacus"], "abacus"),
        (["--steps", "1000000", "--neurons", "1000000", "--device", "cpu"], "no point is left to measure"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SPEED), *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
