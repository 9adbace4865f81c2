"""What users of other libraries write, and what to write here instead: for error messages. docs/coming-from.md has the
whole translation."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

__all__ = ["KEYWORDS", "SURROGATES_BY_NAME", "SURROGATES_OF", "WIDTHS", "surrogate_advice", "unexpected_keyword"]

PAGE = "docs/coming-from.md has more"
THRESHOLD = "write v_threshold"
SURROGATE = "write surrogate"
STEPS = "write steps for input [T*B, ...], nothing for [T, B, ...]"
STATELESS = "leave it out: a layer keeps no state; its call takes initial_potential and return_potential"
NOT_LEARNED = "decays and thresholds that are learned are not there yet"
TIME_CONSTANT = (
    "write decay=1 - 1/tau, and v_threshold=tau * v_threshold where the input is divided by tau, as in SpikingJelly"
)
NOTHING = "nothing here is like it; leave it out"

# Keyword arguments of SpikingJelly, snnTorch, Norse, BrainCog and of common loops over time.
KEYWORDS = {
    **dict.fromkeys(("tau", "tau_m", "tau_mem"), TIME_CONSTANT),
    "init_tau": f"{TIME_CONSTANT}; {NOT_LEARNED}",
    "decay_input": TIME_CONSTANT,
    **dict.fromkeys(("tau_mem_inv", "p", "dt"), "write decay=1 - dt*tau_mem_inv, v_threshold=v_th / (dt*tau_mem_inv)"),
    "tau_syn_inv": "a current with a decay of its own is not there yet",
    "alpha": "snnTorch's alpha, the decay of a current, is not there yet; that of a surrogate is in its width",
    **dict.fromkeys(("beta", "leak", "decay_rate", "mem_decay"), "write decay"),
    **dict.fromkeys(("threshold", "thresh", "th", "v_th", "vth", "v_thresh", "V_th"), THRESHOLD),
    **dict.fromkeys(("v_rest", "v_leak"), "potentials rest at 0: subtract it from v_threshold and v_reset"),
    **dict.fromkeys(
        ("surrogate_function", "spike_grad", "surrogate_fn", "act_fun", "act", "method", "spike_fn"), SURROGATE
    ),
    **dict.fromkeys(("lens", "gamma", "width"), "give it to the surrogate: surrogate=Rectangular(width)"),
    "step_mode": "leave it out: a layer runs all steps at once, on [T, B, ...], or with steps=T on [T*B, ...]",
    **dict.fromkeys(("T", "time_steps", "timesteps", "num_steps", "n_steps", "step", "time_window"), STEPS),
    "batch_first": "leave it out: time comes first, [T, B, ...]; x.movedim(1, 0) is of that shape",
    **dict.fromkeys(("init_hidden", "output", "state", "mem", "v_init"), STATELESS),
    "store_v_seq": "the potentials of all steps are not there yet; the call's return_potential=True returns the last",
    **dict.fromkeys(
        ("reset_mechanism", "reset_method", "reset_mode"), "write reset='hard' (snnTorch's 'zero') or reset='soft'"
    ),
    "hard_reset": "write reset='hard' or reset='soft'",
    "soft_reset": "write reset='soft'",
    "reset_delay": "a spike resets in its own step; the delayed reset of snnTorch is not there yet",
    **dict.fromkeys(("detach", "mem_detach"), "write detach_reset"),
    "backend_mode": "write backend",
    **dict.fromkeys(("learn_beta", "learn_threshold", "learnable", "learn_decay"), NOT_LEARNED),
    **dict.fromkeys(("inhibition", "surrogate_disable", "state_quant"), NOTHING),
    **dict.fromkeys(("graded_spikes_factor", "learn_graded_spikes_factor"), NOTHING),
    **dict.fromkeys(("cupy_fp32_inference", "lava_s_cale", "monitor_state", "use_backend"), NOTHING),
}
# The widths of our surrogates in terms of other parameters.
WIDTHS = {
    "Rectangular": {"alpha": "1 / alpha", "lens": "2 * lens"},
    "Polynomial": {"alpha": "4 * alpha**2", "gamma": "4 / gamma**2", "gama": "4 / gama**2"},
    "Sigmoid": {"alpha": "1 / alpha", "slope": "1 / slope"},
    "Gaussian": {"alpha": "1 / (2 * alpha**2)", "sigma": "sigma**2", "std": "std**2"},
    "Atan": {"alpha": "2 / alpha"},
    "FastSigmoid": {"alpha": "2 / alpha", "slope": "2 / slope"},
}
# Surrogates of other libraries: our class, the width, and how high ours is where theirs is not of unit area.
SURROGATES_OF = {
    "spikingjelly": {
        "PiecewiseQuadratic": ("Polynomial", "4 * alpha**2", ""),
        "Sigmoid": ("Sigmoid", "1 / alpha", ""),
        "SoftSign": ("FastSigmoid", "2 / alpha", ""),
        "SuperSpike": ("FastSigmoid", "2", "1 / (2 * alpha)"),
        "ATan": ("Atan", "2 / alpha", ""),
        "Erf": ("Gaussian", "1 / (2 * alpha**2)", ""),
        "Rect": ("Rectangular", "1 / alpha", ""),
    },
    "snntorch": {
        "fast_sigmoid": ("FastSigmoid", "2 / slope", "slope / 2"),
        "atan": ("Atan", "2 / alpha", ""),
        "sigmoid": ("Sigmoid", "1 / slope", ""),
    },
    "norse": {
        "super_fn": ("FastSigmoid", "2", "1 / 2"),
        "SuperSpike": ("FastSigmoid", "2", "1 / 2"),
        "triangle_fn": ("Polynomial", "4", "1 / alpha"),
        "Triangle": ("Polynomial", "4", "1 / alpha"),
        "heavi_erfc_fn": ("Gaussian", "1 / (2 * k**2)", "k / 2"),
        "HeaviErfc": ("Gaussian", "1 / (2 * k**2)", "k / 2"),
        "heavi_tanh_fn": ("Sigmoid", "1 / (2 * k)", "k / 2"),
        "HeaviTanh": ("Sigmoid", "1 / (2 * k)", "k / 2"),
    },
}
_TRIANGLE = "write surrogate=Polynomial(4 / g**2), a triangle that is 0 from a distance of g on and 1 / g high"
_FAST_SIGMOID = "write surrogate=FastSigmoid(2 / alpha), which is alpha / 2 / (1 + alpha * |s|)**2"
_BOX = "write surrogate=Rectangular(2 * g), which is 1 / (2 * g) up to a distance of g"
_ATAN = "write surrogate=Atan(2 / alpha), which is alpha / 2 / (1 + (pi / 2 * alpha * s)**2)"
_ERF = "write surrogate=Gaussian(sigma**2), the normal density; for erf(alpha * s) it is Gaussian(1 / (2 * alpha**2))"
_SIGMOID = "write surrogate=Sigmoid(1 / alpha), the derivative of sigmoid(alpha * s)"
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
    **dict.fromkeys(("multigaussian", "multigauss", "mg"), _NONE),
    **dict.fromkeys(("piecewiseexp", "exp", "exponential", "laplace", "slayer", "spikerateescape"), _NONE),
    **dict.fromkeys(("straightthroughestimator", "straightthrough", "ste", "circ", "s2nn", "qpseudospike"), _NONE),
}


def unexpected_keyword(function: str, keywords: Collection[str]) -> TypeError:
    """The error for keyword arguments that a function does not have."""
    keyword = next((keyword for keyword in keywords if keyword in KEYWORDS), next(iter(keywords)))
    advice = f"; {KEYWORDS[keyword]} ({PAGE})" if keyword in KEYWORDS else ""
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
    ours, width, height = SURROGATES_OF[library][name]
    given = "".join(f", with {key}={value}" for key, value in _parameters(surrogate).items() if key in width + height)
    less = f", of the same shape and {height} times as high: other heights are not there yet" if height else ""
    scaled = ", or alpha / tau where v_threshold is multiplied by tau" if library == "spikingjelly" else ""
    return f": write stbp_cuda.surrogate.{ours}({width}) for {library}'s {name}{given}{scaled}{less} ({PAGE})"
