"""LIF and NeuNormLIF forward and backward, in little time, for compute-sanitizer to look on: odd sizes, T from 1 to 40,
fp32 and bf16, contiguous and channels_last.

compute-sanitizer --tool memcheck python scripts/sanitize.py
python scripts/sanitize.py --device cpu
"""

import argparse
import itertools

import torch

import stbp_cuda

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda")
device = parser.parse_args().device

STEPS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 40)
SHAPES = ((3, 5, 3, 7), (2, 16, 8, 8))  # [B, C, H, W]: no pack fits, and all do
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
calls = list(itertools.product(STEPS, SHAPES, DTYPES, LAYOUTS))
for steps, (batch, *shape), dtype, layout in calls:
    neunorm = stbp_cuda.NeuNormLIF(shape, steps=steps).to(device)  # its weight stays fp32, as under autocast
    for layer in stbp_cuda.LIFLayer(surrogate="atan", steps=steps), neunorm:
        x = torch.randn(steps * batch, *shape, dtype=dtype).contiguous(memory_format=layout).to(device).requires_grad_()
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
print(f"{2 * len(calls)} forward and backward passes")
