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

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize (..., size): fp32, rounded to the dtype of `hidden`, then multiplied by the weight.

        Args:
            hidden: kept.
            out: contiguous, takes the result; kernels then allocate nothing. None: a new tensor.
        """
        if self.ops is not None:
            return self.ops.rms_norm(hidden.contiguous(), self.weight, self.eps, out=out)
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # the rounding comes before the weight: HF and the serving engines agree on this order
        return torch.mul(wide.to(hidden.dtype), self.weight, out=out)

    def add(
        self, hidden: torch.Tensor, added: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden + added (..., size), rounded to their dtype, and the norm of that.

        Args:
            hidden: kept, and so is `added`.
            added: of the same shape and dtype.
            out: as for `forward`, the sum first; none of both may lie where `hidden` or `added` does.
        """
        if self.ops is not None:
            return self.ops.add_rms_norm(added.contiguous(), hidden.contiguous(), self.weight, self.eps, out=out)
        sums, normed = (None, None) if out is None else out
        sums = torch.add(hidden, added, out=sums)
        return sums, self(sums, normed)
