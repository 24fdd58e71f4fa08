"""Twin of `runtime.kernels.moe.down`. Shapes as there."""

from typing import Any

import torch

from runtime.kernels.twins.grouped import chosen_rows, grouped_product, rows_by_expert
from runtime.moe.inputs import Inputs, Rows
from runtime.moe.weights import ExpertWeights


def down(
    inputs: Inputs,
    weights: ExpertWeights,
    rows: Rows,
    topk_weights_TK: torch.Tensor,
    out_SH: torch.Tensor,
    config: Any = None,
    *,
    native_fp4: bool = False,
) -> torch.Tensor:
    """Write each slot's result, times its routing weight, into `out_SH`, and return it.

    Arguments as those of the kernel; `config` and `native_fp4` change no value here.
    """
    weights_S = topk_weights_TK.flatten()
    for expert, positions_M, slots_M in rows_by_expert(rows):
        rows_MI = chosen_rows(inputs, positions_M)
        total_MH = grouped_product(rows_MI, weights.down, weights.scheme, expert, is_interleaved=False)
        out_SH[slots_M] = (total_MH * weights_S[slots_M, None]).to(out_SH.dtype)
    return out_SH
