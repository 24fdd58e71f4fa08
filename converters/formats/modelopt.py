"""NVIDIA ModelOpt: quantization_config, and the hf_quant_config.json that says the same in other words.

TensorRT-LLM reads the file first, vLLM and SGLang the block; both are written. Source: ModelOpt 0.47,
`torch/export/convert_hf_config.py` and the exports it makes.
"""

import json
from collections.abc import Iterable
from typing import Any

from converters.formats.compressed_tensors import ANY_LINEAR
from converters.quant.scheme import NVFP4_GROUP

QUANT_METHOD = "modelopt"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS = {
    "fp8": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-block": "FP8_PB_WO",
    "fp8-static": "FP8",
    "nvfp4": "NVFP4",
    "nvfp4-weight-only": "W4A16_NVFP4",
}
_EIGHT_BIT: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_FOUR_BIT: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}
# the group that the block has beside the algorithm, for the algorithms that it has one for
_GROUPS: dict[str, dict[str, Any]] = {
    "fp8-static": {"input_activations": _EIGHT_BIT, "weights": _EIGHT_BIT},
    "nvfp4": {"input_activations": _FOUR_BIT, "weights": _FOUR_BIT},
    "nvfp4-weight-only": {"weights": _FOUR_BIT},
}


def quantization_config(scheme: str, exclude: Iterable[str], *, has_kv_scales: bool) -> dict[str, Any]:
    """Return quantization_config of config.json.

    Args:
        scheme: its name on the command line.
        exclude: globs of the modules that stay unquantized.
        has_kv_scales: scales of an FP8 KV cache are among the tensors.
    """
    config: dict[str, Any] = {}
    if scheme in _GROUPS:
        config["config_groups"] = {"group_0": {**_GROUPS[scheme], "targets": [ANY_LINEAR]}}
    config |= {"ignore": list(exclude), "quant_algo": ALGORITHMS[scheme]}
    if has_kv_scales:
        config["kv_cache_scheme"] = _EIGHT_BIT
    return {**config, "producer": PRODUCER, "quant_method": QUANT_METHOD}


def quantization_file(scheme: str, exclude: Iterable[str], *, has_kv_scales: bool) -> bytes:
    """Return hf_quant_config.json; see `quantization_config`."""
    quantization: dict[str, Any] = {
        "quant_algo": ALGORITHMS[scheme],
        "kv_cache_quant_algo": "FP8" if has_kv_scales else None,
        "exclude_modules": list(exclude),
    }
    if _GROUPS.get(scheme, {}).get("weights") is _FOUR_BIT:
        quantization["group_size"] = NVFP4_GROUP
    return json.dumps({"producer": PRODUCER, "quantization": quantization}, indent=4).encode() + b"\n"
