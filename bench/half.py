"""Whether the CPU kernels compute with vectors in the half types, whatever the options.

    python bench/half.py [--seconds 0.02]

For every surrogate, reset and half type: the time of a backward pass, which computes the neurons again, against that of
float32. At worst it is some 4 times as long, as float32 has nothing to convert. A conversion for which the compiler
found no vector instructions makes it more than 10 times as long, and no test sees that. Exit status 1 above 8.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import harness
import malloc
import torch

from stbp_cuda import functional
from stbp_cuda.surrogate import SURROGATES

MOST = 8.0


def backward(dtype: torch.dtype, surrogate: str, reset: str, detach_reset: bool) -> object:
    x, grad = (torch.randn(16, 8192, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    x.requires_grad_()
    spikes = functional.lif(x, surrogate=surrogate, reset=reset, detach_reset=detach_reset, backend="fused")
    return lambda: torch.autograd.grad(spikes, x, grad, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=harness.positive(float), default=0.02, help="for each case; default 0.02")
    malloc.add_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    slow = False
    print(f"{'surrogate':<14}{'reset':<6}{'':<9}" + "".join(f"{dtype!s:>16}" for dtype in dtypes[1:]))
    for surrogate, reset, detach_reset in itertools.product(SURROGATES, ("hard", "soft"), (False, True)):
        runs = {str(dtype): backward(dtype, surrogate, reset, detach_reset) for dtype in dtypes}
        times = harness.measure(runs, args.seconds, torch.device("cpu"))
        ratios = [times[str(dtype)]["median"] / times[str(torch.float32)]["median"] for dtype in dtypes[1:]]
        slow |= max(ratios) > MOST
        what = f"{surrogate:<14}{reset:<6}{'detached' if detach_reset else '':<9}"
        print(what + "".join(f"{ratio:>14.2f} x" for ratio in ratios))
    print(f"{'NOT MET' if slow else 'met':<9}at most {MOST:g} x the time of float32")
    sys.exit(slow)


if __name__ == "__main__":
    malloc.start(main)
