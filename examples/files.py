"""Files that are written whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


def write(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Bytes, or what a function writes to a file: all or nothing, whenever the process or the machine dies.

    Raises:
        OSError: it cannot be written (a full disk, for instance); the error names ``path``, and nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise naming(error, path) from error
        raise


def naming(error: OSError, path: Path) -> OSError:
    """The same error with a path, which what a file's methods raise does not have, and NumPy's not even a number."""
    return OSError(error.errno or 0, error.strerror or str(error), str(path))


def write_json(path: Path, content: object) -> None:
    write(path, (json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder, made if need be, for this process alone. If it is still empty at the end, it is removed.

    The lock is on the folder itself and leaves no file. The kernel takes it away with the process, however that ends.
    What a process that was killed there has begun to write is removed.

    Exits with a message if another process has the folder. Raises OSError if it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: {folder} is in use: another process is at work on this run")
        except OSError as error:  # of some file systems in a network
            print(
                f"warning: {folder} cannot be locked ({error.strerror}); let no other process use it", file=sys.stderr
            )
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
        os.close(descriptor)


def memory_limit() -> int:
    """Bytes that this process can have at most: those of the machine, or of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes":
        with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)
