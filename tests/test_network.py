"""Networks from a notation: every network of both papers, their structure, and the company they keep."""

import copy
import io
import pickle
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stbp_cuda
from stbp_cuda.network import Network, network

CIFARNET = "128C3(Enc)-256C3-AP2-512C3-AP2-1024C3-512C3-1024FC-512FC-Voting"
ALEXNET = "96C3(Enc)-256C3-AP2-384C3-AP2-384C3-256C3-1024FC-1024FC-Voting"
GREY, RGB, DVS, SACCADES = (1, 28, 28), (3, 32, 32), (2, 42, 42), (2, 34, 34)

# notation, input_shape, and the number of parameters, counted by hand: (inputs per neuron + 1) for each map and neuron.
PAPERS = [
    ("784-800-10", (784,), 785 * 800 + 801 * 10),
    ("784-400-10", GREY, 785 * 400 + 401 * 10),
    ("784-512-10", GREY, 785 * 512 + 513 * 10),
    ("2312-512-10", SACCADES, 2313 * 512 + 513 * 10),
    ("34x34x2-800-10", SACCADES, 2313 * 800 + 801 * 10),
    ("34\u00d734\u00d72-800-10", SACCADES, 2313 * 800 + 801 * 10),
    ("15C5-P2-40C5-P2-300-10", GREY, 26 * 15 + 376 * 40 + (40 * 4 * 4 + 1) * 300 + 301 * 10),
    ("28x28-15C5-P2-40C5-P2-300-10", GREY, 26 * 15 + 376 * 40 + (40 * 4 * 4 + 1) * 300 + 301 * 10),
    ("32C3-AP2-32C3-AP2-128-10", GREY, 10 * 32 + 289 * 32 + (32 * 5 * 5 + 1) * 128 + 129 * 10),
    ("6C3-300-10", GREY, 10 * 6 + (6 * 26 * 26 + 1) * 300 + 301 * 10),
    (
        CIFARNET,
        RGB,
        28 * 128 + 1153 * 256 + 2305 * 512 + 4609 * 1024 + 9217 * 512 + 32769 * 1024 + 1025 * 512 + 513 * 100,
    ),
    (
        ALEXNET,
        RGB,
        28 * 96 + 865 * 256 + 2305 * 384 + 3457 * 384 + 3457 * 256 + 16385 * 1024 + 1025 * 1024 + 1025 * 100,
    ),
    (
        "128C3(Enc)-128C3-AP2-128C3-256C3-AP2-1024FC-Voting",
        DVS,
        19 * 128 + 1153 * 128 + 1153 * 128 + 1153 * 256 + (256 * 10 * 10 + 1) * 1024 + 1025 * 100,
    ),
    (
        "128C3(Enc)-AP2-128C3-AP2-512FC-Voting",
        SACCADES,
        19 * 128 + 1153 * 128 + (128 * 8 * 8 + 1) * 512 + 513 * 100,
    ),
    (
        "128C3(Enc)-128C3-AP2-256C3-AP2-1024FC-Voting",
        SACCADES,
        19 * 128 + 1153 * 128 + 1153 * 256 + (256 * 8 * 8 + 1) * 1024 + 1025 * 100,
    ),
    (
        "128C3(Enc)-128C3-AP2-384C3-384C3-AP2-1024FC-512FC-Voting",
        SACCADES,
        19 * 128 + 1153 * 128 + 1153 * 384 + 3457 * 384 + (384 * 8 * 8 + 1) * 1024 + 1025 * 512 + 513 * 100,
    ),
    (
        "128C3(Encoding)-AP2-256C3-AP2-256FC-Voting",
        RGB,
        28 * 128 + 1153 * 256 + (256 * 8 * 8 + 1) * 256 + 257 * 100,
    ),
    (
        "128C3(Enc)-AP2-256C3-512C3-AP2-512FC-Voting",
        RGB,
        28 * 128 + 1153 * 256 + 2305 * 512 + (512 * 8 * 8 + 1) * 512 + 513 * 100,
    ),
]
SMALL = [
    ("6x6-4C3-P2-3C2-10-3", (1, 6, 6)),
    ("5C3(Enc)-6C3-AP2-7C3-AP2-30FC-20FC-Voting", (2, 8, 8)),
    ("P2-20-10", (2, 4, 4)),
]
LIVELY: dict[str, Any] = {"v_threshold": 0.1, "surrogate": "atan"}  # spikes and gradients everywhere


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def loss(outputs: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, outputs.numel(), device=outputs.device).view(outputs.shape)
    return (outputs * weight).sum()


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(net(x)), list(net.parameters())))


