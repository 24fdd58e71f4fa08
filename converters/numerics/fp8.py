"""FP8 E4M3 with one scale per output channel.

Two arithmetics write the same format. `FLOAT32` divides in fp32 by the stored scale, so a code is off by at most half a
step. `COMPRESSED_TENSORS` reproduces that library byte for byte: it divides in the weight's own dtype, which rounds
twice and has about 0.6 % more error on bf16 weights.
"""

import torch

from converters.errors import InputError
from converters.quant.scheme import Arithmetic

E4M3_MAX = 448.0


def channel_scales(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return max|row| / 448 as (O, 1) in the weight's dtype.

    A scale that comes out as zero (an all-zero row, or one too small for the dtype) becomes the dtype's machine
    epsilon, as compressed-tensors writes it; its codes are zero.

    Raises:
        InputError: a row holds NaN or Inf.
    """
    # aminmax reads the row once; max(-min, max) is exact
    low_O, high_O = weight_OI.aminmax(dim=1)
    amax_O1 = torch.maximum(low_O.neg(), high_O).unsqueeze(1)
    if not bool(torch.isfinite(amax_O1).all()):
        row = int((~torch.isfinite(amax_O1.squeeze(1))).nonzero()[0])
        raise InputError(f"row {row}", expected="finite weights", found="NaN or Inf")
    scale_O1 = amax_O1 / E4M3_MAX
    return torch.where(scale_O1 == 0, torch.finfo(scale_O1.dtype).eps, scale_O1)


def quantize_channel(weight_OI: torch.Tensor, arithmetic: Arithmetic) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to E4M3, each with its own scale; ties round to even.

    Args:
        weight_OI: (O, I) bf16, fp16 or fp32.
        arithmetic: where the division happens.
    Returns:
        codes (O, I) float8_e4m3fn and scales (O, 1) in the weight's dtype (fp32 for fp16 weights in FLOAT32);
        codes * scales approximates the weight.
    Raises:
        InputError: a weight is NaN or Inf.
    Source: compressed-tensors `float-quantized`, strategy channel; checked against it in tests/converters/numerics.
    """
    # fp16 has no room for the scale of a small row: 448 times below its maximum it is subnormal or zero
    narrow = arithmetic is Arithmetic.FLOAT32 and weight_OI.dtype is torch.float16
    scale_O1 = channel_scales(weight_OI.float() if narrow else weight_OI)
    if arithmetic is Arithmetic.COMPRESSED_TENSORS:
        # their symmetric zero point is added before rounding; it turns a negative zero into a positive one
        scaled_OI = (weight_OI / scale_O1).add_(0.0)
    else:
        scaled_OI = weight_OI / scale_O1.float()
    # the scale is rounded to its dtype, so the largest weight may land just above 448, which the cast would make NaN
    return scaled_OI.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale_O1


def dequantize_channel(codes_OI: torch.Tensor, scale_O1: torch.Tensor) -> torch.Tensor:
    """Return codes * scales in fp32, (O, I)."""
    return codes_OI.float() * scale_O1.float()
