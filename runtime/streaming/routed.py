"""What a router decided for all tokens of a layer.

Shapes: T tokens of the layer, E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.moe.router import Routing


@dataclass(frozen=True, slots=True)
class Routed:
    """The decisions of a layer's router, on the CPU; see `Routing`."""

    router_logits_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor

    @classmethod
    def of(cls, routing: Routing) -> "Routed":
        """Take over a routing from any device."""
        return cls(routing.router_logits_TE.cpu(), routing.topk_ids_TK.cpu(), routing.topk_weights_TK.cpu())

    @classmethod
    def cat(cls, several: Sequence["Routed"]) -> "Routed":
        """Return the decisions for all tokens in order."""
        return cls(
            torch.cat([one.router_logits_TE for one in several]),
            torch.cat([one.topk_ids_TK for one in several]),
            torch.cat([one.topk_weights_TK for one in several]),
        )

    def of_expert(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that go to an expert, ascending, int64, and their weights, fp32."""
        tokens, slots = (self.topk_ids_TK == expert).nonzero(as_tuple=True)
        return tokens, self.topk_weights_TK[tokens, slots]
