"""A routed expert on the tokens that go to it.

Shapes: T all tokens, R rows at a time, D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from runtime.model.mlp import GatedMlp
from runtime.model.norm import RMSNorm
from runtime.streaming.lanes import Lane

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


def run_expert(expert: torch.nn.Module, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return an expert's unweighted results (R, D) for several inputs (R, D), each by itself."""
    assert isinstance(expert, GatedMlp), expert
    return expert.several(given)


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Rows (R,) int64 of a lane that go to an expert, ascending, and their weights (R,) fp32."""

    rows: torch.Tensor
    weights: torch.Tensor

    def of(self, kept_R: torch.Tensor) -> "ExpertRows":
        """Return those that a mask (R,) keeps."""
        return ExpertRows(self.rows[kept_R], self.weights[kept_R])

    def split(self, num_rows: int) -> Iterator["ExpertRows"]:
        """Yield them, a number of rows at a time."""
        for rows, weights in zip(self.rows.split(num_rows), self.weights.split(num_rows), strict=True):
            yield ExpertRows(rows, weights)


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """What a lane gives an expert.

    Attributes:
        lane: whose.
        block: the rows.
        given_RD: their values.
    """

    lane: Lane
    block: ExpertRows
    given_RD: torch.Tensor
