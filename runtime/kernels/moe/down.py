"""Down of the experts: rows times weights, times the routing weight, each to the place of its slot.

Shapes: S slots, R rows in a layout, H hidden, I intermediate; M rows and N weight rows of a tile.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.arguments import Product
from runtime.kernels.moe.configs import TileConfig
from runtime.kernels.moe.decode import stored
from runtime.kernels.moe.grouped import block_and_column, blocks_in_use, grouped_product, rows_of_block
from runtime.moe.inputs import Inputs, Rows
from runtime.moe.weights import ExpertWeights


@triton.jit(do_not_specialize=["num_experts", "capacity"])
def down_kernel(
    a: tl.tensor,
    a_scale_ptr: tl.tensor,
    a_global_ptr: tl.tensor,
    w: tl.tensor,
    w_scale_ptr: tl.tensor,
    w_global_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
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
) -> None:
    """Write (S, N): the rows in use times their expert's weight and their slot's routing weight."""
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_blocks = blocks_in_use(num_blocks_ptr, num_experts, capacity, BLOCK_M, MASKED)
    tile = tl.program_id(0)
    while tile < num_blocks * num_columns:
        block, column = block_and_column(tile, num_blocks, num_columns)
        expert, first, slot_M, is_used = rows_of_block(block, slots_ptr, experts_ptr, capacity, BLOCK_M, MASKED)
        if is_used:
            first_n = column * BLOCK_N
            is_row_M = slot_M >= 0
            total_MN = grouped_product(
                a, a_scale_ptr, a_global_ptr, w, w_scale_ptr, w_global_ptr,
                first, first + tl.arange(0, BLOCK_M), is_row_M, expert, first_n,
                N, K, False, A_SCALES, W_SCALES, IS_INT8, NATIVE_FP4, BLOCK_M, BLOCK_N, BLOCK_K, SWAP_AB, A_TMA, W_TMA,
                A_GLOBALS,
            )  # fmt: skip
            total_MN *= tl.load(topk_weights_ptr + slot_M, mask=is_row_M, other=0.0)[:, None]
            column_1N = (first_n + tl.arange(0, BLOCK_N))[None, :]
            out_ptr_MN = out_ptr + slot_M.to(tl.int64)[:, None] * N + column_1N
            is_stored_MN = is_row_M[:, None] & (column_1N < N)
            tl.store(out_ptr_MN, stored(total_MN, out_ptr.dtype.element_ty), mask=is_stored_MN)
        tile += tl.num_programs(0)


def down_launch(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    topk_weights_TK: torch.Tensor,
    out_SH: torch.Tensor,
    config: TileConfig,
    *,
    native_fp4: bool = False,
) -> Launch:
    """Return the launch of `down`."""
    assert topk_weights_TK.is_contiguous(), topk_weights_TK.stride()
    product = Product(inputs, weights.down, weights.scheme, rows, config, is_up=False, native_fp4=native_fp4)
    return product.launch(down_kernel, (topk_weights_TK, out_SH), {})


def down(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    topk_weights_TK: torch.Tensor,
    out_SH: torch.Tensor,
    config: TileConfig,
    *,
    native_fp4: bool = False,
) -> torch.Tensor:
    """Write each slot's result, times its routing weight, into `out_SH`, and return it.

    Args:
        inputs: (R, I) in the order of `rows`: what `up` wrote, or codes.
        weights: of all experts.
        rows: the layout that `up` had.
        topk_weights_TK: fp32 (T, K); 1 for a shared expert.
        out_SH: (S, H) of a float dtype. Filtered slots keep what they hold.
        config: tiles.
        native_fp4: as in `up`.
    Sums and scales are fp32; the result is rounded once. Twin: `runtime.kernels.twins.down.down`.
    """
    down_launch(inputs, weights, rows, topk_weights_TK, out_SH, config, native_fp4=native_fp4).run()
    return out_SH
