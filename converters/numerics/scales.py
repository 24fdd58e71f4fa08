"""Largest magnitudes, the symmetric scales that follow from them in each arithmetic, and the division by these.

`FLOAT32` and `COMPRESSED_TENSORS` store scales in the weight's dtype, `MODELOPT` in fp32. Every divisor is a tensor:
torch divides by a Python number on a GPU by multiplying with its reciprocal, which gives other last bits.
Shapes: R rows, C columns, G groups of columns that share a scale; O x I the weight, B x D its blocks.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from converters.errors import InputError
from converters.numerics.workspace import WORKSPACE, chunk_rows
from converters.quant.scheme import Arithmetic


def group_magnitudes(weight_RC: torch.Tensor, group: int) -> torch.Tensor:
    """Return max|w| of each group of columns, (R, C / group) in the weight's dtype; group 0 is the row.

    Raises:
        InputError: columns do not divide into groups, or a row holds NaN or Inf.
    """
    rows, columns = weight_RC.shape
    group = group or columns
    if columns % group:
        raise InputError("weight", expected=f"columns that divide by {group}", found=f"{columns} columns")
    # without its sign a float is ordered as its bits are, NaN above all; torch finds maxima of int16 three times faster
    is_narrow = weight_RC.dtype.itemsize == 2
    values_RC = weight_RC.view(torch.int16) if is_narrow else weight_RC
    amax_RG = torch.empty(rows, columns // group, dtype=values_RC.dtype, device=weight_RC.device)
    step = chunk_rows(columns)
    for part_RC, part_RG in zip(values_RC.split(step), amax_RG.split(step), strict=True):
        size_RC = WORKSPACE.take("magnitudes", tuple(part_RC.shape), values_RC.dtype, weight_RC)
        if is_narrow:
            torch.bitwise_and(part_RC, 0x7FFF, out=size_RC)
        else:
            torch.abs(part_RC, out=size_RC)
        torch.amax(size_RC.view(len(part_RC), columns // group, group), dim=2, out=part_RG)
    return _finite(amax_RG.view(weight_RC.dtype))


def _finite(amax_RG: torch.Tensor) -> torch.Tensor:
    # one NaN or Inf makes the maximum of all NaN or Inf
    if amax_RG.numel() and not bool(torch.isfinite(amax_RG.max())):
        row = int((~torch.isfinite(amax_RG)).any(dim=1).nonzero()[0])
        raise InputError(f"row {row}", expected="finite weights", found="NaN or Inf")
    return amax_RG


def block_magnitudes(weight_OI: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return max|w| of each block, (ceil(O / rows), ceil(I / columns)) in the weight's dtype.

    Raises:
        InputError: a weight is NaN or Inf.
    """
    parts = [group_magnitudes(weight_OI[:, part], group) for part, group in column_parts(weight_OI.shape[1], columns)]
    amax_OD = torch.cat(parts, dim=1)
    padded_OD = F.pad(amax_OD, (0, 0, 0, -len(amax_OD) % rows))
    return padded_OD.unflatten(0, (-1, rows)).amax(dim=1)


def column_parts(columns: int, group: int) -> Iterator[tuple[slice, int]]:
    """Yield ranges of columns, each with the size of its groups: those that are whole, then the one that is cut off."""
    whole = columns // group * group
    if whole:
        yield slice(0, whole), group
    if whole < columns:
        yield slice(whole, columns), columns - whole


def symmetric_scales(amax: torch.Tensor, largest_code: float, arithmetic: Arithmetic) -> torch.Tensor:
    """Return amax / largest_code; codes * scales approximates the weight.

    Args:
        amax: in the weight's dtype, of any shape.
        largest_code: code of amax: 448 for E4M3, 127.5 or 127 for int8.
        arithmetic: FLOAT32 and COMPRESSED_TENSORS give the weight's dtype (fp32 for fp16 in FLOAT32), and machine
            epsilon instead of a scale of zero; MODELOPT gives fp32, and 1 where all weights are zero.
    """
    if arithmetic is Arithmetic.MODELOPT:
        # their export replaces zero by the largest code and keeps away from subnormals of the weight's dtype
        positive = torch.where(amax == 0, largest_code, amax).clamp(min=torch.finfo(amax.dtype).tiny).float()
        return positive / torch.full_like(positive, largest_code)
    # fp16 has no room for the scale of a small row: its maximum divided by 448 is subnormal or zero
    if arithmetic is Arithmetic.FLOAT32 and amax.dtype is torch.float16:
        amax = amax.float()
    scale = amax / torch.full_like(amax, largest_code)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def scaled_chunks(
    weight_RC: torch.Tensor, scale_RG: torch.Tensor, arithmetic: Arithmetic, *, multiply: bool = False
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a range of rows and weight / scale of these, (r, C), in a buffer that may be changed and is used again.

    Args:
        weight_RC: unchanged.
        scale_RG: one for C / G columns.
        arithmetic: COMPRESSED_TENSORS divides in the weight's dtype, the others in fp32.
        multiply: weight * scale instead.
    """
    columns, groups = weight_RC.shape[1], scale_RG.shape[1]
    dtype = weight_RC.dtype if arithmetic is Arithmetic.COMPRESSED_TENSORS else torch.float32
    step = chunk_rows(columns)
    scales = scale_RG.unsqueeze(2).to(dtype).split(step)
    for number, (part_RC, scale_RG1) in enumerate(zip(weight_RC.split(step), scales, strict=True)):
        scaled_RC = WORKSPACE.take("scaled", tuple(part_RC.shape), dtype, weight_RC).copy_(part_RC)
        scaled_RGC = scaled_RC.view(len(part_RC), groups, columns // groups)
        if multiply:
            scaled_RGC.mul_(scale_RG1)
        else:
            scaled_RGC.div_(scale_RG1)
        if arithmetic is Arithmetic.COMPRESSED_TENSORS:
            # their symmetric zero point is added before rounding; it turns a negative zero into a positive one
            scaled_RC.add_(0.0)
        yield slice(number * step, number * step + len(part_RC)), scaled_RC
