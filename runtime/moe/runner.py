"""The MoE block: route, dispatch, run the experts, combine, add the shared expert.

Shapes: B batch, T tokens (here all tokens of the batch), D hidden.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.model.mlp import GatedMlp
from runtime.moe.dispatcher import combine, dispatch
from runtime.moe.experts import select_experts
from runtime.moe.router import Router, RoutingObserver


class MoE(nn.Module):
    """Routed experts plus a shared one that sees every token and is neither gated nor scaled."""

    def __init__(self, config: Glm4MoeConfig, layer: int, moe_backend: str) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = nn.ModuleList(
            GatedMlp(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = GatedMlp(config.hidden_size, config.shared_intermediate_size)
        self._run_experts = select_experts(moe_backend)

    def forward(self, hidden_BTD: torch.Tensor, observer: RoutingObserver | None) -> torch.Tensor:
        """Return (B, T, D); routed results are weighted and summed in fp32 and rounded once."""
        hidden_TD = hidden_BTD.flatten(0, 1)
        routing = self.gate(hidden_TD)
        if observer is not None:
            observer(routing)
        dispatched = dispatch(hidden_TD, routing.topk_ids_TK, len(self.experts))
        experts = cast(Sequence[GatedMlp], self.experts)
        rows_RD = self._run_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, experts)
        routed_TD = combine(rows_RD, routing.topk_weights_TK, dispatched).to(hidden_TD.dtype)
        return (routed_TD + self.shared_experts(hidden_TD)).view(hidden_BTD.shape)
