"""One tile of a grouped product: rows of one expert times rows of its weight; what up and down have in common.

Shapes: M rows of a tile, N rows of the weight, K columns.
"""

import triton
import triton.language as tl

from runtime.kernels.moe.decode import E2M1_FACTOR, INTERPRET, e2m1_halves, operand, product

# blocks of rows whose tiles follow each other: weights are read again while the L2 still has them
GROUP_M = tl.constexpr(8)
_BLOCK = tl.constexpr(128)


@triton.jit
def blocks_in_use(
    num_blocks_ptr: tl.tensor, num_experts: tl.tensor, capacity: tl.tensor, BLOCK_M: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """Return the number of blocks of rows, counting those that a masked layout may leave empty."""
    return num_experts * tl.cdiv(capacity, BLOCK_M) if MASKED else tl.load(num_blocks_ptr)


@triton.jit
def block_and_column(tile: tl.tensor, num_blocks: tl.tensor, NUM_COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the block of rows and the block of weight rows of a tile."""
    first = tile // (GROUP_M * NUM_COLUMNS) * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    inside = tile % (GROUP_M * NUM_COLUMNS)
    return first + inside % height, inside // height


@triton.jit
def rows_of_block(
    block: tl.tensor,
    slots_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    capacity: tl.tensor,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return a block's expert, first row, slots (M,), of which those that are used are >= 0, and if any is used.

    `experts_ptr` has the expert of each block, or, masked, the number of rows of each expert.
    """
    if MASKED:
        blocks = tl.cdiv(capacity, BLOCK_M)
        expert = block // blocks
        first = block % blocks * BLOCK_M
        row_M = first + tl.arange(0, BLOCK_M)
        slot_M = tl.load(slots_ptr + expert * capacity + row_M, mask=row_M < capacity, other=-1)
        is_used = first < tl.load(experts_ptr + expert)
        first += expert * capacity
    else:
        expert = tl.load(experts_ptr + block)
        first = block * BLOCK_M
        slot_M = tl.load(slots_ptr + first + tl.arange(0, BLOCK_M))
        is_used = expert >= 0
    return expert, first, slot_M, is_used


@triton.jit
def _load_rows(
    a: tl.tensor,
    first: tl.tensor,
    row_M: tl.tensor,
    is_row_M: tl.tensor,
    column: tl.tensor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """Return (M, WIDTH) of the inputs, zero where there is nothing."""
    if TMA:
        values = a.load([first, column])
    else:
        column_1K = (column + tl.arange(0, WIDTH))[None, :]
        place_MK = row_M.to(tl.int64)[:, None] * COLUMNS + column_1K
        values = tl.load(a + place_MK, mask=is_row_M[:, None] & (column_1K < COLUMNS), other=0.0)
    return values


@triton.jit
def _load_weights(
    w: tl.tensor,
    expert: tl.tensor,
    first_n: tl.tensor,
    column: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """Return (HEIGHT, WIDTH) of an expert's weights; below its last row is what comes next, or zero."""
    if TMA:
        values = w.load([expert * ROWS + first_n, column])
    else:
        n_N1 = (first_n + tl.arange(0, HEIGHT))[:, None]
        column_1K = (column + tl.arange(0, WIDTH))[None, :]
        place_NK = expert.to(tl.int64) * (ROWS * COLUMNS) + n_N1 * COLUMNS + column_1K
        values = tl.load(w + place_NK, mask=(n_N1 < ROWS) & (column_1K < COLUMNS), other=0.0)
    return values


@triton.jit
def _block_row(expert: tl.tensor, n_N: tl.tensor, N: tl.constexpr, INTERLEAVED: tl.constexpr) -> tl.tensor:
    """Return the row of block scales (N,) that belongs to rows of a weight."""
    if INTERLEAVED:
        blocks: tl.constexpr = (N // 2 + _BLOCK - 1) // _BLOCK
        row_N = (expert * 2 + n_N % 2) * blocks + n_N // 2 // _BLOCK
    else:
        row_N = expert * ((N + _BLOCK - 1) // _BLOCK) + n_N // _BLOCK
    return row_N


@triton.jit
def _add_product(a_MK: tl.tensor, w_NK: tl.tensor, total: tl.tensor, SWAP_AB: tl.constexpr) -> tl.tensor:
    return product(w_NK, tl.trans(a_MK), total) if SWAP_AB else product(a_MK, tl.trans(w_NK), total)


@triton.jit
def _add_scaled_product(
    a_MB: tl.tensor,
    a_scale_MG: tl.tensor,
    w_NB: tl.tensor,
    w_scale_NG: tl.tensor,
    total: tl.tensor,
    SWAP_AB: tl.constexpr,
) -> tl.tensor:
    """Multiply E2M1 codes, two in a byte, by the matrix unit for them."""
    if SWAP_AB:
        total = tl.dot_scaled(w_NB, w_scale_NG, "e2m1", tl.trans(a_MB), a_scale_MG, "e2m1", total)
    else:
        total = tl.dot_scaled(a_MB, a_scale_MG, "e2m1", tl.trans(w_NB), w_scale_NG, "e2m1", total)
    return total


@triton.jit
def grouped_product(
    a: tl.tensor,
    a_scale_ptr: tl.tensor,
    a_global_ptr: tl.tensor,
    w: tl.tensor,
    w_scale_ptr: tl.tensor,
    w_global_ptr: tl.tensor,
    first: tl.tensor,
    row_M: tl.tensor,
    is_row_M: tl.tensor,
    expert: tl.tensor,
    first_n: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    A_SCALES: tl.constexpr,
    W_SCALES: tl.constexpr,
    IS_INT8: tl.constexpr,
    NATIVE_FP4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    A_GLOBALS: tl.constexpr,
) -> tl.tensor:
    """Return fp32 (M, N): rows times a weight's rows, all scales applied.

    Args:
        a: inputs or their codes (rows, K), as a descriptor if A_TMA.
        w: weights or codes (experts x N, K), as a descriptor if W_TMA.
        first: row of the first of row_M, where they lie in order.
        row_M: rows of `a`.
        expert: whose weight.
        first_n: first of its rows.
        INTERLEAVED: rows of the weight are gate and up in turn.
        A_SCALES: "none", "row", "block" (128 columns) or "group" (NVFP4).
        W_SCALES: "none", "channel", "block" or "group".
        IS_INT8: both sides are.
        NATIVE_FP4: codes of both sides go to the matrix unit as they are.
        A_GLOBALS: 1 where each expert has a global scale of its inputs, 0 where there is one.
    """
    A_PACK: tl.constexpr = 2 if A_SCALES == "group" else 1
    W_PACK: tl.constexpr = 2 if W_SCALES == "group" else 1
    is_grouped: tl.constexpr = A_SCALES == "block" or W_SCALES == "block"
    is_native: tl.constexpr = NATIVE_FP4 and not INTERPRET
    n_N = first_n + tl.arange(0, BLOCK_N)
    if W_SCALES == "block":
        w_row_N = _block_row(expert, n_N, N, INTERLEAVED)
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_AB else (BLOCK_M, BLOCK_N), tl.int32 if IS_INT8 else tl.float32)
    for k in range(0, K, BLOCK_K):
        a_MK = _load_rows(a, first, row_M, is_row_M, k // A_PACK, K // A_PACK, BLOCK_K // A_PACK, A_TMA)
        w_NK = _load_weights(w, expert, first_n, k // W_PACK, N, K // W_PACK, BLOCK_N, BLOCK_K // W_PACK, W_TMA)
        if W_SCALES == "group":
            w_scale_NG = _load_weights(w_scale_ptr, expert, first_n, k // 16, N, K // 16, BLOCK_N, BLOCK_K // 16, False)
            if A_SCALES == "group":
                a_scale_MG = _load_rows(a_scale_ptr, first, row_M, is_row_M, k // 16, K // 16, BLOCK_K // 16, False)
        if is_native:
            total = _add_scaled_product(a_MK, a_scale_MG, w_NK, w_scale_NG, total, SWAP_AB)
        else:
            if W_SCALES == "group":
                w_NK = e2m1_halves(w_NK, w_scale_NG)
            if A_SCALES == "group":
                a_MK = e2m1_halves(a_MK, a_scale_MG)
            elif A_SCALES == "none":
                w_NK = operand(w_NK, a_MK.dtype)
            if is_grouped:
                part = _add_product(a_MK, w_NK, tl.zeros_like(total), SWAP_AB)
                if A_SCALES == "block":
                    a_place_M = row_M * ((K + _BLOCK - 1) // _BLOCK) + k // _BLOCK
                    a_scale_M = tl.load(a_scale_ptr + a_place_M, mask=is_row_M, other=0.0)
                    part *= a_scale_M[None, :] if SWAP_AB else a_scale_M[:, None]
                if W_SCALES == "block":
                    w_place_N = w_row_N * ((K + _BLOCK - 1) // _BLOCK) + k // _BLOCK
                    w_scale_N = tl.load(w_scale_ptr + w_place_N, mask=n_N < N, other=0.0)
                    part *= w_scale_N[:, None] if SWAP_AB else w_scale_N[None, :]
                total += part
            else:
                total = _add_product(a_MK, w_NK, total, SWAP_AB)
    total_MN = (tl.trans(total) if SWAP_AB else total).to(tl.float32)
    if A_SCALES == "row":
        total_MN *= tl.load(a_scale_ptr + row_M, mask=is_row_M, other=0.0)[:, None]
    if W_SCALES == "channel":
        total_MN *= tl.load(w_scale_ptr + expert * N + n_N, mask=n_N < N, other=0.0)[None, :]
    if W_SCALES == "group":
        total_MN *= tl.load(w_global_ptr + expert) * (1.0 if is_native else E2M1_FACTOR)
    if A_SCALES == "group":
        total_MN *= tl.load(a_global_ptr + expert * A_GLOBALS) * (1.0 if is_native else E2M1_FACTOR)
    return total_MN
