"""The gated feed-forward block: dense layers, the shared expert, and each routed expert.

Shapes: D hidden, F intermediate.
"""

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
