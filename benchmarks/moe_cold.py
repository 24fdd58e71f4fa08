"""Copies of a layer for a few tokens, taken in turn, so that what all of them read comes from memory each time.

Routed experts differ from batch to batch; a shared expert that is a slot of every token does not. It would stay in a
cache that, in a model, every other layer empties.
"""

from dataclasses import replace

import torch

from runtime.moe.cost import LayerShape, bytes_per_weight
from runtime.moe.experts import LocalExperts
from runtime.moe.weights import ExpertWeights, Packed

# beyond, other experts' weights are enough to fill any cache between two uses
COLD_TOKENS = 2
# shared experts of all copies together, in caches
CACHES = 3


def num_layers(experts: LocalExperts, shape: LayerShape, cache_bytes: int) -> int:
    """Return how many layers' shared experts are more than CACHES times the cache."""
    size = shape.num_shared * shape.expert_weights * bytes_per_weight(experts.weights.scheme)
    return 1 if size == 0 else 1 + int(CACHES * cache_bytes / size)


def copies_of(experts: LocalExperts, shape: LayerShape, cache_bytes: int) -> list[LocalExperts]:
    """Return the layer, and copies that lie elsewhere and give the same results."""
    num = num_layers(experts, shape, cache_bytes)
    return [experts, *(replace(experts, weights=copied(experts.weights)) for _ in range(num - 1))]


def copied(weights: ExpertWeights) -> ExpertWeights:
    """Return the same weights in memory of their own."""

    def copy(packed: Packed) -> Packed:
        scales, global_scale = (None if part is None else part.clone() for part in (packed.scales, packed.global_scale))
        return Packed(packed.codes.clone(), scales, global_scale)

    return replace(weights, up=copy(weights.up), down=copy(weights.down))


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's second cache; 0 where nothing is timed."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
