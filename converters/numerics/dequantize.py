"""Codes and scales back to weights, in fp32.

Every product is computed once: code times scale, and for NVFP4 code times the product (or quotient) of its two scales,
in that order, as compressed-tensors and ModelOpt do it. The caller rounds once, to the dtype it writes.
Shapes: R rows, C columns of the weight, G groups of columns that share a scale; C / G is the size of a group.
Source: compressed-tensors 0.20 `decompress` of each format and ModelOpt's `dequantize`; compared in tests.
"""

from functools import cache

import torch

# magnitude of an E2M1 code by its lower three bits; the fourth is the sign
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES))
# 4-bit integers are stored as code + 8
_INT4 = tuple(float(code) for code in range(-8, 8))


def decode(codes_RC: torch.Tensor) -> torch.Tensor:
    """Return codes of a byte each, E4M3 or int8, as fp32 (R, C)."""
    if codes_RC.dtype is not torch.float8_e4m3fn or codes_RC.numel() % 2 or not codes_RC.is_contiguous():
        return codes_RC.float()
    # looking up two codes at a time is ten times faster than the conversion of torch 2.13
    pairs = codes_RC.view(torch.uint8).view(-1).view(torch.uint16).int()
    return _e4m3_pairs().index_select(0, pairs).view(torch.float32).view(codes_RC.shape)


@cache
def _e4m3_pairs() -> torch.Tensor:
    """Return (65536,) int64: for each two bytes, the low one first, the bits of their two fp32 values."""
    values_V = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return _bits(torch.stack((values_V.repeat(256), values_V.repeat_interleave(256)), dim=1))


def _bits(pairs_VP: torch.Tensor) -> torch.Tensor:
    """Return two fp32 values as one int64: a lookup moves 8 bytes at once."""
    return pairs_VP.contiguous().view(torch.int64).view(-1)


def scale_groups(values_RC: torch.Tensor, scale_RG: torch.Tensor, group: int) -> torch.Tensor:
    """Multiply fp32 values (R, C) in place with the scale of their group of columns, and return them.

    Args:
        values_RC: contiguous.
        scale_RG: one scale for `group` columns, the last group may be cut off; or G = 1, one for the row.
        group: columns that share a scale.
    """
    scale_RG = scale_RG.float()
    rows, columns = values_RC.shape
    if scale_RG.shape[1] == 1:
        return values_RC.mul_(scale_RG)
    if columns % group == 0:
        values_RC.view(rows, -1, group).mul_(scale_RG.unsqueeze(2))
        return values_RC
    return values_RC.mul_(scale_RG.repeat_interleave(group, dim=1)[:, :columns])


def unpack_int32(words_RW: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """Return the signed codes in int32 words as fp32 (R, columns): 8- or 4-bit, low bits first, offset binary."""
    rows = len(words_RW)
    data_RB = words_RW.contiguous().view(torch.uint8).view(rows, -1)
    if num_bits == 4:
        return _decode_nibbles(data_RB, _INT4)[:, :columns].contiguous()
    return data_RB[:, :columns].float().sub_(1 << (num_bits - 1))


def unpack_e2m1(codes_RB: torch.Tensor) -> torch.Tensor:
    """Return the values of E2M1 codes as fp32 (R, 2 B): two in a byte, the even column in the low nibble."""
    return _decode_nibbles(codes_RB, _E2M1)


def _decode_nibbles(data_RB: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """Return fp32 (R, 2 B): each nibble's value, the low one first."""
    found_N = _nibble_pairs(values).index_select(0, data_RB.reshape(-1).int())
    return found_N.view(torch.float32).view(len(data_RB), -1)


@cache
def _nibble_pairs(values: tuple[float, ...]) -> torch.Tensor:
    """Return (256,) int64: the bits of the two fp32 values that each byte stands for."""
    values_V, byte_N = torch.tensor(values), torch.arange(256)
    return _bits(torch.stack((values_V[byte_N & 0xF], values_V[byte_N >> 4]), dim=1))


def dequantize_nvfp4(
    codes_RB: torch.Tensor, scale_RG: torch.Tensor, global_R1: torch.Tensor, *, divides: bool
) -> torch.Tensor:
    """Return NVFP4 weights as fp32 (R, 2 B).

    Args:
        codes_RB: uint8, two codes in each.
        scale_RG: E4M3, one for 16 columns.
        global_R1: fp32, the tensor's scale for each row.
        divides: compressed-tensors' `weight_global_scale` divides the local scale, ModelOpt's `weight_scale_2`
            multiplies it.
    """
    local_RG = scale_RG.float()
    combined_RG = local_RG / global_R1.float() if divides else local_RG * global_R1.float()
    values_RC = unpack_e2m1(codes_RB)
    return scale_groups(values_RC, combined_RG, values_RC.shape[1] // combined_RG.shape[1])
