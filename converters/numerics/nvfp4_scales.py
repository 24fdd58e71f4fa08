"""The scales of NVFP4 in each arithmetic.

`FLOAT32` and `COMPRESSED_TENSORS` store the global scale as a divisor, 2688 / amax; `MODELOPT` stores a factor,
amax / 2688. 2688 = 448 x 6: the largest group's local scale is then E4M3's maximum.
"""

import torch

from converters.quant.scheme import Arithmetic

GROUP = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
_FULL = E2M1_MAX * E4M3_MAX
_SMALLEST = 2.0**-9
# what compressed-tensors stores for a local scale of zero: the code of 0.125
_EPSILON_CODE = 0x20


def global_scale(largest_11: torch.Tensor, dtype: torch.dtype, arithmetic: Arithmetic) -> torch.Tensor:
    """Return the global scale fp32 (1, 1): a divisor, or a factor for MODELOPT; 1 where all weights are zero.

    Args:
        largest_11: fp32 (1, 1).
        dtype: of the weights; compressed-tensors computes in it.
        arithmetic: whose.
    """
    if arithmetic is Arithmetic.MODELOPT:
        factor_11 = largest_11 / torch.full_like(largest_11, _FULL)
        return torch.where(factor_11 == 0, 1.0, factor_11)
    if arithmetic is Arithmetic.FLOAT32:
        divisor_11 = torch.full_like(largest_11, _FULL) / largest_11
    else:
        tiny = torch.finfo(dtype).tiny
        # a number divided by a tensor is number * reciprocal in torch, each step rounded
        divisor_11 = (largest_11.to(dtype).clamp(min=tiny).reciprocal() * _FULL).float()
    return torch.where(torch.isfinite(divisor_11), divisor_11, 1.0)


def local_scales(amax_RG: torch.Tensor, global_11: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """Return E4M3 local scales (R, G) that map each group's amax, in the weight's dtype, to the code 6."""
    if arithmetic is Arithmetic.MODELOPT:
        scale_RG = amax_RG.float() / (global_11 * E2M1_MAX)
        scale_RG = torch.where(scale_RG == 0, 1.0, scale_RG).clamp(_SMALLEST, E4M3_MAX)
        return scale_RG.to(torch.float8_e4m3fn)
    amax_RG = amax_RG.float() if arithmetic is Arithmetic.FLOAT32 else amax_RG
    sixth_RG = amax_RG / torch.full((), E2M1_MAX, dtype=amax_RG.dtype, device=amax_RG.device)
    codes_RG = (global_11 * sixth_RG.float()).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes_RG.add_((codes_RG == 0).view(torch.uint8) * _EPSILON_CODE).view(torch.float8_e4m3fn)


def combined(local_RG: torch.Tensor, global_11: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """Return what codes are multiplied with, fp32 (R, G)."""
    if arithmetic is Arithmetic.MODELOPT:
        return local_RG.float() * global_11
    return local_RG.float() / global_11
