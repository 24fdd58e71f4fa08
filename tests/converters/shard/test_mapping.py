"""Ranks, slots and stages by themselves."""

from itertools import combinations, pairwise, product

import pytest

from converters.errors import InputError, UsageError
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.stages import balance_stages


def test_ranks_are_numbered_as_tensorrt_llm_numbers_them() -> None:
    mapping = ParallelMapping(tp=4, ep=2, pp=2)
    assert mapping.world_size == 8
    assert mapping.moe_tp == 2
    ranks = [(r.index, r.stage, r.tp, r.moe_tp, r.moe_ep) for r in mapping.ranks()]
    assert ranks[:5] == [(0, 0, 0, 0, 0), (1, 0, 1, 0, 1), (2, 0, 2, 1, 0), (3, 0, 3, 1, 1), (4, 1, 0, 0, 0)]


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("experts", [3, 4, 6, 16, 160])
def test_slots_hold_every_expert_and_no_rank_one_twice(placement: Placement, experts: int) -> None:
    for ep, redundant in product((2, 3, 4, 8, 64), range(min(experts, 40) + 1)):
        if (experts + redundant) % ep:
            continue
        mapping = ParallelMapping(tp=ep, ep=ep, redundant_experts=redundant, placement=placement)
        slots = mapping.slots(experts)
        assert {len(own) for own in slots} == {(experts + redundant) // ep}
        assert all(len(set(own)) == len(own) for own in slots), (ep, redundant, slots)
        counts = [sum(expert in own for own in slots) for expert in range(experts)]
        assert min(counts) >= 1
        assert sum(counts) == experts + redundant


def test_slots_are_dealt_as_vllm_deals_them() -> None:
    assert ParallelMapping(tp=2, ep=2).slots(4) == [[0, 1], [2, 3]]
    assert ParallelMapping(tp=2, ep=2, placement=Placement.ROUND_ROBIN).slots(4) == [[0, 2], [1, 3]]
    assert ParallelMapping(tp=2, ep=2, redundant_experts=2).slots(4) == [[0, 1, 2], [3, 0, 1]]


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"--ep 3: expected one of 1, 2, 4: .* found 4 ranks, which do not divide by 3"
    ):
        ParallelMapping(tp=4, ep=3)
    with pytest.raises(UsageError, match="--redundant-experts: expected --ep above 1"):
        ParallelMapping(tp=4, redundant_experts=2)
    with pytest.raises(UsageError, match="expected sizes from 1"):
        ParallelMapping(tp=0)


def test_json_leads_back() -> None:
    mapping = ParallelMapping(tp=4, ep=2, pp=2, redundant_experts=2, placement=Placement.ROUND_ROBIN)
    mapping = mapping.balanced((3, 2))
    assert ParallelMapping.from_json(mapping.as_json()) == mapping
    assert [mapping.stage_of(layer) for layer in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [{"tp": "4"}, {"tp": 1 << 40}, {"ep": 3}, {"expert_placement": "x"}, {"layers_of_stages": None}, {"pp": True}],
)
def test_json_of_something_else_is_refused(change: dict[str, object]) -> None:
    value = {**ParallelMapping(tp=4, ep=2, shared_experts=SharedExperts.REPLICATE).as_json(), **change}
    with pytest.raises(InputError, match="manifest: mapping"):
        ParallelMapping.from_json(value)


def best_by_trying(layers: list[int], first: int, last: int, stages: int) -> int:
    best = None
    for cuts in combinations(range(1, len(layers)), stages - 1):
        bounds = [0, *cuts, len(layers)]
        sizes = [sum(layers[a:b]) for a, b in pairwise(bounds)]
        sizes[0] += first
        sizes[-1] += last
        best = max(sizes) if best is None else min(best, max(sizes))
    assert best is not None
    return best


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [([5, 9, 9, 9, 9, 9, 9], 3, 14), ([1] * 8, 0, 0), ([1, 100, 1, 1, 1], 50, 7), ([7, 3, 8, 1, 9, 2, 4], 0, 30)],
)
def test_the_largest_stage_is_as_small_as_it_can_be(layers: list[int], first: int, last: int) -> None:
    for stages in range(1, len(layers) + 1):
        counts = balance_stages(layers, first, last, stages)
        assert len(counts) == stages
        assert sum(counts) == len(layers)
        assert min(counts) >= 1
        ends = [sum(counts[:n]) for n in range(stages + 1)]
        sizes = [sum(layers[a:b]) for a, b in pairwise(ends)]
        sizes[0] += first
        sizes[-1] += last
        assert max(sizes) == best_by_trying(layers, first, last, stages)


def test_equal_layers_are_dealt_evenly() -> None:
    assert balance_stages([10] * 8, 0, 0, 4) == (2, 2, 2, 2)
