"""Symmetric int8 codes: one scale per output channel or per group of columns, plain or four to an int32.

compressed-tensors divides the largest magnitude by 127.5, so that a positive one is cut to 127 and a negative one
becomes -128; modelopt divides by 127. See `converters.numerics.fp8` for the arithmetics.
"""

import torch
from torch.nn import functional as F

from converters.numerics.scales import group_magnitudes, scaled_chunks, symmetric_scales
from converters.quant.scheme import Arithmetic

_LARGEST_CODE = {Arithmetic.MODELOPT: 127.0}


def quantize_int8(weight_RC: torch.Tensor, arithmetic: Arithmetic, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to int8 with one scale per row or per group of columns; ties round to even.

    Args:
        weight_RC: (R, C) bf16, fp16 or fp32.
        arithmetic: where the division happens.
        group: columns that share a scale; 0: the row.
    Returns:
        codes (R, C) int8 and scales (R, C / group) or (R, 1); codes * scales approximates the weight.
    Raises:
        InputError: columns do not divide into groups, or a weight is NaN or Inf.
    Source: compressed-tensors `int-quantized`, strategies channel and group; modelopt INT8_WEIGHT_ONLY_CFG.
    """
    scale_RG = symmetric_scales(group_magnitudes(weight_RC, group), _LARGEST_CODE.get(arithmetic, 127.5), arithmetic)
    codes_RC = torch.empty(weight_RC.shape, dtype=torch.int8, device=weight_RC.device)
    for part, scaled_RC in scaled_chunks(weight_RC, scale_RG, arithmetic):
        codes_RC[part].copy_(scaled_RC.clamp_(-128, 127).round_())
    return codes_RC, scale_RG


def pack_int32(codes_RC: torch.Tensor) -> torch.Tensor:
    """Return int8 codes as int32 words (R, ceil(C / 4)): code + 128 as a byte, low byte first, filled up with 0.

    Source: compressed-tensors `pack-quantized`, `pack_to_int32`.
    """
    bytes_RC = codes_RC.contiguous().view(torch.uint8) ^ 0x80
    if missing := -codes_RC.shape[1] % 4:
        bytes_RC = F.pad(bytes_RC, (0, missing))
    return bytes_RC.contiguous().view(torch.int32)
