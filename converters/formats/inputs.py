"""What `quantization_config` has engines do at run time to the inputs of a quantized weight."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from converters.errors import ConfigError
from converters.formats.compressed_tensors import ANY_LINEAR
from converters.formats.declared import QUANTIZATION_KEY

_SUBJECT = f"config.json: {QUANTIZATION_KEY}"
# what a comparison of models does with the inputs of quantized layers: nothing, or what engines do
FULL, AS_SERVED = ACTIVATIONS = ("full", "as-served")
_PATTERN = "re:"
_WHOLE_TOKEN = 0


class InputCode(StrEnum):
    """What the values of inputs become."""

    INT8 = "int8"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How inputs are quantized.

    Attributes:
        code: what to.
        group: columns of a token that share a scale which is found at run time; 0: all; None: there is none.
        is_static: a calibrated scale of the whole tensor stands beside the weight.
    """

    code: InputCode
    group: int | None = _WHOLE_TOKEN
    is_static: bool = False

    @property
    def label(self) -> str:
        """The scheme in words."""
        if self.group is None:
            return f"{self.code} by a calibrated scale"
        where = f"per {self.group} columns" if self.group else "per token"
        return f"{self.code} {where}{', below a calibrated scale' if self.is_static else ''}"


_PER_TOKEN = InputScheme(InputCode.FP8)
_STATIC = InputScheme(InputCode.FP8, None, is_static=True)
_NVFP4 = InputScheme(InputCode.NVFP4, 16, is_static=True)
# type, bits, strategy, group size, when scales are found
_COMPRESSED: dict[tuple[Any, ...], InputScheme] = {
    ("int", 8, "token", None, True): InputScheme(InputCode.INT8),
    ("float", 8, "token", None, True): _PER_TOKEN,
    ("float", 8, "group", 128, True): InputScheme(InputCode.FP8, 128),
    ("float", 8, "tensor", None, False): _STATIC,
    ("float", 4, "tensor_group", 16, "local"): _NVFP4,
}
# in blocks, engines quantize inputs as wide as the blocks are, though ModelOpt calls it weight-only
_MODELOPT: dict[str, InputScheme | None] = {
    "FP8": _STATIC,
    "FP8_PER_CHANNEL_PER_TOKEN": _PER_TOKEN,
    "FP8_PB_WO": InputScheme(InputCode.FP8, 128),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": None,
}


def input_scheme(block: Mapping[str, Any], module: str) -> InputScheme | None:
    """Return what happens to the inputs of a module whose weight is quantized; None: nothing.

    Args:
        block: quantization_config.
        module: by its official name.
    Raises:
        ConfigError: a scheme that is not known here.
    """
    match block.get("quant_method"):
        case "compressed-tensors":
            return _compressed_scheme(block["config_groups"], module)
        case "fp8" if block.get("activation_scheme", "dynamic") == "dynamic":
            return InputScheme(InputCode.FP8, int(block["weight_block_size"][1]))
        case "modelopt" | "modelopt_fp4" if block.get("quant_algo") in _MODELOPT:
            return _MODELOPT[block["quant_algo"]]
    raise _unknown({key: block.get(key) for key in ("quant_method", "quant_algo", "activation_scheme")})


def _compressed_scheme(groups: Mapping[str, Any], module: str) -> InputScheme | None:
    for group in groups.values():
        if any(_is_target(target, module) for target in group.get("targets", ())):
            args = group.get("input_activations")
            if args is None:
                return None
            names = ("type", "num_bits", "strategy", "group_size", "dynamic")
            found = _COMPRESSED.get(tuple(args.get(name) for name in names))
            if found is None or not args.get("symmetric", True):
                raise _unknown(args)
            return found
    return None


def _is_target(target: str, module: str) -> bool:
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return target in (ANY_LINEAR, module)


def _unknown(found: Mapping[str, Any]) -> ConfigError:
    return ConfigError(
        f"{_SUBJECT}: inputs",
        expected="INT8 or FP8 per token, FP8 per group or by a calibrated scale, or NVFP4",
        found=repr(dict(found))[:200],
        next_step="Compare with activations as they are.",
    )
