"""Products with weights that are stored narrower than fp32: widened by blocks that stay in the cache.

On a CPU, a weight that is widened as a whole goes to memory and comes back for every product. Sums run over all of I
either way; their order may be another one than that of a plain product, so results agree to rounding, not bit for bit.

Shapes: O out features, I in features, R rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from runtime.model.codes import multiply_out

# of a widened block
BLOCK_BYTES = 4 << 20
# torch asks another library for fp32 products by default, which takes twice the time on processors of other makers
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def products(
    weight_OI: torch.Tensor, scale_O1: torch.Tensor | None, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return x W^T, (R, O) fp32, for several x (R, I) fp32 on the CPU; each block is widened once for all of them.

    Args:
        weight_OI: in any float dtype; blocks are the same for all of them, and so are the results for equal values.
        scale_O1: of FP8 codes.
        inputs: each of a number of rows of its own, none of it joined with another.
    """
    num_out, width = weight_OI.shape
    step = max(1, BLOCK_BYTES // (width * torch.float32.itemsize))
    inputs = [rows_RI.contiguous() for rows_RI in inputs]
    outputs = [torch.empty(len(rows_RI), num_out) for rows_RI in inputs]
    is_wide = weight_OI.dtype is torch.float32
    buffer_BI = torch.empty(0 if is_wide else min(step, num_out), width)
    for start in range(0, num_out, step):
        stop = min(start + step, num_out)
        block_BI = weight_OI[start:stop]
        if not is_wide:
            wide_BI = buffer_BI[: stop - start]
            if scale_O1 is not None and block_BI.dtype is torch.float8_e4m3fn:
                multiply_out(block_BI, scale_O1[start:stop], wide_BI)
            else:
                wide_BI.copy_(block_BI)
            block_BI = wide_BI
        for rows_RI, out_RO in zip(inputs, outputs, strict=True):
            if len(rows_RI):
                out_RO[:, start:stop] = _product(rows_RI, block_BI)
    return outputs


def _product(rows_RI: torch.Tensor, block_BI: torch.Tensor) -> torch.Tensor:
    if _LINEAR is None:
        return F.linear(rows_RI, block_BI)
    found: torch.Tensor = _LINEAR(rows_RI, block_BI, None, "none", [], "")
    return found
