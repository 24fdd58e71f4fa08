"""Gate and up of the experts: gathered rows times interleaved weights, SwiGLU at the end of each tile.

Shapes: T tokens, S slots, R rows in a layout, H hidden, I intermediate; M rows and N weight rows of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.arguments import Product
from runtime.kernels.moe.configs import TileConfig
from runtime.kernels.moe.decode import silu, stored
from runtime.kernels.moe.grouped import block_and_column, blocks_in_use, grouped_product, rows_of_block
from runtime.kernels.numbers import e4m3_bits
from runtime.moe.inputs import INPUT_GROUP, Inputs, QuantizedRows, Rows
from runtime.moe.weights import ExpertWeights

_LARGEST = tl.constexpr(448.0)
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _store_codes(
    value_MI: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    row_M: tl.tensor,
    is_row_M: tl.tensor,
    first_column: tl.tensor,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Write rows as E4M3, with a scale for each GROUP columns."""
    height: tl.constexpr = value_MI.shape[0]
    width: tl.constexpr = value_MI.shape[1]
    num_groups: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
    column_I = first_column + tl.arange(0, width)
    # beyond the last column is what the next expert's weights make
    value_MI = tl.where(column_I[None, :] < COLUMNS, value_MI, 0.0)
    value_MGC = tl.reshape(value_MI, (height, width // GROUP, GROUP))
    amax_MG = tl.max(tl.abs(value_MGC), axis=2)
    scale_MG = tl.div_rn(amax_MG, tl.full(amax_MG.shape, _LARGEST, tl.float32))
    divisor_MG1 = tl.where(scale_MG == 0, 1.0, scale_MG)[:, :, None]
    code_MGC = e4m3_bits(tl.div_rn(value_MGC, tl.broadcast_to(divisor_MG1, value_MGC.shape)))
    place_M1 = row_M.to(tl.int64)[:, None] * COLUMNS
    is_stored_MI = is_row_M[:, None] & (column_I[None, :] < COLUMNS)
    tl.store(out_ptr + place_M1 + column_I[None, :], tl.reshape(code_MGC, (height, width)).to(tl.uint8), is_stored_MI)
    group_1G = (first_column // GROUP + tl.arange(0, width // GROUP))[None, :]
    scale_ptr_MG = out_scale_ptr + row_M.to(tl.int64)[:, None] * num_groups + group_1G
    tl.store(scale_ptr_MG, scale_MG, mask=is_row_M[:, None] & (group_1G < num_groups))


@triton.jit(do_not_specialize=["num_experts", "capacity"])
def up_kernel(
    a: tl.tensor,
    a_scale_ptr: tl.tensor,
    a_global_ptr: tl.tensor,
    w: tl.tensor,
    w_scale_ptr: tl.tensor,
    w_global_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    num_blocks_ptr: tl.tensor,
    num_experts: tl.tensor,
    capacity: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    A_SCALES: tl.constexpr,
    W_SCALES: tl.constexpr,
    IS_INT8: tl.constexpr,
    NATIVE_FP4: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    A_GLOBALS: tl.constexpr,
    GATHERED: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDING: tl.constexpr,
) -> None:
    """Write silu(gate) * up (R, N / 2) of the rows in use, as codes of ROUNDING if there is an `out_scale_ptr`."""
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_blocks = blocks_in_use(num_blocks_ptr, num_experts, capacity, BLOCK_M, MASKED)
    tile = tl.program_id(0)
    while tile < num_blocks * num_columns:
        block, column = block_and_column(tile, num_blocks, num_columns)
        expert, first, slot_M, is_used = rows_of_block(block, slots_ptr, experts_ptr, capacity, BLOCK_M, MASKED)
        if is_used:
            first_n = column * BLOCK_N
            is_row_M = slot_M >= 0
            input_M = slot_M // TOP_K if GATHERED else first + tl.arange(0, BLOCK_M)
            total_MN = grouped_product(
                a, a_scale_ptr, a_global_ptr, w, w_scale_ptr, w_global_ptr,
                first, input_M, is_row_M, expert, first_n,
                N, K, True, A_SCALES, W_SCALES, IS_INT8, NATIVE_FP4, BLOCK_M, BLOCK_N, BLOCK_K, SWAP_AB, A_TMA, W_TMA,
                A_GLOBALS,
            )  # fmt: skip
            gate_MI, up_MI = tl.split(tl.reshape(total_MN, (BLOCK_M, BLOCK_N // 2, 2)))
            value_MI = silu(gate_MI) * up_MI
            row_M = first + tl.arange(0, BLOCK_M)
            if out_scale_ptr is not None:
                value_MI = stored(value_MI, ROUNDING).to(tl.float32)
                _store_codes(value_MI, out_ptr, out_scale_ptr, row_M, is_row_M, first_n // 2, N // 2, GROUP)
            else:
                column_1I = (first_n // 2 + tl.arange(0, BLOCK_N // 2))[None, :]
                out_ptr_MI = out_ptr + row_M.to(tl.int64)[:, None] * (N // 2) + column_1I
                is_stored_MI = is_row_M[:, None] & (column_1I < N // 2)
                tl.store(out_ptr_MI, stored(value_MI, out_ptr.dtype.element_ty), mask=is_stored_MI)
        tile += tl.num_programs(0)


def up_launch(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    out: Inputs,
    config: TileConfig,
    *,
    native_fp4: bool = False,
    rounded_to: torch.dtype = torch.float32,
) -> Launch:
    """Return the launch of `up`."""
    product = Product(inputs, weights.up, weights.scheme, rows, config, is_up=True, native_fp4=native_fp4)
    num_inputs = len(product.codes)
    constants: dict[str, Any] = {
        "GATHERED": product.is_gathered,
        "TOP_K": len(rows.position_of_slot) // num_inputs if product.is_gathered else 1,
        "GROUP": INPUT_GROUP,
        # one kernel for all that write no codes
        "ROUNDING": _DTYPES[rounded_to] if isinstance(out, QuantizedRows) else tl.float32,
    }
    if isinstance(out, QuantizedRows):
        assert config.block_n % (2 * INPUT_GROUP) == 0, config
        return product.launch(up_kernel, (out.codes.view(torch.uint8), out.scales), constants)
    return product.launch(up_kernel, (out, None), constants)


def up(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    out: Inputs,
    config: TileConfig,
    *,
    native_fp4: bool = False,
    rounded_to: torch.dtype = torch.float32,
) -> Inputs:
    """Write the SwiGLU, silu(gate) * up, of every row in use into `out`, and return it.

    Args:
        inputs: (T, H), of the weights' dtype if these are plain, or codes of their kind; or (R, H) in order of rows.
        weights: of all experts.
        rows: the layout; its blocks are of the config's block_m.
        out: (R, I) of a float dtype, or float8_e4m3fn codes with a scale for each 128 columns, for which tiles have to
            be a multiple of 256 weight rows. Rows not in use keep what they hold.
        config: tiles.
        native_fp4: multiply NVFP4 codes as they are, where inputs are NVFP4 as well.
        rounded_to: before results become codes, they are rounded to it, as if they had been stored in between.
    Sums, scales and SwiGLU are fp32; the result is rounded once. Twin: `runtime.kernels.twins.up.up`.
    """
    up_launch(inputs, weights, rows, out, config, native_fp4=native_fp4, rounded_to=rounded_to).run()
    return out
