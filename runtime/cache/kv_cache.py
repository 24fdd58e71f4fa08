"""Keys and values of the tokens seen so far, one contiguous block a layer.

Shapes: B batch, S slots (tokens), T new tokens, G kv heads, P head dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """Sizes of a cache, in elements."""

    num_layers: int
    batch_size: int
    capacity_tokens: int
    num_key_value_heads: int
    head_dim: int


class KVCache:
    """Room for `capacity_tokens` tokens of every sequence of a batch; all sequences are equally long.

    A forward pass appends to every layer and then calls `advance` once; until then the new tokens are not counted.
    """

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: str = "cpu") -> None:
        size = (shape.num_layers, shape.batch_size, shape.capacity_tokens, shape.num_key_value_heads, shape.head_dim)
        self.shape = shape
        self.length = 0
        self._keys = torch.empty(size, dtype=dtype, device=device)
        self._values = torch.empty(size, dtype=dtype, device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes, keys and values of all layers."""
        shape = self.shape
        return 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * self._keys.element_size()

    def layer(self, index: int) -> "LayerCache":
        """Return the part of the cache that belongs to one layer."""
        return LayerCache(self, index)

    def append(
        self, layer: int, keys_BTGP: torch.Tensor, values_BTGP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T tokens behind the counted ones; return views (B, length + T, G, P) of all keys and values."""
        stop = self.length + keys_BTGP.shape[1]
        assert stop <= self.shape.capacity_tokens, (stop, self.shape)
        self._keys[layer, :, self.length : stop] = keys_BTGP
        self._values[layer, :, self.length : stop] = values_BTGP
        return self._keys[layer, :, :stop], self._values[layer, :, :stop]

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views (B, length, G, P) of a layer's counted keys and values."""
        return self._keys[layer, :, : self.length], self._values[layer, :, : self.length]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that all layers have appended."""
        assert self.length + num_tokens <= self.shape.capacity_tokens, (self.length, num_tokens, self.shape)
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on, e.g. drafts that were rejected."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's view of a KVCache."""

    cache: KVCache
    index: int

    def append(self, keys_BTGP: torch.Tensor, values_BTGP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T tokens; return (B, S, G, P) views of all keys and values, the new ones last."""
        return self.cache.append(self.index, keys_BTGP, values_BTGP)
