"""DeepSeek's dialect of FP8, which transformers calls `fp8`: blocks of 128 x 128, scales named `weight_scale_inv`.

Despite the name the value multiplies. Source: transformers 5.23 `integrations/finegrained_fp8.py`.
"""

from collections.abc import Iterable
from typing import Any

from converters.quant.scheme import BLOCK

QUANT_METHOD = "fp8"


def quantization_config(modules_to_not_convert: Iterable[str]) -> dict[str, Any]:
    """Return quantization_config; the modules stay unquantized, each by its exact name."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": QUANT_METHOD,
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(modules_to_not_convert),
    }
