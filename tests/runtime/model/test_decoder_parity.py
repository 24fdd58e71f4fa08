"""fp32 logits against transformers' Glm4MoeForCausalLM, over the variants of the architecture."""

import pytest
import torch

from runtime.config import EngineConfig
from runtime.model.decoder import CausalLM, new_cache
from runtime.model.loader import load_model
from runtime.model.step import build_step
from runtime.moe.router import Routing

# two fp32 implementations that add in another order; about 2e-6 is measured, logits have a standard deviation of 1.2
ATOL = 1e-4
FP32 = EngineConfig(dtype="float32")

VARIANTS = {
    "4.6": {},
    "air": {"use_qk_norm": False, "routed_scaling_factor": 1.0},
    "two_shared_experts": {"n_shared_experts": 2},
    "groups_2_of_2": {"n_group": 2, "topk_group": 2},
    "groups_1_of_2": {"n_group": 2, "topk_group": 1},
    "groups_2_of_4": {"n_group": 4, "topk_group": 2},
    "full_rotary": {"partial_rotary_factor": 1.0},
    "no_bias": {"attention_bias": False},
    "no_renormalization": {"norm_topk_prob": False},
    "multi_query": {"num_key_value_heads": 1},
    "multi_head": {"num_key_value_heads": 4},
    "all_moe": {"first_k_dense_replace": 0},
    "all_dense": {"first_k_dense_replace": 3},
    "one_expert_per_token": {"num_experts_per_tok": 1},
    "every_expert": {"num_experts_per_tok": 8},
}


def random_ids(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 96, (batch_size, num_tokens), generator=torch.Generator().manual_seed(1))


def all_logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_fp32_logits_equal_transformers(make_checkpoint, variant):
    checkpoint = make_checkpoint(seed=len(variant), **VARIANTS[variant])
    ids = random_ids(2, 33)
    expected = checkpoint.hf(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(all_logits(load_model(checkpoint.folder, FP32).model, ids), expected, rtol=0, atol=ATOL)


def test_decoder_correction_bias_matters_to_the_parity(make_checkpoint):
    """Proves that the comparison above would see a router without bias."""
    checkpoint, ids = make_checkpoint(), random_ids(1, 20)
    expected = checkpoint.hf(ids).logits
    checkpoint.edit(lambda tensors: [v.zero_() for k, v in tensors.items() if k.endswith("e_score_correction_bias")])
    model = load_model(checkpoint.folder, FP32).model
    assert (all_logits(model, ids) - expected).abs().max() > 0.1


def test_decoder_router_choices_equal_transformers(make_checkpoint):
    checkpoint, ids = make_checkpoint(n_group=4, topk_group=2), random_ids(2, 20)
    expected = checkpoint.hf(ids, output_router_logits=True).router_logits
    seen = list[Routing]()
    load_model(checkpoint.folder, FP32).model(ids, observer=seen.append)
    assert [routing.layer for routing in seen] == [1, 2]
    for routing, hf_logits in zip(seen, expected, strict=True):
        torch.testing.assert_close(routing.router_logits_TE, hf_logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("chunks", [[17], [16, 1], [1] * 17, [5, 7, 4, 1], [10, 7]])
def test_decoder_with_cache_in_chunks_equals_one_pass(make_checkpoint, chunks):
    model, ids = load_model(make_checkpoint().folder, FP32).model, random_ids(2, 17)
    cache = new_cache(model, 17, batch_size=2)
    parts = [all_logits_cached(model, part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(parts, dim=1), all_logits(model, ids), rtol=0, atol=ATOL)


def all_logits_cached(model: CausalLM, ids: torch.Tensor, cache) -> torch.Tensor:
    return model.logits(model(ids, cache=cache))


def test_decoder_after_truncated_drafts_equals_one_pass(make_checkpoint):
    model, ids = load_model(make_checkpoint().folder, FP32).model, random_ids(1, 12)
    cache = new_cache(model, 16)
    model(ids[:, :8], cache=cache)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    cache.truncate(8)
    out = all_logits_cached(model, ids[:, 8:], cache)
    torch.testing.assert_close(out, all_logits(model, ids)[:, 8:], rtol=0, atol=ATOL)


def test_decoder_layers_run_one_at_a_time_equal_the_forward_pass(make_checkpoint):
    """The way a streaming verifier runs the model."""
    model, ids = load_model(make_checkpoint().folder, FP32).model, random_ids(2, 9)
    hidden, step = model.embed(ids), build_step(model.config, 9)
    for layer in model.decoder_layers:
        hidden = layer(hidden, step)
    assert torch.equal(model.model.norm(hidden), model(ids))


def test_decoder_batch_rows_do_not_see_each_other(make_checkpoint):
    model, ids = load_model(make_checkpoint().folder, FP32).model, random_ids(2, 15)
    together = all_logits(model, ids)
    for row in range(2):
        alone = all_logits(model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=ATOL)


def test_decoder_bf16_stays_near_fp32_and_keeps_router_and_logits_in_fp32(make_checkpoint):
    """bf16 keeps 8 bits at each of some 40 steps: up to 2 % of the logits' spread is measured, 5 % allowed."""
    folder, ids, seen = make_checkpoint().folder, random_ids(2, 33), list[Routing]()
    exact = all_logits(load_model(folder, FP32).model, ids)
    rounded = load_model(folder, EngineConfig(dtype="bfloat16")).model
    out = rounded.logits(rounded(ids, observer=seen.append))
    assert out.dtype is torch.float32
    assert rounded(ids).dtype is torch.bfloat16
    assert {routing.router_logits_TE.dtype for routing in seen} == {torch.float32}
    # the median, since a token that is routed elsewhere is legitimately far off
    assert (out - exact).abs().median() < 0.05 * exact.std()
