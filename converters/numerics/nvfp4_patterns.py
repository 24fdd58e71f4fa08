"""NVFP4 codes of bf16 and fp16 weights, found by comparing their bits with bounds.

Without its sign a float is ordered as its bits are. A group's scale is one of 126 local codes, and the quotient of a
weight and a scale passes a midpoint between two E2M1 values at one bit pattern and never falls back behind it. So the
code of a weight is the number of bounds, out of seven, that its pattern lies above, and nothing is divided but for the
tables: once for a global scale, with the arithmetic of `converters.numerics.nvfp4`, which stays the definition.

Four patterns are moved as one word, to rows as long as there are groups: word, group, weight. So every operation is a
few thousand values long, and a group's bound stands above all of its weights.
Shapes: K midpoints, L local codes, N groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from converters.numerics import workspace
from converters.numerics.nvfp4_scales import GROUP, combined, local_scales
from converters.numerics.scales import group_magnitudes
from converters.numerics.workspace import WORKSPACE, Array
from converters.quant.scheme import Arithmetic

# a quotient equal to a midpoint goes to the even code: below the first, above the second, and so on; 0 is for the sign
_MIDPOINTS = (0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_INFINITIES = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_SIGN = 0x8000
_WORDS = GROUP // 4
_FOUR_TIMES = 0x0001_0001_0001_0001
# stands for the local scale of a group that holds NaN or Inf
_NOT_FINITE = 0xFF


@dataclass(frozen=True, slots=True)
class Tables:
    """What follows from a global scale.

    Attributes:
        local: uint8 (32768,), the local scale's code by the pattern of the group's largest magnitude.
        bounds: int64 (7, 128), by midpoint and local code: four times the last pattern that stays below.
    """

    local: Array
    bounds: Array


def suits(weight_RC: torch.Tensor) -> bool:
    """Return whether weights can be looked up."""
    return weight_RC.device.type == "cpu" and weight_RC.dtype in _INFINITIES


@lru_cache(maxsize=16)
def tables_of(global_scale: float, dtype: torch.dtype, arithmetic: Arithmetic) -> Tables | None:
    """Return the tables of a global scale; None where scales or quotients leave the range of fp32."""
    infinity, global_11 = _INFINITIES[dtype], torch.full((1, 1), global_scale)
    patterns_P = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    local_P = local_scales(patterns_P.unsqueeze(1), global_11, arithmetic).view(torch.uint8).view(-1).clone()
    local_P[infinity:] = _NOT_FINITE
    step_L = combined(torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn), global_11, arithmetic).view(-1)
    # the codes of zero and NaN are not used
    step_L[0], step_L[127] = step_L[1], step_L[126]
    if not bool((torch.isfinite(step_L) & (step_L > 0)).all()):
        return None
    bounds_KL = _bounds(patterns_P[:infinity].float(), step_L, dtype)
    if bool(bounds_KL[0].any()):
        return None
    return Tables(local_P.numpy(), (bounds_KL[1:].long() * _FOUR_TIMES).numpy())


def _bounds(values_P: torch.Tensor, step_L: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest patterns whose quotients do not pass a midpoint, int32 (K, L)."""
    middle_K1 = torch.tensor(_MIDPOINTS).unsqueeze(1)
    near_KL = (middle_K1 * step_L).to(dtype).view(torch.int16).int()
    # patterns lie much further apart than the product and the quotient are off
    tried_TKL = near_KL + torch.tensor((-1, 0, 1)).view(3, 1, 1)
    quotient_TKL = values_P[tried_TKL.clamp(0, len(values_P) - 1)] / step_L
    is_even_above_K1 = torch.tensor([number > 0 and number % 2 == 0 for number in range(len(_MIDPOINTS))]).unsqueeze(1)
    stays_TKL = torch.where(is_even_above_K1, quotient_TKL < middle_K1, quotient_TKL <= middle_K1)
    return near_KL - 2 + stays_TKL.sum(dim=0)


