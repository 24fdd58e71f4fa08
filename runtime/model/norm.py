"""Root mean square norm."""

import torch
from torch import nn

from runtime.model.linear import unfilled
from runtime.model.ops import LayerOps


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim.

    Args:
        size: of the last dim.
        eps: added to the mean of squares.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = unfilled(size)
        self.eps = eps
        # None: torch
        self.ops: LayerOps | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize (..., size): fp32, rounded to the dtype of `hidden`, then multiplied by the weight."""
        if self.ops is not None:
            return self.ops.rms_norm(hidden.contiguous(), self.weight, self.eps)
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # the rounding comes before the weight: HF and the serving engines agree on this order
        return wide.to(hidden.dtype) * self.weight

    def add(self, hidden: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden + added (..., size), rounded to their dtype, and the norm of that; None adds nothing."""
        if added is None:
            return hidden, self(hidden)
        if self.ops is not None:
            return self.ops.add_rms_norm(added.contiguous(), hidden.contiguous(), self.weight, self.eps)
        hidden = hidden + added
        return hidden, self(hidden)
