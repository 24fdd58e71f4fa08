"""The router's product for a handful of tokens: fp32 sums of inputs and weights as they are stored, a launch in all.

Shapes: T tokens, H hidden, E experts; N rows of a tile of weights.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.moe.gemv import PLAIN, row_products

# weights that a program holds at once: with few tokens there are few programs
ROWS, COLUMNS = 2, 512


@triton.jit
def score_experts(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write the logits of ROWS experts for a token."""
    across: tl.constexpr = (EXPERTS + ROWS - 1) // ROWS
    token, part = tl.program_id(0) // across, tl.program_id(0) % across
    row_N = part * ROWS + tl.arange(0, ROWS)
    is_row_N = row_N < EXPERTS
    input_ptr = hidden_ptr + token.to(tl.int64) * HIDDEN
    logit_N = row_products(input_ptr, weight_ptr, weight_ptr, row_N, is_row_N, row_N, HIDDEN, PLAIN, COLUMNS)
    tl.store(out_ptr + token * EXPERTS + row_N, logit_N, mask=is_row_N)


def router_logits_launch(
    hidden_TH: torch.Tensor, weight_EH: torch.Tensor, *, out: torch.Tensor | None = None
) -> Launch:
    """Return the launch of `router_logits`."""
    num_tokens, (num_experts, hidden_size) = len(hidden_TH), weight_EH.shape
    for matrix in (hidden_TH, weight_EH):
        assert matrix.is_contiguous(), matrix.stride()
    if out is None:
        out = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=hidden_TH.device)
    constants = {"HIDDEN": hidden_size, "EXPERTS": num_experts, "ROWS": ROWS, "COLUMNS": COLUMNS}
    programs = num_tokens * triton.cdiv(num_experts, ROWS)
    return Launch(score_experts, programs, (hidden_TH, weight_EH, out), constants, (out,))


def router_logits(hidden_TH: torch.Tensor, weight_EH: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return router logits (T, E) fp32: products and sums in fp32, whatever the inputs' dtypes.

    A token's logits do not depend on the tokens beside it.

    Args:
        hidden_TH: any float dtype, contiguous.
        weight_EH: any float dtype, contiguous.
        out: where the result goes.
    """
    return router_logits_launch(hidden_TH, weight_EH, out=out).run()[0]
