"""Writes the figures of bench/results/ into README.md and docs/performance.md, so that nobody copies them by hand.

python bench/report.py            rewrites every block between <!-- figures: NAME --> and <!-- end -->
python bench/report.py --check    only says whether they are what the results hold
python bench/report.py --summary FOLDER
                                  writes FOLDER/summary.md from the results there, as scripts/gpu_check.sh leaves them
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


class NotMeasuredError(Exception):
    """There is no result yet."""


@dataclass
class Source:
    """Where results are, and of which devices; of several the first is taken."""

    folder: Path = RESULTS
    devices: tuple[str, ...] = ("cpu", "cuda")


source = Source()


def load(name: str) -> dict[str, Any]:
    for device in source.devices:
        path = source.folder / f"{name}-{device}.json"
        if path.exists():
            return json.loads(path.read_text())
    script, *study = name.split("-")
    raise NotMeasuredError(f"Not measured yet: `python bench/{' --study '.join([f'{script}.py', *study])}`.")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def about(machine: dict[str, Any]) -> str:
    text = f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_instruction_set']}"
    if machine["gpu"]:
        text = f"{machine['gpu']}, driver {machine['driver']}"
    return f"On {text}; torch {machine['torch']}, {machine['date'][:10]}.\n\n"


def times(number: float) -> str:
    return f"{number:.2f} x" if number < 10 else f"{number:.1f} x"


def targets(found: dict[str, bool | None]) -> str:
    words = {True: "met", False: "**not met**", None: "not known"}
    return "".join(f"- {words[met]}: {target}\n" for target, met in found.items())


def speed() -> str:
    result = load("speed")
    rows = []
    for name, seen in result["summary"]["against"].items():
        if name == "clone" or not seen:
            continue
        below = "; ".join(seen["below_at"]) or "nowhere"
        rows.append(
            [
                result["rivals"][name]["label"],
                times(seen["median"]),
                times(seen["medians"]["float32 fwd"]),
                times(seen["worst"]),
                seen["worst_at"],
                below,
            ]
        )
    head = ["stbp_cuda is, against", "training, median", "inference fp32, median", "worst", "at", "slower at"]
    return about(result["machine"]) + table(head, rows)


def speed_targets() -> str:
    return targets(load("speed")["summary"]["targets"])


def train_step() -> str:
    result = load("train_step")
    rows = []
    for point in result["points"]:
        rows.append(
            [
                f"{point['network']}, T {point['steps']}, batch {point['batch']}",
                point["label"],
                "keeps" if point["malloc"] == "keep" else "default",
                f"{1e3 * point['median']:,.0f}",
                f"{point['neurons_share']:.0%}",
                times(point["ratio"]),
                mebibytes(point["peak"]),
            ]
        )
    head = ["network", "", "malloc", "ms a step", "of it neurons", "of ours", "peak MiB"]
    return about(result["machine"]) + table(head, rows)


def train_step_targets() -> str:
    lines = ""
    for target, seen in load("train_step")["targets"].items():
        word = "met" if seen["met"] else "**not met**"
        lines += f"- {word}: {target}, both with malloc told to keep its memory: {seen['ratio']:.2f} x"
        lines += f" ({seen['to_its_default']:.2f} x if only ours is)\n" if seen["to_its_default"] else "\n"
    return lines


def pairs(points: list[dict[str, Any]], key: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Ours and the per-step loop's, of all points with the same ``key``."""
    loops = {point[key]: point for point in points if point["name"] == "loop"}
    return [(point, loops[point[key]]) for point in points if point["name"] == "ours" and point[key] in loops]


def mebibytes(peak: int | None) -> str:
    return f"{peak / 2**20:,.0f}" if peak else "not known"


