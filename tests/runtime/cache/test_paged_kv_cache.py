import pytest
import torch

from runtime.cache.kv_cache import KVShape
from runtime.cache.paged_kv_cache import PAGE_TOKENS, RUN_TOKENS, PagedKVCache, PageTable

SHAPE = KVShape(num_layers=2, batch_size=3, capacity_tokens=20, num_key_value_heads=3, head_dim=5)


def test_every_token_of_every_sequence_has_a_slot_of_its_own():
    cache = PagedKVCache(SHAPE, torch.float32)
    slots = []
    for num_tokens in (17, 1, 2):
        step = cache.step(num_tokens)
        assert step.positions_T.tolist() == list(range(cache.length, cache.length + num_tokens))
        assert step.batch.seq_lens_B.tolist() == [cache.length + num_tokens] * 3
        assert step.batch.cu_seqlens_q.tolist() == [0, num_tokens, 2 * num_tokens, 3 * num_tokens]
        assert step.angle_rows.tolist() == list(range(num_tokens)) * 3
        # kernels read what lies side by side
        assert all(part.is_contiguous() for part in (step.angle_rows, step.slot_mapping, step.positions_T))
        slots.append(step.slot_mapping.view(3, num_tokens))
        cache.advance(num_tokens)
    slots = torch.cat(slots, 1)
    assert slots.unique().numel() == 60
    pages = [row // PAGE_TOKENS for row in slots]
    assert [page.unique().tolist() for page in pages] == cache.table.block_table_BM.tolist()
    assert int(slots.max()) < cache.layer(0).keys_NSGP[..., 0, 0].numel()


def test_paged_cache_truncate_lets_rejected_drafts_be_overwritten():
    cache = PagedKVCache(SHAPE, torch.float32)
    cache.advance(5)
    cache.truncate(2)
    assert cache.step(1).positions_T.tolist() == [2]
    cache.reset()
    assert (cache.length, cache.table.lengths_B.tolist()) == (0, [0, 0, 0])


def test_paged_cache_beyond_its_capacity_is_a_broken_invariant():
    cache = PagedKVCache(SHAPE, torch.float32)
    with pytest.raises(AssertionError):
        cache.step(21)
    with pytest.raises(AssertionError):
        cache.advance(21)
    with pytest.raises(AssertionError):
        cache.truncate(1)
    with pytest.raises(AssertionError):
        PagedKVCache(SHAPE, torch.float32, scales_L2=torch.ones(3, 2))


def test_scales_are_those_of_the_layer():
    cache = PagedKVCache(SHAPE, torch.bfloat16, scales_L2=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert cache.layer(1).scales is not None
    assert cache.layer(1).scales.tolist() == [3, 4]
    assert cache.layer(1).keys_NSGP.dtype is torch.float8_e4m3fn
    assert PagedKVCache(SHAPE, torch.bfloat16).layer(1).scales is None


@pytest.mark.parametrize(
    ("dtype", "scales", "num_bytes"),
    [(torch.float32, None, 240), (torch.bfloat16, None, 120), (torch.bfloat16, torch.ones(2, 2), 60)],
)
def test_paged_cache_bytes_per_token_count_keys_and_values_of_all_layers(dtype, scales, num_bytes):
    assert PagedKVCache(SHAPE, dtype, scales_L2=scales).bytes_per_token == num_bytes


@pytest.mark.parametrize(
    ("capacity", "num_tokens", "run_tokens"),
    [(RUN_TOKENS, 1, 0), (RUN_TOKENS + 1, 1, RUN_TOKENS), (RUN_TOKENS + 1, 2, 0)],
)
def test_only_decoding_with_room_for_more_than_a_run_is_split(capacity, num_tokens, run_tokens):
    """By room, not by length: so a token comes out the same wherever it stands in a graph."""
    assert PageTable.empty(1, capacity, "cpu").step(num_tokens).run_tokens == run_tokens
