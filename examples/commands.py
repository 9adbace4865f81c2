"""How the commands of this folder end where something comes from outside: Ctrl-C, a closed pipe, a full disk. With at
most one line, never a traceback, and with the exit code that shells expect."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import interrupts


class Parser(argparse.ArgumentParser):
    """One whose errors are a line, without its usage before it, which --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def exit_code(number: int) -> int:
    """Of a command that a signal has ended."""
    return 128 + number


def is_exit(error: BaseException, code: int) -> bool:
    return isinstance(error, SystemExit) and error.code == code


def reason(error: OSError) -> str:
    """What an error says, without its number."""
    return f"{error.filename}: " * bool(error.filename) + (error.strerror or str(error))


def discard_output() -> None:
    """What is not yet written is not written any more, which the interpreter would try at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())


def run(main: Callable[[], object]) -> None:
    """Call ``main``, and exit with one line where it ends by an interrupt, or a file that cannot be written or read;
    without any where nobody reads the output any more (``| head``)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe shows each line as it comes, too
    interrupts.raise_as_usual()
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        interrupts.end_at_once()
        if interrupts.came and not is_exit(error, interrupts.EXIT_CODE):
            # Also where it was caught and became another error, as in the import of some modules.
            print("interrupted", file=sys.stderr)
            sys.exit(interrupts.EXIT_CODE)
        if isinstance(error, BrokenPipeError):
            discard_output()
            sys.exit(exit_code(signal.SIGPIPE))
        if isinstance(error, OSError):
            print(f"error: {reason(error)}", file=sys.stderr)
            discard_output()
            sys.exit(1)
        raise
    interrupts.end_at_once()
