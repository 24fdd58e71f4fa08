"""Scales of an FP8 KV cache, as checkpoints have them. Shapes: L layers, the MTP layer's last."""

import math

import torch

from converters.errors import InputError, UsageError
from converters.source import Source

# in the fuse group of queries, keys and values
_POSITIONS = {1: 0, 2: 1}


def read_kv_scales(source: Source) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return fp32 (L, 2), and a note if a decoder layer has none of its own; 1 there, as in the serving engines.

    Raises:
        InputError: a scale is not a finite number above zero.
        UsageError: a layer has a scale for each head.
    """
    num_layers = source.config.num_hidden_layers
    scales_L2 = torch.ones(num_layers + 1, 2)
    found: set[tuple[int, int]] = set()
    for name, weight in source.cache_scales.items():
        tensor = source.schema.tensors[weight]
        layer, fuse = tensor.layer, tensor.spec.fuse
        if layer is None or fuse is None or fuse.position not in _POSITIONS:
            continue
        place = (layer, _POSITIONS[fuse.position])
        scales_L2[place] = _scale(name, source.reader.read(name))
        found.add(place)
    missing = 2 * num_layers - sum(layer < num_layers for layer, _ in found)
    if not missing:
        return scales_L2, ()
    what = "no scale" if not found else f"no scale for {missing} of {2 * num_layers} parts"
    return scales_L2, (f"The checkpoint has {what} of an FP8 KV cache: keys and values are rounded by a scale of 1.",)


def _scale(name: str, stored: torch.Tensor) -> float:
    if stored.numel() != 1:
        raise UsageError(
            "kv_cache_dtype 'fp8'",
            expected="one scale for all heads of a layer",
            found=f"{stored.numel()} in {name}",
            next_step="Use --kv-cache-dtype auto.",
        )
    value = float(stored)
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"tensor {name}", expected="a finite number above zero", found=str(value))
    return value
