"""Attention over the windows of a text, one window at a time, a chunk of its tokens at a time.

Shapes: B = 1, R tokens of a chunk, D hidden.
"""

from collections.abc import Iterator

import torch

from converters.config import Glm4MoeConfig
from runtime.cache.kv_cache import KVCache, KVShape
from runtime.model.decoder import DecoderLayer
from runtime.model.step import build_step

# tokens of a window that attention takes at a time; bounds its scores
CHUNK_TOKENS = 512
Bounds = list[tuple[int, int]]


def chunks(bounds: Bounds, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each chunk of each window."""
    for begin, end in bounds:
        for start in range(begin, end, chunk_tokens):
            yield start, min(start + chunk_tokens, end)


class WindowAttention:
    """Runs the attention of a layer chunk by chunk, keeping the keys and values of one window.

    Args:
        config: of the model.
        longest: tokens of the longest window.
        dtype: of compute.
        device: of compute.
    """

    def __init__(self, config: Glm4MoeConfig, longest: int, dtype: torch.dtype, device: str) -> None:
        self._config, self._device = config, device
        shape = KVShape(
            num_layers=1,
            batch_size=1,
            capacity_tokens=longest,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        self._cache = KVCache(shape, dtype, device)

    def reset(self) -> None:
        """Begin another window."""
        self._cache.reset()

    def run(self, module: DecoderLayer, rows_1RD: torch.Tensor) -> torch.Tensor:
        """Return the attention's output (1, R, D) for the chunk that follows those seen, before the residual sum."""
        num_tokens = rows_1RD.shape[1]
        step = build_step(self._config, num_tokens, start=self._cache.length, device=self._device)
        out_1RD: torch.Tensor = module.self_attn(module.input_layernorm(rows_1RD), step, self._cache.layer(0))
        self._cache.advance(num_tokens)
        return out_1RD

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the keys and values of the window so far."""
        return self._cache.read(0)


def attend_whole(config: Glm4MoeConfig, module: DecoderLayer, rows_1RD: torch.Tensor) -> torch.Tensor:
    """Return the attention's output (1, R, D) for a whole window, computed as the model in memory does."""
    step = build_step(config, rows_1RD.shape[1], device=rows_1RD.device)
    out_1RD: torch.Tensor = module.self_attn(module.input_layernorm(rows_1RD), step, None)
    return out_1RD
