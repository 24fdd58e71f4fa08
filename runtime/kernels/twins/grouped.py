"""Grouped products in torch, an expert after the other; what up and down have in common.

Shapes: M rows of one expert, N rows and K columns of its weight, B blocks of 128 columns.
"""

from collections.abc import Iterator

import torch

from runtime.moe.inputs import Inputs, QuantizedRows, Rows
from runtime.moe.layouts import ContiguousRows
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, Packed, block_scales, unpacked_e2m1


def rows_by_expert(rows: Rows) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each expert that has rows, their positions (M,) and their slots (M,), both int64."""
    if isinstance(rows, ContiguousRows):
        slots = rows.slots_P
        experts = rows.expert_of_block.repeat_interleave(rows.block_m)
    else:
        slots = rows.slots.flatten()
        experts = torch.arange(len(rows.slots), device=slots.device).repeat_interleave(rows.slots.shape[1])
    experts = torch.where(slots >= 0, experts, -1)
    for expert in experts.unique().tolist():
        if expert >= 0:
            positions_M = (experts == expert).nonzero().flatten()
            yield expert, positions_M, slots[positions_M].to(torch.int64)


def chosen_rows(inputs: Inputs, rows_M: torch.Tensor) -> Inputs:
    """Return some rows."""
    if not isinstance(inputs, QuantizedRows):
        return inputs[rows_M]
    # not all float8 operators index
    codes = inputs.codes.view(torch.uint8)[rows_M].view(inputs.codes.dtype)
    scales = inputs.scales.view(torch.uint8)[rows_M].view(inputs.scales.dtype)
    return QuantizedRows(codes, scales, inputs.global_scale, inputs.is_laid_out)


def grouped_product(
    inputs: Inputs, packed: Packed, scheme: ExpertScheme, expert: int, *, is_interleaved: bool
) -> torch.Tensor:
    """Return fp32 (M, N): rows times one expert's weight, scales applied where and in the order the kernels do.

    Codes are multiplied as they are; scales of blocks within the sum, the inputs' before the weight's; those of rows,
    channels and whole matrices after it. Local scales of NVFP4 belong to the values.
    """
    a_MK, a_scales = _values(inputs, scheme)
    w_NK = _weight_values(packed, scheme, expert)
    is_blocked = scheme is ExpertScheme.FP8_BLOCK
    a_is_blocked = a_scales is not None and a_scales.shape[1] > 1
    if is_blocked or a_is_blocked:
        total_MN = torch.zeros(len(a_MK), len(w_NK), device=a_MK.device)
        for block, start in enumerate(range(0, a_MK.shape[1], BLOCK)):
            part_MN = a_MK[:, start : start + BLOCK] @ w_NK[:, start : start + BLOCK].T
            if a_scales is not None and a_is_blocked:
                part_MN *= a_scales[:, block, None]
            if is_blocked:
                part_MN *= _block_column(packed, expert, block, is_interleaved)
            total_MN += part_MN
    elif scheme is ExpertScheme.INT8_W8A8 and a_scales is not None:
        # fp64 holds any sum of products of bytes
        total_MN = (a_MK.to(torch.float64) @ w_NK.to(torch.float64).T).to(torch.float32)
    else:
        total_MN = a_MK @ w_NK.T
    if a_scales is not None and not a_is_blocked:
        total_MN *= a_scales
    if scheme in (ExpertScheme.FP8_CHANNEL, ExpertScheme.INT8_CHANNEL, ExpertScheme.INT8_W8A8):
        assert packed.scales is not None, scheme
        total_MN *= packed.scales[expert]
    if packed.global_scale is not None:
        total_MN *= packed.global_scale[expert]
    if isinstance(inputs, QuantizedRows) and inputs.global_scale is not None:
        total_MN *= inputs.global_scale[expert if len(inputs.global_scale) > 1 else 0]
    return total_MN


def _values(inputs: Inputs, scheme: ExpertScheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return fp32 values of rows or codes, and the scales that are not in them."""
    if not isinstance(inputs, QuantizedRows):
        return inputs.to(torch.float32), None
    if scheme is ExpertScheme.NVFP4:
        return _scaled_e2m1(inputs.codes, inputs.scales), None
    return inputs.codes.to(torch.float32), inputs.scales


def _weight_values(packed: Packed, scheme: ExpertScheme, expert: int) -> torch.Tensor:
    if scheme is ExpertScheme.NVFP4:
        assert packed.scales is not None, scheme
        return _scaled_e2m1(packed.codes[expert], packed.scales[expert])
    return packed.codes[expert].to(torch.float32)


def _scaled_e2m1(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    grouped = unpacked_e2m1(codes).unflatten(-1, (-1, GROUP))
    return (grouped * scales.to(torch.float32)[..., None]).flatten(-2)


def _block_column(packed: Packed, expert: int, block: int, is_interleaved: bool) -> torch.Tensor:
    """Return the scales (N,) of one block of columns."""
    assert packed.scales is not None
    scales = packed.scales[expert : expert + 1, ..., block : block + 1]
    return block_scales(scales, (packed.codes.shape[1], 1), is_interleaved)[0, :, 0]
