"""Which slot a row of a grouped product is, in three layouts; all are made without the host knowing any count.

A slot is one of a token's experts: slot t * K + k is choice k of token t. A shared expert takes the last choice of each
token. An id of -1 is a slot that another rank computes: it has no row.

Shapes: T tokens, K choices per token, S = T * K slots, E experts, P rows with padding, C rows of capacity.
"""

from dataclasses import dataclass

import torch

FILTERED = -1


@dataclass(frozen=True, slots=True)
class ContiguousRows:
    """Rows expert by expert, each expert's padded to whole blocks; within an expert in the order of slots.

    Args:
        slots_P: int32, the slot of each row; -1 is padding.
        expert_of_block: int32 (P / block_m); -1 is a block that is not used, and such blocks come last.
        num_blocks: int32 (1,) on the device: blocks that are used.
        block_m: rows of a block.
        position_of_slot: int32 (S,), the row of each slot; -1 where it is filtered.
    """

    slots_P: torch.Tensor
    expert_of_block: torch.Tensor
    num_blocks: torch.Tensor
    block_m: int
    position_of_slot: torch.Tensor


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """The same number of rows for every expert, of which the first are used.

    Args:
        slots: int32 (E, C), the slot of each row; -1 is not used.
        counts: int32 (E,) rows in use.
        position_of_slot: int32 (S,), row e * C + c of each slot; -1 where it is filtered.
    """

    slots: torch.Tensor
    counts: torch.Tensor
    position_of_slot: torch.Tensor


# layouts with padding, which kernels take
Rows = ContiguousRows | MaskedRows


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Rows expert by expert in ascending order, without padding; those of filtered slots come last.

    Args:
        slots_S: int32, the slot of each row.
        ends_E: int32, where each expert's rows end.
        position_of_slot: int32 (S,), the row of each slot; -1 where it is filtered.
    """

    slots_S: torch.Tensor
    ends_E: torch.Tensor
    position_of_slot: torch.Tensor


@dataclass(frozen=True, slots=True)
class SortedSlots:
    """Slots expert by expert, stably, filtered ones last; no padding.

    Args:
        slots_S: int64, ascending by place of the expert, then by slot.
        places_S: int64, for each of slots_S the place of its expert, E where it is filtered.
        ranks_S: int64, for each of slots_S how many of the same expert come before it.
        counts_E: int64 rows by place.
    """

    slots_S: torch.Tensor
    places_S: torch.Tensor
    ranks_S: torch.Tensor
    counts_E: torch.Tensor


def capacity(num_slots: int, num_experts: int, block_m: int) -> int:
    """Return P, a multiple of block_m: the rows that any choice of experts fits into.

    Each expert that has rows wastes fewer than block_m, and no more experts than slots have any.
    """
    return (num_slots + min(num_slots, num_experts) * (block_m - 1)) // block_m * block_m


def contiguous_rows(
    topk_ids_TK: torch.Tensor, num_experts: int, block_m: int, *, num_shared: int = 0
) -> ContiguousRows:
    """Lay slots out in blocks; the shared expert, which is the last and has the most rows, comes first.

    Args:
        topk_ids_TK: any integer dtype, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
        block_m: rows of a block.
        num_shared: experts at the end that come first.
    """
    found = sort_slots(topk_ids_TK, num_experts, num_shared=num_shared)
    num_slots, device = topk_ids_TK.numel(), topk_ids_TK.device
    num_rows = capacity(num_slots, num_experts, block_m)
    ends_E = ((found.counts_E + block_m - 1) // block_m).cumsum(0)
    # the place behind the last expert's is that of filtered slots
    starts = torch.cat((ends_E.new_zeros(1), ends_E)) * block_m
    positions_S = torch.where(found.places_S < num_experts, starts[found.places_S] + found.ranks_S, num_rows)
    block = torch.arange(num_rows // block_m, device=device)
    place = torch.searchsorted(ends_E, block, right=True)
    expert = (place - num_shared) % num_experts
    return ContiguousRows(
        slots_P=_inverse(positions_S, found.slots_S, num_rows),
        expert_of_block=torch.where(place < num_experts, expert, FILTERED).to(torch.int32),
        num_blocks=ends_E[-1:].to(torch.int32),
        block_m=block_m,
        position_of_slot=_positions(found, positions_S),
    )


def masked_rows(topk_ids_TK: torch.Tensor, num_experts: int, max_rows: int) -> MaskedRows:
    """Lay slots out with room for `max_rows` rows of each expert.

    Args:
        topk_ids_TK: any integer dtype, those of a token different, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
        max_rows: C, at least the number of tokens, so that no row is ever dropped.
    """
    assert max_rows >= len(topk_ids_TK), (max_rows, topk_ids_TK.shape)
    found = sort_slots(topk_ids_TK, num_experts)
    num_rows = num_experts * max_rows
    positions_S = torch.where(found.places_S < num_experts, found.places_S * max_rows + found.ranks_S, num_rows)
    return MaskedRows(
        slots=_inverse(positions_S, found.slots_S, num_rows).view(num_experts, max_rows),
        counts=found.counts_E.to(torch.int32),
        position_of_slot=_positions(found, positions_S),
    )


def ragged_rows(topk_ids_TK: torch.Tensor, num_experts: int) -> RaggedRows:
    """Lay slots out without padding.

    Args:
        topk_ids_TK: any integer dtype, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
    """
    found = sort_slots(topk_ids_TK, num_experts)
    positions_S = torch.arange(topk_ids_TK.numel(), device=topk_ids_TK.device)
    return RaggedRows(
        slots_S=found.slots_S.to(torch.int32),
        ends_E=found.counts_E.cumsum(0).to(torch.int32),
        position_of_slot=_positions(found, positions_S),
    )


def sort_slots(topk_ids_TK: torch.Tensor, num_experts: int, *, num_shared: int = 0) -> SortedSlots:
    """Sort slots by expert, the last `num_shared` experts first; see `SortedSlots`."""
    ids_S = topk_ids_TK.flatten().to(torch.int64)
    # the place of expert e is e, behind the shared ones
    places_S = torch.where(ids_S < 0, num_experts, (ids_S + num_shared) % num_experts)
    sorted_S, slots_S = places_S.sort(stable=True)
    # bincount would ask the host how many bins there are
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_S.device)
    counts.scatter_add_(0, places_S, torch.ones_like(places_S))
    first = counts.cumsum(0) - counts
    ranks_S = torch.arange(len(ids_S), device=ids_S.device) - first[sorted_S]
    return SortedSlots(slots_S, sorted_S, ranks_S, counts[:num_experts])


def _inverse(positions_S: torch.Tensor, slots_S: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the slot of each row, int32; position num_rows takes what is filtered."""
    slots_P = torch.full((num_rows + 1,), FILTERED, dtype=torch.int32, device=slots_S.device)
    return slots_P.scatter_(0, positions_S, slots_S.to(torch.int32))[:num_rows]


def _positions(found: SortedSlots, positions_S: torch.Tensor) -> torch.Tensor:
    """Return the row of each slot, int32."""
    kept_S = torch.where(found.places_S < len(found.counts_E), positions_S, FILTERED).to(torch.int32)
    return torch.empty_like(kept_S).scatter_(0, found.slots_S, kept_S)
