"""Experts for a handful of tokens. Shapes: T tokens, K slots per token, S = T * K, H hidden, I intermediate."""

import torch
import torch.nn.functional as F

from runtime.moe.weights import ExpertWeights


def up_gemv(
    hidden_TH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up of every slot (S, I); see `runtime.kernels.moe.gemv.up_gemv`."""
    rows_S1H = hidden_TH.repeat_interleave(topk_ids_TK.shape[1], 0)[:, None].to(torch.float32)
    up_SNH = weights.up_values(torch.float32, topk_ids_TK.flatten().clamp(min=0).to(torch.int64))
    gate_SI, up_SI = (rows_S1H @ up_SNH.transpose(1, 2))[:, 0].unflatten(1, (-1, 2)).unbind(-1)
    value_SI = (F.silu(gate_SI) * up_SI).masked_fill(topk_ids_TK.flatten()[:, None] < 0, 0).to(hidden_TH.dtype)
    return value_SI if out is None else out.copy_(value_SI)


def down_gemv(
    activated_SI: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    weights: ExpertWeights,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sums of slots' results (T, H); see `runtime.kernels.moe.gemv.down_gemv`."""
    down_SHI = weights.down_values(torch.float32, topk_ids_TK.flatten().clamp(min=0).to(torch.int64))
    value_SH = (down_SHI @ activated_SI[..., None].to(torch.float32))[..., 0]
    value_SH.masked_fill_(topk_ids_TK.flatten()[:, None] < 0, 0)
    sum_TH = torch.zeros(len(topk_ids_TK), weights.hidden_size, device=activated_SI.device)
    for value_TH, weight_T in zip(
        value_SH.unflatten(0, topk_ids_TK.shape).unbind(1), topk_weights_TK.unbind(1), strict=True
    ):
        sum_TH += value_TH * weight_T[:, None]
    if residual_TH is not None:
        sum_TH += residual_TH
    return sum_TH.to(activated_SI.dtype) if out is None else out.copy_(sum_TH)
