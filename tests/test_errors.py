"""Bad input: what was wrong, in which argument, what is accepted; and before any work."""

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import stbp_cuda
from stbp_cuda import engine, functional, ops, other_libraries
from stbp_cuda import surrogate as surrogates
from stbp_cuda.surrogate import SURROGATES, Atan, Surrogate

SURROGATES_BY_CLASS = {cls.__name__: cls for cls in SURROGATES.values()}
SURROGATES_BY_CLASS["Triangle"] = surrogates.Triangle  # type: ignore[assignment]
X = torch.zeros(6, 4, 3)

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decay": -0.1}, ValueError, "decay must lie in [0, 1], got -0.1"),
    ({"decay": 1.01}, ValueError, "decay must lie in [0, 1], got 1.01"),
    ({"decay": math.nan}, ValueError, "decay must be finite in float32, got nan"),
    ({"decay": "0.5"}, TypeError, "decay must be a number, got '0.5'"),
    ({"v_reset": torch.tensor([0.5])}, TypeError, "v_reset must be a number, got tensor([0.5000])"),
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


SURROGATE_OF_THEIRS = "surrogate must be a name or a stbp_cuda.surrogate.Surrogate, got "

# What those who know other libraries write, and the words that tell what to write instead.
FROM_ELSEWHERE: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"v_reset": None},
        TypeError,
        "v_reset must be a number, got None; for a soft reset, which has none, write reset=",
    ),
    ({"decay": 2.0}, ValueError, "decay must lie in [0, 1], got 2.0; for a time constant tau it is 1 - 1/tau"),
    ({"reset": "subtract"}, ValueError, "snnTorch's 'zero' is 'hard', its 'subtract' is 'soft' with delayed=True"),
    (
        {"surrogate": "triangle"},
        ValueError,
        "write surrogate=Triangle(g), which is 0 from a distance of g on and 1 / g high",
    ),
    ({"surrogate": "piecewise_quadratic"}, ValueError, "write surrogate=Triangle(g)"),
    ({"surrogate": "super_spike"}, ValueError, "write surrogate=FastSigmoid(2 / alpha, gain=2 / alpha)"),
    ({"surrogate": "SuperSpike"}, ValueError, "write surrogate=FastSigmoid(2 / alpha, gain=2 / alpha)"),
    ({"surrogate": "fast-sigmoid"}, ValueError, "write surrogate=FastSigmoid(2 / alpha, gain=2 / alpha)"),
    ({"surrogate": "boxcar"}, ValueError, "write surrogate=Rectangular(2 * g)"),
    ({"surrogate": "ATan"}, ValueError, "write surrogate=Atan(2 / alpha)"),
    ({"surrogate": "arctan"}, ValueError, "write surrogate=Atan(2 / alpha)"),
    ({"surrogate": "erf"}, ValueError, "write surrogate=Gaussian(sigma**2)"),
    ({"surrogate": "logistic"}, ValueError, "write surrogate=Sigmoid(1 / alpha)"),
    ({"surrogate": "MultiGaussian"}, ValueError, "write surrogate=MultiGaussian(lens**2, gain=0.5)"),
    ({"surrogate": "laplace"}, ValueError, "it is not there yet; a subclass of stbp_cuda.surrogate.Surrogate"),
    ({"surrogate": Atan}, TypeError, "Atan'>: write Atan() or Atan(width)"),
    ({"surrogate": torch.sigmoid}, TypeError, SURROGATE_OF_THEIRS),
]


@pytest.mark.parametrize(("options", "error", "message"), FROM_ELSEWHERE)
def test_what_other_libraries_have_is_translated(options: dict[str, Any], error: type[Exception], message: str) -> None:
    test_options(options, error, message)


@pytest.mark.parametrize("keyword", other_libraries.KEYWORDS)
def test_their_keywords_are_translated(keyword: str) -> None:
    for name, call in TAKE_OPTIONS.items():
        if keyword in inspect.signature(call).parameters:
            continue
        advice = other_libraries.KEYWORDS_OF.get(name, {}).get(keyword, other_libraries.KEYWORDS[keyword])
        message = f"{name}() got an unexpected keyword argument {keyword!r}; {advice} (docs/"
        with pytest.raises(TypeError, match=re.escape(message)):
            call(unknown=0, **{keyword: 1})


