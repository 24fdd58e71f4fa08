"""What all layers of one forward pass share.

Shapes: T tokens of this pass, S = earlier tokens + T.
"""

from dataclasses import dataclass

import torch

from converters.config import Glm4MoeConfig
from runtime.model.rope import Rope, build_rope
from runtime.moe.router import RoutingObserver


@dataclass(frozen=True, slots=True)
class Step:
    """Positions of a pass, and who watches its routers.

    Args:
        rope: angles of the T new positions.
        visible_TS: bool (T, S), which keys a query sees; None = all of them.
        observer: called with each MoE layer's routing.
    """

    rope: Rope
    visible_TS: torch.Tensor | None
    observer: RoutingObserver | None = None


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
