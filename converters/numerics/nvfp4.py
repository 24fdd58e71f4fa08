"""NVFP4: E2M1 codes, an E4M3 scale for 16 columns, and one fp32 scale for all weights that are multiplied together.

`FLOAT32` and `COMPRESSED_TENSORS` store the global scale as a divisor, 2688 / amax; `MODELOPT` stores a factor,
amax / 2688. 2688 = 448 x 6: the largest group's local scale is then E4M3's maximum.
"""

import torch

from converters.numerics import nvfp4_patterns
from converters.numerics.nvfp4_scales import E2M1_MAX, E4M3_MAX, GROUP, combined, global_scale, local_scales
from converters.numerics.nvfp4_search import search_scales
from converters.numerics.scales import group_magnitudes, scaled_chunks
from converters.numerics.workspace import WORKSPACE
from converters.quant.scheme import Arithmetic, ScaleSearch

__all__ = ["E2M1_MAX", "E4M3_MAX", "GROUP", "combined", "encode_pairs", "global_scale", "quantize_nvfp4"]


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
    tables = None
    if nvfp4_patterns.suits(weight_RC):
        tables = nvfp4_patterns.tables_of(float(global_11), weight_RC.dtype, arithmetic)
    if tables is not None and search is ScaleSearch.NONE:
        return *nvfp4_patterns.encode(weight_RC, tables, None), global_11
    local_RG = local_scales(group_magnitudes(weight_RC, GROUP), global_11, arithmetic)
    if search is ScaleSearch.MSE:
        factor_11 = global_11.reciprocal() if arithmetic is Arithmetic.MODELOPT else global_11
        local_RG = search_scales(weight_RC, local_RG, factor_11)
    if tables is not None:
        return *nvfp4_patterns.encode(weight_RC, tables, local_RG), global_11
    packed_RB = torch.empty(len(weight_RC), weight_RC.shape[1] // 2, dtype=torch.uint8, device=weight_RC.device)
    for part, scaled_RC in scaled_chunks(weight_RC, combined(local_RG, global_11, arithmetic), Arithmetic.FLOAT32):
        encode_pairs(scaled_RC, packed_RB[part])
    return packed_RB, local_RG, global_11


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
