"""LIFLayer in the company it keeps: modules, compilers, autocast, copies, files, processes."""

import copy
import io
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import stbp_cuda
from stbp_cuda import functional
from stbp_cuda.surrogate import SURROGATES, Gaussian


def small_net(steps: int = 4, backend: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        stbp_cuda.LIFLayer(decay=0.5, v_threshold=0.5, surrogate="gaussian", steps=steps, backend=backend),  # type: ignore[arg-type]
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
        stbp_cuda.LIFLayer(steps=steps, backend=backend),  # type: ignore[arg-type]
    )


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    found = [parameter.grad for parameter in net.parameters()]
    return [gradient.clone() for gradient in found if gradient is not None]


def test_the_layer_is_the_function(device: str) -> None:
    x = torch.randn(6, 3, 5, device=device)
    initial = torch.randn(3, 5, device=device)
    options = {
        "decay": 0.4,
        "v_threshold": 0.6,
        "surrogate": Gaussian(0.5),
        "v_reset": -0.1,
        "detach_reset": True,
        "spatial_only": True,
        "strict_threshold": True,
    }
    spikes, potential = stbp_cuda.LIFLayer(**options)(x, initial, return_potential=True)  # type: ignore[arg-type]
    expected = functional.lif(x, initial_potential=initial, return_potential=True, **options)  # type: ignore[call-overload]
    assert torch.equal(spikes, expected[0])
    assert torch.equal(potential, expected[1])
    assert torch.equal(stbp_cuda.LIFLayer()(x), functional.lif(x))


def test_time_folded_into_the_batch(device: str) -> None:
    x = torch.randn(5, 3, 2, 4, device=device)
    folded, potential = stbp_cuda.LIFLayer(steps=5)(x.flatten(0, 1), return_potential=True)
    expected, last = stbp_cuda.LIFLayer()(x, return_potential=True)
    assert torch.equal(folded, expected.flatten(0, 1))
    assert torch.equal(potential, last)
    second = stbp_cuda.LIFLayer(steps=5)(x.flatten(0, 1), potential)
    assert torch.equal(second, stbp_cuda.LIFLayer()(x, last).flatten(0, 1))


def test_no_state_leaks_from_call_to_call(device: str) -> None:
    layer = stbp_cuda.LIFLayer(decay=0.9)
    x = torch.randn(7, 20, device=device)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_initial_potential_in_the_dtype_of_a_half_input(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(4, 6, device=device).to(dtype)
    initial = torch.randn(6, device=device).to(dtype).requires_grad_()
    spikes, potential = functional.lif(x, initial_potential=initial, return_potential=True)
    assert potential.dtype == torch.float32
    assert torch.equal(spikes, functional.lif(x, initial_potential=initial.float()))
    potential.sum().backward()
    assert initial.grad is not None
    assert initial.grad.dtype == dtype


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_network_has_the_gradients_of_the_reference(memory_format: torch.memory_format, device: str) -> None:
    x = torch.rand(8, 1, 8, 8, device=device).to(memory_format=memory_format)
    ours, theirs = small_net(backend="fused").to(device), small_net(backend="reference").to(device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    for a, b in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_compile_a_training_step_of_a_network(device: str) -> None:
    torch._dynamo.reset()
    net = small_net().to(device)
    x = torch.rand(8, 1, 8, 8, device=device)
    expected = gradients(net, x)
    for ours, theirs in zip(gradients(torch.compile(net, fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, device: str) -> None:
    torch._dynamo.reset()
    net = small_net().to(device).eval()
    x = torch.rand(8, 1, 8, 8, device=device)
    program = torch.export.export(net, (x,), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert targets.count("stbp_cuda.lif.default") == 2
    with torch.no_grad():
        assert torch.equal(program.module()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """The layer takes what the linear layer before it gives: half types, with the state in float32."""
    linear, layer = nn.Linear(6, 7).to(device), stbp_cuda.LIFLayer()
    x = torch.randn(5, 3, 6, device=device)
    with torch.autocast(device, dtype=dtype):
        current = linear(x)
        spikes = layer(current)
    assert current.dtype == spikes.dtype == dtype
    assert torch.equal(spikes.float(), layer(current.float(), None))
    spikes.float().square().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_copy_pickle_and_repr(surrogate: str, device: str) -> None:
    layer = stbp_cuda.LIFLayer(0.3, 0.9, SURROGATES[surrogate](2.0), reset="soft", strict_threshold=True, steps=4)
    x = torch.randn(8, 10, device=device)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x), layer(x))
    for part in ("decay=0.3", "v_threshold=0.9", "(width=2.0)", "reset='soft'", "strict_threshold=True", "steps=4"):
        assert part in repr(layer)


def test_state_dict_goes_through_a_file(tmp_path: Path) -> None:
    net, other = small_net(), small_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = torch.rand(8, 1, 8, 8)
    assert torch.equal(net(x), other(x))
    assert not stbp_cuda.LIFLayer().state_dict()  # nothing in it is learnable


def test_a_whole_module_goes_through_torch_save() -> None:
    buffer = io.BytesIO()
    torch.save(stbp_cuda.LIFLayer(0.1), buffer)
    buffer.seek(0)
    assert "decay=0.1" in repr(torch.load(buffer, weights_only=False))


@pytest.mark.parametrize("argument", ["decay", "v_threshold", "v_reset"])
def test_numbers_set_later_are_checked(argument: str) -> None:
    layer = stbp_cuda.LIFLayer()
    setattr(layer, argument, float("nan"))
    with pytest.raises(ValueError, match=re.escape(f"{argument} must be finite in float32, got nan")):
        layer(torch.randn(3, 4))


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = nn.parallel.DistributedDataParallel(small_net())
    x = torch.load(f"{folder}/x.pt", weights_only=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x[rank]).square().mean().backward()
        optimizer.step()
    torch.save(net.module.state_dict(), f"{folder}/net{rank}.pt")
    torch.distributed.destroy_process_group()
    # DDP keeps gloo's threads alive, and now and then one of them aborts a process whose interpreter is torn down.
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads, by torch.multiprocessing
def test_two_processes_of_distributed_data_parallel(tmp_path: Path) -> None:
    """Both end with the same weights: those of one process that averages the two gradients."""
    x = torch.rand(2, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"net{rank}.pt", weights_only=True) for rank in range(2))

    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        each = [gradients(net, part) for part in x]
        for parameter, a, b in zip(net.parameters(), *each, strict=True):
            parameter.grad = (a + b) / 2
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(5, 1000, device="cuda:1")
    assert torch.equal(functional.lif(x, backend="fused"), functional.lif(x, backend="reference"))
