"""What grouped products take: rows of activations, as they are or as codes and scales, in one of two layouts.

Shapes: R rows, K columns, G groups of columns.
"""

from dataclasses import dataclass

import torch

from runtime.moe.layouts import ContiguousRows, MaskedRows

INPUT_GROUP = 128


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations; value = code * scale, for NVFP4 * global_scale as well.

    Args:
        codes: (R, K) float8_e4m3fn or int8; NVFP4 (R, K / 2) uint8, the even column in the low nibble.
        scales: fp32 (R, 1), one for a row, or fp32 (R, ceil(K / 128)); NVFP4 (R, K / 16) float8_e4m3fn.
        global_scale: NVFP4: fp32 (1,), or (E,), one for the rows of each expert.
        is_laid_out: rows lie in the order of a layout, each expert's together, and not in that of tokens.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None = None
    is_laid_out: bool = False

    @property
    def is_grouped(self) -> bool:
        """Whether a row has a scale for every 128 columns."""
        return self.scales.dtype is torch.float32 and self.scales.shape[1] > 1


Inputs = torch.Tensor | QuantizedRows
Rows = ContiguousRows | MaskedRows


def new_quantized_rows(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device, *, is_grouped: bool = False
) -> QuantizedRows:
    """Return room for rows of float8_e4m3fn or int8 codes."""
    num_scales = -(-num_columns // INPUT_GROUP) if is_grouped else 1
    codes = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
    return QuantizedRows(codes, torch.empty(num_rows, num_scales, dtype=torch.float32, device=device))
