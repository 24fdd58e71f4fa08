"""Quantized checkpoints for tests, in every dialect: random codes, random scales, and what they stand for.

The expected weights come from compressed-tensors' own decompressors, or from formulas of a few lines where that library
has none. Codes are random rather than made from weights: whatever lies in a file must be decoded.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from builders import random_tensors, small_config, write_checkpoint

from converters.config import Glm4MoeConfig
from converters.schema import DtypePolicy, Role, Tensor, expand

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Parts = dict[str, torch.Tensor]
# sizes that suit groups of 16 and leave blocks of 32 x 48 cut off at both edges
SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 80}


@dataclass(frozen=True)
class Dialect:
    """A format: its config block, random parts of an (O, I) weight, and the fp32 or bf16 weight they stand for."""

    config: dict[str, Any]
    parts: Callable[[int, int, torch.Generator], Parts]
    decode: Callable[[Parts], torch.Tensor]


def compressed(weights: dict[str, Any], name: str, parts: Callable[[int, int, torch.Generator], Parts]) -> Dialect:
    """Return a dialect of compressed-tensors, decoded by that library."""
    weights = {"symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights, "format": name}
    config = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": group}, "ignore": []}

    def decode(found: Parts) -> torch.Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme.model_validate(group)
        return BaseCompressor.get_value_from_registry(name).decompress(found, scheme)["weight"]

    return Dialect(config, parts, decode)


def fp8_codes(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def int_codes(rows: int, columns: int, generator: torch.Generator, bits: int = 8) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


def scales(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def packed_int(rows: int, columns: int, generator: torch.Generator, bits: int, group: int | None) -> Parts:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "weight_packed": pack_to_int32(int_codes(rows, columns, generator, bits), bits),
        "weight_scale": scales(generator, rows, columns // group if group else 1),
        "weight_shape": torch.tensor([rows, columns]),
    }


def nvfp4_codes(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    local = (torch.rand(rows, columns // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    return codes, local


def nvfp4_values(codes: torch.Tensor) -> torch.Tensor:
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).long()
    magnitudes = torch.tensor(E2M1)[nibbles & 7]
    return torch.where(nibbles > 7, -magnitudes, magnitudes)


def modelopt(algorithm: str, parts: Callable[[int, int, torch.Generator], Parts], decode: Any) -> Dialect:
    return Dialect({"quant_method": "modelopt", "quant_algo": algorithm, "ignore": []}, parts, decode)


def _by_element(block_scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    wide = block_scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


BLOCK = (32, 48)
DIALECTS: dict[str, Dialect] = {
    "ct-fp8-channel": compressed(
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        "float-quantized",
        lambda o, i, g: {"weight": fp8_codes(o, i, g), "weight_scale": scales(g, o, 1)},
    ),
    "ct-fp8-channel-fp32-scales": compressed(
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        "float-quantized",
        lambda o, i, g: {"weight": fp8_codes(o, i, g), "weight_scale": scales(g, o, 1, dtype=torch.float32)},
    ),
    "ct-fp8-tensor": compressed(
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "float-quantized",
        lambda o, i, g: {
            "weight": fp8_codes(o, i, g),
            "weight_scale": scales(torch.Generator().manual_seed(1), 1),
            "input_scale": torch.tensor([0.5], dtype=torch.bfloat16),
        },
    ),
    "ct-fp8-block": compressed(
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(BLOCK)},
        "float-quantized",
        lambda o, i, g: {"weight": fp8_codes(o, i, g), "weight_scale": scales(g, blocks(o, 32), blocks(i, 48))},
    ),
    "ct-int8-channel": compressed(
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        "int-quantized",
        lambda o, i, g: {"weight": int_codes(o, i, g), "weight_scale": scales(g, o, 1)},
    ),
    "ct-int8-packed-channel": compressed(
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        "pack-quantized",
        lambda o, i, g: packed_int(o, i, g, 8, None),
    ),
    "ct-int8-packed-group": compressed(
        {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16},
        "pack-quantized",
        lambda o, i, g: packed_int(o, i, g, 8, 16),
    ),
    "ct-int4-packed-group": compressed(
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "actorder": None},
        "pack-quantized",
        lambda o, i, g: packed_int(o, i, g, 4, 16),
    ),
    "ct-nvfp4": compressed(
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "nvfp4-pack-quantized",
        lambda o, i, g: {
            **dict(zip(("weight_packed", "weight_scale"), nvfp4_codes(o, i, g), strict=True)),
            "weight_global_scale": torch.tensor([893.25]),
            "input_global_scale": torch.tensor([17.5]),
        },
    ),
    "deepseek-fp8-block": Dialect(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        lambda o, i, g: {
            "weight": fp8_codes(o, i, g),
            "weight_scale_inv": scales(g, blocks(o, 32), blocks(i, 48), dtype=torch.float32),
        },
        lambda p: p["weight"].float() * _by_element(p["weight_scale_inv"], p["weight"].shape, BLOCK),
    ),
    "modelopt-fp8": modelopt(
        "FP8",
        lambda o, i, g: {
            "weight": fp8_codes(o, i, g),
            "weight_scale": torch.tensor(0.0123),
            "input_scale": torch.tensor(0.5),
        },
        lambda p: p["weight"].float() * p["weight_scale"],
    ),
    "modelopt-fp8-channel": modelopt(
        "FP8_PER_CHANNEL_PER_TOKEN",
        lambda o, i, g: {"weight": fp8_codes(o, i, g), "weight_scale": scales(g, o, dtype=torch.float32)},
        lambda p: p["weight"].float() * p["weight_scale"][:, None],
    ),
    "modelopt-nvfp4": modelopt(
        "NVFP4",
        lambda o, i, g: {
            **dict(zip(("weight", "weight_scale"), nvfp4_codes(o, i, g), strict=True)),
            "weight_scale_2": torch.tensor(0.00117),
            "input_scale": torch.tensor(0.5),
        },
        lambda p: (
            nvfp4_values(p["weight"])
            * (p["weight_scale"].float() * p["weight_scale_2"]).repeat_interleave(16, 1)
        ),
    ),
}  # fmt: skip


def is_quantized(tensor: Tensor) -> bool:
    """What the official FP8 releases quantize: GEMM weights, and the MTP layer's head with them."""
    return tensor.spec.dtype is DtypePolicy.QUANTIZABLE or tensor.spec.role is Role.MTP_HEAD


def quantized_checkpoint(folder: Path, dialect: Dialect, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a random checkpoint in a dialect; return its folder and every tensor as bf16 weights that it stands for."""
    config = small_config(**{**SIZES, **changes}, quantization_config=dialect.config)
    schema = expand(Glm4MoeConfig.from_hf(config))
    stored = random_tensors(schema)
    expected = dict(stored)
    generator = torch.Generator().manual_seed(3)
    for tensor in filter(is_quantized, schema.tensors.values()):
        rows, columns = tensor.shape
        parts = dialect.parts(rows, columns, generator)
        expected[tensor.name] = dialect.decode(dict(parts)).to(torch.bfloat16)
        del stored[tensor.name]
        stored |= {f"{tensor.module}.{suffix}": value.contiguous() for suffix, value in parts.items()}
    folder = write_checkpoint(folder, stored, config, 2)
    if dialect.config["quant_method"] == "modelopt":
        block = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": dialect.config["quant_algo"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(block))
    return folder, expected
