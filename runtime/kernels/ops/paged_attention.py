"""Causal attention over keys and values in pages, for any mixture of prefill and decode.

The query heads that share a kv head lie side by side as rows of one product: with 12 of them, a token fills 12 of 16
rows, 5 tokens 60 of 64. A program has the rows of some tokens of one sequence and one kv head. While decoding, a long
sequence may be split into runs of a fixed number of tokens, whose results are added up in order: what comes out does
not depend on the batch.

Shapes: T new tokens, H query heads, G kv heads, P head dim, R rows, N keys of a tile, B sequences, C runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.decode import operand, product, stored
from runtime.kernels.ops.inputs import KvPages, PagedBatch
from runtime.moe.workspace import Workspace

# the fewest of the matrix units' wide instructions
_INVARIANT_ROWS = 64
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """New tokens, rows and keys of a program, and its warps; tokens * H / G rows are used."""

    tokens: int
    rows: int
    keys: int
    num_warps: int


def tile(max_tokens_q: int, heads_per_group: int, *, is_invariant: bool = False) -> AttentionTile:
    """Return the tile for sequences with so many new tokens; an invariant one is the same for all."""
    wanted = _INVARIANT_ROWS if is_invariant else max(16, min(max_tokens_q * heads_per_group, 128))
    rows = triton.next_power_of_2(max(wanted, heads_per_group))
    return AttentionTile(rows // heads_per_group, rows, 64, 8 if rows > 64 else 4)


@triton.jit
def _find(
    starts_ptr: tl.tensor, number: tl.tensor, num_sequences: tl.tensor, TOKENS: tl.constexpr, PAD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the sequence that has a tile, and the first of its tokens there; PAD or more: there is no such tile."""
    sequence_B = tl.arange(0, PAD)
    is_one_B = sequence_B < num_sequences
    start_B = tl.load(starts_ptr + sequence_B, mask=is_one_B, other=0)
    end_B = tl.load(starts_ptr + sequence_B + 1, mask=is_one_B, other=0)
    tiles_B = (end_B - start_B + TOKENS - 1) // TOKENS
    tiles_end_B = tl.cumsum(tiles_B, 0)
    sequence = tl.sum((tiles_end_B <= number).to(tl.int32), axis=0)
    before = tl.sum(tl.where(sequence_B < sequence, tiles_B, 0), axis=0)
    return sequence, (number - before) * TOKENS


