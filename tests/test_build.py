"""The binary: what it says of itself, what it needs, every instruction set in it, other torches, and the packages."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import stbp_cuda
from stbp_cuda import _C, ops

ROOT = Path(__file__).parent.parent
PACKAGE = Path(stbp_cuda.__file__).parent
CORE = ["test_surrogate.py", "test_reference.py", "test_lif.py", "test_ops.py", "test_errors.py", "test_layer.py"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_build_info() -> None:
    info = stbp_cuda.build_info()
    assert info["stbp_cuda"] == stbp_cuda.__version__ == importlib.metadata.version("stbp_cuda")
    assert info["torch"] == torch.__version__
    assert info["cpu_instruction_set"] in ("AVX-512", "AVX2", "portable")
    assert info["backends"]["cpu"] == "fused"
    assert re.match(r"\d+\.\d+\.\d+", info["torch_headers"])
    assert bool(info["cuda_compiler"]) == bool(info["cuda_architectures"]) == bool(info["cuda_chunk"])
    assert set(info["backends"]) == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}


def test_info_from_the_command_line(tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "stbp_cuda.info", cwd=tmp_path)
    for name in ("stbp_cuda", "torch", "torch headers", "cpu instruction set", "cuda compiler", "cuda architectures"):
        assert re.search(rf"^{name} +\S", printed, re.MULTILINE)
    assert re.search(r"^backend on cpu +fused$", printed, re.MULTILINE)


def test_a_package_without_its_extension_says_what_to_do(tmp_path: Path) -> None:
    """As in a source folder, where python finds the sources before the installed package."""
    shutil.copytree(PACKAGE, tmp_path / "stbp_cuda", ignore=shutil.ignore_patterns("*.so"))
    # Without what an editable install leaves in site-packages, which finds the extension all the same.
    script = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); import stbp_cuda"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_binary_needs_only_stable_symbols(tmp_path: Path) -> None:
    """Nothing of at:: or c10::, whose symbols change from torch to torch, and only Python's limited API."""
    binary = Path(_C.__file__)
    assert binary.name.endswith(".abi3.so")
    needed = run("nm", "--dynamic", "--demangle", "--undefined-only", binary, cwd=tmp_path)
    assert "torch_" in needed
    assert re.findall(r" U ((?:at|c10|torch)::.*)", needed) == []
    defined = run("nm", "--dynamic", "--defined-only", binary, cwd=tmp_path)
    assert re.findall(r" T (\S+)", defined) == ["PyInit__C"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            [],
            "this machine lacks:\n- a GPU that torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--skip", "speed,lunch"], "--skip: there is no part lunch, but build tests"),
        (["--minutes", "0"], "--minutes must be a positive integer, got 0"),
        (["--device", "tpu"], "--device must be cuda or cpu, got tpu"),
        (["--rivals", "nowhere"], "--rivals: nowhere is no folder"),
        (["--train", "soon"], "--train must be a number of minutes, got soon"),
        (["--train", "1", "--data", "nowhere"], "--data: nowhere is no folder"),
        (["--quick"], "unknown option --quick"),
    ],
)
def test_gpu_check_says_what_is_wrong(options: list[str], message: str) -> None:
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *options]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_the_sanitizers_look_on_runs() -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "sanitize.py"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ forward and backward passes\n", done.stdout)


def test_the_binary_is_small() -> None:
    """Also with the CUDA kernels for all architectures, which nvcc must compress for it."""
    assert Path(_C.__file__).stat().st_size < 25e6


