"""Expert parallelism in one process: ranks compute their slots, and the sum is that of one rank."""

from dataclasses import dataclass, replace

import pytest
import torch

from converters.config import Glm4MoeConfig
from converters.shard.mapping import ParallelMapping, Placement
from runtime.model.mlp import GatedMlp
from runtime.moe.batched import BatchedExperts
from runtime.moe.dispatcher import Slots, combine_slots, dispatch
from runtime.moe.expert_map import ExpertMap, ExpertShare
from runtime.moe.experts import GroupedExperts, LocalExperts, vanilla_experts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.grouped import CutlassExperts
from runtime.moe.layouts import FILTERED, masked_rows
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.router import Routing
from runtime.moe.weights import ExpertScheme, ExpertWeights, plain_weights
from runtime.moe.workspace import Workspace
from tests.runtime.moe.expert_layers import exact_layer, random_experts, random_slots, values_of
from tests.runtime.moe.moe_blocks import filled_moe

E, H, I, K, T = 12, 64, 32, 4, 21  # noqa: E741


@dataclass(frozen=True, slots=True)
class LoopExperts(GroupedExperts):
    """The loop over experts on rows that were dispatched, or on those of the masked layout."""

    is_masked: bool = False

    def slot_results(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace
    ) -> torch.Tensor:
        """Return each slot's result, zero where it is filtered."""
        ids, num_experts = slots.ids_TK, slots.num_experts
        if self.is_masked:
            masked = masked_rows(ids, num_experts, len(ids))
            counts = masked.counts.to(torch.int64)
            slots_R = torch.cat([row[:count] for row, count in zip(masked.slots, counts.tolist(), strict=True)]).long()
        else:
            dispatched = dispatch(hidden_TD, ids, num_experts)
            counts, slots_R = dispatched.rows_per_expert_E, dispatched.slots_R
        out = torch.zeros(slots.num_slots, hidden_TD.shape[1], dtype=hidden_TD.dtype)
        out[slots_R] = vanilla_experts(hidden_TD[slots_R // slots.num_choices], counts, mlps(experts.weights))
        return out


BACKENDS: dict[str, GroupedExperts] = {
    "vanilla": LoopExperts(),
    "vanilla, masked layout": LoopExperts(is_masked=True),
    "batched": BatchedExperts(is_batch_invariant=True),
    "batched, masked layout": BatchedExperts(is_masked=True),
    "cutlass": CutlassExperts(),
    "triton": FusedExperts(FusedOps.of_twins(), is_batch_invariant=True),
    "triton, masked layout": FusedExperts(FusedOps.of_twins(), is_batch_invariant=True, is_masked=True),
}
# products of as many rows as an expert has: fewer than four are added up otherwise
BY_ROWS = [name for name in BACKENDS if not name.startswith("batched")]


def held_by(ep: int, placement: Placement, redundant: int) -> list[list[int]]:
    """Return the experts of each rank; all of them have the shared expert, E."""
    mapping = ParallelMapping(tp=ep, ep=ep, placement=placement, redundant_experts=redundant)
    return [[*experts, E] for experts in mapping.slots(E)]


def share(weights: ExpertWeights, held: tuple[int, ...]) -> LocalExperts:
    gate, up, down = (value[list(held)] for value in values_of(weights, torch.float32))
    return LocalExperts(plain_weights(gate, up, down, num_shared=1))


def mlps(weights: ExpertWeights) -> list[GatedMlp]:
    """Return the experts as modules."""
    found = []
    for parts in zip(*values_of(weights, torch.float32), strict=True):
        mlp = GatedMlp(weights.hidden_size, weights.intermediate_size)
        for linear, value in zip((mlp.gate_proj, mlp.up_proj, mlp.down_proj), parts, strict=True):
            linear.weight = torch.nn.Parameter(value, requires_grad=False)
        found.append(mlp)
    return found


def results(backend: GroupedExperts, hidden: torch.Tensor, slots: Slots, experts: LocalExperts) -> torch.Tensor:
    return backend.slot_results(hidden, slots, experts, Workspace(hidden.device))


def over_ranks(
    backend: GroupedExperts, held: list[list[int]], hidden: torch.Tensor, slots: Slots, weights: ExpertWeights
) -> torch.Tensor:
    """Return the sum of all ranks' slots, each of which one rank has computed."""
    experts, computed = ExpertMap.of(held, E + 1), torch.zeros(slots.num_slots, dtype=torch.int64)
    total = torch.zeros(slots.num_slots, H)
    for rank in range(experts.num_ranks):
        local = experts.local_slots(slots, rank)
        total += results(backend, hidden, local, share(weights, experts.held[rank]))
        computed += (local.ids_TK != FILTERED).flatten()
    assert computed.tolist() == [1] * slots.num_slots
    return total


def combined(values: torch.Tensor, slots: Slots) -> torch.Tensor:
    return combine_slots(values, slots, Workspace(values.device)).clone()


@pytest.fixture
def layer() -> tuple[torch.Tensor, Slots, ExpertWeights]:
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    return hidden, random_slots(T, E, K), random_experts(ExpertScheme.FP32, E, 1, H, I)


@pytest.mark.parametrize("name", ["batched", "batched, masked layout"])
@pytest.mark.parametrize("placement", Placement)
@pytest.mark.parametrize(("ep", "redundant"), [(2, 0), (4, 0), (2, 4), (4, 8)])
def test_ranks_add_up_to_one_rank_bit_for_bit(layer, name, placement, ep, redundant):
    hidden, slots, weights = layer
    expected = results(BACKENDS[name], hidden, slots, LocalExperts(weights))
    total = over_ranks(BACKENDS[name], held_by(ep, placement, redundant), hidden, slots, weights)
    assert torch.equal(total, expected)
    assert torch.equal(combined(total, slots), combined(expected, slots))


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ranks_without_copies_add_up_bit_for_bit_in_every_backend(layer, name, ep):
    """One rank alone has the shared expert: every expert has the rows that it would have in one rank."""
    hidden, slots, weights = layer
    held = ParallelMapping(tp=ep, ep=ep).slots(E)
    held[0].append(E)
    expected = results(BACKENDS[name], hidden, slots, LocalExperts(weights))
    total = over_ranks(BACKENDS[name], held, hidden, slots, weights)
    assert torch.equal(total, expected)
    assert torch.equal(combined(total, slots), combined(expected, slots))


@pytest.mark.parametrize("name", BY_ROWS)
def test_ranks_with_copies_stay_within_budget_in_every_backend(layer, name):
    """Copies share an expert's rows, and torch adds up otherwise where there are fewer than four."""
    hidden, slots, weights = layer
    total = over_ranks(BACKENDS[name], held_by(4, Placement.CONTIGUOUS, 8), hidden, slots, weights)
    exact = exact_layer(hidden, slots, weights)
    assert ((combined(total, slots).double() - exact.values).abs() <= exact.budget).all()


@pytest.mark.parametrize("name", BY_ROWS)
def test_copies_with_four_rows_or_more_add_up_bit_for_bit(layer, name):
    """Each of two ranks has every expert, and every second token."""
    _, _, weights = layer
    hidden, slots = torch.randn(64, H), random_slots(64, E, K)
    held = [[*range(E + 1)], [*range(E + 1)]]
    for rank in range(2):
        local = ExpertMap.of(held, E + 1).local_slots(slots, rank).ids_TK
        assert local[local != FILTERED].bincount().min() >= 4
    expected = results(BACKENDS[name], hidden, slots, LocalExperts(weights))
    assert torch.equal(over_ranks(BACKENDS[name], held, hidden, slots, weights), expected)


def test_copies_take_turns_by_token():
    experts = ExpertMap.of([[0, 1], [1, 0], [1, 2]], 3)
    assert experts.num_copies_E.tolist() == [2, 3, 1]
    ids = torch.tensor([[1], [1], [1], [1], [0], [0], [2]], dtype=torch.int32)
    slots = Slots(ids, torch.ones(7, 1), 3, 0)
    local = [experts.local_slots(slots, rank).ids_TK[:, 0].tolist() for rank in range(3)]
    assert local == [[1, -1, -1, 1, 0, -1, -1], [-1, 0, -1, -1, -1, 1, -1], [-1, -1, 0, -1, -1, -1, 1]]


def test_turns_go_on_where_an_earlier_part_of_the_batch_ended():
    experts = ExpertMap.of([[0], [0]], 1)
    slots = Slots(torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), 1, 0)
    whole = experts.local_slots(slots, 1).ids_TK.flatten().tolist()
    tail = Slots(slots.ids_TK[1:], slots.weights_TK[1:], 1, 0)
    assert experts.local_slots(tail, 1, first_token=1).ids_TK.flatten().tolist() == whole[1:]


def test_slots_filtered_before_stay_filtered():
    experts = ExpertMap.of([[0, 1]], 2)
    slots = Slots(torch.tensor([[FILTERED, 1]], dtype=torch.int32), torch.ones(1, 2), 2, 0)
    assert experts.local_slots(slots, 0).ids_TK.tolist() == [[FILTERED, 1]]


def test_shared_expert_is_the_last_of_each_rank_that_has_it():
    experts = ExpertMap.of([[0, 2], [1]], 3)
    slots = random_slots(4, 2, 1)
    assert [experts.local_slots(slots, rank).num_shared for rank in range(2)] == [1, 0]


# the shared expert is one that ranks share, or computed apart
SHARED, APART = 1, 0


def held_with(held: list[list[int]], num_routed: int, num_shared: int) -> list[list[int]]:
    return [[*ids, *range(num_routed, num_routed + num_shared)] for ids in held]


@pytest.mark.parametrize(
    ("backend", "num_shared"),
    [(backend, num_shared) for backend in (VANILLA, BATCHED, CUTLASS, TRITON) for num_shared in (SHARED, APART)],
)
@pytest.mark.parametrize("held", [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0, 1, 2], [3, 0]], [[0], [1], [2], [3]]], ids=len)
def test_blocks_of_ranks_add_up_to_the_block_of_one(make_checkpoint, monkeypatch, backend, num_shared, held):
    """fp32: what ranks add in another order is in the sixth digit of sums of magnitude 10."""
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    config = replace(Glm4MoeConfig.from_folder(make_checkpoint().folder), n_routed_experts=4)
    plan = VANILLA_PLAN if backend == VANILLA else MoePlan(backend, {5: LayerPlan(ExpertScheme.FP32, num_shared)})
    hidden, seen = torch.randn(1, 11, config.hidden_size), list[Routing]()
    expected = filled_moe(config, plan)(hidden, None)
    experts = ExpertMap.of(held_with(held, 4, num_shared), 4 + num_shared)
    blocks = [filled_moe(config, plan, ExpertShare(experts, rank)) for rank in range(len(held))]
    parts = [block(hidden, seen.append) for block in blocks]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-4)
    assert len(parts) == 1 or not any(torch.allclose(part, expected, atol=0.1) for part in parts)
    # whoever watches a rank is told of all experts
    assert all(torch.equal(routing.topk_ids_TK, seen[0].topk_ids_TK) for routing in seen)
    assert seen[0].topk_ids_TK.unique().tolist() == [0, 1, 2, 3]


def test_rows_of_an_expert_are_those_of_all_ranks_shared_out():
    """Tiles are chosen by it: a rank of eight has an eighth of the rows, though as many slots."""
    slots, experts = (
        random_slots(64, 32, 8),
        ExpertMap.of([[*range(rank, 32, 8)] for rank in range(7)] + [[7, 15, 23, 31, 32]], 33),
    )
    assert slots.rows_per_expert == 16.0
    assert experts.local_slots(slots, 7).rows_per_expert == 16.0


def test_a_rank_with_nothing_but_the_shared_expert_has_tiles_too():
    slots = ExpertMap.of([[*range(32)], [32]], 33).local_slots(random_slots(64, 32, 8), 1)
    assert (slots.num_experts, slots.num_shared) == (1, 1)
    assert slots.rows_per_expert > 0
