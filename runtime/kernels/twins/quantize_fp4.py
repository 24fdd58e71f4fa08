"""Twin of `runtime.kernels.moe.quantize_fp4`. Shapes as there."""

import torch

from converters.numerics.nvfp4 import E2M1_MAX, E4M3_MAX, GROUP, encode_pairs
from runtime.kernels.twins.grouped import rows_by_expert
from runtime.moe.inputs import QuantizedRows, Rows


def quantize_fp4_rows(
    values: torch.Tensor, factors_E: torch.Tensor, rows: Rows, out: QuantizedRows, *, is_gathered: bool
) -> QuantizedRows:
    """Write codes and local scales of a layout's rows into `out`, and return it; arguments as those of the kernel."""
    top_k = len(rows.position_of_slot) // len(values)
    for expert, positions_M, slots_M in rows_by_expert(rows):
        chosen = slots_M // top_k if is_gathered else positions_M
        grouped_MGC = values[chosen].to(torch.float32).unflatten(1, (-1, GROUP))
        sixth_MG = grouped_MGC.abs().amax(-1) / E2M1_MAX
        local_MG = (factors_E[expert] * sixth_MG).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        scale_MG = local_MG.to(torch.float32) / factors_E[expert]
        scaled_MGC = grouped_MGC / torch.where(scale_MG == 0, 1.0, scale_MG)[..., None]
        codes_MB = torch.empty(len(scaled_MGC), out.codes.shape[1], dtype=torch.uint8, device=values.device)
        encode_pairs(scaled_MGC.flatten(1), codes_MB)
        out.codes[positions_M] = codes_MB
        out.scales.view(torch.uint8)[positions_M] = local_MG.view(torch.uint8)
    return out