@pytest.mark.parametrize(("notation", "input_shape", "expected"), PAPERS)
def test_networks_of_the_papers(notation: str, input_shape: tuple[int, ...], expected: int) -> None:
    with torch.device("meta"):
        net = network(notation, input_shape)
        constant = network(notation, input_shape, steps=4)
        assert net(torch.empty(4, 2, *input_shape)).shape == (4, 2, 10)
        assert constant(torch.empty(2, *input_shape)).shape == (4, 2, 10)
    assert parameters(net) == expected
    assert net.notation == constant.notation == notation
    assert net.input_shape == input_shape
    assert net.output_shape == (10,)
    # Neurons follow every layer with weights, and nothing else does.
    names = [name for name, _ in net.layers.named_children()]
    for before, name in pairwise(names):
        assert name.startswith("lif") == before.startswith(("conv", "fc"))
    assert list(net.lif_layers()) == [name for name in names if name.startswith("lif")]
    assert all(isinstance(layer, stbp_cuda.LIFLayer) for layer in net.lif_layers().values())


@pytest.mark.parametrize(("notation", "input_shape", "expected"), PAPERS[:10])
def test_networks_of_the_first_paper_run(notation: str, input_shape: tuple[int, ...], expected: int) -> None:
    torch.manual_seed(0)
    net = network(notation, input_shape, **LIVELY)
    spikes = net(torch.rand(3, 2, *input_shape))
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert all(gradient.any() for gradient in gradients(net, torch.rand(3, 2, *input_shape)))


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize(("notation", "input_shape"), SMALL)
def test_gradients_reach_every_parameter(
    notation: str, input_shape: tuple[int, ...], steps: int | None, device: str
) -> None:
    torch.manual_seed(0)
    net = network(notation, input_shape, steps=steps, **LIVELY).to(device)
    x = torch.rand(*([] if steps else [4]), 3, *input_shape, device=device)
    for (name, _), gradient in zip(net.named_parameters(), gradients(net, x), strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize(("notation", "input_shape"), SMALL)
def test_a_network_is_the_loop_over_time_that_one_would_write(notation: str, input_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = network(notation, input_shape, decay=0.5, **LIVELY).double()
    x = torch.rand(5, 3, *input_shape, dtype=torch.float64)
    potential: dict[str, Any] = dict.fromkeys(net.lif_layers(), 0.0)
    outputs = []
    for step in x:
        y = step
        for name, module in net.layers.named_children():
            if name in potential:
                u = potential[name] + y
                y = (u >= 0.1).double()
                potential[name] = 0.5 * u * (1 - y)
            else:
                y = module(y)
        outputs.append(y)
    assert torch.equal(net(x), torch.stack(outputs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("notation", "input_shape"), SMALL)
def test_a_constant_input_is_convolved_once(
    notation: str, input_shape: tuple[int, ...], memory_format: torch.memory_format, device: str
) -> None:
    torch.manual_seed(0)
    net = network(notation, input_shape, **LIVELY).to(device)
    constant = network(notation, input_shape, steps=6, **LIVELY).to(device)
    constant.load_state_dict(net.state_dict())
    x = torch.rand(3, *input_shape, device=device).to(memory_format=memory_format)
    seen = []
    first = constant.layers[0]
    first.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    repeated = torch.stack([x] * 6)
    assert torch.equal(constant(x), net(repeated))
    assert seen == [x.shape]
    for ours, expected in zip(gradients(constant, x), gradients(net, repeated), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 4])
def test_channels_last_goes_through_without_a_copy(steps: int | None, device: str) -> None:
    net = network("5C3(Enc)-6C3-AP2-7C3-Voting", (2, 8, 8), steps=steps, **LIVELY).to(device)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(3 if steps else 12, 2, 8, 8, device=device).to(memory_format=torch.channels_last)
    pointers: dict[str, list[int]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            for tensor in (args[0], output):
                each = tensor if tensor.dim() == 4 else tensor.flatten(0, 1)
                assert each.is_contiguous(memory_format=torch.channels_last), name
            pointers[name] = [args[0].data_ptr(), output.data_ptr()]

        return hook

    folded = ["conv1", "lif1", "conv2", "lif2", "pool1", "conv3", "lif3"]
    for name in folded:
        net.layers.get_submodule(name).register_forward_hook(look(name))
    net(x if steps else x.view(4, 3, 2, 8, 8))
    for before, name in pairwise(folded):
        if steps is None or name != "lif1":
            assert pointers[before][1] == pointers[name][0]


def test_padding_follows_the_paper() -> None:
    def sizes(notation: str, **options: Any) -> list[Any]:
        net = network(notation, (1, 9, 8), **options)
        return [shape[1:] for _, _, name, shape in net._rows if name.startswith("conv")]

    assert sizes("2C5-2C2-10") == [(5, 4), (4, 3)]
    assert sizes("2C5(Enc)-2C3-10") == sizes("2C5-2C3-Voting") == sizes("2C5-2C3-10", padding="same") == [(9, 8)] * 2
    assert sizes("2C5(Enc)-2C2-Voting", padding="valid") == [(5, 4), (4, 3)]


def test_options_reach_the_layers() -> None:
    net = network(
        "3C3(Enc)-8FC-Voting",
        (1, 5, 5),
        classes=4,
        voters=6,
        bias=False,
        decay=0.5,
        v_threshold=0.6,
        surrogate=stbp_cuda.surrogate.Gaussian(0.3),
        dropout=0.25,
        dropout_mask="sequence",
        reset="soft",
        strict_threshold=True,
        backend="reference",
    )
    expected = stbp_cuda.LIFLayer(
        0.5, 0.6, stbp_cuda.surrogate.Gaussian(0.3), reset="soft", strict_threshold=True, backend="reference"
    )
    assert {repr(layer) for layer in net.lif_layers().values()} == {repr(expected)}
    assert parameters(net) == 3 * 9 + 75 * 8 + 8 * 24
    assert net.output_shape == (4,)
    assert repr(net.layers.dropout1) == "Dropout(p=0.25, mask='sequence')"
    with pytest.raises(TypeError, match="unexpected keyword argument 'treshold'"):
        network("784-10", (784,), treshold=1.0)


NORMALISED = [
    (CIFARNET, RGB, [(128, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)]),
    (ALEXNET, RGB, [(96, 32, 32), (256, 32, 32), (384, 16, 16), (384, 8, 8)]),
    ("128C3(Enc)-128C3-AP2-128C3-256C3-AP2-1024FC-Voting", DVS, [(128, 42, 42), (128, 42, 42), (128, 21, 21)]),
    ("128C3(Enc)-AP2-128C3-AP2-512FC-Voting", SACCADES, [(128, 34, 34)]),
]


@pytest.mark.parametrize(("notation", "input_shape", "shapes"), NORMALISED)
def test_neunorm_is_on_convolutions_that_feed_another(
    notation: str, input_shape: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        net, plain = network(notation, input_shape, neunorm=True), network(notation, input_shape)
        assert net(torch.empty(4, 2, *input_shape)).shape == (4, 2, 10)
    layers = net.lif_layers()
    found = {name: [tuple(u.shape) for u in layer.parameters()] for name, layer in layers.items()}
    assert found == {f"lif{i + 1}": [shapes[i]] if i < len(shapes) else [] for i in range(len(layers))}
    normalised = [name for name, layer in layers.items() if isinstance(layer, stbp_cuda.NeuNormLIF)]
    assert normalised == [f"lif{i + 1}" for i in range(len(shapes))]
    assert f"\n  lif1: {layers['lif1']}\n  lif{len(shapes) + 1}: {stbp_cuda.LIFLayer()}\n" in repr(net)
    assert parameters(net) - parameters(plain) == sum(c * h * w for c, h, w in shapes)


@pytest.mark.parametrize("steps", [None, 4])
def test_neunorm_is_lif_then_neunorm(steps: int | None, device: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"decay": 0.4, "steps": steps, **LIVELY}
    net = network("5C3(Enc)-AP2-6C3-Voting", (2, 6, 6), neunorm=True, norm_decay=0.7, scaling="1/F^2", **options)
    net = net.to(device)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    twin = network("5C3(Enc)-AP2-6C3-Voting", (2, 6, 6), **options).to(device)
    norm = stbp_cuda.NeuNorm((5, 6, 6), 0.7, scaling="1/F^2").to(device)
    norm.load_state_dict(net.layers.lif1.state_dict())
    twin.layers.lif1 = nn.Sequential(twin.layers.lif1, norm)
    twin.load_state_dict({key.replace("lif1.", "lif1.1."): value for key, value in net.state_dict().items()})
    x = torch.rand(*([] if steps else [4]), 3, 2, 6, 6, device=device)
    torch.testing.assert_close(net(x), twin(x), rtol=0, atol=0)
    assert len(gradients(net, x)) == 7
    for ours, expected in zip(gradients(net, x), gradients(twin, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert ours.any()


def test_dropout_is_in_front_of_all_layers_but_the_first_and_the_last() -> None:
    with torch.device("meta"):
        names = [name for name, _ in network(CIFARNET, RGB, dropout=0.5).layers.named_children()]
    after = [b for a, b in pairwise(names) if a.startswith("dropout")]
    assert after == ["conv2", "conv3", "conv4", "conv5", "flatten", "fc2"]


def test_dropout_is_only_for_training(device: str) -> None:
    torch.manual_seed(0)
    net = network("20-20-20-10", (20,), dropout=0.5, **LIVELY).to(device)
    plain = network("20-20-20-10", (20,), **LIVELY).to(device)
    plain.load_state_dict(net.state_dict())
    x = torch.rand(4, 3, 20, device=device)
    assert not torch.equal(net(x), plain(x))
    assert torch.equal(net.eval()(x), plain(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("steps", [None, 4])
def test_compile_without_a_graph_break(steps: int | None, dynamic: bool, device: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = network("5C3(Enc)-AP2-6C3-Voting", (2, 8, 8), steps=steps, neunorm=True, **LIVELY).to(device)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 5):
        x = torch.rand(*([] if steps else [batch + 1]), batch, 2, 8, 8, device=device)
        assert torch.equal(compiled(x), net(x))
        for ours, expected in zip(gradients(compiled, x), gradients(net, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 4])
def test_autocast(steps: int | None, device: str) -> None:
    torch.manual_seed(0)
    net = network("5C3(Enc)-6C3-AP2-20FC-Voting", (2, 8, 8), steps=steps, neunorm=True, **LIVELY).to(device)
    x = torch.rand(*([] if steps else [4]), 3, 2, 8, 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = net(x)
        value = stbp_cuda.losses.rate_mse(outputs, torch.tensor([0, 1, 2], device=device))
    assert outputs.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    for parameter, gradient in zip(net.parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True):
        assert gradient.dtype == parameter.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.any()


def test_copies_and_files(device: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"steps": 4, "neunorm": True, **LIVELY}
    net = network("5C3(Enc)-6C3-AP2-20FC-20FC-Voting", (2, 8, 8), dropout=0.5, **options).to(device).eval()
    x = torch.rand(3, 2, 8, 8, device=device)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = network(net.notation, net.input_shape, **options).to(device)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert list(net.state_dict())[:2] == ["layers.conv1.weight", "layers.conv1.bias"]
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in twins:
        assert repr(twin) == repr(net)
    for twin in (*twins, loaded):
        assert isinstance(twin, Network)
        assert torch.equal(twin(x), net(x))


def test_repr() -> None:
    with torch.device("meta"):
        net = network("28x28-15C5-P2-40C5-P2-300-10", GREY, decay=0.1, v_threshold=1.5)
    lines = [
        "Network('28x28-15C5-P2-40C5-P2-300-10', input_shape=(1, 28, 28), steps=None",
        "                 output        parameters",
        "  15C5  conv1    15 x 24 x 24         390  Conv2d(1, 15, kernel_size=(5, 5), stride=(1, 1))",
        "        lif1     15 x 24 x 24           0  LIFLayer",
        "  P2    pool1    15 x 12 x 12           0  AvgPool2d(kernel_size=2, stride=2, padding=0)",
        "  40C5  conv2    40 x 8 x 8        15,040  Conv2d(15, 40, kernel_size=(5, 5), stride=(1, 1))",
        "        lif2     40 x 8 x 8             0  LIFLayer",
        "  P2    pool2    40 x 4 x 4             0  AvgPool2d(kernel_size=2, stride=2, padding=0)",
        "  300   flatten  640                    0  Flatten(start_dim=-3, end_dim=-1)",
        "        fc1      300              192,300  Linear(in_features=640, out_features=300, bias=True)",
        "        lif3     300                    0  LIFLayer",
        "  10    fc2      10                 3,010  Linear(in_features=300, out_features=10, bias=True)",
        "        lif4     10                     0  LIFLayer",
        "                                  210,740  in total",
        f"  lif1: {stbp_cuda.LIFLayer(0.1, 1.5)}",
        ")",
    ]
    assert repr(net) == "\n".join(lines)


BAD: list[tuple[str, tuple[int, ...], str]] = [
    ("28x28-15X5-10", GREY, "'15X5' (token 2 of '28x28-15X5-10') is none of: a convolution (15C5, or 15C5(Enc) where"),
    ("", GREY, "'' (token 1 of '') is none of"),
    ("784--10", GREY, "'' (token 2 of '784--10') is none of"),
    ("784 - 10", GREY, "'784 ' (token 1 of '784 - 10') is none of"),
    ("784-\u0661", GREY, "'\u0661' (token 2 of '784-\u0661') is none of"),  # a digit, but not one of ours
    ("15C5(Enc", GREY, "'15C5(Enc' (token 1 of '15C5(Enc') is none of"),
    ("15C5-0C3-10", GREY, "'0C3' (token 2 of '15C5-0C3-10') must not have a size of 0"),
    ("15C0-10", GREY, "'15C0' (token 1 of '15C0-10') must not have a size of 0"),
    ("P0-10", GREY, "'P0' (token 1 of 'P0-10') must not have a size of 0"),
    ("784-0-10", GREY, "'0' (token 2 of '784-0-10') must not have a size of 0"),
    (
        "15C5-28x28-10",
        GREY,
        "'28x28' (token 2 of '15C5-28x28-10') is the size of the input, which belongs in the first",
    ),
    ("15C5-3C3(Enc)-10", GREY, "'3C3(Enc)' (token 2 of '15C5-3C3(Enc)-10') is an encoding layer, which only the first"),
    ("15C5-Voting-10", GREY, "'Voting' (token 2 of '15C5-Voting-10') must be the last token"),
    ("784", GREY, "'784' (token 1 of '784') cannot be the last token, which must be a fully connected layer or Voting"),
    ("15C5-P2", GREY, "'P2' (token 2 of '15C5-P2') cannot be the last token"),
    (
        "800-10",
        GREY,
        "'800' (token 1 of '800-10') is the number of values of the input, and input_shape=(1, 28, 28) has",
    ),
    (
        "28x28x3-10",
        GREY,
        "'28x28x3' (token 1 of '28x28x3-10') is an input_shape of (3, 28, 28), and input_shape is (1, ",
    ),
    (
        "28x20-10",
        GREY,
        "'28x20' (token 1 of '28x20-10') is an input_shape of (1, 20, 28), and input_shape is (1, 28, 28",
    ),
    (
        "28x28-10",
        (28, 28),
        "'28x28' (token 1 of '28x28-10') is an input_shape of (1, 28, 28), and input_shape is (28, ",
    ),
    ("784-15C5-10", (784,), "'15C5' (token 2 of '784-15C5-10') needs maps of shape (channels, height, width), and its"),
    (
        "300FC-P2-10",
        GREY,
        "'P2' (token 2 of '300FC-P2-10') needs maps of shape (channels, height, width), and its input ",
    ),
    ("15C29-10", GREY, "'15C29' (token 1 of '15C29-10') is larger than its input, of shape (1, 28, 28)"),
    (
        "15C3(Enc)-3C4-10",
        GREY,
        "'3C4' (token 2 of '15C3(Enc)-3C4-10') must have a kernel of odd size, so that padding='",
    ),
    ("15C5-P25-10", GREY, "'P25' (token 2 of '15C5-P25-10') is larger than its input, of shape (15, 24, 24)"),
]


@pytest.mark.parametrize(("notation", "input_shape", "message"), BAD)
def test_bad_notations(notation: str, input_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"notation: {message}")):
        network(notation, input_shape)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"notation": 784}, TypeError, "notation must be a string, got int"),
        (
            {"input_shape": 784},
            ValueError,
            "input_shape must be a tuple of positive integers such as (1, 28, 28), got 7",
        ),
        (
            {"input_shape": ()},
            ValueError,
            "input_shape must be a tuple of positive integers such as (1, 28, 28), got ()",
        ),
        ({"input_shape": (1, 28, 0)}, ValueError, "input_shape must be a tuple of positive integers"),
        ({"input_shape": (1, 28, 28.0)}, ValueError, "input_shape must be a tuple of positive integers"),
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"classes": 0}, ValueError, "classes must be a positive integer, got 0"),
        (
            {"classes": 5},
            ValueError,
            "notation: '10' (token 3 of '784-400-10') ends in as many neurons as there are clas",
        ),
        ({"voters": 2.5}, ValueError, "voters must be a positive integer, got 2.5"),
        ({"voters": None}, ValueError, "voters must be a positive integer, got None"),
        ({"padding": "full"}, ValueError, "padding must be None or one of valid, same, got 'full'"),
        (
            {"dropout": 0.5},
            ValueError,
            "dropout acts in front of all layers but the first and the last; '784-400-10' has",
        ),
        ({"dropout": 1.5, "notation": "784-20-20-10"}, ValueError, "dropout must lie in [0, 1], got 1.5"),
        ({"neunorm": True}, ValueError, "neunorm acts on convolutions that feed another one; '784-400-10' has none"),
        ({"decay": 2.0}, ValueError, "decay must lie in [0, 1], got 2.0"),
        ({"surrogate": "triangle"}, ValueError, "surrogate must be one of rectangular"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        network(**{"notation": "784-400-10", "input_shape": GREY, **options})


@pytest.mark.parametrize(
    ("steps", "shape", "message"),
    [
        (None, (5, 2, 1, 28, 27), "x must be of shape [T, B, 1, 28, 28]; got (5, 2, 1, 28, 27)"),
        (None, (2, 1, 28, 28), "x must be of shape [T, B, 1, 28, 28]; got (2, 1, 28, 28)"),
        (4, (4, 2, 1, 28, 28), "x must be of shape [B, 1, 28, 28], the same at each of 4 steps; got (4, 2, 1, 28, 28)"),
    ],
)
def test_bad_input(steps: int | None, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        network("784-10", GREY, steps=steps)(torch.zeros(shape))


def test_input_of_another_type() -> None:
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        network("784-10", GREY)([0.5])  # type: ignore[arg-type]


@st.composite
def notations(draw: st.DrawFn) -> tuple[str, tuple[int, ...], int]:
    """A random network on 2 maps of 12 x 11, and how many values come out of it."""
    tokens = draw(st.sampled_from([[], ["11x12x2"], ["264"]]))
    convolutions = st.builds("{}C{}".format, st.integers(1, 4), st.integers(1, 3))
    tokens = tokens + draw(st.lists(st.one_of(convolutions, st.sampled_from(["P1", "AP2"])), max_size=4))
    tokens += draw(st.lists(st.builds("{}{}".format, st.integers(1, 9), st.just("FC")), max_size=2))
    last = draw(st.one_of(st.integers(1, 9).map("{}FC".format), st.just("Voting")))
    return "-".join([*tokens, last]), (2, 12, 11), 3 if last == "Voting" else int(last[:-2])


@given(notations(), st.sampled_from(["same", "valid"]), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_any_network(
    drawn: tuple[str, tuple[int, ...], int], padding: Any, steps: int, batch: int, constant: bool
) -> None:
    notation, input_shape, classes = drawn
    options: dict[str, Any] = {"padding": padding, "steps": steps if constant else None, "voters": 2}
    try:
        net = network(notation, input_shape, classes=classes, **options)
    except ValueError as error:
        assert re.search("is larger than its input|must have a kernel of odd size", str(error))  # noqa: PT017
        return
    assert net.notation == notation
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in net.layers.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape)}))
    outputs = net(torch.rand(*([] if constant else [steps]), batch, *input_shape))
    assert outputs.shape == (steps, batch, classes)
    for _, _, name, shape in net._rows:
        assert shapes[name][-len(shape) :] == shape
    assert (
        network(net.notation, net.input_shape, classes=classes, **options).state_dict().keys()
        == net.state_dict().keys()
    )
