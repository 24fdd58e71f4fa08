"""What all layers of one forward pass share.

Shapes: B sequences, T tokens of this pass of each, S = earlier tokens + T.
"""

from dataclasses import dataclass

import torch

from converters.config import Glm4MoeConfig
from runtime.cache.kv_cache import KVCache
from runtime.cache.paged_kv_cache import PagedKVCache, PagedStep, PageTable
from runtime.model.rope import Rope, build_rope
from runtime.moe.router import RoutingObserver


@dataclass(frozen=True, slots=True)
class Step:
    """Positions of a pass, and who watches its routers.

    Args:
        rope: angles of the T new positions.
        visible_TS: bool (T, S), which keys a query sees; None = all of them.
        observer: called with each MoE layer's routing.
        paged: where keys and values of this pass go, for kernels.
    """

    rope: Rope
    visible_TS: torch.Tensor | None
    observer: RoutingObserver | None = None
    paged: PagedStep | None = None


def build_step(
    config: Glm4MoeConfig,
    num_tokens: int,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
    observer: RoutingObserver | None = None,
) -> Step:
    """Return the step of `num_tokens` tokens that follow `start` earlier ones, causal."""
    positions_T = torch.arange(start, start + num_tokens, device=device)
    rope = build_rope(positions_T, config.rotary_dim, config.rope_theta)
    if num_tokens == 1:
        return Step(rope, None, observer)
    keys_S = torch.arange(start + num_tokens, device=device)
    return Step(rope, keys_S <= positions_T[:, None], observer)


def next_step(
    config: Glm4MoeConfig,
    hidden_BTD: torch.Tensor,
    cache: KVCache | PagedKVCache | None,
    *,
    is_paged: bool,
    observer: RoutingObserver | None = None,
) -> Step:
    """Return the step of the tokens that follow those in a cache; `is_paged`: for kernels, also without a cache."""
    batch_size, num_tokens = hidden_BTD.shape[:2]
    if not is_paged:
        assert not isinstance(cache, PagedKVCache), "pages are for kernels"
        start = 0 if cache is None else cache.length
        return build_step(config, num_tokens, start=start, device=hidden_BTD.device, observer=observer)
    assert not isinstance(cache, KVCache), "kernels need pages"
    # without a cache, these tokens are all
    paged = (cache or PageTable.empty(batch_size, num_tokens, hidden_BTD.device)).step(num_tokens)
    return Step(build_rope(paged.positions_T, config.rotary_dim, config.rope_theta), None, observer, paged)
