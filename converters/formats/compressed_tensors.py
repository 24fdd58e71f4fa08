"""compressed-tensors: names beside a quantized weight, and the quantization_config block."""

from collections.abc import Iterable
from typing import Any

QUANT_METHOD = "compressed-tensors"
# release of the library whose output this module reproduces
FORMAT_VERSION = "0.20.0"
WEIGHT_SCALE = "weight_scale"


def fp8_channel_config(ignore: Iterable[str]) -> dict[str, Any]:
    """Return quantization_config for E4M3 weights per output channel and activations per token, quantized at run time.

    Args:
        ignore: names of the linear modules that stay unquantized.
    Source: the official FP8 releases of GLM-4.5 to 4.7.
    """
    eight_bit_float = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    group = {
        "format": "float-quantized",
        "targets": ["Linear"],
        "weights": {**eight_bit_float, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bit_float, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
    }