@triton.jit(do_not_specialize=["num_sequences", "num_tiles", "num_tokens", "scale"])
def attend_pages(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    num_sequences: tl.tensor,
    num_tiles: tl.tensor,
    num_tokens: tl.tensor,
    table_width: tl.tensor,
    scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEQUENCES_PAD: tl.constexpr,
    RUN: tl.constexpr,
    HAS_SCALES: tl.constexpr,
) -> None:
    """Write the mixed values of some rows; of a run of RUN keys, their sums, peaks and totals in fp32 instead."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    program = tl.program_id(0)
    group, number, run = program % KV_HEADS, program // KV_HEADS % num_tiles, program // KV_HEADS // num_tiles
    sequence, first_token = _find(starts_ptr, number, num_sequences, TOKENS, SEQUENCES_PAD)
    if sequence >= num_sequences:
        return
    # no loop runs past the table, whatever a length says
    start, length = tl.load(starts_ptr + sequence), tl.minimum(tl.load(lengths_ptr + sequence), table_width * PAGE)
    num_new = tl.load(starts_ptr + sequence + 1) - start
    row_R = tl.arange(0, ROWS)
    token_R = first_token + row_R // PER_GROUP
    is_row_R = (row_R < TOKENS * PER_GROUP) & (token_R < num_new)
    position_R = length - num_new + token_R
    dim_P = tl.arange(0, DIM_PAD)
    is_dim_P = dim_P < DIM
    head_R = ((start + token_R).to(tl.int64) * KV_HEADS + group) * PER_GROUP + row_R % PER_GROUP
    is_value_RP = is_row_R[:, None] & is_dim_P[None, :]
    query_RP = tl.load(query_ptr + head_R[:, None] * DIM + dim_P[None, :], mask=is_value_RP, other=0.0)
    query_RP = operand(query_RP, dtype)
    factor = scale
    if HAS_SCALES:
        factor = factor * tl.load(scales_ptr)
    # no row of this tile sees a later key
    end = tl.minimum(length, length - num_new + first_token + TOKENS)
    begin = 0
    if RUN > 0:
        begin = run * RUN
        end = tl.minimum(end, begin + RUN)
    peak_R = tl.full((ROWS,), float("-inf"), tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    mixed_RP = tl.zeros((ROWS, DIM_PAD), tl.float32)
    for first in range(begin, end, KEYS):
        key_N = first + tl.arange(0, KEYS)
        is_key_N = key_N < end
        page_N = tl.load(table_ptr + sequence * table_width + key_N // PAGE, mask=is_key_N, other=0).to(tl.int64)
        place_N = ((page_N * PAGE + key_N % PAGE) * KV_HEADS + group) * DIM
        is_key_PN = is_dim_P[:, None] & is_key_N[None, :]
        key_PN = tl.load(keys_ptr + place_N[None, :] + dim_P[:, None], mask=is_key_PN, other=0.0)
        score_RN = product(query_RP, operand(key_PN, dtype), tl.zeros((ROWS, KEYS), tl.float32)) * factor
        is_seen_RN = is_key_N[None, :] & (key_N[None, :] <= position_R[:, None])
        score_RN = tl.where(is_seen_RN, score_RN, float("-inf"))
        higher_R = tl.maximum(peak_R, tl.max(score_RN, axis=1))
        # a row that has seen no key yet has no peak
        base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        share_RN = tl.exp2(score_RN - base_R[:, None])
        fading_R = tl.exp2(peak_R - base_R)
        total_R = total_R * fading_R + tl.sum(share_RN, axis=1)
        is_value_NP = is_key_N[:, None] & is_dim_P[None, :]
        value_NP = tl.load(values_ptr + place_N[:, None] + dim_P[None, :], mask=is_value_NP, other=0.0)
        share_RN = operand(stored(share_RN, dtype), dtype)
        mixed_RP = product(share_RN, operand(value_NP, dtype), mixed_RP * fading_R[:, None])
        peak_R = higher_R
    if HAS_SCALES:
        mixed_RP = mixed_RP * tl.load(scales_ptr + 1)
    if RUN > 0:
        head_R += run.to(tl.int64) * num_tokens * KV_HEADS * PER_GROUP
        tl.store(peak_ptr + head_R, peak_R, mask=is_row_R)
        tl.store(total_ptr + head_R, total_R, mask=is_row_R)
        is_value_RP = is_value_RP & (begin < end)
        tl.store(out_ptr + head_R[:, None] * DIM + dim_P[None, :], mixed_RP, mask=is_value_RP)
    else:
        # rows without a token have no total
        total_R = tl.where(is_row_R, total_R, 1.0)
        mixed_RP = tl.div_rn(mixed_RP, tl.broadcast_to(total_R[:, None], (ROWS, DIM_PAD)))
        tl.store(out_ptr + head_R[:, None] * DIM + dim_P[None, :], stored(mixed_RP, dtype), mask=is_value_RP)


@triton.jit(do_not_specialize=["num_rows", "num_runs"])
def add_runs(
    mixed_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    total_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_runs: tl.tensor,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write the mixed values of ROWS rows from those of the runs, in their order; a run without a key adds nothing."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < num_rows
    dim_P = tl.arange(0, DIM_PAD)
    peak_R = tl.full((ROWS,), float("-inf"), tl.float32)
    for run in range(num_runs):
        part_R = tl.load(peak_ptr + run * num_rows + row_R, mask=is_row_R, other=0.0)
        peak_R = tl.maximum(peak_R, part_R)
    total_R = tl.zeros((ROWS,), tl.float32)
    mixed_RP = tl.zeros((ROWS, DIM_PAD), tl.float32)
    for run in range(num_runs):
        place_R = run * num_rows + row_R
        part_R = tl.load(peak_ptr + place_R, mask=is_row_R, other=float("-inf"))
        is_used_R = part_R > float("-inf")
        factor_R = tl.where(is_used_R, tl.exp2(part_R - peak_R), 0.0)
        total_R += factor_R * tl.load(total_ptr + place_R, mask=is_used_R, other=0.0)
        is_value_RP = is_used_R[:, None] & (dim_P < DIM)[None, :]
        value_RP = tl.load(mixed_ptr + place_R[:, None] * DIM + dim_P[None, :], mask=is_value_RP, other=0.0)
        mixed_RP += factor_R[:, None] * value_RP
    total_R = tl.where(is_row_R, total_R, 1.0)
    mixed_RP = tl.div_rn(mixed_RP, tl.broadcast_to(total_R[:, None], (ROWS, DIM_PAD)))
    is_value_RP = is_row_R[:, None] & (dim_P < DIM)[None, :]
    tl.store(
        out_ptr + row_R[:, None] * DIM + dim_P[None, :], stored(mixed_RP, out_ptr.dtype.element_ty), mask=is_value_RP
    )


def paged_attention_launches(
    query_THP: torch.Tensor,
    pages: KvPages,
    batch: PagedBatch,
    *,
    run_tokens: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    tile_of: AttentionTile | None = None,
) -> list[Launch]:
    """Return the launches of `paged_attention`; `tile_of` replaces the tile that fits the batch."""
    num_tokens, num_heads, head_dim = query_THP.shape
    page, num_kv_heads = pages.keys_NSGP.shape[1:3]
    found = tile_of or tile(batch.max_tokens_q, num_heads // num_kv_heads)
    assert run_tokens % found.keys == 0, (run_tokens, found)
    num_sequences, table_width = batch.block_table_BM.shape
    # each sequence has a token, so that fewer than one tile of it is not full
    num_tiles = (num_tokens + num_sequences * (found.tokens - 1)) // found.tokens
    num_runs = triton.cdiv(table_width * page, run_tokens) if run_tokens else 1
    out = torch.empty_like(query_THP) if out is None else out
    parts = (out, out, out)
    if run_tokens:
        buffers, shape = workspace or Workspace(query_THP.device), (num_runs, num_tokens, num_heads)
        # a run behind the end of a sequence leaves -inf as its peak
        peaks, totals = (buffers.take(name, shape, torch.float32) for name in ("run_peaks", "run_totals"))
        parts = (buffers.take("run_sums", (*shape, head_dim), torch.float32), peaks, totals)
    constants: dict[str, Any] = {
        "KV_HEADS": num_kv_heads,
        "PER_GROUP": num_heads // num_kv_heads,
        "DIM": head_dim,
        "DIM_PAD": max(16, triton.next_power_of_2(head_dim)),
        "PAGE": page,
        "TOKENS": found.tokens,
        "ROWS": found.rows,
        "KEYS": found.keys,
        "SEQUENCES_PAD": triton.next_power_of_2(num_sequences + 1),
        "RUN": run_tokens,
        "HAS_SCALES": pages.scales is not None,
    }
    scales = batch.seq_lens_B if pages.scales is None else pages.scales
    where = (scales, batch.cu_seqlens_q, batch.seq_lens_B, batch.block_table_BM)
    numbers = (num_sequences, num_tiles, num_tokens, table_width, _LOG2_E * head_dim**-0.5)
    arguments = (query_THP, pages.keys_NSGP, pages.values_NSGP, *where, *parts, *numbers)
    programs = num_tiles * num_kv_heads * num_runs
    launches = [Launch(attend_pages, programs, arguments, constants, (out,), found.num_warps)]
    if run_tokens:
        rows = 4
        constants = {"DIM": head_dim, "DIM_PAD": constants["DIM_PAD"], "ROWS": rows}
        num_rows = num_tokens * num_heads
        given = (*parts, out, num_rows, num_runs)
        launches.append(Launch(add_runs, triton.cdiv(num_rows, rows), given, constants, (out,)))
    return launches


def paged_attention(
    query_THP: torch.Tensor,
    pages: KvPages,
    batch: PagedBatch,
    *,
    run_tokens: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(P)) v (T, H, P) in the query's dtype; scores, softmax and sums in fp32.

    Shares are rounded to the query's dtype before they multiply values, as matrix units need it.

    Args:
        query_THP: bf16, fp16 or fp32, contiguous: the new tokens of all sequences, one after the other.
        pages: where the keys and values of all tokens are, the new ones included.
        batch: a token sees those before it and itself.
        run_tokens: split sequences into runs of so many tokens, a multiple of 64; 0 = do not.
        out: contiguous, where the result goes.
        workspace: takes the sums of runs.
    """
    launches = paged_attention_launches(query_THP, pages, batch, run_tokens=run_tokens, out=out, workspace=workspace)
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]


def invariant_paged_attention(
    query_THP: torch.Tensor,
    pages: KvPages,
    batch: PagedBatch,
    *,
    run_tokens: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return what `paged_attention` does; a row has the same bits whatever tokens and sequences come with it.

    There is one tile for any number of new tokens, and no sequence is split, whatever `run_tokens` says: runs are for
    single tokens, and would add their sums up in another order than a prompt's. So there are no sums of runs for the
    workspace. That costs time where few sequences are long.
    """
    per_group = query_THP.shape[1] // pages.keys_NSGP.shape[2]
    found = tile(batch.max_tokens_q, per_group, is_invariant=True)
    (launch,) = paged_attention_launches(query_THP, pages, batch, out=out, tile_of=found)
    return launch.run()[0]
