"""Root mean square norm."""

import torch
from torch import nn

from runtime.model.linear import unfilled


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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalize (..., size): fp32, rounded to the dtype of `hidden`, then multiplied by the weight."""
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # the rounding comes before the weight: HF and the serving engines agree on this order
        return wide.to(hidden.dtype) * self.weight
