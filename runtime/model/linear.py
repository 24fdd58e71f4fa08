"""Linear layers whose weight is kept as the checkpoint has it.

Shapes: B T ... any leading dims, O out features, I in features. Parameters are born on the meta device; the loader puts
the checkpoint's tensors in their place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from converters.numerics.fp8 import dequantize_channel

# rows of a weight widened to fp32 at a time: 16384 x 5120 fp32 = 320 MiB
_FP32_ROWS = 16384


def unfilled(*shape: int) -> nn.Parameter:
    """Return a parameter of this shape without storage, for the loader to replace."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b. The weight is fp32 or bf16, or FP8 E4M3 with a scale that multiplies on use.

    Args:
        in_features: I.
        out_features: O.
        bias: has a bias (O,).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = unfilled(out_features, in_features)
        self.bias = unfilled(out_features) if bias else None
        self.weight_scale: nn.Parameter | None = None
        # what an engine does to the inputs of this layer at run time
        self.quantize_input: Callable[[torch.Tensor], torch.Tensor] | None = None

    def add_weight_scale(self) -> None:
        """Make room for a scale (O, 1) fp32 per output row: the weight of this layer is quantized."""
        self.weight_scale = unfilled(self.weight.shape[0], 1)

    def dequantized(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows start:stop of the weight, (rows, I) in `dtype`, the scale applied in fp32 and rounded once."""
        rows_OI = self.weight[start:stop]
        if self.weight_scale is None:
            return rows_OI.to(dtype)
        return dequantize_channel(rows_OI, self.weight_scale[start:stop]).to(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) in the dtype of `hidden`."""
        if self.quantize_input is not None:
            hidden = self.quantize_input(hidden)
        return F.linear(hidden, self.dequantized(hidden.dtype), self.bias)

    def forward_fp32(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) fp32, products and sums in fp32 whatever the weight's dtype."""
        num_rows = self.weight.shape[0]
        # an fp32 weight needs no copy, hence no blocks
        block = num_rows if self.weight.dtype is torch.float32 else _FP32_ROWS
        bounds = [(start, start + block) for start in range(0, num_rows, block)]
        hidden = hidden.to(torch.float32)
        parts = [F.linear(hidden, self.dequantized(torch.float32, start, stop)) for start, stop in bounds]
        out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return out if self.bias is None else out + self.bias.to(torch.float32)
