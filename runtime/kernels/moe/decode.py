"""Operands of matrix units from what is stored, and results back; in the interpreter all of it in fp32.

The interpreter multiplies the bits of bf16 as if they were integers, and truncates where it narrows fp32 to bf16. So
there, operands are widened first, which changes no value, and results rounded by integer arithmetic.
Shapes: N rows, K columns, B = K / 2 bytes, G = K / 16 groups.
"""

import triton
import triton.language as tl

from runtime.kernels.numbers import bits_of, float_of

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# what `e2m1_halves` leaves to the end of a sum
E2M1_FACTOR = tl.constexpr(128.0)


@triton.jit
def operand(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return stored values as what a matrix unit multiplies: codes of 8 bits are exact in bf16 and fp16."""
    return value.to(tl.float32) if INTERPRET else value.to(dtype)


@triton.jit
def product(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return total + left @ right; total is int32 for int8 and fp32 otherwise."""
    if total.dtype == tl.int32:
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    elif INTERPRET:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    elif left.dtype.is_fp8():
        # Hopper adds FP8 products up with 14 bits; after each step the sum goes to fp32
        total = tl.dot(left, right, total, max_num_imprecise_acc=left.shape[1])
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def e2m1_halves(codes_NB: tl.tensor, scales_NG: tl.tensor) -> tl.tensor:
    """Return fp16 (N, K): E2M1 codes, two in a byte, times their E4M3 scales, divided by E2M1_FACTOR.

    A code's bits, put where fp16 has its lowest exponent bits, are its value / 2^14, 0.5 being subnormal. Times a scale
    * 2^7, which fp16 holds up to 448, each is a multiple of 2^-17 with at most 6 bits: exact, in bf16 as well.
    """
    num_rows: tl.constexpr = codes_NB.shape[0]
    num_bytes: tl.constexpr = codes_NB.shape[1]
    code_NB = codes_NB.to(tl.uint16)
    low_NB = ((code_NB & 7) << 9) | ((code_NB & 8) << 12)
    high_NB = ((code_NB & 0x70) << 5) | ((code_NB & 0x80) << 8)
    value_NB2 = tl.join(low_NB, high_NB).to(tl.float16, bitcast=True)
    value_NGC = tl.reshape(value_NB2, (num_rows, num_bytes // 8, 16))
    scale_NG = scales_NG.to(tl.float16) * 128.0
    return tl.reshape(value_NGC * scale_NG[:, :, None], (num_rows, 2 * num_bytes))


@triton.jit
def stored(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 values in a float dtype, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = bits_of(value)
        rounded = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)
        # the carry would make a number of some NaN
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def silu(value: tl.tensor) -> tl.tensor:
    """Return x * sigmoid(x) of fp32 values."""
    return tl.div_rn(value, 1.0 + tl.exp(-value))
