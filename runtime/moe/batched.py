"""Experts as two batched products over blocks of rows: whoever has no grouped product can still launch few of them.

Each block of rows belongs to one expert, whose weights are laid beside it; activation and sum are further launches.

Shapes: T tokens, D hidden, S slots, P rows with padding, B blocks of M rows, E experts, I intermediate.
"""

from dataclasses import dataclass

import torch

from runtime.moe.dispatcher import Slots, combine_slots, gather_rows, rows_to_slots
from runtime.moe.experts import LocalExperts, swiglu
from runtime.moe.layouts import ContiguousRows, MaskedRows, contiguous_rows, masked_rows
from runtime.moe.weights import ExpertWeights, Packed
from runtime.moe.workspace import Workspace

# weights laid beside the rows of a launch; a decoding step of a few tokens needs no second one
_WEIGHT_BYTES = 1 << 30
# rows of a block: fixed where a row may not notice its batch, else what fills a block of an average expert
_FIXED_BLOCK_M = 16
_MAX_BLOCK_M = 64
_MIN_BLOCK_M = 4


@dataclass(frozen=True, slots=True)
class BatchedExperts:
    """Blocks of rows, each times its expert's weights.

    Args:
        is_masked: give each expert room for all tokens: no weight is copied, but most rows are padding.
        is_batch_invariant: the shape of a block does not depend on the number of tokens.
        weight_bytes: copied for one launch at most, but for one block's.
    """

    is_masked: bool = False
    is_batch_invariant: bool = False
    weight_bytes: int = _WEIGHT_BYTES

    def run(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace, out_TD: torch.Tensor
    ) -> None:
        """Write weighted sums to out (T, D); see `GroupedExperts`."""
        results_SD = self.slot_results(hidden_TD, slots, experts, workspace)
        out_TD.copy_(combine_slots(results_SD, slots, workspace))

    def slot_results(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace
    ) -> torch.Tensor:
        """Return unweighted results (S, D); see `GroupedExperts`."""
        assert experts.calibrated is None, "inputs of all experts are rounded alike here"
        rows: ContiguousRows | MaskedRows
        ids_TK, num_experts = slots.ids_TK, slots.num_experts
        if self.is_masked:
            rows = masked_rows(ids_TK, num_experts, len(hidden_TD), workspace=workspace)
            slots_P, block_m, expert_of_block = rows.slots.flatten(), rows.slots.shape[1], None
        else:
            block_m = _FIXED_BLOCK_M if self.is_batch_invariant else block_rows(slots)
            rows = contiguous_rows(ids_TK, num_experts, block_m, num_shared=slots.num_shared, workspace=workspace)
            slots_P, expert_of_block = rows.slots_P, rows.expert_of_block.clamp_(min=0)
        if experts.round_inputs is not None:
            hidden_TD = experts.round_inputs(hidden_TD, workspace)
        weights, dtype, hidden_size = experts.weights, hidden_TD.dtype, hidden_TD.shape[1]
        rows_PD = workspace.take("rows", (len(slots_P), hidden_size), dtype)
        gather_rows(hidden_TD, slots_P, slots.num_choices, rows_PD, workspace)
        gate_up_P2I = workspace.take("gate_up", (len(slots_P), 2 * weights.intermediate_size), dtype)
        self._multiply(rows_PD, _Matrix(weights, weights.up), block_m, expert_of_block, gate_up_P2I, workspace)
        active_PI = swiglu(gate_up_P2I, workspace, block_m if self.is_batch_invariant else 0)
        if experts.round_activations is not None:
            active_PI = experts.round_activations(active_PI, workspace)
        # what went in is no longer needed
        self._multiply(active_PI, _Matrix(weights, weights.down), block_m, expert_of_block, rows_PD, workspace)
        results_SD = workspace.take("slots", (slots.num_slots, hidden_size), dtype)
        rows_to_slots(rows_PD, rows.position_of_slot, results_SD, workspace)
        return results_SD

    def _multiply(
        self,
        rows_PK: torch.Tensor,
        matrix: "_Matrix",
        block_m: int,
        expert_of_block: torch.Tensor | None,
        out_PN: torch.Tensor,
        workspace: Workspace,
    ) -> None:
        """Put rows times the transposed weights of their experts into out; without a list, block e is expert e's."""
        blocks_BMK, out_BMN = rows_PK.unflatten(0, (-1, block_m)), out_PN.unflatten(0, (-1, block_m))
        num_blocks, size = len(blocks_BMK), out_PN.shape[1] * rows_PK.shape[1] * rows_PK.element_size()
        needs_none = expert_of_block is None and matrix.weights.scheme.code_dtype is rows_PK.dtype
        step = num_blocks if needs_none else max(1, self.weight_bytes // size)
        for start in range(0, num_blocks, step):
            chunk = slice(start, min(start + step, num_blocks))
            chosen = chunk if expert_of_block is None else expert_of_block[chunk]
            weight_BNK = matrix.values(chosen, rows_PK.dtype, workspace)
            torch.bmm(blocks_BMK[chunk], weight_BNK.transpose(1, 2), out=out_BMN[chunk])


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One of the two matrices of all experts."""

    weights: ExpertWeights
    packed: Packed

    def values(self, experts: slice | torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        """Return the weights (B, N, K) of some experts: a view, or copied or multiplied out in the workspace."""
        codes = self.packed.codes
        if codes.dtype is dtype:
            if isinstance(experts, slice):
                return codes[experts]
            out = workspace.take("weights", (len(experts), *codes.shape[1:]), dtype)
            return torch.index_select(codes, 0, experts, out=out)
        values = self.weights.up_values if self.packed is self.weights.up else self.weights.down_values
        return values(dtype, experts, workspace)


def block_rows(slots: Slots) -> int:
    """Return M, a power of two: as many rows as an expert has on average, within bounds."""
    average = -(-slots.num_slots // slots.num_experts)
    return min(max(1 << (average - 1).bit_length(), _MIN_BLOCK_M), _MAX_BLOCK_M)


def warm_up_tokens(num_tokens: int, num_experts: int, num_choices: int) -> list[int]:
    """Return numbers of tokens of which one needs the most of each buffer, whatever comes up to `num_tokens`.

    Between two sizes of blocks more tokens need more memory; behind each the blocks are fewer.
    """
    sizes = [1 << power for power in range(_MAX_BLOCK_M.bit_length())]
    last = [size * num_experts // num_choices for size in sizes if size >= _MIN_BLOCK_M]
    return sorted({size for size in (*last, num_tokens) if 0 < size <= num_tokens})
