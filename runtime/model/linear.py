"""Linear layers whose weight is kept as the checkpoint has it.

Shapes: B T ... any leading dims, O out features, I in features. Parameters are born on the meta device; the loader puts
the checkpoint's tensors in their place.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from converters.numerics.fp8 import dequantize_channel
from runtime.model.codes import multiply_out
from runtime.model.products import products
from runtime.moe.workspace import Workspace

# rows of a weight widened to fp32 at a time: 16384 x 5120 fp32 = 320 MiB
_FP32_ROWS = 16384


def unfilled(*shape: int) -> nn.Parameter:
    """Return a parameter of this shape without storage, for the loader to replace."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Rounding(Protocol):
    """What an engine does to inputs at run time."""

    def __call__(self, hidden: torch.Tensor, workspace: Workspace | None = None, /) -> torch.Tensor:
        """Return the values of the codes that inputs are rounded to, in the workspace if there is one."""


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
        self.quantize_input: Rounding | None = None
        # compute fp32 on the CPU by blocks of the weight; see `products`
        self.in_blocks = False

    def add_weight_scale(self) -> None:
        """Make room for a scale (O, 1) fp32 per output row: the weight of this layer is quantized."""
        self.weight_scale = unfilled(self.weight.shape[0], 1)

    def dequantized(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows start:stop of the weight, (rows, I) in `dtype`, the scale applied in fp32 and rounded once."""
        rows_OI = self.weight[start:stop]
        # codes may have been multiplied out when they were read
        if self.weight_scale is None or rows_OI.dtype is not torch.float8_e4m3fn:
            return rows_OI.to(dtype)
        scale_O1 = self.weight_scale[start:stop]
        if rows_OI.device.type == "cpu" and rows_OI.is_contiguous():
            return multiply_out(rows_OI, scale_O1).to(dtype)
        return dequantize_channel(rows_OI, scale_O1).to(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., I) to (..., O) in the dtype of `hidden`."""
        return self.several([hidden])[0]

    def forward_into(self, hidden_RI: torch.Tensor, workspace: Workspace, out_RO: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, but allocate nothing: write the result to `out` and return it.

        Args:
            hidden_RI: (R, I).
            workspace: takes rounded inputs, and a weight that has to be multiplied out.
            out_RO: (R, O), in the dtype of `hidden`.
        """
        assert not self.in_blocks, "blocks are for weights that are read as they are needed"
        if self.quantize_input is not None:
            hidden_RI = self.quantize_input(hidden_RI, workspace)
        weight_IO = self._widened(hidden_RI.dtype, workspace).T
        if self.bias is None:
            return torch.mm(hidden_RI, weight_IO, out=out_RO)
        return torch.addmm(self.bias, hidden_RI, weight_IO, out=out_RO)

    def several(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `forward` does for several inputs of one dtype, each by itself, and widen the weight once."""
        if self.quantize_input is not None:
            inputs = [self.quantize_input(hidden) for hidden in inputs]
        if self.in_blocks and inputs[0].dtype is torch.float32:
            outputs = self._in_blocks(inputs)
            return outputs if self.bias is None else [out + self.bias for out in outputs]
        weight_OI = self.dequantized(inputs[0].dtype)
        return [F.linear(hidden, weight_OI, self.bias) for hidden in inputs]

    def several_fp32(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `forward_fp32` does for several inputs, each by itself."""
        if self.in_blocks and self.bias is None:
            return self._in_blocks([hidden.to(torch.float32) for hidden in inputs])
        return [self.forward_fp32(hidden) for hidden in inputs]

    def _widened(self, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        """Return the weight (O, I) with the bits of `dequantized`; it is valid until the next one is widened."""
        if self.weight.dtype is dtype:
            return self.weight
        weight_OI = workspace.take("weight", tuple(self.weight.shape), dtype).copy_(self.weight)
        if self.weight_scale is None or self.weight.dtype is not torch.float8_e4m3fn:
            return weight_OI
        # codes are exact in any dtype; torch multiplies two dtypes in the wider one and rounds once, on a GPU in place
        return weight_OI.mul_(self.weight_scale)

    def _in_blocks(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = products(self.weight, self.weight_scale, [hidden.flatten(0, -2) for hidden in inputs])
        return [out.view(*hidden.shape[:-1], -1) for out, hidden in zip(found, inputs, strict=True)]

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
