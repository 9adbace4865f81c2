"""Collects finished runs, and writes docs/results.md from them.

    python examples/results.py runs/mnist-mlp/DATE-TIME ...    add these runs to examples/results/, then write the page
    python examples/results.py                                 write the page anew
    python examples/results.py --check                         fail if the page is not what the runs say

Runs of one experiment that differ in nothing but the seed share a row. Of a run whose own files are lost,
examples/results/recorded.json has what is known.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import argparse
import hashlib
import json
import statistics
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import commands
from experiments import EXPERIMENTS, command
from files import write, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "examples" / "results", ROOT / "docs" / "results.md"

# The rows of the page: experiments by patterns of their names.
SECTIONS = {
    "Paper A (arXiv:1706.02609)": ("mnist-mlp", "mnist-cnn", "nmnist-mlp", "objects-mlp", "objects-cnn"),
    "Paper A: STBP against spatial-only backpropagation": ("*-stbp", "*-sdbp"),
    "Paper A: surrogates and their widths": ("surrogate-*", "width-*"),
    "Paper B (arXiv:1809.05793)": ("nmnist-cnn*", "dvscifar10*", "cifar10-*net", "cifar10-*-no-*", "cifar10-*-ours"),
    "Paper B: CIFAR10 against T": ("cifar10-*-t*[0-9]",),
    "Paper B: speed, Fig 4 (seconds an epoch)": ("speed-*",),
    "Not from the papers": ("digits",),
}
NOT_RUN = {
    "speed-*": "not run: meant for a GPU; [performance.md](performance.md) has training steps of the papers' networks",
    "dvscifar10*": "not run: the data set was not at hand; its loader is tested on recordings in its format",
    "cifar10-*": "not run: an epoch takes hours without a GPU",
    "nmnist-cnn*": "not run: 300 epochs take weeks without a GPU",
    "*": "not run yet",
}


def section_of(name: str) -> str:
    return next(title for title, patterns in SECTIONS.items() if any(fnmatch(name, pattern) for pattern in patterns))


def first_like(name: str) -> str:
    """Some experiments are part of two studies, under two names: the first with the same settings."""
    return next(other for other, found in EXPERIMENTS.items() if found.settings == EXPERIMENTS[name].settings)


def changed(record: dict[str, Any]) -> list[str]:
    """The settings in which a run is not its experiment; that it saw fewer samples stands in its column of the page."""
    usual = vars(EXPERIMENTS[record["experiment"]].settings)
    free = ("seed", "epochs", "train_samples", "test_samples")
    return [key for key, value in record["settings"].items() if key not in free and value != usual[key]]


def variant(record: dict[str, Any]) -> str:
    """What runs that share a row have in common: experiment, settings without the seed, data, hardware."""
    settings = {key: value for key, value in record["settings"].items() if key != "seed"}
    machine = {key: record["machine"][key] for key in ("cpu", "gpu", "processes")}
    return json.dumps([first_like(record["experiment"]), settings, record["data"], machine], sort_keys=True)


def add(run: Path) -> None:
    """Copy what metrics.json says of a run to RESULTS, under a name that tells experiment, settings and seed apart."""
    try:
        record = json.loads((run / "metrics.json").read_text())
        name, epochs = record["experiment"], record["epochs"]
        file = (
            f"{name}-{hashlib.sha256(variant(record).encode()).hexdigest()[:6]}-seed{record['settings']['seed']}.json"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {run} is no folder of a run of train.py: {error!r}")
    if not epochs:
        sys.exit(f"error: {run} has not finished an epoch")
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / file, record)
    print(RESULTS / file)


def percent(values: list[float]) -> str:
    """The mean, and each, of several."""
    each = [f"{value:.2%}".rstrip("%") for value in values]
    return each[0] if len(each) == 1 else f"{statistics.mean(values):.2%}".rstrip("%") + f" ({', '.join(each)})"


def duration(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (float("inf"), "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def hardware(machine: dict[str, Any]) -> str:
    gpus = f"{machine['processes']} x " * (machine["processes"] > 1)
    return gpus + (machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads")


def recorded_rows(name: str) -> list[list[str]]:
    """Of the table, for the runs of an experiment of which just some numbers are known."""
    path = RESULTS / "recorded.json"
    rows = []
    for run in json.loads(path.read_text())["runs"] if path.exists() else ():
        if run["experiment"] == name:
            record = {"experiment": name, "settings": vars(EXPERIMENTS[name].settings) | run["settings"]}
            start = [f"{name}: {EXPERIMENTS[name].title}", EXPERIMENTS[name].reported or "-"]
            if other := changed(record):
                start = [f"{start[0]}; changed: {', '.join(other)}", "-"]
            last = f"{run['test_accuracy']:.1%}".rstrip("%") + f" ({run['remark']})"
            settings = record["settings"]
            epochs = f"{run['after_epoch']}" + f" of {settings['epochs']}" * (run["after_epoch"] != settings["epochs"])
            time = f"{run['seconds_an_epoch']} s an epoch" if "seconds_an_epoch" in run else ""
            where = f"{run['gpu']}, at {run['commit']} on {run['date']}; no more is known of this run"
            how = f"`{command(name, settings)}`"
            rows.append([*start, last, "", run["data"], epochs, str(settings["steps"]), time, where, how])
    return rows


def row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Of the table, for one experiment and the runs that share it; none for one not run."""
    experiment = EXPERIMENTS[name]
    start = [f"{name}: {experiment.title}", experiment.reported or "-"]
    if runs and (other := changed(runs[0])):
        start = [f"{start[0]}; changed: {', '.join(other)}", "-"]  # the paper's number is not to be held against it
    if not runs:
        reason = next(reason for pattern, reason in NOT_RUN.items() if fnmatch(name, pattern))
        return [
            *start,
            reason,
            "",
            "",
            "",
            str(experiment.settings.steps),
            "",
            "",
            f"`python examples/train.py {name}`",
        ]
    runs = sorted(runs, key=lambda run: run["settings"]["seed"])
    settings, rows = runs[0]["settings"], [run["epochs"] for run in runs]
    last = [epochs[-1]["test_accuracy"] for epochs in rows]
    best = [max(epoch["test_accuracy"] for epoch in epochs) for epochs in rows]
    seconds = [sum(epoch["train_seconds"] + epoch["test_seconds"] for epoch in epochs) for epochs in rows]
    an_epoch = statistics.median(epoch["train_seconds"] for epochs in rows for epoch in epochs)
    if name.startswith("speed-"):
        ours, best_text = f"{an_epoch:.1f} s", ""
    else:
        ours, best_text = percent(last), percent(best)
    done = sorted({len(epochs) for epochs in rows})
    epochs = ", ".join(map(str, done)) + f" of {settings['epochs']}" * (done != [settings["epochs"]])
    time = f"{duration(statistics.mean(seconds))}; {duration(an_epoch)} an epoch"
    # Not as it was called then: the experiment's own settings may have changed.
    how = command(name, {key: value for key, value in settings.items() if key != "seed"})
    seeds = ", ".join(str(run["settings"]["seed"]) for run in runs)
    how += f" --seed {seeds}" if seeds != "0" else ""
    data = f"{runs[0]['data']['name']}, {runs[0]['data']['extent']}"
    cells = [ours, best_text, data, epochs, str(settings["steps"]), time, hardware(runs[0]["machine"]), f"`{how}`"]
    return [*start, *cells]


