"""docs/coming-from.md, line by line: each row of its tables against the other library, or a loop of the equations."""

import copy
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stbp_cuda import LIFLayer, PLIFLayer
from stbp_cuda.surrogate import Atan, Sigmoid, Surrogate

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
Layer = Callable[[Tensor], Tensor]


def run_code(page: str) -> dict[str, Any]:
    """The names that a page's code defines."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    return names


NAMES = run_code(PAGE)


def library(name: str) -> dict[str, Any]:
    """What the page calls the modules of SpikingJelly, snnTorch or Norse; skip without them."""
    with warnings.catch_warnings():  # by Norse, about functions that are not used here
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        module = pytest.importorskip(name)
        if name == "snntorch":
            importlib.import_module("snntorch.surrogate")
            return {"snntorch": module}
        if name == "norse":
            return {
                "norse": importlib.import_module("norse.torch"),
                "threshold": importlib.import_module("norse.torch.functional.threshold").threshold,
            }
    return {
        part: importlib.import_module(f"spikingjelly.activation_based.{part}")
        for part in ("neuron", "surrogate", "functional")
    }


def tables(title: str) -> list[list[list[str]]]:
    """The cells of each table under a title, without the heads."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert section is not None, title
    found = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", section[1], re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in table.splitlines()] for table in found]


def code(cell: str) -> str:
    found = re.search("`(.*?)`", cell)
    return found[1] if found else cell


@pytest.fixture
def float64() -> Iterator[None]:
    """Constants of the other libraries are tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stepwise(step: Callable[..., tuple[Tensor, Any]]) -> Layer:
    """A module of snnTorch or Norse, called in each step."""

    def layer(x: Tensor) -> Tensor:
        first = getattr(step, "reset_mem", lambda: None)()
        state, spikes = first if isinstance(first, tuple) else (first,), []
        for current in x:
            spike, *state = step(current, *state)
            spikes.append(spike)
        return torch.stack(spikes)

    return layer


def multi_step(node: Any) -> Layer:
    """A neuron of SpikingJelly, over all steps from its first state."""

    def layer(x: Tensor) -> Tensor:
        node.step_mode = "m"
        node.reset()
        return node.to(x.dtype)(x)

    return layer


def run(layer: Layer, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    spikes = layer(x)
    (gradient,) = torch.autograd.grad((spikes * weight).sum(), x)
    return spikes.detach().to(x.dtype), gradient


def compare(theirs: Layer, ours: Layer, k: float, rtol: float = 1e-9, same_gradients: bool = True) -> None:
    """Hold spikes and gradients against each other, for currents of about the size of k."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(12, 4, 50, generator=generator, dtype=torch.float64) + 0.4) * k
        weight = torch.randn(12, 4, 50, generator=generator).double()  # in float32, as gradients of snnTorch's spikes
        (expected, their_gradient), (found, gradient) = run(theirs, x, weight), run(ours, x, weight)
        assert torch.equal(found, expected)
        assert 0.02 < expected.mean() < 0.9
        assert (their_gradient != 0).double().mean() > 0.05
        if same_gradients:
            atol = rtol * their_gradient.abs().max().item()
            torch.testing.assert_close(gradient, their_gradient, rtol=rtol, atol=atol)
        else:
            best = (their_gradient * gradient).sum() / gradient.square().sum()
            assert (their_gradient - best * gradient).norm() > 0.01 * their_gradient.norm()


def size_of_currents(layer: nn.Module) -> float:
    (lif,) = (module for module in layer.modules() if isinstance(module, LIFLayer))
    scale = 1 - lif.decay if isinstance(lif, PLIFLayer) else float(lif.scale)
    return torch.as_tensor(lif.v_threshold).item() / scale


def check_row(theirs: Layer, ours: str, rtol: float = 1e-9, **names: Any) -> None:
    layer = eval(ours, {**NAMES, **names})
    compare(theirs, layer.double(), size_of_currents(layer), rtol)


def every_row(title: str, number: int = 0) -> Any:
    table = tables(title)[number]
    return pytest.mark.parametrize("row", table, ids=[code(row[0]) for row in table])


