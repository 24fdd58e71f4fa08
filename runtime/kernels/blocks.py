"""FP8 codes of weights with one scale for a block of rows and columns, a block to a program."""

import torch
import triton
import triton.language as tl

from converters.numerics.fp8 import E4M3_MAX
from converters.quant.scheme import Arithmetic
from runtime.kernels.launch import Launch, Rules, as_stored
from runtime.kernels.numbers import (
    e4m3_bits,
    float_of,
    is_finite,
    magnitude,
    narrow,
    rounded,
    symmetric_scale,
    widen,
)


@triton.jit(do_not_specialize=["num_rows"])
def quantize_blocks(
    weight_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    IS_INVERSE: tl.constexpr,
    IS_MODELOPT: tl.constexpr,
    IS_NARROW: tl.constexpr,
    IS_POSITIVE_ZERO: tl.constexpr,
) -> None:
    """Write the codes of blocks of HEIGHT x WIDTH weights, and their scales; blocks at the edges may be cut off."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
    across: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    block = tl.program_id(0)
    row_H, column_W = tl.arange(0, TILE_HEIGHT), tl.arange(0, TILE_WIDTH)
    row_H1 = (block // across * HEIGHT + row_H)[:, None]
    column_1W = (block % across * WIDTH + column_W)[None, :]
    is_row_H1 = (row_H < HEIGHT)[:, None] & (row_H1 < num_rows)
    is_weight_HW = is_row_H1 & (column_W < WIDTH)[None, :] & (column_1W < COLUMNS)
    place_HW = row_H1 * COLUMNS + column_1W
    weight_HW = widen(tl.load(weight_ptr + place_HW, mask=is_weight_HW, other=0))
    # as a tensor of one value: what follows is written for tensors
    size_1 = tl.max(tl.max(magnitude(weight_HW), axis=1)[None, :], axis=1)
    if IS_INVERSE:
        one_1 = tl.full((1,), 1.0, tl.float32)
        factor_1 = tl.where(size_1 > 0, tl.div_rn(one_1, float_of(size_1)) * LARGEST, 1.0)
        scale_1 = tl.where(is_finite(size_1), tl.div_rn(one_1, factor_1), float("inf"))
        scaled_HW = weight_HW * factor_1[:, None]
    else:
        scale_1 = symmetric_scale(size_1, LARGEST, LEAST, IS_MODELOPT, scale_dtype)
        scaled_HW = tl.div_rn(weight_HW, tl.broadcast_to(scale_1[:, None], (TILE_HEIGHT, TILE_WIDTH)))
    tl.store(scale_ptr + block + tl.arange(0, 1), narrow(scale_1, scale_dtype))
    if IS_NARROW:
        scaled_HW = rounded(scaled_HW, dtype)
    if IS_POSITIVE_ZERO:
        scaled_HW = scaled_HW + 0.0
    tl.store(codes_ptr + place_HW, e4m3_bits(scaled_HW).to(tl.uint8), mask=is_weight_HW)


def fp8_block(
    weight_OI: torch.Tensor, arithmetic: Arithmetic, block: tuple[int, int], *, is_inverse: bool = False
) -> Launch:
    """Return what makes codes (O, I) float8_e4m3fn and scales (ceil(O / height), ceil(I / width)).

    Args:
        weight_OI: its first row begins a block.
        arithmetic: says nothing where is_inverse.
        block: height and width.
        is_inverse: scales fp32, and codes, as DeepSeek-V3 has them.
    Twins: `fp8.quantize_block`, `fp8.quantize_block_inverse`.
    """
    rows, columns = weight_OI.shape
    height, width = block
    rules = Rules(Arithmetic.FLOAT32, torch.float32) if is_inverse else Rules(arithmetic, weight_OI.dtype)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight_OI.device)
    scale_BD = rules.new_scales((triton.cdiv(rows, height), triton.cdiv(columns, width)), weight_OI.device)
    constants = {
        "COLUMNS": columns,
        "HEIGHT": height,
        "WIDTH": width,
        "TILE_HEIGHT": triton.next_power_of_2(height),
        "TILE_WIDTH": triton.next_power_of_2(width),
        "IS_INVERSE": is_inverse,
        "IS_NARROW": rules.is_narrow,
        "IS_POSITIVE_ZERO": rules.is_positive_zero,
        **rules.constants(E4M3_MAX),
    }
    arguments = (as_stored(weight_OI), codes_OI, as_stored(scale_BD), rows)
    outputs = (codes_OI.view(torch.float8_e4m3fn), scale_BD)
    return Launch(quantize_blocks, scale_BD.numel(), arguments, constants, outputs, num_warps=16)
