"""NVFP4: E2M1 codes, an E4M3 scale for 16 columns, and one fp32 scale for all weights that are multiplied together.

`FLOAT32` and `COMPRESSED_TENSORS` store the global scale as a divisor, 2688 / amax; `MODELOPT` stores a factor,
amax / 2688. 2688 = 448 x 6: the largest group's local scale is then E4M3's maximum.
"""

import torch

from converters.numerics.nvfp4_search import search_scales
from converters.numerics.scales import group_magnitudes, scaled_chunks
from converters.numerics.workspace import WORKSPACE
from converters.quant.scheme import Arithmetic, ScaleSearch

GROUP = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
_FULL = E2M1_MAX * E4M3_MAX
_SMALLEST = 2.0**-9
# what compressed-tensors stores for a local scale of zero: the code of 0.125
_EPSILON_CODE = 0x20


def quantize_nvfp4(
    weight_RC: torch.Tensor, largest_11: torch.Tensor, arithmetic: Arithmetic, search: ScaleSearch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to E2M1, two codes in a byte, the even column in the low nibble; ties round to even.

    Args:
        weight_RC: (R, C) bf16, fp16 or fp32, C a multiple of 16.
        largest_11: max|w| of all weights that share the global scale, fp32 (1, 1); exact in the weight's dtype.
        arithmetic: whose global and local scales.
        search: how local scales are chosen.
    Returns:
        codes (R, C / 2) uint8, local scales (R, C / 16) float8_e4m3fn, global scale (1, 1) fp32.
    Raises:
        InputError: columns do not divide into groups, or a weight is NaN or Inf.
    Source: compressed-tensors `nvfp4-pack-quantized`; modelopt `NVFP4QTensor`.
    """
    global_11 = global_scale(largest_11, weight_RC.dtype, arithmetic)
    local_RG = local_scales(group_magnitudes(weight_RC, GROUP), global_11, arithmetic)
    if search is ScaleSearch.MSE:
        factor_11 = global_11.reciprocal() if arithmetic is Arithmetic.MODELOPT else global_11
        local_RG = search_scales(weight_RC, local_RG, factor_11)
    packed_RB = torch.empty(len(weight_RC), weight_RC.shape[1] // 2, dtype=torch.uint8, device=weight_RC.device)
    for part, scaled_RC in scaled_chunks(weight_RC, combined(local_RG, global_11, arithmetic), Arithmetic.FLOAT32):
        encode_pairs(scaled_RC, packed_RB[part])
    return packed_RB, local_RG, global_11


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


def encode_pairs(scaled_RC: torch.Tensor, packed_RB: torch.Tensor) -> None:
    """Write the E2M1 codes of fp32 values (R, C), which are overwritten, as bytes (R, C / 2); they saturate at 6.

    Bit 3 is the sign, set for x < 0 even if it rounds to zero. Below it: adding 2^22 times the power of two at or below
    |x|, at least 1, rounds to the spacing of E2M1 there and leaves the multiple of it, n, in the lowest bits and the
    exponent e in the highest ones; the code is n + 2 e.
    """
    bits_RC = scaled_RC.add_(0.0).view(torch.int32)
    sign_RC = WORKSPACE.take("signs", bits_RC.shape, torch.int32, bits_RC)
    torch.bitwise_right_shift(bits_RC, 28, out=sign_RC).bitwise_and_(8)
    bits_RC.bitwise_and_(0x7FFFFFFF)
    scaled_RC.clamp_(max=E2M1_MAX)
    power_RC = WORKSPACE.take("powers", bits_RC.shape, torch.int32, bits_RC)
    torch.bitwise_and(bits_RC, 0x7F800000, out=power_RC)
    scaled_RC.add_(power_RC.view(torch.float32).clamp_(min=1.0), alpha=2.0**22)
    bits_RC.sub_(_BITS_OF_2_22)
    torch.bitwise_right_shift(bits_RC, 22, out=power_RC)
    bits_RC.bitwise_and_(7).add_(power_RC).bitwise_or_(sign_RC)
    # two codes at a time: the even one in the low half of an int64
    pairs_RB = bits_RC.view(torch.int64)
    high_RB = sign_RC.view(torch.int64)
    torch.bitwise_right_shift(pairs_RB, 28, out=high_RB)
    packed_RB.copy_(pairs_RB.bitwise_or_(high_RB).bitwise_and_(0xFF))


_BITS_OF_2_22 = (127 + 22) << 23
