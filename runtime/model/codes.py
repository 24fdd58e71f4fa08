"""FP8 codes to fp32 by their bits, which on a CPU takes a thirtieth of the time of a conversion and a product.

Shapes: O out features, I in features.
"""

import numpy as np
import torch

_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
# of all bits but the sign, in both: the pattern of NaN, and those of fp16 that E4M3 has
_NAN_CODE, _NO_HIGHEST_EXPONENT = 0x7F, ~0x4000
# fp16 has twice the range of exponents, and its bias is 8 more
_MANTISSA_SHIFT, _BIAS_FACTOR = 7, 256.0
# above it, a scale times the factor of the bias might overflow where a code times the scale does not
_LARGEST_SCALE = 2.0**100
# codes that are taken at a time, so that all steps find them in the cache
_BLOCK_CODES = 1 << 18


def multiply_out(codes_OI: torch.Tensor, scale_O1: torch.Tensor, out_OI: torch.Tensor | None = None) -> torch.Tensor:
    """Return codes * scales in fp32, (O, I), with the bits of `dequantize_channel`; NaN stays NaN.

    Args:
        codes_OI: float8_e4m3fn on the CPU, contiguous.
        scale_O1: a scale for each row.
        out_OI: fp32, takes the result.
    """
    if out_OI is None:
        out_OI = torch.empty(codes_OI.shape, dtype=torch.float32)
    if not codes_OI.numel():
        return out_OI
    scale_O1 = scale_O1.float()
    step = max(1, _BLOCK_CODES // codes_OI.shape[1])
    halves_RI = torch.empty(step, codes_OI.shape[1], dtype=torch.int16)
    # fp16 reads a code moved into its place as 2^-8 of the value, subnormal ones too, and products by 2^8 are exact
    is_in_range = bool((scale_O1.abs() < _LARGEST_SCALE).all())
    for start in range(0, len(codes_OI), step):
        rows = slice(start, start + step)
        codes_RI, part_RI, scale_R1 = codes_OI[rows], out_OI[rows], scale_O1[rows]
        if not is_in_range or _has_nan(codes_RI):
            # no index of a byte is out of bounds; the default mode would go through a copy
            np.take(_VALUES, codes_RI.view(torch.uint8).numpy(), out=part_RI.numpy(), mode="clip")
            part_RI.mul_(scale_R1)
            continue
        bits_RI = halves_RI[: len(codes_RI)].copy_(codes_RI.view(torch.int8))
        # the sign is extended: it is left in the highest bit, and taken out of the one below
        bits_RI.bitwise_left_shift_(_MANTISSA_SHIFT).bitwise_and_(_NO_HIGHEST_EXPONENT)
        part_RI.copy_(bits_RI.view(torch.float16)).mul_(scale_R1 * _BIAS_FACTOR)
    return out_OI


def _has_nan(codes_RI: torch.Tensor) -> bool:
    return int((codes_RI.view(torch.uint8).numpy() & _NAN_CODE).max()) == _NAN_CODE
