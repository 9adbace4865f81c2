"""Images and events as input for spiking networks, time-major: ``[T, B, ...]`` for batches, ``[T, ...]`` for one
recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import check_steps

__all__ = ["bernoulli", "direct", "event_frames"]


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
    _check_floating("intensities", intensities)
    check_steps(steps)
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
    _check_floating("current", current)
    check_steps(steps)
    return current.unsqueeze(0).expand(steps, *current.shape)


def event_frames(events: Any, sensor_size: Sequence[int], time_window: int, steps: int) -> Tensor:
    """The events of one recording counted in windows of equal length (N-MNIST and DVS-CIFAR10 in arXiv:1809.05793: 5 ms
    each), by ``tonic.transforms.ToFrame``.

    Window t holds the events from ``start + t * time_window`` up to, and without, ``start + (t + 1) * time_window``,
    with the first event for the start. What comes after the last window is left out, and windows after the end of the
    recording are zero, so that all recordings are of one length.

    Args:
        events: a numpy structured array with the fields x, y, p (0 or 1) and t (microseconds, never falling), as the
            data sets and readers of tonic give it.
        sensor_size: ``(width, height, 2)``, as tonic gives it.
        time_window: the length of a window in microseconds, a whole number.
        steps: the number of windows T.

    Returns:
        Counts ``[T, 2, H, W]`` in float32; channel p holds the events of polarity p.

    Raises:
        ImportError: tonic is not installed.
        TypeError: ``events`` is not a structured array with these fields.
        ValueError: an event lies outside of the sensor, the times fall, or another argument is out of range.
    """
    check_steps(steps)
    if isinstance(time_window, bool) or not isinstance(time_window, int) or time_window < 1:
        raise ValueError(f"time_window must be a positive whole number of microseconds, got {time_window!r}")
    sizes = tuple(sensor_size) if isinstance(sensor_size, Sequence) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[2] != 2:
        raise ValueError(f"sensor_size must be (width, height, 2), got {sensor_size}")
    fields = getattr(getattr(events, "dtype", None), "names", None) or ()
    if not {"x", "y", "p", "t"} <= set(fields):
        raise TypeError(
            f"events must be a structured array with fields x, y, p and t; got {type(events).__name__} with {fields}"
        )
    if len(events) == 0:  # for which tonic gives one frame, its height and width exchanged
        return torch.zeros(steps, 2, sizes[1], sizes[0])
    for field, size in zip("xyp", sizes, strict=True):
        low, high = int(events[field].min()), int(events[field].max())
        if low < 0 or high >= size:
            raise ValueError(f"events must have {field} from 0 to {size - 1}, got values from {low} to {high}")
    times = events["t"]
    if (times[1:] < times[:-1]).any():
        raise ValueError("events must be in the order of their times t")
    try:
        from tonic.transforms import ToFrame
    except ImportError as error:
        raise ImportError("event_frames needs tonic: pip install tonic") from error
    # Start and end together make exactly `steps` windows. Without an end, tonic would end at the last event: it leaves
    # out the window begun last, or with include_incomplete=True still an event on the edge of it.
    start = int(times[0])
    to_frame = ToFrame(sizes, time_window=time_window, start_time=start, end_time=start + steps * time_window)
    return torch.from_numpy(to_frame(events)).float()
