"""Encodings: what they count and draw, by hand and against a plain count."""

import math
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


def numbers(**fields: Any) -> Any:
    """One event, with fields of the dtypes of what is given."""
    values = {"x": 0, "y": 0, "t": 0, "p": 0, **fields}
    return np.array([tuple(values.values())], [(name, np.array(value).dtype) for name, value in values.items()])


def frames(events: Any, time_window: int, steps: int) -> torch.Tensor:
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


def with_fields(events: Any, **dtypes: Any) -> Any:
    """The same events with other dtypes of some fields."""
    return events.astype([(name, dtypes.get(name, EVENT[name])) for name in EVENT.names])


@pytest.mark.parametrize("count", [256, 40_000, 2**16 + 1, 3 * 2**20 + 1])  # the last one in several blocks
def test_event_frames_count_many_events_on_one_pixel(count: int) -> None:
    events = np.broadcast_to(recording((2, 1, 7, 1)), (count,))
    found = frames(events, 10, 2)
    assert found[0, 1, 1, 2] == found.sum() == count


@pytest.mark.skipif(os.environ.get("STBP_CUDA_HYPOTHESIS") != "search", reason="takes two minutes; search runs it")
def test_event_frames_count_to_2_to_the_31st() -> None:
    events = np.broadcast_to(recording((2, 1, 7, 1)), (2**31,))
    assert frames(events, 10, 1)[0, 1, 1, 2] == 2**31


def test_event_frames_take_a_recording_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows count from the first event of all, whatever block an event is in."""
    monkeypatch.setattr(encoding, "BLOCK", 5)
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(1000, 4000, 2000))
    events = recording(*((*rng.integers(0, 3, 2).tolist(), t, t % 2) for t in times.tolist()))
    expected = torch.zeros(4, 2, 4, 3)
    for x, y, t, p in events.tolist():
        if (t - times[0]) // 700 < 4:
            expected[(t - times[0]) // 700, int(p), y, x] += 1
    assert torch.equal(frames(events, 700, 4), expected)


@pytest.mark.parametrize(
    ("times", "windows"),
    [
        ([5.9, 15.2, 15.9, 25.85], [0, 0, 1, 1]),
        ([-0.5, 9.25, 9.5, 29.0], [0, 0, 1, 2]),
        ([0.1, 10.1, 20.1], [0, 1, 2]),  # 10.1 is an end of a window, 10.1 - 0.1 less than 10
        ([1e15 + 0.125, 1e15 + 10, 1e15 + 10.125], [0, 0, 1]),
    ],
)
def test_event_frames_of_floating_times(times: list[float], windows: list[int]) -> None:
    events = with_fields(recording(*[(i % 3, i // 3, 0, 1) for i in range(len(times))]), t=np.float64)
    events["t"] = times
    found = frames(events, 10, 3)
    assert [int(found[:, 1, i // 3, i % 3].argmax()) for i in range(len(times))] == windows
    assert found.sum() == len(times)


@pytest.mark.parametrize(
    ("dtype", "start"),
    [
        (np.int64, -(2**63)),
        (np.int64, 2**63 - 1 - 250),
        (np.uint64, 2**64 - 1 - 250),
        (np.int16, -125),
        (np.uint8, 5),
        (np.uint32, 2**32 - 1 - 250),
        (np.int32, -(2**31)),
        (np.float32, 0.25),
        (np.dtype(">u4"), 77),
    ],
)
def test_event_frames_of_times_in_any_dtype(dtype: Any, start: float) -> None:
    events = with_fields(recording((0, 0, 0, 1), (1, 0, 0, 1), (2, 0, 0, 1), (0, 1, 0, 1)), t=dtype)
    events["t"] = [start, start + 99, start + 100, start + 250]
    assert frames(events, 100, 3).nonzero().tolist() == [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 2], [2, 1, 1, 0]]
    assert frames(events, 2**63 - 1, 2).sum(0).equal(frames(events, 251, 1)[0])


def test_event_frames_of_the_longest_recording() -> None:
    events = recording((0, 0, -(2**63), 1), (1, 0, 2**63 - 1, 1))
    assert frames(events, 2**63 - 1, 3).nonzero().tolist() == [[0, 1, 0, 0], [2, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.float32])
@pytest.mark.parametrize("off", [0, -1])
def test_event_frames_of_either_convention_of_polarities(dtype: Any, off: int) -> None:
    events = with_fields(recording((0, 0, 1, 0), (1, 0, 2, 0), (2, 3, 3, 0)), p=dtype)
    if np.dtype(dtype).kind in "bu" and off:
        pytest.skip("holds nothing negative")
    events["p"] = [1, off, off]
    assert frames(events, 10, 1).nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 3, 2], [0, 1, 0, 0]]
    assert frames(events[1:], 10, 1)[0, 0].sum() == 2


def test_event_frames_of_floating_coordinates() -> None:
    events = recording((0, 3, 1, 0), (2, 0, 2, 1))
    assert torch.equal(frames(with_fields(events, x=np.float32, y=np.float64), 10, 2), frames(events, 10, 2))


@pytest.mark.parametrize("fields", [{}, {"t": np.float64}, {"x": np.float64}])
def test_event_frames_are_of_one_dtype_and_device(fields: dict[str, Any]) -> None:
    """For an empty recording, too, whatever torch's defaults are."""
    some = with_fields(recording((0, 0, 0, 1)), **fields)
    for default in torch.float64, torch.bfloat16:
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(default)
            with torch.device("meta"):
                found = [frames(events, 10, 2) for events in (some, some[:0])]
        finally:
            torch.set_default_dtype(before)
        for each in found:
            assert (each.dtype, each.device.type, each.shape) == (torch.float32, "cpu", (2, 2, 4, 3))


