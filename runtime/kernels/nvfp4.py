"""NVFP4: E2M1 codes, two in a byte, and an E4M3 scale for 16 columns, searched if asked for.

Shapes: G groups, C the 16 columns of one, H half of these.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from converters.numerics.nvfp4 import E2M1_MAX, E4M3_MAX, GROUP
from converters.numerics.nvfp4_search import ABSOLUTE, OFFSETS, RELATIVE
from converters.quant.scheme import Arithmetic, ScaleSearch
from runtime.kernels.launch import Launch, Rules, as_stored
from runtime.kernels.numbers import (
    bits_of,
    e2m1_bits,
    e2m1_value,
    e4m3_bits,
    e4m3_value,
    float_of,
    is_finite,
    magnitude,
    rounded,
    widen,
)

# groups of a program: 16 weights for a thread
TILE = 128


@triton.jit
def _local_codes(
    amax_G: tl.tensor,
    global_scale: tl.tensor,
    dtype: tl.constexpr,
    GROUPS: tl.constexpr,
    E2M1_LARGEST: tl.constexpr,
    E4M3_LARGEST: tl.constexpr,
    IS_MODELOPT: tl.constexpr,
    IS_NARROW: tl.constexpr,
) -> tl.tensor:
    """Return the E4M3 codes, int32, of local scales that map each group's largest |weight| to 6."""
    global_G = tl.full((GROUPS,), 1.0, tl.float32) * global_scale
    if IS_MODELOPT:
        scale_G = tl.div_rn(amax_G, global_G * E2M1_LARGEST)
        # the smallest E4M3 stands for scales below it, 1 for no scale
        scale_G = tl.minimum(tl.maximum(tl.where(scale_G == 0, 1.0, scale_G), 0.001953125), E4M3_LARGEST)
        code_G = e4m3_bits(scale_G)
    else:
        sixth_G = tl.div_rn(amax_G, tl.full((GROUPS,), E2M1_LARGEST, tl.float32))
        if IS_NARROW:
            sixth_G = rounded(sixth_G, dtype)
        code_G = e4m3_bits(tl.minimum(global_G * sixth_G, E4M3_LARGEST))
        # 0.125 is what compressed-tensors stores for zero
        code_G = tl.where(code_G == 0, 0x20, code_G)
    return code_G


@triton.jit
def _pairwise_sum(value_GC: tl.tensor, GROUPS: tl.constexpr) -> tl.tensor:
    """Return sums of 16 columns in one order: the upper half is added to the lower one, four times."""
    value_GC = tl.sum(tl.reshape(value_GC, (GROUPS, 2, 8)), axis=1)
    value_GC = tl.sum(tl.reshape(value_GC, (GROUPS, 2, 4)), axis=1)
    value_GC = tl.sum(tl.reshape(value_GC, (GROUPS, 2, 2)), axis=1)
    return tl.sum(value_GC, axis=1)


@triton.jit
def _searched_codes(
    size_GC: tl.tensor,
    start_G: tl.tensor,
    GROUPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OFFSETS: tl.constexpr,
    RELATIVE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
) -> tl.tensor:
    """Return the E4M3 codes of the best local scales of |weights|; twin: `nvfp4_search.search_scales`."""
    offsets = tl.full((), OFFSETS, tl.int64)
    best_G = tl.full((GROUPS,), 0x7FFFFFFF, tl.int32)
    one_G = tl.full((GROUPS,), 1.0, tl.float32)
    # no static_range: unrolled, the candidates take more registers than there are
    for number in range(CANDIDATES):
        nibble = ((offsets >> (4 * number)) & 15).to(tl.int32)
        code_G = tl.minimum(tl.maximum(start_G + ((nibble << 28) >> 28), 1), 0x7E)
        scale_G = e4m3_value(code_G)
        scaled_GC = size_GC * tl.div_rn(one_G, scale_G)[:, None]
        error_GC = e2m1_value(tl.minimum(scaled_GC, 6.0)) - scaled_GC
        error_G = _pairwise_sum(error_GC * error_GC, GROUPS)
        # the first one is the usual scale
        error_G = error_G * tl.where(number > 0, RELATIVE, 1.0) + tl.where(number > 0, ABSOLUTE, 0.0)
        key_G = (bits_of(error_G * scale_G * scale_G) & -16) | nibble
        best_G = tl.minimum(best_G, key_G)
    return tl.minimum(tl.maximum(((best_G << 28) >> 28) + start_G, 1), 0x7E)


