"""The router's product. Shapes: T tokens, H hidden, E experts."""

import torch


def router_logits(hidden_TH: torch.Tensor, weight_EH: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return router logits (T, E) fp32; see `runtime.kernels.moe.router_logits.router_logits`."""
    return torch.mm(hidden_TH.to(torch.float32), weight_EH.to(torch.float32).T, out=out)
