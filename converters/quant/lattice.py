"""The values that codes can have, and for each code the values that round to it: what half a step is, exactly.

Written down from the formats' definitions and not from the code that rounds, which it is there to judge.
Shapes: R rows, C columns of the weight, V codes.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from converters.formats.weights import Coding
from converters.numerics.dequantize import E2M1_MAGNITUDES

_INF = float("inf")


@dataclass(frozen=True, slots=True)
class Lattice:
    """All codes of a format, by their bits.

    Attributes:
        values_V: fp32, what a code stands for, before any scale; NaN for a code that stands for nothing.
        low_V: the least value within half a step of it. The outermost codes take everything beyond them.
        high_V: the largest such value. A code that stands for nothing has low_V above high_V.
        largest: magnitude beyond which a value is clipped.
        ranges: magnitudes that a scale may map the largest weight to, one for each convention in use.
    """

    values_V: torch.Tensor
    low_V: torch.Tensor
    high_V: torch.Tensor
    largest: float
    ranges: tuple[float, ...]


@cache
def lattice_of(coding: Coding, codes_dtype: str, num_bits: int) -> Lattice:
    """Return the lattice of a format.

    Args:
        coding: how codes lie on disk.
        codes_dtype: a dtype of safetensors, which tells E4M3 from int8.
        num_bits: of a code.
    Source: OCP FP8 E4M3 and E2M1; compressed-tensors takes 127.5 and 7.5 as the range of integers, ModelOpt 127.
    """
    if coding in (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR):
        return _lattice([*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES)], 6.0, (6.0,))
    if coding is Coding.SCALED and codes_dtype == "F8_E4M3":
        return _lattice([_e4m3(code) for code in range(256)], 448.0, (448.0,))
    half = 1 << (num_bits - 1)
    if coding is Coding.PACKED_INT:
        integers = [float(code - half) for code in range(2 * half)]
    else:
        integers = [float(code - 2 * half if code >= half else code) for code in range(2 * half)]
    return _lattice(integers, half - 0.5, (half - 0.5, half - 1.0))


def _e4m3(code: int) -> float:
    """Return what an E4M3 byte stands for: 4 bits of exponent with bias 7, 3 of mantissa, no infinity, one NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return sign * magnitude


def _lattice(values: list[float], largest: float, ranges: tuple[float, ...]) -> Lattice:
    # -0.0 and 0.0 are one value with two codes
    distinct = sorted({value for value in values if value == value})
    middles = [(left + right) / 2 for left, right in pairwise(distinct)]
    low = dict(zip(distinct, [-_INF, *middles], strict=True))
    high = dict(zip(distinct, [*middles, _INF], strict=True))
    return Lattice(
        torch.tensor(values, dtype=torch.float32),
        torch.tensor([low.get(value, _INF) for value in values], dtype=torch.float32),
        torch.tensor([high.get(value, -_INF) for value in values], dtype=torch.float32),
        largest,
        ranges,
    )


def code_bits(rows_RB: torch.Tensor, coding: Coding, num_bits: int, columns: int) -> torch.Tensor:
    """Return codes as stored, of any dtype, as their bits: int32 (R, columns), an index into a lattice."""
    bytes_RB = rows_RB.contiguous().view(torch.uint8).view(len(rows_RB), -1)
    if coding is Coding.SCALED or (coding is Coding.PACKED_INT and num_bits == 8):
        return bytes_RB[:, :columns].int()
    pairs_RB2 = torch.stack((bytes_RB & 0xF, bytes_RB >> 4), dim=2)
    return pairs_RB2.view(len(rows_RB), -1)[:, :columns].int()


def look_up(table_V: torch.Tensor, bits_RC: torch.Tensor) -> torch.Tensor:
    """Return table entries for codes, fp32 (R, C)."""
    return table_V.index_select(0, bits_RC.reshape(-1)).view(bits_RC.shape)
