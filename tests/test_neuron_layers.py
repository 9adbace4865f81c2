"""The layers of all neurons, and what torch makes of neurons with parameters: torch.func, compilers, operators."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_neurons import CHUNK, RANGES, VARIANTS, close, every_variant, gradients, neuron, normal, parameter, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import stbp_cuda
from stbp_cuda import functional, ops
from stbp_cuda.neurons import NEURONS
from stbp_cuda.surrogate import Atan

# Learned parameters.


@given(
    decay=st.floats(1e-6, 1 - 1e-6),
    v_reset=st.floats(-5, 5),
    above=st.floats(1e-3, 100),
    others=st.tuples(*[st.floats(-10, 10, width=32)] * 3),
    channels=st.sampled_from([None, 3, (3, 2)]),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learned_parameters_start_from_the_values_given(
    decay: float, v_reset: float, above: float, others: tuple[float, ...], channels: Any, dtype: torch.dtype
) -> None:
    numbers = {"decay": decay, "scale": others[0], "shift": others[1]}
    hard = stbp_cuda.LIFLayer(
        **numbers, v_threshold=v_reset + above, v_reset=v_reset, learn=(*numbers, "v_threshold"), channels=channels
    ).to(dtype)
    soft = stbp_cuda.LIFLayer(
        **numbers, v_threshold=above, subtract=others[2], reset="soft", learn=(*RANGES,), channels=channels
    ).to(dtype)
    for layer, more in (
        (hard, {"v_threshold": v_reset + above}),
        (soft, {"v_threshold": above, "subtract": others[2]}),
    ):
        values = layer.values()
        for name, expected in {**numbers, **more}.items():
            assert (values[name].to(dtype) == torch.tensor(expected, dtype=dtype)).all(), name
    x = normal(4, 2, 3, 2, dtype=dtype)
    plain = {**numbers, "v_threshold": v_reset + above, "v_reset": v_reset}
    assert torch.equal(hard(x), functional.lif(x, **plain))


@pytest.mark.parametrize("extreme", [1e4, -1e4])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learned_parameters_stay_in_range(extreme: float, reset: str, dtype: torch.dtype) -> None:
    v_reset = -0.3 if reset == "hard" else 0.0
    layer = stbp_cuda.LIFLayer(reset=reset, v_reset=v_reset, learn=("decay", "v_threshold")).to(dtype)
    for learned in layer.learned.values():
        nn.init.constant_(learned, extreme)
    values = {name: value.to(dtype) for name, value in layer.values().items()}
    assert 0 <= values["decay"] <= 1
    assert v_reset < values["v_threshold"] < math.inf
    layer(normal(4, 2, dtype=dtype)).sum().backward()
    assert all(learned.grad.isfinite().all() for learned in layer.learned.values())


@pytest.mark.parametrize("channels", [None, 4])
def test_layers_learn(channels: int | None, device: str) -> None:
    """To fire as another layer does, and to follow the potentials of one."""
    x = normal(12, 16, 4, device=device)
    torch.manual_seed(0)
    kinds: list[tuple[nn.Module, Tensor]] = [
        (
            stbp_cuda.LIFLayer(surrogate="sigmoid", reset="soft", learn=tuple(RANGES), channels=channels),
            functional.lif(x, decay=0.8, v_threshold=0.4, subtract=0.7, reset="soft", shift=0.3),
        ),
        (stbp_cuda.PLIFLayer(), functional.lif(x, decay=0.2, v_threshold=1.0, scale=0.8)),
        (stbp_cuda.LILayer(learn=("decay", "scale", "shift"), channels=channels), functional.li(x, decay=0.8, scale=2)),
    ]
    for layer, target in kinds:
        layer.to(device)
        optimizer = torch.optim.Adam(layer.parameters(), 0.05)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            # Of leaky sums, as a spike is an event of its time.
            loss = (functional.li(layer(x), decay=0.8) - functional.li(target, decay=0.8)).square().mean()
            loss.backward()
            assert losses or all(parameter.grad.any() for parameter in layer.parameters())
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("init_tau", [1.5, 2.0, 10.0])
def test_plif_is_its_loop(init_tau: float, device: str) -> None:
    layer = stbp_cuda.PLIFLayer(init_tau).to(device, torch.float64)
    assert 1 / layer.w.sigmoid().item() == pytest.approx(init_tau, rel=1e-6)
    x = 3 * normal(40, 5, 6, device=device, dtype=torch.float64)
    spikes = layer(x)
    w = layer.w.detach().clone().requires_grad_()
    v, outputs = torch.zeros(5, 6, dtype=torch.float64, device=device), []
    for current in x:
        u = v + (current - v) * w.sigmoid()
        s = u - 1
        smooth = Atan().antiderivative(s)
        o = (s >= 0).double() + (smooth - smooth.detach())
        v = u * (1 - o)
        outputs.append(o)
    assert torch.equal(spikes, torch.stack(outputs).round())
    close(gradients(spikes, [layer.w]), gradients(torch.stack(outputs), [w]), 1e-10)
    assert spikes.any()


# What torch makes of them.


@pytest.fixture
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch's own, of torch.jit in torch.func, and of what it has deprecated inside its compiler.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


in_torch = pytest.mark.usefixtures("no_graphs_of_other_tests")
T = 5
MAPPED = {"x": (0, None, None), "parameters": (None, 0, 0), "all": (0, 0, 0), "one parameter": (None, 0, None)}
SETTINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda device: {},
    "batch first": lambda device: {"time_dim": 1, "return_potential": True},
    "lengths": lambda device: {"lengths": torch.tensor([5, 2], device=device), "return_potential": True},
    "constant": lambda device: {"constant": True, "steps": T},
    "potentials": lambda device: {"return_potentials": "after_reset", "initial_potential": 0.1},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


def some_input(setting: str, *more: int, seed: int = 0, device: str = "cpu") -> Tensor:
    x = 2 * normal(*more, T, 2, 3, 4, seed=seed, device=device)
    if setting == "constant":
        return x.select(len(more), 0)
    return x.transpose(-3, -4).contiguous() if setting == "batch first" else x


@in_torch
@pytest.mark.parametrize("variant", ["delayed", "li"])
@every_setting
@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap(variant: str, setting: str, mapped: str, device: str) -> None:
    """Outputs, and gradients of samples, by each argument."""
    options, dims = SETTINGS[setting](device), MAPPED[mapped]

    def run(x: Tensor, decay: Tensor, shift: Tensor) -> Any:
        return neuron(variant, x, decay=decay, shift=shift, surrogate="sigmoid", **options)

    def loss(*leaves: Tensor) -> Tensor:
        return sum(y.sin().sum() for y in torch.utils._pytree.tree_leaves(run(*leaves)))

    full = (
        some_input(setting, 2, device=device),
        parameter("decay", 2, 3, device=device),
        parameter("shift", 2, 3, 4, device=device),
    )
    leaves = [leaf if dim == 0 else leaf[0] for leaf, dim in zip(full, dims, strict=True)]
    found = vmap(run, in_dims=dims)(*leaves)
    by_x, *of_parameters = vmap(grad(loss, argnums=(0, 1, 2)), in_dims=dims)(*leaves)
    for i in range(2):
        sample = [
            (leaf[i] if dim == 0 else leaf).clone().requires_grad_() for leaf, dim in zip(leaves, dims, strict=True)
        ]
        same(torch.utils._pytree.tree_map(lambda y, i=i: y[i], found), run(*sample))
        expected = torch.autograd.grad(loss(*sample), sample)
        assert torch.equal(by_x[i], expected[0])
        close([of[i] for of in of_parameters], expected[1:])


@in_torch
@every_variant
def test_jacobians(variant: str, device: str) -> None:
    x, decay = some_input("plain", device=device), parameter("decay", 3, device=device)

    def sums(x: Tensor, decay: Tensor) -> Tensor:
        return neuron(variant, x, decay=decay, surrogate="sigmoid").sum((1, 3))

    found = jacrev(sums, argnums=(0, 1))(x, decay)
    leaves = [x.clone().requires_grad_(), decay.clone().requires_grad_()]
    outputs = sums(*leaves).flatten()
    expected = [torch.autograd.grad(output, leaves, retain_graph=True) for output in outputs]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), torch.stack(theirs))


def make_layers(device: str = "cpu") -> dict[str, nn.Module]:
    learn = ("decay", "v_threshold", "scale")
    layers: dict[str, nn.Module] = {
        "tensors": stbp_cuda.LIFLayer(decay=parameter("decay", 3), v_threshold=parameter("v_threshold"), reset="soft"),
        "parameters": stbp_cuda.LIFLayer(
            scale=nn.Parameter(parameter("scale", 3, 4)), shift=nn.Parameter(torch.zeros(3))
        ),
        "learned": stbp_cuda.LIFLayer(0.4, 0.5, "sigmoid", learn=learn, channels=3, delayed=True, reset="soft"),
        "plif": stbp_cuda.PLIFLayer(3.0, 0.5),
        "li": stbp_cuda.LILayer(0.6, output="last", learn=("decay", "shift"), channels=(3, 4)),
    }
    return {name: layer.to(device) for name, layer in layers.items()}


every_layer = pytest.mark.parametrize("name", make_layers())


@in_torch
@every_layer
def test_gradients_of_samples_and_ensembles(name: str, device: str) -> None:
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(4, 4), make_layers()[name], nn.Linear(4, 2)).to(device))
    x = some_input("plain", device=device)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(nets[0], (parameters, buffers), x).square().sum()

    def expected_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        parameters = dict(net.named_parameters())
        return dict(zip(parameters, torch.autograd.grad(net(x).square().sum(), list(parameters.values())), strict=True))

    parameters, buffers = stack_module_state(nets)
    found = vmap(grad(loss), in_dims=(0, 0, None))(parameters, buffers, x)
    for i, net in enumerate(nets):
        expected = expected_of(net, x)
        close([found[key][i] for key in expected], expected.values(), 1e-4)
        assert all(of.any() for of in expected.values())
    samples = torch.stack(x[:, :, None].unbind(1))
    of_samples = vmap(grad(loss), in_dims=(None, None, 0))(
        dict(nets[0].named_parameters()), dict(nets[0].named_buffers()), samples
    )
    for i, sample in enumerate(samples):
        expected = expected_of(nets[0], sample)
        close([of_samples[key][i] for key in expected], expected.values(), 1e-4)


def count_graphs(function: Callable[..., Any], calls: list[Callable[[], tuple[Any, ...]]], leaves: list[Tensor]) -> int:
    """How many graphs the calls need, of which each must be right."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for arguments in calls:
        given_ = arguments()
        x = given_[0].requires_grad_()
        found, expected = compiled(*given_), function(*given_)
        same(found, expected)
        found, expected = (torch.utils._pytree.tree_leaves(outputs) for outputs in (found, expected))
        ours, theirs = gradients(found, [x, *leaves]), gradients(expected, [x, *leaves])
        assert torch.equal(ours[0], theirs[0])
        close(ours[1:], theirs[1:])
        assert all(of.any() for of in ours)
    return counter.frame_count