@every_row("SpikingJelly")
@pytest.mark.usefixtures("float64")
def test_spikingjelly(row: list[str]) -> None:
    theirs, ours = row
    node = eval(code(theirs), library("spikingjelly"))
    check_row(multi_step(node), code(ours))
    assert repr(NAMES["from_spikingjelly"](node)) == repr(eval(code(ours), NAMES))


@given(
    st.floats(1.1, 8),
    st.booleans(),
    st.floats(0.3, 1.5),
    st.none() | st.floats(-0.5, 0.2),
    st.booleans(),
    st.sampled_from(["ATan", "Erf", "PiecewiseQuadratic", "Rect", "Sigmoid", "SoftSign"]),
    st.floats(0.3, 1.5),
)
def test_any_neuron_of_spikingjelly(
    tau: float, decay_input: bool, height: float, v_reset: float | None, detach: bool, name: str, alpha: float
) -> None:
    names = library("spikingjelly")
    node = names["neuron"].LIFNode(
        tau=tau,
        decay_input=decay_input,
        v_threshold=height + (v_reset or 0.0),
        v_reset=v_reset,
        detach_reset=detach,
        surrogate_function=getattr(names["surrogate"], name)(alpha=alpha),
    )
    ours = NAMES["from_spikingjelly"](node)
    compare(multi_step(node), ours, ours.v_threshold)


def test_a_network_of_spikingjelly() -> None:
    names = library("spikingjelly")
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    atan = names["surrogate"].ATan()
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        nn.Sequential(layer.BatchNorm2d(4), names["neuron"].LIFNode(v_threshold=0.3, detach_reset=True)),
        layer.AvgPool2d(2),
        nn.Flatten(2),
        layer.Linear(64, 10),
        names["neuron"].IFNode(v_threshold=0.2, surrogate_function=atan),
    ).double()
    names["functional"].set_step_mode(net, "m")
    ours = NAMES["convert"](copy.deepcopy(net))
    assert [type(module) for module in ours.modules()].count(LIFLayer) == 2
    x = torch.rand(6, 3, 2, 8, 8, dtype=torch.float64)
    expected, found = net(x), ours(x)
    assert torch.equal(found, expected)
    assert 0.05 < expected.mean() < 0.95
    pairs = [torch.autograd.grad(y.sum(), list(m.parameters())) for m, y in ((net, expected), (ours, found))]
    for theirs, gradient in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-9, atol=1e-9)
    assert pairs[0][0].any()
    with pytest.raises(KeyError, match="PiecewiseExp"):
        NAMES["from_spikingjelly"](names["neuron"].LIFNode(surrogate_function=names["surrogate"].PiecewiseExp()))
    with pytest.raises(KeyError, match="QIFNode"):
        NAMES["from_spikingjelly"](names["neuron"].QIFNode())


def test_the_transcription_that_comes_to_mind() -> None:
    """13 % instead of 3 %."""
    x = torch.randn(20, 10_000, generator=torch.Generator().manual_seed(0))
    rates = [LIFLayer(0.5, threshold, Sigmoid(width))(x).mean().item() for threshold, width in ((1.0, 1.0), (2.0, 0.5))]
    assert rates == pytest.approx([0.13, 0.03], abs=0.005)
    assert NAMES["in_their_units"](x).mean().item() == pytest.approx(rates[1], abs=1e-5)
    names = library("spikingjelly")
    assert multi_step(names["neuron"].LIFNode())(x).mean().item() == pytest.approx(rates[1], abs=1e-5)


@every_row("snnTorch")
@pytest.mark.usefixtures("float64")
def test_snntorch(row: list[str]) -> None:
    """snnTorch's spikes and their gradients are float32, whatever its input is."""
    theirs, ours = row
    check_row(stepwise(eval(code(theirs), {"torch": torch, **library("snntorch")})), code(ours), rtol=1e-6)


def test_subtraction_by_snntorch() -> None:
    leaky = library("snntorch")["snntorch"].Leaky
    ours = LIFLayer(0.5, 1.0, reset="soft", strict_threshold=True)
    x = torch.rand(20, 1000, generator=torch.Generator().manual_seed(0)) * 1.4  # u <= 0.5 + 1.4
    at_once, late = (stepwise(leaky(beta=0.5, reset_delay=delay)) for delay in (False, True))
    assert torch.equal(ours(x), at_once(x))
    assert 0.2 < ours(x).mean() < 0.8
    assert (ours(2 * x) != at_once(2 * x)).float().mean() > 0.01  # above 2
    assert (ours(x) != late(x)).float().mean() > 0.01  # the default


