"""Causal attention over keys and values in pages. Shapes: T new tokens, H query heads, P head dim."""

import torch

from runtime.kernels.ops.inputs import KvPages, PagedBatch
from runtime.model.attention import attend
from runtime.moe.workspace import Workspace


def paged_attention(
    query_THP: torch.Tensor,
    pages: KvPages,
    batch: PagedBatch,
    *,
    run_tokens: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(P)) v (T, H, P), all in fp32 and rounded once.

    See `runtime.kernels.ops.paged_attention.paged_attention`; runs of tokens make no difference here.
    """
    out = torch.empty_like(query_THP) if out is None else out
    starts = batch.cu_seqlens_q.tolist()
    for number, length in enumerate(batch.seq_lens_B.tolist()):
        query_THP_of_one = query_THP[starts[number] : starts[number + 1]].to(torch.float32)
        page_ids = batch.block_table_BM[number].to(torch.int64)
        key_SGP, value_SGP = (
            _gathered(stored, page_ids, length, None if pages.scales is None else pages.scales[place])
            for place, stored in enumerate((pages.keys_NSGP, pages.values_NSGP))
        )
        position_T1 = torch.arange(length - len(query_THP_of_one), length, device=query_THP.device)[:, None]
        visible_TS = torch.arange(length, device=query_THP.device) <= position_T1
        mixed = attend(query_THP_of_one[None], key_SGP[None], value_SGP[None], visible_TS=visible_TS)
        out[starts[number] : starts[number + 1]] = mixed[0].to(out.dtype)
    return out


def _gathered(stored: torch.Tensor, page_ids: torch.Tensor, length: int, scale: torch.Tensor | None) -> torch.Tensor:
    """Return the first `length` keys or values (S, G, P) of a sequence, fp32."""
    needed = page_ids[: -(-length // stored.shape[1])]
    # indexing is not there for 8-bit floats everywhere
    bits = stored.view(torch.uint8) if stored.dtype is torch.float8_e4m3fn else stored
    values = bits[needed].view(stored.dtype).flatten(0, 1)[:length].to(torch.float32)
    return values if scale is None else values * scale
