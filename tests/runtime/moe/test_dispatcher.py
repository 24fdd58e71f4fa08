import pytest
import torch

from runtime.moe.dispatcher import combine, dispatch
from runtime.moe.experts import vanilla_experts


def test_dispatch_groups_rows_by_expert_in_token_order():
    hidden = torch.arange(6.0).view(3, 2)
    dispatched = dispatch(hidden, torch.tensor([[2, 0], [0, 3], [2, 3]]), num_experts=5)
    assert dispatched.rows_per_expert_E.tolist() == [2, 0, 2, 2, 0]
    assert dispatched.rows_RD.tolist() == hidden[[0, 1, 0, 2, 1, 2]].tolist()


def test_combine_of_untouched_rows_gives_tokens_times_weight_sums():
    torch.manual_seed(0)
    hidden, ids = torch.randn(7, 4), torch.stack([torch.randperm(6)[:3] for _ in range(7)])
    weights = torch.rand(7, 3)
    dispatched = dispatch(hidden, ids, num_experts=6)
    combined = combine(dispatched.rows_RD, weights, dispatched)
    torch.testing.assert_close(combined, hidden * weights.sum(1, keepdim=True))


def test_combine_puts_each_experts_result_to_its_own_weight():
    ids = torch.tensor([[1, 0], [0, 1]])
    dispatched = dispatch(torch.ones(2, 1), ids, num_experts=2)
    results = torch.tensor([[10.0], [10.0], [20.0], [20.0]])  # expert 0 answers 10, expert 1 answers 20
    weights = torch.tensor([[0.25, 0.5], [0.25, 0.5]])
    assert combine(results, weights, dispatched).tolist() == [[10.0], [12.5]]


def test_combine_adds_bf16_rows_in_fp32():
    """Added in bf16, 1 + 2^-9 + 2^-9 would stay 1."""
    dispatched = dispatch(torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]]), num_experts=3)
    rows = torch.tensor([[1.0], [2**-9], [2**-9]], dtype=torch.bfloat16)
    combined = combine(rows, torch.ones(1, 3), dispatched)
    assert combined.dtype is torch.float32
    assert combined.item() == 1 + 2**-8


def test_combine_adds_in_the_order_of_experts_whatever_the_order_of_choices():
    """1 + 2^-24 stays 1 in fp32, twice; 2^-24 + 2^-24 first gives the next number above 1."""
    tiny = 2.0**-24
    by_expert = torch.tensor([[tiny], [tiny], [1.0]])
    for ids in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        dispatched = dispatch(torch.ones(1, 1), torch.tensor([ids]), num_experts=3)
        assert combine(by_expert, torch.ones(1, 3), dispatched).item() == 1 + 2 * tiny
        assert combine(by_expert.flip(0), torch.ones(1, 3), dispatched).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_filtered_slots_have_no_row_and_add_nothing(dtype):
    hidden = torch.arange(6.0).view(3, 2)
    ids = torch.tensor([[-1, 0], [1, -1], [-1, -1]], dtype=dtype)
    dispatched = dispatch(hidden, ids, num_experts=3)
    assert dispatched.rows_per_expert_E.tolist() == [1, 1, 0]
    assert dispatched.slots_R.tolist() == [1, 2]
    assert torch.equal(dispatched.rows_RD, hidden[:2])
    weights = torch.tensor([[0.5, 3.0], [2.0, 0.5], [1.0, 1.0]])
    assert torch.equal(combine(dispatched.rows_RD, weights, dispatched), hidden * torch.tensor([[3.0], [2.0], [0.0]]))


def test_a_rank_may_have_no_row_at_all():
    dispatched = dispatch(torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2, 3), -1), num_experts=2)
    rows = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, [lambda part: part] * 2)
    assert torch.equal(combine(rows, torch.ones(2, 3), dispatched), torch.zeros(2, 4))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_of_ranks_add_up_to_the_whole(num_ranks):
    """Results are whole numbers, so that no order of additions matters."""
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(9)])
    hidden, weights = torch.randint(-8, 8, (9, 4)).float(), torch.randint(1, 4, (9, 3)).float()
    experts = [lambda part, factor=factor: part * factor for factor in range(1, 7)]

    def part(local: torch.Tensor, held: list[int]) -> torch.Tensor:
        dispatched = dispatch(hidden, local, len(held))
        rows = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, [experts[expert] for expert in held])
        return combine(rows, weights, dispatched)

    whole, total = part(ids, [*range(6)]), torch.zeros(9, 4)
    for rank in range(num_ranks):
        total += part(torch.where(ids % num_ranks == rank, ids // num_ranks, -1), [*range(rank, 6, num_ranks)])
    assert torch.equal(total, whole)
