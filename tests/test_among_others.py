"""Networks that hold our layers beside those of SpikingJelly, snnTorch or Norse: what these do to every module of a
network leaves ours alone."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stbp_cuda

OURS = [value for value in vars(stbp_cuda).values() if isinstance(value, type) and issubclass(value, nn.Module)]

# What they call, set or read on modules that are not their own, or that loops of their users do.
CLAIMED = {
    "SpikingJelly 0.0.0.0.4": ["reset", "set_monitor", "monitor"],
    "SpikingJelly 0.0.0.0.14": ["reset", "detach", "step_mode", "backend", "supported_backends", "store_v_seq"],
    "SpikingJelly 2.0": [
        "reset",
        "detach",
        "step_mode",
        "store_v_seq",
        "supported_step_mode",
        "_memories",
        "v",
        "v_seq",
    ],
    "snnTorch 0.5": ["mem", "spk", "syn", "init_hidden", "init_leaky", "reset_hidden", "detach_hidden", "instances"],
    "snnTorch 1.0": ["reset_mem", "reset_mechanism", "reset_mechanism_val", "state_quant", "graded_spikes_factor"],
    "Norse 1.1": ["state", "state_fallback", "stateful_layers", "_is_leaf_module"],
    "BrainCog, sinabs, lava-dl": ["n_reset", "reset_states", "reset_state", "set_n_threshold", "is_state_initialised"],
}


def network_of_all_layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        stbp_cuda.TimeDistributed(nn.Conv2d(1, 4, 3, padding=1)),
        stbp_cuda.LIFLayer(v_threshold=0.2, reset="soft"),
        stbp_cuda.NeuNorm((4, 6, 6)),
        stbp_cuda.TimeDistributed(nn.Conv2d(4, 4, 3, padding=1)),
        stbp_cuda.NeuNormLIF((4, 6, 6), v_threshold=0.2, backend="reference"),
        stbp_cuda.Dropout(0.0),
        nn.Flatten(2),
        stbp_cuda.network("144-20-Voting", (144,), v_threshold=0.1),
        stbp_cuda.PLIFLayer(v_threshold=0.1),
        stbp_cuda.LILayer(learn="decay"),
    )
    assert {type(module) for module in net.modules()} >= set(OURS)
    return net


def sj4_reset_net(net: nn.Module) -> None:  # 0.0.0.0.4 to 0.0.0.0.14, and in many training scripts
    for m in net.modules():
        if hasattr(m, "reset"):
            m.reset()  # type: ignore[operator]


def sj4_set_monitor(net: nn.Module) -> None:
    for m in net.modules():
        if hasattr(m, "set_monitor"):
            m.set_monitor(True)  # type: ignore[operator]


def sj14_set_step_mode(net: nn.Module) -> None:
    for m in net.modules():
        if hasattr(m, "step_mode"):
            m.step_mode = "m"


def sj14_set_backend(net: nn.Module) -> None:
    for m in net.modules():
        if isinstance(m, nn.Module) and hasattr(m, "backend"):
            if "cupy" in m.supported_backends:  # type: ignore[operator]
                m.backend = "cupy"
            else:
                warnings.warn(f"it will still use backend={m.backend}", stacklevel=1)


def sj14_detach_net(net: nn.Module) -> None:
    for m in net.modules():
        if hasattr(m, "detach"):
            m.detach()  # type: ignore[operator]


def sj14_containers(net: nn.Module) -> None:
    for m in net.modules():
        assert not hasattr(m, "step_mode") or m.step_mode == "s"


def sj2_reset_net(net: nn.Module) -> None:
    for m in [m for m in net.modules() if callable(getattr(m, "reset", None))]:
        m.reset()  # type: ignore[operator]


def sj2_validate_cuda_graph_model(net: nn.Module) -> None:
    for m in net.modules():
        assert not getattr(m, "store_v_seq", False)


def snntorch_hidden_states(net: nn.Module) -> None:
    for m in net.modules():
        for name in ("reset_mem", "init_leaky", "reset_hidden", "detach_hidden"):
            if hasattr(m, name):
                getattr(m, name)()
        if hasattr(m, "mem"):
            m.mem = m.mem.detach()  # type: ignore[union-attr, operator]


def norse_is_module_stateful(net: nn.Module) -> None:
    for m in net.modules():
        assert "state" not in inspect.signature(m.forward).parameters
        assert not isinstance(m, nn.RNNBase)


def braincog_reset(net: nn.Module) -> None:
    for m in net.modules():
        if hasattr(m, "n_reset"):
            m.n_reset()  # type: ignore[operator]


LOOPS = [
    sj4_reset_net,
    sj4_set_monitor,
    sj14_set_step_mode,
    sj14_set_backend,
    sj14_detach_net,
    sj14_containers,
    sj2_reset_net,
    sj2_validate_cuda_graph_model,
    snntorch_hidden_states,
    norse_is_module_stateful,
    braincog_reset,
]


def leaves_alone(act: Callable[[nn.Module], Any]) -> None:
    """Assert that a function of a network changes neither its modules nor what it computes."""
    net, x = network_of_all_layers(), torch.rand(5, 2, 1, 6, 6)
    before = net(x)
    assert before.any()
    seen = [copy.deepcopy(vars(module)) for module in net.modules()]
    act(net)
    for module, attributes in zip(net.modules(), seen, strict=True):
        assert repr(vars(module)) == repr(attributes)
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("library", CLAIMED)
def test_no_attribute_has_a_name_that_they_claim(library: str) -> None:
    for module in network_of_all_layers().modules():
        if type(module) in OURS:
            assert [name for name in CLAIMED[library] if hasattr(module, name)] == []


@pytest.mark.parametrize("loop", LOOPS)
def test_their_loops(loop: Callable[[nn.Module], None]) -> None:
    leaves_alone(loop)


@pytest.mark.parametrize(("attribute", "value"), [("reset", "soft"), ("backend", "reference")])
def test_an_option_is_not_set_in_vain(attribute: str, value: str) -> None:
    layer = stbp_cuda.LIFLayer()
    with pytest.raises(AttributeError, match=f"LIFLayer keeps {attribute} in the attribute {attribute}_mode; set that"):
        setattr(layer, attribute, value)
    setattr(layer, f"{attribute}_mode", value)
    assert f"{attribute}={value!r}" in repr(layer)
    expected = stbp_cuda.LIFLayer(**{attribute: value})  # type: ignore[arg-type]
    x = torch.randn(6, 20)
    assert torch.equal(layer(x), expected(x))
    setattr(layer, f"{attribute}_mode", "medium")
    with pytest.raises(ValueError, match=f"{attribute} must be one of"):
        layer(x)


def test_spikingjelly_itself() -> None:
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    monitor = pytest.importorskip("spikingjelly.activation_based.monitor")
    leaves_alone(functional.reset_net)
    leaves_alone(functional.detach_net)
    leaves_alone(lambda net: functional.set_step_mode(net, "m"))
    net, x = network_of_all_layers(), torch.rand(5, 2, 1, 6, 6)
    with monitor.OutputMonitor(net, stbp_cuda.LIFLayer) as seen:
        net(x)
    assert torch.equal(seen["1"][0], net[:2](x))


def test_snntorch_itself() -> None:
    utils = pytest.importorskip("snntorch.utils")
    probe = pytest.importorskip("snntorch.functional.probe")
    leaves_alone(utils.reset)
    net, x = network_of_all_layers(), torch.rand(5, 2, 1, 6, 6)
    seen = probe.OutputMonitor(net, instance=stbp_cuda.LIFLayer)
    net(x)
    assert torch.equal(seen["1"][0], net[:2](x))


def test_norse_itself() -> None:
    norse = pytest.importorskip("norse.torch")
    net, x = network_of_all_layers(), torch.rand(5, 2, 1, 6, 6)
    spikes, _ = norse.SequentialState(*net)(x)
    assert torch.equal(spikes, net(x))
    leaves_alone(lambda net: norse.SequentialState(*net))
