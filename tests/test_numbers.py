"""NumPy scalars and tensors of no dimensions, wherever a Python number is accepted and no gradient is asked for."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import stbp_cuda
from stbp_cuda import encoding, functional, init, losses
from stbp_cuda.surrogate import SURROGATES

X = torch.randn(8, 3, 4, 6, generator=torch.Generator().manual_seed(0))  # with steps=4
UNFOLDED = X.view(4, 2, 3, 4, 6)
WEIGHT = torch.full((3, 4, 6), 0.1)
EVENTS = np.array([(1, 2, 1, 0), (3, 0, 0, 12)], dtype=[("x", "i4"), ("y", "i4"), ("p", "i4"), ("t", "i8")])
OPTIONS = {
    "decay": 0.5,
    "v_threshold": 0.25,
    "v_reset": -0.5,
    "steps": 4,
    "detach_reset": True,
    "spatial_only": True,
    "strict_threshold": True,
}


class Argument(NamedTuple):
    of: str
    name: str
    value: float  # with as few digits as float16 has
    run: Callable[[Any], Any]


def lif(value: Any, name: str, run: Callable[..., Any]) -> Any:
    x = (X if name == "steps" else UNFOLDED).clone().requires_grad_()
    spikes = run(x, **{name: value})
    return spikes, torch.autograd.grad(spikes.square().sum(), x)


def layer(x: Tensor, **option: Any) -> Tensor:
    spikes: Tensor = stbp_cuda.LIFLayer(**option)(x)
    return spikes


def layer_with_norm(x: Tensor, **option: Any) -> Tensor:
    module = stbp_cuda.NeuNormLIF((3, 4, 6), **option)
    torch.nn.init.constant_(module.weight, 0.1)
    return module(x)


def set_later(x: Tensor, **option: Any) -> Tensor:
    module = stbp_cuda.NeuNormLIF((3, 4, 6), v_threshold=0.125)
    for name, value in option.items():
        setattr(module, name, value)
    return module(x)


def net(value: Any, name: str) -> tuple[str, Any]:
    torch.manual_seed(0)
    found = stbp_cuda.network("3C3-3C3-8-Voting", (3, 4, 6), padding="same", **{"neunorm": True, name: value})
    return repr(found), found(X[:2] if name == "steps" else UNFOLDED)


def seeded(value: Any, run: Callable[[Any], Any]) -> Any:
    torch.manual_seed(0)
    return run(value)


NEURONS = {
    "lif": functional.lif,
    "LIFLayer": layer,
    "neunorm_lif": functools.partial(functional.neunorm_lif, weight=WEIGHT),
    "NeuNormLIF": layer_with_norm,
    "NeuNormLIF, set later": set_later,
}
ARGUMENTS = [
    *(
        Argument(of, name, value, functools.partial(lif, name=name, run=run))
        for of, run in NEURONS.items()
        for name, value in (OPTIONS if of in ("lif", "LIFLayer") else {**OPTIONS, "norm_decay": 0.5}).items()
        if (of, name) not in (("neunorm_lif", "decay"), ("neunorm_lif", "norm_decay"))  # take tensors, learned or not
    ),
    *(
        Argument("network", name, value, functools.partial(net, name=name))
        for name, value in {
            **OPTIONS,
            "norm_decay": 0.5,
            "classes": 4,
            "voters": 4,
            "bias": False,
            "neunorm": False,
            "dropout": 0.5,
        }.items()
    ),
    *(
        Argument(name, "width", 0.5, lambda width, cls=cls: (repr(cls(width)), cls(width).derivative(X)))
        for name, cls in SURROGATES.items()
    ),
    Argument("lif", "return_potential", True, lambda v: functional.lif(X, return_potential=v)),
    Argument("LIFLayer", "return_potential", True, lambda v: stbp_cuda.LIFLayer()(X, return_potential=v)),
    Argument("lif", "smooth", True, lambda v: functional.lif(X.double(), smooth=v)),
    Argument("neunorm", "steps", 4, lambda v: functional.neunorm(X, WEIGHT, steps=v)),
    Argument("NeuNorm", "shape", 3, lambda v: stbp_cuda.NeuNorm((v, 4, 6), steps=4)(X)),
    Argument("NeuNorm", "decay", 0.5, lambda v: (repr(n := stbp_cuda.NeuNorm((3, 4, 6), v, steps=4)), n(X))),
    Argument("NeuNorm", "steps", 4, lambda v: (repr(n := stbp_cuda.NeuNorm((3, 4, 6), steps=v)), n(X))),
    Argument("NeuNormLIF", "shape", 3, lambda v: stbp_cuda.NeuNormLIF((v, 4, 6), steps=4)(X)),
    Argument("NeuNormLIF", "learn_decays", True, lambda v: stbp_cuda.NeuNormLIF((2,), learn_decays=v).decay_logits),
    Argument("network", "input_shape", 6, lambda v: repr(stbp_cuda.network("6-5", (v,)))),
    Argument("Voting", "classes", 3, lambda v: (repr(stbp_cuda.Voting(v)), stbp_cuda.Voting(v)(X))),
    Argument("Dropout", "p", 0.5, functools.partial(seeded, run=lambda v: stbp_cuda.Dropout(v)(X))),
    Argument("bernoulli", "steps", 4, functools.partial(seeded, run=lambda v: encoding.bernoulli(X.sigmoid(), v))),
    Argument("direct", "steps", 4, lambda v: encoding.direct(X, v)),
    Argument("event_frames", "steps", 4, lambda v: encoding.event_frames(EVENTS, (4, 3, 2), 5, v)),
    Argument("event_frames", "time_window", 5, lambda v: encoding.event_frames(EVENTS, (4, 3, 2), v, 4)),
    Argument("event_frames", "sensor_size", 4, lambda v: encoding.event_frames(EVENTS, (v, 3, 2), 5, 4)),
    Argument(
        "rate_cross_entropy", "scale", 0.5, lambda v: losses.rate_cross_entropy(X[..., 0], torch.ones(3).long(), v)
    ),
    Argument("unit_norm_rows_", "norm", 0.5, functools.partial(seeded, run=lambda v: init.unit_norm_rows_(X[0, 0], v))),
]
FORMS: dict[type, list[Callable[[Any], Any]]] = {
    float: [np.float16, np.float32, np.float64, np.longdouble, np.array, torch.tensor],
    int: [np.uint8, np.int64, np.array, torch.tensor],
    bool: [np.bool_, np.array, torch.tensor],
}
every_argument = pytest.mark.parametrize(
    "argument", ARGUMENTS, ids=[f"{argument.of}-{argument.name}" for argument in ARGUMENTS]
)


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(equal(a, b) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return bool(found == expected)


@every_argument
def test_every_form_of_a_number(argument: Argument) -> None:
    expected = argument.run(argument.value)
    for form in FORMS[type(argument.value)]:
        assert equal(argument.run(form(argument.value)), expected), form


@every_argument
def test_what_is_no_such_number(argument: Argument) -> None:
    bad: list[Any] = ["1", torch.tensor(1j)]
    # Of LIF neurons these two may be tensors, which test_neurons.py tries.
    tensors = argument.name in ("decay", "v_threshold") and argument.of in ("lif", "LIFLayer", "network")
    if not tensors:
        bad += [np.array([argument.value]), torch.tensor([[argument.value]])]
    if not isinstance(argument.value, bool):
        bad += [True, np.True_, torch.tensor(True)]
    if isinstance(argument.value, float):
        for value in (math.nan, math.inf, -math.inf):
            bad += [value, np.float32(value), torch.tensor(value)]
        if not tensors:
            bad.append(torch.tensor(argument.value, requires_grad=True))
    else:
        bad += [np.float64(2.0), torch.tensor(2.0)]
    if argument.name == "return_potential" and argument.of == "LIFLayer":
        return  # as bool() has it: a check would cost every call
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=argument.name):
            argument.run(value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, for jvp
def test_no_gradient_is_lost() -> None:
    message = r"v_reset must be a number; no gradient would reach the tensor that was given, so detach\(\) it"

    def loss(v_reset: Tensor) -> Tensor:
        return functional.lif(X, v_reset=v_reset).sum()  # type: ignore[arg-type, no-any-return]

    half = torch.tensor(0.5)
    for run in (
        lambda: loss(half.clone().requires_grad_()),
        lambda: torch.func.grad(loss)(half),
        lambda: torch.func.jvp(loss, (half,), (half,)),
        lambda: torch.func.vmap(loss)(half.expand(3)),
        lambda: stbp_cuda.LIFLayer(v_reset=torch.nn.Parameter(half)),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            run()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match=message):
        loss(torch.autograd.forward_ad.make_dual(half, half))


@pytest.mark.parametrize("value", [np.float32(0.5), torch.tensor(0.5), np.array(0.5)])
def test_layers_hold_python_numbers(value: Any) -> None:
    made = stbp_cuda.NeuNormLIF((3, 4, 6), value, 0.75, steps=np.int64(4), norm_decay=value, detach_reset=np.False_)  # type: ignore[arg-type]
    later = stbp_cuda.NeuNormLIF((3, 4, 6))
    later.decay, later.norm_decay, later.steps, later.detach_reset = value, value, np.int64(4), np.False_  # type: ignore[assignment]
    for layer in (made, later):
        assert repr(layer) == repr(stbp_cuda.NeuNormLIF((3, 4, 6), 0.5, steps=4, norm_decay=0.5))
        types = {name: type(found) for name, found in vars(layer).items()}
        assert (types["decay"], types["norm_decay"], types["steps"], types["detach_reset"]) == (float, float, int, bool)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(X), layer(X))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(later, fullgraph=True, backend="eager")(X), made(X))


@pytest.mark.parametrize(("option", "value"), [("norm_decay", math.nan), ("scaling", "1/G")])
def test_options_of_the_norm_set_later_are_checked(option: str, value: Any) -> None:
    layer = stbp_cuda.NeuNormLIF((3, 4, 6))
    setattr(layer, option, value)
    with pytest.raises(ValueError, match=f"{option} must be"):
        layer(UNFOLDED)
