"""A routed expert on the tokens that go to it.

Shapes: T all tokens, R rows at a time, D hidden.
"""

import torch

from runtime.model.mlp import GatedMlp
from runtime.model.norm import RMSNorm

# rows that an expert takes at a time
EXPERT_ROWS = 1024


def normed_rows(
    hidden_TD: torch.Tensor, rows_R: torch.Tensor, norm: RMSNorm, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """Return what an expert sees (R, D) of some rows of the state in front of the MLP."""
    out_RD: torch.Tensor = norm(hidden_TD[rows_R].to(device=device, dtype=dtype))
    return out_RD


def add_weighted(out_RD: torch.Tensor, weights_R: torch.Tensor, rows_R: torch.Tensor, added_TD: torch.Tensor) -> None:
    """Add an expert's results, weighted in fp32, to the rows (T, D) fp32 that they belong to; each row occurs once."""
    weighted_RD = out_RD.to(torch.float32) * weights_R[:, None].to(out_RD.device)
    added_TD[rows_R] += weighted_RD.to(added_TD.device)


def run_expert(expert: torch.nn.Module, normed_RD: torch.Tensor) -> torch.Tensor:
    """Return an expert's unweighted results (R, D)."""
    assert isinstance(expert, GatedMlp), expert
    out_RD: torch.Tensor = expert(normed_RD)
    return out_RD
