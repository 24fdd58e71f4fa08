"""The order in which the search of NVFP4 adds up errors, which decides between scales that are nearly as good."""

import torch
import triton
import triton.language as tl

from runtime.kernels.nvfp4 import _pairwise_sum


@triton.jit
def sums(value_ptr: tl.tensor, sum_ptr: tl.tensor, GROUPS: tl.constexpr) -> None:
    group_G = tl.arange(0, GROUPS)
    value_GC = tl.load(value_ptr + group_G[:, None] * 16 + tl.arange(0, 16)[None, :])
    tl.store(sum_ptr + group_G, _pairwise_sum(value_GC, GROUPS))


def differences(device: str) -> int:
    """Return how many sums of 16 differ from those in the order of `converters.numerics.nvfp4_search`."""
    value_GC = torch.rand(128, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    found_G = torch.empty(128, device=device)
    sums[(1,)](value_GC.to(device), found_G, GROUPS=128)
    expected = value_GC
    for half in (8, 4, 2, 1):
        expected = expected[:, :half] + expected[:, half : 2 * half]
    return int((found_G.cpu() != expected[:, 0]).sum())
