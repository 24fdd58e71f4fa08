"""Experts for a handful of tokens: products with one row each, without matrix units, that end in registers.

Nothing is padded and nothing goes through memory but the activations between the two products. Inputs are never rounded
to codes. NVFP4 has no kernel here: taking its codes apart costs more than reading them.

Shapes: T tokens, K slots per token, S = T * K, H hidden, I intermediate; N rows and C columns of a tile of weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from converters.errors import UsageError
from runtime.kernels.launch import Launch
from runtime.kernels.moe.decode import silu, stored
from runtime.moe.weights import BLOCK, ExpertScheme, ExpertWeights, Packed

PLAIN, CHANNEL, BLOCKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_SCALES = {
    ExpertScheme.FP8_CHANNEL: CHANNEL.value,
    ExpertScheme.INT8_CHANNEL: CHANNEL.value,
    ExpertScheme.INT8_W8A8: CHANNEL.value,
    ExpertScheme.FP8_BLOCK: BLOCKED.value,
}


@dataclass(frozen=True, slots=True)
class GemvTile:
    """Weights that a program holds at once, and its warps."""

    rows: int
    columns: int
    num_warps: int


def tile(scheme: ExpertScheme, *, is_up: bool) -> GemvTile:
    """Return the tile for weights of a scheme: lines of at least 128 bytes, 32 or 64 weights for a thread.

    A row of down has few columns, so that tiles are narrow there.
    """
    if scheme is ExpertScheme.FP8_BLOCK:
        # as wide as a block: one scale for each row of a tile
        return GemvTile(32, BLOCK, 4)
    if is_up:
        return GemvTile(16, 512, 8 if scheme.code_dtype.itemsize == 4 else 4)
    return GemvTile(8, 512, 4)


@triton.jit
def row_products(
    input_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_N: tl.tensor,
    is_row_N: tl.tensor,
    scale_N: tl.tensor,
    WIDTH: tl.constexpr,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return the products (N,) fp32 of some rows of one matrix with the row at input_ptr.

    `scale_N` is where, behind scales_ptr, the scales of rows lie: of a row, or of its first block.
    """
    column_C = tl.arange(0, COLUMNS)
    sum_NC = tl.zeros((row_N.shape[0], COLUMNS), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        is_column_C = first + column_C < WIDTH
        input_C = tl.load(input_ptr + first + column_C, mask=is_column_C, other=0.0).to(tl.float32)
        weight_NC = tl.load(
            codes_ptr + row_N[:, None] * WIDTH + (first + column_C)[None, :],
            mask=is_row_N[:, None] & is_column_C[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        term_NC = weight_NC.to(tl.float32) * input_C[None, :]
        if SCALES == BLOCKED:
            term_NC = term_NC * tl.load(scales_ptr + scale_N + first // COLUMNS, mask=is_row_N, other=0.0)[:, None]
        sum_NC += term_NC
    total_N = tl.sum(sum_NC, axis=1)
    if SCALES == CHANNEL:
        total_N = total_N * tl.load(scales_ptr + scale_N, mask=is_row_N, other=0.0)
    return total_N


@triton.jit
def up_rows(
    hidden_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write silu(gate) * up of ROWS / 2 pairs of rows of one slot's expert; zero where the slot is filtered."""
    height: tl.constexpr = 2 * INTERMEDIATE
    across: tl.constexpr = (height + ROWS - 1) // ROWS
    slot, part = tl.program_id(0) // across, tl.program_id(0) % across
    row_N = part * ROWS + tl.arange(0, ROWS)
    is_row_N = row_N < height
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    total_N = tl.zeros((ROWS,), tl.float32)
    if expert >= 0:
        if SCALES == BLOCKED:
            down: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
            along: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
            scale_N = ((expert * 2 + row_N % 2) * down + row_N // 2 // COLUMNS) * along
        else:
            scale_N = expert * height + row_N
        input_ptr = hidden_ptr + slot // SLOTS * HIDDEN
        matrix_ptr = codes_ptr + expert * height * HIDDEN
        total_N = row_products(input_ptr, matrix_ptr, scales_ptr, row_N, is_row_N, scale_N, HIDDEN, SCALES, COLUMNS)
    gate_M, up_M = tl.split(tl.reshape(total_N, (ROWS // 2, 2)))
    value_M = stored(silu(gate_M) * up_M, out_ptr.dtype.element_ty)
    row_M = part * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(out_ptr + slot * INTERMEDIATE + row_M, value_M, mask=row_M < INTERMEDIATE)


@triton.jit
def down_rows(
    activated_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Write ROWS values of a token: its slots' results by weight, added up in their order, and the residual."""
    across: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    token, part = tl.program_id(0) // across, tl.program_id(0) % across
    row_N = part * ROWS + tl.arange(0, ROWS)
    is_row_N = row_N < HIDDEN
    total_N = tl.zeros((ROWS,), tl.float32)
    for number in range(SLOTS):
        slot = token * SLOTS + number
        expert = tl.load(ids_ptr + slot).to(tl.int64)
        if expert >= 0:
            if SCALES == BLOCKED:
                down: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
                along: tl.constexpr = (INTERMEDIATE + COLUMNS - 1) // COLUMNS
                scale_N = (expert * down + row_N // COLUMNS) * along
            else:
                scale_N = expert * HIDDEN + row_N
            input_ptr = activated_ptr + slot * INTERMEDIATE
            matrix_ptr = codes_ptr + expert * HIDDEN * INTERMEDIATE
            value_N = row_products(
                input_ptr, matrix_ptr, scales_ptr, row_N, is_row_N, scale_N, INTERMEDIATE, SCALES, COLUMNS
            )
            total_N += value_N * tl.load(weights_ptr + slot)
    place_N = token * HIDDEN + row_N
    if HAS_RESIDUAL:
        total_N += tl.load(residual_ptr + place_N, mask=is_row_N, other=0.0).to(tl.float32)
    tl.store(out_ptr + place_N, stored(total_N, out_ptr.dtype.element_ty), mask=is_row_N)


def up_gemv_launch(
    hidden_TH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    out: torch.Tensor | None = None,
    tile_of: GemvTile | None = None,
) -> Launch:
    """Return the launch of `up_gemv`; `tile_of` replaces the tile of the scheme."""
    scales, constants, found = _constants(weights, weights.up, tile_of, is_up=True)
    num_tokens, num_slots = topk_ids_TK.shape
    shape = (num_tokens * num_slots, weights.intermediate_size)
    out = hidden_TH.new_empty(shape) if out is None else out
    arguments = (hidden_TH, topk_ids_TK, weights.up.codes, scales, out)
    programs = shape[0] * triton.cdiv(2 * weights.intermediate_size, found.rows)
    return Launch(up_rows, programs, arguments, constants | {"SLOTS": num_slots}, (out,), found.num_warps)


def up_gemv(
    hidden_TH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up of every slot (S, I), in fp32 rounded once to the dtype of hidden_TH.

    Args:
        hidden_TH: bf16, fp16 or fp32, contiguous.
        topk_ids_TK: int32, contiguous; -1 = filtered, its row is zero.
        weights: any scheme but NVFP4.
        out: where the result goes.
    Raises:
        UsageError: NVFP4.
    """
    return up_gemv_launch(hidden_TH, topk_ids_TK, weights, out=out).run()[0]


def down_gemv_launch(
    activated_SI: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile_of: GemvTile | None = None,
) -> Launch:
    """Return the launch of `down_gemv`; `tile_of` replaces the tile of the scheme."""
    scales, constants, found = _constants(weights, weights.down, tile_of, is_up=False)
    num_tokens, num_slots = topk_ids_TK.shape
    out = activated_SI.new_empty(num_tokens, weights.hidden_size) if out is None else out
    constants |= {"SLOTS": num_slots, "HAS_RESIDUAL": residual_TH is not None}
    residual = out if residual_TH is None else residual_TH
    arguments = (activated_SI, topk_ids_TK, topk_weights_TK, weights.down.codes, scales, residual, out)
    programs = num_tokens * triton.cdiv(weights.hidden_size, found.rows)
    return Launch(down_rows, programs, arguments, constants, (out,), found.num_warps)


def down_gemv(
    activated_SI: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sums of slots' results (T, H): in the order of slots, in fp32, rounded once.

    Args:
        activated_SI: from `up_gemv`, contiguous.
        topk_ids_TK: int32, contiguous; -1 = filtered, adds nothing.
        topk_weights_TK: fp32, contiguous.
        weights: any scheme but NVFP4.
        residual_TH: added last, before the rounding.
        out: where the result goes.
    Raises:
        UsageError: NVFP4.
    """
    launch = down_gemv_launch(activated_SI, topk_ids_TK, topk_weights_TK, weights, residual_TH=residual_TH, out=out)
    return launch.run()[0]


def _constants(
    weights: ExpertWeights, packed: Packed, tile_of: GemvTile | None, *, is_up: bool
) -> tuple[torch.Tensor, dict[str, Any], GemvTile]:
    """Return the scales, or what stands in for them, the constants that both kernels share, and the tile."""
    if weights.scheme is ExpertScheme.NVFP4:
        raise UsageError(
            "experts in nvfp4",
            expected="a scheme that products of single rows are made for",
            found="4-bit codes",
            next_step="Use the grouped kernels: they take any number of rows.",
        )
    found = tile_of or tile(weights.scheme, is_up=is_up)
    constants = {
        "HIDDEN": weights.hidden_size,
        "INTERMEDIATE": weights.intermediate_size,
        "SCALES": _SCALES.get(weights.scheme, PLAIN.value),
        "ROWS": found.rows,
        "COLUMNS": found.columns,
    }
    return packed.codes if packed.scales is None else packed.scales, constants, found
