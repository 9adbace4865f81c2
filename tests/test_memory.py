"""Large results on the CPU: their memory is kept and used again, and never while it is in use."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

import stbp_cuda
from stbp_cuda import functional

LARGE = (16, 65536)  # 4 MB
cached = pytest.mark.skipif(stbp_cuda.build_info()["cpu_cache_mb"] == 0, reason="needs torch >= 2.11")


@pytest.fixture(autouse=True)
def an_empty_cache() -> None:
    gc.collect()
    stbp_cuda.empty_cpu_cache()


@cached
def test_memory_is_used_again_and_given_back() -> None:
    x = torch.randn(LARGE)
    first = functional.lif(x)
    place, size = first.data_ptr(), first.nbytes
    second = functional.lif(x)
    assert second.data_ptr() != place
    del first
    third = functional.lif(x)
    assert third.data_ptr() == place
    assert torch.equal(second, third)
    del second, third
    assert 2 * size <= stbp_cuda.empty_cpu_cache() <= 2.3 * size
    assert stbp_cuda.empty_cpu_cache() == 0


@cached
@pytest.mark.parametrize("neurons", [4096, 5000, 65536, 70001, 1_000_003])
def test_every_size_finds_its_own_block(neurons: int) -> None:
    x = torch.randn(16, neurons)
    place = functional.lif(x).data_ptr()
    assert functional.lif(x).data_ptr() == place
    assert 0 <= stbp_cuda.empty_cpu_cache() - x.nbytes <= x.nbytes / 7 + 4096


def test_small_results_are_left_to_torch() -> None:
    functional.lif(torch.randn(4, 1000))
    assert stbp_cuda.empty_cpu_cache() == 0


@cached
def test_a_size_no_longer_used_is_given_back() -> None:
    functional.lif(torch.randn(LARGE))
    other = torch.randn(2, 65536)
    for _ in range(1100):
        functional.lif(other)
    assert stbp_cuda.empty_cpu_cache() < 2 * other.nbytes


def test_a_result_outlives_the_cache_and_other_threads() -> None:
    """Threads that take and free blocks at once, while one of them empties the cache."""
    inputs = [torch.randn(4, 40_000 + 9_000 * i) for i in range(4)]
    expected = [functional.lif(x, backend="reference") for x in inputs]
    wrong = []

    def work(x: torch.Tensor, spikes: torch.Tensor) -> None:
        kept = functional.lif(x)
        for _ in range(50):
            result = functional.lif(x)
            if not (torch.equal(result, spikes) and torch.equal(kept, spikes)):
                wrong.append(x.shape)
            stbp_cuda.empty_cpu_cache()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("megabytes", "kept"), [("0", 0), ("1", 0), ("5", 4 << 20)])
def test_the_limit(megabytes: str, kept: int) -> None:
    code = (
        "import torch, stbp_cuda; x = torch.randn(16, 65536); s = [stbp_cuda.functional.lif(x) for _ in range(3)];"
        "del s; print(stbp_cuda.build_info()['cpu_cache_mb'], stbp_cuda.empty_cpu_cache())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "STBP_CUDA_CPU_CACHE_MB": megabytes},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    limit, bytes_ = map(int, done.stdout.split())
    if stbp_cuda.build_info()["cpu_cache_mb"]:
        assert (limit, bytes_) == (int(megabytes), kept)
    else:
        assert (limit, bytes_) == (0, 0)


@cached
def test_a_training_step_runs_in_the_memory_of_the_one_before() -> None:
    x = torch.randn(LARGE, requires_grad=True)
    layer = stbp_cuda.LIFLayer()

    def step() -> tuple[int, int]:
        x.grad = None
        spikes = layer(x)
        spikes.backward(spikes)
        assert x.grad is not None
        return spikes.data_ptr(), x.grad.data_ptr()

    places = {step() for _ in range(5)}
    assert len({place for pair in places for place in pair}) == 2
