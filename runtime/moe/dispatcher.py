"""Bring each token's copies to their experts, and the results back.

Shapes: T tokens, D hidden, K experts per token, R = T * K routed rows, E experts.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows grouped by expert, and the way back.

    Args:
        rows_RD: copies of the tokens, all of expert 0 first, then expert 1, ...; within an expert in token order.
        rows_per_expert_E: int64 counts, summing to R.
        slots_R: int64, row r came from slot slots_R[r] of the flattened (T, K) choices.
    """

    rows_RD: torch.Tensor
    rows_per_expert_E: torch.Tensor
    slots_R: torch.Tensor


def dispatch(hidden_TD: torch.Tensor, topk_ids_TK: torch.Tensor, num_experts: int) -> Dispatched:
    """Copy tokens (T, D) to their experts' rows, given ids (T, K) below num_experts."""
    flat_ids_R = topk_ids_TK.flatten()
    slots_R = flat_ids_R.argsort(stable=True)
    counts_E = torch.bincount(flat_ids_R, minlength=num_experts)
    return Dispatched(hidden_TD[slots_R // topk_ids_TK.shape[1]], counts_E, slots_R)


def combine(rows_RD: torch.Tensor, topk_weights_TK: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
    """Return the weighted sums (T, D) fp32 of the experts' results (R, D), added in the order of the K choices."""
    rows_by_slot_RD = torch.empty_like(rows_RD)
    rows_by_slot_RD[dispatched.slots_R] = rows_RD
    rows_TKD = rows_by_slot_RD.view(*topk_weights_TK.shape, -1).to(torch.float32)
    return (rows_TKD * topk_weights_TK[..., None]).sum(1)