@triton.jit(do_not_specialize=["num_groups", "global_scale", "divisor"])
def quantize_groups(
    weight_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    local_ptr: tl.tensor,
    num_groups: tl.tensor,
    global_scale: tl.tensor,
    divisor: tl.tensor,
    GROUPS: tl.constexpr,
    E2M1_LARGEST: tl.constexpr,
    E4M3_LARGEST: tl.constexpr,
    IS_MODELOPT: tl.constexpr,
    IS_NARROW: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OFFSETS: tl.constexpr,
    RELATIVE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
) -> None:
    """Write local scales and the codes of groups; the scale of a group that is not finite is NaN.

    The even columns' codes are the low nibbles. `divisor` is what local scales are divided by.
    """
    group_G = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    is_group_G = group_G < num_groups
    column_C = tl.arange(0, 16)
    place_GC = group_G[:, None] * 16 + column_C[None, :]
    weight_GC = widen(tl.load(weight_ptr + place_GC, mask=is_group_G[:, None], other=0))
    size_G = tl.max(magnitude(weight_GC), axis=1)
    code_G = _local_codes(
        float_of(size_G),
        global_scale,
        weight_ptr.dtype.element_ty,
        GROUPS,
        E2M1_LARGEST,
        E4M3_LARGEST,
        IS_MODELOPT,
        IS_NARROW,
    )
    if CANDIDATES > 0:
        size_GC = float_of(magnitude(weight_GC)) * divisor
        code_G = _searched_codes(size_GC, code_G, GROUPS, CANDIDATES, OFFSETS, RELATIVE, ABSOLUTE)
    tl.store(local_ptr + group_G, tl.where(is_finite(size_G), code_G, 0x7F).to(tl.uint8), mask=is_group_G)
    global_G = tl.full((GROUPS,), 1.0, tl.float32) * global_scale
    scale_G = e4m3_value(code_G) * global_G if IS_MODELOPT else tl.div_rn(e4m3_value(code_G), global_G)
    scaled_GC = tl.div_rn(weight_GC, tl.broadcast_to(scale_G[:, None], (GROUPS, 16)))
    low_GH, high_GH = tl.split(tl.reshape(e2m1_bits(scaled_GC), (GROUPS, 8, 2)))
    place_GH = group_G[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(packed_ptr + place_GH, (low_GH | (high_GH << 4)).to(tl.uint8), mask=is_group_G[:, None])


def nvfp4(weight_RC: torch.Tensor, global_11: torch.Tensor, arithmetic: Arithmetic, search: ScaleSearch) -> Launch:
    """Return what makes codes (R, C / 2) uint8, local scales (R, C / 16) float8_e4m3fn, and the global scale as given.

    Args:
        weight_RC: C a multiple of 16.
        global_11: fp32 (1, 1) on the CPU, from `converters.numerics.nvfp4.global_scale`.
        arithmetic: whose local scales.
        search: how they are chosen.
    Twin: `nvfp4.quantize_nvfp4`.
    """
    rows, columns = weight_RC.shape
    rules = Rules(arithmetic, weight_RC.dtype)
    offsets = (0, *OFFSETS) if search is ScaleSearch.MSE else ()
    packed_RB = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight_RC.device)
    local_RG = torch.empty(rows, columns // GROUP, dtype=torch.uint8, device=weight_RC.device)
    divisor_11 = global_11.reciprocal() if rules.is_modelopt else global_11
    num_groups = local_RG.numel()
    constants: dict[str, Any] = {
        "GROUPS": TILE,
        "E2M1_LARGEST": E2M1_MAX,
        "E4M3_LARGEST": E4M3_MAX,
        "IS_MODELOPT": rules.is_modelopt,
        "IS_NARROW": rules.is_narrow,
        "CANDIDATES": len(offsets),
        "OFFSETS": sum((offset & 15) << 4 * number for number, offset in enumerate(offsets)),
        "RELATIVE": RELATIVE,
        "ABSOLUTE": ABSOLUTE,
    }
    arguments = (as_stored(weight_RC), packed_RB, local_RG, num_groups, float(global_11), float(divisor_11))
    outputs = (packed_RB, local_RG.view(torch.float8_e4m3fn), global_11)
    return Launch(quantize_groups, triton.cdiv(num_groups, TILE), arguments, constants, outputs)