def encode(weight_RC: torch.Tensor, tables: Tables, local_RG: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes (R, C / 2) uint8 and local scales (R, C / 16) float8_e4m3fn.

    Args:
        weight_RC: bf16 or fp16.
        tables: of the global scale.
        local_RG: local scales to be used; None: those that make the code of max|w| 6.
    Raises:
        InputError: columns do not divide into groups, or a weight is NaN or Inf.
    """
    rows, columns = weight_RC.shape
    if columns % GROUP:
        group_magnitudes(weight_RC, GROUP)
    # a view by numpy: torch has none where the weight begins within a word
    words_NW = weight_RC.contiguous().view(torch.int16).numpy().reshape(-1).view(np.int64).reshape(-1, _WORDS)
    packed_RB = torch.empty(rows, columns // 2, dtype=torch.uint8)
    packed_NW = packed_RB.numpy().reshape(-1).view(np.int16).reshape(-1, _WORDS)
    is_given = local_RG is not None
    codes_RG = (
        torch.empty(rows, columns // GROUP, dtype=torch.uint8) if local_RG is None else local_RG.view(torch.uint8)
    )
    local_N = codes_RG.view(-1).numpy()
    for part in _group_chunks(len(words_NW)):
        cells, is_negative = _transposed(words_NW[part])
        if not is_given:
            tables.local.take(_largest(cells), out=local_N[part], mode="wrap")
        codes = _codes(cells, local_N[part], tables.bounds)
        np.multiply(is_negative, 8, out=is_negative)
        np.bitwise_or(codes, is_negative, out=codes)
        _pack(codes, packed_NW[part])
    if not is_given and len(local_N) and local_N.max() == _NOT_FINITE:
        group_magnitudes(weight_RC, GROUP)
    return packed_RB, codes_RG.view(torch.float8_e4m3fn)


def _group_chunks(groups: int) -> Iterator[slice]:
    step = max(1, workspace.CHUNK // GROUP)
    for start in range(0, groups, step):
        yield slice(start, min(start + step, groups))


def _transposed(words_NW: Array) -> tuple[Array, Array]:
    """Return patterns without their signs, int16 (W, 4 N), and 1 where a weight is below zero, uint8."""
    groups = len(words_NW)
    words_WN = WORKSPACE.array("patterns", (_WORDS, groups), np.int64)
    np.copyto(words_WN, words_NW.T)
    cells = WORKSPACE.array("patterns", (_WORDS, 4 * groups), np.int16)
    is_negative = WORKSPACE.array("signs", cells.shape, np.bool_)
    np.greater(WORKSPACE.array("patterns", cells.shape, np.uint16), _SIGN, out=is_negative)
    np.bitwise_and(cells, _SIGN - 1, out=cells)
    return cells, WORKSPACE.array("signs", cells.shape, np.uint8)


def _largest(cells: Array) -> Array:
    """Return the largest pattern of each group, int64 (N,)."""
    groups = cells.shape[1] // 4
    np.maximum.reduce(cells, axis=0, out=WORKSPACE.array("largest", (4 * groups,), np.int16))
    # the largest of two, and of two of these, in the highest bits of a word; what is below it decides nothing
    for dtype, bits in ((np.int32, 16), (np.int64, 32)):
        words = WORKSPACE.array("largest", (4 * groups * 16 // (2 * bits),), dtype)
        moved = WORKSPACE.array("moved", words.shape, dtype)
        np.left_shift(words, bits, out=moved)
        np.maximum(words, moved, out=words)
    np.right_shift(words, 48, out=words)
    return words


def _codes(cells: Array, local_N: Array, bounds_KL: Array) -> Array:
    """Return the number of bounds that each pattern lies above, uint8 (W, 4 N)."""
    index_N = WORKSPACE.array("index", local_N.shape, np.intp)
    np.copyto(index_N, local_N)
    bound_N = WORKSPACE.array("bounds", local_N.shape, np.int64)
    bound_cells = WORKSPACE.array("bounds", (4 * len(local_N),), np.int16)
    codes, above = (WORKSPACE.array(name, cells.shape, np.uint8) for name in ("codes", "above"))
    is_above = WORKSPACE.array("above", cells.shape, np.bool_)
    for number, bounds_L in enumerate(bounds_KL):
        bounds_L.take(index_N, out=bound_N, mode="wrap")
        if not number:
            np.greater(cells, bound_cells, out=WORKSPACE.array("codes", cells.shape, np.bool_))
            continue
        np.greater(cells, bound_cells, out=is_above)
        np.add(codes, above, out=codes)
    return codes


def _pack(codes: Array, packed_NW: Array) -> None:
    """Write codes (W, 4 N) as bytes of two, the even column in the low half: int16 (N, W)."""
    groups = len(packed_NW)
    pairs = WORKSPACE.array("codes", (_WORDS, 2 * groups), np.uint16)
    high = WORKSPACE.array("above", pairs.shape, np.uint16)
    np.right_shift(pairs, 4, out=high)
    np.bitwise_or(pairs, high, out=pairs)
    np.copyto(WORKSPACE.array("signs", pairs.shape, np.uint8), pairs, casting="unsafe")
    # a column at a time: numpy takes twice as long for all at once
    for number, packed_N in enumerate(WORKSPACE.array("signs", (_WORDS, groups), np.int16)):
        packed_NW[:, number] = packed_N
