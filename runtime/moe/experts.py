"""Multiply each expert's rows by its weights: one expert after the other, or all of them grouped.

Shapes: R routed rows grouped by expert, D hidden, E experts, T tokens, S slots, P rows, I intermediate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.model.linear import Rounding
from runtime.model.mlp import GatedMlp
from runtime.moe.dispatcher import Slots
from runtime.moe.weights import ExpertWeights
from runtime.moe.workspace import Workspace


def vanilla_experts(
    rows_RD: torch.Tensor, rows_per_expert_E: torch.Tensor, experts: Sequence[GatedMlp]
) -> torch.Tensor:
    """Run each expert on its own rows, one after the other; the oracle of every other backend.

    Args:
        rows_RD: (R, D), rows of expert 0 first.
        rows_per_expert_E: (E,) int64 counts; an expert without rows is not run, and there may be no rows at all.
        experts: E gated MLPs.
    Returns:
        (R, D) in the dtype of rows_RD, same order.
    """
    parts = rows_RD.split(rows_per_expert_E.tolist())
    found = [expert(part) for expert, part in zip(experts, parts, strict=True) if len(part)]
    return torch.cat(found) if found else rows_RD


@dataclass(frozen=True, slots=True)
class CalibratedInputs:
    """Scales of NVFP4 inputs that were calibrated, of each expert.

    Args:
        factors_E: fp32, what local scales are multiplied with before they are rounded.
        scales_E: fp32, 1 / factor: what codes times local scales are multiplied with.
    """

    factors_E: torch.Tensor
    scales_E: torch.Tensor

    @classmethod
    def of(cls, factors: Sequence[float], device: torch.device) -> "CalibratedInputs":
        """Return those of experts in their order."""
        factors_E = torch.tensor(factors, dtype=torch.float32, device=device)
        return cls(factors_E, factors_E.reciprocal())


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """The experts that a rank holds, for backends that run all of them at once.

    Args:
        weights: in grouped layout.
        round_inputs: what an engine does to the inputs of gate and up at run time; None: nothing.
        round_activations: the same for the inputs of down.
        multiplies_codes: rounded inputs may be multiplied as the codes that they are rounded to.
        calibrated: NVFP4 inputs of gate and up, and of down: multiplied as codes, which takes the place of rounding.
    """

    weights: ExpertWeights
    round_inputs: Rounding | None = None
    round_activations: Rounding | None = None
    multiplies_codes: bool = False
    calibrated: tuple[CalibratedInputs, CalibratedInputs] | None = None


class GroupedExperts(Protocol):
    """A backend that runs all experts of a layer in a fixed number of launches."""

    def slot_results(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace
    ) -> torch.Tensor:
        """Return each slot's result (S, D), not yet weighted, zero where filtered, in the dtype of hidden_TD.

        It lies in the workspace or is new. Neither the host waits for the device, nor is a count known to it.
        """

    def run(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace, out_TD: torch.Tensor
    ) -> None:
        """Write the weighted sums over the slots of each token to out (T, D): summed in fp32, rounded once."""


def swiglu(gate_up_P2I: torch.Tensor, workspace: Workspace, fixed_rows: int = 0) -> torch.Tensor:
    """Return silu(gate) * up (P, I) of interleaved rows (P, 2I), rounded behind each of the two as `GatedMlp` does.

    Args:
        gate_up_P2I: rows.
        workspace: holds the result.
        fixed_rows: compute so many at a time, that a row does not depend on the others; 0: all. Only on the CPU does it
            matter: there torch computes in vectors, what is left over one by one, and the two differ in the last bit.
    """
    gate_PI, up_PI = gate_up_P2I.unflatten(-1, (-1, 2)).unbind(-1)
    out_PI = workspace.take("activation", tuple(gate_PI.shape), gate_PI.dtype)
    out_PI.copy_(gate_PI)
    for part in out_PI.split(fixed_rows) if fixed_rows and out_PI.device.type == "cpu" else (out_PI,):
        F.silu(part, inplace=True)
    return out_PI.mul_(up_PI)
