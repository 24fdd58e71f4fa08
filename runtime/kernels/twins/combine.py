"""The sum of each token's slots in their order. Shapes: T tokens, K slots per token, S = T * K, H hidden."""

import torch

from runtime.kernels.twins.rms_norm import rms_norm


def combine(
    values_SH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    *,
    residual_TH: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sums (T, H) of slots' results; see `runtime.kernels.moe.combine.combine`."""
    values_TKH = values_SH.unflatten(0, topk_ids_TK.shape)
    sums_TH = torch.zeros(len(topk_ids_TK), values_SH.shape[1], device=values_SH.device)
    for values_TH, ids_T in zip(values_TKH.unbind(1), topk_ids_TK.unbind(1), strict=True):
        sums_TH += values_TH.to(torch.float32).masked_fill(ids_T[:, None] < 0, 0)
    if residual_TH is not None:
        sums_TH += residual_TH
    dtype = values_SH.dtype if residual_TH is None else residual_TH.dtype
    return sums_TH.to(dtype) if out is None else out.copy_(sums_TH)


def combine_norm(
    values_SH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    residual_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `combine` with a residual, and the norm of it."""
    sums_TH = combine(values_SH, topk_ids_TK, residual_TH=residual_TH)
    normed_TH = rms_norm(sums_TH, weight_H, eps)
    return (sums_TH, normed_TH) if out is None else (out[0].copy_(sums_TH), out[1].copy_(normed_TH))
