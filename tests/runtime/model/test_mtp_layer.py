"""The MTP layer against one put together from transformers' modules."""

import pytest
import torch

from runtime.config import EngineConfig
from runtime.model.decoder import new_cache
from runtime.model.loader import load_model
from runtime.model.mtp import draft_agreement

ATOL = 1e-4
FP32 = EngineConfig(dtype="float32")


def random_ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, 96, (2, num_tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("first_position", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False, "n_group": 2}, {"first_k_dense_replace": 3}])
def test_mtp_hidden_equals_transformers_modules(make_checkpoint, changes, first_position):
    """Counting from 0 (we, vLLM, SGLang) or from 1 (transformers) makes no difference: RoPE is relative."""
    checkpoint, ids = make_checkpoint(**changes), random_ids(20)
    hidden = checkpoint.hf.model(ids).last_hidden_state[:, :-1]
    embedding = checkpoint.hf.model.embed_tokens(ids[:, 1:])
    positions = torch.arange(first_position, first_position + 19)[None]
    expected = checkpoint.hf_mtp(embedding, hidden, checkpoint.hf.model.rotary_emb(embedding, positions))
    loaded = load_model(checkpoint.folder, FP32)
    own_hidden = loaded.model(ids)[:, :-1]
    drafted = loaded.mtp.draft(loaded.model.embed(ids[:, 1:]), own_hidden)
    torch.testing.assert_close(drafted, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(loaded.model.logits(drafted), checkpoint.hf.lm_head(expected), rtol=0, atol=ATOL)


def test_mtp_with_its_own_cache_equals_one_pass(make_checkpoint):
    loaded, ids, seen = load_model(make_checkpoint().folder, FP32), random_ids(14), []
    embedding, hidden = loaded.model.embed(ids[:, 1:]), loaded.model(ids)[:, :-1]
    cache = new_cache(loaded.model, 13, batch_size=2, num_layers=1)
    parts = [
        loaded.mtp.draft(*pair, cache=cache, observer=seen.append)
        for pair in zip(embedding.split([8, 1, 4], 1), hidden.split([8, 1, 4], 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), loaded.mtp.draft(embedding, hidden), rtol=0, atol=ATOL)
    assert [routing.layer for routing in seen] == [3, 3, 3]


def test_mtp_does_not_change_the_main_model(make_checkpoint):
    folder, ids = make_checkpoint().folder, random_ids(10)
    with_mtp, without = load_model(folder, FP32), load_model(folder, FP32, with_mtp=False)
    assert without.mtp is None
    assert torch.equal(with_mtp.model(ids), without.model(ids))


def test_draft_agreement_counts_equal_greedy_tokens(make_checkpoint):
    checkpoint, ids = make_checkpoint(), random_ids(30)
    loaded = load_model(checkpoint.folder, FP32)
    hidden = checkpoint.hf.model(ids).last_hidden_state
    embedding = checkpoint.hf.model.embed_tokens(ids[:, 1:])
    rope = checkpoint.hf.model.rotary_emb(embedding, torch.arange(29)[None])
    drafts = checkpoint.hf.lm_head(checkpoint.hf_mtp(embedding, hidden[:, :-1], rope)).argmax(-1)
    expected = int((drafts == checkpoint.hf.lm_head(hidden[:, 1:]).argmax(-1)).sum())
    agreement = draft_agreement(loaded.model, loaded.mtp, ids)
    assert (agreement.num_agreeing, agreement.num_positions) == (expected, 58)
    assert agreement.share == expected / 58