@in_torch
@pytest.mark.parametrize("variant", ["delayed", "li"])
@every_setting
def test_a_function_needs_no_new_graph(variant: str, setting: str, device: str) -> None:
    """For new numbers of steps, new numbers, and tensors of no dimensions."""
    leaves = [parameter("decay", 3, device=device).requires_grad_()]
    options = SETTINGS[setting](device)
    options.pop("steps", None)

    def run(x: Tensor, steps: int, threshold: float, scale: float, shift: Tensor) -> Any:
        more = {"steps": steps} if "constant" in options else {}
        return neuron(variant, x, decay=leaves[0], v_threshold=threshold, scale=scale, shift=shift, **options, **more)

    def arguments(i: int) -> tuple[Any, ...]:
        x = 2 * normal(T + 9 * i, 2, 3, 4, seed=i, device=device)
        x = x[0] if setting == "constant" else x.transpose(0, 1).contiguous() if setting == "batch first" else x
        return x, T + 9 * i, 0.3 + 0.05 * i, 1.5 + 0.1 * i, torch.tensor(0.1 * i, device=device)

    assert count_graphs(run, [lambda i=i: arguments(i) for i in range(6)], leaves) <= 3


@in_torch
def test_an_expanded_input_in_a_graph(device: str) -> None:
    one = normal(2, 3, device=device).requires_grad_()
    run = torch.compile(lambda x: functional.lif(x.expand(6, 2, 3)), backend="aot_eager", fullgraph=True)
    spikes, expected = run(one), functional.lif(one.expand(6, 2, 3))
    same(spikes, expected)
    close(gradients(spikes, [one]), gradients(expected, [one]))


