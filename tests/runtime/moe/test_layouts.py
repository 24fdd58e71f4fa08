"""Layouts: each slot has one row, in the block or range of its expert, in the order of slots."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.moe.layouts import FILTERED, capacity, contiguous_rows, masked_rows, ragged_rows


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Return ids (T, K), different within a token unless filtered, the number of experts and of shared ones."""
    num_experts, num_shared = draw(st.integers(1, 9)), draw(st.integers(0, 1))
    top_k, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(1, 12))
    rows = draw(st.lists(st.permutations(range(num_experts)), min_size=num_tokens, max_size=num_tokens))
    ids = torch.tensor([row[:top_k] for row in rows])
    keep = draw(st.lists(st.booleans(), min_size=ids.numel(), max_size=ids.numel()))
    return torch.where(torch.tensor(keep).view(ids.shape), ids, FILTERED), num_experts, num_shared


def slots_by_expert(ids: torch.Tensor, num_experts: int) -> list[list[int]]:
    flat = ids.flatten().tolist()
    return [[slot for slot, found in enumerate(flat) if found == expert] for expert in range(num_experts)]


def assert_inverse(positions: torch.Tensor, slots: torch.Tensor, ids: torch.Tensor) -> None:
    """Each slot finds itself at its position; filtered ones have none."""
    assert {positions.dtype, slots.dtype} == {torch.int32}
    for slot, (position, expert) in enumerate(zip(positions.tolist(), ids.flatten().tolist(), strict=True)):
        assert position == -1 if expert == FILTERED else int(slots[position]) == slot
    assert int((slots >= 0).sum()) == int((ids != FILTERED).sum())


@given(routings(), st.sampled_from([1, 2, 16]))
@settings(max_examples=60, deadline=None)
def test_contiguous_rows_are_blocks_of_one_expert_in_the_order_of_slots(routing, block_m):
    ids, num_experts, num_shared = routing
    rows = contiguous_rows(ids, num_experts, block_m, num_shared=num_shared)
    found = slots_by_expert(ids, num_experts)
    order = list(range(num_experts))
    order = order[num_experts - num_shared :] + order[: num_experts - num_shared]
    expected_slots, expected_experts = [], []
    for expert in order:
        slots = found[expert]
        num_blocks = -(-len(slots) // block_m)
        expected_experts += [expert] * num_blocks
        expected_slots += slots + [-1] * (num_blocks * block_m - len(slots))
    assert rows.num_blocks.tolist() == [len(expected_experts)]
    num_unused = len(rows.expert_of_block) - len(expected_experts)
    assert rows.expert_of_block.tolist() == expected_experts + [-1] * num_unused
    assert rows.slots_P.tolist() == expected_slots + [-1] * (num_unused * block_m)
    assert rows.block_m == block_m
    assert_inverse(rows.position_of_slot, rows.slots_P, ids)


@given(routings())
@settings(max_examples=40, deadline=None)
def test_masked_rows_begin_with_those_in_use(routing):
    ids, num_experts, _ = routing
    max_rows = len(ids) + 2
    rows = masked_rows(ids, num_experts, max_rows)
    expected = slots_by_expert(ids, num_experts)
    assert rows.counts.tolist() == [len(slots) for slots in expected]
    assert rows.slots.tolist() == [slots + [-1] * (max_rows - len(slots)) for slots in expected]
    assert_inverse(rows.position_of_slot, rows.slots.flatten(), ids)


@given(routings())
@settings(max_examples=40, deadline=None)
def test_ragged_rows_have_no_padding(routing):
    ids, num_experts, _ = routing
    rows = ragged_rows(ids, num_experts)
    expected = slots_by_expert(ids, num_experts)
    kept = [slot for slots in expected for slot in slots]
    assert rows.slots_S[: len(kept)].tolist() == kept
    assert sorted(rows.slots_S.tolist()) == list(range(ids.numel()))
    ends = torch.tensor([len(slots) for slots in expected]).cumsum(0)
    assert rows.ends_E.tolist() == ends.tolist()
    kept_rows = torch.where(torch.arange(ids.numel()) < len(kept), rows.slots_S, -1)
    assert_inverse(rows.position_of_slot, kept_rows, ids)


def test_capacity_is_reached_by_the_worst_routing_and_no_larger():
    """Every expert with one row in its last block: 3 experts, 3 + 2 * 4 slots, blocks of 4."""
    ids = torch.tensor([0] * 5 + [1] * 5 + [2])[:, None]
    rows = contiguous_rows(ids, 3, 4)
    assert rows.num_blocks.tolist() == [5]
    assert len(rows.slots_P) == capacity(11, 3, 4) == 20
    assert capacity(2, 160, 16) == 32
    assert capacity(9, 1, 16) == 16


def test_layout_sizes_depend_on_shapes_alone():
    one, other = torch.zeros(6, 1, dtype=torch.int32), torch.arange(6, dtype=torch.int32)[:, None]
    assert len(contiguous_rows(one, 8, 4).slots_P) == len(contiguous_rows(other, 8, 4).slots_P)
    assert len(contiguous_rows(torch.full((6, 1), FILTERED), 8, 4).slots_P) == capacity(6, 8, 4)
