"""Queries and keys normed and turned. Shapes: T tokens, H query heads, G kv heads, P head dim, M positions."""

import torch

from runtime.kernels.ops.inputs import HeadNorms
from runtime.kernels.twins.rms_norm import rms_norm
from runtime.model.rope import Rope


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
    """Return queries (T, H, P) and keys (T, G, P); see `runtime.kernels.ops.rope.rope`."""
    if norms is not None:
        query_THP = rms_norm(query_THP, norms.query_P, norms.eps)
        key_TGP = rms_norm(key_TGP, norms.key_P, norms.eps)
    angles = Rope(cos_Mr[positions_T], sin_Mr[positions_T])
    turned = angles.rotate(query_THP[None])[0], angles.rotate(key_TGP[None])[0]
    return turned if out is None else (out[0].copy_(turned[0]), out[1].copy_(turned[1]))
