"""Ctrl-C while a command does not work yet, or no more. Imports nothing that takes long: it comes before all else."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGINT  # 130, as shells have it
came = False  # Ctrl-C, while the command worked


def leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(EXIT_CODE)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global came
    came = True
    raise KeyboardInterrupt


def _handle(handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave, interrupt):  # else somebody's own
        signal.signal(signal.SIGINT, handler)


def end_at_once() -> None:
    """From here on Ctrl-C ends the process without a word: where nothing can be left half done, as while modules are
    imported, which catch what an interrupt raises and raise something else."""
    _handle(leave)


def raise_as_usual() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, and ``came`` remembers that it did."""
    _handle(interrupt)
