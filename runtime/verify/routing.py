"""Do both models send a token to the same experts? Counted per MoE layer, over free-running hidden states.

Shape suffixes: T tokens, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from runtime.verify.metrics import set_overlap


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """Routing agreement of one layer over num_tokens tokens.

    Attributes:
        overlap: mean over tokens of |experts of reference and candidate| / K, from 0 to 1.
        changed: share of tokens whose expert set differs in at least one expert.
    """

    layer: int
    num_tokens: int
    overlap: float
    changed: float


@dataclass(slots=True)
class RoutingCounter:
    """Running sums per layer; memory is three numbers a layer, whatever the length of the text."""

    _sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, reference: Mapping[int, torch.Tensor], candidate: Mapping[int, torch.Tensor]) -> None:
        """Count one window: layer -> topk_ids (T, K) int, same layers, tokens and K on both sides."""
        assert reference.keys() == candidate.keys(), (sorted(reference), sorted(candidate))
        for layer, ids_TK in reference.items():
            overlap_T = set_overlap(ids_TK, candidate[layer])
            sums = self._sums.setdefault(layer, [0.0, 0.0, 0.0])
            sums[0] += overlap_T.numel()
            sums[1] += overlap_T.sum().item()
            sums[2] += (overlap_T < 1).sum().item()

    def result(self) -> tuple[LayerRouting, ...]:
        """Return the agreement of every layer counted so far, in layer order."""
        return tuple(
            LayerRouting(layer, int(count), overlap / count, changed / count)
            for layer, (count, overlap, changed) in sorted(self._sums.items())
            if count
        )
