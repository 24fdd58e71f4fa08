"""Checkpoints quantized from a given source, in every dialect: what a data-free writer makes of it.

Codes and scales come from `converters.numerics`, which its own tests hold against the libraries; names, shapes and
config blocks are written down here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders import random_tensors, small_config, write_checkpoint
from quantized import DIALECTS, SIZES

from converters.config import Glm4MoeConfig
from converters.numerics import fp8, int8, nvfp4
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.schema import DtypePolicy, ModelSchema, Tensor, expand

Parts = dict[str, torch.Tensor]
FLOAT32, LIBRARY, MODELOPT = Arithmetic.FLOAT32, Arithmetic.COMPRESSED_TENSORS, Arithmetic.MODELOPT
CONFIG = small_config(**SIZES, num_hidden_layers=2, n_routed_experts=4)
SCHEMA = expand(Glm4MoeConfig.from_hf(CONFIG))


@dataclass(frozen=True)
class Maker:
    """A config block, and what becomes of a weight whose fused group has the largest magnitude (1, 1)."""

    config: dict[str, Any]
    make: Callable[[torch.Tensor, torch.Tensor], Parts]


def pair(names: str, values: tuple[torch.Tensor, ...]) -> Parts:
    return dict(zip(names.split(), values, strict=True))


def packed(weight: torch.Tensor, group: int, arithmetic: Arithmetic) -> Parts:
    codes, scale = int8.quantize_int8(weight, arithmetic, group)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": int8.pack_int32(codes), "weight_scale": scale, "weight_shape": shape}


def ct_nvfp4(weight: torch.Tensor, largest: torch.Tensor, arithmetic: Arithmetic, search: ScaleSearch) -> Parts:
    codes, local, whole = nvfp4.quantize_nvfp4(weight, largest, arithmetic, search)
    return {"weight_packed": codes, "weight_scale": local, "weight_global_scale": whole.view(1)}


def modelopt_nvfp4(weight: torch.Tensor, largest: torch.Tensor) -> Parts:
    codes, local, whole = nvfp4.quantize_nvfp4(weight, largest, MODELOPT, ScaleSearch.NONE)
    return {"weight": codes, "weight_scale": local, "weight_scale_2": whole.view(()), "input_scale": torch.tensor(0.5)}


def modelopt_fp8(weight: torch.Tensor, largest: torch.Tensor) -> Parts:
    codes, scale = fp8.quantize_tensor(weight, largest, MODELOPT)
    return {"weight": codes, "weight_scale": scale.view(()), "input_scale": torch.tensor(0.5)}


def modelopt_channel(weight: torch.Tensor, _: torch.Tensor) -> Parts:
    codes, scale = fp8.quantize_channel(weight, MODELOPT)
    return {"weight": codes, "weight_scale": scale.view(-1)}


def deepseek(weight: torch.Tensor, _: torch.Tensor) -> Parts:
    return pair("weight weight_scale_inv", fp8.quantize_block_inverse(weight, rows=32, columns=48))


def makers() -> dict[str, Maker]:
    found = {}
    for arithmetic in (FLOAT32, LIBRARY):
        pure: dict[str, Callable[[torch.Tensor, torch.Tensor, Arithmetic], Parts]] = {
            "ct-fp8-channel": lambda w, _, a: pair("weight weight_scale", fp8.quantize_channel(w, a)),
            "ct-fp8-tensor": lambda w, m, a: {
                "weight": fp8.quantize_tensor(w, m, a)[0],
                "weight_scale": fp8.quantize_tensor(w, m, a)[1].view(1),
            },
            "ct-fp8-block": lambda w, _, a: pair("weight weight_scale", fp8.quantize_block(w, a, rows=32, columns=48)),
            "ct-int8-channel": lambda w, _, a: pair("weight weight_scale", int8.quantize_int8(w, a)),
            "ct-int8-packed-channel": lambda w, _, a: packed(w, 0, a),
            "ct-int8-packed-group": lambda w, _, a: packed(w, 16, a),
            "ct-nvfp4": lambda w, m, a: ct_nvfp4(w, m, a, ScaleSearch.NONE),
        }
        for name, make in pure.items():
            label = name if arithmetic is FLOAT32 else f"{name}, {arithmetic.value}"
            found[label] = Maker(DIALECTS[name].config, lambda w, m, f=make, a=arithmetic: f(w, m, a))
    found["ct-nvfp4, searched"] = Maker(
        DIALECTS["ct-nvfp4"].config, lambda w, m: ct_nvfp4(w, m, FLOAT32, ScaleSearch.MSE)
    )
    found["deepseek-fp8-block"] = Maker(DIALECTS["deepseek-fp8-block"].config, deepseek)
    found["modelopt-fp8"] = Maker(DIALECTS["modelopt-fp8"].config, modelopt_fp8)
    found["modelopt-fp8-channel"] = Maker(DIALECTS["modelopt-fp8-channel"].config, modelopt_channel)
    found["modelopt-nvfp4"] = Maker(DIALECTS["modelopt-nvfp4"].config, modelopt_nvfp4)
    return found


MAKERS = makers()


def group_of(tensor: Tensor) -> object:
    fuse = tensor.spec.fuse
    return (tensor.layer, tensor.expert, tensor.spec.role, fuse.group) if fuse else tensor.name


def quantize(schema: ModelSchema, tensors: dict[str, torch.Tensor], maker: Maker) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores whose GEMM weights are quantized."""
    weights = [tensor for tensor in schema.tensors.values() if tensor.spec.dtype is DtypePolicy.QUANTIZABLE]
    largest: dict[object, torch.Tensor] = {}
    for tensor in weights:
        own = tensors[tensor.name].float().abs().max().view(1, 1)
        largest[group_of(tensor)] = torch.maximum(own, largest.get(group_of(tensor), own))
    stored = dict(tensors)
    for tensor in weights:
        parts = maker.make(stored.pop(tensor.name), largest[group_of(tensor)])
        stored |= {f"{tensor.module}.{suffix}": value.contiguous() for suffix, value in parts.items()}
    return stored


def plain_modules(schema: ModelSchema) -> list[str]:
    return [
        tensor.module
        for tensor in schema.tensors.values()
        if len(tensor.shape) == 2 and tensor.spec.dtype is not DtypePolicy.QUANTIZABLE
    ]


def write_pair(
    folder: Path,
    maker: Maker,
    change: Callable[[dict[str, torch.Tensor]], object] = len,
    tensors: dict[str, torch.Tensor] | None = None,
    **kinds: Any,
) -> tuple[Path, Path]:
    """Write a source and its quantized copy, whose stored tensors `change` may damage; return both folders."""
    tensors = tensors or random_tensors(SCHEMA, **kinds)
    source = write_checkpoint(folder / "source", tensors, CONFIG)
    stored = quantize(SCHEMA, tensors, maker)
    change(stored)
    block = {**maker.config, "ignore": plain_modules(SCHEMA)}
    copy = write_checkpoint(folder / "copy", stored, {**CONFIG, "quantization_config": block})
    if block["quant_method"] == "modelopt":
        nested = {"quant_algo": block["quant_algo"], "exclude_modules": block["ignore"]}
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": nested})
        (copy / "hf_quant_config.json").write_text(text)
    return source, copy
