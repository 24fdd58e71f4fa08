"""From the transforms of `converters` to the kernels that make the same bytes."""

import torch

from converters.numerics.nvfp4 import GROUP, global_scale
from converters.quant.scheme import Arithmetic
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from converters.transforms.rows import RowTransform
from runtime.kernels.blocks import fp8_block
from runtime.kernels.groups import fp8_channel, fp8_tensor, int8
from runtime.kernels.launch import Launch
from runtime.kernels.nvfp4 import nvfp4

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# kernels count in int32
_MAX_VALUES = 1 << 31
# modelopt's local scales are multiplied with the global one: beyond this, products of fp32 are zero or infinite
_LEAST_FACTOR, _LARGEST_FACTOR = 2.0**-100, 2.0**100


def prepare(transform: RowTransform, rows_RC: torch.Tensor, *beside: torch.Tensor) -> Launch | None:
    """Return the launch that makes the outputs of a transform; None if it is left to the transform itself.

    Args:
        transform: of `converters.transforms.quantize`, in any arithmetic; others have no kernel.
        rows_RC: contiguous, where the kernel is to run.
        beside: as the transform takes it, on the CPU.
    """
    if rows_RC.dtype not in _DTYPES or not 0 < rows_RC.numel() < _MAX_VALUES or not rows_RC.is_contiguous():
        return None
    columns = rows_RC.shape[1]
    match transform:
        case QuantizeFp8Channel(arithmetic=arithmetic):
            return fp8_channel(rows_RC, arithmetic)
        case QuantizeFp8Block(arithmetic=arithmetic, rows=height, columns=width, inverse=is_inverse):
            return fp8_block(rows_RC, arithmetic, (height, width), is_inverse=is_inverse)
        case QuantizeFp8Tensor(arithmetic=arithmetic):
            # the scale follows from what stands beside the rows, whatever these are
            _, scale_11 = transform(torch.zeros(1, 1, dtype=rows_RC.dtype), *beside)
            return fp8_tensor(rows_RC, scale_11, arithmetic)
        case QuantizeInt8(arithmetic=arithmetic):
            return int8(rows_RC, arithmetic)
        case QuantizeInt8Packed(arithmetic=arithmetic, group=group) if columns % (group or 1) == 0:
            return int8(rows_RC, arithmetic, group, is_packed=True)
        case QuantizeNvfp4(arithmetic=arithmetic, search=search) if columns % GROUP == 0:
            global_11 = global_scale(beside[-1], rows_RC.dtype, arithmetic)
            is_in_range = _LEAST_FACTOR < float(global_11) < _LARGEST_FACTOR
            if arithmetic is Arithmetic.MODELOPT and not is_in_range:
                return None
            return nvfp4(rows_RC, global_11, arithmetic, search)
    return None


def is_sound(outputs: tuple[torch.Tensor, ...]) -> bool:
    """Return whether all scales are numbers above zero; if not, the twin makes the outputs or says what is wrong.

    Scales are not where a weight is NaN or Inf, and where 448 / amax or amax / 448 leaves the range of fp32.
    """
    scale = outputs[1]
    if scale.dtype is torch.float8_e4m3fn:
        return not bool((scale.view(torch.uint8) == 0x7F).any())
    return bool((torch.isfinite(scale) & (scale > 0)).all())
