"""What users of other libraries write, and what to write here instead: for error messages. docs/coming-from.md has the
whole translation."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

__all__ = [
    "KEYWORDS",
    "KEYWORDS_OF",
    "SURROGATES_BY_NAME",
    "SURROGATES_OF",
    "WIDTHS",
    "surrogate_advice",
    "unexpected_keyword",
]

PAGE = "docs/coming-from.md has more"
THRESHOLD = "write v_threshold"
SURROGATE = "write surrogate"
STEPS = "write steps for input [T*B, ...], nothing for [T, B, ...]"
STATELESS = "leave it out: a layer keeps no state; its call takes initial_potential and return_potential"
LEARNED = "or make it an nn.Parameter; NeuNormLIF has learn_decays=True, and functions take tensors"
LEARNED_DECAY = f'write learn=("decay",), {LEARNED}'
TIME_CONSTANT = "write decay=1 - 1/tau, and scale=1/tau where the input is divided by tau, as in SpikingJelly"
INVERSE = "write decay=1 - dt*tau_mem_inv and scale=dt*tau_mem_inv"
CURRENT = "a current with a decay of its own is an LILayer(decay) in front of the LIFLayer"
NOTHING = "nothing here is like it; leave it out"

_TIME_CONSTANTS = ("tau", "tau_m", "tau_mem", "decay_input")
_INVERSES = ("tau_mem_inv", "p", "dt")
_DECAYS = ("beta", "leak", "decay_rate", "mem_decay")
_THRESHOLDS = ("threshold", "thresh", "th", "v_th", "vth", "v_thresh", "V_th")
_SURROGATES = ("surrogate_function", "spike_grad", "surrogate_fn", "act_fun", "act", "method", "spike_fn")
_RESETS = ("reset_mechanism", "reset_method", "reset_mode")

# Keyword arguments of SpikingJelly, snnTorch, Norse, BrainCog and of common loops over time.
KEYWORDS = {
    **dict.fromkeys(_TIME_CONSTANTS, TIME_CONSTANT),
    "init_tau": f"write PLIFLayer(init_tau), which learns it; for a constant, {TIME_CONSTANT.removeprefix('write ')}",
    **dict.fromkeys(_INVERSES, INVERSE),
    "tau_syn_inv": f"{CURRENT}, with decay=1 - dt*tau_syn_inv",
    "alpha": f"{CURRENT}, with decay=alpha; the alpha of a surrogate is in its width",
    **dict.fromkeys(_DECAYS, "write decay"),
    **dict.fromkeys(_THRESHOLDS, THRESHOLD),
    **dict.fromkeys(("v_rest", "v_leak"), "potentials rest at 0: subtract it from v_threshold and v_reset"),
    **dict.fromkeys(_SURROGATES, SURROGATE),
    **dict.fromkeys(("lens", "gamma", "width"), "give it to the surrogate: surrogate=Rectangular(width)"),
    "step_mode": "leave it out: a layer runs all steps at once, on [T, B, ...], or with steps=T on [T*B, ...]",
    **dict.fromkeys(("T", "time_steps", "timesteps", "num_steps", "n_steps", "step", "time_window"), STEPS),
    "batch_first": "write time_dim=1 for input [B, T, ...]",
    **dict.fromkeys(("init_hidden", "output", "state", "mem", "v_init"), STATELESS),
    "store_v_seq": "call the layer with return_potentials='after_reset', or 'before_reset'",
    **dict.fromkeys(
        _RESETS, "write reset='hard' (snnTorch's 'zero') or reset='soft' (with delayed=True its 'subtract')"
    ),
    "hard_reset": "write reset='hard' or reset='soft'",
    "soft_reset": "write reset='soft'",
    "reset_delay": "write delayed=True, with reset='soft'; a hard reset is the same, but for detach_reset=True",
    **dict.fromkeys(("detach", "mem_detach"), "write detach_reset"),
    "backend_mode": "write backend",
    **dict.fromkeys(("learn_beta", "learnable", "learn_decay"), LEARNED_DECAY),
    "learn_threshold": f'write learn=("v_threshold",), {LEARNED.partition(";")[0]}',
    **dict.fromkeys(("inhibition", "surrogate_disable", "state_quant"), NOTHING),
    **dict.fromkeys(("graded_spikes_factor", "learn_graded_spikes_factor"), NOTHING),
    **dict.fromkeys(("cupy_fp32_inference", "lava_s_cale", "monitor_state", "use_backend"), NOTHING),
}
_LI = dict.fromkeys(
    (
        *_THRESHOLDS,
        *_SURROGATES,
        *_RESETS,
        *(
            "lens",
            "gamma",
            "width",
            "hard_reset",
            "soft_reset",
            "reset_delay",
            "detach",
            "mem_detach",
            "learn_threshold",
        ),
    ),
    "leave it out: a leaky integrator does not spike",
)
_LI.update(store_v_seq="write output='all'", v_leak="potentials rest at 0", v_rest="potentials rest at 0")
_PLIF = {
    **dict.fromkeys((*_TIME_CONSTANTS, *_DECAYS), "write init_tau; the input is divided by it, and decay is 1 - 1/tau"),
    **dict.fromkeys(_INVERSES, "write init_tau=1 / (dt*tau_mem_inv)"),
    **dict.fromkeys(("learn_beta", "learnable", "learn_decay"), "leave it out: the time constant is learned"),
}
# Where a function has something else to say.
KEYWORDS_OF: dict[str, dict[str, str]] = {"li": _LI, "LILayer": _LI, "PLIFLayer": _PLIF}
# The widths of our surrogates, and gains that go with them, in terms of other parameters.
WIDTHS = {
    "Rectangular": {"alpha": "1 / alpha", "lens": "2 * lens"},
    "Polynomial": {"alpha": "4 * alpha**2", "gamma": "4 / gamma**2", "gama": "4 / gama**2"},
    "Sigmoid": {"alpha": "1 / alpha", "slope": "1 / slope"},
    "Gaussian": {"alpha": "1 / (2 * alpha**2)", "sigma": "sigma**2", "std": "std**2"},
    "Atan": {"alpha": "2 / alpha"},
    "FastSigmoid": {"alpha": "2 / alpha", "slope": "2 / slope, gain=2 / slope"},
    "MultiGaussian": {"lens": "lens**2, gain=0.5", "sigma": "sigma**2"},
}
# Surrogates of other libraries: our class, the width, and the gain where the area of theirs is not 1.
SURROGATES_OF = {
    "spikingjelly": {
        "PiecewiseQuadratic": ("Polynomial", "4 * alpha**2", ""),
        "Sigmoid": ("Sigmoid", "1 / alpha", ""),
        "SoftSign": ("FastSigmoid", "2 / alpha", ""),
        "SuperSpike": ("FastSigmoid", "2", "2 * alpha"),
        "ATan": ("Atan", "2 / alpha", ""),
        "Erf": ("Gaussian", "1 / (2 * alpha**2)", ""),
        "Rect": ("Rectangular", "1 / alpha", ""),
    },
    "snntorch": {
        "fast_sigmoid": ("FastSigmoid", "2 / slope", "2 / slope"),
        "atan": ("Atan", "2 / alpha", ""),
        "sigmoid": ("Sigmoid", "1 / slope", ""),
    },
    "norse": {
        "super_fn": ("FastSigmoid", "2", "2"),
        "SuperSpike": ("FastSigmoid", "2", "2"),
        "triangle_fn": ("Polynomial", "4", "alpha"),
        "Triangle": ("Polynomial", "4", "alpha"),
        "heavi_erfc_fn": ("Gaussian", "1 / (2 * k**2)", "2 / k"),
        "HeaviErfc": ("Gaussian", "1 / (2 * k**2)", "2 / k"),
        "heavi_tanh_fn": ("Sigmoid", "1 / (2 * k)", "2 / k"),
        "HeaviTanh": ("Sigmoid", "1 / (2 * k)", "2 / k"),
    },
}
_TRIANGLE = "write surrogate=Triangle(g), which is 0 from a distance of g on and 1 / g high; gain=g makes it 1 high"
_FAST_SIGMOID = (
    "write surrogate=FastSigmoid(2 / alpha, gain=2 / alpha), which is 1 / (1 + alpha * |s|)**2; without the gain its "
    "area is 1"
)
_BOX = "write surrogate=Rectangular(2 * g), which is 1 / (2 * g) up to a distance of g; gain=2 * g makes it 1 high"
_ATAN = "write surrogate=Atan(2 / alpha), which is alpha / 2 / (1 + (pi / 2 * alpha * s)**2)"
_ERF = "write surrogate=Gaussian(sigma**2), the normal density; for erf(alpha * s) it is Gaussian(1 / (2 * alpha**2))"
_SIGMOID = "write surrogate=Sigmoid(1 / alpha), the derivative of sigmoid(alpha * s)"
_MULTI_GAUSSIAN = (
    "write surrogate=MultiGaussian(lens**2, gain=0.5), whose height and scale are those of arXiv:2103.12593"
)
_NOT_YET = "is not there yet; a subclass of stbp_cuda.surrogate.Surrogate with a derivative(s) runs on the reference"
_NONE = f"it {_NOT_YET}"
# Usual names, without case and signs.
SURROGATES_BY_NAME = {
    **dict.fromkeys(("triangle", "triangular", "tri", "tent", "piecewisequadratic", "quadratic", "tet"), _TRIANGLE),
    **dict.fromkeys(("piecewiselinear", "hat"), _TRIANGLE),
    **dict.fromkeys(("superspike", "super", "softsign", "fastsigmoid"), _FAST_SIGMOID),
    **dict.fromkeys(("boxcar", "box", "rect", "rectangle", "rectangular", "window", "square"), _BOX),
    **dict.fromkeys(("atan", "arctan", "atan2", "arctangent", "inversetangent"), _ATAN),
    **dict.fromkeys(("erf", "erfc", "heavierfc", "normal", "gauss", "gaussian", "gaussiangrad"), _ERF),
    **dict.fromkeys(("sigmoid", "logistic", "sig", "sigmoidgrad", "tanh"), _SIGMOID),
    **dict.fromkeys(("multigaussian", "multigauss", "mg"), _MULTI_GAUSSIAN),
    **dict.fromkeys(("piecewiseexp", "exp", "exponential", "laplace", "slayer", "spikerateescape"), _NONE),
    **dict.fromkeys(("straightthroughestimator", "straightthrough", "ste", "circ", "s2nn", "qpseudospike"), _NONE),
}


def unexpected_keyword(function: str, keywords: Collection[str]) -> TypeError:
    """The error for keyword arguments that a function does not have."""
    keyword = next((keyword for keyword in keywords if keyword in KEYWORDS), next(iter(keywords)))
    advice = KEYWORDS_OF.get(function, {}).get(keyword, KEYWORDS.get(keyword, ""))
    advice = f"; {advice} ({PAGE})" if advice else ""
    return TypeError(f"{function}() got an unexpected keyword argument {keyword!r}{advice}")


def _parameters(surrogate: Any) -> dict[str, Any]:
    """The parameters of an object or closure of another library."""
    closure = getattr(surrogate, "__closure__", None) or ()
    names = surrogate.__code__.co_freevars if closure else ()
    values = {
        **getattr(surrogate, "__dict__", {}),
        **dict(zip(names, (cell.cell_contents for cell in closure), strict=True)),
    }
    return {name: value for name, value in values.items() if name in ("alpha", "slope", "k")}


def surrogate_advice(surrogate: Any) -> str:
    """What to write for a surrogate that is none of ours, as the end of an error message; "" if it is not known."""
    if isinstance(surrogate, str):
        advice = SURROGATES_BY_NAME.get(re.sub("[^a-z0-9]", "", surrogate.lower()), "")
        return f": {advice} ({PAGE})" if advice else ""
    kind = surrogate if isinstance(surrogate, type) or hasattr(surrogate, "__qualname__") else type(surrogate)
    library = (getattr(kind, "__module__", None) or "").partition(".")[0]
    if library not in SURROGATES_OF:
        return ""
    name = kind.__qualname__.partition(".")[0]
    if name not in SURROGATES_OF[library]:
        return f": {library}'s {name} {_NOT_YET}"
    ours, width, gain = SURROGATES_OF[library][name]
    given = "".join(f", with {key}={value}" for key, value in _parameters(surrogate).items() if key in width + gain)
    scaled = ""
    if library == "spikingjelly" and "alpha" in width:
        scaled = ", or alpha / tau in the width where v_threshold is multiplied by tau"
    arguments = f"{width}, gain={gain}" if gain else width
    return f": write stbp_cuda.surrogate.{ours}({arguments}) for {library}'s {name}{given}{scaled} ({PAGE})"
