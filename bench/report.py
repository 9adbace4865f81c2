"""Writes the figures of bench/results/ into README.md and docs/performance.md, so that nobody copies them by hand.

python bench/report.py            rewrites every block between <!-- figures: NAME --> and <!-- end -->
python bench/report.py --check    only says whether they are what the results hold
python bench/report.py --picture  draws bench/results/h200-b287b56.png, too
python bench/report.py --summary FOLDER
                                  writes FOLDER/summary.md from the results there, as scripts/gpu_check.sh leaves them
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
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
    if machine.get("malloc"):
        text += ", malloc told to keep memory"
    at = f" at {machine['commit']}" if machine.get("commit") else ""
    return f"On {text}; torch {machine['torch']}. Measured{at} on {machine['date'][:10]}.\n\n"


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
        setting = "malloc keeps" if point["malloc"] == "keep" else ""
        if point.get("tf32") is not None:
            setting = "TF32" if point["tf32"] else "no TF32"
        rows.append(
            [
                f"{point['network']}, T {point['steps']}, batch {point['batch']}",
                point["label"],
                setting,
                f"{1e3 * point['median']:,.0f}",
                f"{point['neurons_share']:.0%}",
                times(point["ratio"]),
                mebibytes(point["peak"]),
            ]
        )
    head = ["network", "", "setting", "ms a step", "of it neurons", "of ours", "peak MiB"]
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
                ", ".join([point["dtype"], *([point["order"]] if "order" in point else [])]),
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


def neurons() -> str:
    result = load("neurons")
    rows = []
    for point in result["points"]:
        shape = " x ".join(map(str, point["shape"]))
        for pair, ratio in point["ratios"].items():
            rows.append([pair, point["pass"], shape, point["dtype"], times(ratio)])
    rows.sort(key=lambda row: list(result["summary"]).index(row[0]))
    head = ["compared", "pass", "T x B x C x H x W", "", "times as fast"]
    return about(result["machine"]) + table(head, rows)


def neurons_targets() -> str:
    return targets(load("neurons")["targets"])


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
    target = result["target"]
    word = "met" if target["met"] else "**not met**"
    text = (
        f"- {word}: LIFLayer takes at most {target['most']:g} x as long as x * 2 as an autograd.Function, forward and "
    )
    text += f"backward: {target['ratio']:.2f} x\n"
    return about(result["machine"]) + text + "\n" + table(["us of the host", ""], rows)


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
    result = load("compiled")
    others = ("kernel", "dtype", "compiled", "local_bytes", "registers", "warps", "bytes_under_way")
    parameters = list(dict.fromkeys(key for row in result["kernels"] for key in row if key not in others))
    architectures = sorted({key for row in result["kernels"] for key in row["registers"]}, key=int)
    rows = []
    for row in result["kernels"]:
        cells = [f"{row['registers'][key]} / {row['warps'][key]}" for key in architectures]
        rows.append([f"{row['kernel']}, {row['dtype']}", *(str(row.get(key, "")) for key in parameters), *cells])
    local = max(row["local_bytes"] for row in result["kernels"])
    count = sum(row["compiled"] for row in result["kernels"])
    text = f"nvcc {result['nvcc']}, {result['date'][:10]}: {count} kernels, the worst with {local} bytes spilled or "
    text += "on a stack.\n\n"
    return text + table(["registers / warps", *parameters, *(f"sm_{key}" for key in architectures)], rows)


def instructions() -> str:
    """Of the LIF kernels that move packs, beside those of b287b56, which had one kernel for every T."""
    result = load("compiled")
    kernels = {(r["kernel"], r["dtype"], r.get("rows"), r["width"]): r for r in result["kernels"] if "width" in r}
    before = {
        (r["kernel"], r["dtype"]): r for r in json.loads((RESULTS / "compiled-b287b56.json").read_text())["points"]
    }
    rows = []
    for row in result["instructions"]:
        of = kernels[row["kernel"], row["dtype"], row.get("rows"), row["width"]]
        old = before[row["kernel"].removesuffix("_rows"), row["dtype"]]
        cells = [f"{old['registers']}, {of['registers']['90']}", f"{old['warps']}, {of['warps']['90']}"]
        cells += [f"{old['bytes_under_way'] / 1024:.0f}, {of['bytes_under_way']['90'] / 1024:.0f}"]
        found = (
            row["instructions"] if "backward" in row["kernel"] else {"rectangular": row["instructions"]["rectangular"]}
        )
        cells += [f"{old['instructions'][name]:.0f}, {number:.0f}" for name, number in found.items()]
        name = f"{row['kernel'].removesuffix('_rows')}, {row['dtype']}, {row['width']} neurons"
        rows.append([name, f"T <= {row['rows']}" if "rows" in row else "any T", *cells])
    names = list(result["instructions"][0]["instructions"])
    return table(["before, now", "", "registers", "warps", "KB under way", *names], rows)


H200 = "h200-b287b56"
VARIANTS = {
    "base": "as landed: 8 steps at once, 4 rows of gradients under way",
    "ah2": "2 rows of gradients under way",
    "ah8": "8 rows of gradients under way",
    "ao4": "4 steps at once; at least 8 or 6 blocks forward, 6 or 3 backward",
    "bw2": "at least 5 blocks forward, 2 backward",
    "sts": "streaming stores",
    "w2": "packs of 8 bytes",
    "w2b": "packs of 8 bytes; at least 6 blocks forward, 4 backward",
    "w1": "packs of 4 bytes",
    "t256": "256 threads a block; at least 2 blocks forward, 1 backward",
}


def h200() -> dict[str, Any]:
    """What was measured on an H200 with an earlier version: its files are in bench/results/ alone."""
    if source.folder != RESULTS:
        raise NotMeasuredError
    return json.loads((RESULTS / f"{H200}.json").read_text())


def h200_machine() -> str:
    machine, tests = h200()["machine"], h200()["tests"]
    text = f"Measured at {machine['commit']} on {machine['date']}: {machine['gpu']}, driver {machine['driver']}, torch "
    text += (
        f"{machine['torch']}, nvcc {machine['nvcc']}, host {machine['cpu']}, Python {machine['python']}. A copy moves "
    )
    text += "{} to {} TB/s there, read and written. ".format(*machine["copy_tb_per_s"])
    text += f"`pytest -m cuda`: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped, in "
    return text + f"{tests['seconds']} s with {tests['processes']} processes.\n"


def h200_speed() -> str:
    rows = []
    points = h200()["speed"]
    labels = {"unbind": "eager loop, x.unbind()", "spikingjelly-native": "SpikingJelly, native"}
    labels["spikingjelly-triton"] = "SpikingJelly, Triton"
    for name, label in labels.items():
        known = [point for point in points if name in point["ratios"]]
        worst = min(known, key=lambda point: point["ratios"][name])
        at = f"{worst['dtype']} {worst['steps']} x {worst['neurons']:,} {worst['pass']}"
        medians = [
            times(statistics.median(p["ratios"][name] for p in known if p["dtype"] == dtype and p["pass"] == pass_))
            for dtype in ("float32", "bfloat16")
            for pass_ in ("fwd", "fwd+bwd")
        ]
        rows.append([label, *medians, times(worst["ratios"][name]), at])
    head = ["stbp_cuda is, against", "fp32 fwd", "fwd+bwd", "bf16 fwd", "fwd+bwd", "worst", "at"]
    return table(head, rows)


def h200_fused() -> str:
    rows: dict[str, list[str]] = {}
    for point in h200()["spikingjelly"]:
        row = rows.setdefault(f"{point['steps']} x {point['neurons']:,}", [])
        row += [f"{point['fwd']} x", f"{point['fwd+bwd']} x"]
    head = ["T x N", "fp32 fwd", "fwd+bwd", "bf16 fwd", "fwd+bwd"]
    return table(head, [[size, *row] for size, row in rows.items()])


def h200_kernels() -> str:
    steps = sorted({point["steps"] for point in h200()["kernels"]})
    rows = []
    for dtype in ("float32", "bfloat16"):
        base = {p["steps"]: p for p in h200()["kernels"] if p["variant"] == "base" and p["dtype"] == dtype}
        for way in ("forward", "backward", "sigmoid_backward"):
            cells = [base[t].get(f"{way}_of_a_copy") for t in steps]
            label = way.replace("sigmoid_backward", "backward, sigmoid")
            rows.append([f"{dtype} {label}", *(f"{cell:.0%}" if cell else "" for cell in cells)])
    return table(["of a copy", *(f"T = {t}" for t in steps)], rows)


def h200_variants() -> str:
    rows = []
    for variant, label in VARIANTS.items():
        points = {(p["dtype"], p["steps"]): p for p in h200()["kernels"] if p["variant"] == variant}
        cells = [
            f"{points[dtype, steps]['forward_of_a_copy']:.0%} / {points[dtype, steps]['backward_of_a_copy']:.0%}"
            for dtype in ("float32", "bfloat16")
            for steps in (1, 4, 16)
        ]
        rows.append([label, *cells, f"{points['bfloat16', 16]['sigmoid_backward_of_a_copy']:.0%}"])
    head = ["of a copy, forward / backward", "fp32 T = 1", "4", "16", "bf16 T = 1", "4", "16", "sigmoid backward, 16"]
    return table(head, rows)


def h200_train_step() -> str:
    rows = []
    for point in h200()["train_step"]:
        rows.append([f"{point['precision']}, {point['layout']}", *(f"{ms:.1f}" for ms in point["ms"].values())])
    return table(["ms a step", *h200()["train_step"][0]["ms"]], rows)


def h200_compiled_step() -> str:
    rows = [[point["mode"], *(f"{ms:.1f}" for ms in point["ms"].values())] for point in h200()["compiled_step"]]
    return table(["ms of forward and backward", *h200()["compiled_step"][0]["ms"]], rows)


def h200_neunorm() -> str:
    rows = []
    for point in h200()["neunorm"]:
        shares = [f"{point[way]:.0%}" for way in ("fwd_of_a_copy", "fwd+bwd_of_a_copy")]
        shape = " x ".join(map(str, point["shape"]))
        rows.append([shape, point["dtype"], *shares, f"{point['times_as_fast_as_two_layers']} x"])
    head = ["T x B x C x H x W", "", "fwd, of a copy", "fwd+bwd, of a copy", "fwd+bwd, LIFLayer + NeuNorm"]
    return table(head, rows)


def h200_host() -> str:
    return table(["us of the host", ""], [[name, f"{us:,}"] for name, us in h200()["host_us"].items()])


def h200_picture(path: Path) -> None:
    """One layer against its rivals, and the kernels alone."""
    from matplotlib.figure import Figure  # not for --check and --summary

    figure = Figure(figsize=(14, 5), dpi=120, layout="constrained")
    machine = h200()["machine"]
    figure.suptitle(f"{machine['gpu']}, torch {machine['torch']}, measured at {machine['commit']} on {machine['date']}")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    axes[1].sharey(axes[0])
    styles = {
        "spikingjelly-native": ("SpikingJelly, native", "C8"),
        "spikingjelly-triton": ("SpikingJelly, Triton", "C2"),
        "unbind": ("eager loop, x.unbind()", "C9"),
    }
    for axis, dtype in zip(axes[:2], ("float32", "bfloat16"), strict=True):
        shown = [p for p in h200()["speed"] if p["dtype"] == dtype and p["steps"] == 16 and p["pass"] == "fwd+bwd"]
        sizes = [p["neurons"] for p in shown]
        ns = [1e3 * p["us"] / p["steps"] / p["neurons"] for p in shown]
        axis.plot(sizes, ns, "o-", color="red", linewidth=2.5, label="stbp_cuda", zorder=3)
        for name, (label, colour) in styles.items():
            axis.plot(
                sizes, [t * p["ratios"][name] for t, p in zip(ns, shown, strict=True)], "o-", color=colour, label=label
            )
        copy = [t * p["of_a_copy"] for t, p in zip(ns, shown, strict=True)]
        axis.plot(sizes, copy, "--", color="gray", label="a copy of x and the gradient")
        title = f"One layer, {dtype}, T = 16, fwd+bwd"
        axis.set(title=title, xscale="log", yscale="log", xlabel="N", ylabel="ns per neuron and step")
    base = [p for p in h200()["kernels"] if p["variant"] == "base"]
    for dtype, colour in ("float32", "C3"), ("bfloat16", "C0"):
        for way, line in ("forward", "o-"), ("backward", "s--"):
            shown = [p for p in base if p["dtype"] == dtype]
            shares = [100 * p[f"{way}_of_a_copy"] for p in shown]
            axes[2].plot([p["steps"] for p in shown], shares, line, color=colour, label=f"{dtype} {way}")
    steps = sorted({p["steps"] for p in base})
    axes[2].set(title="The kernels alone", xscale="log", ylim=(0, 105), xlabel="T", ylabel="% of a copy's bandwidth")
    axes[2].set_xticks(steps, map(str, steps))
    axes[2].minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)
    axes[2].legend(loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path)
    print(path)


FIGURES: dict[str, Callable[[], str]] = {
    figure.__name__: figure
    for figure in (
        *(speed, speed_targets, train_step, train_step_targets, memory, overhead, kernels),
        *(train_step_speed, train_step_growth, neunorm, neunorm_targets, neurons, neurons_targets),
        *(compiled, instructions),
        *(h200_machine, h200_speed, h200_fused, h200_kernels, h200_variants, h200_train_step),
        *(h200_compiled_step, h200_neunorm, h200_host),
    )
}


def training(metrics: Path) -> str:
    """How far a training run came that scripts/gpu_check.sh left; nothing where there is none."""
    if not metrics.exists():
        return ""
    record = json.loads(metrics.read_text())
    settings, data = record["settings"], record["data"]
    text = f"\n## train\n\n{record['experiment']}: `{record['command']}`. {data['name']}, {data['extent']}.\n\n"
    rows = []
    for epoch in record["epochs"]:
        accuracies = [f"{epoch[key]:.2%}" for key in ("test_accuracy", "train_accuracy")]
        rows.append([f"{epoch['epoch']} of {settings['epochs']}", *accuracies, f"{epoch['train_seconds']:.1f}"])
    return text + table(["epoch", "test accuracy", "training accuracy", "s to train"], rows)


def summary(folder: Path) -> str:
    """All figures of a folder, after what scripts/gpu_check.sh says of its parts."""
    text = f"# {folder.name}\n"
    parts = folder / "parts.tsv"
    if parts.exists():
        rows = [line.split("\t") for line in parts.read_text().splitlines()]
        text += "\n" + table(["part of scripts/gpu_check.sh", "", "s"], rows)
        for part, state, _ in rows:
            log = folder / f"{part}.log"
            if log.exists() and (state != "passed" or part in ("sanitizer", "kernels")):
                last = "\n".join(log.read_text().splitlines()[-80 if state == "passed" else -40 :])
                text += f"\n## {part}, {state}: the end of {log.name}\n\n```\n{last}\n```\n"
    text += training(folder / "train" / "metrics.json")
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
    parser.add_argument("--picture", action="store_true", help="also draw what was measured on the H200")
    parser.add_argument("--summary", type=Path, metavar="FOLDER", help="write FOLDER/summary.md, and nothing else")
    args = parser.parse_args()
    if args.summary:
        source.folder, source.devices = args.summary, ("cuda", "cuda-quick", "cpu", "cpu-quick")
        page = args.summary / "summary.md"
        page.write_text(summary(args.summary))
        print(page)
        return
    if args.picture:
        h200_picture(RESULTS / f"{H200}.png")
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
