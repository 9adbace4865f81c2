"""What torch makes of functions, beside autograd alone: torch.func, forward AD, compilers."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import stbp_cuda
from stbp_cuda import functional, ops
from stbp_cuda.neurons import LIF

T, B, SHAPE = 5, 2, (3, 4, 2)  # [T, B, C, H, W]
BACKENDS = ("fused", "reference")
LAYERS: dict[str, Callable[[str], nn.Module]] = {
    "lif": lambda backend: stbp_cuda.LIFLayer(surrogate="atan", backend=backend),  # type: ignore[arg-type]
    "soft": lambda backend: stbp_cuda.LIFLayer(reset="soft", detach_reset=True, backend=backend),  # type: ignore[arg-type]
    "folded": lambda backend: nn.Sequential(
        nn.Flatten(0, 1),
        stbp_cuda.LIFLayer(steps=T, backend=backend),  # type: ignore[arg-type]
        nn.Unflatten(0, (T, -1)),
    ),
    "neunorm_lif": lambda backend: stbp_cuda.NeuNormLIF(SHAPE, backend=backend),  # type: ignore[arg-type]
    "learned": lambda backend: stbp_cuda.NeuNormLIF(SHAPE, learn_decays=True, backend=backend),  # type: ignore[arg-type]
    "neunorm": lambda backend: stbp_cuda.NeuNorm(SHAPE),
}
every_layer = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in LAYERS for backend in BACKENDS if (name, backend) != ("neunorm", "fused")],
)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's own, of torch.jit in torch.func, and of what it has deprecated inside its compiler.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def make(name: str, backend: str, device: str) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[name](backend)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            nn.init.uniform_(parameter)
    return layer.to(device)


def inputs(*before: int, device: str, batch: int = B) -> Tensor:
    return torch.rand(*before, T, batch, *SHAPE, device=device) * 1.5


def same(found: Any, expected: Any) -> None:
    """To the last bit, but for sums over samples, whose order may differ."""
    found, expected = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert any(tensor.any() for tensor in expected)


@every_layer
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_any_dimension(name: str, backend: str, dim: int, device: str) -> None:
    layer = make(name, backend, device)
    x = inputs(3, device=device).movedim(0, dim)
    expected = torch.stack([layer(sample) for sample in x.unbind(dim)])
    assert torch.equal(vmap(layer, in_dims=dim)(x), expected)
    nested = vmap(vmap(layer, in_dims=dim), in_dims=0)(torch.stack([x, 2 * x]))
    assert torch.equal(nested[0], expected)


@every_layer
def test_gradients_by_transforms(name: str, backend: str, device: str) -> None:
    layer = make(name, backend, device)
    x, weight = inputs(device=device), torch.rand(T, B, *SHAPE, device=device)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(layer, parameters, x) * weight).square().sum()

    leaf = x.clone().requires_grad_()
    value = loss(parameters, leaf)
    of_parameters, of_x = grad(loss, argnums=(0, 1))(parameters, x)
    expected = torch.autograd.grad(value, [*parameters.values(), leaf])
    same([*of_parameters.values(), of_x], expected)
    output, backward = vjp(layer, x)
    (of_output,) = torch.autograd.grad((layer(leaf) * weight).sum(), leaf)
    assert torch.equal(output, layer(x))
    same(backward(weight), of_output)


@every_layer
def test_per_sample_gradients(name: str, backend: str, device: str) -> None:
    layer = make(name, backend, device)
    first, last = nn.Linear(SHAPE[-1], SHAPE[-1]).to(device), nn.Linear(SHAPE[-1], 3).to(device)
    net = nn.Sequential(first, layer, last)
    parameters = dict(net.named_parameters())
    x, target = inputs(4, device=device, batch=1), torch.rand(4, 3, device=device)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(functional_call(net, parameters, x).mean((0, 1, 2, 3)), target)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for sample in range(4):
        expected = torch.autograd.grad(loss(parameters, x[sample], target[sample]), list(parameters.values()))
        same([of_all[sample] for of_all in found.values()], expected)


@every_layer
def test_an_ensemble_learns_in_all_its_parameters(name: str, backend: str, device: str) -> None:
    """Also where the layer stands in the middle: nothing before it may be without a gradient, or with a wrong one."""
    nets = []
    for seed in range(3):
        layer = make(name, backend, device)
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(SHAPE[-1], SHAPE[-1]), layer, nn.Linear(SHAPE[-1], 3)).to(device))
    parameters, buffers = stack_module_state(nets)
    x = 4 * inputs(device=device)
    skeleton = copy.deepcopy(nets[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(skeleton, (p, b), x))(parameters, buffers)
    outputs.square().sum().backward()
    for i, net in enumerate(nets):
        result = net(x)
        torch.testing.assert_close(outputs[i], result)
        result.square().sum().backward()
        for key, parameter in net.named_parameters():
            assert parameters[key].grad is not None
            same(parameters[key].grad[i], parameter.grad)


@every_layer
def test_jacobians(name: str, backend: str, device: str) -> None:
    layer = make(name, backend, device)
    x = inputs(device=device, batch=1)
    found = jacrev(lambda x: layer(x).sum((1, 2, 3)))(x)
    leaf = x.clone().requires_grad_()
    outputs = layer(leaf).sum((1, 2, 3)).flatten()
    expected = [torch.autograd.grad(output, leaf, retain_graph=True)[0] for output in outputs]
    same(found.flatten(0, -6), torch.stack(expected))
    (batched,) = torch.autograd.grad(outputs, leaf, torch.eye(len(outputs), device=device), is_grads_batched=True)
    same(batched, torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapped", ["x", "potential", "both"])
def test_potentials_under_vmap(mapped: str, backend: str, device: str) -> None:
    x, v = inputs(3, device=device), torch.rand(3, B, *SHAPE, device=device)
    dims = (0 if mapped != "potential" else None, 0 if mapped != "x" else None)
    x, v = x if dims[0] == 0 else x[0], v if dims[1] == 0 else v[0]

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return functional.lif(x, initial_potential=v, return_potential=True, backend=backend)  # type: ignore[arg-type]

    def loss(x: Tensor, v: Tensor) -> Tensor:
        spikes, potential = run(x, v)
        return spikes.square().sum() + potential.square().sum()

    found = (*vmap(run, in_dims=dims)(x, v), *vmap(grad(loss, argnums=(0, 1)), in_dims=dims)(x, v))
    for i in range(3):
        sample = (x[i] if dims[0] == 0 else x).clone().requires_grad_()
        state = (v[i] if dims[1] == 0 else v).clone().requires_grad_()
        expected = (*run(sample, state), *torch.autograd.grad(loss(sample, state), (sample, state)))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_vmap_where_states_are_kept(device: str) -> None:
    """For more steps than the kernels keep in registers."""
    steps = 2 * ops.chunk(device) + 3
    x = torch.rand(3, steps, 7, device=device)
    found = vmap(grad(lambda x: (functional.lif(x) * x).sum()))(x)
    leaf = x.clone().requires_grad_()
    for sample in leaf.unbind():
        (functional.lif(sample) * sample).sum().backward()
    same(found, leaf.grad)


@every_layer
def test_forward_mode_is_right_or_refused(name: str, backend: str, device: str) -> None:
    layer = make(name, backend, device)
    x, tangent = inputs(device=device), inputs(device=device)
    if name == "neunorm":  # linear, and in plain PyTorch
        same(jvp(layer, (x,), (tangent,))[1], layer(tangent))
        return
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(layer, (x,), (tangent,))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        vmap(lambda x: jvp(layer, (x,), (tangent,)))(x[None])
    with forward_ad.dual_level():
        assert torch.equal(layer(x), layer(x.clone()))  # without a tangent
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("name", ["lif", "neunorm_lif"])
def test_second_derivatives_under_torch_func(name: str, device: str) -> None:
    layer, x = make(name, "fused", device), inputs(device=device)

    def loss(x: Tensor) -> Tensor:
        return (layer(x) * x).square().sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        grad(lambda x: grad(loss)(x).sum())(x)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        hessian(loss)(x)


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("neunorm", [False, True])
def test_whole_networks(steps: int | None, neunorm: bool, device: str) -> None:
    """With voting; of constant images and of sequences."""
    torch.manual_seed(0)
    net = stbp_cuda.network(
        "8C3-8C3-P2-20-Voting", (1, 8, 8), steps=steps, classes=4, neunorm=neunorm, v_threshold=0.1, decay=0.9
    ).to(device)
    x = 6 * torch.rand(3, *(() if steps else (5,)), 2, 1, 8, 8, device=device)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, x).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        assert torch.equal(vmap(net)(x)[i], net(sample))
        same([of[i] for of in found.values()], torch.autograd.grad(loss(parameters, sample), list(parameters.values())))


NEURON = LIF().text()


def bare(name: str, device: str) -> tuple[Any, list[Any]]:
    """An operator, and what it may be called with."""
    x, weight = inputs(device=device), torch.rand(SHAPE, device=device)
    if name == "neuron_forward":
        return ops.neuron_forward, [x, None, None, None, T, 0, False, NEURON, None, 0, True, False, False]
    if name == "neunorm_lif_forward":
        return ops.neunorm_lif_forward, [x, weight, None, T, NEURON, None, 0.8, False, False]
    if name == "neuron_backward":
        states = ops.neuron_forward(x, None, None, None, T, 0, False, NEURON, None, 0, True, False, True)[3]
        call = [x, None, None, None, states, T, 0, False, NEURON, None, 0, False, False]
        return ops.neuron_backward, [x, None, None, *call]
    kept = ops.neunorm_lif_forward(x, weight, None, T, NEURON, None, 0.8, False, True)[1:]
    return ops.neunorm_lif_backward, [x, x, weight, None, *kept, T, NEURON, None, 0.8, False, False]


OPERATORS = ("neuron_forward", "neunorm_lif_forward", "neuron_backward", "neunorm_lif_backward")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_bare_operator_has_a_gradient_or_an_error(name: str, device: str) -> None:
    operator, (x, *rest) = bare(name, device)
    leaf = x.clone().requires_grad_()
    result = operator(leaf, *rest)[0]
    assert result.requires_grad
    if "backward" in name:
        with pytest.raises(RuntimeError, match="no second derivative"):
            result.sum().backward()
    else:
        result.square().sum().backward()
        call = functional.lif if name == "neuron_forward" else lambda x: functional.neunorm_lif(x, rest[0])
        other = x.clone().requires_grad_()
        call(other).square().sum().backward()
        same(leaf.grad, other.grad)
    with pytest.raises(RuntimeError, match=r"no gradient inside torch\.func"):
        grad(lambda x: operator(x, *rest)[0].sum())(x)
    with pytest.raises(RuntimeError, match=r"no gradient inside torch\.func"):
        jvp(lambda x: operator(x, *rest)[0], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        operator(forward_ad.make_dual(x, x), *rest)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_bare_operator_under_vmap(name: str, device: str) -> None:
    operator, (x, *rest) = bare(name, device)
    found = vmap(lambda x: operator(x, *rest)[0])(torch.stack([x, 2 * x]))
    for ours, sample in zip(found, (x, 2 * x), strict=True):
        assert torch.equal(ours, operator(sample, *rest)[0])


@pytest.mark.parametrize("name", ["lif", "neunorm_lif"])
def test_what_make_fx_traces_has_a_gradient(name: str, device: str) -> None:
    layer, x = make(name, "fused", device), inputs(device=device)
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [function(leaf) for function, leaf in zip((graph, layer), leaves, strict=True)]
    assert torch.equal(*results)
    same(*(torch.autograd.grad(y.square().sum(), leaf) for y, leaf in zip(results, leaves, strict=True)))


def test_a_changed_argument_is_named(device: str) -> None:
    x = torch.rand(T, 4, device=device, requires_grad=True)
    total = potential = torch.zeros(4, device=device)
    spikes = functional.lif(x, initial_potential=potential)
    total += spikes.sum(0).detach()
    with pytest.raises(RuntimeError, match="initial_potential of a spiking layer was changed in place"):
        spikes.sum().backward()
    layer = make("neunorm_lif", "fused", device)
    normalised = layer(inputs(device=device))
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="x, weight or a decay of a spiking layer was changed in place"):
        normalised.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool, device: str) -> None:
    layer = stbp_cuda.LIFLayer(surrogate="sigmoid")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for steps in (3, 70):
        x = torch.randn(steps, 5, 6, device=device).requires_grad_()
        weight = torch.randn(steps, 5, 6, device=device)
        results = []
        for run in (layer, compiled):
            spikes, potential = run(x, torch.ones(5, 6, device=device), return_potential=True)
            results.append((spikes, potential, *torch.autograd.grad((spikes * weight).sum() + potential.sum(), x)))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))


class Varied(nn.Module):
    """LIF with an option that each call gives anew."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        spikes, potential = functional.lif(x, return_potential=True, **options)
        return spikes.unflatten(0, (-1, *potential.shape[:1])) + potential if "steps" in options else spikes + potential


