"""The gated feed-forward block: dense layers, the shared expert, and each routed expert.

Shapes: D hidden, F intermediate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from runtime.model.linear import Linear


class GatedMlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Args:
        hidden_size: D.
        intermediate_size: F.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., D) to (..., D) in the same dtype."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def several(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `forward` does for several inputs, each by itself, and widen each weight once."""
        gates, ups = self.gate_proj.several(inputs), self.up_proj.several(inputs)
        return self.down_proj.several([F.silu(gate) * up for gate, up in zip(gates, ups, strict=True)])
