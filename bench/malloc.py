"""The settings of the C library's malloc under which a benchmark runs, the same for all contestants.

As malloc comes, it gives large blocks back when they are freed, and the page faults of fresh ones would be most of what
a benchmark of large tensors measures, whoever computes. malloc reads its settings when a process starts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

# As docs/performance.md has them: freed memory is neither given back nor mapped anew, and torch asks for huge pages.
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "THP_MEM_ALLOC_ENABLE": "1"}
MALLOC = {"default": {}, "keep": KEEP}


def add_option(parser: argparse.ArgumentParser) -> None:
    text = (
        "keep: freed memory stays with the process, as docs/performance.md recommends; default: as the environment says"
    )
    parser.add_argument("--malloc", choices=MALLOC, default="keep", help=f"{text}; without this option keep")


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """For the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start(main: Callable[[], None]) -> None:
    """Run a benchmark as ``--malloc`` says, if need be in a process with other settings that takes this one's place."""
    parser = argparse.ArgumentParser(add_help=False)
    add_option(parser)
    environ = {**os.environ, **MALLOC[parser.parse_known_args()[0].malloc]}
    if environ != os.environ and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
    main()