def count_graphs(
    module: nn.Module, calls: list[tuple[Tensor, dict[str, Any]]], before: Callable[[int], None], **options: Any
) -> int:
    """How many graphs so many calls need, of which each must be right."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, **options)
    for i, (x, keywords) in enumerate(calls):
        before(i)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        found, expected = compiled(leaves[0], **keywords), module(leaves[1], **keywords)
        assert torch.equal(found, expected)
        (found.sin().sum()).backward()
        (expected.sin().sum()).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
        assert leaves[0].grad.any()  # type: ignore[union-attr]
    return counter.frame_count


SIZES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "T": lambda i: (3 + 17 * i, 2, 3, 4),
    "B": lambda i: (5, 2 + i, 3, 4),
    "space": lambda i: (5, 2, 3, 4 + i),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sizes_share_a_graph(size: str, dynamic: bool | None, layout: str, device: str) -> None:
    def sample(i: int) -> Tensor:
        x = torch.rand(SIZES[size](i), device=device) * 2
        return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x

    calls = [(sample(i), {}) for i in range(12)]
    assert count_graphs(stbp_cuda.LIFLayer(), calls, lambda i: None, dynamic=dynamic) <= 3


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("size", ["T", "B"])
def test_sizes_share_a_graph_with_normalisation(size: str, dynamic: bool | None, device: str) -> None:
    calls = [(torch.rand(SIZES[size](i), device=device) * 2, {}) for i in range(12)]
    layer = stbp_cuda.NeuNormLIF((3, 4)).to(device)
    assert count_graphs(layer, calls, lambda i: None, dynamic=dynamic) <= 3


def test_folded_time_shares_a_graph(device: str) -> None:
    """With the number of steps as an argument: integers that are attributes of a module are fixed by torch."""
    calls = [(torch.rand((2 + i) * (3 + i), 6, device=device) * 2, {"steps": 2 + i}) for i in range(12)]
    assert count_graphs(Varied(), calls, lambda i: None) <= 3


OPTIONS: dict[str, Callable[[int], Any]] = {
    "decay": lambda i: 0.1 + 0.07 * i,
    "v_threshold": lambda i: 0.3 + 0.05 * i,
    "v_reset": lambda i: -0.05 * i,
    "surrogate": lambda i: stbp_cuda.surrogate.Sigmoid(0.5 + 0.1 * i),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["lif", "neunorm_lif"])
def test_numbers_share_a_graph(name: str, option: str, dynamic: bool | None, device: str) -> None:
    layer = make(name, "auto", device)
    calls = [(inputs(device=device), {}) for _ in range(12)]
    change = OPTIONS[option]
    assert count_graphs(layer, calls, lambda i: setattr(layer, option, change(i)), dynamic=dynamic) <= 3


@pytest.mark.parametrize("option", OPTIONS)
def test_numbers_as_arguments_share_a_graph(option: str, device: str) -> None:
    calls = [(inputs(device=device), {option: OPTIONS[option](i)}) for i in range(12)]
    assert count_graphs(Varied(), calls, lambda i: None) <= 3


def test_the_decay_of_normalisation_shares_a_graph(device: str) -> None:
    layer = make("neunorm_lif", "auto", device)
    calls = [(inputs(device=device), {}) for _ in range(12)]
    assert count_graphs(layer, calls, lambda i: setattr(layer, "norm_decay", 0.1 + 0.07 * i)) <= 3


def test_all_at_once(device: str) -> None:
    layer = stbp_cuda.LIFLayer()

    def change(i: int) -> None:
        layer.v_threshold, layer.decay = 0.3 + 0.05 * i, 0.9 - 0.05 * i

    calls = [(torch.rand(3 + 13 * i, 2 + i, 5 + i, device=device) * 2, {}) for i in range(12)]
    assert count_graphs(layer, calls, change) <= 3


def test_numbers_out_of_range_in_a_compiled_graph(device: str) -> None:
    layer = stbp_cuda.LIFLayer()
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.rand(3, 4, device=device)
    for decay in (0.1, 0.2, 0.3):
        layer.decay = decay
        compiled(x)
    layer.decay = 1.5
    with pytest.raises(ValueError, match="decay must lie in"):
        compiled(x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["lif", "neunorm_lif"])
def test_export_with_free_sizes(name: str, strict: bool, device: str) -> None:
    layer = make(name, "auto", device)
    free = {0: torch.export.Dim("T", min=2, max=500), 1: torch.export.Dim("B", min=2)}
    program = torch.export.export(layer, (inputs(device=device),), dynamic_shapes=(free,), strict=strict)
    for steps, batch in (2, 2), (5, 9), (64, 3), (65, 2), (300, 2):
        x = torch.rand(steps, batch, *SHAPE, device=device) * 2
        assert torch.equal(program.module()(x), layer(x))
        assert torch.equal(program.run_decompositions().module()(x), layer(x))


@pytest.mark.parametrize("name", ["lif", "neunorm_lif"])
def test_compiled_transforms(name: str, device: str) -> None:
    layer, x = make(name, "auto", device), inputs(3, device=device)
    function = vmap(grad(lambda x: (layer(x) * x).sum()))
    expected = function(x)
    same(torch.compile(function, backend="aot_eager")(x), expected)
