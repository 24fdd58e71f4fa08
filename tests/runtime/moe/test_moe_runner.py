"""The MoE block against a loop over tokens."""

from dataclasses import replace

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.moe.experts import vanilla_experts
from runtime.moe.router import Routing
from runtime.moe.runner import MoE


def filled_moe(config: Glm4MoeConfig) -> MoE:
    """Return a MoE block of layer 5 with random fp32 weights."""
    torch.manual_seed(0)
    moe = MoE(config, 5, "vanilla")
    for name, parameter in list(moe.named_parameters()):
        module, _, attribute = name.rpartition(".")
        value = nn.Parameter(torch.randn(parameter.shape) * 0.3, requires_grad=False)
        setattr(moe.get_submodule(module), attribute, value)
    return moe


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
