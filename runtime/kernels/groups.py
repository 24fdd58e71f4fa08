"""FP8 and int8 codes of weights whose scale belongs to a run of columns, to a row, or to all of them.

Shapes: G groups, W columns of a tile; O x I the weight.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from converters.numerics.fp8 import E4M3_MAX
from converters.quant.scheme import Arithmetic
from runtime.kernels.launch import Launch, Rules, as_stored
from runtime.kernels.numbers import e4m3_bits, int8_bits, magnitude, narrow, rounded, symmetric_scale, widen

# weights that a program holds at once: 32 for a thread
TILE = 4096


@triton.jit(do_not_specialize=["num_groups", "scale"])
def quantize_groups(
    weight_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_groups: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    PITCH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_MODELOPT: tl.constexpr,
    IS_NARROW: tl.constexpr,
    IS_POSITIVE_ZERO: tl.constexpr,
    IS_INT8: tl.constexpr,
    FLIPPED: tl.constexpr,
) -> None:
    """Write the codes of groups of SIZE weights each, PITCH bytes apart, and their scales unless one is given.

    Bytes of codes are exclusive-or-ed with FLIPPED, and those between the groups are 0.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    group_G = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    is_group_G1 = (group_G < num_groups)[:, None]
    column_W = tl.arange(0, WIDTH)[None, :]
    start_G1 = group_G[:, None] * SIZE
    if HAS_SCALE:
        scale_G = tl.full((GROUPS,), 1.0, tl.float32) * scale
    else:
        size_GW = tl.zeros((GROUPS, WIDTH), tl.int32)
        for first in range(0, SIZE, WIDTH):
            column = column_W + first
            weight_GW = tl.load(weight_ptr + start_G1 + column, mask=is_group_G1 & (column < SIZE), other=0)
            size_GW = tl.maximum(size_GW, magnitude(widen(weight_GW)))
        scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
        scale_G = symmetric_scale(tl.max(size_GW, axis=1), LARGEST, LEAST, IS_MODELOPT, scale_dtype)
        tl.store(scale_ptr + group_G, narrow(scale_G, scale_dtype), mask=group_G < num_groups)
    # the last tile reaches to the end of a word
    for first in range(0, SIZE, WIDTH):
        column = column_W + first
        is_weight = is_group_G1 & (column < SIZE)
        weight_GW = widen(tl.load(weight_ptr + start_G1 + column, mask=is_weight, other=0))
        scaled_GW = tl.div_rn(weight_GW, tl.broadcast_to(scale_G[:, None], (GROUPS, WIDTH)))
        if IS_NARROW:
            scaled_GW = rounded(scaled_GW, dtype)
        if IS_POSITIVE_ZERO:
            scaled_GW = scaled_GW + 0.0
        code_GW = int8_bits(scaled_GW) if IS_INT8 else e4m3_bits(scaled_GW)
        code_GW = tl.where(is_weight, code_GW ^ FLIPPED, 0)
        is_code = is_group_G1 & (column < PITCH)
        tl.store(codes_ptr + group_G[:, None] * PITCH + column, code_GW.to(tl.uint8), mask=is_code)


@dataclass(frozen=True, slots=True)
class Codes:
    """What codes a launch of `quantize_groups` makes.

    Attributes:
        largest: code of the largest weight.
        is_int8: int8, else E4M3.
        flipped: bits of each that are turned over.
        word: bytes of a word: those that a row of codes leaves free are 0.
    """

    largest: float
    is_int8: bool = False
    flipped: int = 0
    word: int = 1


E4M3 = Codes(E4M3_MAX)


def fp8_channel(weight_OI: torch.Tensor, arithmetic: Arithmetic) -> Launch:
    """Return what makes codes (O, I) float8_e4m3fn and scales (O, 1); twin: `fp8.quantize_channel`."""
    codes_OI, scale_O1, launch = _groups(weight_OI, E4M3, Rules(arithmetic, weight_OI.dtype), 0)
    return replace(launch, outputs=(codes_OI.view(torch.float8_e4m3fn), scale_O1))


def fp8_tensor(weight_OI: torch.Tensor, scale_11: torch.Tensor, arithmetic: Arithmetic) -> Launch:
    """Return what makes codes (O, I) float8_e4m3fn for a scale on the CPU (1, 1); twin: `fp8.quantize_tensor`."""
    rules = Rules(arithmetic, weight_OI.dtype)
    codes_OI, _, launch = _groups(weight_OI, E4M3, rules, 0, float(scale_11))
    # being a scalar there, the scale leaves modelopt's quotient in the weight's dtype
    constants = {**launch.constants, "IS_NARROW": arithmetic is not Arithmetic.FLOAT32}
    return replace(launch, constants=constants, outputs=(codes_OI.view(torch.float8_e4m3fn), scale_11))


def int8(weight_RC: torch.Tensor, arithmetic: Arithmetic, group: int = 0, *, is_packed: bool = False) -> Launch:
    """Return what makes int8 codes (R, C), or int32 words (R, ceil(C / 4)), and scales (R, C / group) or (R, 1).

    Twins: `int8.quantize_int8`, `int8.pack_int32`.
    """
    largest = 127.0 if arithmetic is Arithmetic.MODELOPT else 127.5
    codes = Codes(largest, is_int8=True, flipped=0x80, word=4) if is_packed else Codes(largest, is_int8=True)
    codes_RC, scale_RG, launch = _groups(weight_RC, codes, Rules(arithmetic, weight_RC.dtype), group)
    return replace(launch, outputs=(codes_RC.view(torch.int32 if is_packed else torch.int8), scale_RG))


def _groups(
    weight_RC: torch.Tensor, codes: Codes, rules: Rules, group: int, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """Return bytes of codes (R, C or more), scales (R, C / group), and what fills them; group 0 is the row."""
    rows, columns = weight_RC.shape
    size = group or columns
    # whole groups stand side by side; only behind a row there may be bytes to spare
    pitch = size if group else -(-columns // codes.word) * codes.word
    width = min(TILE, triton.next_power_of_2(pitch))
    codes_RC = torch.empty(rows, columns // size * pitch, dtype=torch.uint8, device=weight_RC.device)
    scale_RG = rules.new_scales((rows, columns // size), weight_RC.device)
    num_groups = scale_RG.numel()
    constants = {
        "SIZE": size,
        "PITCH": pitch,
        "GROUPS": TILE // width,
        "WIDTH": width,
        "HAS_SCALE": scale is not None,
        "IS_NARROW": rules.is_narrow,
        "IS_POSITIVE_ZERO": rules.is_positive_zero,
        "IS_INT8": codes.is_int8,
        "FLIPPED": codes.flipped,
        **rules.constants(codes.largest),
    }
    arguments = (as_stored(weight_RC), codes_RC, as_stored(scale_RG), num_groups, 0.0 if scale is None else scale)
    programs = triton.cdiv(num_groups, TILE // width)
    return codes_RC, scale_RG, Launch(quantize_groups, programs, arguments, constants, ())
