"""The local scale of each NVFP4 group that leaves the smallest squared error, among neighbours of the usual one.

Shapes: N groups of 16 weights, laid out as (16, N), so that every operation runs along all groups.
"""

import torch

from converters.numerics.workspace import WORKSPACE, row_chunks

GROUP = 16
# codes of E4M3 around that of amax / 6: 0.8 to 1.75 times it. Four over six is +4; +2 and those further away win in
# 0.3 % of the groups and make no difference to the error
OFFSETS = (4, 5, -1, 1, 3, 6, -2)
# a candidate has to be better than this, so that it is better whatever rounding does here and in dequantizing: a scaled
# weight t <= 8 is off by 2**-22 t, near a tie that shows twice, so d = t - code by less than e = 6e-6. Then sum(d^2) is
# off by less than 8 e sqrt(sum(d^2)) + 16 e^2 <= 2**-10 sum(d^2) + 2**-20 on either side, each in units of its own
# scale; these differ by less than 1.3 among normal numbers and by 3, squared 9, between the codes 3 and 1
RELATIVE, ABSOLUTE = 1 + 2.0**-8, 2.0**-16
_LARGEST_CODE = 0x7E
# more values at once than elsewhere: there are many short operations along the groups
_CHUNK = 1 << 18


def search_scales(weight_RC: torch.Tensor, local_RG: torch.Tensor, divisor_11: torch.Tensor) -> torch.Tensor:
    """Return E4M3 local scales (R, G); the error of no group is larger than with the given ones.

    Args:
        weight_RC: (R, C) bf16, fp16 or fp32.
        local_RG: E4M3, the code of max|w| being 6.
        divisor_11: fp32, what a local scale is divided by.
    """
    best_RG = torch.empty_like(local_RG)
    for part in row_chunks(len(weight_RC), weight_RC.shape[1], size=_CHUNK):
        weight_NC = weight_RC[part].reshape(-1, GROUP)
        size_CN = WORKSPACE.take("sizes", (GROUP, len(weight_NC)), torch.float32, weight_RC)
        size_CN.copy_(weight_NC.t()).abs_().mul_(divisor_11)
        code_N = _search(size_CN, local_RG[part].reshape(-1).view(torch.uint8).int())
        best_RG[part] = code_N.to(torch.uint8).view(torch.float8_e4m3fn).view(-1, local_RG.shape[1])
    return best_RG


def _search(size_CN: torch.Tensor, start_N: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 codes (N,) of the best scales of |weights|, around the given codes."""
    offset_K1 = torch.tensor((0, *OFFSETS), dtype=torch.int32, device=start_N.device).unsqueeze(1)
    code_KN = (start_N + offset_K1).clamp_(1, _LARGEST_CODE)
    # moved to the place of the fp32 exponent, a code is its value, subnormal or not, but for the bias of 120
    scale_KN = code_KN.bitwise_left_shift_(20).view(torch.float32).mul_(2.0**120)
    error_KN = _errors(size_CN, scale_KN.reciprocal())
    error_KN[1:].mul_(RELATIVE).add_(ABSOLUTE)
    # a positive float is ordered as its bits are; the lowest four say by how much the code differs
    key_KN = error_KN.mul_(scale_KN).mul_(scale_KN).view(torch.int32).bitwise_and_(~15).bitwise_or_(offset_K1 & 15)
    best_N = key_KN[0]
    for key_N in key_KN[1:]:
        torch.minimum(best_N, key_N, out=best_N)
    return best_N.bitwise_left_shift_(28).bitwise_right_shift_(28).add_(start_N).clamp_(1, _LARGEST_CODE)


def _errors(size_CN: torch.Tensor, inverse_KN: torch.Tensor) -> torch.Tensor:
    """Return the squared errors (K, N) that scales leave, in units of the scale, summed in one order whatever N is."""
    scaled_CN, value_CN, power_CN = (
        WORKSPACE.take(name, size_CN.shape, torch.float32, size_CN) for name in ("scaled", "values", "powers")
    )
    value_bits_CN, power_bits_CN = value_CN.view(torch.int32), power_CN.view(torch.int32)
    (low_8, high_8), (low_4, high_4), (low_2, high_2) = (value_CN[: 2 * n].split(n) for n in (8, 4, 2))
    error_KN = torch.empty_like(inverse_KN)
    for inverse_N, error_N in zip(inverse_KN.unbind(), error_KN.unbind(), strict=True):
        torch.mul(size_CN, inverse_N, out=scaled_CN)
        torch.clamp(scaled_CN, max=6.0, out=value_CN)
        # rounded to E2M1 as in `converters.numerics.nvfp4.encode_pairs`
        torch.bitwise_and(value_bits_CN, 0x7F800000, out=power_bits_CN)
        power_CN.clamp_(min=1.0)
        value_CN.add_(power_CN, alpha=2.0**22).sub_(power_CN, alpha=2.0**22).sub_(scaled_CN)
        value_CN.mul_(value_CN)
        torch.add(low_8, high_8, out=low_8)
        torch.add(low_4, high_4, out=low_4)
        torch.add(low_2, high_2, out=low_2)
        torch.add(value_CN[0], value_CN[1], out=error_N)
    return error_KN
