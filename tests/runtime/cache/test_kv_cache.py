import pytest
import torch

from runtime.cache.kv_cache import KVCache, KVShape

SHAPE = KVShape(num_layers=2, batch_size=1, capacity_tokens=4, num_key_value_heads=3, head_dim=5)


def tokens(num_tokens: int, value: float) -> torch.Tensor:
    return torch.full((1, num_tokens, 3, 5), value)


def test_kv_cache_appends_per_layer_and_counts_once():
    cache = KVCache(SHAPE, torch.float32)
    for layer in range(2):
        keys, values = cache.layer(layer).append(tokens(2, layer), tokens(2, layer + 10))
        assert keys.shape == values.shape == (1, 2, 3, 5)
    assert cache.length == 0
    cache.advance(2)
    keys, values = cache.layer(1).append(tokens(1, 7), tokens(1, 8))
    assert keys[0, :, 0, 0].tolist() == [1, 1, 7]
    assert values[0, :, 0, 0].tolist() == [11, 11, 8]


def test_kv_cache_truncate_lets_rejected_drafts_be_overwritten():
    cache = KVCache(SHAPE, torch.float32)
    cache.layer(0).append(tokens(3, 1), tokens(3, 1))
    cache.advance(3)
    cache.truncate(1)
    keys, _ = cache.layer(0).append(tokens(1, 2), tokens(1, 2))
    assert keys[0, :, 0, 0].tolist() == [1, 2]
    cache.reset()
    assert cache.length == 0


def test_kv_cache_beyond_its_capacity_is_a_broken_invariant():
    cache = KVCache(SHAPE, torch.float32)
    with pytest.raises(AssertionError):
        cache.layer(0).append(tokens(5, 1), tokens(5, 1))
    with pytest.raises(AssertionError):
        cache.truncate(1)


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 240), (torch.bfloat16, 120)])
def test_kv_cache_bytes_per_token_count_keys_and_values_of_all_layers(dtype, num_bytes):
    assert KVCache(SHAPE, dtype).bytes_per_token == num_bytes