def train_step_speed() -> str:
    result = load("train_step-speed")
    rows = []
    for ours, loop in pairs(result["points"], "network"):
        data_set, size = ours["network"].split("-")
        of_paper = " and ".join(f"{seconds:,g}" for seconds in ours["reported_seconds_per_epoch"])
        rows.append(
            [
                f"{data_set} {size.upper()}, T {ours['steps']}, batch {ours['batch']}",
                *(f"{point['seconds_per_epoch']:,.0f}" for point in (ours, loop)),
                times(loop["ratio"]),
                *(mebibytes(point["peak"]) for point in (ours, loop)),
                of_paper,
            ]
        )
    head = ["network", "s an epoch", "the loop's", "of ours", "peak MiB", "the loop's", "paper: PyTorch and MATLAB"]
    return about(result["machine"]) + table(head, rows)


def train_step_growth() -> str:
    result = load("train_step-growth")
    rows = []
    for ours, loop in pairs(result["growth"], "of"):
        what = {"steps": "T", "batch": "the batch", "width": "the width"}[ours["of"]]
        factors = [times(line["time"]) for line in (ours, loop)]
        factors += [times(line["peak"]) if line["peak"] else "not known" for line in (ours, loop)]
        rows.append([f"{what} from {ours['from']:g} to {ours['to']:g}", times(ours["to"] / ours["from"]), *factors])
    return about(result["machine"]) + table(["", "grows", "time", "the loop's", "peak", "the loop's"], rows)


def neunorm() -> str:
    result = load("neunorm")
    rows = []
    for point in result["points"]:
        every = math.prod(point["shape"])
        rows.append(
            [
                " x ".join(map(str, point["shape"])),
                point["dtype"],
                point["pass"],
                f"{1e9 * point['times']['NeuNormLIF']['median'] / every:.2f}",
                *(times(ratio) for ratio in point["ratios"].values()),
                f"{point['of_a_copy']:.0%}",
            ]
        )
    head = ["T x B x C x H x W", "", "", "ns for each neuron and step", *result["points"][0]["ratios"], "of a copy"]
    return about(result["machine"]) + table(head, rows)


def neunorm_targets() -> str:
    return targets(load("neunorm")["targets"])


def memory() -> str:
    result = load("memory")
    rows = []
    for point in result["points"]:
        of, known = point["per_neuron_step"], point["known"]
        measured = [f"{of[key]:.2f}" if of.get(key) is not None else "" for key in ("kept", "kept_input", "peak")]
        rows.append([point["label"], *measured, f"{known['bytes']:.2f}, {known['what']}" if known else ""])
    head = ["bytes for each neuron and step, fp32", "kept", "of it x itself", "peak", "kept by design"]
    return about(result["machine"]) + table(head, rows)


def overhead() -> str:
    result = load("overhead")
    rows = []
    for title, seen in result["times"].items():
        rows.append([f"*{title}*", ""])
        rows += [[name, f"{value['microseconds']:.1f}"] for name, value in seen.items()]
    return about(result["machine"]) + table(["us of the host", ""], rows)


def kernels() -> str:
    result = load("kernels")
    rows = []
    for name, seen in result["summary"].items():
        share, gain = seen["of_a_copy"], seen["gain_of_all_threads"]
        rows.append(
            [
                name,
                f"{share['median']:.0%}",
                f"{share['worst']:.0%}",
                f"{seen['met_at']} of {seen['points']}",
                times(gain) if gain else "",
            ]
        )
    head = ["", "of a copy, median", "worst", "at least 80 % at", "all threads against one"]
    return about(result["machine"]) + table(head, rows)


