"""Twin of `runtime.kernels.moe.up`. Shapes as there."""

from typing import Any

import torch
import torch.nn.functional as F

from runtime.kernels.twins.grouped import chosen_rows, grouped_product, rows_by_expert
from runtime.kernels.twins.quantize_rows import quantize_rows
from runtime.moe.inputs import Inputs, QuantizedRows, Rows
from runtime.moe.weights import ExpertWeights


def up(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    out: Inputs,
    config: Any = None,
    *,
    native_fp4: bool = False,
    rounded_to: torch.dtype = torch.float32,
) -> Inputs:
    """Write the SwiGLU, silu(gate) * up, of every row in use into `out`, and return it.

    Arguments as those of the kernel; `config` and `native_fp4` change no value here.
    """
    num_tokens = len(inputs.codes if isinstance(inputs, QuantizedRows) else inputs)
    is_laid_out = isinstance(inputs, QuantizedRows) and inputs.is_laid_out
    for expert, positions_M, slots_M in rows_by_expert(rows):
        rows_MH = chosen_rows(
            inputs, positions_M if is_laid_out else slots_M // (len(rows.position_of_slot) // num_tokens)
        )
        total_MN = grouped_product(rows_MH, weights.up, weights.scheme, expert, is_interleaved=True)
        value_MI = F.silu(total_MN[:, 0::2]) * total_MN[:, 1::2]
        _store(out, positions_M, value_MI.to(rounded_to) if isinstance(out, QuantizedRows) else value_MI)
    return out


def _store(out: Inputs, positions_M: torch.Tensor, value_MI: torch.Tensor) -> None:
    if not isinstance(out, QuantizedRows):
        out[positions_M] = value_MI.to(out.dtype)
        return
    codes_MI = torch.empty(value_MI.shape, dtype=out.codes.dtype, device=value_MI.device)
    scales_MG = out.scales[positions_M]
    quantize_rows(value_MI, QuantizedRows(codes_MI, scales_MG))
    out.codes.view(torch.uint8)[positions_M] = codes_MI.view(torch.uint8)
    out.scales[positions_M] = scales_MG
