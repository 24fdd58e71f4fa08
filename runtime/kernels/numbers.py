"""Number formats inside kernels, in fp32 and integer arithmetic alone.

bf16 and E4M3 go in and out as integers: the interpreter truncates where it casts to them, hardware below sm_89 has no
E4M3, and with one path for all, what is tested without a GPU is what runs on one. Kernels divide by `tl.div_rn`, since
`/` is an approximation on a GPU, and are launched without fusion of products and sums.
"""

import triton
import triton.language as tl

# bits of fp32: all but the sign, the exponent alone, infinity, and 448, the largest value of E4M3
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_INFINITE = tl.constexpr(0x7F800000)
_E4M3_MAX = tl.constexpr(0x43E00000)
# 2^-6, below which E4M3 is subnormal
_E4M3_NORMAL = tl.constexpr(121 << 23)
# adding a number rounds to its last place: of 2^14 that is the distance of subnormal E4M3, of 2^22 the one of E2M1
# below 2, of 1.5 x 2^23 it is 1
_BITS_OF_2_14 = tl.constexpr(141 << 23)
_BITS_OF_2_22 = tl.constexpr(149 << 23)
_BITS_OF_3_2_22 = tl.constexpr(0x4B400000)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """Return the fp32 values of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value: tl.tensor) -> tl.tensor:
    """Return the int32 bits of fp32 values."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def widen(value: tl.tensor) -> tl.tensor:
    """Return weights as fp32; int16 are the bits of bf16."""
    return float_of(value.to(tl.int32) << 16) if value.dtype == tl.int16 else value.to(tl.float32)


@triton.jit
def rounded(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 values rounded to a dtype, as fp32; ties to even, int16 standing for bf16, NaN not expected."""
    if dtype == tl.int16:
        bits = bits_of(value)
        # up to the next bf16 unless below the middle; infinity stays, having no bits there
        value = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
    elif dtype == tl.float16:
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 values that a dtype holds as that dtype; int16: the bits of bf16."""
    return (bits_of(value) >> 16).to(tl.int16) if dtype == tl.int16 else value.to(dtype)


@triton.jit
def magnitude(value: tl.tensor) -> tl.tensor:
    """Return the bits of |x|: ordered as the values are, infinity and then NaN above all."""
    return bits_of(value) & _MAGNITUDE


@triton.jit
def e4m3_bits(value: tl.tensor) -> tl.tensor:
    """Return the E4M3 codes of fp32 values as int32; ties to even, saturating at 448, NaN not expected.

    Source: `fp8e4m3fn_from_fp32_value` of torch.
    """
    size = tl.minimum(magnitude(value), _E4M3_MAX)
    small = bits_of(float_of(size) + 16384.0) - _BITS_OF_2_14
    # exponents of E4M3 begin 120 above those of fp32, and 20 bits of the mantissa go
    large = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    return tl.where(size < _E4M3_NORMAL, small, large) | ((bits_of(value) >> 24) & 0x80)


@triton.jit
def e4m3_value(code: tl.tensor) -> tl.tensor:
    """Return the fp32 values of positive E4M3 codes, int32."""
    normal = float_of((code << 20) + (120 << 23))
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def int8_bits(value: tl.tensor) -> tl.tensor:
    """Return fp32 values as whole numbers from -128 to 127, int32; ties to even."""
    return bits_of(tl.minimum(tl.maximum(value, -128.0), 127.0) + 12582912.0) - _BITS_OF_3_2_22


@triton.jit
def e2m1_power(size: tl.tensor) -> tl.tensor:
    """Return the power of two at or below fp32 values >= 0, at least 1: their distance in E2M1, doubled."""
    return tl.maximum(float_of(bits_of(size) & _EXPONENT), 1.0)


@triton.jit
def e2m1_bits(value: tl.tensor) -> tl.tensor:
    """Return the E2M1 codes of fp32 values as int32; ties to even, saturating at 6, -0 being +0.

    Source: `converters.numerics.nvfp4.encode_pairs`, which says why this is right.
    """
    size = tl.minimum(float_of(magnitude(value)), 6.0)
    bits = bits_of(size + e2m1_power(size) * 4194304.0) - _BITS_OF_2_22
    sign = tl.where(value < 0, 8, 0)
    return (bits & 7) + (bits >> 22) | sign


@triton.jit
def e2m1_value(size: tl.tensor) -> tl.tensor:
    """Return fp32 values from 0 to 6 rounded to those of E2M1."""
    spacing = e2m1_power(size) * 4194304.0
    return size + spacing - spacing


@triton.jit
def is_finite(size: tl.tensor) -> tl.tensor:
    """Return whether bits of |x| are those of a number."""
    return size < _INFINITE


@triton.jit
def symmetric_scale(
    size: tl.tensor, largest: tl.constexpr, least: tl.constexpr, is_modelopt: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Return what `converters.numerics.scales.symmetric_scales` does, in fp32; not finite where the weights are not.

    Args:
        size: bits of the largest |weight|.
        largest: code that it gets.
        least: smallest weight (modelopt), or the scale in place of zero.
        is_modelopt: whose.
        dtype: of the scale.
    """
    amax, divisor = float_of(size), tl.full(size.shape, largest, tl.float32)
    if is_modelopt:
        scale = tl.div_rn(tl.maximum(tl.where(size == 0, largest, amax), least), divisor)
    else:
        scale = rounded(tl.div_rn(amax, divisor), dtype)
        scale = tl.where(scale == 0, least, scale)
    return tl.where(is_finite(size), scale, float("inf"))
