"""New keys and values into their pages, as codes if the pages hold codes.

Shapes: T tokens, G kv heads, P head dim, D = G * P.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.numbers import e4m3_bits
from runtime.kernels.ops.inputs import KvPages

# values that a program copies at once
TILE = 1024


@triton.jit
def copy_rows(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_CODED: tl.constexpr,
) -> None:
    """Write a part of one token's keys and values."""
    across: tl.constexpr = (SIZE + TILE - 1) // TILE
    token = (tl.program_id(0) // across).to(tl.int64)
    column_D = tl.program_id(0) % across * TILE + tl.arange(0, TILE)
    slot = tl.load(slots_ptr + token)
    is_value_D = (column_D < SIZE) & (slot >= 0)
    key_D = tl.load(key_ptr + token * key_stride + column_D, mask=is_value_D, other=0.0)
    value_D = tl.load(value_ptr + token * value_stride + column_D, mask=is_value_D, other=0.0)
    place_D = slot * SIZE + column_D
    if IS_CODED:
        one_D = tl.full((TILE,), 1.0, tl.float32)
        key_D = e4m3_bits(tl.div_rn(key_D.to(tl.float32), one_D * tl.load(scales_ptr))).to(tl.uint8)
        value_D = e4m3_bits(tl.div_rn(value_D.to(tl.float32), one_D * tl.load(scales_ptr + 1))).to(tl.uint8)
    tl.store(keys_ptr + place_D, key_D, mask=is_value_D)
    tl.store(values_ptr + place_D, value_D, mask=is_value_D)


def write_pages_launch(
    key_TGP: torch.Tensor, value_TGP: torch.Tensor, slot_mapping_T: torch.Tensor, pages: KvPages
) -> Launch:
    """Return the launch of `write_pages`."""
    for heads in (key_TGP, value_TGP):
        assert heads.stride()[1:] == (heads.shape[2], 1), heads.stride()
    is_coded = pages.keys_NSGP.dtype is torch.float8_e4m3fn
    assert not is_coded or pages.scales is not None, pages.keys_NSGP.dtype
    stored = (pages.keys_NSGP, pages.values_NSGP)
    size = key_TGP[0].numel()
    constants = {"SIZE": size, "TILE": min(TILE, triton.next_power_of_2(size)), "IS_CODED": is_coded}
    where = tuple(part.view(torch.uint8) for part in stored) if is_coded else stored
    scales = slot_mapping_T if pages.scales is None else pages.scales
    arguments = (key_TGP, value_TGP, slot_mapping_T, scales, *where, key_TGP.stride(0), value_TGP.stride(0))
    programs = len(slot_mapping_T) * triton.cdiv(size, constants["TILE"])
    return Launch(copy_rows, programs, arguments, constants, stored)


def write_pages(key_TGP: torch.Tensor, value_TGP: torch.Tensor, slot_mapping_T: torch.Tensor, pages: KvPages) -> None:
    """Copy tokens' keys and values to their places.

    Args:
        key_TGP: heads side by side; tokens may lie apart, as in a fused projection. In the dtype of the pages, or any
            float dtype if these hold float8_e4m3fn: then divided by the scale, ties to even, saturating at 448.
        value_TGP: the same.
        slot_mapping_T: int64, page * tokens of a page + place in it; -1 = leave the token out.
        pages: what is written to.
    """
    write_pages_launch(key_TGP, value_TGP, slot_mapping_T, pages).run()
