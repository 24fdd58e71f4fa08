"""Root mean square norm, with or without a residual that is added first. Shapes: R rows of D values."""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.decode import stored

# values that a program holds at once, if a row has fewer
TILE = 4096


@triton.jit
def inverse_rms(squares: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Return 1 / sqrt(squares / SIZE + eps) of a sum of SIZE squares, each step rounded to nearest."""
    size = tl.full(squares.shape, SIZE, tl.float32)
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(tl.div_rn(squares, size) + eps))


@triton.jit
def scaled(wide: tl.tensor, inverse: tl.tensor, weight: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return fp32 values times 1 / rms, rounded to a dtype, and times a weight, rounded again: as engines do it."""
    return stored(stored(wide * inverse, dtype).to(tl.float32) * weight, dtype)


@triton.jit(do_not_specialize=["num_rows", "eps"])
def norm_rows(
    hidden_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Write normed rows, and where there is a residual, the sums."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_D = tl.arange(0, SIZE_PAD)
    is_column_D = column_D < SIZE
    is_value_RD = (row_R < num_rows)[:, None] & is_column_D[None, :]
    place_RD = row_R[:, None] * SIZE + column_D[None, :]
    wide_RD = tl.load(hidden_ptr + place_RD, mask=is_value_RD, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide_RD += tl.load(residual_ptr + place_RD, mask=is_value_RD, other=0.0).to(tl.float32)
        sum_RD = stored(wide_RD, dtype)
        tl.store(sum_ptr + place_RD, sum_RD, mask=is_value_RD)
        wide_RD = sum_RD.to(tl.float32)
    inverse_R = inverse_rms(tl.sum(wide_RD * wide_RD, axis=1), eps, SIZE)
    weight_D = tl.load(weight_ptr + column_D, mask=is_column_D, other=0.0).to(tl.float32)
    tl.store(out_ptr + place_RD, scaled(wide_RD, inverse_R[:, None], weight_D[None, :], dtype), mask=is_value_RD)


def rms_norm_launch(
    hidden: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> Launch:
    """Return the launch of `rms_norm`, or with a residual of `add_rms_norm`."""
    assert weight_D.dtype is hidden.dtype, (weight_D.dtype, hidden.dtype)
    assert hidden.is_contiguous(), hidden.stride()
    if out is None:
        out = tuple(torch.empty_like(hidden) for _ in range(1 if residual is None else 2))
    size = hidden.shape[-1]
    num_rows = hidden.numel() // size
    padded = triton.next_power_of_2(size)
    constants = {
        "SIZE": size,
        "SIZE_PAD": padded,
        "ROWS": max(1, TILE // padded),
        "HAS_RESIDUAL": residual is not None,
    }
    programs = triton.cdiv(num_rows, constants["ROWS"])
    arguments = (hidden, hidden if residual is None else residual, weight_D, out[0], out[-1], num_rows, eps)
    return Launch(norm_rows, programs, arguments, constants, out, num_warps=8 if padded > TILE else 4)


def rms_norm(
    hidden: torch.Tensor, weight_D: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return hidden / rms(hidden) (..., D) rounded to its dtype, times the weight (D,) of the same dtype."""
    return rms_norm_launch(hidden, weight_D, eps, out=None if out is None else (out,)).run()[0]


def add_rms_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + residual (..., D), rounded to their dtype, and the norm of that; see `rms_norm`."""
    sums, normed = rms_norm_launch(hidden, weight_D, eps, residual=residual, out=out).run()
    return sums, normed