def gradients(layer: Layer, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(1)
    spikes = layer(x)
    assert 0.02 < spikes.mean() < 0.9
    return list(torch.autograd.grad((spikes * torch.randn(spikes.shape)).sum(), parameters))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(), (50,)])
def test_what_snntorch_learns(shape: tuple[int, ...]) -> None:
    snntorch = library("snntorch")["snntorch"]
    decay, threshold = torch.rand(shape) * 0.4 + 0.5, torch.rand(shape) + 0.5
    theirs = snntorch.Leaky(decay.clone(), threshold.clone(), learn_beta=True, learn_threshold=True)
    own = [nn.Parameter(decay.clone()), nn.Parameter(threshold.clone())]
    options = {"reset": "soft", "delayed": True, "detach_reset": True, "strict_threshold": True}
    ours = LIFLayer(*own, Atan(1.0), **options)
    x = torch.randn(20, 8, 50) + 0.4
    assert torch.equal(stepwise(theirs)(x).double(), ours(x))
    expected = gradients(stepwise(theirs), x, [theirs.beta, theirs.threshold])
    for found, gradient in zip(gradients(ours, x, own), expected, strict=True):
        assert gradient.all()
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("tau", [2.0, 3.5])
def test_what_spikingjelly_learns(v_reset: float | None, decay_input: bool, tau: float) -> None:
    neuron = library("spikingjelly")["neuron"]
    node = neuron.ParametricLIFNode(tau, decay_input, v_threshold=0.7, v_reset=v_reset, detach_reset=True)
    ours = NAMES["from_spikingjelly"](node)
    x = torch.randn(20, 8, 50) + 0.4
    assert torch.equal(multi_step(node)(x), ours(x))
    (expected,) = gradients(multi_step(node), x, [node.w])
    (found,) = gradients(ours, x, list(ours.parameters()))
    if not decay_input:
        found = -found  # of the decay's logit; w is that of 1 - decay
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert abs(expected) > 1e-3


READ_OUTS = tables("Read-outs and potentials")[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("row", READ_OUTS, ids=[row[0] for row in READ_OUTS])
def test_read_outs(row: list[str]) -> None:
    name = row[0].partition(":")[0].lower()
    theirs: Any = eval(re.findall("`(.*?)`", row[0])[-1], library(name))
    ours = eval(code(row[1]), NAMES)
    x = torch.randn(10, 4, 50).requires_grad_()
    if name == "spikingjelly":
        potentials = theirs(x)
    else:
        state, potentials = theirs.reset_mem() if name == "snntorch" else None, []
        for current in x:
            value, state = theirs(current, state)
            potentials.append(state if name == "snntorch" else value)
    found, expected = ours(x), potentials if isinstance(potentials, Tensor) else torch.stack(potentials)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)), rtol=1e-6, atol=1e-5
    )


