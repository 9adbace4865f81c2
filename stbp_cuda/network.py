"""Networks from the notation of the papers, such as ``15C5-P2-40C5-P2-300-10``."""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from . import encoding
from .checks import check_flag, check_fraction, check_integer, check_sizes
from .engine import check_steps
from .layers import LIFLayer, NeuNormLIF
from .modules import Dropout, Voting, fold_time
from .surrogate import Surrogate
from .tracing import fx_function, refuse_script

__all__ = ["Network", "network"]

PADDINGS = ("valid", "same")
TOKENS = {
    "size": r"(\d+)[x\u00d7](\d+)(?:[x\u00d7](\d+))?",  # \u00d7 is the sign that is printed for x
    "conv": r"(\d+)C(\d+)(?:\(Enc(?:oding)?\))?",
    "pool": r"A?P(\d+)",
    "linear": r"(\d+)(?:FC)?",
    "voting": r"Voting",
}
ACCEPTED = (
    "a convolution (15C5, or 15C5(Enc) where it is the first), average pooling (P2 or AP2), a fully connected layer "
    "(300 or 300FC), Voting, or in the first place the size of the input (784 or 34x34x2)"
)


class _Token(NamedTuple):
    notation: str
    position: int  # from 1
    text: str
    kind: str
    numbers: tuple[int, ...]

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"notation: {self.text!r} (token {self.position} of {self.notation!r}) {problem}")


def _parse(notation: str) -> list[_Token]:
    """The tokens, each understood, and in an order that can be."""
    if not isinstance(notation, str):
        raise TypeError(f"notation must be a string, got {type(notation).__name__}")
    tokens: list[_Token] = []
    for position, text in enumerate(notation.split("-"), 1):
        matches = ((kind, re.fullmatch(pattern, text, re.ASCII)) for kind, pattern in TOKENS.items())
        kind, match = next(((kind, match) for kind, match in matches if match), ("", None))
        if position == 1 and text.isdecimal():
            kind = "size"
        token = _Token(notation, position, text, kind, tuple(map(int, filter(None, match.groups()))) if match else ())
        if not match:
            token.fail(f"is none of: {ACCEPTED}")
        if 0 in token.numbers:
            token.fail("must not have a size of 0")
        if kind == "size" and position > 1:
            token.fail("is the size of the input, which belongs in the first place")
        if text.endswith(")") and any(before.kind == "conv" for before in tokens):
            token.fail("is an encoding layer, which only the first convolution can be")
        if tokens and tokens[-1].kind == "voting":
            tokens[-1].fail("must be the last token")
        tokens.append(token)
    if tokens[-1].kind not in ("linear", "voting"):
        tokens[-1].fail("cannot be the last token, which must be a fully connected layer or Voting")
    return tokens


def _check_size(token: _Token, shape: tuple[int, ...]) -> None:
    """Raise if the size of the input that the notation begins with is not that of ``input_shape``."""
    if len(token.numbers) == 1:
        values = math.prod(shape)
        if token.numbers[0] != values:
            token.fail(f"is the number of values of the input, and input_shape={shape} has {values}")
    else:
        width, height, channels = (*token.numbers, 1)[:3]
        if shape != (channels, height, width):
            token.fail(f"is an input_shape of {(channels, height, width)}, and input_shape is {shape}")