@pytest.mark.parametrize("name", ["lif", "neunorm_lif", "LIFLayer", "NeuNormLIF", "PLIFLayer", "li", "LILayer"])
def test_advice_names_what_is_there(name: str) -> None:
    """An option that is advised is one of the function, or of another one that is named."""
    theirs = {**other_libraries.KEYWORDS, **other_libraries.KEYWORDS_OF.get(name, {})}
    options = set(inspect.signature(TAKE_OPTIONS[name]).parameters)
    if name in ("neunorm_lif", "NeuNormLIF"):
        options |= {*functional.NeuronOptions.__annotations__, "scale", "delayed", "time_dim", "learn"}  # of LIFLayer
    if name == "PLIFLayer":
        options |= set(inspect.signature(stbp_cuda.LIFLayer).parameters) - {"decay", "scale"}
    elif name in ("lif", "li"):
        options |= {"learn"}  # of the layer
    for keyword, advice in theirs.items():
        if keyword in options or "PLIFLayer(" in advice or "in front of" in advice:
            continue
        for option in re.findall(r"write (\w+)", advice) + re.findall(r"[ (](\w+)=\S", advice.partition("; ")[0]):
            assert option in options | {"return_potentials"}, (keyword, advice)  # of the call


def test_other_unexpected_keywords_are_said_as_python_does() -> None:
    for name, call in TAKE_OPTIONS.items():
        with pytest.raises(TypeError, match=re.escape(f"{name}() got an unexpected keyword argument 'unknown'") + "$"):
            call(unknown=0)


TAKE_OPTIONS: dict[str, Callable[..., Any]] = {
    "lif": functools.partial(functional.lif, X),
    "neunorm_lif": functools.partial(functional.neunorm_lif, torch.zeros(6, 1, 4, 3), torch.zeros(4, 3)),
    "li": functools.partial(functional.li, X),
    "LIFLayer": stbp_cuda.LIFLayer,
    "LILayer": stbp_cuda.LILayer,
    "PLIFLayer": stbp_cuda.PLIFLayer,
    "NeuNormLIF": functools.partial(stbp_cuda.NeuNormLIF, (4, 3)),
}


def test_a_network_translates_keywords_too() -> None:
    message = "LIFLayer() got an unexpected keyword argument 'tau'; write decay=1 - 1/tau"
    with pytest.raises(TypeError, match=re.escape(message)):
        stbp_cuda.network("3-5", (3,), tau=2.0)


def keywords_of_theirs() -> set[str]:
    spikingjelly = pytest.importorskip("spikingjelly.activation_based.neuron")
    snntorch = pytest.importorskip("snntorch")
    norse = pytest.importorskip("norse.torch")
    theirs = (spikingjelly.LIFNode, spikingjelly.ParametricLIFNode, spikingjelly.IFNode, snntorch.Leaky)
    named = {name for neuron in theirs for name in inspect.signature(neuron).parameters}
    # those of SpikingJelly 0.0.0.0.4 to 0.0.0.0.14 that 2.0 has not any more
    old = {"monitor_state", "cupy_fp32_inference", "lava_s_cale", "backend"}
    return named | set(norse.LIFBoxParameters._fields) | set(norse.LIFParameters._fields) | old


def test_all_keywords_of_their_neurons_are_known() -> None:
    ours = inspect.signature(stbp_cuda.LIFLayer).parameters
    assert keywords_of_theirs() <= {*ours, *other_libraries.KEYWORDS}


@pytest.mark.parametrize("library", other_libraries.SURROGATES_OF)
def test_their_surrogates_are_translated(library: str) -> None:
    """The class, width and gain that the message has are those of their gradients."""
    name = {"spikingjelly": "spikingjelly.activation_based.surrogate", "snntorch": "snntorch.surrogate"}
    module = pytest.importorskip(name.get(library, "norse.torch.functional.threshold"))
    s = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    for name_of_theirs, (ours, width, gain) in other_libraries.SURROGATES_OF[library].items():
        theirs = getattr(module, name_of_theirs, None) or getattr(
            pytest.importorskip("norse.torch.functional.superspike"), name_of_theirs
        )
        parameter = next((p for p in ("alpha", "slope", "k") if p in f"{width} {gain}"), "alpha")
        if library == "norse":
            given = theirs
            apply = getattr(theirs, "apply", theirs)
            (gradient,) = torch.autograd.grad(apply(s, torch.tensor(1.7)).sum(), s)
        else:
            given = theirs(**{parameter: 1.7})
            (gradient,) = torch.autograd.grad(given(s).sum(), s)
        values = {parameter: 1.7}
        surrogate = SURROGATES_BY_CLASS[ours](eval(width, {}, values), eval(gain or "1", {}, values))
        torch.testing.assert_close(surrogate.derivative(s.detach()), gradient)
        with pytest.raises(TypeError) as error:
            stbp_cuda.LIFLayer(surrogate=given)
        message = str(error.value)
        arguments = f"{width}, gain={gain}" if gain else width
        assert f"write stbp_cuda.surrogate.{ours}({arguments}) for {library}'s {name_of_theirs}" in message
        assert (f", with {parameter}=1.7" in message) == (library != "norse" and parameter in width + gain)


