"""docs/works-with.md: its code, and what it says of it that no other file tests."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from stbp_cuda import LIFLayer

PAGE = (Path(__file__).parent.parent / "docs" / "works-with.md").read_text()
Names = dict[str, Any]


def run_section(title: str, names: Names) -> Names:
    section = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section is not None, title
    for code in re.findall(r"```python\n(.*?)```", section[1], re.DOTALL):
        exec(code, names)
    return names


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """What the head of the page defines; files go into a temporary folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return run_section("Works with", {})


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    spikes = net(x)
    assert 0.05 < spikes.mean() < 0.95
    found = torch.autograd.grad(spikes.sum(), [x, *net.parameters()])
    assert all(gradient.any() for gradient in found)
    return list(found)


def round_weights(net: nn.Module) -> nn.Module:
    """Weights whose products with inputs in eighths are exact in float32, in whatever order they are summed."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return net


def eighths(*shape: int) -> Tensor:
    return torch.randint(0, 9, shape) / 8


def test_compile_is_only_written_right(names: Names) -> None:
    """test_layer.py runs it."""
    assert isinstance(run_section("torch.compile", names)["compiled"], nn.Module)


def test_export(names: Names) -> None:
    run_section("torch.export", names)
    assert names["spikes"].shape == (8, 3, 10)
    x = torch.rand(7, 5, 6)
    torch.save(x, "x.pt")
    subprocess.run([sys.executable, "-c", LOAD], check=True)
    assert torch.equal(torch.load("spikes.pt"), names["net"](x))


LOAD = """
import torch
try:
    torch.export.load("net.pt2")
except Exception:
    import stbp_cuda
    torch.save(torch.export.load("net.pt2").module()(torch.load("x.pt")), "spikes.pt")
"""


def test_onnx(names: Names) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = names["net"]
    round_weights(net).eval()
    x = eighths(4, 5, 6)
    expected = net(x)
    assert 0.05 < expected.mean() < 0.95
    run_section("ONNX", names)
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    assert torch.equal(torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0]), expected)
    assert argument.shape[0] == 4  # T
    assert isinstance(argument.shape[1], str)


def test_onnx_with_time_folded_into_the_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), LIFLayer(0.5, 0.25, steps=3, reset="soft"), nn.AvgPool2d(2), nn.Flatten()]
    net = round_weights(nn.Sequential(*layers)).eval()
    x = eighths(3 * 5, 1, 8, 8)
    expected = net(x)
    assert 0.05 < expected.mean() < 0.95
    net[1].backend_mode = "reference"
    file = str(tmp_path / "net.onnx")
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(net, (x[:6],), file, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.equal(torch.from_numpy(found), expected)


def _fsdp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    net, x = torch.load(f"{folder}/net.pt", weights_only=False)
    net = run_section("FSDP2", {"net": net, "nn": nn, "torch": torch})["shard"](net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x[rank]).square().mean().backward()
        optimizer.step()
    torch.save({name: value.full_tensor() for name, value in net.state_dict().items()}, f"{folder}/net{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_layer.py


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads, by torch.multiprocessing
def test_two_processes_of_fsdp2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), LIFLayer(0.5, 0.3, steps=4), nn.Linear(20, 10), LIFLayer(0.5, 0.1, steps=4))
    x = torch.rand(2, 4 * 8, 6)
    torch.save((net, x), tmp_path / "net.pt")
    torch.multiprocessing.spawn(_fsdp_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"net{rank}.pt", weights_only=True) for rank in range(2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([net(part).square().mean() for part in x]).mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], before[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_data_parallel(names: Names) -> None:
    """Without GPUs DataParallel does not split. What it would do, done by hand."""
    net, x = run_section("DataParallel", names)["net"], names["x"]
    whole = names["replicated"](x)
    assert torch.equal(torch.cat([net(part) for part in x.chunk(2, 1)], 1), whole)
    assert not torch.equal(torch.cat([net(part) for part in x.chunk(2, 0)], 0), whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, names: Names) -> None:
    run_section("Activation checkpointing", names)
    assert names["current"].grad.any()
    net, x = names["net"], torch.rand(40, 8, 6)  # more steps than lie between two kept states
    expected = gradients(net, x)
    net.zero_grad()
    x.requires_grad_()
    names["checkpoint"](net, x, use_reentrant=use_reentrant).sum().backward()
    for found, gradient in zip([x, *net.parameters()], expected, strict=True):
        assert found.grad is not None
        assert torch.equal(found.grad, gradient)


def test_torch_func(names: Names) -> None:
    run_section("torch.func", names)
    net, nets, x = names["net"], names["nets"], names["x"]
    names["ensemble"].sum().backward()
    for number, one in enumerate(nets):
        assert torch.equal(names["ensemble"][number], one(x))
        for (name, _), gradient in zip(one.named_parameters(), gradients(one, x)[1:], strict=True):
            torch.testing.assert_close(names["parameters"][name].grad[number], gradient)
    for sample in range(8):
        expected = gradients(net, x[:, sample])[1:]
        for found, gradient in zip(names["per_sample"].values(), expected, strict=True):
            torch.testing.assert_close(found[sample], gradient)


def test_grad_scaler(names: Names) -> None:
    before = [parameter.clone() for parameter in names["net"].parameters()]
    run_section("autocast, GradScaler", names)
    assert names["loss"].dtype == torch.float32
    for old, new in zip(before, names["net"].parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


@pytest.mark.cuda
def test_cuda_graph(names: Names) -> None:
    run_section("CUDA graphs", names)
    net, x = names["net"].cuda(), names["x"].cuda()
    replay = names["capture"](net, x)
    for _ in range(2):
        x.uniform_()
        net.zero_grad(set_to_none=False)
        replay()
        for parameter, expected in zip(net.parameters(), gradients(net, x)[1:], strict=True):
            assert torch.equal(parameter.grad, expected)


def test_files(names: Names) -> None:
    run_section("Copies, files", names)
    assert torch.equal(names["twin"](names["x"]), names["net"](names["x"]))
