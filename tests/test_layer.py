"""LIFLayer in the company it keeps: modules, compilers, autocast, copies, files, processes."""

import copy
import functools
import io
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import stbp_cuda
from stbp_cuda import functional
from stbp_cuda.surrogate import SURROGATES, Gaussian, Rectangular, Surrogate


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
    assert targets.count("stbp_cuda.neuron.default") == 2
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
    for part in (
        "decay=0.3",
        "v_threshold=0.9",
        "(width=2.0, gain=1.0",
        "reset='soft'",
        "strict_threshold=True",
        "steps=4",
    ):
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
    assert not [*stbp_cuda.LIFLayer().parameters(), *stbp_cuda.LIFLayer().buffers()]  # nothing in it is learnable


KINDS: dict[str, Callable[..., nn.Module]] = {
    "LIFLayer": stbp_cuda.LIFLayer,
    "NeuNormLIF": functools.partial(stbp_cuda.NeuNormLIF, (2, 3)),
    "NeuNorm": lambda norm_decay=0.8, **others: stbp_cuda.NeuNorm((2, 3), norm_decay, **others),
}
CONSTANTS: list[tuple[str, Any, str, str]] = [  # an option, another value than the default, and how both are told
    ("decay", 0.3, "decay=0.3", "decay=0.25"),
    ("v_threshold", 1.0, "v_threshold=1.0", "v_threshold=0.75"),
    ("surrogate", "gaussian", "surrogate='Gaussian'", "surrogate='Rectangular'"),
    ("surrogate", Rectangular(0.5), "surrogate.width=0.5", "surrogate.width=1.0"),
    ("reset", "soft", "reset='soft'", "reset='hard'"),
    ("v_reset", -1.0, "v_reset=-1.0", "v_reset=0.0"),
    ("detach_reset", True, "detach_reset=True", "detach_reset=False"),
    ("spatial_only", True, "spatial_only=True", "spatial_only=False"),
    ("strict_threshold", True, "strict_threshold=True", "strict_threshold=False"),
    ("norm_decay", 0.7, "norm_decay=0.7", "norm_decay=0.8"),
    ("scaling", "1/F^2", "scaling='1/F^2'", "scaling='1/F'"),
]


def of_norm(option: str) -> bool:
    return option in ("norm_decay", "scaling")


@pytest.mark.parametrize(
    ("kind", "constant"),
    [
        (kind, constant)
        for kind in KINDS
        for constant in CONSTANTS
        if kind == "NeuNormLIF" or of_norm(constant[0]) == (kind == "NeuNorm")
    ],
)
def test_loading_another_neuron_says_so(kind: str, constant: tuple[str, Any, str, str], tmp_path: Path) -> None:
    option, value, trained, here = constant
    net = nn.Sequential(nn.Identity(), KINDS[kind](**{option: value}))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    checkpoint = torch.load(tmp_path / "net.pt", weights_only=True)
    net.load_state_dict(checkpoint)
    other = nn.Sequential(nn.Identity(), KINDS[kind]())
    before = repr(other)
    message = f"1 ({kind}): the checkpoint was trained with {trained}; here it is {here}, which loading does not change"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as record:
        other.load_state_dict(checkpoint)
    assert len(record) == 1
    assert repr(other) == before


def test_all_constants_that_differ_are_in_one_warning() -> None:
    layer = stbp_cuda.LIFLayer(0.3, 1.0, steps=4, backend="reference")
    message = (
        "LIFLayer: the checkpoint was trained with decay=0.3, v_threshold=1.0; here it is decay=0.25, v_threshold=0.75"
    )
    with pytest.warns(UserWarning, match=message) as record:
        stbp_cuda.LIFLayer().load_state_dict(layer.state_dict())
    assert len(record) == 1


class Wide(Surrogate):
    """A user's own."""

    name = "wide"


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (stbp_cuda.LIFLayer(), stbp_cuda.LIFLayer(steps=5, backend="reference")),
        (stbp_cuda.LIFLayer(0), stbp_cuda.LIFLayer(0.0)),
        (stbp_cuda.LIFLayer(0.1), stbp_cuda.LIFLayer(np.float64(0.1))),  # type: ignore[arg-type]
        (stbp_cuda.LIFLayer(surrogate=Wide(2.0)), stbp_cuda.LIFLayer(surrogate=Wide(2))),
        (stbp_cuda.LIFLayer(0.1), stbp_cuda.NeuNormLIF((2, 3), 0.1, norm_decay=0.5)),
        (stbp_cuda.NeuNormLIF((2, 3), norm_decay=0.7), stbp_cuda.NeuNorm((2, 3), 0.7)),
        (
            stbp_cuda.NeuNormLIF((2, 3), 0.1, learn_decays=True),
            stbp_cuda.NeuNormLIF((2, 3), 0.2, norm_decay=0.5, learn_decays=True),
        ),
    ],
)
def test_loading_the_same_neuron_says_nothing(layer: nn.Module, other: nn.Module) -> None:
    other.load_state_dict(layer.state_dict(), strict=False)
    copy.deepcopy(other).load_state_dict(other.state_dict())


