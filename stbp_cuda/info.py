"""Prints what was built and what would run here: ``python -m stbp_cuda.info``."""

from __future__ import annotations

import os

from .ops import build_info

# What tells the allocator of results on the CPU to keep memory, or is another one.
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")


def main() -> None:
    """Print :func:`stbp_cuda.build_info`, a line for each entry."""
    info = build_info()
    rows = {name.replace("_", " "): value for name, value in info.items() if name not in ("stbp_cuda", "backends")}
    rows = {"stbp_cuda": info["stbp_cuda"], **rows}
    rows |= {f"backend on {device}": backend for device, backend in info["backends"].items()}
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ALLOCATOR)]
    rows["malloc"] = " ".join(settings) or 'as it comes: see "Memory on a CPU" in docs/performance.md'
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value or 'none'}")


if __name__ == "__main__":
    main()
