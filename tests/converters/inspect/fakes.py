"""Checkpoints of full size that are all header: safetensors files whose data is a hole in a sparse file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters.checkpoint.header import build_header
from converters.config import Glm4MoeConfig
from converters.formats.compressed_tensors import Group, quantization_config
from converters.schema import DtypePolicy, ModelSchema, Role, Tensor, expand

CONFIGS = Path(__file__).parents[3] / "fixtures" / "configs"
Stored = dict[str, tuple[str, tuple[int, ...]]]


def config_of(model: str) -> dict[str, Any]:
    """Return the config.json of a released model."""
    return json.loads((CONFIGS / f"{model}.json").read_text())


def plain(schema: ModelSchema) -> Stored:
    """Return dtype and shape of every tensor as the official BF16 checkpoints have them."""
    return {tensor.name: (_dtype(tensor), tensor.shape) for tensor in schema.tensors.values()}


def per_channel(schema: ModelSchema, scale_dtype: str, also: Iterable[Role] = ()) -> Stored:
    """Return dtype and shape of every tensor with all GEMM weights, and roles in `also`, in FP8 with row scales."""
    stored: Stored = {}
    for tensor in schema.tensors.values():
        if tensor.spec.dtype is DtypePolicy.QUANTIZABLE or tensor.spec.role in also:
            stored[tensor.name] = ("F8_E4M3", tensor.shape)
            stored[f"{tensor.module}.weight_scale"] = (scale_dtype, (tensor.shape[0], 1))
        else:
            stored[tensor.name] = (_dtype(tensor), tensor.shape)
    return stored


def _dtype(tensor: Tensor) -> str:
    return "F32" if tensor.spec.dtype is DtypePolicy.KEEP_FP32 else "BF16"


def write_headers(folder: Path, config: Mapping[str, Any], tensors: Stored, files: Mapping[str, list[str]]) -> Path:
    """Write config, index and the given files; their data is a hole, so the disk holds a few MB."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for file, names in files.items():
        prefix, entries = build_header([(name, *tensors[name]) for name in names])
        with (folder / file).open("wb") as output:
            output.write(prefix)
            output.truncate(entries[-1].end)
        weight_map |= dict.fromkeys(names, file)
        total += sum(entry.nbytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def official(
    folder: Path,
    config: dict[str, Any],
    *,
    mtp_copies: bool = True,
    mtp_file: bool = False,
    stored: Stored | None = None,
) -> Path:
    """Write a released model: one file a layer, as the official ones are; optionally the MTP layer in its own file."""
    schema = expand(Glm4MoeConfig.from_hf(config), mtp_copies=mtp_copies)
    count = config["num_hidden_layers"] + 1
    stored = plain(schema) if stored is None else stored
    files: dict[str, list[str]] = {}
    for name in stored:
        layer = schema.locate(name).layer
        file = f"model-{1 if layer is None else layer + 1:05d}-of-{count:05d}.safetensors"
        files.setdefault("mtp.safetensors" if mtp_file and layer == schema.mtp_layer else file, []).append(name)
    return write_headers(folder, config, stored, files)


def quantized_config(config: dict[str, Any], schema: ModelSchema, also: Iterable[Role] = ()) -> dict[str, Any]:
    """Return the config of an official FP8 release: its ignore list names everything that is left plain."""
    plain_modules = [
        tensor.module if len(tensor.shape) > 1 else tensor.name
        for tensor in schema.tensors.values()
        if tensor.spec.dtype is not DtypePolicy.QUANTIZABLE and tensor.spec.role not in also
    ]
    return {**config, "quantization_config": quantization_config([Group("fp8")], plain_modules)}
