"""What the two products of fused experts are given: inputs as they are, as codes, or as the values of codes.

Codes are made where the checkpoint has engines round inputs and kernels multiply what they are rounded to. With a scale
for 128 columns, `up` writes codes itself; one for a whole row is known only when all tiles of the row are done, so that
a launch of its own has to find it. NVFP4 inputs have a calibrated scale for each expert: they are laid out first.

Shapes: T tokens, K columns, P rows with padding, I intermediate.
"""

from dataclasses import dataclass

import torch

from runtime.model.linear import Rounding
from runtime.moe.experts import CalibratedInputs, LocalExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.inputs import INPUT_GROUP, Inputs, QuantizedRows
from runtime.moe.layouts import ContiguousRows, Rows
from runtime.moe.weights import GROUP, ExpertScheme
from runtime.moe.workspace import Workspace

_UNKNOWN_CAPABILITY = 90
# matrix units that multiply E2M1 codes
_FP4_CAPABILITY = 100


@dataclass(frozen=True, slots=True)
class FusedInputs:
    """Makes the inputs of one layer's products, in the workspace.

    Args:
        ops: kernels or twins.
        experts: what is done to inputs.
        rows: the layout.
        workspace: holds them.
    """

    ops: FusedOps
    experts: LocalExperts
    rows: Rows
    workspace: Workspace

    def is_native(self, device: torch.device) -> bool:
        """Whether NVFP4 codes go to the matrix unit as they are."""
        return self.experts.calibrated is not None and capability_of(device) >= _FP4_CAPABILITY

    def room(self, dtype: torch.dtype, *, writes_codes: bool) -> Inputs:
        """Return where `up` writes to: values (P, I), or codes if it can write those that are multiplied."""
        weights, experts = self.experts.weights, self.experts
        is_rounded = experts.round_activations is not None and experts.multiplies_codes
        if is_rounded and writes_codes and weights.scheme is ExpertScheme.FP8_BLOCK:
            return self._codes("activation", self._num_rows, weights.intermediate_size)
        return self.workspace.take("activation", (self._num_rows, weights.intermediate_size), dtype)

    def of_tokens(self, hidden_TD: torch.Tensor) -> Inputs:
        """Return the inputs of gate and up."""
        if self.experts.calibrated is not None:
            return self._fp4(hidden_TD, self.experts.calibrated[0], "input", is_gathered=True)
        return self._rounded(hidden_TD, self.experts.round_inputs, None, "input")

    def of_activations(self, active: Inputs) -> Inputs:
        """Return the inputs of down, from what `up` wrote."""
        if isinstance(active, QuantizedRows):
            return active
        if self.experts.calibrated is not None:
            return self._fp4(active, self.experts.calibrated[1], "activation", is_gathered=False)
        return self._rounded(active, self.experts.round_activations, self.rows.position_of_slot, "activation")

    @property
    def _num_rows(self) -> int:
        return (self.rows.slots_P if isinstance(self.rows, ContiguousRows) else self.rows.slots).numel()

    def _rounded(
        self, values: torch.Tensor, rounding: Rounding | None, position_of_slot: torch.Tensor | None, name: str
    ) -> Inputs:
        if rounding is None:
            return values
        if not self.experts.multiplies_codes:
            return rounding(values, self.workspace)
        return self.ops.quantize_rows(values, self._codes(name, *values.shape), position_of_slot)

    def _codes(self, name: str, num_rows: int, num_columns: int) -> QuantizedRows:
        scheme = self.experts.weights.scheme
        num_groups = -(-num_columns // INPUT_GROUP) if scheme is ExpertScheme.FP8_BLOCK else 1
        codes_RK = self.workspace.take(f"{name}_codes", (num_rows, num_columns), scheme.code_dtype)
        return QuantizedRows(codes_RK, self.workspace.take(f"{name}_scales", (num_rows, num_groups), torch.float32))

    def _fp4(
        self, values: torch.Tensor, calibrated: CalibratedInputs, name: str, *, is_gathered: bool
    ) -> QuantizedRows:
        num_rows, num_columns = self._num_rows, values.shape[1]
        codes_PB = self.workspace.take(f"{name}_codes", (num_rows, num_columns // 2), torch.uint8)
        scales_PG = self.workspace.take(f"{name}_scales", (num_rows, num_columns // GROUP), torch.float8_e4m3fn)
        out = QuantizedRows(codes_PB, scales_PG, calibrated.scales_E, is_laid_out=True)
        return self.ops.quantize_fp4_rows(values, calibrated.factors_E, self.rows, out, is_gathered=is_gathered)


def capability_of(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU; of the CPU, what the kernels are mainly for."""
    if device.type != "cuda":
        return _UNKNOWN_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
