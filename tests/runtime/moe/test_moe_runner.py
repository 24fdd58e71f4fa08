"""The MoE block against a loop over tokens."""

from dataclasses import replace

import pytest
import torch

from converters.config import Glm4MoeConfig
from runtime.moe.experts import vanilla_experts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.router import Routing
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from tests.runtime.moe.moe_blocks import filled_moe

GROUPED = [(backend, num_shared) for backend in (BATCHED, CUTLASS, TRITON) for num_shared in (0, 1)]


@pytest.fixture(autouse=True)
def twins(monkeypatch):
    """The kernels themselves run in the interpreter or on a GPU; what is around them runs on their twins here."""
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)


def grouped_plan(backend: str, num_shared: int) -> MoePlan:
    return MoePlan(backend, {5: LayerPlan(ExpertScheme.FP32, num_shared)})


def test_moe_output_is_the_weighted_sum_per_token_plus_the_shared_expert(make_checkpoint):
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    moe, seen = filled_moe(config), list[Routing]()
    hidden = torch.randn(2, 9, config.hidden_size)
    out = moe(hidden, seen.append).flatten(0, 1)
    (routing,) = seen
    for index, token in enumerate(hidden.flatten(0, 1)):
        choices = zip(routing.topk_ids_TK[index].tolist(), routing.topk_weights_TK[index], strict=True)
        expected = sum(weight * moe.experts[expert](token) for expert, weight in choices) + moe.shared_experts(token)
        torch.testing.assert_close(out[index], expected, rtol=1e-5, atol=1e-5)


def test_moe_observer_gets_layer_logits_ids_and_weights(make_checkpoint):
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    seen = list[Routing]()
    filled_moe(config)(torch.randn(1, 4, config.hidden_size).bfloat16().float(), seen.append)
    (routing,) = seen
    assert routing.layer == 5
    assert routing.router_logits_TE.shape == (4, config.n_routed_experts)
    assert routing.topk_ids_TK.shape == routing.topk_weights_TK.shape == (4, config.num_experts_per_tok)
    assert {routing.router_logits_TE.dtype, routing.topk_weights_TK.dtype} == {torch.float32}


def test_moe_scaling_factor_leaves_the_shared_expert_alone(make_checkpoint):
    """vLLM #24132 scaled twice and others not at all; 4.5-Air with its factor of 1 hides both."""
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    hidden = torch.randn(1, 5, config.hidden_size)
    by_factor = {
        factor: filled_moe(replace(config, routed_scaling_factor=factor))(hidden, None) for factor in (1.0, 2.5)
    }
    shared = filled_moe(config).shared_experts(hidden)
    torch.testing.assert_close(by_factor[2.5] - shared, 2.5 * (by_factor[1.0] - shared), rtol=1e-4, atol=1e-4)


def test_vanilla_experts_without_rows_are_not_run():
    def refuse(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    rows = torch.randn(3, 2)
    out = vanilla_experts(rows, torch.tensor([0, 3, 0]), [refuse, lambda part: part * 2, refuse])
    assert torch.equal(out, rows * 2)


@pytest.mark.parametrize(("backend", "num_shared"), GROUPED)
def test_grouped_experts_equal_the_loop_over_experts(make_checkpoint, backend, num_shared):
    """Sums of 2.5 x 9 results of magnitude 1: five digits are left of fp32's seven."""
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    assert config.routed_scaling_factor == 2.5
    hidden = torch.randn(2, 9, config.hidden_size)
    seen, expected_seen = list[Routing](), list[Routing]()
    expected = filled_moe(config, VANILLA_PLAN)(hidden, expected_seen.append)
    moe = filled_moe(config, grouped_plan(backend, num_shared))
    out = moe(hidden, seen.append)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(seen[0].topk_ids_TK, expected_seen[0].topk_ids_TK)
    assert seen[0].topk_ids_TK.dtype is expected_seen[0].topk_ids_TK.dtype
    assert torch.equal(seen[0].topk_weights_TK, expected_seen[0].topk_weights_TK)
    assert seen[0].layer == 5


@pytest.mark.parametrize(("backend", "num_shared"), GROUPED)
def test_grouped_experts_take_no_tokens(make_checkpoint, backend, num_shared):
    """A rank may have none while others have some."""
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    moe = filled_moe(config, grouped_plan(backend, num_shared))
    assert moe(torch.zeros(1, 0, config.hidden_size), None).shape == (1, 0, config.hidden_size)


@pytest.mark.parametrize("backend", [BATCHED, CUTLASS, TRITON])
def test_fused_shared_expert_is_never_scaled(make_checkpoint, backend, monkeypatch):
    """The same block with the shared slot at 2.5, or at 1 / 2.5, is far off: the comparison above would see it."""
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    hidden = torch.randn(1, 7, config.hidden_size)
    expected = filled_moe(config, VANILLA_PLAN)(hidden, None)
    moe = filled_moe(config, grouped_plan(backend, 1))
    shared = moe.shared_experts(hidden)
    run = type(moe.backend).run
    for factor in (2.5, 0.4):

        def scaled(self, hidden_TD, slots, *rest, factor=factor):
            slots.weights_TK[:, -1] *= factor
            run(self, hidden_TD, slots, *rest)

        monkeypatch.setattr(type(moe.backend), "run", scaled)
        wrong = moe(hidden, None)
        torch.testing.assert_close(wrong - expected, (factor - 1) * shared, rtol=1e-3, atol=1e-3)
        assert (wrong - expected).abs().median() > 0.1
    monkeypatch.setattr(type(moe.backend), "run", run)
    torch.testing.assert_close(moe(hidden, None), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", [BATCHED, CUTLASS, TRITON])
def test_fused_shared_expert_is_the_module_s_own_weights(make_checkpoint, backend):
    """With no routed result at all, the block is the shared expert."""
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    moe = filled_moe(replace(config, routed_scaling_factor=0.0), grouped_plan(backend, 1))
    hidden = torch.randn(1, 7, config.hidden_size)
    torch.testing.assert_close(moe(hidden, None), moe.shared_experts(hidden), rtol=1e-5, atol=1e-5)


def test_triton_backend_is_that_of_the_kernels(make_checkpoint):
    config = Glm4MoeConfig.from_folder(make_checkpoint().folder)
    assert isinstance(MoE(config, 5, grouped_plan(TRITON, 1)).backend, FusedExperts)
