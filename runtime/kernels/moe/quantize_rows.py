"""Rows of activations as FP8 or INT8 codes, as engines make them at run time, a row or a slot to a program.

Shapes: R rows, K columns, G groups of C columns, of which there may be more than a row has.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.numbers import e4m3_bits, int8_bits
from runtime.moe.inputs import INPUT_GROUP, QuantizedRows


@triton.jit
def quantize_rows_kernel(
    values_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    position_ptr: tl.tensor,
    K: tl.constexpr,
    NUM_SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """Write a row's codes and scales: max|x| / LARGEST of each group; none for a slot whose row is below 0."""
    row = tl.program_id(0).to(tl.int64)
    is_row = True
    if position_ptr is not None:
        row = tl.load(position_ptr + row).to(tl.int64)
        is_row = row >= 0
    group_G = tl.arange(0, GROUPS)
    column_GC = group_G[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_value_GC = (column_GC < K) & is_row
    value_GC = tl.load(values_ptr + row * K + column_GC, mask=is_value_GC, other=0.0).to(tl.float32)
    amax_G = tl.max(tl.abs(value_GC), axis=1)
    scale_G = tl.div_rn(amax_G, tl.full((GROUPS,), LARGEST, tl.float32))
    divisor_G1 = tl.where(scale_G == 0, 1.0, scale_G)[:, None]
    scaled_GC = tl.div_rn(value_GC, tl.broadcast_to(divisor_G1, (GROUPS, COLUMNS)))
    if IS_INT8:
        # the scale may have been rounded down, so that the largest is a little more than 127
        code_GC = int8_bits(tl.minimum(tl.maximum(scaled_GC, -LARGEST), LARGEST)).to(tl.int8)
    else:
        code_GC = e4m3_bits(scaled_GC).to(tl.uint8)
    tl.store(codes_ptr + row * K + column_GC, code_GC, mask=is_value_GC)
    tl.store(scales_ptr + row * NUM_SCALES + group_G, scale_G, mask=(group_G < NUM_SCALES) & is_row)


def quantize_rows_launch(
    values_RK: torch.Tensor, out: QuantizedRows, position_of_slot: torch.Tensor | None = None
) -> Launch:
    """Return the launch of `quantize_rows`."""
    num_rows, num_columns = values_RK.shape
    is_int8 = out.codes.dtype is torch.int8
    width = INPUT_GROUP if out.is_grouped else triton.next_power_of_2(num_columns)
    constants = {
        "K": num_columns,
        "NUM_SCALES": out.scales.shape[1],
        "GROUPS": triton.next_power_of_2(out.scales.shape[1]),
        "COLUMNS": width,
        "LARGEST": 127.0 if is_int8 else 448.0,
        "IS_INT8": is_int8,
    }
    codes = out.codes if is_int8 else out.codes.view(torch.uint8)
    arguments = (values_RK, codes, out.scales, position_of_slot)
    programs = num_rows if position_of_slot is None else len(position_of_slot)
    return Launch(quantize_rows_kernel, programs, arguments, constants, (out.codes, out.scales), num_warps=8)


def quantize_rows(
    values_RK: torch.Tensor, out: QuantizedRows, position_of_slot: torch.Tensor | None = None
) -> QuantizedRows:
    """Write codes and scales of rows into `out`, and return it.

    Args:
        values_RK: (R, K) bf16, fp16 or fp32, contiguous.
        out: codes float8_e4m3fn or int8; scales (R, 1), or (R, ceil(K / 128)).
        position_of_slot: int32 (S,), the rows in use, each once, or -1; others keep what they hold. None: all rows.
    Twin: `runtime.kernels.twins.quantize_rows.quantize_rows`; the same values as `model.activations.InputQuantizer`.
    """
    quantize_rows_launch(values_RK, out, position_of_slot).run()
    return out
