"""Grouped-query attention with optional q/k norm and partial rotary embedding.

Shapes: B batch, T new tokens, S tokens seen, D hidden, H query heads, G kv heads, P head dim. Query heads
g * H / G ... (g + 1) * H / G - 1 read kv head g.
"""

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.cache.kv_cache import LayerCache
from runtime.kernels.ops.inputs import HeadNorms, KvPages
from runtime.model.linear import Linear
from runtime.model.norm import RMSNorm
from runtime.model.ops import LayerOps
from runtime.model.step import Step
from runtime.moe.workspace import Workspace


class Attention(nn.Module):
    """Attention of one layer."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.q_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, config.kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, config.kv_size, bias=config.attention_bias)
        self.o_proj = Linear(config.q_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else None
        # None: torch, with keys and values in one block; kernels have a workspace as well
        self.ops: LayerOps | None = None
        self.workspace: Workspace | None = None

    def forward(self, hidden_BTD: torch.Tensor, step: Step, cache: LayerCache | KvPages | None) -> torch.Tensor:
        """Return (B, T, D); new keys and values go into the cache, if there is one.

        With kernels the result lies in the workspace, until the next layer's attention is computed.
        """
        if self.ops is not None:
            assert not isinstance(cache, LayerCache), "kernels need pages"
            return self._attend_pages(self.ops, hidden_BTD.flatten(0, 1), step, cache).view(hidden_BTD.shape)
        assert not isinstance(cache, KvPages), "pages are for kernels"
        heads = (-1, self.head_dim)
        query_BTHP = self.q_proj(hidden_BTD).unflatten(-1, heads)
        key_BTGP = self.k_proj(hidden_BTD).unflatten(-1, heads)
        value_BTGP = self.v_proj(hidden_BTD).unflatten(-1, heads)
        if self.q_norm is not None and self.k_norm is not None:
            query_BTHP, key_BTGP = self.q_norm(query_BTHP), self.k_norm(key_BTGP)
        query_BTHP, key_BTGP = step.rope.rotate(query_BTHP), step.rope.rotate(key_BTGP)
        if cache is None:
            key_BSGP, value_BSGP = key_BTGP, value_BTGP
        else:
            key_BSGP, value_BSGP = cache.append(key_BTGP, value_BTGP)
        mixed_BTHP = attend(query_BTHP, key_BSGP, value_BSGP, visible_TS=step.visible_TS)
        return self.o_proj(mixed_BTHP.flatten(2))

    def _attend_pages(self, ops: LayerOps, hidden_TD: torch.Tensor, step: Step, pages: KvPages | None) -> torch.Tensor:
        """Return (T, D) of all sequences, one after the other; new keys and values go into pages."""
        norms, paged, rope, workspace = None, step.paged, step.rope, self.workspace
        assert paged is not None, "kernels need pages"
        assert workspace is not None, "kernels need a workspace"
        query_THP, key_TGP, value_TGP = (
            _product(linear, hidden_TD, name, workspace).unflatten(-1, (-1, self.head_dim))
            for linear, name in ((self.q_proj, "query"), (self.k_proj, "key"), (self.v_proj, "value"))
        )
        if self.q_norm is not None and self.k_norm is not None:
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        mixed_THP, turned_THP, turned_TGP = (
            workspace.take(name, tuple(heads.shape), heads.dtype)
            for name, heads in (("mixed", query_THP), ("turned_query", query_THP), ("turned_key", key_TGP))
        )
        angles, turned = (rope.cos_Tr, rope.sin_Tr, paged.angle_rows), (turned_THP, turned_TGP)
        ops.rope(query_THP, key_TGP, *angles, norms=norms, out=turned)
        pages = paged.new_pages(turned_TGP) if pages is None else pages
        ops.write_pages(turned_TGP, value_TGP, paged.slot_mapping, pages)
        ops.paged_attention(
            turned_THP, pages, paged.batch, run_tokens=paged.run_tokens, out=mixed_THP, workspace=workspace
        )
        return _product(self.o_proj, mixed_THP.flatten(1), "attention", workspace)


def _product(linear: Linear, rows_TI: torch.Tensor, name: str, workspace: Workspace) -> torch.Tensor:
    """Return (T, O) in the workspace, by name."""
    out_TO = workspace.take(name, (len(rows_TI), linear.weight.shape[0]), rows_TI.dtype)
    return linear.forward_into(rows_TI, workspace, out_TO)


def attend(
    query_BTHP: torch.Tensor,
    key_BSGP: torch.Tensor,
    value_BSGP: torch.Tensor,
    *,
    visible_TS: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(P)) v, (B, T, H, P) in the query's dtype; scores, softmax and sums in fp32.

    Args:
        query_BTHP: (B, T, H, P) fp32 or bf16; key_BSGP and value_BSGP (B, S, G, P) of the same dtype.
        visible_TS: bool (T, S), False hides a key; None shows all.
    """
    batch_size, num_tokens, num_heads, head_dim = query_BTHP.shape
    num_slots, num_kv_heads = key_BSGP.shape[1:3]
    per_group = num_heads // num_kv_heads
    # the query heads of a group lie side by side as rows, so that no key is copied per head
    rows = query_BTHP.to(torch.float32).unflatten(2, (num_kv_heads, per_group)).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch_size, num_kv_heads, per_group * num_tokens, head_dim)
    scores = rows @ key_BSGP.to(torch.float32).permute(0, 2, 3, 1) * head_dim**-0.5
    if visible_TS is not None:
        scores = scores.view(batch_size, num_kv_heads, per_group, num_tokens, num_slots)
        scores = scores.masked_fill(~visible_TS, float("-inf")).flatten(2, 3)
    mixed = scores.softmax(-1) @ value_BSGP.to(torch.float32).permute(0, 2, 1, 3)
    mixed = mixed.view(batch_size, num_kv_heads, per_group, num_tokens, head_dim)
    return mixed.permute(0, 3, 1, 2, 4).reshape(query_BTHP.shape).to(query_BTHP.dtype)
