"""Experts as two grouped products of torch: CUTLASS on Hopper, on the CPU a loop inside of torch.

Shapes: T tokens, D hidden, S slots, E experts, I intermediate, N rows and K columns of a weight.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.moe.dispatcher import Slots, combine_slots, gather_rows, rows_to_slots
from runtime.moe.experts import LocalExperts, swiglu
from runtime.moe.layouts import ragged_rows
from runtime.moe.weights import ExpertScheme, ExpertWeights, Packed
from runtime.moe.workspace import Workspace

# rows of operands begin at multiples of it
ALIGNMENT_BYTES = 16
_E4M3_MAX = 448.0


def grouped_mm(rows_SK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return rows (S, K) times the transposed weights (E, N, K) of their experts, (S, N).

    Args:
        rows_SK: those of expert 0 first; what comes behind the last expert's is undefined in the result.
        weight_ENK: of the same dtype.
        ends_E: int32, where each expert's rows end.
    """
    weight_EKN = weight_ENK.transpose(1, 2)
    # torch 2.11 has it under its first name
    if hasattr(F, "grouped_mm"):
        return F.grouped_mm(rows_SK, weight_EKN, offs=ends_E)
    return torch._grouped_mm(rows_SK, weight_EKN, offs=ends_E)


@dataclass(frozen=True, slots=True)
class CutlassExperts:
    """One grouped product each for gate with up, and for down; activation and sum are launches of their own.

    Torch allocates the products' results, of a size that depends on the number of tokens alone, and takes no `out` for
    them: with what operators need inside, the only new memory behind a warm-up. On the CPU a product of fewer than four
    rows adds up in another order than one of more: an expert whose rows are shared out to copies of it, or that has
    others in its batch, may differ in the last bits. That is why no batch-invariant mode has this backend.
    """

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
        weights, shape = experts.weights, (slots.num_slots, hidden_TD.shape[1])
        rows = ragged_rows(slots.ids_TK, slots.num_experts, workspace=workspace)
        rows_SD = workspace.take("rows", shape, hidden_TD.dtype)
        # on CUDA the product of codes rounds its inputs itself
        is_scaled = _is_scaled(experts, hidden_TD.device)
        if experts.round_inputs is not None and not is_scaled:
            hidden_TD = experts.round_inputs(hidden_TD, workspace)
        gather_rows(hidden_TD, rows.slots_S, slots.num_choices, rows_SD, workspace)
        gate_up_S2I = _product(rows_SD, weights, weights.up, rows.ends_E, workspace, is_scaled=is_scaled)
        active_SI = swiglu(gate_up_S2I, workspace)
        if experts.round_activations is not None and not is_scaled:
            active_SI = experts.round_activations(active_SI, workspace)
        down_SD = _product(active_SI, weights, weights.down, rows.ends_E, workspace, is_scaled=is_scaled)
        results_SD = workspace.take("slots", shape, hidden_TD.dtype)
        rows_to_slots(down_SD, rows.position_of_slot, results_SD, workspace)
        return results_SD


def _is_scaled(experts: LocalExperts, device: torch.device) -> bool:
    """Whether FP8 codes are multiplied as they are; torch has no such product on the CPU."""
    is_fp8 = experts.weights.scheme is ExpertScheme.FP8_CHANNEL
    return is_fp8 and experts.multiplies_codes and device.type == "cuda"


def _product(
    rows_SK: torch.Tensor,
    weights: ExpertWeights,
    packed: Packed,
    ends_E: torch.Tensor,
    workspace: Workspace,
    *,
    is_scaled: bool,
) -> torch.Tensor:
    if is_scaled and packed.scales is not None:
        codes_SK, scales_S = quantize_tokens(rows_SK, workspace)
        return torch._scaled_grouped_mm(
            codes_SK,
            packed.codes.transpose(1, 2),
            scales_S,
            packed.scales,
            offs=ends_E,
            out_dtype=rows_SK.dtype,
            use_fast_accum=False,
        )
    if packed.codes.dtype is rows_SK.dtype:
        values_ENK = packed.codes
    elif packed is weights.up:
        values_ENK = weights.up_values(rows_SK.dtype, workspace=workspace)
    else:
        values_ENK = weights.down_values(rows_SK.dtype, workspace=workspace)
    return grouped_mm(rows_SK, values_ENK, ends_E)


def quantize_tokens(rows_SK: torch.Tensor, workspace: Workspace | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E4M3 codes (S, K) and scales (S,) fp32: amax / 448 per row, ties to even.

    They lie in the workspace, if there is one, until the next rows are quantized.
    Source: `runtime.model.activations.InputQuantizer` for FP8 per token, which multiplies out again.
    """
    buffers, shape = workspace or Workspace(rows_SK.device), tuple(rows_SK.shape)
    values_SK = buffers.take("rounding", shape, torch.float32).copy_(rows_SK)
    scale_S1, divisor_S1 = (buffers.take(name, (shape[0], 1), torch.float32) for name in ("token_scales", "divisors"))
    # the largest magnitude, without a tensor of magnitudes
    torch.linalg.vector_norm(values_SK, float("inf"), 1, keepdim=True, out=scale_S1).div_(_E4M3_MAX)
    is_zero_S1 = torch.eq(scale_S1, 0, out=buffers.take("token_is_zero", (shape[0], 1), torch.bool))
    # where all is zero, any divisor will do
    values_SK.div_(divisor_S1.copy_(scale_S1).masked_fill_(is_zero_S1, 1.0)).clamp_(-_E4M3_MAX, _E4M3_MAX)
    return buffers.take("token_codes", shape, torch.float8_e4m3fn).copy_(values_SK), scale_S1[:, 0]