def test_event_frames_take_whole_numbers_of_any_kind() -> None:
    events = recording((2, 1, 7, 1), (2, 1, 17, 1))
    expected = frames(events, 10, 2)
    for kind in np.int64, np.uint8, torch.tensor:
        size = [kind(length) for length in SENSOR]
        assert torch.equal(encoding.event_frames(events, size, kind(10), 2), expected)
    assert torch.equal(encoding.event_frames(events, np.array(SENSOR), 10, 2), expected)


def test_event_frames_are_those_of_tonic() -> None:
    """Of so few events that tonic's int16 holds them."""
    transforms = pytest.importorskip("tonic.transforms")
    rng = np.random.default_rng(1)
    times = np.sort(rng.integers(0, 3000, 500)).tolist()
    events = recording(*((*rng.integers(0, 3, 2).tolist(), t, t % 2) for t in times))
    to_frame = transforms.ToFrame(SENSOR, time_window=250, start_time=times[0], end_time=times[0] + 2000)
    assert torch.equal(frames(events, 250, 8), torch.from_numpy(to_frame(events)).float())


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
        (numbers(p=2), {}, ValueError, "events must have p from -1 to 1, got values from 2 to 2"),
        (numbers(p=np.uint8(255)), {}, ValueError, "events must have p from -1 to 1, got values from 255 to 255"),
        (np.concatenate([numbers(p=p) for p in (-1, 0, 1)]), {}, ValueError, "p of 0 and 1, or of -1 and 1, got all"),
        (numbers(p=0.5), {}, ValueError, "events must have whole numbers as p, got 0.5"),
        (numbers(x=1.5), {}, ValueError, "events must have whole numbers as x, got 1.5"),
        (numbers(y=math.nan), {}, ValueError, "events must have y from 0 to 3, got values from nan to nan"),
        (numbers(x=math.inf), {}, ValueError, "events must have x from 0 to 2, got values from inf to inf"),
        (numbers(x=2**63), {}, ValueError, "events must have x from 0 to 2, got values from 9223372036854775808 to"),
        (numbers(x="1"), {}, TypeError, "events must have one number as x of each event, got <U1"),
        (numbers(y=True), {}, TypeError, "events must have one number as y of each event, got bool"),
        (numbers(x=None), {}, TypeError, "events must have one number as x of each event, got object"),
        (numbers(t=np.datetime64(5, "us")), {}, TypeError, "events must have one number as t of each event, got date"),
        (numbers(t=math.nan), {}, ValueError, "events must have finite times t"),
        (np.concatenate([numbers(t=t) for t in (0.0, math.nan, 1.0)]), {}, ValueError, "must have finite times t"),
        (np.concatenate([numbers(t=t) for t in (0.0, math.inf)]), {}, ValueError, "must have finite times t"),
        (np.concatenate([numbers(t=t) for t in (-math.inf, 0.0)]), {}, ValueError, "must have finite times t"),
        (np.zeros(2, [*EVENT.descr[:2], ("t", np.int64, 2), ("p", bool)]), {}, TypeError, "one number as t of each"),
        (np.zeros((2, 3), EVENT), {}, TypeError, "events must be a one-dimensional array, got shape (2, 3)"),
        (np.zeros((), EVENT), {}, TypeError, "events must be a one-dimensional array, got shape ()"),
        (np.zeros(1, EVENT)[0], {}, TypeError, "events must be a structured array with fields x, y, p and t; got void"),
        (recording((0, 0, 5, 0), (0, 0, 4, 0)), {}, ValueError, "events must be in the order of their times t"),
        (recording(), {"sensor_size": (3, 4)}, ValueError, "sensor_size must be (width, height, 2), got (3, 4)"),
        (recording(), {"sensor_size": 34}, ValueError, "sensor_size must be (width, height, 2), got 34"),
        (recording(), {"sensor_size": (3.0, 4, 2)}, ValueError, "sensor_size must be (width, height, 2), got (3.0, 4,"),
        (recording(), {"sensor_size": (3, 4, 1)}, ValueError, "sensor_size must be (width, height, 2), got (3, 4, 1)"),
        (recording(), {"time_window": 0}, ValueError, "time_window must be a positive whole number of microseconds"),
        (recording(), {"time_window": 0.5}, ValueError, "time_window must be a positive whole number of microseconds"),
        (recording(), {"time_window": True}, ValueError, "time_window must be a positive whole number of microseconds"),
        (recording(), {"time_window": math.nan}, ValueError, "time_window must be a positive whole number"),
        (recording(), {"time_window": 2**63}, ValueError, "time_window must be a positive whole number of microsec"),
        (recording(), {"sensor_size": (True, 4, 2)}, ValueError, "sensor_size must be (width, height, 2), got (True,"),
        (recording(), {"sensor_size": "342"}, ValueError, "sensor_size must be (width, height, 2), got 342"),
        (recording(), {"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
    ],
)
def test_event_frames_refuse(events: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encoding.event_frames(events, **{"sensor_size": SENSOR, "time_window": 100, "steps": 3, **options})


def test_event_frames_need_no_tonic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tonic", None)
    monkeypatch.setitem(sys.modules, "tonic.transforms", None)
    assert encoding.event_frames(recording((0, 0, 0, 0)), SENSOR, 100, 3).sum() == 1
