"""Builds the extension; everything else is in pyproject.toml.

One binary for every torch >= 2.10, with or without CUDA, and every Python >= 3.10. CUDA kernels are compiled whenever
nvcc is found. Environment variables:

    STBP_CUDA_BUILD       0: no CUDA kernels; 1: fail where nvcc is missing
    TORCH_CUDA_ARCH_LIST  the architectures to compile for, such as "8.0;9.0+PTX"
    CUDA_HOME             where to look for nvcc first
    CXX, MAX_JOBS         the C++ compiler; how many compilations run at once
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_ARCHITECTURE = 75
# No fused multiply-add: the kernels must round exactly as the reference does.
CXX_FLAGS = (
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"
)
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL -DPy_LIMITED_API=0x030a0000"
ISA_FLAGS = {
    "kernels_avx2": "-mavx2 -mf16c",
    "kernels_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}


def find_nvcc():
    """nvcc from CUDA_HOME or PATH, else from the build requirements; None where there is none or it is unwanted."""
    wish = os.environ.get("STBP_CUDA_BUILD", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"STBP_CUDA_BUILD must be 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    candidates = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found]
    packages = importlib.util.find_spec("nvidia")
    for location in packages.submodule_search_locations if packages else []:
        candidates += sorted(Path(location).glob("cu*/bin/nvcc"), reverse=True)
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc.resolve()
    if wish == "1":
        raise SystemExit("STBP_CUDA_BUILD=1, but nvcc is neither in CUDA_HOME, nor on PATH, nor in the environment")
    return None


def architectures(nvcc):
    """What to compile for, as strings like "9.0" or "9.0+PTX"."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed:
        for name in listed:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise SystemExit(f"TORCH_CUDA_ARCH_LIST must list architectures like 9.0 or 9.0+PTX, got {name!r}")
        return listed
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        visible = subprocess.run(query, capture_output=True, text=True, check=False)
        if visible.returncode == 0 and visible.stdout.strip():
            return sorted(set(visible.stdout.split()))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    numbers = sorted(int(n) for n in re.findall(r"compute_(\d+)\b", known) if int(n) >= OLDEST_ARCHITECTURE)
    # The first of each generation: its code runs on the others, such as 8.0's on 8.6 and 8.9, and each takes long.
    generations = {n // 10: f"{n // 10}.{n % 10}" for n in reversed(numbers)}
    names = sorted(generations.values(), key=float)
    return [*names[:-1], names[-1] + "+PTX"]


def gencode_flags(names):
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text).group(1)


class NinjaBuildExt(build_ext):
    """Compiles with ninja: flags per file, several files at once, and only what has changed."""

    def build_extension(self, ext):
        import torch  # a build requirement

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        torch_root = Path(torch.__file__).parent
        includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include", *self.include_dirs]
        flags = " ".join([TORCH_FLAGS, *(f"-isystem {path}" for path in includes)])
        nvcc = find_nvcc()
        names = architectures(nvcc) if nvcc else []
        nvcc_flags = f"{NVCC_FLAGS} {gencode_flags(names)}"
        if nvcc:
            version = nvcc_version(nvcc)
            if int(version.partition(".")[0]) >= 13:  # far smaller, and it needs no newer driver than 13 does
                nvcc_flags += " --compress-mode=size"
            print(f"stbp_cuda: CUDA kernels for {' '.join(names)} with {nvcc}")
            flags += (
                f" -DSTBP_CUDA '-DSTBP_CUDA_COMPILER=\"nvcc {version}\"'"
                f" '-DSTBP_CUDA_ARCHITECTURES=\"{' '.join(names)}\"'"
            )
        else:
            print("stbp_cuda: no CUDA kernels: nvcc is missing or STBP_CUDA_BUILD=0")

        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"flags = {CXX_FLAGS} {flags}",
            f"nvcc = {nvcc}",
            f"nvcc_flags = {nvcc_flags}",
            # nvcc links its own runtime statically; the hidden copy cannot clash with torch's.
            f"link = {f'{nvcc} -cudart static' if nvcc else '$cxx'}",
            f"link_flags = -shared -Xlinker --exclude-libs=ALL -L{torch_root / 'lib'} -ltorch_cpu",
            "rule cxx\n  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $link $in -o $out $link_flags",
        ]
        objects = []
        for source in map(Path, ext.sources):
            if source.parent.name == "cuda" and not nvcc:
                continue
            if source.stem in ISA_FLAGS and platform.machine() != "x86_64":
                continue
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            objects.append(f"{source.parent.name}_{source.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {ROOT / source}\n  isa = {ISA_FLAGS.get(source.stem, '')}")
        lines.append(f"build {target}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", build, *jobs], check=True)


if __name__ == "__main__":  # tests and benchmarks load this file for its flags
    setup(
        ext_modules=[
            Extension(
                "stbp_cuda._C",
                sources=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".cpp", ".cu")),
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": NinjaBuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
