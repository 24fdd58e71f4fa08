"""The router against cases computed by hand, and against transformers' own."""

from dataclasses import replace

import pytest
import torch
from transformers import Glm4MoeConfig as HfConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from converters.config import Glm4MoeConfig
from runtime.moe.router import choose_experts


@pytest.fixture
def config() -> Glm4MoeConfig:
    """Four experts, two chosen, no groups, no scaling."""
    raw = {
        "model_type": "glm4_moe", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "moe_intermediate_size": 4,
        "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 1, "num_key_value_heads": 1,
        "head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "max_position_embeddings": 8, "norm_topk_prob": True, "attention_bias": True,
        "use_qk_norm": True, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    }  # fmt: skip
    return Glm4MoeConfig.from_hf(raw)


def logits_of(*scores: float) -> torch.Tensor:
    """Return the logits (1, E) whose sigmoid is these scores."""
    return torch.tensor([scores]).logit()


def test_router_without_bias_takes_the_highest_scores_renormalized(config):
    ids, weights = choose_experts(logits_of(0.2, 0.6, 0.1, 0.4), torch.zeros(4), config)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.4]]))


def test_router_bias_moves_the_choice_but_not_the_weights(config):
    ids, weights = choose_experts(logits_of(0.2, 0.6, 0.1, 0.4), torch.tensor([0.0, 0.0, 0.9, 0.0]), config)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.1 / 0.7, 0.6 / 0.7]]))


def test_router_scaling_factor_multiplies_renormalized_weights(config):
    _, weights = choose_experts(
        logits_of(0.2, 0.6, 0.1, 0.4), torch.zeros(4), replace(config, routed_scaling_factor=2.5)
    )
    torch.testing.assert_close(weights, torch.tensor([[1.5, 1.0]]))


def test_router_without_renormalization_keeps_plain_scores(config):
    _, weights = choose_experts(logits_of(0.2, 0.6, 0.1, 0.4), torch.zeros(4), replace(config, norm_topk_prob=False))
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.4]]))


def test_router_group_limit_drops_the_best_expert_of_a_weak_group(config):
    """Group 0 holds the best expert, but group 1 has the higher sum of two."""
    limited = replace(config, n_group=2, topk_group=1)
    ids, _ = choose_experts(logits_of(0.9, 0.1, 0.6, 0.5), torch.zeros(4), limited)
    assert ids.tolist() == [[2, 3]]


def test_router_negative_biased_scores_still_beat_dropped_groups(config):
    """A mask value of 0 instead of -inf would choose from the dropped group here, as transformers 4.54 did."""
    limited = replace(config, n_group=2, topk_group=1)
    ids, _ = choose_experts(logits_of(0.1, 0.2, 0.6, 0.5), torch.tensor([-9.0, -9.0, -2.0, -2.0]), limited)
    assert ids.tolist() == [[2, 3]]


def test_router_equal_scores_go_to_the_lower_expert(config):
    ids, weights = choose_experts(torch.zeros(3, 4), torch.zeros(4), config)
    assert ids.tolist() == [[0, 1]] * 3
    assert weights.tolist() == [[0.5, 0.5]] * 3


def test_router_equal_scores_of_many_experts_go_to_the_lowest(config):
    """As many experts as GLM-4.6 has: topk, unlike a stable sort, picks others here."""
    many = replace(config, n_routed_experts=160, num_experts_per_tok=8)
    ids, _ = choose_experts(torch.zeros(3, 160), torch.zeros(160), many)
    assert ids.tolist() == [list(range(8))] * 3


def test_router_vanishing_scores_give_no_nan(config):
    _, weights = choose_experts(torch.full((1, 4), -200.0), torch.zeros(4), config)
    assert weights.isfinite().all()


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_router_random_logits_equal_transformers(config, n_group, topk_group):
    ours = replace(
        config, n_routed_experts=16, num_experts_per_tok=4, n_group=n_group, topk_group=topk_group,
        routed_scaling_factor=2.5, hidden_size=16,
    )  # fmt: skip
    hf = Glm4MoeTopkRouter(
        HfConfig(
            hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=n_group, topk_group=topk_group,
            routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    torch.manual_seed(n_group)
    hf.weight.data = torch.eye(16)
    hf.e_score_correction_bias.data = torch.randn(16)
    logits = torch.randn(200, 16)
    _, hf_weights, hf_ids = hf(logits)
    ids, weights = choose_experts(logits, hf.e_score_correction_bias, ours)
    dense, hf_dense = (
        torch.zeros(200, 16).scatter(1, i, w) for i, w in ((ids, weights), (hf_ids, hf_weights.detach()))
    )
    torch.testing.assert_close(dense, hf_dense, rtol=0, atol=1e-6)
