"""Which tokens an expert is measured on: those routed to it, and more where they are too few.

Shapes: T tokens of the layer, E experts, K experts per token.
"""

from collections.abc import Sequence

import torch

from runtime.calibrate.parts import Part
from runtime.calibrate.record import Record, largest
from runtime.streaming.routed import Routed as Routed


def extra_tokens(routed: Routed, expert: int, min_tokens: int) -> torch.Tensor:
    """Return further tokens, int64, that bring an expert up to min_tokens, or to all tokens of the layer.

    Of the tokens that go elsewhere, those whose router score for this expert is highest; of equal ones the earlier.
    """
    chosen_T = (routed.topk_ids_TK == expert).any(1)
    num_tokens = len(chosen_T)
    missing = min(min_tokens, num_tokens) - int(chosen_T.sum())
    if missing <= 0:
        return torch.empty(0, dtype=torch.int64)
    scores_T = routed.router_logits_TE[:, expert].masked_fill(chosen_T, float("-inf"))
    return scores_T.sort(descending=True, stable=True).indices[:missing].sort().values


def fill_from_layer(record: Record, experts: Sequence[Part]) -> None:
    """Give experts without any token the largest figures that the layer's other experts have."""
    silent = [part for part in experts if not record.tokens[part.weights[0].module]]
    heard = [part for part in experts if record.tokens[part.weights[0].module]]
    for part in silent:
        for position, weight in enumerate(part.weights):
            if weight.module not in record.filled:
                record.measured[weight.module] = largest([record.measured[o.weights[position].module] for o in heard])
                record.filled[weight.module] = "largest of the layer's experts"