def _maps(token: _Token, shape: tuple[int, ...], padding: str) -> tuple[int, ...]:
    """The shape of the output of a convolution or pooling, for the shape of its input."""
    if len(shape) != 3:
        token.fail(f"needs maps of shape (channels, height, width), and its input is of shape {shape}")
    count, *sides = shape
    *maps, size = token.numbers
    if token.kind == "conv" and padding == "same" and size % 2 == 0:
        token.fail("must have a kernel of odd size, so that padding='same' can put as many zeros on either side")
    if token.kind == "pool":
        sides = [side // size for side in sides]
    elif padding == "valid":
        sides = [side - size + 1 for side in sides]
    if min(sides) < 1:
        token.fail(f"is larger than its input, of shape {shape}")
    return (*(maps or [count]), *sides)


class _Layer(NamedTuple):
    token: _Token
    name: str
    output_shape: tuple[int, ...]
    module: nn.Module


class Network(nn.Module):
    """A spiking network as :func:`stbp_cuda.network` builds it. ``print`` shows its layers, the shapes of their outputs
    and the numbers of their parameters.

    Attributes:
        notation, input_shape, steps: as they were given.
        output_shape: ``(classes,)``.
        layers: an :class:`torch.nn.Sequential` of all modules, named by their kinds: conv1, lif1, pool1, conv2, lif2,
            flatten, fc1, lif3 and so on.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self, notation: str, input_shape: tuple[int, ...], steps: int | None, layers: Sequence[_Layer]
    ) -> None:
        super().__init__()
        self.notation = notation
        self.input_shape = input_shape
        self.output_shape = layers[-1].output_shape
        self.steps = steps
        self.layers = nn.Sequential(OrderedDict((layer.name, layer.module) for layer in layers))
        self._rows = [(layer.token.text, layer.token.position, layer.name, layer.output_shape) for layer in layers]

    def lif_layers(self) -> dict[str, nn.Module]:
        """The layers of neurons by name, in order: for hooks that count or draw spikes."""
        return {name: module for name, module in self.layers.named_children() if name.startswith("lif")}

    def forward(self, x: Tensor) -> Tensor:
        """Run the network over all time steps.

        Args:
            x: ``[T, B, *input_shape]``; or with ``steps=T`` ``[B, *input_shape]``, the same at every step. Convolutions
                and neurons keep the memory order channels_last.

        Returns:
            ``[T, B, classes]``: the spikes of the last layer, or with Voting the votes.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: ``x`` is not of that shape.
        """
        constant = self.steps is not None
        leading = "B" if constant else "TB"
        if not isinstance(x, Tensor | torch.fx.Proxy):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if isinstance(x, Tensor) and (
            x.dim() != len(leading) + len(self.input_shape) or x.shape[len(leading) :] != self.input_shape
        ):
            axes = ", ".join([*leading, *map(str, self.input_shape)])
            same = f", the same at each of {self.steps} steps" if constant else ""
            raise ValueError(f"x must be of shape [{axes}]{same}; got {tuple(x.shape)}")
        for name, module in self.layers.named_children():
            if constant and name == "lif1":
                constant = False
                if isinstance(module, LIFLayer) and not isinstance(module, NeuNormLIF):
                    x = module(x, constant=True)
                else:
                    x = module(_repeat(x, self.steps))  # type: ignore[arg-type]
                continue
            folds = isinstance(module, nn.Conv2d | nn.AvgPool2d) and not constant
            x = fold_time(module, x) if folds else module(x)
        return x

    def __repr__(self) -> str:
        rows = [("", "", "output", "parameters", "")]
        neurons: dict[str, str] = {}  # the first layer of each kind
        shown = 0
        for token, position, name, shape in self._rows:
            module = self.layers.get_submodule(name)
            kind = type(module).__name__
            if name.startswith("lif"):
                neurons.setdefault(kind, f"{name}: {module}")
            token = "" if position == shown else token
            shown = position
            text = kind if name.startswith("lif") else str(module)
            rows.append((token, name, " x ".join(map(str, shape)), _parameters(module), text))
        rows.append(("", "", "", _parameters(self), "in total"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.notation!r}, input_shape={self.input_shape}, steps={self.steps}"]
        for token, name, shape_text, parameters, text in rows:
            cells = (token.ljust(widths[0]), name.ljust(widths[1]), shape_text.ljust(widths[2]))
            lines.append("  ".join([*cells, parameters.rjust(widths[3]), text]).rstrip())
        return f"{type(self).__name__}(" + "\n  ".join([*lines, *neurons.values()]) + "\n)"


def _repeat(current: Tensor, steps: int) -> Tensor:
    """:func:`encoding.direct`, but channels_last stays so where the neurons make the view contiguous."""
    node = fx_function(_repeat, current, steps)
    if node is not None:
        return node  # type: ignore[no-any-return]
    if current.dim() == 4 and current.permute(0, 2, 3, 1).is_contiguous():  # is_contiguous takes no format under vmap
        return encoding.direct(current.permute(0, 2, 3, 1), steps).contiguous().permute(0, 1, 4, 2, 3)
    return encoding.direct(current, steps)


def _parameters(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def network(
    notation: str,
    input_shape: Sequence[int],
    *,
    steps: int | None = None,
    classes: int | None = None,
    voters: int = 10,
    padding: Literal["valid", "same"] | None = None,
    bias: bool = True,
    decay: float = 0.25,
    v_threshold: float = 0.75,
    surrogate: str | Surrogate = "rectangular",
    neunorm: bool = False,
    norm_decay: float = 0.8,
    scaling: Literal["1/F", "1/F^2"] = "1/F",
    dropout: float = 0.0,
    dropout_mask: Literal["step", "sequence"] = "step",
    **lif_options: Any,
) -> Network:
    """Build a network from the notation of arXiv:1706.02609 and arXiv:1809.05793, tokens with ``-`` between them:

    ======================  ==========================================================================================
    784, 34x34, 34x34x2     the size of the input, as the number of values or width x height x channels; only in the
                            first place, and only to be checked
    15C5                    a convolution to 15 maps with kernels of 5 x 5, then neurons
    128C3(Enc)              the same; says that it is the encoding layer, which takes real numbers or counts of events
    P2, AP2                 average pooling over 2 x 2
    300, 300FC              a fully connected layer to 300 neurons
    Voting                  a fully connected layer to ``classes * voters`` neurons, then :class:`stbp_cuda.Voting`
    ======================  ==========================================================================================

    Args:
        notation: as above; its end is a fully connected layer or Voting.
        input_shape: of one sample at one step: ``(channels, height, width)``; any shape if there is no convolution.
        steps: the number of time steps T of a constant input ``[B, *input_shape]``; what comes before the first neurons
            is then computed once, not T times. None, the default, for input ``[T, B, *input_shape]``.
        classes: the number of classes for Voting, by default 10. Without Voting it is the last number of the notation.
        voters: the number of neurons for each class with Voting. Default 10.
        padding: of the convolutions: "valid", none, so that maps shrink by the size of the kernel less 1, as those of
            arXiv:1706.02609; or "same", zeros, so that they keep their size, as in arXiv:1809.05793, for kernels of odd
            size. By default "same" where the notation has (Enc) or Voting, else "valid".
        bias: whether convolutions and fully connected layers have one. Default True.
        decay, v_threshold, surrogate: of all neurons, as for :class:`stbp_cuda.LIFLayer`.
        neunorm: normalise the spikes of each convolution that feeds another, through pooling too
            (:class:`stbp_cuda.NeuNormLIF`). Default False.
        norm_decay, scaling: of the normalisation.
        dropout: the probability of :class:`stbp_cuda.Dropout`, in front of each convolution and fully connected layer
            but the first and the last: arXiv:1809.05793 does not say where its dropout is, and its authors' code has it
            there. Default 0, none.
        dropout_mask: "step" or "sequence", as for :class:`stbp_cuda.Dropout`.
        lif_options: the other options of :class:`stbp_cuda.LIFLayer`, for all neurons.

    Raises:
        TypeError, ValueError: the notation cannot be read, or its layers do not fit one another or the input, and the
            message says which; an option is not one of those accepted, or no layer is there for it.

    Example::

        net = stbp_cuda.network("28x28-15C5-P2-40C5-P2-300-10", (1, 28, 28), decay=0.1, v_threshold=1.5)
        net(stbp_cuda.encoding.bernoulli(images, steps=30))  # images [B, 1, 28, 28] -> spikes [30, B, 10]
    """
    tokens = _parse(notation)
    sizes = shape = check_sizes(input_shape)
    if not shape:
        raise ValueError(f"input_shape must be a tuple of positive integers such as (1, 28, 28), got {input_shape!r}")
    steps = None if steps is None else check_steps(steps)
    classes = None if classes is None else check_integer("classes", classes)
    voters = check_integer("voters", voters)
    bias, neunorm = check_flag("bias", bias), check_flag("neunorm", neunorm)
    dropout = check_fraction("dropout", dropout)
    if tokens[-1].kind == "linear" and classes not in (None, *tokens[-1].numbers):
        tokens[-1].fail(f"ends in as many neurons as there are classes, and classes is {classes}")
    if padding is None:
        padding = "same" if any(token.kind == "voting" or token.text.endswith(")") for token in tokens) else "valid"
    if padding not in PADDINGS:
        raise ValueError(f"padding must be None or one of {', '.join(PADDINGS)}, got {padding!r}")

    weighted = [token for token in tokens if token.kind in ("conv", "linear", "voting")]
    normalised = [token for token, following in pairwise(weighted) if neunorm and following.kind == "conv"]
    if neunorm and not normalised:
        raise ValueError(f"neunorm acts on convolutions that feed another one; {notation!r} has none")
    dropped = weighted[1:-1] if dropout else []
    if dropout and not dropped:
        raise ValueError(f"dropout acts in front of all layers but the first and the last; {notation!r} has no others")

    layers: list[_Layer] = []
    numbers: Counter[str] = Counter()

    def add(token: _Token, kind: str, output_shape: tuple[int, ...], module: nn.Module) -> None:
        numbers[kind] += 1
        name = kind if kind in ("flatten", "voting") else f"{kind}{numbers[kind]}"  # there is one at most
        layers.append(_Layer(token, name, output_shape, module))

    classes = classes or 10
    neuron = {"decay": decay, "v_threshold": v_threshold, "surrogate": surrogate, **lif_options}
    for token in tokens:
        if token in dropped:
            add(token, "dropout", shape, Dropout(dropout, dropout_mask))
        if token.kind == "size":
            _check_size(token, shape)
        elif token.kind == "pool":
            shape = _maps(token, shape, padding)
            add(token, "pool", shape, nn.AvgPool2d(token.numbers[0]))
        elif token.kind == "conv":
            channels, shape = shape[0], _maps(token, shape, padding)
            maps, size = token.numbers
            zeros = size // 2 if padding == "same" else 0
            add(token, "conv", shape, nn.Conv2d(channels, maps, size, padding=zeros, bias=bias))
            if token in normalised:
                add(token, "lif", shape, NeuNormLIF(shape, norm_decay=norm_decay, scaling=scaling, **neuron))
            else:
                add(token, "lif", shape, LIFLayer(steps=None if numbers["lif"] else steps, **neuron))
        else:
            if len(shape) > 1:
                shape, start = (math.prod(shape),), -len(shape)
                add(token, "flatten", shape, nn.Flatten(start))
            inputs, shape = shape[0], token.numbers or (classes * voters,)
            add(token, "fc", shape, nn.Linear(inputs, shape[0], bias))
            add(token, "lif", shape, LIFLayer(steps=None if numbers["lif"] else steps, **neuron))
            if token.kind == "voting":
                add(token, "voting", (classes,), Voting(classes))
    return Network(notation, sizes, steps, layers)