@in_torch
@every_layer
def test_a_layer_needs_no_new_graph(name: str, device: str) -> None:
    """For new numbers of steps, lengths and values of its parameters."""
    layer = make_layers(device)[name]

    def arguments(i: int) -> tuple[Any, ...]:
        with torch.no_grad():
            for learned in layer.parameters():
                learned += 0.01 * i
        x = 2 * normal(T + 9 * i, 2, 3, 4, seed=i, device=device)
        return x, torch.tensor([T + i, 2], device=device)

    calls = [lambda i=i: arguments(i) for i in range(6)]
    run = lambda x, lengths: layer(x, None, True, lengths=lengths)  # noqa: E731
    assert count_graphs(run, calls, list(layer.parameters())) <= 3


@in_torch
def test_compiled_by_inductor(device: str) -> None:
    layer = make_layers(device)["learned"]
    x = some_input("plain", device=device)
    results = [run(x, return_potential=True, return_potentials="before_reset") for run in (torch.compile(layer), layer)]
    same(*results)
    close(*(gradients(result, layer.parameters()) for result in results))


@in_torch
@every_layer
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_free_sizes(name: str, strict: bool, device: str) -> None:
    layer = make_layers(device)[name]
    free = {0: torch.export.Dim("T", min=2, max=500), 1: torch.export.Dim("B", min=2)}
    shapes = {"x": free, "lengths": {0: free[1]}}
    keywords = {"lengths": torch.tensor([5, 2], device=device)}
    x = some_input("plain", device=device)
    program = torch.export.export(layer, (x,), keywords, dynamic_shapes=shapes, strict=strict)
    for steps, batch in (2, 2), (64, 3), (65, 2):
        x = 2 * normal(steps, batch, 3, 4, device=device)
        lengths = torch.arange(batch, device=device) + 1
        same(program.module()(x, lengths=lengths), layer(x, lengths=lengths))