def test_potentials_of_all_steps() -> None:
    x = torch.randn(10, 50, dtype=torch.float64)
    names = library("spikingjelly")
    node = names["neuron"].LIFNode(decay_input=False, step_mode="m", store_v_seq=True)
    node(x)
    _, potentials = NAMES["from_spikingjelly"](node)(x, return_potentials="after_reset")
    assert torch.equal(potentials, node.v_seq)
    leaky = library("snntorch")["snntorch"].Leaky(0.5)
    mem, expected = leaky.reset_mem(), []
    for current in x:
        _, mem = leaky(current, mem)
        expected.append(mem)
    ours = LIFLayer(0.5, 1.0, reset="soft", delayed=True, strict_threshold=True)
    (
        _,
        potentials,
    ) = ours(x, return_potentials="before_reset")
    torch.testing.assert_close(potentials, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_learned_parameters() -> None:
    names = NAMES
    assert names["learned"].learned["decay"].shape == (16,)
    assert names["learned"].learned["decay"].grad.any()
    torch.testing.assert_close(names["learned"].values()["decay"], torch.full((16,), 0.9, dtype=torch.float64))
    assert len(list(names["as_they_are"].parameters())) == 2
    assert len(list(names["fixed"].buffers())) == 3
    assert names["fixed"](torch.randn(10, 3, 16)).shape == (10, 3, 16)
    assert names["u"].shape == names["v"].shape == (8, 3, 16)


@every_row("Norse")
@pytest.mark.usefixtures("float64")
def test_norse(row: list[str]) -> None:
    """Norse's default parameters are float32."""
    theirs, ours = row
    cell = eval(code(theirs), {"torch": torch, **library("norse")})
    check_row(stepwise(cell), code(ours), rtol=1e-6)


def mem_update(x: Tensor, decay: float, fire: Callable[[Tensor], Tensor], detach: bool = False) -> Tensor:
    """The loop of most papers' code."""
    mem = spike = torch.zeros_like(x[0])
    spikes = []
    for current in x:
        mem = mem * decay * (1 - (spike.detach() if detach else spike)) + current
        spike = fire(mem)
        spikes.append(spike)
    return torch.stack(spikes)


class Fire(torch.autograd.Function):
    """A spike function as papers' code has them: what fires, and a derivative, of the potential."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, fires: Layer, derivative: Layer) -> Tensor:
        ctx.save_for_backward(u)
        ctx.derivative = derivative
        return fires(u).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.derivative(ctx.saved_tensors[0]), None, None


def window(threshold: float) -> Layer:
    return lambda u: ((u - threshold).abs() < 0.5).to(u)


def yjwu17(decay: float, threshold: float) -> Layer:
    return lambda x: mem_update(x, decay, lambda u: Fire.apply(u, lambda u: u.gt(threshold), window(threshold)))


def tet(x: Tensor) -> Tensor:
    return mem_update(x, 0.5, lambda u: Fire.apply(u, lambda u: u - 1 > 0, lambda u: (1 - (u - 1).abs()).clamp(min=0)))


def nda(x: Tensor) -> Tensor:
    return mem_update(x, 0.25, lambda u: Fire.apply(u, lambda u: u - 0.5 >= 0, window(0.5)))


K = 0.4


def sparch(x: Tensor) -> Tensor:
    u = spike = torch.zeros_like(x[0])
    spikes = []
    for current in x:
        u = K * (u - spike) + (1 - K) * current
        spike = Fire.apply(u - 1, lambda s: s > 0, lambda s: (s.abs() <= 0.5).to(s))
        spikes.append(spike)
    return torch.stack(spikes)


def plif(x: Tensor) -> Tensor:
    v = torch.zeros_like(x[0])
    spikes = []
    for dv in x:
        v = v + (dv - v) * K
        spike = Fire.apply(v, lambda v: v >= 1, lambda v: 1 / (1 + (torch.pi * (v - 1)).square()))
        v = v * (1 - spike.detach())
        spikes.append(spike)
    return torch.stack(spikes)


LOOPS = {
    "STBP's authors (yjwu17), `spiking_model.py`": yjwu17(0.2, 0.5),
    "STBP's authors, `spiking_cnn_model.py`": yjwu17(0.25, 0.75),
    "STBP-simple": yjwu17(0.2, 0.2),
    "TET": tet,
    "NDA": nda,
    "PLIF": plif,
    "sparch, `LIFLayer`, with `alpha` k": sparch,
}


@every_row("Papers' code and hand-written loops")
@pytest.mark.usefixtures("float64")
def test_papers_code(row: list[str]) -> None:
    name, charge, fires, ours = row
    check_row(LOOPS[name], code(ours), k=K)
    layer = eval(code(ours), {**NAMES, "k": K})
    charged = eval(code(charge), {"v": 1.0, "x": 0.0, "k": K})
    comparison, threshold = code(fires).split()
    assert (charged, comparison) == (pytest.approx(layer.decay), ">" if layer.strict_threshold else ">=")
    assert eval(code(charge), {"v": 0.0, "x": 1.0, "k": K}) == pytest.approx(layer.scale)
    assert layer.v_threshold == float(threshold)


def test_a_threshold_that_is_subtracted_twice() -> None:
    def earlier(x: Tensor) -> Tensor:
        return mem_update(x, 0.2, lambda u: Fire.apply(u - 0.2, lambda s: s > 0.2, window(0.0)))

    compare(earlier, LIFLayer(0.2, 0.4, strict_threshold=True), 0.4, same_gradients=False)


def test_a_network_of_the_authors() -> None:
    """Their forward(), with the weights and the input of ours."""
    assert NAMES["rates"].shape == (2, 10)
    net = copy.deepcopy(NAMES["net"]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)  # so that spikes reach the output
    layers = net.layers

    def forward(steps: Tensor) -> Tensor:
        state: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def update(ops: nn.Module, x: Tensor) -> Tensor:
            mem, spike = state.get(ops, (torch.zeros(()), torch.zeros(())))
            mem = mem * 0.2 * (1.0 - spike) + ops(x)
            state[ops] = mem, Fire.apply(mem, lambda u: u.gt(0.5), window(0.5))
            return state[ops][1]

        total = torch.zeros(())
        for x in steps:
            x = nn.functional.avg_pool2d(update(layers.conv1, x), 2)
            x = nn.functional.avg_pool2d(update(layers.conv2, x), 2)
            total = total + update(layers.fc2, update(layers.fc1, x.view(len(x), -1)))
        return total / len(steps)

    x = (torch.rand(20, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    expected, found = forward(x), net(x).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert expected.max() > 0
    weight = torch.randn(2, 10, dtype=torch.float64)
    pairs = [torch.autograd.grad((rates * weight).sum(), list(net.parameters())) for rates in (expected, found)]
    for theirs, ours in zip(*pairs, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def their_derivative(cell: str, s: Tensor, a: float) -> Tensor:
    """Of a spike function at s, or written out."""
    if "s" in re.findall(r"\w+", code(cell)):

        def density(s: Tensor, mean: float, deviation: float) -> Tensor:
            return torch.distributions.Normal(mean, deviation).log_prob(s).exp()

        derivative = eval(code(cell), {"torch": torch, "s": s, "a": a, "g": density})
        assert isinstance(derivative, Tensor)
        return derivative
    s = s.clone().requires_grad_()
    if method := re.search(r'^Norse, `method="(\w+)"`', cell):
        spikes = library("norse")["threshold"](s, method[1], torch.tensor(a))
    else:
        name = "snntorch" if "snntorch" in cell else "spikingjelly"
        spikes = eval(code(cell), {**library(name), "a": a})(s)
    (derivative,) = torch.autograd.grad(spikes.sum(), s)
    return derivative


SURROGATES = [row for table in tables("Surrogates") for row in table]


@pytest.mark.parametrize("row", SURROGATES, ids=[row[0] for row in SURROGATES])
@pytest.mark.usefixtures("float64")
def test_surrogates(row: list[str]) -> None:
    theirs, ours = row
    s = torch.linspace(-4, 4, 999) + 1e-4
    for a in (0.3, 1.0, 2.5):
        for k in (1.0, 2.0, 0.4):
            surrogate: Surrogate = eval(code(ours), {**NAMES, "a": a, "k": k})
            found = k * surrogate.derivative(k * s)  # potentials are k times theirs, and so is their derivative
            rtol = 1e-6 if "snntorch" in theirs else 1e-9  # whose gradients are float32 in part
            torch.testing.assert_close(found, their_derivative(theirs, s, a), rtol=rtol, atol=1e-12)


def test_layouts() -> None:
    names = NAMES
    spikes = names["spikes"]
    assert torch.equal(names["folded"], spikes.flatten(0, 1))
    assert torch.equal(names["from_batch_first"], spikes.movedim(0, 1))
    assert torch.equal(names["from_time_last"], spikes.movedim(0, -1))
    assert names["from_batch_first"].is_contiguous()
    assert not torch.equal(LIFLayer()(names["batch_first"]), names["from_batch_first"])  # samples taken for steps
    for sample, length in enumerate(names["lengths"]):
        alone, last = LIFLayer()(names["x"][:length, sample], return_potential=True)
        assert torch.equal(names["padded"][:length, sample], alone)
        assert not names["padded"][length:, sample].any()
        assert torch.equal(names["last"][sample], last)
        torch.testing.assert_close(names["mean_rates"][sample], alone.mean(0))


@pytest.mark.usefixtures("float64")
def test_states() -> None:
    names = library("spikingjelly")
    node = names["neuron"].LIFNode(tau=2.0, v_threshold=0.6, v_reset=-0.4, step_mode="m")
    layer: LIFLayer = NAMES["from_spikingjelly"](node)
    chunks = torch.randn(6, 3, 50).add(0.5).requires_grad_().split(2)
    potential = None
    for chunk in chunks:
        expected = node(chunk)
        found, potential = layer(chunk, potential, return_potential=True)
        assert torch.equal(found, expected)
        assert 0 < found.mean() < 1
        torch.testing.assert_close(potential / 2 - 0.4, node.v)
        gradients = [torch.autograd.grad(spikes.sum(), chunk)[0] for spikes in (expected, found)]
        torch.testing.assert_close(*gradients)
        names["functional"].detach_net(node)
        potential = potential.detach()
    x = torch.cat(chunks).detach()
    assert torch.equal(torch.cat([*NAMES["parts"]]).to(x), NAMES["layer"](NAMES["x"]).to(x))
    spikes, state = [], None
    for t in range(len(x)):
        spike, state = layer(x[t : t + 1], state, return_potential=True)
        spikes.append(spike)
    assert torch.equal(torch.cat(spikes), layer(x))


@pytest.mark.usefixtures("float64")
def test_states_of_others() -> None:
    x = torch.randn(6, 50).add(0.5)
    norse = library("norse")["norse"]
    cell, state = norse.LIFBoxCell(norse.LIFBoxParameters(tau_mem_inv=torch.tensor(500.0))), None
    for current in 2 * x:
        _, state = cell(current, state)
    _, potential = LIFLayer(0.5, 2.0, strict_threshold=True)(2 * x, return_potential=True)
    assert state is not None
    torch.testing.assert_close(potential / 2, state.v, rtol=1e-6, atol=1e-6)
    assert (potential == 0).any()
    snntorch = library("snntorch")["snntorch"]
    leaky = snntorch.Leaky(0.5, reset_mechanism="zero")
    mem = leaky.reset_mem()
    for current in x:
        spike, mem = leaky(current, mem)
    _, potential = LIFLayer(0.5, 1.0, strict_threshold=True)(x, return_potential=True)
    torch.testing.assert_close(mem * (1 - spike), potential)
    assert (mem[spike > 0] > 1).all()


def test_half_types() -> None:
    x = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = library("spikingjelly")
    node = names["neuron"].LIFNode(tau=2.0, decay_input=False, step_mode="m")
    theirs = node(x)
    assert (theirs.dtype, node.v.dtype) == (torch.bfloat16, torch.bfloat16)
    ours, potential = NAMES["from_spikingjelly"](node)(x, return_potential=True)
    assert (ours.dtype, potential.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (ours != theirs).float().mean() < 0.01
    node.reset()
    assert torch.equal(node(x.float()), ours.float())
    _, state = library("norse")["norse"].LIFBoxCell()(x[0])
    assert state.v.dtype == torch.bfloat16
    leaky = library("snntorch")["snntorch"].Leaky(0.5)
    spike, mem = leaky(x[0], leaky.reset_mem())
    assert (spike.dtype, mem.dtype) == (torch.float32, torch.float32)


def test_constant_currents() -> None:
    names = NAMES
    for way in ("constant", "expanded"):
        assert torch.equal(names[way], names["repeated"])
        gradients = [
            torch.autograd.grad(names[result].sum(), names["current"], retain_graph=True)[0]
            for result in (way, "repeated")
        ]
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().max() > 0
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    current = names["current"]
    for x in (current.expand(8, *current.shape), current.repeat(8, 1, 1)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            LIFLayer()(x)
    assert max(kept[len(kept) // 2 :]) == 8 * max(kept[: len(kept) // 2])


def test_a_surrogate_of_another_shape() -> None:
    """What the page says of PiecewiseExp and its like."""
    names = library("spikingjelly")

    class PiecewiseExp(Surrogate):
        name = "piecewise_exp"

        def derivative(self, s: Tensor) -> Tensor:
            return torch.exp(-s.abs() * (1 / self.width)) * (0.5 / self.width)

    function = names["surrogate"].PiecewiseExp(2.0)
    node = names["neuron"].LIFNode(2.0, decay_input=False, surrogate_function=function)
    compare(multi_step(node), LIFLayer(0.5, 1.0, PiecewiseExp(0.5), backend="reference"), 1.0)
