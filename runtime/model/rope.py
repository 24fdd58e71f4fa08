"""Rotary position embedding on the leading dims of each head, neox layout.

Shapes: B batch, T tokens, H heads (query or kv), P head dim, r = rotary_dim / 2. Dim j < r pairs with dim j + r; dims
from 2r on pass through. GLM-4 dense and GLM-4.7-Flash interleave instead; this model does not.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of a run of positions: cosine and sine, each (T, r) fp32."""

    cos_Tr: torch.Tensor
    sin_Tr: torch.Tensor

    def rotate(self, heads_BTHP: torch.Tensor) -> torch.Tensor:
        """Return (B, T, H, P) with its rotary dims turned: in fp32, rounded once to the input's dtype."""
        r = self.cos_Tr.shape[-1]
        first, second, rest = heads_BTHP.split([r, r, heads_BTHP.shape[-1] - 2 * r], dim=-1)
        first, second = first.to(torch.float32), second.to(torch.float32)
        cos, sin = self.cos_Tr[:, None], self.sin_Tr[:, None]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([turned.to(heads_BTHP.dtype), rest], dim=-1)


def build_rope(positions_T: torch.Tensor, rotary_dim: int, theta: float) -> Rope:
    """Return the angles position * theta^(-2i / rotary_dim), i < rotary_dim / 2, of positions (T,) int64."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angles = positions_T[:, None].to(torch.float32) * (1.0 / theta**exponents)
    return Rope(angles.cos(), angles.sin())
