"""Encodings: what they count and draw, by hand and against a plain count."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stbp_cuda import encoding

EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])  # as tonic orders them
SENSOR = (3, 4, 2)  # width, height, polarities


def recording(*events: tuple[int, int, int, int]) -> Any:
    """Of events (x, y, t, p)."""
    return np.array(list(events), dtype=EVENT)


def frames(events: Any, time_window: int, steps: int) -> torch.Tensor:
    pytest.importorskip("tonic")
    return encoding.event_frames(events, SENSOR, time_window, steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bernoulli_fires_with_the_probability_of_the_intensity(dtype: torch.dtype, device: str) -> None:
    intensities = torch.tensor([[0.0, 0.001, 0.3, 0.999, 1.0]], device=device).to(dtype).repeat(40, 1)
    generator = torch.Generator(device).manual_seed(0)
    spikes = encoding.bernoulli(intensities, 1000, generator)
    assert spikes.shape == (1000, 40, 5)
    assert spikes.dtype == dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    p = intensities[0].double()
    rates = spikes.double().mean((0, 1))
    assert ((rates - p).abs() <= 5 * (p * (1 - p) / 40_000).sqrt()).all()  # so that 0 never fires, and 1 always does


def test_bernoulli_is_independent_between_steps_samples_and_pixels(device: str) -> None:
    generator = torch.Generator(device).manual_seed(1)
    spikes = encoding.bernoulli(torch.full((3, 2), 0.5, device=device), 10_000, generator).flatten(1)
    both = torch.cat([spikes[1:], spikes[:-1]], 1)  # with the step before
    correlation = torch.corrcoef(both.T) - torch.eye(12, device=device)
    assert correlation.abs().max() < 0.05  # 5 standard deviations


def test_bernoulli_repeats_itself_with_its_generator(device: str) -> None:
    intensities = torch.rand(4, 1, 5, 5, device=device)
    first, second, third = (
        encoding.bernoulli(intensities, 6, torch.Generator(device).manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    torch.manual_seed(5)
    first = encoding.bernoulli(intensities, 6)
    torch.manual_seed(5)
    assert torch.equal(first, encoding.bernoulli(intensities, 6))


def test_bernoulli_has_no_gradient(device: str) -> None:
    assert not encoding.bernoulli(torch.rand(3, device=device, requires_grad=True), 2).requires_grad


def test_bernoulli_of_an_empty_batch(device: str) -> None:
    assert encoding.bernoulli(torch.zeros(0, 7, device=device), 3).shape == (3, 0, 7)


@pytest.mark.parametrize(
    ("intensities", "steps", "error", "message"),
    [
        ([0.5], 3, TypeError, "intensities must be a tensor, got list"),
        (torch.tensor([1]), 3, TypeError, "intensities must be of a floating dtype, got torch.int64"),
        (torch.tensor([0.5, 1.5]), 3, ValueError, "intensities must lie in [0, 1], got values from 0.5 to 1.5"),
        (torch.tensor([-0.25, 0.5]), 3, ValueError, "intensities must lie in [0, 1], got values from -0.25 to 0.5"),
        (torch.tensor([0.5, torch.nan]), 3, ValueError, "intensities must lie in [0, 1], got values from nan to nan"),
        (torch.tensor([0.5]), 0, ValueError, "steps must be a positive integer, got 0"),
        (torch.tensor([0.5]), 2.0, ValueError, "steps must be a positive integer, got 2.0"),
        (torch.tensor([0.5]), True, ValueError, "steps must be a positive integer, got True"),
    ],
)
def test_bernoulli_refuses(intensities: Any, steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encoding.bernoulli(intensities, steps)


def test_direct_is_a_view_and_has_the_gradient_of_all_steps(device: str) -> None:
    current = torch.randn(2, 3, device=device, requires_grad=True)
    steps = encoding.direct(current, 4)
    assert torch.equal(steps, torch.stack([current] * 4))
    assert steps.data_ptr() == current.data_ptr()
    weight = torch.randn(4, 2, 3, device=device)
    (gradient,) = torch.autograd.grad((steps * weight).sum(), current)
    torch.testing.assert_close(gradient, weight.sum(0))


def test_direct_refuses() -> None:
    with pytest.raises(TypeError, match=r"current must be of a floating dtype, got torch\.uint8"):
        encoding.direct(torch.zeros(2, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="steps must be a positive integer, got -1"):
        encoding.direct(torch.zeros(2), -1)


def test_event_frames_counted_by_hand() -> None:
    """Windows of 100 us from the first event on: 1000-1099, 1100-1199, 1200-1299; the last event is out of them."""
    events = recording((1, 0, 1000, 1), (1, 0, 1099, 1), (2, 3, 1100, 0), (0, 2, 1299, 1), (0, 0, 1300, 0))
    expected = torch.zeros(3, 2, 4, 3)
    expected[0, 1, 0, 1] = 2
    expected[1, 0, 3, 2] = 1
    expected[2, 1, 2, 0] = 1
    found = frames(events, 100, 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_event_frames_pad_and_keep_an_event_on_an_edge() -> None:
    events = recording((1, 0, 1000, 1), (0, 0, 1100, 0))
    found = frames(events, 100, 4)
    assert found.nonzero().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert torch.equal(found[:2], frames(events, 100, 2))


def test_event_frames_of_an_empty_recording() -> None:
    assert torch.equal(encoding.event_frames(recording(), SENSOR, 100, 5), torch.zeros(5, 2, 4, 3))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 500), st.integers(0, 1)), min_size=1),
    st.integers(1, 200),
    st.integers(1, 6),
)
def test_event_frames_are_a_plain_count(events: list[tuple[int, int, int, int]], time_window: int, steps: int) -> None:
    events.sort(key=lambda event: event[2])
    expected = torch.zeros(steps, 2, 4, 3)
    for x, y, t, p in events:
        window = (t - events[0][2]) // time_window
        if window < steps:
            expected[window, p, y, x] += 1
    array = recording(*events)
    assert torch.equal(frames(array, time_window, steps), expected)
    assert array.tolist() == recording(*events).tolist()  # not written to


def test_event_frames_of_a_recording_of_nmnist() -> None:
    tonic = pytest.importorskip("tonic")
    files = sorted((Path(os.environ.get("STBP_CUDA_DATA", "")) / "NMNIST" / "Test").glob("*/*.bin"))
    if not files:
        pytest.skip("STBP_CUDA_DATA names no folder with NMNIST/Test")
    events = tonic.io.read_mnist_file(files[0], dtype=EVENT)
    found = encoding.event_frames(events, (34, 34, 2), 5000, 30)
    within = events[events["t"] < events["t"][0] + 150_000]
    assert found.shape == (30, 2, 34, 34)
    assert found.sum() == len(within) > 1000
    for p in range(2):
        assert found[:, p].sum() == (within["p"] == p).sum()


@pytest.mark.parametrize(
    ("events", "options", "error", "message"),
    [
        (np.zeros((3, 4)), {}, TypeError, "events must be a structured array with fields x, y, p and t; got ndarray"),
        ([(0, 0, 0, 0)], {}, TypeError, "events must be a structured array with fields x, y, p and t; got list"),
        (recording((3, 0, 0, 0)), {}, ValueError, "events must have x from 0 to 2, got values from 3 to 3"),
        (recording((0, -1, 0, 0)), {}, ValueError, "events must have y from 0 to 3, got values from -1 to -1"),
        (recording((0, 0, 5, 0), (0, 0, 4, 0)), {}, ValueError, "events must be in the order of their times t"),
        (recording(), {"sensor_size": (3, 4)}, ValueError, "sensor_size must be (width, height, 2), got (3, 4)"),
        (recording(), {"sensor_size": 34}, ValueError, "sensor_size must be (width, height, 2), got 34"),
        (recording(), {"sensor_size": (3.0, 4, 2)}, ValueError, "sensor_size must be (width, height, 2), got (3.0, 4,"),
        (recording(), {"sensor_size": (3, 4, 1)}, ValueError, "sensor_size must be (width, height, 2), got (3, 4, 1)"),
        (recording(), {"time_window": 0}, ValueError, "time_window must be a positive whole number of microseconds"),
        (recording(), {"time_window": 0.5}, ValueError, "time_window must be a positive whole number of microseconds"),
        (recording(), {"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
    ],
)
def test_event_frames_refuse(events: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encoding.event_frames(events, **{"sensor_size": SENSOR, "time_window": 100, "steps": 3, **options})


def test_event_frames_without_tonic_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tonic.transforms", None)
    with pytest.raises(ImportError, match="event_frames needs tonic: pip install tonic"):
        encoding.event_frames(recording((0, 0, 0, 0)), SENSOR, 100, 3)
