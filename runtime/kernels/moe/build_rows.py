"""Rows of a grouped product from the experts of each slot: one program for each expert and run of slots.

Every program counts all slots by itself, or sums up the counts of runs, and so knows where its expert's rows begin:
nothing is added up in memory, and the order of rows is that of slots. Few slots take one launch.

Shapes: E places of experts, the shared ones first; B blocks, R rows.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.slots import count, new_int32, scatter, totals
from runtime.moe.layouts import ContiguousRows, MaskedRows, capacity


@triton.jit(do_not_specialize=["num_slots", "num_runs", "num_rows"])
def place_in_blocks(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    experts_ptr: tl.tensor,
    num_blocks_ptr: tl.tensor,
    position_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_runs: tl.tensor,
    num_rows: tl.tensor,
    EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Write one expert's rows of one run, and this program's share of what is not used: ROWS rows, BLOCKS blocks."""
    program = tl.program_id(0)
    place, run = program % EXPERTS, program // EXPERTS
    place_E = tl.arange(0, PAD)
    total_E, before_E = totals(ids_ptr, counts_ptr, run, num_slots, num_runs, EXPERTS, PAD, SHARED, CHUNK, TILE, RUNS)
    blocks_E = (total_E + BLOCK_M - 1) // BLOCK_M
    used = tl.sum(blocks_E, axis=0)
    first_row = tl.sum(tl.where(place_E < place, blocks_E, 0), axis=0) * BLOCK_M
    row = first_row + tl.sum(tl.where(place_E == place, before_E, 0), axis=0)
    scatter(ids_ptr, slots_ptr, position_ptr, run * CHUNK, row, place, num_slots, EXPERTS, SHARED, CHUNK, TILE)
    if run == 0:
        count = tl.sum(tl.where(place_E == place, total_E, 0), axis=0)
        past_M = first_row + count + tl.arange(0, BLOCK_M)
        end = first_row + (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        tl.store(slots_ptr + past_M, tl.full((BLOCK_M,), -1, tl.int32), mask=past_M < end)
    row_R = program * ROWS + tl.arange(0, ROWS)
    is_free_R = (row_R >= used * BLOCK_M) & (row_R < num_rows)
    tl.store(slots_ptr + row_R, tl.full((ROWS,), -1, tl.int32), mask=is_free_R)
    block_B = program * BLOCKS + tl.arange(0, BLOCKS)
    end_E = tl.cumsum(blocks_E, 0)
    is_past_BE = (end_E[None, :] <= block_B[:, None]) & (place_E < EXPERTS)[None, :]
    place_B = tl.sum(is_past_BE.to(tl.int32), axis=1)
    expert_B = tl.where(place_B < EXPERTS, (place_B + EXPERTS - SHARED) % EXPERTS, -1)
    tl.store(experts_ptr + block_B, expert_B, mask=block_B < num_rows // BLOCK_M)
    if program == 0:
        tl.store(num_blocks_ptr, used)


@triton.jit(do_not_specialize=["num_slots", "num_runs", "max_rows"])
def place_in_rows(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    position_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_runs: tl.tensor,
    max_rows: tl.tensor,
    EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write one expert's rows of one run, and that the ROWS rows of its share are free if they are."""
    expert, run = tl.program_id(0) % EXPERTS, tl.program_id(0) // EXPERTS
    place_E = tl.arange(0, PAD)
    total_E, before_E = totals(ids_ptr, counts_ptr, run, num_slots, num_runs, EXPERTS, PAD, SHARED, CHUNK, TILE, RUNS)
    first_row = expert * max_rows
    row = first_row + tl.sum(tl.where(place_E == expert, before_E, 0), axis=0)
    scatter(ids_ptr, slots_ptr, position_ptr, run * CHUNK, row, expert, num_slots, EXPERTS, SHARED, CHUNK, TILE)
    count = tl.sum(tl.where(place_E == expert, total_E, 0), axis=0)
    for start in range(0, ROWS, TILE):
        row_W = run * ROWS + start + tl.arange(0, TILE)
        is_free_W = (row_W >= count) & (row_W < max_rows) & (row_W < (run + 1) * ROWS)
        tl.store(slots_ptr + first_row + row_W, tl.full((TILE,), -1, tl.int32), mask=is_free_W)
    if run == 0:
        tl.store(totals_ptr + expert, count)


def build_rows_launches(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    num_shared: int = 0,
    out: ContiguousRows | None = None,
    scratch: torch.Tensor | None = None,
) -> tuple[list[Launch], ContiguousRows]:
    """Return the launches of `build_rows`, and what they fill."""
    num_slots = topk_ids_TK.numel()
    num_rows = capacity(num_slots, num_experts, block_m)
    if out is None:
        make = new_int32(topk_ids_TK.device)
        out = ContiguousRows(make(num_rows), make(num_rows // block_m), make(1), block_m, make(num_slots))
    counting, counts, constants = count(topk_ids_TK, num_experts, num_shared, scratch)
    num_runs = max(1, triton.cdiv(num_slots, constants["CHUNK"]))
    programs = num_experts * num_runs
    constants |= {
        "BLOCK_M": block_m,
        "ROWS": triton.next_power_of_2(max(1, triton.cdiv(num_rows, programs))),
        "BLOCKS": triton.next_power_of_2(max(1, triton.cdiv(num_rows // block_m, programs))),
    }
    outputs = (out.slots_P, out.expert_of_block, out.num_blocks, out.position_of_slot)
    arguments = (topk_ids_TK, counts, *outputs, num_slots, num_runs, num_rows)
    return [*counting, Launch(place_in_blocks, programs, arguments, constants, outputs)], out


def build_rows(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    num_shared: int = 0,
    out: ContiguousRows | None = None,
    scratch: torch.Tensor | None = None,
) -> ContiguousRows:
    """Lay slots out in blocks; the shared expert, which is the last and has the most rows, comes first.

    Args:
        topk_ids_TK: int32, contiguous, below num_experts; -1 = filtered.
        num_experts: E, the shared one included.
        block_m: rows of a block, a power of two.
        num_shared: experts at the end that come first.
        out: what to fill.
        scratch: int32, `configs.num_counts` values that are free meanwhile.
    """
    launches, out = build_rows_launches(
        topk_ids_TK, num_experts, block_m, num_shared=num_shared, out=out, scratch=scratch
    )
    for launch in launches:
        launch.run()
    return out


def build_masked_rows_launches(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    max_rows: int,
    *,
    out: MaskedRows | None = None,
    scratch: torch.Tensor | None = None,
) -> tuple[list[Launch], MaskedRows]:
    """Return the launches of `build_masked_rows`, and what they fill."""
    assert max_rows >= len(topk_ids_TK), (max_rows, topk_ids_TK.shape)
    if out is None:
        make = new_int32(topk_ids_TK.device)
        out = MaskedRows(make(num_experts, max_rows), make(num_experts), make(topk_ids_TK.numel()))
    counting, counts, constants = count(topk_ids_TK, num_experts, 0, scratch)
    num_runs = max(1, triton.cdiv(topk_ids_TK.numel(), constants["CHUNK"]))
    constants["ROWS"] = triton.next_power_of_2(triton.cdiv(max_rows, num_runs))
    outputs = (out.slots, out.counts, out.position_of_slot)
    arguments = (topk_ids_TK, counts, *outputs, topk_ids_TK.numel(), num_runs, max_rows)
    return [*counting, Launch(place_in_rows, num_experts * num_runs, arguments, constants, outputs)], out


def build_masked_rows(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    max_rows: int,
    *,
    out: MaskedRows | None = None,
    scratch: torch.Tensor | None = None,
) -> MaskedRows:
    """Lay slots out with room for `max_rows` rows of each expert.

    Args:
        topk_ids_TK: int32, contiguous, those of a token different, below num_experts; -1 = filtered.
        num_experts: E, the shared one included.
        max_rows: at least the number of tokens, so that no row is ever dropped.
        out: what to fill.
        scratch: int32, `configs.num_counts` values that are free meanwhile.
    """
    launches, out = build_masked_rows_launches(topk_ids_TK, num_experts, max_rows, out=out, scratch=scratch)
    for launch in launches:
        launch.run()
    return out
