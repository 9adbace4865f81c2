"""Bad input: what was wrong, in which argument, what is accepted; and before any work."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import stbp_cuda
from stbp_cuda import functional, ops
from stbp_cuda.surrogate import Surrogate

X = torch.zeros(6, 4, 3)

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decay": -0.1}, ValueError, "decay must lie in [0, 1], got -0.1"),
    ({"decay": 1.01}, ValueError, "decay must lie in [0, 1], got 1.01"),
    ({"decay": math.nan}, ValueError, "decay must be finite in float32, got nan"),
    ({"decay": "0.5"}, TypeError, "decay must be a number, got '0.5'"),
    ({"decay": torch.tensor([0.5])}, TypeError, "decay must be a number, got tensor([0.5000])"),
    ({"v_threshold": math.inf}, ValueError, "v_threshold must be finite in float32, got inf"),
    ({"v_threshold": 1e39}, ValueError, "v_threshold must be finite in float32, got 1e+39"),
    ({"v_threshold": 0.0}, ValueError, "v_threshold must lie above v_reset, got v_threshold=0.0, v_reset=0.0"),
    ({"v_threshold": True}, TypeError, "v_threshold must be a number, got True"),
    ({"v_threshold": 0.5, "v_reset": 0.5}, ValueError, "v_threshold must lie above v_reset"),
    ({"v_threshold": -1.0, "reset": "soft"}, ValueError, "v_threshold must lie above 0, the potential of rest"),
    ({"v_reset": math.nan}, ValueError, "v_reset must be finite in float32, got nan"),
    ({"v_reset": 0.1, "reset": "soft"}, ValueError, "v_reset belongs to reset='hard'"),
    ({"reset": "medium"}, ValueError, "reset must be one of hard, soft, got 'medium'"),
    ({"surrogate": "triangle"}, ValueError, "surrogate must be one of rectangular, polynomial, sigmoid, gaussian, "),
    ({"surrogate": 1.0}, TypeError, "surrogate must be a name or a stbp_cuda.surrogate.Surrogate, got 1.0"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, fused, reference, got 'cuda'"),
    ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
    ({"steps": 2.0}, ValueError, "steps must be a positive integer, got 2.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        stbp_cuda.LIFLayer(**options)
    with pytest.raises(error, match=re.escape(message)):
        functional.lif(X, **options)


@pytest.mark.parametrize("backend", functional.BACKENDS)
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor, got list"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, TypeError, "x must be of dtype torch.float64, torch.float32, "),
        (torch.zeros(3, 4, dtype=torch.complex64), {}, TypeError, "got torch.complex64"),
        (torch.zeros(3, 4).to_sparse(), {}, TypeError, "x must be a strided tensor, got layout torch.sparse_coo"),
        (torch.tensor(1.0), {}, ValueError, "x must have a time dimension, [T, ...] or with steps=T [T*B, ...]"),
        (torch.zeros(0, 4), {}, ValueError, "x must have at least one time step in its first dimension, got shape (0,"),
        (X, {"steps": 4}, ValueError, "steps=4 must divide the first dimension of x, got shape (6, 4, 3)"),
        (X, {"initial_potential": 0.5}, TypeError, "initial_potential must be a tensor or None, got float"),
        (
            X,
            {"initial_potential": torch.zeros(4)},
            ValueError,
            "initial_potential must have the shape of one step of x, (4, 3), got (4,)",
        ),
        (
            X,
            {"initial_potential": torch.zeros(6, 4, 3), "steps": 3},
            ValueError,
            "initial_potential must have the shape of one step of x, (2, 4, 3), got (6, 4, 3)",
        ),
        (
            X,
            {"initial_potential": torch.zeros(4, 3, dtype=torch.float64)},
            TypeError,
            "initial_potential must be of dtype torch.float32, the dtype of potentials for x in torch.float32; got",
        ),
        (
            X,
            {"initial_potential": torch.zeros(4, 3, device="meta")},
            ValueError,
            "initial_potential must be on the device of x, cpu, got meta",
        ),
    ],
)
def test_tensors(x: object, options: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        functional.lif(x, backend=backend, **options)  # type: ignore[call-overload]


class Triangle(Surrogate):
    """A user's own, for which there is no kernel."""

    name = "triangle"

    def derivative(self, s: Tensor) -> Tensor:
        return (1 - s.abs()).clamp_min(0)


@pytest.fixture
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_warned", set())


@pytest.mark.usefixtures("never_warned")
def test_a_surrogate_without_a_kernel_runs_on_the_reference_and_says_so_once() -> None:
    x = torch.randn(5, 6)
    message = "stbp_cuda runs its slow reference implementation: there is no fused kernel for the surrogate Triangle"
    with pytest.warns(UserWarning, match=message) as record:
        spikes = functional.lif(x, surrogate=Triangle())
    assert record[0].filename == __file__
    assert torch.equal(spikes, functional.lif(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.lif(x, surrogate=Triangle())
        functional.lif(x, surrogate=Triangle(), backend="reference")
    with pytest.raises(RuntimeError, match="backend='fused' cannot run: there is no fused kernel for the surrogate"):
        functional.lif(x, surrogate=Triangle(), backend="fused")


def test_a_smooth_spike_has_kernels_in_float64_only() -> None:
    with pytest.raises(RuntimeError, match=r"backend='fused' cannot run: the smooth spike .* torch.float64 only"):
        functional.lif(torch.randn(3, 4), smooth=True, backend="fused")


@pytest.mark.parametrize(
    ("device", "built", "capability", "problem"),
    [
        ("cpu", "", None, None),
        ("mps", "", None, "there are no fused kernels for device type 'mps', only for cpu and cuda"),
        ("cuda", "", (9, 0), "this build of stbp_cuda has no CUDA kernels"),
        ("cuda", "7.5 9.0", (9, 0), None),
        ("cuda", "8.0", (8, 9), None),
        ("cuda", "8.9", (8, 0), "has CUDA kernels for 8.9, and the device is of compute capability 8.0"),
        ("cuda", "8.0", (9, 0), "has CUDA kernels for 8.0, and the device is of compute capability 9.0"),
        ("cuda", "8.0+PTX", (12, 0), None),
        ("cuda", "9.0a", (9, 0), None),
        ("cuda", "9.0a", (9, 1), "has CUDA kernels for 9.0a"),
        ("cuda", "10.0f", (10, 3), None),
        ("cuda", "10.0f", (12, 0), "has CUDA kernels for 10.0f"),
    ],
)
def test_which_devices_the_kernels_run_on(
    device: str,
    built: str,
    capability: tuple[int, int] | None,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ops._INFO, "cuda_architectures", built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = ops.fused_backend_problem(torch.device(device))
    assert found is None if problem is None else found is not None and problem in found


def test_a_device_is_asked_once_what_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(functional, "_with_kernels", set())
    monkeypatch.setattr(ops, "fused_backend_problem", asked.append)
    for _ in range(3):
        functional.lif(torch.empty(3, 4, device="meta"), backend="fused")
    assert asked == [torch.device("meta")]
