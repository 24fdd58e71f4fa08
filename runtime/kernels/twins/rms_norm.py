"""Root mean square norm. Shapes: D values of a row."""

import torch


def rms_norm(
    hidden: torch.Tensor, weight_D: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return hidden / rms(hidden) (..., D) rounded to its dtype, times the weight; as `runtime.model.norm.RMSNorm`."""
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide.to(hidden.dtype) * weight_D
    return normed if out is None else out.copy_(normed)


def add_rms_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + residual (..., D), rounded to their dtype, and the norm of that."""
    sums = hidden + residual
    normed = rms_norm(sums, weight_D, eps)
    return (sums, normed) if out is None else (out[0].copy_(sums), out[1].copy_(normed))