INTRODUCTION = """
# Results

Written by `python examples/results.py` from the runs' own files in [examples/results/](../examples/results/).
Test accuracy in %; after several seeds the mean, and each in brackets. [fig]: read off a plot. Where data lie elsewhere
than in `data/`, commands need `--data-dir`; several seeds are several runs. What is behind each setting:
`python examples/train.py EXPERIMENT --list`.

Where ours stay below the papers': mnist-mlp overfits; the training set is all but learned while the test stands still,
and neither paper nor code names anything against it. Its surrogate was chosen by the test accuracy of the surrogates
below, as there is nothing else to choose by. The surrogates and widths had few epochs, and start from weights chosen
for width 2; with width 0.1, presumably, hardly a neuron is in the gradient's reach. Of N-MNIST there was a sixtieth of
the training set. CIFAR-10's runs are those of a CIFARNet narrowed to an eighth, on a part of the data, to see that it
learns. With the paper's rectangular surrogate of width 1 **and** its dropout of 0.5 it does not, neither with SGD nor
with Adam: the loss comes to rest where all classes fire alike. Without dropout it learns, and with dropout as soon as
the surrogate reaches farther: a rectangle of width 4 (2 is not enough), or the polynomial, which is the default here
for that reason. The whole CIFARNet ran on an H200, on CIFAR-10 as JPEG files. With B's printed SGD and dropout of 0.5,
a mask at every step in front of every layer, it stood at 43.6 % after 13 epochs and rose slowly: B cannot have had that
dropout in every layer. With Adam and dropout of 0.1 it reached 85.3 %, and 93.8 % on the training set: it overfits,
with cropping and flipping as the only augmentation. The commands of these two assume the experiment's value for what
was not written down.
"""
HEADER = ("experiment", "paper", "ours, last epoch", "best epoch", "data", "epochs", "T", "time", "hardware", "command")


def page() -> str:
    groups: defaultdict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RESULTS.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        groups[first_like(record["experiment"])][variant(record)].append(record)
    lines = [INTRODUCTION.strip()]
    for title in SECTIONS:
        lines += ["", f"## {title}", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        for name in EXPERIMENTS:
            if section_of(name) == title:
                same = [runs for runs in groups[first_like(name)].values() if not changed(runs[0])]
                other = [runs for runs in groups[name].values() if changed(runs[0])]
                recorded = recorded_rows(name)
                if not same and all("; changed: " in cells[0] for cells in recorded):
                    same = [[]]
                rows = [row(name, runs) for runs in same + other] + recorded
                lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = commands.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs to add")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    args = parser.parse_args()
    if args.check:
        if args.runs:
            parser.error("--check adds no runs")
        if not PAGE.exists() or PAGE.read_text() != page():
            sys.exit(f"{PAGE} is out of date: python examples/results.py")
        return
    for run in args.runs:
        add(run)
    write(PAGE, page().encode())
    print(PAGE)


if __name__ == "__main__":
    commands.run(main)
