"""Twin of `runtime.kernels.moe.quantize_rows`. Shapes as there."""

import torch
import torch.nn.functional as F

from runtime.moe.inputs import INPUT_GROUP, QuantizedRows


def quantize_rows(
    values_RK: torch.Tensor, out: QuantizedRows, position_of_slot: torch.Tensor | None = None
) -> QuantizedRows:
    """Write codes and scales of rows into `out`, and return it; arguments as those of the kernel."""
    largest = 448.0 if out.codes.dtype is torch.float8_e4m3fn else 127.0
    num_columns = values_RK.shape[1]
    group = INPUT_GROUP if out.is_grouped else num_columns
    padded_RK = F.pad(values_RK.to(torch.float32), (0, -num_columns % group))
    grouped_RGC = padded_RK.unflatten(1, (-1, group))
    scale_RG = grouped_RGC.abs().amax(-1) / largest
    divided_RGC = grouped_RGC / torch.where(scale_RG == 0, 1.0, scale_RG)[..., None]
    divided_RK = divided_RGC.clamp(-largest, largest).flatten(1)[:, :num_columns]
    codes_RK = (divided_RK.round() if out.codes.dtype is torch.int8 else divided_RK).to(out.codes.dtype)
    is_row_R = torch.full((len(values_RK),), position_of_slot is None, device=values_RK.device)
    if position_of_slot is not None:
        is_row_R[position_of_slot[position_of_slot >= 0].to(torch.int64)] = True
    out.codes.view(torch.uint8)[is_row_R] = codes_RK.view(torch.uint8)[is_row_R]
    out.scales[is_row_R] = scale_RG[is_row_R]
    return out