def test_surrogates_of_theirs_that_have_no_counterpart() -> None:
    theirs = pytest.importorskip("spikingjelly.activation_based.surrogate")
    with pytest.raises(TypeError, match="spikingjelly's PiecewiseExp is not there yet"):
        stbp_cuda.LIFLayer(surrogate=theirs.PiecewiseExp())
    with pytest.raises(TypeError, match=r"write stbp_cuda.surrogate.Atan\(2 / alpha\) for spikingjelly's ATan"):
        stbp_cuda.LIFLayer(surrogate=theirs.ATan)


def multi_gaussian(s: Tensor, lens: float = 0.7) -> Tensor:
    """As in the code of arXiv:2103.12593."""

    def gaussian(mean: float, sigma: float) -> Tensor:
        return torch.exp(torch.distributions.Normal(mean, sigma).log_prob(s))

    sides = gaussian(lens, 6 * lens) + gaussian(-lens, 6 * lens)
    return (gaussian(0.0, lens) * (1 + 0.15) - sides * 0.15) * 0.5


@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        ("triangle", lambda s: (1 / 0.7 - s.abs() / 0.7**2).clamp_min(0)),
        ("superspike", lambda s: 1 / (1 + 0.7 * s.abs()) ** 2),
        ("multigaussian", multi_gaussian),
        ("boxcar", lambda s: (s.abs() < 0.7) / 1.4),
        ("arctan", lambda s: 0.7 / 2 / (1 + (math.pi / 2 * 0.7 * s) ** 2)),
        ("normal", lambda s: torch.exp(torch.distributions.Normal(0, 0.7).log_prob(s))),
        ("logistic", lambda s: 0.7 * torch.sigmoid(0.7 * s) * torch.sigmoid(-0.7 * s)),
    ],
)
def test_usual_names_are_translated_rightly(name: str, derivative: Callable[[Tensor], Tensor]) -> None:
    found = re.match(r"write surrogate=(\w+\(.*?\))[,;]", other_libraries.SURROGATES_BY_NAME[name])
    assert found
    s = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    surrogate = eval(found[1], dict(SURROGATES_BY_CLASS), dict.fromkeys(("g", "alpha", "sigma", "lens"), 0.7))
    torch.testing.assert_close(surrogate.derivative(s), derivative(s).double())


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, theirs) for ours, widths in other_libraries.WIDTHS.items() for theirs in widths]
)
def test_parameters_of_surrogates_are_translated(ours: str, theirs: str) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{theirs!r}; write width={other_libraries.WIDTHS[ours][theirs]}")):
        SURROGATES_BY_CLASS[ours](**{theirs: 2.0})
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'unknown'$"):
        SURROGATES_BY_CLASS[ours](unknown=2.0)


@pytest.mark.parametrize("backend", engine.BACKENDS)
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
        (X, {"initial_potential": "0.5"}, TypeError, "initial_potential must be a tensor, a number or None, got str"),
        (X, {"initial_potential": math.nan}, ValueError, "initial_potential must be finite in float32, got nan"),
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
    monkeypatch.setattr(engine, "_warned", set())


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


@pytest.mark.usefixtures("never_warned")
@pytest.mark.parametrize("options", [{}, {"scale": 2.0}, {"time_dim": 1}])
def test_the_warning_names_the_line_of_the_user(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = stbp_cuda.LIFLayer(surrogate=Triangle(), **options)
    norm = stbp_cuda.NeuNormLIF((4, 3), surrogate=Triangle())
    for call in (layer, functools.partial(functional.lif, surrogate=Triangle(), **options), norm):
        monkeypatch.setattr(engine, "_warned", set())
        with pytest.warns(UserWarning, match="slow reference implementation") as record:
            call(torch.randn(2, 5, 4, 3))
        assert record[0].filename == __file__


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
    monkeypatch.setattr(engine, "_with_kernels", set())
    monkeypatch.setattr(ops, "fused_backend_problem", asked.append)
    for _ in range(3):
        functional.lif(torch.empty(3, 4, device="meta"), backend="fused")
    assert asked == [torch.device("meta")]