FAKES = ("test_schema", "test_faketensor")


@in_torch
@pytest.mark.parametrize("variant", ["soft", "li"])
@pytest.mark.parametrize("setting", ["plain", "batch first", "constant", "channels last"])
def test_opcheck(variant: str, setting: str, device: str) -> None:
    kind, own = VARIANTS[variant]
    text, own_count = NEURONS[kind](**own).text(), len(NEURONS[kind].parameters)
    steps, time_dim, constant = CHUNK + 2, int(setting == "batch first"), setting == "constant"
    x = normal(steps, 2, 3, 4, device=device)
    x = x[0].clone() if constant else x.transpose(0, time_dim).contiguous()
    if setting == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    initial = normal(2, 3, 4, device=device).unsqueeze(time_dim)
    lengths = torch.tensor([steps, 3], device=device)
    for parameters, after in (
        (parameter("decay", own_count, 1, 3, 1, device=device), 1),
        (parameter("decay", own_count + 2, steps, 3, 4, device=device), 2),
        (None, 0),
    ):
        call = (steps, time_dim, constant, text, None, after)
        forward = [x, initial, parameters, lengths, *call, True, True, True]
        torch.library.opcheck(ops.neuron_forward, [*forward[:-3], after == 0, after == 1, False], test_utils=FAKES)
        leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in forward[:3]]
        torch.library.opcheck(ops.neuron_forward, [*leaves, *forward[3:]])
        output, final, potentials, states = ops.neuron_forward(*forward)
        grads = [torch.ones_like(output), torch.ones_like(final), torch.ones_like(potentials) if after else None]
        backward = [*grads, *forward[:4], states, *call, True, parameters is not None]
        torch.library.opcheck(ops.neuron_backward, backward)
        torch.library.opcheck(ops.neuron_backward, [None, *backward[1:-2], False, False], test_utils=FAKES)


