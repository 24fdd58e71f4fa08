"""Multiply each expert's rows by its weights.

Shapes: R routed rows grouped by expert, D hidden, E experts.
"""

from collections.abc import Callable, Sequence

import torch

from runtime.model.mlp import GatedMlp

ExpertsBackend = Callable[[torch.Tensor, torch.Tensor, Sequence[GatedMlp]], torch.Tensor]


def vanilla_experts(
    rows_RD: torch.Tensor, rows_per_expert_E: torch.Tensor, experts: Sequence[GatedMlp]
) -> torch.Tensor:
    """Run each expert on its own rows, one after the other; the oracle of every other backend.

    Args:
        rows_RD: (R, D), rows of expert 0 first.
        rows_per_expert_E: (E,) int64 counts; an expert without rows is not run.
        experts: E gated MLPs.
    Returns:
        (R, D) in the dtype of rows_RD, same order.
    """
    parts = rows_RD.split(rows_per_expert_E.tolist())
    return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True) if len(part)])


_BACKENDS: dict[str, ExpertsBackend] = {"vanilla": vanilla_experts}


def select_experts(moe_backend: str) -> ExpertsBackend:
    """Return the backend of this name, which EngineConfig has checked."""
    return _BACKENDS[moe_backend]
