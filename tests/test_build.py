"""The binary: what it says of itself, what it needs, every instruction set in it, other torches, and the packages."""

import importlib.metadata
import importlib.util
import json
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
from typing import Any

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
    printed = run(sys.executable, "-m", "stbp_cuda.info", cwd=tmp_path, MALLOC_MMAP_MAX_="0")
    assert re.search(r"^malloc +(\S+ )*MALLOC_MMAP_MAX_=0", printed, re.MULTILINE)
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


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


KNOWN = "compute_50 compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_103 compute_121"
NVCC = f"""case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";;
*--list-gpu-arch*) printf '%s\\n' {KNOWN};;
*90a*) ;;
*--dryrun*) exit 1;;
esac"""
DEFAULT = ["7.5", "8.0", "9.0", "10.0", "12.1+PTX"]  # one of each generation, the newest also for what comes after


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, with no nvcc and no nvidia-smi but those in tmp_path."""
    for name in ("STBP_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", DEFAULT),
        ("8.6;9.0+PTX", ["8.6", "9.0+PTX"]),
        ("8.6 9.0a", ["8.6", "9.0a"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("Hopper", ["9.0+PTX"]),
        ("Ampere+Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        ("Turing;8.0+PTX Ada", ["7.5+PTX", "8.0+PTX", "8.9+PTX"]),
        ("Common", DEFAULT),
        ("All", ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.1+PTX"]),
        ("Auto", DEFAULT),
        ("native", DEFAULT),
        # What nvcc does not know.
        ("7.0", DEFAULT),
        ("7.0;8.0;7.5a", ["8.0"]),
        ("Kepler+Pascal", DEFAULT),
        ("Maxwell+Tegra", DEFAULT),
        ("Blackwell", ["10.0", "10.3", "12.1+PTX"]),
    ],
)
def test_listed_architectures(
    listed: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: dict[str, Any]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert setup["architectures"](write_script(tmp_path / "nvcc", NVCC)) == expected


@pytest.mark.parametrize("listed", ["Amper", "90", "PTX", "9.0+SASS", "sm_90", "8.0,9.0"])
def test_what_is_no_architecture_is_refused(
    listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: dict[str, Any]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match=rf"TORCH_CUDA_ARCH_LIST must .*Ampere.*, got {re.escape(repr(listed))}"):
        setup["architectures"](write_script(tmp_path / "nvcc", NVCC))


@pytest.mark.parametrize(
    ("nvidia_smi", "expected", "said"),
    [
        ("echo 9.0; echo 8.0; echo 9.0", ["8.0", "9.0"], ""),
        ("echo 7.0", DEFAULT, "not know them: 7.0"),
        ("echo 7.0; echo 8.9; echo 6.1", ["8.9"], "not know them: 6.1 7.0"),
        ("echo 8.7", ["8.6+PTX"], ""),  # newer than what nvcc knows, as the next
        ("echo 13.0", ["12.1+PTX"], ""),
        ("echo [N/A]", DEFAULT, "[N/A]"),
        ("echo 9.0; echo Unknown Error", ["9.0"], "Unknown Error"),
        ("echo Failed to initialize NVML: Driver/library version mismatch", DEFAULT, "Failed to initialize NVML"),
        ("echo No devices were found; exit 6", DEFAULT, "exit status 6: No devices were found"),
        ("printf '\\377\\376'", DEFAULT, "does not tell"),
        ("", DEFAULT, ""),
    ],
)
def test_architectures_of_the_gpus(
    nvidia_smi: str,
    expected: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setup: dict[str, Any],
) -> None:
    write_script(tmp_path / "nvidia-smi", nvidia_smi)
    assert setup["architectures"](write_script(tmp_path / "nvcc", NVCC)) == expected
    printed = capsys.readouterr().out
    assert said in printed
    assert bool(printed) == bool(said)


FAILING = "echo In file included from x; echo error: unsupported GNU version; exit 1"
BROKEN = {  # a script, and what is said of it
    "not executable": ("", "Permission denied"),
    "no program": ("", "Exec format error"),
    "an error": ("echo cannot load libtinfo.so.5 >&2; exit 127", "exit status 127: cannot load libtinfo.so.5"),
    "nothing": ("", "does not tell its version"),
    "too old": (NVCC.replace(KNOWN, "compute_35 compute_70"), "knows no architecture from 7.5 on"),
    "an unsupported host compiler": (
        NVCC.replace("*90a*)", f"*trial*) {FAILING};;\n*90a*)"),
        "exit status 1: error: unsupported GNU version",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_nvcc_that_does_not_work(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setup: dict[str, Any],
) -> None:
    """The next is taken; where there is none, there are no CUDA kernels, unless they are demanded."""
    script, message = BROKEN[kind]
    broken = write_script(tmp_path / "cuda" / "bin" / "nvcc", script)
    if kind == "not executable":
        broken.chmod(0o644)
    if kind == "no program":
        broken.write_bytes(b"\x7fELF, but of another machine")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert setup["find_nvcc"]() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert message in line
    assert str(broken) in line
    assert "STBP_CUDA_BUILD=0" in line

    monkeypatch.setenv("STBP_CUDA_BUILD", "1")
    with pytest.raises(SystemExit, match=f"STBP_CUDA_BUILD=1, but {re.escape(str(broken))} does not work"):
        setup["find_nvcc"]()

    good = write_script(tmp_path / "nvcc", NVCC)
    assert setup["find_nvcc"]() == good.resolve()


def test_the_layout_of_nvidias_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build requirements bring libraries in lib, and neither lib64 nor targets."""
    find_nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    said = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=True).stderr
    toolkit = Path(re.findall(r"^#\$ TOP=(.*)", said, re.MULTILINE)[0])
    home = tmp_path / f"{ODD} cuda"
    (home / "bin").mkdir(parents=True)
    for program in (toolkit / "bin").iterdir():
        if program.name in ("nvcc", "nvcc.profile"):
            shutil.copy(program, home / "bin")
        else:
            (home / "bin" / program.name).symlink_to(program)
    for name, folder in {"include": "include", "nvvm": "nvvm", "lib": "lib64"}.items():
        (home / name).symlink_to((toolkit / folder).resolve())
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert find_nvcc() == home / "bin" / "nvcc"


