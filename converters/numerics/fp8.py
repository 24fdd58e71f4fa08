"""FP8 E4M3 with one scale per output channel, per block of 128 x 128, or per tensor.

The arithmetics write the same formats. `FLOAT32` divides in fp32 by the stored scale, so a code is off by at most half
a step. `COMPRESSED_TENSORS` reproduces that library byte for byte: it divides in the weight's own dtype, which rounds
twice and has about 0.6 % more error on bf16 weights. `MODELOPT` reproduces the export of nvidia-modelopt.
Shapes: O x I the weight, B x D its blocks.
"""

import torch

from converters.numerics import fp8_bits
from converters.numerics.scales import block_magnitudes, column_parts, group_magnitudes, scaled_chunks, symmetric_scales
from converters.numerics.workspace import WORKSPACE
from converters.quant.scheme import Arithmetic

E4M3_MAX = 448.0


def channel_scales(weight_OI: torch.Tensor, arithmetic: Arithmetic = Arithmetic.COMPRESSED_TENSORS) -> torch.Tensor:
    """Return max|row| / 448 as (O, 1); see `symmetric_scales` for its dtype.

    A scale that comes out as zero (an all-zero row, or one too small for the dtype) becomes the dtype's machine
    epsilon, as compressed-tensors writes it; its codes are zero.

    Raises:
        InputError: a row holds NaN or Inf.
    """
    return symmetric_scales(group_magnitudes(weight_OI, 0), E4M3_MAX, arithmetic)


def quantize_channel(weight_OI: torch.Tensor, arithmetic: Arithmetic) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows to E4M3, each with its own scale; ties round to even.

    Args:
        weight_OI: (O, I) bf16, fp16 or fp32.
        arithmetic: where the division happens.
    Returns:
        codes (O, I) float8_e4m3fn and scales (O, 1); codes * scales approximates the weight.
    Raises:
        InputError: a weight is NaN or Inf.
    Source: compressed-tensors `float-quantized`, strategy channel; modelopt FP8_PER_CHANNEL_PER_TOKEN_CFG.
    """
    scale_O1 = channel_scales(weight_OI, arithmetic)
    return _encode(weight_OI, scale_O1, arithmetic), scale_O1


def quantize_tensor(
    weight_OI: torch.Tensor, largest_11: torch.Tensor, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with one scale for all weights that share it; ties round to even.

    Args:
        weight_OI: (O, I) bf16, fp16 or fp32.
        largest_11: their max|w|, fp32 (1, 1); exact in the weight's dtype.
        arithmetic: where the division happens.
    Returns:
        codes (O, I) float8_e4m3fn and the scale (1, 1).
    Source: compressed-tensors `float-quantized`, strategy tensor; modelopt FP8_DEFAULT_CFG.
    """
    is_modelopt = arithmetic is Arithmetic.MODELOPT
    if is_modelopt:
        # unlike their other scales it may be subnormal
        scale_11 = torch.where(largest_11 == 0, 1.0, largest_11 / torch.full_like(largest_11, E4M3_MAX))
    else:
        scale_11 = symmetric_scales(largest_11.to(weight_OI.dtype), E4M3_MAX, arithmetic)
    # being a scalar there, it leaves the quotient in the weight's dtype
    narrow = weight_OI.dtype if is_modelopt else None
    return _encode(weight_OI, scale_11.expand(len(weight_OI), 1), arithmetic, narrow=narrow), scale_11


def quantize_block(
    weight_OI: torch.Tensor, arithmetic: Arithmetic, *, rows: int = 128, columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with one scale per block; blocks at the right and at the bottom may be cut off.

    Args:
        weight_OI: (O, I) bf16, fp16 or fp32; its first row begins a block.
        arithmetic: where the division happens.
        rows: of a block.
        columns: of a block.
    Returns:
        codes (O, I) float8_e4m3fn and scales (ceil(O / rows), ceil(I / columns)).
    Raises:
        InputError: a weight is NaN or Inf.
    Source: compressed-tensors `float-quantized`, strategy block; modelopt FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG.
    """
    scale_BD = symmetric_scales(block_magnitudes(weight_OI, rows, columns), E4M3_MAX, arithmetic)
    return _encode_blocks(weight_OI, scale_BD, arithmetic, (rows, columns)), scale_BD


def quantize_block_inverse(
    weight_OI: torch.Tensor, *, rows: int = 128, columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize blocks as DeepSeek-V3 does: multiply with 448 / amax and store the reciprocal, all in fp32.

    Returns:
        codes (O, I) float8_e4m3fn and `weight_scale_inv` fp32 (ceil(O / rows), ceil(I / columns)); despite its name
        codes * weight_scale_inv approximates the weight.
    Raises:
        InputError: a weight is NaN or Inf.
    Source: transformers `Fp8Quantize`, compared with it in tests/converters/numerics.
    """
    amax_BD = block_magnitudes(weight_OI, rows, columns).float()
    # a number divided by a tensor is number * reciprocal in torch, each step rounded
    factor_BD = torch.where(amax_BD > 0, amax_BD.reciprocal() * E4M3_MAX, 1.0)
    codes_OI = _encode_blocks(weight_OI, factor_BD, Arithmetic.FLOAT32, (rows, columns), multiply=True)
    return codes_OI, factor_BD.reciprocal()


def dequantize_channel(codes_OI: torch.Tensor, scale_O1: torch.Tensor) -> torch.Tensor:
    """Return codes * scales in fp32, (O, I)."""
    return codes_OI.float() * scale_O1.float()


def _encode_blocks(
    weight_OI: torch.Tensor,
    scale_BD: torch.Tensor,
    arithmetic: Arithmetic,
    block: tuple[int, int],
    *,
    multiply: bool = False,
) -> torch.Tensor:
    """Return codes (O, I) for scales of blocks, given as height and width."""
    height, width = block
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn, device=weight_OI.device)
    scale_OD = scale_BD.repeat_interleave(height, dim=0)[: len(weight_OI)]
    for part, group in column_parts(weight_OI.shape[1], width):
        parts = slice(part.start // width, -(-part.stop // width))
        assert (part.stop - part.start) // group == parts.stop - parts.start, (part, group)
        _encode(weight_OI[:, part], scale_OD[:, parts], arithmetic, multiply=multiply, out=codes_OI[:, part])
    return codes_OI


def _encode(
    weight_OI: torch.Tensor,
    scale_OG: torch.Tensor,
    arithmetic: Arithmetic,
    *,
    multiply: bool = False,
    narrow: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codes (O, I) for scales of groups of columns; `narrow` is a dtype that quotients are rounded to first."""
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn, device=weight_OI.device) if out is None else out
    is_plain = arithmetic is Arithmetic.FLOAT32 and not multiply
    if is_plain and fp8_bits.suits(weight_OI, scale_OG):
        fp8_bits.encode(weight_OI, scale_OG, codes_OI.view(torch.uint8))
        return codes_OI
    for part, scaled_RC in scaled_chunks(weight_OI, scale_OG, arithmetic, multiply=multiply):
        # a scale is rounded to its dtype: the largest weight may land just above 448, which the cast would make NaN
        scaled_RC.clamp_(-E4M3_MAX, E4M3_MAX)
        if narrow is not None:
            scaled_RC = WORKSPACE.take("narrow", scaled_RC.shape, narrow, scaled_RC).copy_(scaled_RC)
        codes_OI[part].copy_(scaled_RC)
    return codes_OI