def compiled() -> str:
    result = load("model")
    architectures = list(dict.fromkeys(kernel["architecture"] for kernel in result["kernels"]))
    cells: dict[tuple[str, str, int], dict[str, list[tuple[int, int]]]] = {}
    for kernel in result["kernels"]:
        row = cells.setdefault((kernel["name"], kernel["scalar"], kernel["width"]), {})
        row.setdefault(kernel["architecture"], []).append((kernel["registers"], kernel["resident_threads"]))
    rows = []
    for (name, scalar, width), row in cells.items():
        # The worst of all surrogates.
        worst = [(max(n for n, _ in row[key]), min(n for _, n in row[key])) for key in architectures]
        rows.append([f"{name}, {scalar}", str(width), *(f"{registers} / {threads}" for registers, threads in worst)])
    spilled = sum(kernel["spilled"] + kernel["stack"] for kernel in result["kernels"])
    text = f"nvcc {result['nvcc']}, {len(result['kernels'])} kernels, {spilled} bytes spilled or on a stack in all. "
    each = ", ".join(f"{scalar} {seconds:.0f}" for scalar, seconds in result["compile_seconds"].items())
    text += f"To compile and read them takes, for each architecture, {each} s of one core. "
    fewest: dict[str, int] = {}
    for kernel in result["kernels"]:
        if (threads := kernel["resident_threads_holding"]) < kernel["resident_threads"]:
            fewest[kernel["architecture"]] = min(threads, fewest.get(kernel["architecture"], threads))
    of_each = ", ".join(f"{threads} on sm_{key}" for key, threads in fewest.items())
    text += f"With 64 KB of gradients in shared memory, neunorm_backward has fewer threads: {of_each}.\n\n"
    return text + table(["registers / threads at once", "width", *(f"sm_{key}" for key in architectures)], rows)


def model() -> str:
    rows = []
    for point in load("model")["model"]:
        under_way, needed = point["under_way_per_processor"], point["needed_under_way"]
        rows.append(
            [
                f"{point['gpu']}, {point['scalar']} {point['kernel']}",
                f"{point['bytes_per_neuron_step']:.2f}",
                f"{under_way / 1024:.0f} of {needed / 1024:.0f}",
                f"{point['instructions_per_neuron_step']:.1f}",
                f"{point['limits']['latency']:.0%}",
                f"{point['limits']['instructions']:.0%}",
                f"{point['fraction']:.0%}, {point['limited_by']}",
            ]
        )
    head = ["", "bytes", "KB under way of needed", "instructions", "latency allows", "instructions allow", "predicted"]
    return table(head, rows)


FIGURES: dict[str, Callable[[], str]] = {
    figure.__name__: figure
    for figure in (
        *(speed, speed_targets, train_step, train_step_targets, memory, overhead, kernels),
        *(train_step_speed, train_step_growth, neunorm, neunorm_targets, compiled, model),
    )
}


def summary(folder: Path) -> str:
    """All figures of a folder, after what scripts/gpu_check.sh says of its parts."""
    text = f"# {folder.name}\n"
    parts = folder / "parts.tsv"
    if parts.exists():
        rows = [line.split("\t") for line in parts.read_text().splitlines()]
        text += "\n" + table(["part of scripts/gpu_check.sh", "", "s"], rows)
        for part, state, _ in rows:
            log = folder / f"{part}.log"
            if state != "passed" and log.exists():
                last = "\n".join(log.read_text().splitlines()[-40:])
                text += f"\n## {part}, {state}: the end of {log.name}\n\n```\n{last}\n```\n"
    for unfinished in sorted(folder.glob("*.unfinished.json")):
        count = len(json.loads(unfinished.read_text())["points"])
        text += f"\n[{unfinished.name}]({unfinished.name}) has the {count} points that were measured before the end.\n"
    for name, figure in FIGURES.items():
        with contextlib.suppress(NotMeasuredError):
            text += f"\n## {name}\n\n{figure()}"
    for picture in sorted(folder.glob("*.png")):
        text += f"\n![{picture.stem}]({picture.name})\n"
    return text


def block(found: re.Match[str]) -> str:
    try:
        text = FIGURES[found[2]]()
    except NotMeasuredError as error:
        text = str(error)
    return found[1] + text.rstrip("\n") + "\n" + found[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page holds other figures")
    parser.add_argument("--summary", type=Path, metavar="FOLDER", help="write FOLDER/summary.md, and nothing else")
    args = parser.parse_args()
    if args.summary:
        source.folder, source.devices = args.summary, ("cuda", "cuda-quick", "cpu", "cpu-quick")
        page = args.summary / "summary.md"
        page.write_text(summary(args.summary))
        print(page)
        return
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = BLOCK.sub(block, before)
        if after != before:
            stale.append(page.name)
            if not args.check:
                page.write_text(after)
    if args.check and stale:
        sys.exit(f"{', '.join(stale)} hold other figures than bench/results/: run `python bench/report.py`")


if __name__ == "__main__":
    main()