ODD = "it's $HOME `id` \"b #1 & (c); \\d %e *?[f] {g} ~<h>|!i"
SOURCES = {
    "csrc/answer.h": "#define ANSWER 42",
    "csrc/cpu/ops.cpp": """#include <Python.h>
#include <torch/headeronly/version.h>
#include "../answer.h"
namespace {
#if defined(STBP_CUDA)
const char* const compiler = STBP_CUDA_COMPILER " " STBP_CUDA_ARCHITECTURES;
#else
const char* const compiler = "";
#endif
PyObject* build_info(PyObject*, PyObject*) { return Py_BuildValue("sis", TORCH_VERSION, ANSWER, compiler); }
PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
}  // namespace
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
""",
    "csrc/cuda/kernel.cu": '#include "../answer.h"\n__global__ void kernel(int* x) { *x = ANSWER; }\n',
    "stbp_cuda/__init__.py": "",
}


def write_project(project: Path) -> None:
    """A package that is built as this one, of sources that compile in no time."""
    for name, text in SOURCES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)


def test_paths_with_odd_characters(tmp_path: Path, hasty_compiler: str) -> None:
    """The sources, the environment, the compiler, the temporary files: with nvcc, too, where there is one."""
    project = tmp_path / f"{ODD}: source"
    write_project(project)
    site = tmp_path / f"{ODD} site"
    site.symlink_to(Path(torch.__file__).parent.parent)
    compiler = tmp_path / "my $HOME (c++)"  # without quotes, which setuptools takes for those of a shell
    compiler.symlink_to(hasty_compiler)
    temporary = tmp_path / f"{ODD} tmp"
    temporary.mkdir()
    environment = {
        "PYTHONPATH": str(site),
        "CXX": str(compiler),
        "TMPDIR": str(temporary),
        "TORCH_CUDA_ARCH_LIST": "8.0",
    }
    nvcc = runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]()
    if nvcc:
        environment["CUDA_HOME"] = str(tmp_path / f"{ODD} cuda")
        bin_folder = Path(environment["CUDA_HOME"]) / "bin"
        bin_folder.mkdir(parents=True)
        write_script(bin_folder / "nvcc", f'exec "{nvcc}" "$@"')

    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run(*build, cwd=project, **environment)
    (project / "csrc" / "answer.h").write_text("#define ANSWER 43")  # ninja must know what a file includes
    run(*build, cwd=project, **environment)
    script = "import json, torch; from stbp_cuda import _C; print(json.dumps(_C.build_info()))"
    version, answer, compiled = json.loads(run(sys.executable, "-c", script, cwd=project))
    assert version in torch.__version__
    assert answer == 43
    assert bool(compiled) == bool(nvcc)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/nowhere/c++", "stbp_cuda: there is no C++ compiler '/nowhere/c++': install one, or name yours in CXX"),
        ("false", "stbp_cuda: it does not compile, see above"),
    ],
)
def test_what_does_not_compile_ends_in_one_line(compiler: str, message: str, tmp_path: Path) -> None:
    write_project(tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CXX": compiler, "STBP_CUDA_BUILD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == message


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


# Looks for all that a source includes, and makes an object of nothing: that the kernels compile, this very build shows.
PREPROCESSOR = """for argument; do
  [ "$before" != -o ] || output=$argument
  before=$argument
done
case " $* " in
  *" -c "*) $COMPILER "$@" -E && exec $COMPILER -x c++ /dev/null -fPIC -c -o "$output" ;;
  *) exec $COMPILER "$@" ;;
esac"""


def test_source_distribution_and_wheel(tmp_path: Path) -> None:
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

    compiler = write_script(tmp_path / "c++", PREPROCESSOR)
    environment = {"STBP_CUDA_BUILD": "0", "COMPILER": os.environ.get("CXX", "g++"), "CXX": str(compiler)}
    run(sys.executable, "-c", build.format("wheel", tmp_path), cwd=unpacked, **environment)
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
    metadata = zipfile.ZipFile(wheel).read(info + "METADATA").decode()
    assert "License-Expression: MIT" in metadata
    assert "Requires-Dist: numpy\n" in metadata  # without which torch warns
