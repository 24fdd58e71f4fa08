"""Bring each token's copies to their experts, and the results back.

`dispatch` and `combine` copy rows for experts that run one after the other. Grouped experts start from `Slots`, from
which each backend makes the layout it needs, and hand back one result for each slot: whichever rank, layout or order
they come from, `combine_slots` adds them in one order.

Shapes: T tokens, D hidden, K experts per token, S = T * K slots, R <= S of them that this rank computes, E experts, P
rows with padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.moe.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows grouped by expert, and the way back.

    Args:
        rows_RD: copies of the tokens, all of expert 0 first, then expert 1, ...; within an expert in token order.
        rows_per_expert_E: int64 counts, summing to R.
        slots_R: int64, row r came from slot slots_R[r] of the flattened (T, K) choices; filtered slots have no row.
    """

    rows_RD: torch.Tensor
    rows_per_expert_E: torch.Tensor
    slots_R: torch.Tensor


def dispatch(hidden_TD: torch.Tensor, topk_ids_TK: torch.Tensor, num_experts: int) -> Dispatched:
    """Copy tokens (T, D) to their experts' rows.

    Args:
        hidden_TD: tokens.
        topk_ids_TK: any integer dtype, below num_experts; negative = filtered: another rank computes it.
        num_experts: E, those of this rank.
    """
    ids_S = topk_ids_TK.flatten()
    # behind the last expert are filtered slots
    places_S = torch.where(ids_S < 0, num_experts, ids_S)
    counts_E = torch.bincount(places_S, minlength=num_experts + 1)[:num_experts]
    # the loop over experts waits for the counts as well
    slots_R = places_S.argsort(stable=True)[: int(counts_E.sum())]
    return Dispatched(hidden_TD[slots_R // topk_ids_TK.shape[1]], counts_E, slots_R)


def combine(rows_RD: torch.Tensor, topk_weights_TK: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
    """Return the weighted sums (T, D) fp32 of the experts' results (R, D), added in ascending order of experts.

    That is the order in which a model that has one expert at a time in memory adds them up. Filtered slots add nothing.
    """
    num_rows, num_choices = len(rows_RD), topk_weights_TK.shape[1]
    row_of_slot_S = dispatched.slots_R.new_full((topk_weights_TK.numel(),), num_rows)
    row_of_slot_S[dispatched.slots_R] = torch.arange(num_rows, device=rows_RD.device)
    if num_rows < len(row_of_slot_S):
        # a row of zeros for all that are filtered
        rows_RD = F.pad(rows_RD, (0, 0, 0, 1))
    # rows lie expert by expert, so that of a token's rows the first is that of its lowest expert
    rows_TK, choices_TK = row_of_slot_S.view(-1, num_choices).sort(dim=1)
    weights_TK = topk_weights_TK.gather(1, choices_TK)
    sums_TD = torch.zeros(len(rows_TK), rows_RD.shape[1], device=rows_RD.device)
    for choice in range(num_choices):
        sums_TD += rows_RD[rows_TK[:, choice]].to(torch.float32) * weights_TK[:, choice, None]
    return sums_TD


@dataclass(frozen=True, slots=True)
class Slots:
    """What each token's slots ask for; see `runtime.moe.layouts`.

    Args:
        ids_TK: int32 experts, FILTERED where another rank computes the slot; a fused shared expert is the last choice.
        weights_TK: fp32, what the expert's result is multiplied with; 1 for the shared expert.
        num_experts: local experts that ids count, the shared one included.
        num_shared: how many of them are shared; the last ones.
        num_ranks: that share these slots, one of which this is.
    """

    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    num_experts: int
    num_shared: int
    num_ranks: int = 1

    @property
    def num_slots(self) -> int:
        """T * K."""
        return self.ids_TK.numel()

    @property
    def num_choices(self) -> int:
        """K, the shared expert included."""
        return self.ids_TK.shape[1]

    @property
    def rows_per_expert(self) -> float:
        """Rows that a routed expert of this rank is expected to get."""
        # a rank may have nothing but a copy of the shared expert
        num_routed = max(1, self.num_experts - self.num_shared)
        return len(self.ids_TK) * (self.num_choices - self.num_shared) / (num_routed * self.num_ranks)


def slots_of(
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    num_routed: int,
    num_shared: int,
    workspace: Workspace | None = None,
) -> Slots:
    """Return the slots of a routing (T, K), with a fused shared expert as one more choice of every token.

    Its weight is 1: routed weights bear routed_scaling_factor already, and the shared expert never does. They lie in
    the workspace, if there is one, until the next layer's are made.
    """
    buffers, (num_tokens, top_k) = workspace or Workspace(topk_ids_TK.device), topk_ids_TK.shape
    shape = (num_tokens, top_k + num_shared)
    ids_TK = buffers.take("ids", shape, torch.int32)
    weights_TK = buffers.take("routing_weights", shape, topk_weights_TK.dtype)
    ids_TK[:, :top_k].copy_(topk_ids_TK)
    ids_TK[:, top_k:].fill_(num_routed)
    weights_TK[:, :top_k].copy_(topk_weights_TK)
    weights_TK[:, top_k:].fill_(1)
    return Slots(ids_TK, weights_TK, num_routed + num_shared, num_shared)


def gather_rows(
    hidden_TD: torch.Tensor, slots_P: torch.Tensor, num_choices: int, out_PD: torch.Tensor, workspace: Workspace
) -> None:
    """Copy the token of each row's slot (P,) to out (P, D); padding gets the first token, and nobody reads the result.

    Source: permute of a grouped product, `index_select` being the one copy.
    """
    tokens_P = workspace.take("row_tokens", tuple(slots_P.shape), slots_P.dtype).copy_(slots_P)
    torch.index_select(hidden_TD, 0, tokens_P.clamp_(min=0).floor_divide_(num_choices), out=out_PD)


def rows_to_slots(
    rows_PD: torch.Tensor, position_of_slot: torch.Tensor, out_SD: torch.Tensor, workspace: Workspace
) -> None:
    """Copy each slot's row (P, D) to out (S, D), zero where the slot is filtered."""
    shape = tuple(position_of_slot.shape)
    rows_S = workspace.take("slot_rows", shape, position_of_slot.dtype).copy_(position_of_slot)
    torch.index_select(rows_PD, 0, rows_S.clamp_(min=0), out=out_SD)
    is_filtered_S = torch.lt(position_of_slot, 0, out=workspace.take("slot_filtered", shape, torch.bool))
    out_SD.masked_fill_(is_filtered_S[:, None], 0)


def combine_slots(values_SD: torch.Tensor, slots: Slots, workspace: Workspace) -> torch.Tensor:
    """Return the weighted sums (T, D) fp32 of slots' results (S, D), added in the order of slots, in fp32.

    No other token, rank or layout changes the order. The result lies in the workspace.
    """
    num_tokens, num_choices = slots.ids_TK.shape
    values_TKD = values_SD.view(num_tokens, num_choices, values_SD.shape[1])
    shape = (num_tokens, values_SD.shape[1])
    sums_TD = workspace.take("sums", shape, torch.float32).zero_()
    weighted_TD = workspace.take("weighted", shape, torch.float32)
    for choice in range(num_choices):
        torch.mul(values_TKD[:, choice], slots.weights_TK[:, choice, None], out=weighted_TD)
        sums_TD += weighted_TD
    return sums_TD
