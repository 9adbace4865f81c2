"""Results on the CPU are torch's own tensors: nothing is kept when they are freed."""

import os

import harness
import memory
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stbp_cuda import functional


def test_the_profiler_sees_results_and_they_can_grow() -> None:
    x = torch.randn(16, 65536)
    functional.lif(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        spikes = functional.lif(x)
    assert sum(event.self_cpu_memory_usage for event in seen.key_averages()) >= spikes.nbytes
    expected = spikes.clone()
    spikes.resize_(32, 65536)
    assert torch.equal(spikes[:16], expected)


@pytest.mark.parametrize(("train", "alive"), [(False, 2), (True, 5)], ids=["inference", "training"])
def test_results_of_many_sizes_leave_no_memory_behind(train: bool, alive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recordings of growing length: what is alive, and not results of all sizes, 8.5 times the largest input.

    All that is alive is at most of that size, 64 MB, and so much malloc may keep as it comes.
    """
    for name in os.environ:
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")):
            monkeypatch.delenv(name)
    held = harness.in_fresh_process(memory.growing, train, torch.get_num_threads(), 16, 2**20)
    if held is None:
        pytest.skip("what a process holds is known on Linux only")
    most, kept = held
    assert most < alive + 1.5
    assert kept < 1.5
