"""The gated feed-forward block: dense layers, the shared expert, and each routed expert.

Shapes: R rows, D hidden, F intermediate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from runtime.model.linear import Linear
from runtime.moe.workspace import Workspace


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

    def forward_into(self, hidden_RD: torch.Tensor, workspace: Workspace, out_RD: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does for (R, D), but allocate nothing; see `Linear.forward_into`."""
        shape = (len(hidden_RD), self.gate_proj.weight.shape[0])
        gate_RF, up_RF = (workspace.take(name, shape, hidden_RD.dtype) for name in ("mlp_gate", "mlp_up"))
        self.gate_proj.forward_into(hidden_RD, workspace, gate_RF)
        self.up_proj.forward_into(hidden_RD, workspace, up_RF)
        return self.down_proj.forward_into(F.silu(gate_RF, inplace=True).mul_(up_RF), workspace, out_RD)

    def several(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `forward` does for several inputs, each by itself, and widen each weight once."""
        gates, ups = self.gate_proj.several(inputs), self.up_proj.several(inputs)
        return self.down_proj.several([F.silu(gate) * up for gate, up in zip(gates, ups, strict=True)])
