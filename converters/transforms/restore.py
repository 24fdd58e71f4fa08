"""From the blocks that a quantizing transform made back to weights, row by row: what its errors are measured on."""

import math
from typing import TYPE_CHECKING

from converters.quant.quality import TensorQuality
from converters.quant.scheme import Arithmetic
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from converters.transforms.rows import RowTransform

if TYPE_CHECKING:
    import torch

_QUANTIZING = (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
_E4M3_MAX, _INT8_MAX, _E2M1_MAX = 448.0, 127.0, 6.0


def is_quantizing(transform: RowTransform) -> bool:
    """Return whether a transform makes codes that `restore` turns back."""
    return isinstance(transform, _QUANTIZING)


def restore(
    transform: RowTransform, blocks: "tuple[torch.Tensor, ...]", index_S: "torch.Tensor", columns: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return some rows of a block as weights again, and how far their codes reach.

    Args:
        transform: what made the blocks.
        blocks: codes and scales.
        index_S: rows, counted from the first of the block.
        columns: of the weight.
    Returns:
        weights fp32 (S, columns) and the largest magnitude that codes can have there, fp32, (S, columns) or broadcast.
    """
    import torch

    from converters.numerics.dequantize import decode, dequantize_nvfp4, scale_groups, unpack_int32

    codes_SC, scale_RG = blocks[0][index_S], blocks[1]
    shape_SC = len(index_S), columns
    match transform:
        case QuantizeFp8Channel() | QuantizeInt8():
            scale_S1 = scale_RG[index_S].float()
            largest = _INT8_MAX if isinstance(transform, QuantizeInt8) else _E4M3_MAX
            return decode(codes_SC) * scale_S1, largest * scale_S1
        case QuantizeFp8Tensor():
            return decode(codes_SC) * scale_RG.float(), _E4M3_MAX * scale_RG.float()
        case QuantizeFp8Block(rows=rows, columns=group):
            scale_SG = scale_RG[index_S // rows]
            return scale_groups(decode(codes_SC), scale_SG, group), scale_groups(
                torch.full(shape_SC, _E4M3_MAX), scale_SG, group
            )
        case QuantizeInt8Packed(group=group):
            scale_SG, size = scale_RG[index_S], group or columns
            values_SC = scale_groups(unpack_int32(codes_SC, 8, columns), scale_SG, size)
            return values_SC, scale_groups(torch.full(shape_SC, _INT8_MAX), scale_SG, size)
        case QuantizeNvfp4(arithmetic=arithmetic):
            divides = arithmetic is not Arithmetic.MODELOPT
            local_SG, global_S1 = scale_RG[index_S], blocks[2].expand(len(index_S), 1)
            combined_SG = local_SG.float() / global_S1 if divides else local_SG.float() * global_S1
            values_SC = dequantize_nvfp4(codes_SC, local_SG, global_S1, divides=divides)
            return values_SC, scale_groups(
                torch.full(shape_SC, _E2M1_MAX), combined_SG, columns // combined_SG.shape[1]
            )
    raise AssertionError(transform)


class Sampler:
    """Errors of a tensor, gathered block by block from every `SAMPLE_EVERY`-th row; see `converters.quant.quality`."""

    def __init__(self, transform: RowTransform) -> None:
        self.transform = transform
        self.squared_errors: list[float] = []
        self.squares: list[float] = []
        self.clipped = self.count = 0

    @property
    def quality(self) -> TensorQuality:
        """The errors of what was taken in."""
        return TensorQuality.of_sums(self.squared_errors, self.squares, self.clipped, self.count)

    def add(self, row: int, rows_RC: "torch.Tensor", blocks: "tuple[torch.Tensor, ...]", every: int) -> None:
        """Take in the blocks made of source rows that begin with `row`."""
        import torch

        first = -row % every
        if first >= len(rows_RC):
            return
        index_S = torch.arange(first, len(rows_RC), every)
        weights_SC = rows_RC[index_S].float()
        restored_SC, reach = restore(self.transform, blocks, index_S, rows_RC.shape[1])
        magnitudes_SC = weights_SC.abs()
        # rows are brought near 1 by powers of two, exactly: squares in fp32 are 0 below 1e-22 and inf above 2e19;
        # near 1 they are off by some 2^-24, which the digits that are kept do not show
        exponents_S = [max(-100, min(100, math.frexp(most)[1])) for most in magnitudes_SC.amax(dim=1).tolist()]
        near_one_S1 = torch.tensor([[2.0**-exponent] for exponent in exponents_S])
        back_S = torch.tensor([4.0**exponent for exponent in exponents_S], dtype=torch.float64)
        errors_SC = (weights_SC - restored_SC).mul_(near_one_S1).square_()
        self.squared_errors += (errors_SC.sum(dim=1, dtype=torch.float64) * back_S).tolist()
        self.squares += ((weights_SC * near_one_S1).square_().sum(dim=1, dtype=torch.float64) * back_S).tolist()
        self.clipped += int((magnitudes_SC > reach).sum())
        self.count += weights_SC.numel()
