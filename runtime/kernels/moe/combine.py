"""The sum of each token's slots in their order, in fp32, and what follows on it.

Shapes: T tokens, K slots per token, S = T * K, H hidden.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.decode import stored
from runtime.kernels.ops.rms_norm import inverse_rms, scaled

# values of a token that a program adds up, if no norm needs all of them
TILE = 1024


@triton.jit(do_not_specialize=["eps"])
def add_slots(
    values_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    """Write TILE values of a token; with a norm these are all of them."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    across: tl.constexpr = (HIDDEN + TILE - 1) // TILE
    token = (tl.program_id(0) // across).to(tl.int64)
    column_H = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    is_column_H = column_H < HIDDEN
    place_H = token * HIDDEN + column_H
    total_H = tl.zeros((TILE,), tl.float32)
    for number in range(SLOTS):
        slot = token * SLOTS + number
        is_value_H = is_column_H & (tl.load(ids_ptr + slot) >= 0)
        total_H += tl.load(values_ptr + slot * HIDDEN + column_H, mask=is_value_H, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total_H += tl.load(residual_ptr + place_H, mask=is_column_H, other=0.0).to(tl.float32)
    total = stored(total_H, dtype)
    tl.store(out_ptr + place_H, total, mask=is_column_H)
    if HAS_NORM:
        wide_H = total.to(tl.float32)
        inverse_1 = inverse_rms(tl.sum((wide_H * wide_H)[None, :], axis=1), eps, HIDDEN)
        weight_H = tl.load(weight_ptr + column_H, mask=is_column_H, other=0.0).to(tl.float32)
        tl.store(normed_ptr + place_H, scaled(wide_H, inverse_1, weight_H, dtype), mask=is_column_H)


def combine_launch(
    values_SH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    residual_TH: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> Launch:
    """Return the launch of `combine`, or with the norm's weight and eps of `combine_norm`."""
    num_tokens, num_slots = topk_ids_TK.shape
    hidden_size = values_SH.shape[1]
    if out is None:
        dtype = values_SH.dtype if residual_TH is None else residual_TH.dtype
        made = [values_SH.new_empty((num_tokens, hidden_size), dtype=dtype) for _ in range(1 if norm is None else 2)]
        out = tuple(made)
    padded = triton.next_power_of_2(hidden_size)
    tile = min(padded, TILE) if norm is None else padded
    constants = {
        "HIDDEN": hidden_size,
        "SLOTS": num_slots,
        "TILE": tile,
        "HAS_RESIDUAL": residual_TH is not None,
        "HAS_NORM": norm is not None,
    }
    weight, eps = (out[0], 0.0) if norm is None else norm
    residual = out[0] if residual_TH is None else residual_TH
    arguments = (values_SH, topk_ids_TK, residual, weight, out[0], out[-1], eps)
    programs = num_tokens * triton.cdiv(hidden_size, tile)
    return Launch(add_slots, programs, arguments, constants, out, num_warps=8 if tile > 4096 else 4)


def combine(
    values_SH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sums (T, H) of slots' results, which bear their weights already: in fp32, rounded once.

    Args:
        values_SH: slot by slot, contiguous, any float dtype; rows of filtered slots are not read.
        topk_ids_TK: int32, contiguous; -1 = filtered, adds nothing.
        residual_TH: added last, before the rounding.
        out: where the result goes; new, it has the dtype of the residual, or of values_SH.
    """
    made = None if out is None else (out,)
    return combine_launch(values_SH, topk_ids_TK, residual_TH=residual_TH, out=made).run()[0]


def combine_norm(
    values_SH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `combine` with a residual, and the root mean square norm of it that the next layer starts with."""
    launch = combine_launch(values_SH, topk_ids_TK, residual_TH=residual_TH, norm=(weight_H, eps), out=out)
    sums_TH, normed_TH = launch.run()
    return sums_TH, normed_TH
