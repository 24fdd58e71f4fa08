"""Rows of a grouped product from the experts of each slot; scratch is not needed here."""

from dataclasses import fields
from typing import TypeVar

import torch

from runtime.moe.layouts import ContiguousRows, MaskedRows, contiguous_rows, masked_rows

_Rows = TypeVar("_Rows", ContiguousRows, MaskedRows)


def build_rows(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    num_shared: int = 0,
    out: ContiguousRows | None = None,
    scratch: torch.Tensor | None = None,
) -> ContiguousRows:
    """Lay slots out in blocks; see `runtime.moe.layouts.contiguous_rows`."""
    rows = contiguous_rows(topk_ids_TK, num_experts, block_m, num_shared=num_shared)
    return rows if out is None else _copied(rows, out)


def build_masked_rows(
    topk_ids_TK: torch.Tensor,
    num_experts: int,
    max_rows: int,
    *,
    out: MaskedRows | None = None,
    scratch: torch.Tensor | None = None,
) -> MaskedRows:
    """Lay slots out with room for `max_rows` rows of each expert; see `runtime.moe.layouts.masked_rows`."""
    rows = masked_rows(topk_ids_TK, num_experts, max_rows)
    return rows if out is None else _copied(rows, out)


def _copied(rows: _Rows, out: _Rows) -> _Rows:
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, torch.Tensor):
            getattr(out, field.name).copy_(value)
    return out
