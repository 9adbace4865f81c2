"""Whether one version of stbp_cuda is slower than another.

    python bench/compare.py HEAD~5 HEAD                    two commits of this repository
    python bench/compare.py ../old/.venv ../new/.venv      two environments (or interpreters) in which it is installed
    python bench/compare.py --help                         everything else

A and B run in turns (A B, B A, A B, ...), each time in a fresh process that times one layer, forward and forward +
backward, in a few shapes and dtypes; only LIFLayer is used, so that old versions can be compared, too. Prints for each
case and for all of them the ratio of B's time to A's, as the geometric mean over the rounds with a confidence interval
(bootstrap over the rounds).

Exit status 1 if B is slower by more than the threshold, 5 % by default: if the interval of all cases, at 95 %, or that
of any single case lies wholly above it. Single cases get wider intervals, at 95 % for all of them together
(Bonferroni).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import malloc

ROOT = Path(__file__).parent.parent
SHAPES = ((4, 4096), (16, 65536), (16, 2**20))
DTYPES = ("float32", "bfloat16")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Version:
    """An interpreter that finds a version of stbp_cuda."""

    label: str
    python: str
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        with tempfile.TemporaryDirectory() as elsewhere:  # not where Python would find the sources
            return subprocess.run(
                [self.python, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
            )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def install(commit: str, folder: Path) -> Version:
    """Build a commit of this repository into a folder."""
    archive = folder / "source.tar"
    with archive.open("wb") as file:
        subprocess.run(["git", "-C", str(ROOT), "archive", commit], stdout=file, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "source", filter="data")
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    gpu = shutil.which("nvidia-smi") is not None
    environment = {"STBP_CUDA_BUILD": "1" if gpu else "0", **os.environ}
    done = subprocess.run(
        [*pip, "--target", str(target), str(folder / "source")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"commit {commit} cannot be built:\n{done.stderr[-3000:]}")
    return Version(commit[:12], sys.executable, {"PYTHONPATH": str(target)})


def resolve(parser: argparse.ArgumentParser, given: str, folder: Path) -> Version:
    """The version that an argument names."""
    path = Path(given)
    python = path / "bin" / "python" if path.is_dir() else path
    if python.is_file() and os.access(python, os.X_OK):
        version = Version(given, str(python.absolute()))
    else:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{given}^{{commit}}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            parser.error(f"{given!r} is neither a commit of this repository nor an environment or interpreter")
        version = install(found.stdout.strip(), folder)
    done = version.run("-c", "import stbp_cuda; print(stbp_cuda.__file__)")
    if done.returncode:
        parser.error(f"{given!r} has no stbp_cuda that can be imported: {last_line(done.stderr)}")
    return version


def work(seconds: float) -> None:
    """In the process of a version: times all cases and prints them as JSON."""
    import harness
    import torch

    import stbp_cuda

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = {}
    for dtype, (steps, neurons) in itertools.product(DTYPES, SHAPES):
        number = getattr(torch, dtype)
        x, grad = (torch.randn(steps, neurons, device=device).to(number) for _ in range(2))
        layer = stbp_cuda.LIFLayer(0.5, 0.75)
        leaf = x.clone().requires_grad_()

        def training(layer: Any = layer, leaf: Any = leaf, grad: Any = grad) -> None:
            leaf.grad = None
            layer(leaf).backward(grad)

        def inference(layer: Any = layer, x: Any = x) -> None:
            with torch.no_grad():
                layer(x)

        for name, run in ("fwd", inference), ("fwd+bwd", training):
            case = f"{dtype} {steps} x {neurons:,} {name}"
            times[case] = harness.measure({case: run}, seconds, device)[case]["median"]
    print(json.dumps(times))


def interval(logs: list[float], confidence: float) -> tuple[float, float]:
    """Of the mean: its quantiles over samples of the same size, drawn from these with replacement."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return means[int(tail * RESAMPLES)], means[min(RESAMPLES - 1, int((1 - tail) * RESAMPLES))]


def judge(rounds: list[tuple[dict[str, float], dict[str, float]]], threshold: float) -> tuple[list[str], bool]:
    """The table, and whether B is slower than A by more than the threshold (1.05: by 5 %)."""
    logs = {case: [math.log(b[case] / a[case]) for a, b in rounds] for case in rounds[0][0]}
    every = [statistics.fmean(values) for values in zip(*logs.values(), strict=True)]
    rows = [(case, values, 1 - 0.05 / len(logs)) for case, values in logs.items()]
    lines, slower = [f"{'case':<36}{'B / A':>8}   interval"], False
    for case, values, confidence in [*rows, ("all", every, 0.95)]:
        low, high = (math.exp(end) for end in interval(values, confidence))
        too_slow = low > threshold
        slower |= too_slow
        text = f"{case:<36}{math.exp(statistics.fmean(values)):>8.3f}   {low:.3f}-{high:.3f}"
        lines.append(text + ("   B is slower" if too_slow else ""))
    return lines, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("a", metavar="A", help="a commit, an interpreter, or the folder of a virtual environment")
    add("b", metavar="B", help="what may not be slower")
    add("--rounds", type=int, default=10, help="each runs both; default 10, at least 3")
    add("--seconds", type=float, default=0.1, help="for each case in each round; default 0.1")
    add("--threshold", type=float, default=5, metavar="PERCENT", help="default 5")
    malloc.add_option(parser)
    args = parser.parse_args()
    if args.rounds < 3 or not 0 < args.seconds < math.inf or not 0 <= args.threshold < math.inf:
        parser.error("--rounds must be at least 3, --seconds positive, --threshold not negative")
    os.environ.update(malloc.MALLOC[args.malloc])  # for all processes that are started
    from tqdm import tqdm  # an environment that is compared may lack it

    with tempfile.TemporaryDirectory() as folder:
        versions = []
        for name, given in tqdm(list(zip("ab", (args.a, args.b), strict=True)), desc="preparing", disable=None):
            (Path(folder) / name).mkdir()
            versions.append(resolve(parser, given, Path(folder) / name))
        print(f"A: {versions[0].label}\nB: {versions[1].label}")
        rounds = []
        for number in tqdm(range(args.rounds), desc="rounds", disable=None):
            times: list[dict[str, float]] = [{}, {}]
            for i in (0, 1) if number % 2 == 0 else (1, 0):
                # As a worker, this file finds harness.py beside it, and the stbp_cuda of the interpreter.
                done = versions[i].run(str(Path(__file__).absolute()), "--work", str(args.seconds))
                if done.returncode:
                    sys.exit(f"{versions[i].label} cannot be measured: {last_line(done.stderr)}")
                times[i] = json.loads(last_line(done.stdout))
            rounds.append((times[0], times[1]))
    lines, slower = judge(rounds, 1 + args.threshold / 100)
    print("\n".join(lines))
    print(f"B is {'slower' if slower else 'not slower'} than A by more than {args.threshold:g} %")
    sys.exit(slower)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(float(sys.argv[2]))
    else:
        main()
