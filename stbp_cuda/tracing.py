"""Tracers of torch: in the graphs of torch.fx, layers and functions are one node each; torch.jit is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["fx_function", "fx_module", "jit_trace", "refuse_script", "refuse_trace"]

INSTEAD = "use torch.compile, torch.export or torch.fx"

jit_trace: Callable[[], object] = torch._C._get_tracing_state  # None elsewhere; torch.compile knows this one of many


def fx_function(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A node that calls a function, where torch.fx traces its first argument; None elsewhere."""
    x = args[0] if args else next(iter(options.values()))
    return x.tracer.create_proxy("call_function", function, args, options) if isinstance(x, torch.fx.Proxy) else None


def fx_module(module: nn.Module, x: object, **options: Any) -> Any:
    """A node that calls a module, where torch.fx traces one that contains it; None elsewhere."""
    if not isinstance(x, torch.fx.Proxy) or not isinstance(x.tracer, torch.fx.Tracer):
        return None
    path = x.tracer.path_of_module(module)
    return x.tracer.create_proxy("call_module", path, (x,), options) if path else None


def refuse_trace(backend: str) -> None:
    """Raise where torch.jit traces; the exporter of ONNX that does may have the reference."""
    if not torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"torch.jit.trace would fix the number of time steps, without an error for another: {INSTEAD}"
        )
    if backend != "reference":
        raise RuntimeError("ONNX has no operator for spiking neurons: export them with backend='reference'")


def refuse_script(module: nn.Module) -> nn.Module:
    """For ``__prepare_scriptable__``, which torch.jit.script calls first."""
    raise RuntimeError(f"torch.jit.script cannot compile {type(module).__name__} of stbp_cuda: {INSTEAD}")