def test_default_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each generation, of those that nvcc knows, and the newest also for what comes after."""
    nvcc = tmp_path / "nvcc"
    known = "compute_50 compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_103 compute_121"
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {known}\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no nvidia-smi
    architectures = runpy.run_path(str(ROOT / "setup.py"))["architectures"]
    assert architectures(nvcc) == ["7.5", "8.0", "9.0", "10.0", "12.1+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0+PTX")
    assert architectures(nvcc) == ["8.6", "9.0+PTX"]


INSTRUCTION_SETS = {"default": "portable", "avx2": "AVX2", "avx512": "AVX-512"}


@pytest.mark.parametrize("allowed", INSTRUCTION_SETS)
def test_every_instruction_set(allowed: str, tmp_path: Path) -> None:
    """The kernels of the narrower instruction sets, which this machine does not choose by itself."""
    expected = INSTRUCTION_SETS[allowed]
    printed = run(sys.executable, "-m", "stbp_cuda.info", cwd=tmp_path, ATEN_CPU_CAPABILITY=allowed)
    chosen = re.search(r"cpu instruction set +(\S+)", printed)
    assert chosen is not None
    order = list(INSTRUCTION_SETS.values())
    if order.index(chosen[1]) < order.index(expected):
        pytest.skip(f"this machine has no {expected}")
    assert chosen[1] == expected
    if expected == ops.build_info()["cpu_instruction_set"]:
        return  # the tests of this very run
    tests = "agrees_with or element_by_element or gradcheck or nan_and_inf or no_cache_holds or half_types or same_bits"
    files = [ROOT / "tests/test_lif.py", ROOT / "tests/test_neunorm.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", tests]
    run(*command, cwd=tmp_path, ATEN_CPU_CAPABILITY=allowed, STBP_CUDA_HYPOTHESIS="quick")


@pytest.mark.skipif(
    "STBP_CUDA_OTHER_TORCH" not in os.environ,
    reason="installs other versions of torch; STBP_CUDA_OTHER_TORCH='2.10.0 2.13.0' runs it",
)
def test_the_same_binary_under_other_torches(tmp_path: Path) -> None:
    """This build's own files, in a new environment for each version of torch that STBP_CUDA_OTHER_TORCH names."""
    distribution = importlib.metadata.distribution("stbp_cuda")
    metadata = next(PACKAGE.parent.glob("stbp_cuda-*.dist-info"), None) or Path(str(distribution.locate_file("")))
    if not metadata.name.endswith(".dist-info"):  # an editable install keeps it apart from the package
        metadata = next(metadata.glob("stbp_cuda-*.dist-info"))
    for version in os.environ["STBP_CUDA_OTHER_TORCH"].split():
        home = tmp_path / version
        run(sys.executable, "-m", "venv", home, cwd=tmp_path)
        python = home / "bin" / "python"
        run(
            python,
            "-m",
            "pip",
            "install",
            f"torch=={version}",
            "numpy",
            "pytest",
            "hypothesis",
            "expecttest",
            cwd=tmp_path,
        )
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
        shutil.copytree(PACKAGE, site / PACKAGE.name)
        shutil.copytree(metadata, site / metadata.name)
        printed = run(python, "-m", "stbp_cuda.info", cwd=tmp_path)
        assert re.search(rf"^torch +{re.escape(version)}", printed, re.MULTILINE)
        # Older torches warn of themselves.
        run(
            *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"),
            *(ROOT / "tests" / name for name in CORE),
            cwd=tmp_path,
            STBP_CUDA_HYPOTHESIS="quick",
        )
        shutil.rmtree(home)


def test_source_distribution_and_wheel(tmp_path: Path, hasty_compiler: str) -> None:
    """The sdist holds what a build needs, and the wheel built from it what a user needs."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        *(".git", ".venv", "build", "data", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    build = "import setuptools.build_meta as b; print(b.build_{}('{}'))"
    run(sys.executable, "-c", build.format("sdist", tmp_path), cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for folder in ("csrc", "stbp_cuda", "tests", "bench", "examples", "docs", "scripts"):
        for path in (source / folder).rglob("*"):
            assert not path.is_file() or (unpacked / path.relative_to(source)).is_file(), path
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        assert (unpacked / name).is_file(), name

    run(sys.executable, "-c", build.format("wheel", tmp_path), cwd=unpacked, STBP_CUDA_BUILD="0", CXX=hasty_compiler)
    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"stbp_cuda-{stbp_cuda.__version__}-cp310-abi3-{platform}.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"stbp_cuda/{path.name}" for path in (source / "stbp_cuda").iterdir() if path.suffix in (".py", ".pyi")}
    info = f"stbp_cuda-{stbp_cuda.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == sources | {
        "stbp_cuda/_C.abi3.so",
        "stbp_cuda/py.typed",
    }
    assert info + "licenses/LICENSE" in names
    assert "License-Expression: MIT" in zipfile.ZipFile(wheel).read(info + "METADATA").decode()
