"""Prints what was built and what would run here: ``python -m stbp_cuda.info``."""

from __future__ import annotations

from .ops import build_info


def main() -> None:
    """Print :func:`stbp_cuda.build_info`, a line for each entry."""
    info = build_info()
    rows = {name.replace("_", " "): value for name, value in info.items() if name not in ("stbp_cuda", "backends")}
    rows = {"stbp_cuda": info["stbp_cuda"], **rows}
    rows |= {f"backend on {device}": backend for device, backend in info["backends"].items()}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value or 'none'}")


if __name__ == "__main__":
    main()
