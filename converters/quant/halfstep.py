"""One block of weights against the codes made of it: is every element within half a step, and every scale right?

A writer divides by the stored scale and rounds the quotient once, to the nearest code. So the quotient, computed here
in fp32 from the source and the scale on disk, lies between the midpoints on both sides of the code. What the fp32
operations of a writer round (a division, or the reciprocal of a scale and a product) is below `SLACK` of the quotient.
Writers that compute in the weight's own 16-bit dtype round the quotient to it first: then that rounded quotient lies
between the midpoints. Nothing else is granted, so that a code that is off by one is seen wherever it is.

A scale is the largest magnitude of what shares it, divided by the format's range, rounded to the stored dtype.
Shapes: R rows, C columns, G groups of columns that share a scale.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import torch

from converters.quant.lattice import Lattice, look_up

# three fp32 roundings at most, of half a unit in the last place each
SLACK = 2.0**-22
# unit roundoff of the dtypes that weights and scales have
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
E4M3_MAX = 448.0
# what writers store for a scale that rounds to zero, besides the machine epsilon of its dtype
_TINY_E4M3 = (0.125, 2.0**-9)
# how far a search for the least error goes, in E4M3 codes from the one that maps the largest magnitude to 6: from 0.8
# to 1.8 of it, as llm-compressor's; twice as much would be 8 codes above
_SEARCH_BELOW, _SEARCH_ABOVE = 3, 7
_LARGEST_E4M3_CODE = 0x7E


class Division(StrEnum):
    """How the quotient was rounded before it became a code."""

    FLOAT32 = "float32"
    WEIGHT_DTYPE = "weight dtype"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a source and what a quantizer made of them.

    Attributes:
        source_RC: weights in the source's dtype.
        bits_RC: codes, see `lattice.code_bits`.
        scale_RG: fp32, what a code is multiplied with, one for `group` columns; G = 1: one for the row.
        group: columns that share a scale.
    """

    source_RC: torch.Tensor
    bits_RC: torch.Tensor
    scale_RG: torch.Tensor
    group: int


@dataclass(frozen=True, slots=True)
class Judged:
    """What a block's elements are like.

    Attributes:
        outside_RC: elements that are not within half a step.
        clipped: elements beyond the range of the format.
        sums_R3: fp64, by row: of squared weights, of squared errors, of weights times their decoded values.
        decoded_RC: fp32, codes times scales.
    """

    outside_RC: torch.Tensor
    clipped: int
    sums_R3: torch.Tensor
    decoded_RC: torch.Tensor


def judge_block(block: Block, lattice: Lattice, division: Division) -> Judged:
    """Return which elements are farther than half a step from their source, and the sums that errors come from."""
    source_RC = block.source_RC.float()
    scale_RC = spread(block.scale_RG, block.group, source_RC.shape[1])
    quotient_RC = source_RC / scale_RC
    if division is Division.WEIGHT_DTYPE:
        quotient_RC = quotient_RC.to(block.source_RC.dtype).float()
        slack_RC = torch.zeros(())
    else:
        slack_RC = quotient_RC.abs() * SLACK
    low_RC, high_RC = look_up(lattice.low_V, block.bits_RC), look_up(lattice.high_V, block.bits_RC)
    # written so that NaN is never inside
    inside_RC = (quotient_RC >= low_RC - slack_RC) & (quotient_RC <= high_RC + slack_RC)
    decoded_RC = look_up(lattice.values_V, block.bits_RC).mul_(scale_RC)
    return Judged(
        ~inside_RC,
        int((quotient_RC.abs() > lattice.largest).sum()),
        row_sums(source_RC, decoded_RC),
        decoded_RC,
    )


def row_sums(source_RC: torch.Tensor, decoded_RC: torch.Tensor) -> torch.Tensor:
    """Return by row the sums of squared weights, of squared errors and of products, fp64 (R, 3)."""
    products = source_RC.square(), (decoded_RC - source_RC).square_(), source_RC * decoded_RC
    return torch.stack([product.sum(dim=1, dtype=torch.float64) for product in products], dim=1)


