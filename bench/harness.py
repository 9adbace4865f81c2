"""What every benchmark here shares: its common options, timing, memory, the machine's description, and files.

All figures come from here, so that they are taken alike: contestants in turns, on random input, after a warm-up, as
medians with quartiles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from malloc import KEEP

import stbp_cuda
from stbp_cuda.ops import fused_backend_problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = TypeVar("Result")
Number = TypeVar("Number", int, float)

PACKAGES = ("triton", "spikingjelly", "snntorch", "norse")  # beside torch and stbp_cuda, what a result depends on
SHORTEST_SAMPLE = 1e-3  # seconds; faster calls are timed several at once
LONG = 0.5  # seconds; a call as long as this leaves caches and allocator in its own way before it is half done
FEWEST_ROUNDS, FEWEST_LONG_ROUNDS = 5, 3


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """The type of an option of argparse that is a positive, finite number."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            number = kind(text)
            if 0 < number < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")

    return parse


def add_arguments(parser: argparse.ArgumentParser, seconds: float | None = 1.0, quick_seconds: float = 0.2) -> None:
    """The options of every benchmark; ``seconds`` are for each measurement, None where there is no such option."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=positive(int), help="of the CPU; default torch's own choice")
    if seconds is not None:
        text = f"for each measurement; default {seconds:g}, with --quick {quick_seconds:g}"
        add("--seconds", type=positive(float), help=text)
    add("--quick", action="store_true", help="less of it; writes files named ...-quick")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="folder; default bench/results")
    parser.set_defaults(default_seconds=(seconds, quick_seconds))


def prepare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """Set all up as ``args`` say, or end with a message that says what is wrong with them."""
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device).item()
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        parser.error(str(error).partition("\n")[0])
    if problem := fused_backend_problem(device):
        parser.error(f"there is nothing to measure on {device}: {problem}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if getattr(args, "seconds", ...) is None:
        args.seconds = args.default_seconds[args.quick]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe shows each line of a table as it comes, too
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call: by the clock on the CPU, by device events on a GPU."""
    synchronize(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def page_faults() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(runs: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, dict[str, Any]]:
    """Time all contestants turn by turn, so that a machine that slows down slows them all.

    Takes ``seconds``, and longer only for at least 5 rounds, or 3 where 5 take more than 5 times as long.

    Returns:
        For each contestant, the "median" and the "quartiles" in seconds per call, over so many "samples" of so many
        "calls" each; and the page "faults" of a call, as the median.
    """
    gc.collect()
    gc.disable()  # else the garbage of one is collected at the cost of another
    try:
        calls, long = {}, set()
        for name, run in runs.items():
            run()  # warm-up
            first = sample(run, 1, device)
            calls[name] = math.ceil(SHORTEST_SAMPLE / min(SHORTEST_SAMPLE, first))
            if first > LONG:
                long.add(name)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        faults: dict[str, list[float]] = {name: [] for name in runs}
        order, shuffle = list(runs), random.Random(0).shuffle
        start = time.perf_counter()
        for done in itertools.count():
            elapsed = time.perf_counter() - start
            if done >= (FEWEST_LONG_ROUNDS if elapsed > 5 * seconds else FEWEST_ROUNDS) and elapsed > seconds:
                break
            shuffle(order)  # nobody always follows the same other
            for name in order:
                if name not in long:
                    runs[name]()  # caches and allocator as this contestant leaves them, not as another one did
                before = page_faults()
                samples[name].append(sample(runs[name], calls[name], device))
                faults[name].append((page_faults() - before) / calls[name])
    finally:
        gc.enable()
    times = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        times[name] = {"median": median, "quartiles": [low, high], "samples": len(values), "calls": calls[name]}
        times[name]["faults"] = statistics.median(faults[name])
    return times


def resident_memory(field: str = "VmRSS") -> int | None:
    """Bytes of this process that are in memory now, or with "VmHWM" were at most; None where Linux's /proc is not."""
    try:
        return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    except OSError:
        return None


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; infinity where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    except OSError:
        return math.inf


def memory_in_use(device: torch.device) -> int | None:
    """Bytes of torch's allocator on a GPU, of this process on the CPU; None where that cannot be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return resident_memory()


def release_free_memory() -> None:
    """Give back what the C library keeps of freed memory, else it could be used again without being seen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """How many bytes more than before were in use at most while ``step`` ran once; None where that cannot be known.

    On a GPU these are the bytes of torch's allocator, as it counts them. On the CPU it is the growth of the process as
    the kernel sees it (Linux only), which holds for any allocator, but knows pages, not tensors, and counts within some
    hundred kilobytes: make the tensors large. Call it in a process of its own (:func:`in_fork`,
    :func:`in_fresh_process`), where nothing that was used before lies ready to be used again, after the step ran on
    small tensors, so that what is loaded or started only once is not counted.
    """
    release_free_memory()
    before = memory_in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        except OSError:
            return None
    step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory("VmHWM")
    return None if before is None or peak is None else peak - before


def in_fresh_process(function: Callable[..., Result], *args: object) -> Result:
    """``function(*args)`` in a new Python: a function of a module, its arguments and result picklable."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *args).result()


def in_fork(function: Callable[..., Result], *args: object) -> Result:
    """``function(*args)`` in a copy of this process, which has imported everything; its result picklable. No copy finds
    what another has freed. This process must not have computed anything in parallel before: a copy lacks the threads
    for that, and would wait for them forever."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return in_fresh_process(function, *args)
    with (
        warnings.catch_warnings(),
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool,
    ):
        # Python >= 3.12 warns of every thread; the only one here is OpenBLAS's, which knows of forks.
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def no_compile_cache() -> Iterator[None]:
    """``torch.compile`` compiles for real, whatever ran before."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and what runs on it."""
    cpu, gpu, driver = platform.processor() or platform.machine(), None, None
    with contextlib.suppress(OSError):
        cpu = (re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=7", "HEAD"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    load = os.getloadavg() if hasattr(os, "getloadavg") else None  # by others, at the start
    malloc = {name: os.environ[name] for name in (*KEEP, "LD_PRELOAD") if name in os.environ}
    here = {
        "commit": commit,
        "date": date,
        "malloc": malloc,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load,
    }
    versions = {package: version(package) for package in PACKAGES}
    return {**here, "gpu": gpu, "driver": driver, **stbp_cuda.build_info(), **versions}


def where(machine: dict[str, Any]) -> str:
    """What :func:`describe` found, for the title of a picture."""
    cpu = f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_instruction_set']}"
    return f"{machine['gpu'] or cpu} (torch {machine['torch']})"


class Points(list[dict[str, Any]]):
    """What a benchmark has measured so far. Each point is also kept in NAME.unfinished.json of the folder, as it comes:
    a run that is cut short leaves that file, and one that gets to its end takes it away."""

    def __init__(self, folder: Path, name: str, machine: dict[str, Any]) -> None:
        self.path = folder / f"{name}.unfinished.json"
        self.machine = machine
        self.path.unlink(missing_ok=True)

    def append(self, point: dict[str, Any]) -> None:
        super().append(point)
        replace(self.path, encoded({"machine": self.machine, "points": self}))

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


def replace(path: Path, data: bytes) -> None:
    """All or nothing: an interrupted run leaves the file of the one before."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def write(path: Path, data: bytes) -> None:
    replace(path, data)
    print(path)


def encoded(result: dict[str, Any]) -> bytes:
    """JSON with an entry a line; an entry that is a list or a dictionary of others has a line for each of these."""

    def entry(value: object) -> str:
        values: list[object] = (
            list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        if not any(isinstance(inner, dict) for inner in values):
            return json.dumps(value)
        if isinstance(value, dict):
            inner = [f"{json.dumps(key)}: {json.dumps(of)}" for key, of in value.items()]
            return "{\n  " + ",\n  ".join(inner) + "\n }"
        return "[\n  " + ",\n  ".join(map(json.dumps, values)) + "\n ]"

    entries = [f"{json.dumps(key)}: {entry(value)}" for key, value in result.items()]
    return ("{\n " + ",\n ".join(entries) + "\n}\n").encode()


def write_json(path: Path, result: dict[str, Any]) -> None:
    write(path, encoded(result))


def save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."))
    write(path, image.getvalue())