def test_a_checkpoint_without_constants_is_loaded() -> None:
    net, other = small_net(), small_net()
    before = {name: value for name, value in net.state_dict().items() if not name.endswith("_extra_state")}
    assert len(before) == len(net.state_dict()) - 2
    assert not any(other.load_state_dict(before))
    assert not any(other.load_state_dict(before, strict=False))


@pytest.mark.parametrize("state", [{"decay": 0.5}, torch.tensor([300]), torch.tensor([1.5, math.nan]), torch.ones(3)])
def test_constants_that_cannot_be_read(state: Any) -> None:
    with pytest.warns(UserWarning, match="^LIFLayer: the constants in the checkpoint cannot be read: "):
        stbp_cuda.LIFLayer().load_state_dict({"_extra_state": state})


@pytest.mark.parametrize(
    "change",
    [
        lambda value, _: value.cpu().clone(),
        lambda value, _: value.float(),
        lambda value, _: value.half(),
        lambda value, _: value.bfloat16(),
        lambda value, other: 0.3 * value + 0.7 * other,
        lambda value, other: torch.stack([value.float(), other.float()]).mean(0),
        lambda value, other: value + (other - value),
    ],
)
def test_what_is_done_to_all_of_a_state_dict(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Code that moves, converts or averages checkpoints takes all their values for tensors."""
    net, other = small_net(), small_net()
    both = zip(net.state_dict().items(), other.state_dict().values(), strict=True)
    net.load_state_dict({name: change(a, b) for (name, a), b in both})
    net.load_state_dict(torch.load(io_of(net.state_dict()), map_location="meta"), assign=True)


def io_of(value: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_constants_are_no_parameters() -> None:
    net, x = small_net(), torch.rand(8, 1, 8, 8)
    expected = net(x)
    assert torch.equal(torch.func.functional_call(net, net.state_dict(), (x,)), expected)
    mean = torch.optim.swa_utils.AveragedModel(net)
    mean.update_parameters(net)
    mean.module.load_state_dict(net.state_dict())
    assert {value.numel() for name, value in net.state_dict().items() if name.endswith("_extra_state")} == {512}
    with torch.device("meta"):
        assert torch.equal(stbp_cuda.LIFLayer().state_dict()["_extra_state"], stbp_cuda.LIFLayer().get_extra_state())


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


class Traced(nn.Module):
    """Layers, functions, and a layer with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.lif = stbp_cuda.LIFLayer(v_threshold=0.2)
        self.weight = nn.Parameter(torch.full((6,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        spikes, potential = self.lif(self.fc(x), return_potential=True)
        x = functional.lif(self.fc(spikes) + potential, surrogate=Gaussian(0.3), v_threshold=0.1, reset="soft")
        x = functional.neunorm_lif(self.fc(x), self.weight, decay=0.3, v_threshold=0.1)
        return functional.neunorm(x, self.weight) + stbp_cuda.encoding.direct(potential, 5)


def time_distributed() -> nn.Module:
    conv = stbp_cuda.TimeDistributed(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    return nn.Sequential(conv, stbp_cuda.LIFLayer(), stbp_cuda.NeuNorm((4, 6, 6)))


def whole_network(steps: int | None) -> stbp_cuda.Network:
    return stbp_cuda.network("4C3(Enc)-4C3-P2-20-Voting", (1, 6, 6), steps=steps, neunorm=True, dropout=0.5)


FOR_FX: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {  # a net, an input, its leaves of ours
    "small_net": (small_net, (8, 1, 8, 8), ["2", "6"]),
    "functions": (Traced, (5, 3, 6), ["lif"]),
    "time distributed": (time_distributed, (5, 3, 1, 6, 6), ["1", "2"]),
    "network": (
        functools.partial(whole_network, None),
        (5, 3, 1, 6, 6),
        [f"layers.{name}" for name in ("lif1", "dropout1", "lif2", "dropout2", "lif3", "lif4")],
    ),
    "constant": (
        functools.partial(whole_network, 5),
        (3, 1, 6, 6),
        [f"layers.{name}" for name in ("lif1", "dropout1", "lif2", "dropout2", "lif3", "lif4")],
    ),
    "a layer": (stbp_cuda.LIFLayer, (5, 3, 6), []),
    "a layer with norm": (functools.partial(stbp_cuda.NeuNormLIF, (6,), learn_decays=True), (5, 3, 6), []),
    "a norm": (functools.partial(stbp_cuda.NeuNorm, (6,), steps=5), (10, 6), []),
}


# Before 2.14 torch cannot pickle the graph of a module whose forward has strings as annotations, as our own have.
PICKLES_OUR_GRAPHS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)


@pytest.mark.parametrize("name", FOR_FX)
def test_fx_keeps_layers_as_leaves(name: str) -> None:
    make, shape, leaves = FOR_FX[name]
    torch.manual_seed(0)
    net, x = make(), torch.rand(shape)

    def results(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)  # of dropout
        y = net(x_ := x.clone().requires_grad_())
        wanted = [x_, *(parameter for _, parameter in sorted(net.named_parameters()))]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    traced = torch.fx.symbolic_trace(net)
    modules = {node.target: node.target for node in traced.graph.nodes if node.op == "call_module"}
    ours = [target for target in modules if type(net.get_submodule(target)).__module__.startswith("stbp_cuda")]
    assert ours == leaves
    expected = results(net)
    again = torch.fx.symbolic_trace(traced)
    graphs = [traced, again, copy.deepcopy(traced)]
    if PICKLES_OUR_GRAPHS or not type(net).__module__.startswith("stbp_cuda"):
        graphs.append(pickle.loads(pickle.dumps(again)))
    for graph in graphs:
        for a, b in zip(results(graph), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(traced.eval()(x), net.eval()(x))


JIT = [
    stbp_cuda.LIFLayer(),
    stbp_cuda.LIFLayer(steps=5, backend="reference"),
    stbp_cuda.NeuNormLIF((6,)),
    stbp_cuda.NeuNorm((6,)),
    stbp_cuda.network("6-4-2", (6,)),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layer", JIT, ids=lambda layer: type(layer).__name__)
def test_jit_is_refused(layer: nn.Module) -> None:
    """A trace would give the number of steps of its example to all, and no error."""
    x = torch.rand(5, 2, 6)
    for net in (layer, nn.Sequential(nn.Identity(), layer)):
        with pytest.raises(
            RuntimeError, match=r"torch.jit.trace would fix .*: use torch.compile, torch.export or torch.fx"
        ):
            torch.jit.trace(net, (x,))
        with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile {type(layer).__name__} of stbp_cuda"):
            torch.jit.script(net)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("call", [functional.lif, lambda x: functional.neunorm_lif(x, torch.ones(6))])
def test_jit_is_refused_by_the_functions(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.trace would fix the number of time steps"):
        torch.jit.trace(call, (torch.rand(5, 2, 6),))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
def test_the_exporter_of_onnx_that_traces(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    x = torch.rand(8, 1, 8, 8)
    with pytest.raises(
        RuntimeError, match="ONNX has no operator for spiking neurons: export them with backend='reference"
    ):
        torch.onnx.export(small_net().eval(), (x,), tmp_path / "net.onnx", dynamo=False)
    net = small_net(backend="reference").eval()
    torch.onnx.export(net, (x,), str(tmp_path / "net.onnx"), dynamo=False, input_names=["x"])
    runtime = pytest.importorskip("onnxruntime")
    (found,) = runtime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach())


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


def test_learned_parameters_start_where_they_are_told_and_get_gradients() -> None:
    layer = stbp_cuda.LIFLayer(0.9, 1.0, learn=("decay", "v_threshold", "shift"), channels=3)
    assert {name: value.shape for name, value in layer.named_parameters()} == dict.fromkeys(
        ("learned.decay", "learned.v_threshold", "learned.shift"), (3,)
    )
    x = torch.randn(9, 4, 3)
    assert torch.equal(layer(x), stbp_cuda.LIFLayer(0.9, 1.0)(x))
    layer(x).sum().backward()
    assert all(parameter.grad.all() for parameter in layer.parameters())
    assert stbp_cuda.LIFLayer().learned == {}


def test_a_learned_parameter_is_relative_to_its_start_which_a_checkpoint_knows() -> None:
    state = stbp_cuda.LIFLayer(0.9, learn=("decay", "shift"), shift=0.5).state_dict()
    with pytest.warns(UserWarning, match=r"was trained with decay=0.9; here it is decay=0.5"):
        stbp_cuda.LIFLayer(0.5, learn=("decay", "shift")).load_state_dict(state)
