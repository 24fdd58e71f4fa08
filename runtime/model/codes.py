"""FP8 codes to fp32 by a table, which on a CPU takes a fifth of the time of a conversion and a product.

Shapes: O out features, I in features.
"""

import numpy as np
import torch

_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def multiply_out(codes_OI: torch.Tensor, scale_O1: torch.Tensor, out_OI: torch.Tensor | None = None) -> torch.Tensor:
    """Return codes * scales in fp32, (O, I), with the bits of `dequantize_channel`; NaN stays NaN.

    Args:
        codes_OI: float8_e4m3fn on the CPU, contiguous.
        scale_O1: a scale for each row.
        out_OI: fp32, takes the result.
    """
    if out_OI is None:
        out_OI = torch.empty(codes_OI.shape, dtype=torch.float32)
    # no index of a byte is out of bounds; the default mode would go through a copy
    np.take(_VALUES, codes_OI.view(torch.uint8).numpy(), out=out_OI.numpy(), mode="clip")
    return out_OI.mul_(scale_O1.float())
