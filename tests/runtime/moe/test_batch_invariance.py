"""Batch-invariant mode: what the block adds to a token is the same alone and in any batch, bit for bit."""

from dataclasses import replace

import pytest
import torch

from converters.config import Glm4MoeConfig
from runtime.moe.batched import BatchedExperts
from runtime.moe.experts import LocalExperts
from runtime.moe.plan import BATCHED, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.runtime.moe.expert_layers import random_experts, random_slots
from tests.runtime.moe.moe_blocks import filled_moe

SIZES = {"hidden_size": 256, "moe_intermediate_size": 96}


@pytest.fixture
def config(make_checkpoint) -> Glm4MoeConfig:
    return replace(Glm4MoeConfig.from_folder(make_checkpoint().folder), **SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_gives_a_token_the_same_in_every_batch(config, dtype):
    scheme = ExpertScheme.FP32 if dtype is torch.float32 else ExpertScheme.BF16
    moe = filled_moe(config, MoePlan(BATCHED, {5: LayerPlan(scheme, 1)}, is_batch_invariant=True))
    hidden = torch.randn(1, 259, config.hidden_size).to(dtype)
    whole = moe(hidden, None).clone()
    for size in (1, 2, 17, 64, 200):
        for start in (0, 3, 59):
            assert torch.equal(moe(hidden[:, start : start + size], None), whole[:, start : start + size])


def test_router_chooses_and_weighs_a_token_alike_in_every_batch(config):
    """Sigmoids of 1 and of 259 tokens differed in their last bits on about every second token."""
    router = filled_moe(config, MoePlan(BATCHED, {5: LayerPlan(ExpertScheme.FP32, 1)}, is_batch_invariant=True)).gate
    hidden = torch.randn(259, config.hidden_size)
    whole = router(hidden)
    for size in (1, 2, 5, 17):
        for start in range(0, 240, size):
            part = router(hidden[start : start + size])
            assert torch.equal(part.router_logits_TE, whole.router_logits_TE[start : start + size])
            assert torch.equal(part.topk_ids_TK, whole.topk_ids_TK[start : start + size])
            assert torch.equal(part.topk_weights_TK, whole.topk_weights_TK[start : start + size])


def test_the_loop_over_experts_is_not_batch_invariant(config):
    """Proves that the comparison above can fail."""
    moe = filled_moe(config, VANILLA_PLAN)
    hidden = torch.randn(1, 259, config.hidden_size)
    whole = moe(hidden, None)
    parts = [moe(part, None) for size in (1, 2, 17) for part in hidden[:, :51].split(size, 1)]
    assert not torch.equal(torch.cat(parts, 1), whole[:, :51].repeat(1, 3, 1))


@pytest.mark.parametrize("scheme", [scheme for scheme in ExpertScheme if not scheme.is_plain])
def test_codes_are_multiplied_alike_in_every_batch(scheme):
    experts, backend = LocalExperts(random_experts(scheme, 4, 1, 160, 144)), BatchedExperts(is_batch_invariant=True)
    hidden, slots = torch.randn(70, 160), random_slots(70, 4, 2)
    whole = torch.empty_like(hidden)
    backend.run(hidden, slots, experts, Workspace(hidden.device), whole)
    for size in (1, 17, 40):
        part = replace(slots, ids_TK=slots.ids_TK[5 : 5 + size], weights_TK=slots.weights_TK[5 : 5 + size])
        out = torch.empty(size, 160)
        backend.run(hidden[5 : 5 + size], part, experts, Workspace(hidden.device), out)
        assert torch.equal(out, whole[5 : 5 + size])
