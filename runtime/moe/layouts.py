"""Which slot a row of a grouped product is, in three layouts; all are made without the host knowing any count.

With a workspace all of it lies there, until the next layout is made; torch's sort allocates what it needs inside.

A slot is one of a token's experts: slot t * K + k is choice k of token t. A shared expert takes the last choice of each
token. An id of -1 is a slot that another rank computes: it has no row.

Shapes: T tokens, K choices per token, S = T * K slots, E experts, P rows with padding, C rows of capacity.
"""

from dataclasses import dataclass

import torch

from runtime.moe.workspace import Workspace

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
        is_filtered_S: bool, the same for each of slots_S.
        ranks_S: int64, for each of slots_S how many of the same expert come before it.
        counts_E: int64 rows by place.
    """

    slots_S: torch.Tensor
    places_S: torch.Tensor
    is_filtered_S: torch.Tensor
    ranks_S: torch.Tensor
    counts_E: torch.Tensor


def capacity(num_slots: int, num_experts: int, block_m: int) -> int:
    """Return P, a multiple of block_m: the rows that any choice of experts fits into.

    Each expert that has rows wastes fewer than block_m, and no more experts than slots have any.
    """
    return (num_slots + min(num_slots, num_experts) * (block_m - 1)) // block_m * block_m


def contiguous_rows(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    num_shared: int = 0,
    workspace: Workspace | None = None,
) -> ContiguousRows:
    """Lay slots out in blocks; the shared expert, which is the last and has the most rows, comes first.

    Args:
        topk_ids_TK: any integer dtype, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
        block_m: rows of a block.
        num_shared: experts at the end that come first.
        workspace: holds the result; None: new tensors.
    """
    room = _Room(workspace or Workspace(topk_ids_TK.device))
    found = sort_slots(topk_ids_TK, num_experts, num_shared=num_shared, workspace=room.workspace)
    num_rows = capacity(topk_ids_TK.numel(), num_experts, block_m)
    # the place behind the last expert's is that of filtered slots
    ends = room.int64("block_ends", num_experts + 1).zero_()
    used_E = torch.add(found.counts_E, block_m - 1, out=room.int64("expert_blocks", num_experts))
    torch.cumsum(used_E.floor_divide_(block_m), 0, out=ends[1:])
    starts = torch.mul(ends, block_m, out=room.int64("block_starts", num_experts + 1))
    positions_S = torch.index_select(starts, 0, found.places_S, out=room.int64("row_of_sorted", len(found.places_S)))
    positions_S.add_(found.ranks_S).masked_fill_(found.is_filtered_S, num_rows)
    return ContiguousRows(
        slots_P=_inverse(positions_S, found.slots_S, num_rows, room),
        expert_of_block=_experts_of_blocks(ends[1:], num_rows // block_m, num_shared, room),
        num_blocks=room.int32("num_blocks", 1).copy_(ends[-1:]),
        block_m=block_m,
        position_of_slot=_positions(found, positions_S, room),
    )


def masked_rows(
    topk_ids_TK: torch.Tensor, num_experts: int, max_rows: int, *, workspace: Workspace | None = None
) -> MaskedRows:
    """Lay slots out with room for `max_rows` rows of each expert.

    Args:
        topk_ids_TK: any integer dtype, those of a token different, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
        max_rows: C, at least the number of tokens, so that no row is ever dropped.
        workspace: as in `contiguous_rows`.
    """
    assert max_rows >= len(topk_ids_TK), (max_rows, topk_ids_TK.shape)
    room = _Room(workspace or Workspace(topk_ids_TK.device))
    found = sort_slots(topk_ids_TK, num_experts, workspace=room.workspace)
    num_rows = num_experts * max_rows
    positions_S = torch.mul(found.places_S, max_rows, out=room.int64("row_of_sorted", len(found.places_S)))
    positions_S.add_(found.ranks_S).masked_fill_(found.is_filtered_S, num_rows)
    return MaskedRows(
        slots=_inverse(positions_S, found.slots_S, num_rows, room).view(num_experts, max_rows),
        counts=room.int32("counts", num_experts).copy_(found.counts_E),
        position_of_slot=_positions(found, positions_S, room),
    )


def ragged_rows(topk_ids_TK: torch.Tensor, num_experts: int, *, workspace: Workspace | None = None) -> RaggedRows:
    """Lay slots out without padding.

    Args:
        topk_ids_TK: any integer dtype, below num_experts; negative = filtered.
        num_experts: E, the shared one included.
        workspace: as in `contiguous_rows`.
    """
    room = _Room(workspace or Workspace(topk_ids_TK.device))
    found = sort_slots(topk_ids_TK, num_experts, workspace=room.workspace)
    num_slots = topk_ids_TK.numel()
    positions_S = torch.arange(num_slots, out=room.int64("row_of_sorted", num_slots))
    ends_E = torch.cumsum(found.counts_E, 0, out=room.int64("expert_ends", num_experts))
    return RaggedRows(
        slots_S=room.int32("row_slots", num_slots).copy_(found.slots_S),
        ends_E=room.int32("ends", num_experts).copy_(ends_E),
        position_of_slot=_positions(found, positions_S, room),
    )


def sort_slots(
    topk_ids_TK: torch.Tensor, num_experts: int, *, num_shared: int = 0, workspace: Workspace | None = None
) -> SortedSlots:
    """Sort slots by expert, the last `num_shared` experts first; see `SortedSlots`."""
    room, num_slots = _Room(workspace or Workspace(topk_ids_TK.device)), topk_ids_TK.numel()
    places_S = room.int64("slot_places", num_slots)
    places_S.view(topk_ids_TK.shape).copy_(topk_ids_TK)
    is_filtered_S = room.workspace.take("slot_filtered", (num_slots,), torch.bool)
    torch.lt(places_S, 0, out=is_filtered_S)
    # the place of expert e is e, behind the shared ones
    places_S.add_(num_shared).remainder_(num_experts).masked_fill_(is_filtered_S, num_experts)
    # bincount would ask the host how many bins there are
    counts = room.int64("slot_counts", num_experts + 1).zero_()
    counts.scatter_add_(0, places_S, room.int64("ones", num_slots).fill_(1))
    first = torch.cumsum(counts, 0, out=room.int64("first_ranks", num_experts + 1)).sub_(counts)
    sorted_S, slots_S = room.int64("sorted_places", num_slots), room.int64("sorted_slots", num_slots)
    torch.sort(places_S, stable=True, out=(sorted_S, slots_S))
    before_S = torch.index_select(first, 0, sorted_S, out=room.int64("slots_before", num_slots))
    ranks_S = torch.arange(num_slots, out=room.int64("slot_ranks", num_slots)).sub_(before_S)
    torch.eq(sorted_S, num_experts, out=is_filtered_S)
    return SortedSlots(slots_S, sorted_S, is_filtered_S, ranks_S, counts[:num_experts])


@dataclass(frozen=True, slots=True)
class _Room:
    """Vectors in a workspace."""

    workspace: Workspace

    def int64(self, name: str, size: int) -> torch.Tensor:
        return self.workspace.take(name, (size,), torch.int64)

    def int32(self, name: str, size: int) -> torch.Tensor:
        return self.workspace.take(name, (size,), torch.int32)


def _experts_of_blocks(ends_E: torch.Tensor, num_blocks: int, num_shared: int, room: _Room) -> torch.Tensor:
    """Return the expert of each block, int32, from where places' blocks end."""
    num_experts, blocks = len(ends_E), torch.arange(num_blocks, out=room.int64("block_numbers", num_blocks))
    place = torch.searchsorted(ends_E, blocks, right=True, out=room.int64("block_places", num_blocks))
    is_unused = room.workspace.take("block_unused", (num_blocks,), torch.bool)
    torch.ge(place, num_experts, out=is_unused)
    place.sub_(num_shared).remainder_(num_experts).masked_fill_(is_unused, FILTERED)
    return room.int32("blocks", num_blocks).copy_(place)


def _inverse(positions_S: torch.Tensor, slots_S: torch.Tensor, num_rows: int, room: _Room) -> torch.Tensor:
    """Return the slot of each row, int32; position num_rows takes what is filtered."""
    slots_P = room.int32("row_slots", num_rows + 1).fill_(FILTERED)
    numbers_S = room.int32("sorted_numbers", len(slots_S)).copy_(slots_S)
    return slots_P.scatter_(0, positions_S, numbers_S)[:num_rows]


def _positions(found: SortedSlots, positions_S: torch.Tensor, room: _Room) -> torch.Tensor:
    """Return the row of each slot, int32."""
    kept_S = room.int32("sorted_numbers", len(positions_S)).copy_(positions_S)
    kept_S.masked_fill_(found.is_filtered_S, FILTERED)
    return room.int32("positions", len(positions_S)).scatter_(0, found.slots_S, kept_S)