def spread(scale_RG: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Return scales of groups of columns as scales of columns, (R, C) or (R, 1)."""
    if scale_RG.shape[1] == 1:
        return scale_RG
    return scale_RG.repeat_interleave(group, dim=1)[:, :columns]


def group_amax(source_RC: torch.Tensor, group: int, rows: int = 1) -> torch.Tensor:
    """Return the largest magnitude of each group of columns, fp32 (R / rows, G); group 0: of the whole row.

    Args:
        source_RC: weights.
        group: columns that share a scale.
        rows: rows that share it too; the last ones may be fewer.
    """
    amax_RC = source_RC.abs().float()
    columns = amax_RC.shape[1]
    group = group or columns
    if columns % group:
        amax_RC = torch.nn.functional.pad(amax_RC, (0, group - columns % group))
    amax_RG = amax_RC.view(len(amax_RC), -1, group).amax(dim=2)
    if rows > 1:
        if len(amax_RG) % rows:
            amax_RG = torch.nn.functional.pad(amax_RG, (0, 0, 0, rows - len(amax_RG) % rows))
        amax_RG = amax_RG.view(-1, rows, amax_RG.shape[1]).amax(dim=1)
    return amax_RG


def wrong_scales(
    amax_SG: torch.Tensor, scale_SG: torch.Tensor, ranges: tuple[float, ...], least: float = 0.0
) -> torch.Tensor:
    """Return which stored scales are not their group's largest magnitude by the range, rounded to their dtype.

    Args:
        amax_SG: fp32, largest magnitudes of the source.
        scale_SG: as stored, in its dtype.
        ranges: see `Lattice.ranges`.
        least: what smaller magnitudes may be raised to, as ModelOpt does with subnormals of the weight's dtype.
    """
    stored_SG = scale_SG.float()
    tiniest = torch.finfo(scale_SG.dtype).smallest_normal
    right_SG = (amax_SG == 0) & (stored_SG > 0)
    raised_SG = amax_SG.clamp(min=least)
    for limit, largest_SG in product(ranges, (amax_SG, raised_SG)):
        ideal_SG = largest_SG.double() / limit
        low_SG, high_SG = ((ideal_SG * (1 + by)).to(scale_SG.dtype).float() for by in (-SLACK, SLACK))
        right_SG |= (stored_SG >= low_SG) & (stored_SG <= high_SG) & (stored_SG > 0)
        # too small for the dtype: its machine epsilon stands for it
        right_SG |= (ideal_SG < tiniest) & (stored_SG == torch.finfo(scale_SG.dtype).eps)
    return ~(right_SG & torch.isfinite(stored_SG))


def wrong_local_scales(
    amax_RG: torch.Tensor, local_RG: torch.Tensor, factor: torch.Tensor, roundoff: float, *, searched: bool
) -> torch.Tensor:
    """Return which local scales of NVFP4 are not what their group's largest magnitude makes them.

    Args:
        amax_RG: fp32, largest magnitudes of the source's groups of 16.
        local_RG: E4M3, as stored.
        factor: fp32, the tensor's scale as a factor: 1 / weight_global_scale, or weight_scale_2; one element.
        roundoff: of the dtype that the writer may have computed in; it rounds twice before it rounds to E4M3.
        searched: allow what a search for the least error may choose.
    """
    stored_RG = local_RG.float()
    ideal_RG = amax_RG.double() / 6.0 / factor.double()
    # codes of positive E4M3 values are in the order of the values
    low_RG, high_RG = (_e4m3_code(ideal_RG * (1 + by * (2 * roundoff + SLACK))) for by in (-1, 1))
    rounds_to_zero_RG = low_RG == 0
    if searched:
        low_RG = (low_RG - _SEARCH_BELOW).clamp_(min=1)
        high_RG = (high_RG + _SEARCH_ABOVE).clamp_(max=_LARGEST_E4M3_CODE)
    code_RG = local_RG.view(torch.uint8).int()
    right_RG = (code_RG >= low_RG) & (code_RG <= high_RG) & (stored_RG > 0)
    for tiny in _TINY_E4M3:
        right_RG |= rounds_to_zero_RG & (stored_RG == tiny)
    right_RG |= (amax_RG == 0) & (stored_RG > 0)
    # the sign bit makes a scale negative or a NaN; both fail the comparisons above
    return ~right_RG


def _e4m3_code(values: torch.Tensor) -> torch.Tensor:
    codes = values.float().clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).int()


def is_right_tensor_scale(amax: float, factor: float, limit: float, roundoff: float) -> bool:
    """Return whether a scale for a whole tensor maps a largest magnitude to the format's range.

    Args:
        amax: largest magnitude of all weights that share it.
        factor: the scale, as a factor.
        limit: the range: 448 for E4M3, 2688 for NVFP4.
        roundoff: of the dtype that it was computed in or is stored in; it is rounded at most twice.
    """
    if amax == 0:
        return factor > 0
    return abs(factor * limit / amax - 1) <= 2 * roundoff + roundoff**2 + SLACK
