"""Which experts a token goes to, and with what weights. Shapes: T tokens, E experts, K slots per token."""

import torch

from converters.config import Glm4MoeConfig
from runtime.moe.router import choose_experts


def route(
    router_logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    config: Glm4MoeConfig,
    *,
    num_shared: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (T, K) int32 and weights (T, K) fp32; see `runtime.kernels.moe.route.route`."""
    num_tokens, num_experts = router_logits_TE.shape
    ids_TK, weights_TK = choose_experts(router_logits_TE, expert_bias_E, config)
    shared = torch.arange(num_experts, num_experts + num_shared, device=ids_TK.device)
    ids_TK = torch.cat((ids_TK, shared.expand(num_tokens, -1)), 1).to(torch.int32)
    weights_TK = torch.cat((weights_TK, weights_TK.new_ones(num_tokens, num_shared)), 1)
    if out is None:
        return ids_TK, weights_TK
    return out[0].copy_(ids_TK), out[1].copy_(weights_TK)
