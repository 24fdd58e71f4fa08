"""The same weights in every layout, made with torch alone: what `inspect` says must not depend on our own converter."""

from collections.abc import Iterable

import torch

Tensors = dict[str, torch.Tensor]
PACKED_SUFFIX = {"weight": "", "weight_scale": "_scale"}


def packed(tensors: Tensors) -> Tensors:
    """Stack the experts of each layer: gate above up, and down."""
    result = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    layers = sorted({name.split(".mlp.experts.")[0] for name in tensors.keys() - result.keys()})
    for layer in layers:
        prefix = f"{layer}.mlp.experts."
        num_experts = len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
        for part, suffix in PACKED_SUFFIX.items():
            if f"{prefix}0.down_proj.{part}" not in tensors:
                continue
            pairs = [
                cat(tensors, (f"{prefix}{expert}.{proj}_proj.{part}" for proj in ("gate", "up")))
                for expert in range(num_experts)
            ]
            result[f"{prefix}gate_up_proj{suffix}"] = torch.stack(pairs)
            downs = [tensors[f"{prefix}{expert}.down_proj.{part}"] for expert in range(num_experts)]
            result[f"{prefix}down_proj{suffix}"] = torch.stack(downs)
    return result


def fused(tensors: Tensors) -> Tensors:
    """Put q, k, v one above the other, and gate above up."""
    result = dict(tensors)
    for name in tensors:
        for group, members in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("gate_up_proj", ("gate_proj", "up_proj")),
        ):
            first = f".{members[0]}."
            if first in name:
                names = [name.replace(first, f".{member}.") for member in members]
                result[name.replace(first, f".{group}.")] = cat(tensors, names)
                for member in names:
                    del result[member]
    return result


def fused_shared(tensors: Tensors, num_experts: int) -> Tensors:
    """Give the shared expert the slot after the last routed one."""
    return {name.replace(".shared_experts.", f".experts.{num_experts}."): value for name, value in tensors.items()}


def cat(tensors: Tensors, names: Iterable[str]) -> torch.Tensor:
    """Concatenate rows; torch cannot do so with FP8 itself."""
    parts = [tensors[name] for name in names]
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)


def quantize(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Store these weights as FP8 codes with one scale per row."""
    result = dict(tensors)
    for name in names:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        result[name] = (weight / scale).to(torch.float8_e4m3fn)
        result[name.removesuffix("weight") + "weight_scale"] = scale
    return result
