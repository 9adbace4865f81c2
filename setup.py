"""Builds the extension; everything else is in pyproject.toml.

One binary for every torch >= 2.10, with or without CUDA, and every Python >= 3.10. CUDA kernels are compiled whenever
nvcc is found. Environment variables:

    STBP_CUDA_BUILD       0: no CUDA kernels; 1: fail where nvcc is missing
    TORCH_CUDA_ARCH_LIST  the architectures to compile for, such as "8.0;9.0+PTX" or "Ampere"; what nvcc does not
                          know is left out
    CUDA_HOME             where to look for nvcc first; one that does not work is passed over
    CXX, MAX_JOBS         the C++ compiler; how many compilations run at once
"""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
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
NVCC_ENVIRONMENT = {"TMPDIR": "."}  # nvcc does not escape the names of its temporary files
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL -DPy_LIMITED_API=0x030a0000"
ISA_FLAGS = {
    "kernels_avx2": "-mavx2 -mf16c",
    "kernels_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}


# The names that torch knows, with what it takes them for.
NAMED_ARCHITECTURES = {
    "Kepler": "3.5+PTX",
    "Kepler+Tesla": "3.7",
    "Maxwell": "5.0 5.2+PTX",
    "Maxwell+Tegra": "5.3",
    "Pascal": "6.0 6.1+PTX",
    "Volta": "7.0+PTX",
    "Volta+Tegra": "7.2",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
    "Rubin": "10.7+PTX",
}


def say(text):
    print(f"stbp_cuda: {text}", flush=True)


def output_of(*command, **options):
    """What a program prints. RuntimeError with one line if it cannot be run, fails, or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=120, **options
        )
    except OSError as error:
        raise RuntimeError(error.strerror) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError("no answer within two minutes") from None
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if re.search("error|fatal|cannot", line, re.IGNORECASE)]
        raise RuntimeError(": ".join([f"exit status {done.returncode}", *[*errors, *lines][:1]]))
    return done.stdout


def link_to(folder, build, label):
    """A link in `build` to a folder, as a name that ninja, the shell, make's rules and nvcc all take literally.

    Another folder gets another name, so that ninja compiles anew.
    """
    name = f"{label}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"
    if not (build / name).is_symlink():
        (build / name).symlink_to(folder, target_is_directory=True)
    return name


def find_nvcc():
    """The first nvcc that works: from CUDA_HOME, PATH or the build requirements. None if there is none, or unwanted."""
    wish = os.environ.get("STBP_CUDA_BUILD", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"STBP_CUDA_BUILD must be 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += os.get_exec_path()
    packages = importlib.util.find_spec("nvidia")
    for location in packages.submodule_search_locations if packages else []:
        folders += sorted(Path(location).glob("cu*/bin"), reverse=True)
    reason = "nvcc is neither in CUDA_HOME, nor on PATH, nor in the environment"
    for nvcc in dict.fromkeys(Path(os.path.realpath(Path(folder, "nvcc"))) for folder in folders):
        if not os.path.isfile(nvcc):
            continue
        try:
            try_nvcc(nvcc)
        except RuntimeError as error:
            reason = f"{nvcc} does not work ({error})"
            say(f"{reason}; STBP_CUDA_BUILD=0 leaves the CUDA kernels out")
        else:
            return nvcc
    if wish == "1":
        raise SystemExit(f"STBP_CUDA_BUILD=1, but {reason}")
    return None


def try_nvcc(nvcc):
    """RuntimeError if it cannot compile and link a kernel, which also takes a host compiler that it supports."""
    nvcc_version(nvcc)
    if not default_architectures(known_architectures(nvcc)):
        raise RuntimeError(f"it knows no architecture from {OLDEST_ARCHITECTURE / 10} on")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "trial.cu").write_text("__global__ void kernel() {}\n")
        command = f"{cuda_link_command(nvcc, Path(folder))} -shared -std=c++17 -Xcompiler -fPIC trial.cu -o trial.so"
        output_of(*command.split(), cwd=folder, env={**os.environ, **NVCC_ENVIRONMENT})


def cuda_link_command(nvcc, build):
    """nvcc links its own runtime statically, whose hidden copy cannot clash with torch's.

    In the packages of the build requirements that is in lib, where nvcc does not look: it knows lib64.
    """
    folder = link_to(nvcc.parent, build, "nvcc")
    return f"{folder}/{nvcc.name} -cudart static -L{folder}/../lib"


def nvcc_version(nvcc):
    found = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version"))
    if not found:
        raise RuntimeError("it does not tell its version")
    return found[1]


def known_architectures(nvcc):
    """As numbers: 90 is 9.0."""
    return {int(number) for number in re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch"))}


def architectures(nvcc):
    """What to compile for, as strings like "9.0" or "9.0+PTX": what is asked for, or the GPUs, as far as nvcc knows."""
    known = known_architectures(nvcc)
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    wanted = dict.fromkeys(listed_architectures(listed, known) if listed else gpu_architectures(known))
    names = [name for name in wanted if knows(nvcc, known, name)]
    if unknown := [name.removesuffix("+PTX") for name in wanted if name not in names]:
        say(f"left out, as {nvcc} does not know them: {' '.join(unknown)}")
    return names or default_architectures(known)


def knows(nvcc, known, name):
    number = name.removesuffix("+PTX").replace(".", "")
    if number.isdigit():
        return int(number) in known
    try:  # one that has features of its own, such as 9.0a, and is in no list
        output_of(nvcc, "--dryrun", f"-gencode=arch=compute_{number},code=sm_{number}", "-c", "any.cu")
    except RuntimeError:
        return False
    return True


def listed_architectures(listed, known):
    """Those of TORCH_CUDA_ARCH_LIST, where torch's names may stand, too: "Ampere", "Kepler+Pascal", "Ada+PTX"."""
    names = []
    for item in listed:
        for part in re.split(r"\+(?!Tegra|Tesla)", item):
            if re.fullmatch(r"\d+\.\d[af]?", part):
                names.append(part)
            elif part in NAMED_ARCHITECTURES:
                names += NAMED_ARCHITECTURES[part].split()
            elif part == "Common":
                names += default_architectures(known)
            elif part == "All":
                names += default_architectures(known, every=True)
            elif part in ("Auto", "native"):
                names += gpu_architectures(known)
            elif part == "PTX" and names and item != part:
                names[-1] = names[-1].removesuffix("+PTX") + "+PTX"
            else:
                raise SystemExit(
                    "TORCH_CUDA_ARCH_LIST must list architectures like 9.0 or 9.0+PTX, or names like"
                    f" {', '.join(NAMED_ARCHITECTURES)}, Common, All or native, got {item!r}"
                )
    return names


def gpu_architectures(known):
    """Those of the visible GPUs: for a newer one than nvcc knows, PTX of the newest before it."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        lines = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split("\n")
    except RuntimeError as error:
        say(f"nvidia-smi does not work ({error})")
        return []
    names = []
    for line in sorted({line.strip() for line in lines} - {""}):
        if not re.fullmatch(r"\d{1,3}\.\d", line):
            say(f"nvidia-smi does not tell a GPU's architecture, but {line[:100]!r}")
            continue
        gpu = int(line.replace(".", ""))
        older = [number for number in known if OLDEST_ARCHITECTURE <= number < gpu]
        names.append(line if gpu in known or not older else f"{max(older) / 10}+PTX")
    return names


def default_architectures(known, every=False):
    """The first of each generation, or every one, and the newest also for what comes after.

    The code of the first runs on the others, such as 8.0's on 8.6 and 8.9, and each takes long to compile.
    """
    numbers = sorted(number for number in known if number >= OLDEST_ARCHITECTURE)
    first = {number // 10: number for number in reversed(numbers)}
    names = [f"{number / 10}" for number in (numbers if every else sorted(first.values()))]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]


def gencode_flags(names):
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(dict.fromkeys(flags))


def cxx_command():
    """CXX for build.ninja: a path, or a command with arguments."""
    wish = os.environ.get("CXX") or "g++"
    path = shutil.which(wish)
    words = [os.path.abspath(path)] if path else shlex.split(wish)
    if not shutil.which(words[0]):
        raise RuntimeError(f"there is no C++ compiler {wish!r}: install one, or name yours in CXX")
    return shlex.join(words).replace("$", "$$")


class NinjaBuildExt(build_ext):
    """Compiles with ninja: flags per file, several files at once, and only what has changed."""

    def build_extension(self, ext):
        try:
            self.build_with_ninja(ext)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise SystemExit(f"stbp_cuda: {error}") from None

    def build_with_ninja(self, ext):
        import torch  # a build requirement

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        # Everything is named by its place in the build folder, as paths may hold spaces, quotes, $, # and more.
        csrc = link_to(ROOT / "csrc", build, "csrc")
        torch_root = link_to(Path(torch.__file__).parent, build, "torch")
        includes = [f"{torch_root}/include", f"{torch_root}/include/torch/csrc/api/include"]
        includes += [link_to(Path(path).resolve(), build, "include") for path in self.include_dirs]
        flags = " ".join([TORCH_FLAGS, *(f"-isystem {path}" for path in includes)])
        nvcc = find_nvcc()
        names = architectures(nvcc) if nvcc else []
        nvcc_command = f"{link_to(nvcc.parent, build, 'nvcc')}/{nvcc.name}" if nvcc else ""
        nvcc_flags = f"{NVCC_FLAGS} {gencode_flags(names)}"
        if nvcc:
            version = nvcc_version(nvcc)
            if int(version.partition(".")[0]) >= 13:  # far smaller, and it needs no newer driver than 13 does
                nvcc_flags += " --compress-mode=size"
            say(f"CUDA kernels for {' '.join(names)} with {nvcc}")
            flags += (
                f" -DSTBP_CUDA '-DSTBP_CUDA_COMPILER=\"nvcc {version}\"'"
                f" '-DSTBP_CUDA_ARCHITECTURES=\"{' '.join(names)}\"'"
            )
        else:
            say("no CUDA kernels: no nvcc works, or STBP_CUDA_BUILD=0")

        lines = [
            f"cxx = {cxx_command()}",
            f"flags = {CXX_FLAGS} {flags}",
            f"nvcc = {nvcc_command}",
            f"nvcc_flags = {nvcc_flags}",
            f"link = {cuda_link_command(nvcc, build) if nvcc else '$cxx'}",
            f"link_flags = -shared -Xlinker --exclude-libs=ALL -L{torch_root}/lib -ltorch_cpu",
            "rule cxx\n  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule nvcc\n  command = $nvcc $nvcc_flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $link $in -o $out $link_flags",
        ]
        objects = []
        for path in map(Path, ext.sources):
            if path.parent.name == "cuda" and not nvcc:
                continue
            if path.stem in ISA_FLAGS and platform.machine() != "x86_64":
                continue
            rule = "nvcc" if path.suffix == ".cu" else "cxx"
            objects.append(f"{path.parent.name}_{path.stem}.o")
            lines.append(
                f"build {objects[-1]}: {rule} {csrc}/{path.relative_to('csrc')}\n  isa = {ISA_FLAGS.get(path.stem, '')}"
            )
        lines.append(f"build _C.so: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        environment = {**os.environ, **NVCC_ENVIRONMENT}
        if subprocess.run([sys.executable, "-m", "ninja", "-C", build, *jobs], env=environment).returncode != 0:
            raise RuntimeError(
                "it does not compile, see above"
                + (f"; STBP_CUDA_BUILD=0 leaves out the CUDA kernels, which {nvcc} compiles" if nvcc else "")
            )
        self.copy_file(str(build / "_C.so"), str(target))


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
