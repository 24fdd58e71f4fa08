"""Every grouped backend, in every scheme it takes, within a derived distance of fp64; see `exact_layer`."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from transformers import Glm4MoeConfig as HfConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from runtime.moe.batched import BatchedExperts
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import GroupedExperts, LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.grouped import CutlassExperts
from runtime.moe.layouts import FILTERED
from runtime.moe.weights import ExpertScheme, plain_weights
from runtime.moe.workspace import Workspace
from tests.runtime.moe.expert_layers import exact_layer, random_experts, random_slots, values_of

H, I, E, K = 64, 48, 8, 3  # noqa: E741
BACKENDS: dict[str, GroupedExperts] = {
    "batched": BatchedExperts(),
    "batched, masked layout": BatchedExperts(is_masked=True),
    "batched, a block a launch": BatchedExperts(weight_bytes=1),
    "batched, batch invariant": BatchedExperts(is_batch_invariant=True),
    "cutlass": CutlassExperts(),
    "triton's twins": FusedExperts(FusedOps.of_twins()),
    "triton's twins, masked layout": FusedExperts(FusedOps.of_twins(), is_masked=True),
    "triton's twins, batch invariant": FusedExperts(FusedOps.of_twins(), is_batch_invariant=True),
}
ROUTINGS: dict[str, Callable[[Slots], None]] = {
    "any": lambda slots: None,
    "empty experts": lambda slots: slots.ids_TK[:, :K].remainder_(4),
    "all tokens on the same experts": lambda slots: slots.ids_TK.copy_(
        slots.ids_TK[:1].clone().expand_as(slots.ids_TK)
    ),
    "filtered": lambda slots: slots.ids_TK.masked_fill_(slots.ids_TK % 3 == 0, FILTERED),
    "all filtered": lambda slots: slots.ids_TK.fill_(FILTERED),
}
PLAIN = {torch.float32: ExpertScheme.FP32, torch.bfloat16: ExpertScheme.BF16}
QUANTIZED = [scheme for scheme in ExpertScheme if not scheme.is_plain]


def run(backend: GroupedExperts, hidden: torch.Tensor, slots: Slots, experts: LocalExperts) -> torch.Tensor:
    out = torch.empty_like(hidden)
    backend.run(hidden, slots, experts, Workspace(hidden.device), out)
    return out


def assert_within(out: torch.Tensor, hidden: torch.Tensor, slots: Slots, experts: LocalExperts) -> None:
    exact = exact_layer(hidden, slots, experts.weights)
    assert ((out.double() - exact.values).abs() <= exact.budget).all()


def random_hidden(num_tokens: int, dtype: torch.dtype, hidden_size: int = H) -> torch.Tensor:
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 257])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_within_budget_of_fp64(name, num_tokens, dtype):
    experts = LocalExperts(random_experts(PLAIN[dtype], E, 1, H, I))
    hidden, slots = random_hidden(num_tokens, dtype), random_slots(num_tokens, E, K)
    assert_within(run(BACKENDS[name], hidden, slots, experts), hidden, slots, experts)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_takes_any_routing(name, routing):
    experts = LocalExperts(random_experts(ExpertScheme.FP32, E, 1, H, I))
    hidden, slots = random_hidden(19, torch.float32), random_slots(19, E, K)
    ROUTINGS[routing](slots)
    assert_within(run(BACKENDS[name], hidden, slots, experts), hidden, slots, experts)


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("name", ["batched", "cutlass", "triton's twins"])
def test_backend_takes_any_number_of_choices_with_and_without_shared_expert(name, top_k):
    for num_shared in (0, 1):
        experts = LocalExperts(random_experts(ExpertScheme.FP32, E, num_shared, H, I))
        hidden, slots = random_hidden(5, torch.float32), random_slots(5, E, top_k, num_shared)
        assert_within(run(BACKENDS[name], hidden, slots, experts), hidden, slots, experts)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_multiplies_codes_as_what_they_stand_for(name, scheme, dtype):
    """Sizes that are no multiple of a block of 128."""
    experts = LocalExperts(random_experts(scheme, 3, 1, 160, 144))
    hidden, slots = random_hidden(6, dtype, 160), random_slots(6, 3, 2)
    assert_within(run(BACKENDS[name], hidden, slots, experts), hidden, slots, experts)


@pytest.mark.parametrize("scheme", [*PLAIN.values(), *QUANTIZED])
def test_any_two_backends_differ_by_no_more_than_both_budgets(scheme, tally):
    """Shards of 1408 columns by 8, and blocks of scales that these cut."""
    dtype = torch.float32 if scheme is ExpertScheme.FP32 else torch.bfloat16
    experts = LocalExperts(random_experts(scheme, 5, 1, 160, 176))
    hidden, slots = random_hidden(17, dtype, 160), random_slots(17, 5, 3)
    exact = exact_layer(hidden, slots, experts.weights)
    found = {name: run(backend, hidden, slots, experts).double() for name, backend in BACKENDS.items()}
    pairs = {pair: found[pair[0]] - found[pair[1]] for pair in combinations(found, 2)}
    shares = {pair: float((off.abs() / (2 * exact.budget)).max()) for pair, off in pairs.items()}
    assert {pair: share for pair, share in shares.items() if not share <= 1} == {}
    largest = max(float(off.abs().max()) for off in pairs.values()) / float(exact.values.abs().max())
    assert largest > 0
    tally(f"{len(pairs)} pairs of backends, {scheme}: at most {largest:.1e} of the largest value apart, "
          f"{max(shares.values()):.2f} of the budget")  # fmt: skip


@pytest.mark.parametrize("dtype", PLAIN)
def test_budget_is_exceeded_by_what_goes_wrong_elsewhere(dtype):
    """Scaling the shared expert, taking up for gate, forgetting a slot."""
    experts = LocalExperts(random_experts(PLAIN[dtype], E, 1, H, I))
    hidden, slots = random_hidden(17, dtype), random_slots(17, E, K)
    gate, up, down = values_of(experts.weights, dtype)
    swapped = LocalExperts(plain_weights(up, gate, down, num_shared=1))
    scaled = Slots(slots.ids_TK, slots.weights_TK.clone(), E + 1, 1)
    scaled.weights_TK[:, -1] = 2.5
    fewer = Slots(slots.ids_TK.clone(), slots.weights_TK, E + 1, 1)
    fewer.ids_TK[:, 1] = FILTERED
    exact = exact_layer(hidden, slots, experts.weights)
    for wrong_slots, wrong_experts in ((scaled, experts), (slots, swapped), (fewer, experts)):
        out = run(BatchedExperts(), hidden, wrong_slots, wrong_experts)
        assert ((out.double() - exact.values).abs() > exact.budget).float().mean() > 0.5


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_agrees_with_transformers(name, implementation):
    """Two within budget of the same exact values are within twice the budget of each other."""
    config = HfConfig(
        hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_shared_experts=1
    )
    config._experts_implementation = implementation
    theirs = Glm4MoeExperts(config).eval()
    experts = LocalExperts(random_experts(ExpertScheme.FP32, E, 0, H, I))
    gate, up, down = values_of(experts.weights, torch.float32)
    theirs.gate_up_proj.data, theirs.down_proj.data = torch.cat((gate, up), 1), down
    hidden, slots = random_hidden(23, torch.float32), random_slots(23, E, K, 0)
    with torch.inference_mode():
        expected = theirs(hidden, slots.ids_TK.long(), slots.weights_TK)
    exact = exact_layer(hidden, slots, experts.weights)
    assert ((expected.double() - exact.values).abs() <= exact.budget).all()
    assert ((run(BACKENDS[name], hidden, slots, experts) - expected).abs() <= 2 * exact.budget).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_garbage_in_padding_and_in_other_tokens_does_not_spread(name):
    """Padding is computed from some token: if that one is NaN, nobody else may be."""
    experts = LocalExperts(random_experts(ExpertScheme.FP32, E, 1, H, I))
    hidden, slots = random_hidden(9, torch.float32), random_slots(9, E, K)
    hidden[0] = torch.nan
    slots.ids_TK[1:, 1] = FILTERED
    out = run(BACKENDS[name], hidden, slots, experts)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
