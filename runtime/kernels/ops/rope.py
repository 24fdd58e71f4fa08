"""Queries and keys as attention needs them: normed head by head, then the leading dims turned, in one launch.

Shapes: T tokens, H query heads, G kv heads, P head dim, r = rotary_dim / 2, M positions. Dim j < r pairs with dim
j + r; dims from 2r on pass through.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.decode import stored
from runtime.kernels.ops.inputs import HeadNorms
from runtime.kernels.ops.rms_norm import inverse_rms, scaled

# of a program
HEADS = 16


@triton.jit
def _part(
    heads_ptr: tl.tensor, first: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, is_head_H1: tl.tensor
) -> tl.tensor:
    """Return SIZE dims of some heads as fp32, with zeros behind them."""
    dim_1 = tl.arange(0, PAD)[None, :]
    return tl.load(heads_ptr + first + dim_1, mask=is_head_H1 & (dim_1 < SIZE), other=0.0).to(tl.float32)


@triton.jit
def _normed(
    part: tl.tensor, weight_ptr: tl.tensor, inverse_H: tl.tensor, SIZE: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Return dims of heads times 1 / rms and weight, rounded to the dtype, as fp32."""
    dim_1 = tl.arange(0, part.shape[1])[None, :]
    weight = tl.load(weight_ptr + dim_1, mask=dim_1 < SIZE, other=0.0).to(tl.float32)
    return scaled(part, inverse_H[:, None], weight, dtype).to(tl.float32)


@triton.jit
def _turn(
    heads_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_1r: tl.tensor,
    sin_1r: tl.tensor,
    out_ptr: tl.tensor,
    first: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    """Write HEADS heads of one token from `first` on; heads lie side by side."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rest: tl.constexpr = DIM - 2 * HALF
    head_H1 = (first + tl.arange(0, HEADS))[:, None]
    is_head_H1 = head_H1 < NUM_HEADS
    heads_ptr += head_H1 * DIM
    left_Hr = _part(heads_ptr, 0, HALF, HALF_PAD, is_head_H1)
    right_Hr = _part(heads_ptr, HALF, HALF, HALF_PAD, is_head_H1)
    past_HR = _part(heads_ptr, 2 * HALF, rest, REST_PAD, is_head_H1)
    if HAS_NORM:
        squares_H = tl.sum(left_Hr * left_Hr, axis=1) + tl.sum(right_Hr * right_Hr, axis=1)
        inverse_H = inverse_rms(squares_H + tl.sum(past_HR * past_HR, axis=1), eps, DIM)
        left_Hr = _normed(left_Hr, weight_ptr, inverse_H, HALF, dtype)
        right_Hr = _normed(right_Hr, weight_ptr + HALF, inverse_H, HALF, dtype)
        past_HR = _normed(past_HR, weight_ptr + 2 * HALF, inverse_H, rest, dtype)
    dim_1r = tl.arange(0, HALF_PAD)[None, :]
    dim_1R = tl.arange(0, REST_PAD)[None, :]
    out_ptr += head_H1 * DIM
    is_dim_Hr = is_head_H1 & (dim_1r < HALF)
    tl.store(out_ptr + dim_1r, stored(left_Hr * cos_1r - right_Hr * sin_1r, dtype), mask=is_dim_Hr)
    tl.store(out_ptr + HALF + dim_1r, stored(right_Hr * cos_1r + left_Hr * sin_1r, dtype), mask=is_dim_Hr)
    tl.store(out_ptr + 2 * HALF + dim_1R, stored(past_HR, dtype), mask=is_head_H1 & (dim_1R < rest))


@triton.jit(do_not_specialize=["eps"])
def turn_heads(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    query_out_ptr: tl.tensor,
    key_out_ptr: tl.tensor,
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    eps: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    """Write some of the heads of one token: those of queries, then those of keys."""
    query_parts: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    parts: tl.constexpr = query_parts + (KEY_HEADS + HEADS - 1) // HEADS
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    dim_1r = tl.arange(0, HALF_PAD)[None, :]
    angle_1r = tl.load(positions_ptr + token) * HALF + dim_1r
    cos_1r = tl.load(cos_ptr + angle_1r, mask=dim_1r < HALF, other=0.0)
    sin_1r = tl.load(sin_ptr + angle_1r, mask=dim_1r < HALF, other=0.0)
    if part < query_parts:
        _turn(
            query_ptr + token * query_stride, query_weight_ptr, cos_1r, sin_1r,
            query_out_ptr + token * QUERY_HEADS * DIM, part * HEADS, eps,
            QUERY_HEADS, HEADS, DIM, HALF, HALF_PAD, REST_PAD, HAS_NORM,
        )  # fmt: skip
    else:
        _turn(
            key_ptr + token * key_stride, key_weight_ptr, cos_1r, sin_1r,
            key_out_ptr + token * KEY_HEADS * DIM, (part - query_parts) * HEADS, eps,
            KEY_HEADS, HEADS, DIM, HALF, HALF_PAD, REST_PAD, HAS_NORM,
        )  # fmt: skip


def rope_launch(
    query_THP: torch.Tensor,
    key_TGP: torch.Tensor,
    cos_Mr: torch.Tensor,
    sin_Mr: torch.Tensor,
    positions_T: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """Return the launch of `rope`."""
    num_tokens, num_heads, head_dim = query_THP.shape
    half, num_kv_heads = cos_Mr.shape[1], key_TGP.shape[1]
    for heads in (query_THP, key_TGP):
        assert heads.stride()[1:] == (head_dim, 1), heads.stride()
    if out is None:
        out = (torch.empty(query_THP.shape, dtype=query_THP.dtype, device=query_THP.device),
               torch.empty(key_TGP.shape, dtype=key_TGP.dtype, device=key_TGP.device))  # fmt: skip
    weights = (out[0], out[1]) if norms is None else (norms.query_P, norms.key_P)
    constants = {
        "QUERY_HEADS": num_heads,
        "KEY_HEADS": num_kv_heads,
        "HEADS": HEADS,
        "DIM": head_dim,
        "HALF": half,
        "HALF_PAD": triton.next_power_of_2(half),
        "REST_PAD": triton.next_power_of_2(max(1, head_dim - 2 * half)),
        "HAS_NORM": norms is not None,
    }
    tables = (cos_Mr, sin_Mr, positions_T)
    numbers = (query_THP.stride(0), key_TGP.stride(0), 0.0 if norms is None else norms.eps)
    programs = num_tokens * (triton.cdiv(num_heads, HEADS) + triton.cdiv(num_kv_heads, HEADS))
    return Launch(turn_heads, programs, (query_THP, key_TGP, *tables, *weights, *out, *numbers), constants, out)


def rope(
    query_THP: torch.Tensor,
    key_TGP: torch.Tensor,
    cos_Mr: torch.Tensor,
    sin_Mr: torch.Tensor,
    positions_T: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries (T, H, P) and keys (T, G, P), each head normed if asked for and its rotary dims turned.

    Args:
        query_THP: heads side by side; tokens may lie apart, as in a fused projection.
        key_TGP: the same.
        cos_Mr: fp32 of all positions, contiguous; sin_Mr the same.
        positions_T: int64.
        norms: rounded to the dtype before and after the weight, as in `rms_norm`.
        out: contiguous, where the results go.
    """
    query_THP, key_TGP = rope_launch(query_THP, key_TGP, cos_Mr, sin_Mr, positions_T, norms=norms, out=out).run()
    return query_THP, key_TGP
