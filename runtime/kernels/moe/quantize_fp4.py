"""Rows of activations as NVFP4 codes, each below its expert's calibrated scale, a slot to a program.

Shapes: R rows of a layout, K columns, G groups of C = 16 columns, of which there may be more than a row has; E experts.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.numbers import e2m1_bits, e4m3_bits, e4m3_value
from runtime.moe.inputs import QuantizedRows, Rows
from runtime.moe.layouts import MaskedRows


@triton.jit(do_not_specialize=["block"])
def quantize_fp4_kernel(
    values_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    position_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    block: tl.tensor,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHERED: tl.constexpr,
) -> None:
    """Write codes and local scales of a slot's row, if it has one.

    `block` rows belong to one expert, which `experts_ptr` names if there is one, and else to expert after expert.
    """
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(position_ptr + slot).to(tl.int64)
    if row >= 0:
        expert = row // block
        if experts_ptr is not None:
            expert = tl.load(experts_ptr + expert).to(tl.int64)
        source = slot // TOP_K if GATHERED else row
        group_G = tl.arange(0, GROUPS)
        is_group_G = group_G < K // 16
        place_GC = group_G[:, None] * 16 + tl.arange(0, 16)[None, :]
        value_GC = tl.load(values_ptr + source * K + place_GC, mask=is_group_G[:, None], other=0.0).to(tl.float32)
        factor_G = tl.full((GROUPS,), 1.0, tl.float32) * tl.load(factors_ptr + expert)
        sixth_G = tl.div_rn(tl.max(tl.abs(value_GC), axis=1), tl.full((GROUPS,), 6.0, tl.float32))
        local_G = e4m3_bits(factor_G * sixth_G)
        scale_G = tl.div_rn(e4m3_value(local_G), factor_G)
        divisor_G1 = tl.where(scale_G == 0, 1.0, scale_G)[:, None]
        scaled_GC = tl.div_rn(value_GC, tl.broadcast_to(divisor_G1, (GROUPS, 16)))
        low_GB, high_GB = tl.split(tl.reshape(e2m1_bits(scaled_GC), (GROUPS, 8, 2)))
        byte_GB = group_G[:, None] * 8 + tl.arange(0, 8)[None, :]
        code_GB = (low_GB | (high_GB << 4)).to(tl.uint8)
        tl.store(codes_ptr + row * (K // 2) + byte_GB, code_GB, mask=is_group_G[:, None])
        tl.store(scales_ptr + row * (K // 16) + group_G, local_G.to(tl.uint8), mask=is_group_G)


def quantize_fp4_rows_launch(
    values: torch.Tensor, factors_E: torch.Tensor, rows: Rows, out: QuantizedRows, *, is_gathered: bool
) -> Launch:
    """Return the launch of `quantize_fp4_rows`."""
    num_columns = values.shape[1]
    assert values.is_contiguous(), values.stride()
    assert num_columns % 16 == 0, values.shape
    num_slots = len(rows.position_of_slot)
    constants = {
        "K": num_columns,
        "GROUPS": triton.next_power_of_2(num_columns // 16),
        "TOP_K": num_slots // len(values) if is_gathered else 1,
        "GATHERED": is_gathered,
    }
    block = rows.slots.shape[1] if isinstance(rows, MaskedRows) else rows.block_m
    experts = None if isinstance(rows, MaskedRows) else rows.expert_of_block
    arguments = (values, out.codes, out.scales.view(torch.uint8), rows.position_of_slot, experts, factors_E, block)
    return Launch(quantize_fp4_kernel, num_slots, arguments, constants, (out.codes, out.scales), num_warps=8)


def quantize_fp4_rows(
    values: torch.Tensor, factors_E: torch.Tensor, rows: Rows, out: QuantizedRows, *, is_gathered: bool
) -> QuantizedRows:
    """Write the codes and local scales of a layout's rows into `out`, and return it.

    Args:
        values: bf16, fp16 or fp32, contiguous, K columns, a multiple of 16: tokens (T, K), or rows (R, K).
        factors_E: fp32, what each expert's local scales, amax / 6, are multiplied with before they are rounded to E4M3.
        rows: the layout; rows not in use keep what they hold.
        out: codes (R, K / 2) uint8, scales (R, K / 16) float8_e4m3fn.
        is_gathered: values are tokens.
    Twin: `runtime.kernels.twins.quantize_fp4.quantize_fp4_rows`; the values are those of `model.activations`.
    """
    quantize_fp4_rows_launch(values, factors_E, rows, out, is_gathered=is_gathered).run()
    return out