# Layers.


@every_layer
def test_a_layer_is_kept(name: str, device: str) -> None:
    """By copies, pickles and state_dicts."""
    layer = make_layers(device)[name]
    for parameter_ in layer.parameters():
        nn.init.normal_(parameter_)
    x = some_input("plain", device=device).requires_grad_()
    expected = layer(x)
    fresh = make_layers(device)[name]
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(layer)
        close(gradients(other(x), [x, *other.parameters()]), gradients(layer(x), [x, *layer.parameters()]))


@every_layer
def test_a_layer_in_float64(name: str, device: str) -> None:
    layer, wide = make_layers(device)[name], make_layers(device)[name].double()
    assert all(value.dtype == torch.float64 for value in wide.values().values())
    x = some_input("plain", device=device).double()
    given_ = {key: value.double() for key, value in layer.values().items()}
    reset: dict[str, Any] = {key: getattr(layer, key) for key in ("delayed", "surrogate") if hasattr(layer, key)}
    if name == "li":
        expected = functional.li(x, output="last", **given_)
    else:
        given_.setdefault("v_threshold", layer.v_threshold)
        given_.setdefault("decay", layer.decay)
        expected = functional.lif(x, reset=layer.reset_mode, **reset, **given_)
    torch.testing.assert_close(wide(x), expected, rtol=1e-6, atol=1e-6)


def test_a_parameter_is_set_to_anything_that_it_may_be(device: str) -> None:
    layer = stbp_cuda.LIFLayer().to(device)
    x = normal(5, 2, 3, device=device)
    tensor = parameter("decay", 3, device=device)
    for value in (0.5, tensor, nn.Parameter(tensor / 2), tensor / 3, nn.Parameter(tensor), 0.9):
        layer.decay = value
        assert torch.equal(layer(x), functional.lif(x, decay=value))
        assert ("decay" in dict(layer.named_parameters())) == isinstance(value, nn.Parameter)
        assert ("decay" in layer.state_dict()) == isinstance(value, Tensor)
    layer.v_reset = tensor
    with pytest.raises(TypeError, match="v_reset must be a number"):
        layer(x)


def test_a_frozen_parameter_is_none_the_less_one(device: str) -> None:
    layer = stbp_cuda.LIFLayer(decay=nn.Parameter(torch.tensor(0.3, device=device), requires_grad=False))
    layer.v_threshold = 0.6  # options are checked anew
    layer.decay.fill_(0.9)
    x = normal(5, 2, 3, device=device)
    assert torch.equal(layer(x), functional.lif(x, decay=0.9, v_threshold=0.6))


def test_a_checkpoint_of_other_starts_warns() -> None:
    """What is learned is kept as its way from there."""
    trained, other = (stbp_cuda.LIFLayer(decay, learn=("decay", "scale")) for decay in (0.25, 0.5))
    with pytest.warns(UserWarning, match=r"was trained with decay=0\.25; here it is decay=0\.5"):
        other.load_state_dict(trained.state_dict())


def test_representations() -> None:
    texts = {name: repr(layer) for name, layer in make_layers().items()}
    assert "decay=tensor[3]" in texts["tensors"]
    assert "scale=tensor[3, 4]" in texts["parameters"]
    for text in ("decay=0.4 [3]", "v_threshold=0.5 [3]", "scale=1.0 [3]"):
        assert text in texts["learned"].split("learned: ")[1]
    assert "delayed=True" in texts["learned"]
    assert "learned: decay=0.6 [3, 4], shift=0.0 [3, 4]" in texts["li"]
    assert "output='last'" in texts["li"]
