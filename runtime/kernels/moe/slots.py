"""What the kernels of `build_rows` share: how many slots go to each expert, and where one expert's slots go.

Shapes: E places of experts, the shared ones first; C runs, W slots of a tile.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import ALONE, CHUNK, padded_experts

TILE = 1024
# a slot for each thread of a program
LEAST = 128


@triton.jit
def _places(
    ids_ptr: tl.tensor, slot_W: tl.tensor, num_slots: tl.tensor, SHARED: tl.constexpr, EXPERTS: tl.constexpr
) -> tl.tensor:
    """Return the places of slots' experts, -1 where a slot is filtered and -2 where there is none."""
    id_W = tl.load(ids_ptr + slot_W, mask=slot_W < num_slots, other=-2)
    return tl.where(id_W < 0, id_W, (id_W + SHARED) % EXPERTS)


@triton.jit
def counts_of_run(
    ids_ptr: tl.tensor,
    first: tl.tensor,
    num_slots: tl.tensor,
    EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return how many slots of a run go to each place, int32 (PAD,)."""
    count_E = tl.zeros((PAD,), tl.int32)
    for start in range(0, CHUNK, TILE):
        place_W = _places(ids_ptr, first + start + tl.arange(0, TILE), num_slots, SHARED, EXPERTS)
        count_E += tl.histogram(tl.maximum(place_W, 0), PAD, mask=place_W >= 0).to(tl.int32)
    return count_E


@triton.jit(do_not_specialize=["num_slots"])
def count_runs(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write how many slots of each run go to each place."""
    run = tl.program_id(0)
    count_E = counts_of_run(ids_ptr, run * CHUNK, num_slots, EXPERTS, PAD, SHARED, CHUNK, TILE)
    tl.store(counts_ptr + run * PAD + tl.arange(0, PAD), count_E)


@triton.jit
def totals(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    run: tl.tensor,
    num_slots: tl.tensor,
    num_runs: tl.tensor,
    EXPERTS: tl.constexpr,
    PAD: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return how many slots go to each place, and how many of them in runs before this one, int32 (PAD,)."""
    if RUNS == 1:
        total_E = counts_of_run(ids_ptr, 0, num_slots, EXPERTS, PAD, SHARED, CHUNK, TILE)
        before_E = tl.zeros((PAD,), tl.int32)
    else:
        place_E = tl.arange(0, PAD)
        total_E = tl.zeros((PAD,), tl.int32)
        before_E = tl.zeros((PAD,), tl.int32)
        for start in range(0, RUNS, 4):
            run_C = start + tl.arange(0, 4)
            is_run_C1 = (run_C < num_runs)[:, None]
            count_CE = tl.load(counts_ptr + run_C[:, None] * PAD + place_E[None, :], mask=is_run_C1, other=0)
            total_E += tl.sum(count_CE, axis=0)
            before_E += tl.sum(tl.where((run_C < run)[:, None], count_CE, 0), axis=0)
    return total_E, before_E


@triton.jit
def scatter(
    ids_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    position_ptr: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    num_slots: tl.tensor,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write the slots of a run that go to a place to the rows from `row` on, and where they went."""
    for start in range(0, CHUNK, TILE):
        slot_W = first + start + tl.arange(0, TILE)
        place_W = _places(ids_ptr, slot_W, num_slots, SHARED, EXPERTS)
        is_here_W = place_W == place
        here_W = is_here_W.to(tl.int32)
        row_W = row + tl.cumsum(here_W, 0) - here_W
        tl.store(slots_ptr + row_W, slot_W, mask=is_here_W)
        tl.store(position_ptr + slot_W, row_W, mask=is_here_W)
        tl.store(position_ptr + slot_W, tl.full((TILE,), -1, tl.int32), mask=(place_W == -1) & (place == 0))
        row += tl.sum(here_W, axis=0)


def new_int32(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return what makes room for int32."""
    return lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)


def count(
    topk_ids_TK: torch.Tensor, num_experts: int, num_shared: int, scratch: torch.Tensor | None
) -> tuple[list[Launch], torch.Tensor, dict[str, Any]]:
    """Return the launch that counts the slots of each run, if there are several, where they go, and the constants."""
    assert topk_ids_TK.dtype is torch.int32, topk_ids_TK.dtype
    assert topk_ids_TK.is_contiguous(), topk_ids_TK.stride()
    num_slots = topk_ids_TK.numel()
    chunk = CHUNK if num_slots > ALONE else max(LEAST, triton.next_power_of_2(num_slots))
    num_runs = triton.cdiv(num_slots, chunk)
    constants = {
        "EXPERTS": num_experts,
        "PAD": padded_experts(num_experts),
        "SHARED": num_shared,
        "CHUNK": chunk,
        "TILE": min(chunk, TILE),
    }
    if num_slots <= ALONE:
        return [], topk_ids_TK, constants | {"RUNS": 1}
    counts = new_int32(topk_ids_TK.device)(num_runs * padded_experts(num_experts)) if scratch is None else scratch
    counting = Launch(count_runs, num_runs, (topk_ids_TK, counts, num_slots), constants, (counts,))
    return [counting], counts, constants | {"RUNS": max(4, triton.next_power_of_2(num_runs))}
