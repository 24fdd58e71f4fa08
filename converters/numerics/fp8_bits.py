"""E4M3 codes of bf16 weights with bf16 scales, read from the bits of the quotient: torch's cast is slower.

|w| / (s 2^120) has the exponent of E4M3 in its own exponent's place, also where E4M3 is subnormal, so its bits are the
code times 2^20. Rounding these to a multiple of 2^20, ties to even, is one addition of a large number, after fp32 has
dropped four bits or less. Dropping bits first would show only if the quotient were closer to a midpoint than 2^-19
without being one. A quotient of two significands a, b below 2^8 is not: its distance to n 2^-k, n < 2^5, is a whole
number divided by 2^k b, and k is at most 11 where the quotient can be near.
"""

import numpy as np
import torch

from converters.numerics.workspace import WORKSPACE, chunk_rows

_SHIFT = 2.0**120
# above these the shifted scale leaves the range of fp32; below, rounding the scale may lift the largest quotient to 464
_SCALES = (2.0**-126, 2.0**7)
_ROUNDER = np.float32(1.5 * 2.0**43)


def suits(weight_OI: torch.Tensor, scale_OG: torch.Tensor) -> bool:
    """Return whether `encode` can make the codes, weights being finite and scales max|w| / 448 or more."""
    is_narrow = weight_OI.dtype is torch.bfloat16 and scale_OG.dtype is torch.bfloat16
    if weight_OI.device.type != "cpu" or not is_narrow or not weight_OI.numel() or weight_OI.stride(1) != 1:
        return False
    # a library may have told the processor to drop subnormal numbers
    keeps_subnormals = np.float32(2.0**-126) * np.float32(0.5) > 0
    if not keeps_subnormals:
        return False
    low, high = scale_OG.aminmax()
    return _SCALES[0] <= float(low) and float(high) <= _SCALES[1]


def encode(weight_OI: torch.Tensor, scale_OG: torch.Tensor, codes_OI: torch.Tensor) -> None:
    """Write the E4M3 codes of weights divided by scales, in fp32; ties round to even, the sign of zero is kept.

    Args:
        weight_OI: bf16, rows may be apart.
        scale_OG: bf16, one for I / G columns.
        codes_OI: uint8.
    """
    columns, groups = weight_OI.shape[1], scale_OG.shape[1]
    step = chunk_rows(columns)
    scales = scale_OG.float().mul_(_SHIFT).unsqueeze(2).split(step)
    for weight_RC, scale_RG1, codes_RC in zip(
        weight_OI.view(torch.int16).split(step), scales, codes_OI.split(step), strict=True
    ):
        shape = (len(weight_RC), columns)
        size_RC = WORKSPACE.take("codes", shape, torch.bfloat16, weight_OI)
        pattern_RC, found_RC = weight_RC.numpy(), codes_RC.numpy()
        np.bitwise_and(pattern_RC, 0x7FFF, out=WORKSPACE.array("codes", shape, np.int16))
        bits_RC = WORKSPACE.take("bits", shape, torch.float32, weight_OI)
        bits_RC.copy_(size_RC)
        WORKSPACE.take("bits", (shape[0], groups, columns // groups), torch.float32, weight_OI).div_(scale_RG1)
        # bits to a number and, rounded, back, all in one place: a second buffer would not stay in the cache
        bits_RC.copy_(WORKSPACE.take("bits", shape, torch.int32, weight_OI))
        rounded_RC = WORKSPACE.array("bits", shape, np.float32)
        np.add(rounded_RC, _ROUNDER, out=rounded_RC)
        codes_RC.copy_(WORKSPACE.take("bits", shape, torch.int32, weight_OI))
        sign_RC = WORKSPACE.array("codes", shape, np.uint8)
        np.less(pattern_RC, 0, out=WORKSPACE.array("codes", shape, np.bool_))
        np.multiply(sign_RC, 0x80, out=sign_RC)
        np.bitwise_or(found_RC, sign_RC, out=found_RC)
