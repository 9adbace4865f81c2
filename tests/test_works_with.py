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

from stbp_cuda import LIFLayer, functional

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


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "potentials": {"return_potentials": "before_reset", "return_potential": True},
    "constant": {"constant": True, "steps": 5},
    "last dimension": {"time_dim": -1},
    "second dimension": {"time_dim": 1, "lengths": torch.tensor([1, 2])},
    "initial number": {"initial_potential": 0.3},
    "delayed": {"reset": "soft", "delayed": True, "subtract": 0.5},
    "tensors": {"decay": torch.rand(6), "scale": torch.rand(6), "v_threshold": torch.tensor(0.3)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compiled_options_give_the_same_bits_in_few_graphs(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        outputs = functional.lif(x, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    compiled = torch.compile(run, fullgraph=True)
    for size in range(2, 8):
        x = torch.rand(2 if "lengths" in options else size, size + 3, 6, requires_grad=True)
        expected, found = run(x), compiled(x)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        both = [torch.autograd.grad(sum(y.square().sum() for y in ys), x)[0] for ys in (found, expected)]
        torch.testing.assert_close(*both)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_numbers_beside_tensors_that_change_make_few_graphs() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x, scale: functional.lif(x, decay=scale / 10, scale=scale), fullgraph=True)
    x = torch.rand(4, 3, 6)
    for tenth in range(2, 10):
        assert torch.equal(compiled(x, tenth / 10), functional.lif(x, decay=tenth / 10 / 10, scale=tenth / 10))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


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
    torch.save({name: value.full_tensor() for name, value in net.named_parameters()}, f"{folder}/net{rank}.pt")
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
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
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


def test_fx(names: Names) -> None:
    traced = run_section("FX, torch.jit", names)["traced"]
    assert [node.op for node in traced.graph.nodes].count("call_module") == 4
    x = torch.rand(9, 2, 6)
    assert torch.equal(traced(x), names["net"](x))


def test_learned_parameters_lengths_and_time_dim(names: Names) -> None:
    run_section("torch.func", names)
    run_section("Learned parameters, lengths, time_dim", names)
    padded, x, lengths = names["padded"], names["sequences"], names["lengths"]
    expected = padded(x, lengths)
    for name in ("compiled_padded", "per_sequence"):
        assert torch.equal(names[name], expected)
    for number, length in enumerate(lengths.tolist()):
        if length > 0:
            alone = padded(x[number : number + 1, :length], lengths[number : number + 1])
            torch.testing.assert_close(alone[0], expected[number])
    x, lengths = torch.rand(3, 9, 6), torch.tensor([9, 0, 4])
    for graph in (names["exported"].module(), names["traced_padded"]):
        assert torch.equal(graph(x, lengths), padded(x, lengths))
    assert all(gradient.any() for gradient in torch.autograd.grad(expected.sum(), list(padded.parameters())))


def test_an_ensemble_with_parameters_of_its_own() -> None:
    from torch.func import functional_call, stack_module_state, vmap

    nets = [nn.Sequential(nn.Linear(6, 9), LIFLayer(0.5, 0.3, "atan", learn="decay", channels=9)) for _ in range(3)]
    for net in nets:
        nn.init.normal_(net[1].learned["decay"])
    x = torch.rand(4, 8, 6)
    parameters, buffers = stack_module_state(nets)
    spikes = vmap(lambda *state: functional_call(nets[0], state, (x,)))(parameters, buffers)
    spikes.square().sum().backward()
    for number, net in enumerate(nets):
        assert torch.equal(spikes[number], net(x))
        net(x).square().sum().backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameters[name].grad[number], parameter.grad)


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
