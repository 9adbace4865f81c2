"""Images and events as input for spiking networks, time-major: ``[T, B, ...]`` for batches, ``[T, ...]`` for one
recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_sizes, plain
from .engine import check_steps
from .tracing import fx_function

__all__ = ["bernoulli", "direct", "event_frames"]

BLOCK = 2**20  # events that are counted at once, at least


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}")


def bernoulli(intensities: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """Random spikes: at every step, each pixel fires with its intensity for the probability, independently of all else
    (MNIST in arXiv:1706.02609).

    Looks at all intensities to check their range, so that on a GPU the host waits for them.

    Args:
        intensities: ``[B, ...]``, in [0, 1]; any floating dtype.
        steps: the number of time steps T.
        generator: of the random numbers, on the device of ``intensities``; None for torch's default one.

    Returns:
        Spikes ``[T, B, ...]``, 0 or 1, in the dtype of ``intensities`` and without a gradient.

    Raises:
        TypeError: ``intensities`` is not a tensor of a floating dtype.
        ValueError: an intensity lies outside [0, 1] or is NaN; ``steps`` is not a positive integer.
    """
    node = fx_function(bernoulli, intensities, steps, generator)
    if node is not None:
        return node  # type: ignore[no-any-return]
    _check_floating("intensities", intensities)
    steps = check_steps(steps)
    intensities = intensities.detach()  # there is no gradient through chance
    if intensities.numel():
        low, high = (bound.item() for bound in intensities.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"intensities must lie in [0, 1], got values from {low:g} to {high:g}")
    return torch.bernoulli(intensities.expand(steps, *intensities.shape), generator=generator)


def direct(current: Tensor, steps: int) -> Tensor:
    """The same current at every step, as the encoding layer of arXiv:1809.05793 has it: the first layer of neurons
    turns a real-valued image into spikes.

    Args:
        current: ``[B, ...]``.
        steps: the number of time steps T.

    Returns:
        ``[T, B, ...]``: a view of ``current``, which takes no memory and must not be written to. What is computed from
        one step of it, a convolution for instance, is best computed from ``current``, once;
        :func:`stbp_cuda.network` does so.

    Raises:
        TypeError: ``current`` is not a tensor of a floating dtype.
        ValueError: ``steps`` is not a positive integer.
    """
    node = fx_function(direct, current, steps)
    if node is not None:
        return node  # type: ignore[no-any-return]
    _check_floating("current", current)
    steps = check_steps(steps)
    return current.unsqueeze(0).expand(steps, *current.shape)


def _check_field(events: Any, field: str, low: int, high: int) -> None:
    values = events[field]
    kinds = "biuf" if field == "p" else "iuf"
    if values.dtype.kind not in kinds or values.ndim != 1:
        raise TypeError(f"events must have one number as {field} of each event, got {events.dtype[field]}")
    least, most = values.min(), values.max()
    if not (low <= least and most <= high):  # also for NaN
        raise ValueError(f"events must have {field} from {low} to {high}, got values from {least} to {most}")
    if values.dtype.kind == "f":
        fractional = values % 1 != 0
        if fractional.any():
            raise ValueError(f"events must have whole numbers as {field}, got {values[fractional.argmax()]}")


def _windows(times: Any, start: Any, time_window: int, steps: int) -> Any:
    """The window of each time, ``steps`` for those after the last one."""
    if times.dtype.kind == "f":
        edges = np.float64(start) + np.arange(1, steps + 1, dtype=np.float64) * time_window
        return np.searchsorted(edges, times, side="right")
    # Unsigned, so that no difference overflows.
    since = times.astype(np.uint64) - np.asarray(start).astype(np.uint64)
    return np.minimum(since // np.uint64(time_window), np.uint64(steps)).astype(np.intp)


def event_frames(events: Any, sensor_size: Sequence[int], time_window: int, steps: int) -> Tensor:
    """The events of one recording counted in windows of equal length (N-MNIST and DVS-CIFAR10 in arXiv:1809.05793: 5 ms
    each).

    Window t holds the events from ``start + t * time_window`` up to, and without, ``start + (t + 1) * time_window``,
    with the first event for the start. What comes after the last window is left out, and windows after the end of the
    recording are zero, so that all recordings are of one length. The ends of windows are exact for integer times; for
    floating times they are computed in float64.

    Args:
        events: a numpy structured array with the fields x, y, p and t, as the data sets and readers of tonic give it.
            x and y are whole numbers, of an integer or a floating dtype. The polarity p is 0 or 1, False or True, or
            -1 or 1. The time t in microseconds is an integer or floating number that never falls.
        sensor_size: ``(width, height, 2)``, as tonic gives it.
        time_window: the length of a window in microseconds, a whole number.
        steps: the number of windows T.

    Returns:
        Counts ``[T, 2, H, W]``, always in float32 and on the CPU; channel 1 holds the events of polarity 1, channel 0
        all others. Counts up to 2**24 are exact, larger ones rounded to float32.

    Raises:
        TypeError: ``events`` is not a one-dimensional structured array with these fields, or a field holds no numbers.
        ValueError: an event lies outside of the sensor or between its pixels, has another polarity or a time that is
            NaN or infinite; the times fall; or another argument is out of range.
    """
    steps, window = check_steps(steps), plain(time_window)
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < 2**63:
        raise ValueError(
            f"time_window must be a positive whole number of microseconds below 2**63, got {time_window!r}"
        )
    sizes = check_sizes(sensor_size)
    if len(sizes) != 3 or sizes[2] != 2:
        raise ValueError(f"sensor_size must be (width, height, 2), got {sensor_size}")
    fields = getattr(getattr(events, "dtype", None), "names", None) or ()
    if not isinstance(events, np.ndarray) or not {"x", "y", "p", "t"} <= set(fields):
        raise TypeError(
            f"events must be a structured array with fields x, y, p and t; got {type(events).__name__} with {fields}"
        )
    if events.ndim != 1:
        raise TypeError(f"events must be a one-dimensional array, got shape {events.shape}")
    width, height, _ = sizes
    shape = (steps, 2, height, width)
    counts = np.zeros(math.prod(shape), np.int64)
    if len(events):
        for field, low, high in (("x", 0, width - 1), ("y", 0, height - 1), ("p", -1, 1)):
            _check_field(events, field, low, high)
        times = events["t"]
        if times.dtype.kind not in "iuf" or times.ndim != 1:
            raise TypeError(f"events must have one number as t of each event, got {events.dtype['t']}")
        if not (np.isfinite(times[0]) and np.isfinite(times.max())):  # the largest is NaN if any is
            raise ValueError("events must have finite times t")
        if (times[1:] < times[:-1]).any():
            raise ValueError("events must be in the order of their times t")
        if events["p"].min() < 0 and (events["p"] == 0).any():
            raise ValueError("events must have p of 0 and 1, or of -1 and 1, got all three")
        # In blocks, so that the indices take no more memory than the counts, or some megabytes.
        block = max(len(counts), BLOCK)
        for part in (events[first : first + block] for first in range(0, len(events), block)):
            step = _windows(part["t"], times[0], window, steps)
            part = part[step < steps]
            index = step[step < steps]
            for size, field in ((2, part["p"] > 0), (height, part["y"]), (width, part["x"])):
                index = index * size + field.astype(np.intp)
            counts += np.bincount(index, minlength=len(counts))
    return torch.from_numpy(counts.astype(np.float32).reshape(shape))
